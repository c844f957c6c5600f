"""Batched trading environments: the base over one account step, and rows that walk through history."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from gymnasium import spaces

from data import Scaler
from envs.batch import BatchStep, BatchVecEnv
from envs.dynamics import TradingDynamics
from envs.history import HistoryBatch
from masking import ActionAudit


class TradingVecEnv(BatchVecEnv):
    """Base of batched trading environments: observations are scaled state rows.

    A subclass owns the rows and implements `_state`, `_masks`, `_reset_rows` and `_advance`, and `state_dict` and
    `load_state_dict`, with which a training that was interrupted goes on.
    """

    def __init__(self, dynamics: TradingDynamics, scaler: Scaler, num_envs: int) -> None:
        self.dynamics = dynamics
        self.scaler = scaler
        obs_space = spaces.Box(-1.0, 1.0, (len(dynamics.obs_names),), np.float32)
        super().__init__(num_envs, obs_space, spaces.Discrete(dynamics.num_actions))

    @property
    @abstractmethod
    def _state(self) -> np.ndarray:
        """[B, S] current state rows."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Rows, counters and generators, between two rollouts: a tree of arrays and JSON values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave, in an environment that was built the same."""

    @property
    def state(self) -> np.ndarray:
        """[B, S] current state rows, raw units; a copy."""
        return self._state.copy()

    def _observe(self, rows: np.ndarray | None = None) -> np.ndarray:
        state = self._state if rows is None else self._state[rows]
        return np.asarray(self.scaler(state[:, :-1]))


class HistoryVecEnv(TradingVecEnv):
    """Rows walk through history from random starting bars.

    Args: as `HistoryBatch`; `seed` seeds the starting bars.
    """

    def __init__(
        self,
        dynamics: TradingDynamics,
        scaler: Scaler,
        features: np.ndarray,
        uncertainty: np.ndarray | None = None,
        *,
        num_envs: int,
        episode_bars: int,
        seed: int,
    ) -> None:
        super().__init__(dynamics, scaler, num_envs)
        self.walks = HistoryBatch(dynamics, features, uncertainty, batch=num_envs, episode_bars=episode_bars)
        self._rng = np.random.default_rng(seed)

    @property
    def _state(self) -> np.ndarray:
        return self.walks.state

    @property
    def _masks(self) -> np.ndarray:
        return self.walks.action_masks

    def state_dict(self) -> dict[str, Any]:
        """Walks, audit and generator."""
        return {
            "audit": vars(self.audit).copy(),
            "rng": self._rng.bit_generator.state,
            "walks": self.walks.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.audit = ActionAudit(**state["audit"])
        self._rng.bit_generator.state = state["rng"]
        self.walks.load_state_dict(state["walks"])

    def _reset_rows(self, rows: np.ndarray) -> None:
        self.walks.restart(rows, self._rng.integers(0, self.walks.last_row, len(rows)))

    def _advance(self, actions: np.ndarray) -> BatchStep:
        step = self.walks.step(actions)
        return BatchStep(step.reward, step.terminated, step.truncated)
