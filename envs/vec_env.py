"""Batched environments for stable-baselines3: one call steps every row, one call returns every mask."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from data import Scaler
from envs.dynamics import TradingDynamics
from envs.history import HistoryBatch


class BatchStep(NamedTuple):
    """What a batched step returns before rows are restarted."""

    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    final_state: np.ndarray
    """[B, S] state after the step, before finished rows restart."""


class BatchVecEnv(VecEnv):
    """Base of batched trading environments: observations, masks and the VecEnv protocol.

    A subclass owns the rows and implements `_state`, `_masks`, `_reset_rows` and `_advance`.
    """

    def __init__(self, dynamics: TradingDynamics, scaler: Scaler, num_envs: int) -> None:
        self.dynamics = dynamics
        self.scaler = scaler
        self.render_mode = None  # VecEnv asks for it while it is being built
        obs_space = spaces.Box(-1.0, 1.0, (len(dynamics.obs_names),), np.float32)
        super().__init__(num_envs, obs_space, spaces.Discrete(dynamics.num_actions))
        self._actions = np.zeros(num_envs, dtype=np.int64)
        self.infos: list[dict[str, Any]] = [{} for _ in range(num_envs)]

    @property
    @abstractmethod
    def _state(self) -> np.ndarray:
        """[B, S] current state rows."""

    @property
    @abstractmethod
    def _masks(self) -> np.ndarray:
        """[B, A] current masks."""

    @abstractmethod
    def _reset_rows(self, rows: np.ndarray) -> None:
        """Restart the given rows."""

    @abstractmethod
    def _advance(self, actions: np.ndarray) -> BatchStep:
        """Step every row without restarting any."""

    def observe(self, state: np.ndarray) -> np.ndarray:
        """Scale state rows [B, S] to observations [B, D]."""
        return np.asarray(self.scaler(state[:, :-1]))

    def action_masks(self) -> np.ndarray:
        """Masks of the current states, bool [B, A]; a copy, so that no caller can open the gate."""
        return self._masks.copy()

    def reset(self) -> np.ndarray:
        """Restart every row."""
        self._reset_rows(np.arange(self.num_envs))
        return self.observe(self._state)

    def step_async(self, actions: np.ndarray) -> None:
        """Remember the actions for `step_wait`."""
        self._actions = np.asarray(actions)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Step, restart finished rows, and hand over their last observation in `infos`."""
        step = self._advance(self._actions)
        done = step.terminated | step.truncated
        infos = self.infos
        if done.any():
            rows = np.flatnonzero(done)
            final_obs = self.observe(step.final_state[rows])
            infos = list(self.infos)
            for row, obs in zip(rows, final_obs, strict=True):
                infos[row] = {"terminal_observation": obs, "TimeLimit.truncated": bool(step.truncated[row])}
            self._reset_rows(rows)
        return self.observe(self._state), step.reward.astype(np.float32), done, infos

    def close(self) -> None:
        """Nothing to release."""

    def has_attr(self, attr_name: str) -> bool:
        """Whether the environment has an attribute; asked once per rollout for `action_masks`."""
        return hasattr(self, attr_name)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """One attribute of the whole batch, repeated per index."""
        return [getattr(self, attr_name)] * len(self._rows(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Rows share their attributes; setting one row alone is refused."""
        if indices is not None:
            raise ValueError(f"{attr_name}: rows of a batched environment share attributes; pass indices=None")
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call a method of the whole batch.

        Returns a one-element list; sb3-contrib stacks it to [1, B, A] for `action_masks`.
        """
        if indices is not None:
            raise ValueError(f"{method_name}: a batched environment answers for all rows; pass indices=None")
        return [getattr(self, method_name)(*args, **kwargs)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:  # noqa: ARG002 - VecEnv's signature
        """Report that no row is wrapped; there are no single environments."""
        return [False] * len(self._rows(indices))

    def _rows(self, indices: int | Iterable[int] | None) -> Sequence[int]:
        if indices is None:
            return range(self.num_envs)
        return [indices] if isinstance(indices, int) else list(indices)


class HistoryVecEnv(BatchVecEnv):
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

    def _reset_rows(self, rows: np.ndarray) -> None:
        self.walks.restart(rows, self._rng.integers(0, self.walks.last_row, len(rows)))

    def _advance(self, actions: np.ndarray) -> BatchStep:
        step = self.walks.step(actions)
        return BatchStep(step.reward, step.terminated, step.truncated, self.walks.state)
