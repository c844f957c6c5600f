"""A batch of accounts walking through historical feature rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from envs.account import Account, StepOutcome, initial_account
from envs.dynamics import TradingDynamics
from masking import check_actions


class Step(NamedTuple):
    """One bar of a batch; arrays [B]."""

    reward: np.ndarray
    terminated: np.ndarray
    """bool: the kill switch latched."""
    truncated: np.ndarray
    """bool: history or the episode length ended."""
    outcome: StepOutcome


class HistoryBatch:
    """B independent walks over feature rows, in float64.

    Args:
        dynamics: the known part of trading.
        features: [T, M] raw feature rows, T >= 2, or [P, T, M] of P markets on one clock.
        uncertainty: [T] or [P, T] ensemble disagreement per row, or None for zeros.
        batch: B; walk b is on market b % P.
        episode_bars: bars after which a walk is truncated; None walks to the end of history.
    """

    def __init__(
        self,
        dynamics: TradingDynamics,
        features: np.ndarray,
        uncertainty: np.ndarray | None = None,
        *,
        batch: int,
        episode_bars: int | None = None,
    ) -> None:
        width = len(dynamics.feature_names)
        if (
            features.ndim not in (2, 3)
            or not features.shape[0]
            or features.shape[-2] < 2
            or features.shape[-1] != width
        ):
            raise ValueError(f"features: expected [T >= 2, {width}] or [P, T, {width}], was {list(features.shape)}")
        if not np.isfinite(features).all():
            raise ValueError("features: expected finite values, found NaN or infinity")
        if episode_bars is not None and not episode_bars >= 1:
            raise ValueError(f"episode_bars: expected >= 1 or None, was {episode_bars}")
        if uncertainty is not None and uncertainty.shape != features.shape[:-1]:
            raise ValueError(f"uncertainty: expected {list(features.shape[:-1])}, was {list(uncertainty.shape)}")
        if uncertainty is not None and not np.isfinite(uncertainty).all():
            raise ValueError("uncertainty: expected finite values, found NaN or infinity")
        self.dynamics = dynamics
        self.features = np.asarray(features, dtype=np.float64).reshape(-1, *features.shape[-2:])
        disagreement = np.zeros(features.shape[:-1]) if uncertainty is None else np.asarray(uncertainty, np.float64)
        self.uncertainty = disagreement.reshape(self.features.shape[:2])
        self.batch = batch
        self.market = np.arange(batch) % len(self.features)
        self.episode_bars = episode_bars
        self.time = np.zeros(batch, dtype=np.int64)
        self.age = np.zeros(batch, dtype=np.int64)
        self.account = initial_account(batch, np, dtype=np.float64)
        self.state: np.ndarray
        self.action_masks: np.ndarray
        self._refresh()

    @property
    def last_row(self) -> int:
        """Index of the last feature row, on which no decision is made."""
        return int(self.features.shape[1]) - 1

    def restart(self, rows: np.ndarray, time: np.ndarray) -> None:
        """Begin new walks: `rows` indexes the batch, `time` gives their first feature row, before the last one."""
        if np.any((time < 0) | (time >= self.last_row)):
            raise ValueError(f"time: expected 0 <= time < {self.last_row}, was {np.asarray(time).tolist()}")
        fresh = initial_account(1, np, dtype=np.float64)
        # Copies: columns may share memory with each other or with what a caller kept.
        self.account = Account(*map(np.array, self.account))
        for column, start in zip(self.account, fresh, strict=True):
            column[rows] = start
        self.time, self.age = self.time.copy(), self.age.copy()
        self.time[rows] = time
        self.age[rows] = 0
        # Few of many walks end at a time; copies, because a caller may have kept what it was shown.
        self.state, self.action_masks = self.state.copy(), self.action_masks.copy()
        self.state[rows], self.action_masks[rows] = self._shown(rows)

    def step(self, actions: np.ndarray) -> Step:
        """Execute one action per walk.

        Args: actions [B] integer.
        Raises: InvalidActionError if a mask forbids one of them, ValueError if a walk stands at the end of
            history; nothing has moved then.
        """
        check_actions(actions, self.action_masks)
        if (self.time >= self.last_row).any():
            rows = np.flatnonzero(self.time >= self.last_row).tolist()
            raise ValueError(f"walks {rows}: expected a restart at the end of history, was another step")
        time = self.time + 1
        account, outcome, reward = self.dynamics.step(self.account, actions, self.features[self.market, time])
        self.time, self.age, self.account = time, self.age + 1, account
        terminated = self.account.killed > 0
        truncated = self.time >= self.last_row
        if self.episode_bars is not None:
            truncated = truncated | (self.age >= self.episode_bars)
        self._refresh()
        return Step(reward, terminated, truncated & ~terminated, outcome)

    def state_dict(self) -> dict[str, Any]:
        """Where every walk stands."""
        return {"time": self.time, "age": self.age, "account": self.account._asdict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave, in a batch of the same size over the same rows."""
        self.time, self.age, self.account = state["time"], state["age"], Account(**state["account"])
        self._refresh()

    def _refresh(self) -> None:
        self.state, self.action_masks = self._shown(slice(None))

    def _shown(self, rows: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        place = self.market[rows], self.time[rows]
        account = Account(*(column[rows] for column in self.account))
        state = self.dynamics.state_row(self.features[place], account, self.uncertainty[place])
        return state, self.dynamics.action_masks(state)
