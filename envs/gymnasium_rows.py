"""Gymnasium environments in rows, for environments that have no batched form of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.batch import BatchStep, BatchVecEnv
from masking import check_actions


class GymnasiumVecEnv(BatchVecEnv):
    """Single environments stepped one after another behind the batched interface.

    Masks come from `action_masks()` where an environment has it; otherwise every action is valid.

    Args: build makes one environment with Discrete actions and Box observations; seed of all rows.
    Raises: ValueError for other spaces.
    """

    def __init__(self, num_envs: int, build: Callable[[], gymnasium.Env[Any, Any]], *, seed: int) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs: expected >= 1, was {num_envs}")
        self._envs = [build() for _ in range(num_envs)]
        obs_space, action_space = self._envs[0].observation_space, self._envs[0].action_space
        if not isinstance(action_space, spaces.Discrete) or not isinstance(obs_space, spaces.Box):
            raise ValueError(f"spaces: expected Box observations and Discrete actions, was {obs_space}, {action_space}")
        super().__init__(num_envs, obs_space, action_space)
        self._num_actions = int(action_space.n)
        self._told = [getattr(env.unwrapped, "action_masks", None) for env in self._envs]
        self._seeds: list[int | None] = [int(one) for one in np.random.SeedSequence(seed).generate_state(num_envs)]
        self._obs = np.zeros((num_envs, *obs_space.shape), dtype=np.float32)

    @property
    def _masks(self) -> np.ndarray:
        if self._told[0] is None:
            return np.ones((self.num_envs, self._num_actions), dtype=bool)
        return np.stack([told() for told in self._told if told is not None])

    def _observe(self, rows: np.ndarray | None = None) -> np.ndarray:
        return np.array(self._obs if rows is None else self._obs[rows])

    def _reset_rows(self, rows: np.ndarray) -> None:
        for row in rows.tolist():
            # Seeded once; later episodes continue the row's own generator.
            self._obs[row], _ = self._envs[row].reset(seed=self._seeds[row])
            self._seeds[row] = None

    def _advance(self, actions: np.ndarray) -> BatchStep:
        check_actions(actions, self._masks)
        reward, terminated, truncated = (np.zeros(self.num_envs, dtype=kind) for kind in (np.float64, bool, bool))
        for row, env in enumerate(self._envs):
            self._obs[row], reward[row], terminated[row], truncated[row], _ = env.step(int(actions[row]))
        return BatchStep(reward, terminated, truncated & ~terminated)
