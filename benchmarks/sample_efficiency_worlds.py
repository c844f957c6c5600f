"""Worlds of the sample-efficiency benchmark: environments, goals, and the settings of both learners.

Settings were chosen on seeds 100 and 101, the benchmark reports seeds from 0 on. Horizons are longer than MBPO's usual
1 to 5: the first three worlds are deterministic, so a model that is right once is right for dozens of steps, and branches
are cut where they leave the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.batch import BatchStep, BatchVecEnv
from envs.gymnasium_rows import GymnasiumVecEnv
from envs.masked_cartpole import MaskedCartPoleVecEnv
from envs.portfolio import INITIAL_CASH, PortfolioBatch
from mbpo.online import BuildEnv, HorizonSchedule, OnlineConfig, PPOSettings
from world_model.known import KnownParts
from world_model.world_fit import WorldFitConfig

BUTTONS = 6
STATE = 4


class OneHotCartPole(MaskedCartPoleVecEnv):
    """Masked CartPole whose two buttons are observed one-hot: [4 + 2 N], for both learners.

    On a scale, button 3 would lie between 2 and 4, which says nothing about what it does.
    """

    def __init__(self, num_envs: int, *, seed: int) -> None:
        super().__init__(num_envs, num_actions=BUTTONS, seed=seed)
        plain = self.observation_space
        ones = np.ones(2 * BUTTONS, dtype=np.float32)
        self.observation_space = spaces.Box(
            np.concatenate((plain.low[:STATE], 0 * ones)),
            np.concatenate((plain.high[:STATE], ones)),
            dtype=np.float32,
        )

    def _observe(self, rows: np.ndarray | None = None) -> np.ndarray:
        obs = super()._observe(rows)
        index = np.rint(obs[:, STATE:] * (BUTTONS - 1)).astype(np.int64)
        return np.concatenate((obs[:, :STATE], np.eye(BUTTONS, dtype=np.float32)[index].reshape(len(obs), 2 * BUTTONS)), axis=1)


class TimelessPortfolio(BatchVecEnv):
    """The published portfolio without time in the observation, [7]: cash, units, prices.

    The reward is the change of the portfolio's value in multiples of the initial cash; over an episode it adds up to
    what the published final reward pays (a potential, Ng et al. 1999), for both learners.
    """

    def __init__(self, num_envs: int, *, seed: int) -> None:
        self.portfolio = PortfolioBatch("published", num_envs)
        limit = np.full(7, 10.0, dtype=np.float32)
        nvec = [11, 11, 11]
        super().__init__(num_envs, spaces.Box(-limit, limit, dtype=np.float32), spaces.MultiDiscrete(nvec))
        self._rng = np.random.default_rng(seed)

    @property
    def _masks(self) -> np.ndarray:
        return self.portfolio.action_masks

    def _observe(self, rows: np.ndarray | None = None) -> np.ndarray:
        obs = self.portfolio.observations()[:, :7]
        return obs if rows is None else obs[rows]

    def _reset_rows(self, rows: np.ndarray) -> None:
        self.portfolio.restart(rows, self._rng)

    def _advance(self, actions: np.ndarray) -> BatchStep:
        before = self.portfolio.value
        step = self.portfolio.step(actions, self._rng)
        return step._replace(reward=(self.portfolio.value - before) / INITIAL_CASH)
