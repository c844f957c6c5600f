"""Worlds of the sample-efficiency benchmark: environments, goals, and the settings of both learners.

Settings were chosen on seeds 100 and 101; the benchmark reports seeds from 0 on. Horizons are longer than MBPO's usual
1 to 5: the first three worlds are deterministic, so a model that is right once is right for dozens of steps, and
branches are cut where they leave the data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from envs.batch import BatchStep, BatchVecEnv
from envs.gymnasium_rows import GymnasiumVecEnv
from envs.masked_cartpole import ANGLE_LIMIT, X_LIMIT, MaskedCartPoleVecEnv
from envs.portfolio import (
    INITIAL_CASH,
    PERIODS,
    PRICE_CENTRE,
    PRICE_STD,
    PortfolioBatch,
    portfolio_value,
    published_masks,
    trade_as_published,
)
from mbpo.online import BuildEnv, OnlineConfig, PPOSettings
from mbpo.ramp import Ramp
from world_model.known import KnownParts
from world_model.world_fit import WorldFitConfig

BUTTONS = 6
STATE = 4


BASELINE_PPO = PPOSettings(learning_rate=1e-3, batch_size=256, n_epochs=20, gamma=0.98, gae_lambda=0.8)
"""After the settings rl-baselines3-zoo has for CartPole."""


@dataclass(frozen=True, kw_only=True)
class PPOBaseline:
    """MaskablePPO on real steps; the names are sb3's."""

    max_real_steps: int
    look_interval: int
    """Real steps between judgements."""
    num_envs: int = 8
    n_steps: int = 32
    anneal: bool = False
    """Whether the learning rate falls to 0 over the budget."""
    ppo: PPOSettings = BASELINE_PPO


@dataclass(frozen=True, kw_only=True)
class EfficiencyWorld:
    """An environment, a goal, and the settings of both learners."""

    build: BuildEnv
    goal: float
    """Mean score over `episodes` that counts as solved."""
    mbpo: OnlineConfig
    baseline: PPOBaseline
    known: KnownParts
    """What could be declared; the benchmark declares it only when asked to."""
    scale: float = 1.0
    offset: float = 0.0
    """A score is `offset + scale * return`."""
    look_episodes: int = 20
    """Episodes of a first look."""
    episodes: int = 100
    """Episodes that confirm the goal, and of the last judgement."""
    marks: tuple[int, ...] = ()
    """Real steps at which the score is reported."""
    stop_when_solved: bool = True

    def score(self, returns: np.ndarray) -> float:
        """Mean score of returns."""
        return float((self.offset + self.scale * returns).mean())


class OneHotCartPole(MaskedCartPoleVecEnv):
    """Masked CartPole whose two buttons are observed one-hot: [4 + 2 N], for both learners.

    On a scale, button 3 would lie between 2 and 4, which says nothing about what it does.
    """

    def __init__(self, num_envs: int, *, seed: int) -> None:
        super().__init__(num_envs, num_actions=BUTTONS, seed=seed)
        plain = self.observation_space
        assert isinstance(plain, spaces.Box)  # noqa: S101 - of the class above
        ones = np.ones(2 * BUTTONS, dtype=np.float32)
        self.observation_space = spaces.Box(
            np.concatenate((plain.low[:STATE], 0 * ones)),
            np.concatenate((plain.high[:STATE], ones)),
            dtype=np.float32,
        )

    def _observe(self, rows: np.ndarray | None = None) -> np.ndarray:
        obs = super()._observe(rows)
        index = np.rint(obs[:, STATE:] * (BUTTONS - 1)).astype(np.int64)
        return np.concatenate(
            (obs[:, :STATE], np.eye(BUTTONS, dtype=np.float32)[index].reshape(len(obs), 2 * BUTTONS)), axis=1
        )


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


def smoke_world(world: EfficiencyWorld) -> EfficiencyWorld:
    """Counts that answer nothing but run everything."""
    fit = replace(world.mbpo.world, num_members=2, num_elites=1, hidden=(8,), max_epochs=2)
    mbpo = replace(
        world.mbpo,
        max_real_steps=160,
        initial_steps=100,
        initial_episode_steps=10,
        steps_per_epoch=60,
        episode_steps=20,
        collect_rows=1,
        imagined_steps=160,
        num_envs=16,
        horizon=Ramp(5, 5),
        world=fit,
        ppo=replace(world.mbpo.ppo, batch_size=40, n_epochs=1, net_arch=(8,)),
    )
    baseline = replace(
        world.baseline,
        max_real_steps=128,
        look_interval=64,
        num_envs=2,
        n_steps=32,
        ppo=replace(world.baseline.ppo, batch_size=32, n_epochs=1),
    )
    marks = tuple(160 for _ in world.marks[:1])
    return replace(world, mbpo=mbpo, baseline=baseline, look_episodes=2, episodes=2, marks=marks)


def _cartpole(num_envs: int, seed: int) -> BatchVecEnv:
    return GymnasiumVecEnv(num_envs, lambda: gymnasium.make("CartPole-v1"), seed=seed)


def _acrobot(num_envs: int, seed: int) -> BatchVecEnv:
    return GymnasiumVecEnv(num_envs, lambda: gymnasium.make("Acrobot-v1"), seed=seed)


def _masked_cartpole(num_envs: int, seed: int) -> BatchVecEnv:
    return OneHotCartPole(num_envs, seed=seed)


def _portfolio(num_envs: int, seed: int) -> BatchVecEnv:
    return TimelessPortfolio(num_envs, seed=seed)


def _one_reward(obs: torch.Tensor, action: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return torch.ones(len(obs))


def _pole_down(next_obs: torch.Tensor) -> torch.Tensor:
    return (next_obs[:, 0].abs() > X_LIMIT) | (next_obs[:, 2].abs() > ANGLE_LIMIT)


def _wired_buttons(obs: torch.Tensor) -> torch.Tensor:
    left, right = obs[:, STATE : STATE + BUTTONS], obs[:, STATE + BUTTONS :]
    return (left > 0.5) | (right > 0.5)


def _portfolio_state(obs: torch.Tensor) -> np.ndarray:
    # Dollars, units and dollars again; units are whole, and so they must be for a mask.
    wide = obs.numpy().astype(np.float64)
    prices = wide[:, 4:] * PRICE_STD + PRICE_CENTRE
    return np.concatenate((wide[:, :1] * INITIAL_CASH, np.rint(wide[:, 1:4] * 100.0), prices), axis=1)


def _portfolio_trade(obs: torch.Tensor, action: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
    trade = trade_as_published(_portfolio_state(obs), action.numpy())
    account = np.concatenate((trade.cash[:, None] / INITIAL_CASH, trade.units / 100.0), axis=1)
    return torch.cat((torch.from_numpy(account.astype(np.float32)), next_obs[:, 4:]), dim=1)


def _portfolio_gain(obs: torch.Tensor, action: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    gain = portfolio_value(_portfolio_state(next_obs)) - portfolio_value(_portfolio_state(obs))
    return torch.from_numpy((gain / INITIAL_CASH).astype(np.float32))


def _portfolio_masks(obs: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(published_masks(_portfolio_state(obs)))


def _acrobot_up(next_obs: torch.Tensor) -> torch.Tensor:
    # cos(a), sin(a), cos(b), sin(b): the tip is a link's length above the base, -cos(a) - cos(a + b) > 1.
    cos_a, sin_a, cos_b, sin_b = (next_obs[:, column] for column in range(4))
    return -cos_a - (cos_a * cos_b - sin_a * sin_b) > 1.0


def _acrobot_reward(obs: torch.Tensor, action: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return torch.where(_acrobot_up(next_obs), 0.0, -1.0)


_POLE_FIT = WorldFitConfig(hidden=(96, 96), max_epochs=150)
_POLE_PPO = PPOSettings(learning_rate=1e-3, batch_size=640, n_epochs=5, gae_lambda=0.9, activation="relu")

WORLDS: dict[str, EfficiencyWorld] = {
    "cartpole": EfficiencyWorld(
        build=_cartpole,
        goal=475.0,
        mbpo=OnlineConfig(
            max_real_steps=2000,
            initial_steps=200,
            steps_per_epoch=100,
            episode_steps=200,
            imagined_steps=64_000,
            num_envs=128,
            horizon=Ramp(50, 50),
            support_penalty=20.0,
            stop_score=475.0,
            world=_POLE_FIT,
            ppo=_POLE_PPO,
        ),
        baseline=PPOBaseline(max_real_steps=100_000, look_interval=1_000),
        known=KnownParts(reward=_one_reward, terminated=_pole_down),
    ),
    "masked-cartpole": EfficiencyWorld(
        build=_masked_cartpole,
        goal=475.0,
        mbpo=OnlineConfig(
            max_real_steps=2000,
            initial_steps=800,
            initial_episode_steps=8,
            steps_per_epoch=200,
            episode_steps=100,
            imagined_steps=200_000,
            num_envs=128,
            horizon=Ramp(50, 50),
            support_penalty=20.0,
            stop_score=475.0,
            world=_POLE_FIT,
            ppo=replace(_POLE_PPO, net_arch=(128, 128)),
        ),
        baseline=PPOBaseline(
            max_real_steps=300_000,
            look_interval=2_000,
            ppo=replace(BASELINE_PPO, net_arch=(128, 128), activation="relu"),
        ),
        known=KnownParts(reward=_one_reward, terminated=_pole_down, action_masks=_wired_buttons),
        look_episodes=100,
    ),
    "acrobot": EfficiencyWorld(
        build=_acrobot,
        goal=-100.0,
        mbpo=OnlineConfig(
            max_real_steps=10_000,
            initial_steps=1000,
            steps_per_epoch=500,
            imagined_steps=100_000,
            num_envs=200,
            horizon=Ramp(100, 100),
            stop_score=-100.0,
            world=_POLE_FIT,
            ppo=PPOSettings(learning_rate=1e-3, batch_size=1000, n_epochs=5, gae_lambda=0.94, activation="relu"),
        ),
        baseline=PPOBaseline(
            max_real_steps=300_000,
            look_interval=2_000,
            num_envs=8,
            n_steps=256,
            ppo=PPOSettings(learning_rate=3e-4, batch_size=128, n_epochs=4, gamma=0.99, gae_lambda=0.94),
        ),
        known=KnownParts(reward=_acrobot_reward, terminated=_acrobot_up),
    ),
    "portfolio": EfficiencyWorld(
        build=_portfolio,
        goal=3500.0,
        scale=INITIAL_CASH,
        offset=INITIAL_CASH,
        look_episodes=1000,
        episodes=2000,
        marks=(500 * (PERIODS - 1), 2000 * (PERIODS - 1)),
        stop_when_solved=False,
        mbpo=OnlineConfig(
            max_real_steps=2000 * (PERIODS - 1),
            initial_steps=200 * (PERIODS - 1),
            steps_per_epoch=300 * (PERIODS - 1),
            collect_rows=50,
            imagined_steps=300_000,
            num_envs=512,
            horizon=Ramp(PERIODS - 1, PERIODS - 1),
            first_share=0.5,
            world=WorldFitConfig(hidden=(64, 64), max_epochs=30, patience=8),
            ppo=PPOSettings(
                learning_rate=3e-3,
                final_learning_rate=3e-4,
                batch_size=1216,
                gamma=1.0,
                gae_lambda=0.8,
                ent_coef=0.005,
            ),
        ),
        baseline=PPOBaseline(
            max_real_steps=2000 * (PERIODS - 1),
            look_interval=100 * (PERIODS - 1),
            num_envs=10,
            n_steps=PERIODS - 1,
            ppo=replace(BASELINE_PPO, batch_size=95, n_epochs=10, gamma=1.0),
        ),
        known=KnownParts(
            transition=_portfolio_trade,
            exact=(0, 1, 2, 3),
            exogenous=True,
            reward=_portfolio_gain,
            action_masks=_portfolio_masks,
        ),
    ),
}
