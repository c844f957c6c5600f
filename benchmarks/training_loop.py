"""How fast MBPO's policy training is today, and what its own part costs beside PPO's.

Rows, masks, accounts and updates as in training; features and branches are noise, because the cost does not depend on
what they are. One thread. Import it where it is needed: it loads torch.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.machine import library_versions, machine
from configs.schema import DetentConfig
from configs.section import PPOConfig
from data import Scaler
from data.features import FEATURE_FIELDS
from envs import ACCOUNT_FIELDS, UNCERTAINTY_FIELD, TradingDynamics
from mbpo import Forecast, MarketBranches, MixedVecEnv, StartBuffer, train_policy

LIBRARIES = ("numpy", "torch", "stable-baselines3", "sb3-contrib")
ROWS, BRANCHES_PER_ROW = 4000, 8
SMOKE: dict[str, int] = {"num_envs": 64, "rollouts": 2}
"""Does it run at all?"""


@dataclass(frozen=True, kw_only=True)
class LoopReport:
    """Speed of one training, steps of all rows together."""

    num_envs: int
    rollout_length: int
    batch_size: int
    n_epochs: int
    truncated: float
    """Share of imagined bars that end their branch out of range."""
    steps: int
    steps_per_second: float
    """From the first rollout to the end of the last update."""
    collected_per_second: float
    """While collecting."""
    own_share: float
    """Time in the environment, masks and branches over the time PPO takes to decide and learn."""
    machine: dict[str, str | int]
    versions: dict[str, str]
    min_steps_per_second: float = 15_000.0
    """Goal of `steps_per_second`."""
    min_collected_per_second: float = 100_000.0
    """Goal of `collected_per_second`."""
    max_own_share: float = 0.10
    """Goal of `own_share`."""

    @property
    def within_goals(self) -> bool:
        """Whether all three goals are met."""
        return (
            self.steps_per_second >= self.min_steps_per_second
            and self.collected_per_second >= self.min_collected_per_second
            and self.own_share <= self.max_own_share
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {**asdict(self), "within_goals": self.within_goals, "threads": 1}


def measure_training_loop(
    *, num_envs: int = 4096, rollouts: int = 30, truncated: float = 0.0, seed: int = 0
) -> LoopReport:
    """Train for a number of rollouts of three steps, half of the rows imagined; batch 3,072, three epochs.

    Args: truncated: share of imagined bars that end their branch out of range.
    Raises: ValueError on a count or a share out of range.
    """
    if num_envs < 2 or rollouts < 1 or not 0.0 <= truncated <= 1.0:
        raise ValueError(
            f"num_envs, rollouts, truncated: expected >= 2, >= 1 and a share, was {num_envs}, {rollouts}, {truncated}"
        )
    horizon = 3
    ppo = PPOConfig(total_steps=num_envs * horizon * rollouts, num_envs=num_envs, batch_size=3072, n_epochs=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # The first update loads parts of torch.
        _train(_environment(num_envs, horizon, truncated, seed), ppo.model_copy(update={"total_steps": num_envs}), seed)
        env = _environment(num_envs, horizon, truncated, seed)
        _train(env, ppo, seed)
        ended = time.perf_counter()
    finally:
        torch.set_num_threads(threads)
    seconds = ended - env.began
    return LoopReport(
        num_envs=num_envs,
        rollout_length=horizon,
        batch_size=min(ppo.batch_size, num_envs * horizon),
        n_epochs=ppo.n_epochs,
        truncated=truncated,
        steps=ppo.total_steps,
        steps_per_second=ppo.total_steps / seconds,
        collected_per_second=ppo.total_steps / env.collecting,
        own_share=env.own / (seconds - env.own),
        machine=machine(),
        versions=library_versions(LIBRARIES),
    )


def _train(env: _TimedEnv, ppo: PPOConfig, seed: int) -> None:
    train_policy(env, ppo, n_steps=env.rollout_length, seed=seed, name="mbpo", validate=lambda _: {"score": 0.0})


class _TimedEnv(MixedVecEnv):
    # Knows how long it was asked, and from the first to the last step of each rollout.

    own = collecting = 0.0
    began = 0.0
    _rollout_began = 0.0

    def start_rollout(self, done: float, steps: int) -> np.ndarray:
        self._rollout_began = time.perf_counter()
        self.began = self.began or self._rollout_began
        obs = super().start_rollout(done, steps)
        self.own += time.perf_counter() - self._rollout_began
        return obs

    def end_rollout(self, done: float) -> None:
        super().end_rollout(done)
        self.collecting += time.perf_counter() - self._rollout_began

    def step_wait(self) -> Any:
        began = time.perf_counter()
        step = super().step_wait()
        self.own += time.perf_counter() - began
        return step

    def action_masks(self) -> np.ndarray:
        began = time.perf_counter()
        masks = super().action_masks()
        self.own += time.perf_counter() - began
        return masks


def _environment(num_envs: int, horizon: int, truncated: float, seed: int) -> _TimedEnv:
    rng = np.random.default_rng(seed)
    names = tuple(field.name for field in FEATURE_FIELDS)
    dynamics = TradingDynamics.from_config(names, DetentConfig())
    shape = (ROWS, BRANCHES_PER_ROW, horizon)
    features = 0.01 * rng.standard_normal((ROWS, len(names))).astype(np.float32)
    states = np.zeros((ROWS, len(dynamics.state_names)), np.float32)
    states[:, : len(names)] = features
    fixed = Scaler.with_fixed((*ACCOUNT_FIELDS, UNCERTAINTY_FIELD))
    return _TimedEnv(
        dynamics,
        Scaler.concat([Scaler.fit(features.astype(np.float64), names), fixed]),
        features,
        np.full(ROWS, 0.1),
        Forecast(*np.zeros((2, ROWS, 2))),
        MarketBranches(
            0.01 * rng.standard_normal((*shape, len(names)), dtype=np.float32),
            np.full(shape, 0.1, np.float32),
            rng.random(shape) >= truncated,
            Forecast(*np.zeros((2, *shape, 2), np.float32)),
        ),
        StartBuffer(np.arange(ROWS), states, capacity=ROWS),
        num_envs=num_envs,
        real_ratio=0.5,
        penalty_coef=0.5,
        control_variate=1.0,
        episode_bars=252,
        seed=seed,
    )
