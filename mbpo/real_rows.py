"""Real steps of an environment: every one is recorded and counted.

Letters: R rows, D obs, K action dimensions, A mask width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from gymnasium import spaces

from envs.batch import BatchVecEnv
from world_model.experience import Experience


class RealStep(NamedTuple):
    """Outcome of a step of all rows; arrays [R]."""

    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


class RealRows:
    """A batched environment whose transitions are kept.

    After a step `obs` is what it led to, terminal or not; `restart` moves finished rows to their next episode.

    Args: env: with Box observations; it is reset here.
    """

    def __init__(self, env: BatchVecEnv) -> None:
        if not isinstance(env.observation_space, spaces.Box):
            raise ValueError(f"observation_space: expected Box, was {env.observation_space}")
        self.env, self.num_rows = env, env.num_envs
        self.num_actions = action_sizes(env.action_space)
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._episode = np.arange(self.num_rows)
        self._episodes_begun = self.num_rows
        self._return = np.zeros(self.num_rows)
        self.returns: list[float] = []
        """Return of each finished episode, terminated or cut."""
        self.steps = 0
        self.length = np.zeros(self.num_rows, dtype=np.int64)
        """Steps of the running episodes."""
        self.finished = np.zeros(self.num_rows, dtype=bool)
        """Rows whose episode has ended and that wait for `restart`."""
        self._next = np.asarray(env.reset(), dtype=np.float32)
        self.obs = self._next.copy()

    @property
    def action_masks(self) -> np.ndarray:
        """Masks [R, A] of the current states, bool; of a finished row, those of its next episode."""
        return self.env.action_masks()

    @property
    def episodes(self) -> int:
        """Finished episodes."""
        return len(self.returns)

    def step(self, actions: np.ndarray) -> RealStep:
        """Step every row and record it; actions [R] or [R, K]."""
        if self.finished.any():
            raise ValueError(f"rows {np.flatnonzero(self.finished).tolist()}: expected a restart, was a step")
        obs, masks = self.obs.copy(), self.action_masks
        following, reward, done, infos = self.env.step(actions)
        self._next = np.asarray(following, dtype=np.float32)
        self.obs = self._next.copy()
        truncated = np.zeros(self.num_rows, dtype=bool)
        for row in np.flatnonzero(done):
            self.obs[row] = infos[row]["terminal_observation"]
            truncated[row] = infos[row]["TimeLimit.truncated"]
        terminated = done & ~truncated
        chosen = np.asarray(actions, dtype=np.int64).reshape(self.num_rows, -1)
        self._parts.append((obs, chosen, reward, self.obs.copy(), terminated, masks, self._episode.copy()))
        self.steps += self.num_rows
        self.length += 1
        self._return += reward
        self.finished = done.copy()
        return RealStep(reward, terminated, truncated)

    def cut(self, rows: np.ndarray) -> None:
        """End the running episodes of these rows and begin others; a cut is not a termination."""
        self._next[rows] = self.env.restart(rows)
        self.restart(rows)

    def restart(self, rows: np.ndarray) -> None:
        """Begin the next episode in finished rows."""
        self.obs[rows] = self._next[rows]
        self.returns += self._return[rows].tolist()
        self._return[rows], self.finished[rows], self.length[rows] = 0.0, False, 0
        self._episode[rows] = self._episodes_begun + np.arange(len(rows))
        self._episodes_begun += len(rows)

    def experience(self, start: int = 0) -> Experience:
        """All recorded transitions from step `start` of each row on.  Raises: ValueError if there are none."""
        parts = self._parts[start:]
        if not parts:
            raise ValueError("experience: expected at least one recorded step, found none")
        obs, action, reward, next_obs, terminated, masks, episode = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        return Experience(
            obs=obs,
            action=action,
            reward=reward,
            next_obs=next_obs,
            terminated=terminated,
            action_masks=masks,
            episode=episode,
            num_actions=self.num_actions,
        )

    @property
    def recorded(self) -> int:
        """Steps of each row so far, for `experience(start)`."""
        return len(self._parts)


def action_sizes(space: spaces.Space) -> tuple[int, ...]:
    """Number of actions of each dimension.  Raises: ValueError unless Discrete from 0 or MultiDiscrete."""
    if isinstance(space, spaces.Discrete) and space.start == 0:
        return (int(space.n),)
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(space.nvec.tolist())
    raise ValueError(f"action_space: expected Discrete from 0 or MultiDiscrete, was {space}")


def random_actions(action_masks: np.ndarray, num_actions: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Uniform among the valid actions of each dimension: masks [B, A] to int64 [B], or [B, K] for several of them."""
    score = np.where(action_masks, rng.random(action_masks.shape), -1.0)
    parts = np.split(score, np.cumsum(num_actions)[:-1], axis=1)
    chosen = np.stack([part.argmax(axis=1) for part in parts], axis=1)
    return chosen[:, 0] if len(num_actions) == 1 else chosen
