"""The single trading environment with Gymnasium's interface."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from data import Scaler
from envs.dynamics import TradingDynamics
from envs.history import HistoryBatch


class TradingEnv(gymnasium.Env[np.ndarray, np.int64]):
    """One account walking through history; see `envs.dynamics` for the table of observations.

    Actions: Discrete(A), 0 Hold, 1.. target positions. An action that `action_masks()` forbids raises
    `InvalidActionError`. An episode terminates when the kill switch latches and is truncated after `episode_bars`
    or at the end of history. `reset(options={"time": t})` starts at a given feature row, else at a random one.
    `info` holds `action_mask`, `state` (raw row [S]), `equity`, `position`, `drawdown`, `cost` and `time`.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium's own declaration

    def __init__(
        self,
        dynamics: TradingDynamics,
        scaler: Scaler,
        features: np.ndarray,
        uncertainty: np.ndarray | None = None,
        *,
        episode_bars: int = 252,
    ) -> None:
        self.dynamics = dynamics
        self.scaler = scaler
        self.walk = HistoryBatch(dynamics, features, uncertainty, batch=1, episode_bars=episode_bars)
        self.observation_space = spaces.Box(-1.0, 1.0, (len(dynamics.obs_names),), np.float32)
        self.action_space = spaces.Discrete(dynamics.num_actions)

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
        step = self.walk.step(np.asarray([action]))
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
