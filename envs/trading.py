"""The single trading environment with Gymnasium's interface, over any features or over the bundled bars."""

from __future__ import annotations

from typing import Any, Literal, get_args

import gymnasium
import numpy as np
from gymnasium import spaces

from configs import load_config
from data import LOOKBACK, BundledBars, Scaler, compute_features, walk_forward_splits
from envs.dynamics import TradingDynamics, observation_scaler
from envs.history import HistoryBatch
from masking import ActionAudit

Window = Literal["train", "validation", "test"]
"""Parts of the latest walk-forward fold."""


class TradingEnv(gymnasium.Env[np.ndarray, np.int64]):
    """One account walking through history; see `envs.dynamics` for the table of observations.

    Actions: Discrete(A), 0 Hold, 1.. target positions. An action that `action_masks()` forbids raises
    `InvalidActionError`. An episode terminates when the kill switch latches and is truncated after `episode_bars`
    or at the end of history. `reset(options={"time": t})` starts at a given feature row, else at a random one.
    `info` holds `action_mask`, `state` (raw row [S]), `equity`, `position`, `drawdown`, `cost` and `time`. Executed
    actions are counted in `audit`.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium's own declaration

    def __init__(
        self,
        dynamics: TradingDynamics,
        scaler: Scaler,
        features: np.ndarray,
        uncertainty: np.ndarray | None = None,
        *,
        episode_bars: int | None = 252,
    ) -> None:
        self.dynamics = dynamics
        self.scaler = scaler
        self.walk = HistoryBatch(dynamics, features, uncertainty, batch=1, episode_bars=episode_bars)
        self.observation_space = spaces.Box(-1.0, 1.0, (len(dynamics.obs_names),), np.float32)
        self.action_space = spaces.Discrete(dynamics.num_actions)
        self.audit = ActionAudit()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a new episode with a flat account."""
        super().reset(seed=seed)
        time = (options or {}).get("time")
        if time is None:
            time = int(self.np_random.integers(0, self.walk.last_row))
        elif not 0 <= time < self.walk.last_row:
            raise ValueError(f"options['time']: expected 0 <= time < {self.walk.last_row}, was {time}")
        self.walk.restart(np.array([0]), np.array([time]))
        return self._obs(), self._info(cost=0.0)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Execute one action at the next bar's open."""
        actions, masks = np.asarray([action]), self.walk.action_masks
        step = self.walk.step(actions)
        self.audit.record(actions, masks)
        return (
            self._obs(),
            float(step.reward[0]),
            bool(step.terminated[0]),
            bool(step.truncated[0]),
            self._info(cost=float(step.outcome.cost[0])),
        )

    def action_masks(self) -> np.ndarray:
        """Valid actions of the current state, bool [A]; a copy, so that no caller can open the gate."""
        masks: np.ndarray = self.walk.action_masks[0]
        return masks.copy()

    def _obs(self) -> np.ndarray:
        obs: np.ndarray = self.scaler(self.walk.state[:, :-1])[0]
        return obs

    def _info(self, cost: float) -> dict[str, Any]:
        account = self.walk.account
        return {
            "action_mask": self.action_masks(),
            "state": self.walk.state[0].copy(),
            "equity": float(account.equity[0]),
            "position": float(account.position[0]),
            "drawdown": float(account.drawdown[0]),
            "cost": cost,
            "time": int(self.walk.time[0]),
        }


def bundled_trading_env(symbol: str = "sp500", window: Window = "train", episode_bars: int | None = 252) -> TradingEnv:
    """Trading on the daily bars 1999-2018 that come with `arch`, under the rules, costs and reward of `default`.

    Args: symbol: sp500 or nasdaq; window: stretch of history to walk through, the scaler is always fitted on `train`;
        episode_bars: bars after which an episode is truncated, None walks to the end of the window.
    Raises: ValueError on the window, BarsError on the symbol.
    """
    if window not in get_args(Window):
        raise ValueError(f"window: expected one of {get_args(Window)}, was {window!r}")
    config = load_config("default")
    table = compute_features(BundledBars(symbol).load(), config.data.bars_per_year, symbol)
    purge = LOOKBACK + config.mbpo.rollout_length
    split = walk_forward_splits(len(table), config.data.split, config.data.bars_per_year, purge)[-1]
    return TradingEnv(
        TradingDynamics.from_config(table.names, config),
        observation_scaler(table.rows(split.train)),
        table.rows(getattr(split, window)).values,
        episode_bars=episode_bars,
    )
