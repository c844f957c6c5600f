"""Do learned masks keep what they promise? Learned on episodes of an environment, judged on fresh ones.

Two worlds with opposite characters: masked CartPole, whose mask changes from episode to episode and which has no safe
action, and trading, whose rules the learner does not know and where Hold is safe. Both are played by a policy that
chooses uniformly among the valid actions. What is bounded holds for the first states of that policy's episodes, in
trading for walks drawn anew over the same bars; *fresh* episodes come from the same distribution and test the promise,
*drifted* ones (trading: the years after the learned ones) lie outside it and are reported as a warning. Nothing here is
timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.machine import library_versions, machine
from configs.schema import DetentConfig
from data import Scaler, compute_features, open_source
from envs import ACCOUNT_FIELDS, UNCERTAINTY_FIELD, TradingDynamics
from envs.batch import BatchVecEnv
from envs.masked_cartpole import MaskedCartPoleVecEnv
from envs.vec_env import HistoryVecEnv
from masking import HOLD
from world_model.learned_masks import LearnedMaskConfig, LearnedMaskReport, LearnedMasks, learn_masks
from world_model.mask_bound import MaskErrors, mask_errors
from world_model.mask_head import MaskHeadConfig

LIBRARIES = ("numpy", "scipy", "torch")
LEARNED_SHARE = 0.7
"""Share of the trading history that walks are learned on; the rest is the drifted part."""
CALIBRATION_BINS = 10

SMOKE: dict[str, Any] = {
    "episodes": 500,
    "fresh_episodes": 300,
    "max_steps": 6,
    "config": LearnedMaskConfig(
        head=MaskHeadConfig(hidden=(32,), batch_size=128, max_epochs=20, learning_rate=1e-2), target=0.02
    ),
}
"""Counts that answer nothing but run everything; two errors in a hundred at 95 % need 149 groups."""
SMOKE_BUTTONS = 3
"""Of CartPole, beside SMOKE: so few episodes cannot vouch for the 45 pairs among ten."""

EnvBuilder = Callable[[int, int], BatchVecEnv]
"""(num_envs, seed) to a batched environment."""


@dataclass(frozen=True, kw_only=True)
class MaskWorld:
    """An environment whose masks are to be learned."""

    name: str
    safe_action: int | None
    """What the environment declares as always valid."""
    build: EnvBuilder
    build_drifted: EnvBuilder | None = None
    """The same environment under another distribution of states."""


class MaskRows(NamedTuple):
    """Real states and what the environment said about them."""

    obs: npt.NDArray[np.float32]
    """[N, D]."""
    action_masks: npt.NDArray[np.bool_]
    """[N, A]."""
    groups: npt.NDArray[np.int64]
    """[N], the episode."""


@dataclass(frozen=True, kw_only=True)
class LearnedMaskMeasurement:
    """Promise and outcome, with everything needed to read them."""

    world: str
    safe_action: int | None
    episodes: int
    """Episodes learned from: fit, stop and bound together."""
    max_steps: int
    """States recorded per episode at most."""
    seed: int
    config: LearnedMaskConfig
    learned: LearnedMaskReport
    fresh: MaskErrors
    """New episodes from the distribution the bound speaks of, seen by nothing before."""
    drifted: MaskErrors | None
    """Episodes from another distribution; the bound says nothing about them."""
    calibration_error: float
    """Mean distance, over fresh pairs, between the probability of a bin and the share that is valid in it."""
    machine: dict[str, str | int]
    versions: dict[str, str]

    @property
    def kept_promise(self) -> bool:
        """Whether the false-valid rate of the fresh episodes is within the target."""
        return self.fresh.false_valid <= self.config.target

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {**asdict(self), "kept_promise": self.kept_promise}


def masked_cartpole_world(num_actions: int = 10) -> MaskWorld:
    """CartPole with `num_actions` buttons, two of them wired per episode."""

    def build(num_envs: int, seed: int) -> BatchVecEnv:
        return MaskedCartPoleVecEnv(num_envs, num_actions=num_actions, seed=seed)

    return MaskWorld(name="masked_cartpole", safe_action=None, build=build)


def trading_world(config: DetentConfig | None = None) -> MaskWorld:
    """The trading environment on the bars, features and limits of a config; walks start at random bars.

    Raises: data.DataError if the bars cannot be used.
    """
    config = config or DetentConfig()
    bars = open_source(config.data.source).load()
    table = compute_features(bars, config.data.bars_per_year, config.data.source.symbol)
    learned = table.values[: round(LEARNED_SHARE * len(table))]
    dynamics = TradingDynamics.from_config(table.names, config)
    account = Scaler.with_fixed((*ACCOUNT_FIELDS, UNCERTAINTY_FIELD))
    scaler = Scaler.concat([Scaler.fit(learned, table.names), account])

    def walks_on(features: npt.NDArray[np.float64]) -> EnvBuilder:
        def build(num_envs: int, seed: int) -> BatchVecEnv:
            return HistoryVecEnv(dynamics, scaler, features, num_envs=num_envs, episode_bars=len(features), seed=seed)

        return build

    return MaskWorld(
        name=f"trading {config.data.source.symbol}",
        safe_action=HOLD,
        build=walks_on(learned),
        build_drifted=walks_on(table.values[len(learned) :]),
    )


def collect_episodes(env: BatchVecEnv, max_steps: int, rng: np.random.Generator) -> MaskRows:
    """One episode per row of the environment, under uniformly chosen valid actions.

    Recording stops when a row's episode ends, or after `max_steps` states: a fixed number of episodes. Filling a
    fixed number of steps instead would favour short episodes, and groups would no longer be independent draws.
    """
    obs, running = np.asarray(env.reset(), dtype=np.float32), np.ones(env.num_envs, dtype=bool)
    parts = []
    for _ in range(max_steps):
        masks, rows = env.action_masks(), np.flatnonzero(running)
        parts.append(MaskRows(obs[rows], masks[rows], rows))
        following, _, done, _ = env.step(np.where(masks, rng.random(masks.shape), -1.0).argmax(axis=1))
        obs, running = np.asarray(following, dtype=np.float32), running & ~done
        if not running.any():
            break
    return MaskRows(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def measure_learned_masks(
    world: MaskWorld,
    *,
    episodes: int = 20_000,
    fresh_episodes: int = 20_000,
    max_steps: int = 20,
    config: LearnedMaskConfig | None = None,
    seed: int = 0,
) -> tuple[LearnedMasks, LearnedMaskMeasurement]:
    """Learn masks on `episodes`, then count their errors on `fresh_episodes` that nothing has seen.

    Raises: world_model.MaskBoundError if no threshold meets the target; ValueError on a count that is not positive.
    """
    for name, count in {"episodes": episodes, "fresh_episodes": fresh_episodes, "max_steps": max_steps}.items():
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, was {count}")
    config = config or LearnedMaskConfig()
    seeds = np.random.SeedSequence(seed).generate_state(4).tolist()

    def play(build: EnvBuilder, count: int, env_seed: int) -> MaskRows:
        return collect_episodes(build(count, env_seed), max_steps, np.random.default_rng((env_seed, seed)))

    def errors(rows: MaskRows) -> MaskErrors:
        predicted = learned.judge(rows.obs).action_masks
        return mask_errors(predicted, rows.action_masks, rows.groups, safe_action=world.safe_action)

    learned, report = learn_masks(
        *play(world.build, episodes, seeds[0]), safe_action=world.safe_action, seed=seeds[1], config=config
    )
    fresh = play(world.build, fresh_episodes, seeds[2])
    drifted = None if world.build_drifted is None else play(world.build_drifted, fresh_episodes, seeds[3])
    with torch.no_grad():
        probabilities = learned.head.probabilities(torch.from_numpy(fresh.obs)).numpy()
    return learned, LearnedMaskMeasurement(
        world=world.name,
        safe_action=world.safe_action,
        episodes=episodes,
        max_steps=max_steps,
        seed=seed,
        config=config,
        learned=report,
        fresh=errors(fresh),
        drifted=None if drifted is None else errors(drifted),
        calibration_error=calibration_error(probabilities, fresh.action_masks),
        machine=machine(),
        versions=library_versions(LIBRARIES),
    )


def calibration_error(probabilities: npt.NDArray[np.floating], valid: npt.NDArray[np.bool_]) -> float:
    """Expected calibration error in CALIBRATION_BINS bins of equal width (Guo et al., arXiv:1706.04599, sec. 2).

    Args: probabilities of being valid, valid: any one shape; NaN probabilities give NaN.
    """
    flat, truth = probabilities.astype(np.float64).ravel(), valid.astype(np.float64).ravel()
    if not np.isfinite(flat).all():
        return float("nan")
    bins = np.minimum((flat * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, flat, CALIBRATION_BINS) - np.bincount(bins, truth, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(flat))
