"""What masks per asset let through, what a joint policy costs, and what it learns.

On the portfolio of three assets with eleven trades each, strict variant (limits hold after the trade):

1. which share of the combinations that untrained policies and random players choose breaks a joint limit, at the first
   state of an episode and along random valid play;
2. how long the autoregressive policy takes beside the factored one, on the same rows, calls interleaved;
3. what both are worth after training, on held-out prices, beside rules that need no training. The factored policy
   cannot act in the strict variant at all, so it is trained on `published`, which cuts its trades down instead; values
   of the two variants are not like for like.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnvWrapper

from benchmarks.machine import library_versions, machine
from envs.portfolio import (
    INITIAL_CASH,
    LIMITS,
    PERIODS,
    TABLE,
    PortfolioVecEnv,
    Variant,
    mean_prices,
    published_masks,
)
from masking import JointLimits, JointWalk
from masking.joint_policy import JointMaskablePolicy, ObservationsExtractor
from masking.strict_policy import StrictMaskablePolicy

LIBRARIES = ("numpy", "torch", "sb3-contrib", "stable-baselines3")
CASH_ONLY = replace(LIMITS, max_share=(1.0,) * TABLE.num_assets)
"""The joint budget without limits on shares."""
HELD_OUT_SEED = 1_000_003
"""Seed of the prices that trained policies and rules are judged on; training seeds are small numbers."""
PPO = {"n_steps": PERIODS - 1, "n_epochs": 5, "learning_rate": 4e-3, "gamma": 1.0, "gae_lambda": 0.8, "ent_coef": 0.01}
"""Settings of both learners, chosen on a training seed that is not among the reported ones; the learning rate falls
to 0."""
MINIBATCHES = 8

Obs = dict[str, np.ndarray]
Chooser = Callable[[Obs, np.ndarray], np.ndarray]
"""Observations and masks of B rows to actions [B, K]."""


@dataclass(frozen=True, kw_only=True)
class BreachRate:
    """How often a way of choosing breaks a joint limit; one action is a combination of K trades."""

    chooser: str
    first_actions: int
    """Chosen at the first state of an episode: all cash."""
    first_beyond_cash: int
    """Of these, how many leave less than the least cash, whatever the shares."""
    first_breaches: int
    """Of these, how many break any joint limit."""
    actions: int
    """Chosen along random valid play, first states included."""
    beyond_cash: int
    breaches: int

    @property
    def share(self) -> float:
        """Breaches per action along random play."""
        return self.breaches / self.actions


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Medians over interleaved repetitions, milliseconds."""

    task: str
    batch: int
    repetitions: int
    joint_ms: float
    factored_ms: float
    ratio: float
    """Median of the ratios of neighbouring calls: a busy machine slows both."""


@dataclass(frozen=True, kw_only=True)
class FinalValue:
    """What a portfolio is worth at the end, dollars, over held-out episodes."""

    method: str
    variant: Variant
    seed: int | None
    """Seed of the training; None for rules."""
    steps: int
    """Training steps."""
    mean: float
    standard_error: float
    overridden: float
    """Share of actions that `published` cut down."""


@dataclass(frozen=True, kw_only=True)
class JointLimitsReport:
    """All three answers with everything needed to read them."""

    breaches: tuple[BreachRate, ...]
    costs: tuple[Cost, ...]
    values: tuple[FinalValue, ...]
    held_out_episodes: int
    machine: dict[str, str | int]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        breaches = [{**asdict(rate), "share": rate.share} for rate in self.breaches]
        return {**asdict(self), "breaches": breaches, "ppo": PPO, "threads": torch.get_num_threads()}


def measure_joint_limits(
    *,
    actions: int = 1_000_000,
    batch: int = 4096,
    repetitions: int = 60,
    steps: int = 2_000_000,
    num_envs: int = 256,
    seeds: Sequence[int] = (0, 1, 2),
    episodes: int = 20_000,
) -> JointLimitsReport:
    """Answer all three questions.

    Args: actions per way of choosing; batch and repetitions of the timings; training steps, environments and seeds;
        held-out episodes. Raises: ValueError on a count below 1.
    """
    counts = {"actions": actions, "batch": batch, "repetitions": repetitions, "steps": steps, "num_envs": num_envs}
    for name, count in {**counts, "seeds": len(seeds), "episodes": episodes}.items():
        if count < 1:
            raise ValueError(f"{name}: expected >= 1, was {count}")
    return JointLimitsReport(
        breaches=measure_breaches(actions),
        costs=measure_cost(batch, repetitions),
        values=(*rule_values(episodes), *trained_values(steps, num_envs, seeds, episodes)),
        held_out_episodes=episodes,
        machine=machine(),
        versions=library_versions(LIBRARIES),
    )


def measure_breaches(actions: int, seed: int = 0) -> tuple[BreachRate, ...]:
    """Count breaches of untrained policies and random players on the states of random valid play."""
    rows = -(-actions // (PERIODS - 1))
    env, rng = PortfolioVecEnv(rows, seed=seed, shuffle_assets=True), np.random.default_rng(seed)
    factored = untrained(StrictMaskablePolicy, env, seed)
    joint = untrained(JointMaskablePolicy, env, seed)
    # Names say policy or player, and its masks.
    choosers: dict[str, Chooser] = {
        "joint policy": lambda obs, masks: _act(joint, obs, masks),
        "factored policy, published masks": lambda obs, _: _act(factored, obs, published_masks(obs["state"])),
        "factored policy, separate masks": lambda obs, _: _act(factored, obs, LIMITS.separate_masks(obs["state"])),
        "random, published masks": lambda obs, _: random_actions(published_masks(obs["state"]), rng),
        "random, marginal masks": lambda _, masks: random_actions(masks, rng),
        "random, separate masks": lambda obs, _: random_actions(LIMITS.separate_masks(obs["state"]), rng),
    }
    counts = {name: np.zeros((PERIODS - 1, 2), dtype=np.int64) for name in choosers}
    obs: Any = env.reset()
    for period in range(PERIODS - 1):
        for name, choose in choosers.items():
            chosen = choose(obs, env.action_masks())
            for place, limits in enumerate((CASH_ONLY, LIMITS)):
                counts[name][period, place] = np.count_nonzero(~limits.check(obs["state"], chosen))
        obs = env.step(LIMITS.sample(obs["state"], rng, env.action_masks()))[0]
    return tuple(
        BreachRate(
            chooser=name,
            first_actions=rows,
            first_beyond_cash=int(count[0, 0]),
            first_breaches=int(count[0, 1]),
            actions=rows * (PERIODS - 1),
            beyond_cash=int(count[:, 0].sum()),
            breaches=int(count[:, 1].sum()),
        )
        for name, count in counts.items()
    )


def measure_cost(batch: int, repetitions: int, seed: int = 0) -> tuple[Cost, ...]:
    """Time `forward` and `evaluate_actions` with backward of both policies on states of random play."""
    env, rng = PortfolioVecEnv(batch, seed=seed, shuffle_assets=True), np.random.default_rng(seed)
    obs: Any = env.reset()
    for _ in range(PERIODS // 2):
        obs = env.step(LIMITS.sample(obs["state"], rng, env.action_masks()))[0]
    masks = env.action_masks()
    calls: list[tuple[Callable[[], Any], Callable[[], Any]]] = []
    for policy_class in (JointMaskablePolicy, StrictMaskablePolicy):
        policy = untrained(policy_class, env, seed)
        calls.append(_calls(policy, policy.obs_to_tensor(obs)[0], masks))
    costs = []
    for task, joint, factored in zip(("forward", "evaluate_actions and backward"), *calls, strict=True):
        samples = np.array([(_ms(joint), _ms(factored)) for _ in range(repetitions + 3)][3:])
        joint_ms, factored_ms = np.median(samples, axis=0).tolist()
        ratio = float(np.median(samples[:, 0] / samples[:, 1]))
        costs.append(
            Cost(
                task=task,
                batch=batch,
                repetitions=repetitions,
                joint_ms=joint_ms,
                factored_ms=factored_ms,
                ratio=ratio,
            )
        )
    return tuple(costs)


def rule_values(episodes: int) -> tuple[FinalValue, ...]:
    """Value of holding cash, of random valid play and of the greedy rule, in both variants."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    rules: list[tuple[str, Variant, Chooser]] = [
        ("flat", "strict", lambda obs, _: np.full((len(obs["state"]), TABLE.num_assets), TABLE.hold)),
        ("random", "strict", lambda obs, masks: LIMITS.sample(obs["state"], rng, masks)),
        ("random", "published", lambda _, masks: random_actions(masks, rng)),
        ("greedy", "strict", lambda obs, masks: greedy_actions(LIMITS, obs, masks)),
        ("greedy", "published", lambda obs, masks: greedy_actions(CASH_ONLY, obs, masks)),
    ]
    return tuple(_judged(method, variant, choose, episodes) for method, variant, choose in rules)


def trained_values(steps: int, num_envs: int, seeds: Sequence[int], episodes: int) -> tuple[FinalValue, ...]:
    """Value of the joint policy on `strict` and of the factored one on `published`, once per training seed."""
    pairs: list[tuple[type[StrictMaskablePolicy], Variant]] = [
        (JointMaskablePolicy, "strict"),
        (StrictMaskablePolicy, "published"),
    ]
    values = []
    for policy_class, variant in pairs:
        for seed in seeds:
            model = train(policy_class, variant, steps, num_envs, seed)
            values.append(_judged_model(model, policy_class, variant, seed, episodes))
    return tuple(values)


def train(
    policy_class: type[StrictMaskablePolicy], variant: Variant, steps: int, num_envs: int, seed: int
) -> MaskablePPO:
    """MaskablePPO on random asset orders; rollouts are whole episodes."""
    env = PortfolioVecEnv(num_envs, variant, shuffle_assets=True, seed=seed)
    # Rewards of about 1: `published` pays dollars.
    venv = env if variant == "strict" else _ScaledReward(env)
    batch_size = num_envs * (PERIODS - 1) // MINIBATCHES
    options: dict[str, Any] = {
        **PPO,
        "learning_rate": LinearSchedule(PPO["learning_rate"], 0.0, 1.0),
        "batch_size": batch_size,
        "policy_kwargs": _options(policy_class),
    }
    model = MaskablePPO(policy_class, venv, seed=seed, device="cpu", **options)
    model.learn(steps)
    if env.audit.invalid:
        raise RuntimeError(f"expected 0 executed actions that their mask forbids, was {env.audit}")
    return model


def untrained(policy_class: type[StrictMaskablePolicy], env: PortfolioVecEnv, seed: int) -> StrictMaskablePolicy:
    """A policy as MaskablePPO would begin with."""
    torch.manual_seed(seed)
    return policy_class(env.observation_space, env.action_space, lambda _: 1e-3, **_options(policy_class))


def greedy_actions(limits: JointLimits, obs: Obs, masks: np.ndarray) -> np.ndarray:
    """Sell what is expected to fall, then buy as much as the limits leave, the largest expected gain first.

    The expectation is that of the known mean curves, per dollar, from the current price to the next one, the cost of
    buying or of not selling included.
    """
    state = obs["state"].astype(np.float64)
    period = np.rint(obs["observations"][:, -1] * (PERIODS - 1))
    prices, following = state[:, 1 + TABLE.num_assets :], mean_prices(period + 1)
    gain = (following - prices - np.array(TABLE.buy_cost) - np.array(TABLE.sell_cost)) / prices
    loss = following - prices + np.array(TABLE.sell_cost) < 0
    # Sales first, because they fund purchases.
    order = np.argsort(np.where(loss, -np.inf, -gain), axis=1, kind="stable")
    walk, rows, actions = JointWalk(limits, state, masks), np.arange(len(state)), np.zeros_like(order)
    index = np.arange(TABLE.num_actions)
    for asset in order.T:
        wish = np.where(loss[rows, asset], 0, np.where(gain[rows, asset] > 0, TABLE.num_actions - 1, TABLE.hold))
        distance = np.abs(index - wish[:, None])
        action = np.where(walk.action_masks(asset), distance, TABLE.num_actions).argmin(axis=1)
        walk.take(asset, action)
        actions[rows, asset] = action
    return actions


def random_actions(masks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uniform among the valid actions of each asset, [B, K]."""
    rows = masks.reshape(-1, TABLE.num_assets, TABLE.num_actions)
    return np.asarray(np.where(rows, rng.random(rows.shape), -1.0).argmax(axis=2))


class _ScaledReward(VecEnvWrapper):
    # Rewards in multiples of the initial cash.

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        obs, reward, done, infos = self.venv.step_wait()
        return obs, reward / INITIAL_CASH, done, infos


def _options(policy_class: type[StrictMaskablePolicy]) -> dict[str, Any]:
    if issubclass(policy_class, JointMaskablePolicy):
        return {"limits": LIMITS}
    return {"safe_action": TABLE.hold, "features_extractor_class": ObservationsExtractor}


def _act(policy: StrictMaskablePolicy, obs: Obs, masks: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(policy(policy.obs_to_tensor(obs)[0], action_masks=masks)[0].numpy())


def _calls(policy: StrictMaskablePolicy, obs: Any, masks: np.ndarray) -> tuple[Callable[[], Any], Callable[[], Any]]:
    def forward() -> Any:
        with torch.no_grad():
            return policy(obs, action_masks=masks)

    chosen, in_buffer = forward()[0], torch.as_tensor(masks, dtype=torch.float32)

    def learn() -> None:
        value, log_prob, entropy = policy.evaluate_actions(obs, chosen, in_buffer)
        policy.optimizer.zero_grad()
        loss: Any = value.mean() + log_prob.mean() + (0 if entropy is None else entropy.mean())
        loss.backward()

    return forward, learn


def _ms(call: Callable[[], Any]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def _judged_model(
    model: MaskablePPO, policy_class: type[StrictMaskablePolicy], variant: Variant, seed: int, episodes: int
) -> FinalValue:
    def choose(obs: Obs, masks: np.ndarray) -> np.ndarray:
        return np.asarray(model.predict(obs, action_masks=masks, deterministic=True)[0])

    return _judged(policy_class.__name__, variant, choose, episodes, seed, model.num_timesteps)


def _judged(
    method: str, variant: Variant, choose: Chooser, episodes: int, seed: int | None = None, steps: int = 0
) -> FinalValue:
    env = PortfolioVecEnv(episodes, variant, seed=HELD_OUT_SEED)
    obs: Any = env.reset()
    gained = np.zeros(episodes)
    for _ in range(PERIODS - 1):
        obs, reward, _, _ = env.step(choose(obs, env.action_masks()))
        gained += reward
    final = INITIAL_CASH * (1 + gained) if variant == "strict" else gained
    return FinalValue(
        method=method,
        variant=variant,
        seed=seed,
        steps=steps,
        mean=float(final.mean()),
        standard_error=float(final.std(ddof=1) / np.sqrt(episodes)) if episodes > 1 else 0.0,
        overridden=env.portfolio.overridden / (episodes * (PERIODS - 1)),
    )


SMOKE: dict[str, Any] = {
    "actions": 2_000,
    "batch": 64,
    "repetitions": 3,
    "steps": 608,
    "num_envs": 32,
    "seeds": (0,),
    "episodes": 100,
}
"""Counts that answer nothing but run everything."""
