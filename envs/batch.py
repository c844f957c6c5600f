"""A batched environment for stable-baselines3: one call steps every row, one call returns every mask."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from masking import ActionAudit

Observation = np.ndarray | dict[str, np.ndarray]


class BatchStep(NamedTuple):
    """What a batched step returns before rows are restarted; arrays [B]."""

    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


class BatchVecEnv(VecEnv):
    """The VecEnv protocol over rows that are stepped together.

    A subclass owns the rows and implements `_observe`, `_masks`, `_reset_rows` and `_advance`. Every executed action
    is counted in `audit`.
    """

    def __init__(
        self, num_envs: int, observation_space: spaces.Space[Any], action_space: spaces.Discrete | spaces.MultiDiscrete
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs: expected >= 1, was {num_envs}")
        self.render_mode = None  # VecEnv asks for it while it is being built
        super().__init__(num_envs, observation_space, action_space)
        self.audit = ActionAudit()
        self._nvec = action_space.nvec.tolist() if isinstance(action_space, spaces.MultiDiscrete) else None
        self._actions = np.zeros((num_envs, *(action_space.shape or ())), dtype=np.int64)
        self._infos: list[dict[str, Any]] = [{} for _ in range(num_envs)]

    @abstractmethod
    def _observe(self, rows: np.ndarray | None = None) -> Observation:
        """Observations of the current states, all of them or the given rows."""

    @property
    @abstractmethod
    def _masks(self) -> np.ndarray:
        """[B, A] masks of the current states; flat for MultiDiscrete."""

    @abstractmethod
    def _reset_rows(self, rows: np.ndarray) -> None:
        """Restart the given rows."""

    @abstractmethod
    def _advance(self, actions: np.ndarray) -> BatchStep:
        """Step every row without restarting any; raises InvalidActionError before anything has moved."""

    def action_masks(self) -> np.ndarray:
        """Masks of the current states, bool [B, A], flat for MultiDiscrete; a copy: no caller can open the gate."""
        return self._masks.copy()

    def reset(self) -> Observation:
        """Restart every row."""
        self._reset_rows(np.arange(self.num_envs))
        return self._observe()

    def restart(self, rows: np.ndarray) -> Observation:
        """Restart the given rows in the middle of their episodes and return their observations."""
        self._reset_rows(rows)
        return self._observe(rows)

    def step_async(self, actions: np.ndarray) -> None:
        """Remember the actions for `step_wait`."""
        self._actions = np.asarray(actions)

    def step_wait(self) -> tuple[Observation, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Step, restart finished rows, and hand over their last observation and mask in `infos`."""
        masks = self._masks
        step = self._advance(self._actions)
        self.audit.record(self._actions, masks, self._nvec)
        done = step.terminated | step.truncated
        infos = self._infos
        if done.any():
            rows = np.flatnonzero(done)
            last_obs, last_masks = self._observe(rows), self._masks[rows]
            infos = list(infos)
            for place, row in enumerate(rows):
                infos[row] = {
                    "terminal_observation": _row(last_obs, place),
                    "terminal_action_mask": last_masks[place],
                    "TimeLimit.truncated": bool(step.truncated[row]),
                }
            self._reset_rows(rows)
        return self._observe(), step.reward.astype(np.float32), done, infos

    def close(self) -> None:
        """Nothing to release."""

    def has_attr(self, attr_name: str) -> bool:
        """Whether the environment has an attribute; asked once per rollout for `action_masks`."""
        return hasattr(self, attr_name)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """One attribute of the whole batch, repeated per index."""
        return [getattr(self, attr_name)] * len(self._indices(indices))

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
        return [False] * len(self._indices(indices))

    def _indices(self, indices: int | Iterable[int] | None) -> Sequence[int]:
        if indices is None:
            return range(self.num_envs)
        return [indices] if isinstance(indices, int) else list(indices)


def _row(obs: Observation, place: int) -> Any:
    return {name: part[place] for name, part in obs.items()} if isinstance(obs, dict) else obs[place]
