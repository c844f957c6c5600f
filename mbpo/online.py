"""Learning while acting: collect real steps, refit the world, improve the policy in imagination, again.

MBPO (arXiv:1906.08253, algorithm 2) with two deviations: the learner is an unmodified MaskablePPO, which is on-policy,
so imagined branches are fresh for each update rather than kept in a buffer; and horizons may be much longer than the
paper's where a world is learned well, because branches are cut at the support of the data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule

from envs.batch import BatchVecEnv
from masking.strict_policy import StrictMaskablePolicy
from mbpo.imagined_env import ImaginedVecEnv
from mbpo.ramp import Ramp
from mbpo.real_rows import RealRows, random_actions
from world_model.experience import Experience
from world_model.known import KnownParts
from world_model.world import WorldModel
from world_model.world_fit import WorldFitConfig, fit_world_model

BuildEnv = Callable[[int, int], BatchVecEnv]
"""(num_envs, seed) to a batched environment."""

Evaluate = Callable[[StrictMaskablePolicy, int], Mapping[str, float]]
"""Scores a policy after so many real steps, on episodes of its own; must contain `score`, higher is better."""


ACTIVATIONS: dict[str, type[torch.nn.Module]] = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """Of MaskablePPO, by sb3's names."""

    learning_rate: float = 3e-4
    final_learning_rate: float | None = None
    """Reached linearly at the end of the budget of real steps; None keeps the first."""
    batch_size: int = 1024
    n_epochs: int = 5
    gamma: float = 0.99
    gae_lambda: float = 0.95
    ent_coef: float = 0.0
    clip_range: float = 0.2
    max_grad_norm: float = 0.5
    net_arch: tuple[int, ...] = (64, 64)
    activation: str = "tanh"
    """Of the hidden layers, one of ACTIVATIONS."""

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, was {self.activation!r}")


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """The online loop."""

    max_real_steps: int
    """Budget; the loop ends with the epoch that reaches it."""
    initial_steps: int
    """Real steps of random valid actions before the first fit."""
    steps_per_epoch: int
    """Real steps between fits, by the policy as it explores."""
    imagined_steps: int
    """Steps the policy learns from between fits, real rows of the mix included."""
    num_envs: int = 256
    """Rows of imagination."""
    real_ratio: float = 0.0
    """Share of those rows that step the real environment. Each costs H real steps per update: at small budgets real
    steps are better spent on the model alone."""
    collect_rows: int = 1
    """Rows that collect between fits where `real_ratio` is 0."""
    initial_episode_steps: int | None = None
    """Length at which episodes of the initial steps are cut, to see more of their beginnings; None plays them out."""
    episode_steps: int | None = None
    """The same for the episodes of the policy, where `real_ratio` is 0."""
    horizon: Ramp = field(default_factory=lambda: Ramp(3, 3))
    """H, most steps per imagined branch, by real steps; rounded down."""
    first_share: float = 0.0
    """Share of branches that start where an episode began, for a task that is judged from there within H steps."""
    penalty_coef: float = 0.0
    """lambda_u, reward units per unit of `uncertainty`."""
    support_penalty: float = 0.0
    """Reward units charged for leaving the support of the data."""
    uncertainty: str = "ensemble_std"
    """Measure of `world_model.uncertainty`."""
    patience: int | None = None
    """Epochs without a better score after which the loop ends; None goes to the budget."""
    stop_score: float | None = None
    """Score at which the loop ends; None goes to the budget."""
    world: WorldFitConfig = field(default_factory=WorldFitConfig)
    ppo: PPOSettings = PPOSettings()

    def __post_init__(self) -> None:
        for name in ("max_real_steps", "initial_steps", "steps_per_epoch", "imagined_steps", "collect_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, was {getattr(self, name)}")
        if not 0.0 <= self.real_ratio < 1.0:
            raise ValueError(f"real_ratio: expected at least 0 and below 1, was {self.real_ratio}")
        if min(self.horizon.first, self.horizon.last) < 1:
            raise ValueError(f"horizon: expected at least 1 step at both ends, was {self.horizon}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience: expected at least 1 or None, was {self.patience}")

    @property
    def real_rows(self) -> int:
        """Real rows of the mix."""
        return round(self.num_envs * self.real_ratio)


@dataclass
class OnlineResult:
    """What the loop came to."""

    policy: StrictMaskablePolicy
    """With the weights of the best epoch."""
    model: WorldModel
    """The last fit."""
    best_score: float
    best_real_steps: int
    real_steps: int
    experience: Experience
    history: list[dict[str, float]] = field(default_factory=list)
    """One entry per epoch."""


def train_online(
    build: BuildEnv,
    config: OnlineConfig,
    *,
    seed: int,
    evaluate: Evaluate,
    known: KnownParts | None = None,
    safe_action: int | None = None,
    log: Callable[[Mapping[str, float]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> OnlineResult:
    """Learn a policy within a budget of real steps and keep the one that scored best.

    Runs are reproducible: networks and draws come from generators seeded with `seed`, and sb3 seeds the global
    generators of torch and NumPy with it, from which it samples actions and minibatches.

    Args:
        build: the real environment, with Box observations.
        evaluate: called after each epoch.
        known: declared parts of the world; None declares nothing.
        safe_action: valid in every state by the environment's own word, or None.
        log: receives each entry of the history; progress: (real steps, max_real_steps).

    Raises: RuntimeError if an executed action was forbidden by its mask; whatever the fit and the environment raise.
    """
    rng = np.random.default_rng((seed, 1))
    real = RealRows(build(config.real_rows or config.collect_rows, seed))
    env = ImaginedVecEnv(
        real.env.observation_space,  # type: ignore[arg-type]  # RealRows has checked it
        real.env.action_space,  # type: ignore[arg-type]
        num_envs=config.num_envs,
        penalty_coef=config.penalty_coef,
        support_penalty=config.support_penalty,
        first_share=config.first_share,
        uncertainty=config.uncertainty,
        seed=seed,
        real=real if config.real_rows else None,
    )
    ppo = masked_ppo(env, config.ppo, n_steps=int(config.horizon.first), seed=seed, safe_action=safe_action)
    model: WorldModel | None = None
    best: dict[str, torch.Tensor] = {}
    result: OnlineResult | None = None
    best_score, best_steps, stale, history = -math.inf, 0, 0, []
    while result is None:
        began, first = time.perf_counter(), real.recorded
        wanted = config.initial_steps if model is None else config.steps_per_epoch
        if model is None or not config.real_rows:
            cut = config.initial_episode_steps if model is None else config.episode_steps
            _collect(real, wanted, None if model is None else ppo.policy, cut, rng)
        collected = time.perf_counter()
        entry: dict[str, float] = {}
        if model is not None and real.recorded > first:
            entry["model_error"] = prediction_error(model, real.experience(first))
        experience = real.experience()
        model, report = fit_world_model(
            experience, config.world, seed=seed, known=known, previous=model, safe_action=safe_action
        )
        fitted = time.perf_counter()
        env.use(model, experience)
        horizon = int(config.horizon(real.steps))
        ppo.lr_schedule = _rate(config, real.steps)
        _learn(ppo, horizon, config.imagined_steps)
        learned = time.perf_counter()
        metrics = dict(evaluate(ppo.policy, real.steps))
        invalid = env.audit.invalid + real.env.audit.invalid
        if invalid:
            raise RuntimeError(f"expected 0 executed actions that their mask forbids, was {invalid}")
        entry |= {
            **metrics,
            **env.take_statistics(),
            "real_steps": float(real.steps),
            "real_episodes": float(real.episodes),
            "real_return": float(np.mean(real.returns[-10:])) if real.returns else math.nan,
            "horizon": float(horizon),
            "holdout_rmse": report.holdout_rmse,
            "model_epochs": float(report.dynamics.epochs),
            "executed_actions": float(env.audit.executed + (0 if config.real_rows else real.env.audit.executed)),
            "invalid_actions": float(invalid),
            "imagined_steps_per_second": config.imagined_steps / (learned - fitted),
            "collect_seconds": collected - began,
            "fit_seconds": fitted - collected,
            "learn_seconds": learned - fitted,
        }
        # JSON has no NaN: there is no return before the first episode ends.
        history.append({key: float(value) for key, value in entry.items() if math.isfinite(value)})
        if log is not None:
            log(history[-1])
        if progress is not None:
            progress(min(real.steps, config.max_real_steps), config.max_real_steps)
        score = metrics["score"]
        stale += 1
        if not best or score > best_score:
            best_score, best_steps, stale = score, real.steps, 0
            best = {key: value.detach().clone() for key, value in ppo.policy.state_dict().items()}
        solved = config.stop_score is not None and score >= config.stop_score
        tired = config.patience is not None and stale >= config.patience
        if solved or tired or real.steps >= config.max_real_steps:
            ppo.policy.load_state_dict(best)
            result = OnlineResult(ppo.policy, model, best_score, best_steps, real.steps, real.experience(), history)
    return result


def act(policy: StrictMaskablePolicy, obs: np.ndarray, action_masks: np.ndarray, *, deterministic: bool) -> np.ndarray:
    """Actions [B] or [B, K] for obs [B, D] under bool masks [B, A]."""
    policy.set_training_mode(False)
    with torch.no_grad():
        distribution = policy.get_distribution(torch.as_tensor(obs), action_masks)
        return np.asarray(distribution.get_actions(deterministic=deterministic).numpy(), dtype=np.int64)


@torch.no_grad()
def prediction_error(model: WorldModel, experience: Experience) -> float:
    """Root mean squared one-step error of the elites' mean, in standard deviations of the training targets."""
    obs = torch.from_numpy(experience.obs)
    mean, _ = model.predict(obs, torch.from_numpy(experience.action))
    delta = np.concatenate((experience.next_obs - experience.obs, experience.reward[:, None]), axis=1)
    error = ((mean.mean(dim=0) - torch.from_numpy(delta)) / model.targets.std)[:, model.targets.varying]
    return float(torch.sqrt((error * error).mean())) if error.numel() else 0.0


class _Rebranching(BaseCallback):
    # Starts imagined rows on fresh branches before each rollout, so that the last-value bootstrap cuts them at H.

    def _on_rollout_start(self) -> None:
        env = self.training_env
        assert isinstance(env, ImaginedVecEnv)  # noqa: S101 - built in this module
        self.model._last_obs = env.rebranch()
        starts = self.model._last_episode_starts
        if starts is not None:
            starts[env.num_real :] = True

    def _on_step(self) -> bool:
        return True


def masked_ppo(
    env: BatchVecEnv,
    settings: PPOSettings,
    *,
    n_steps: int,
    seed: int,
    safe_action: int | None,
    learning_rate: LinearSchedule | None = None,
) -> MaskablePPO:
    """A MaskablePPO under strict masks that writes no logs of its own.

    Args: n_steps: steps per row between updates; learning_rate: a schedule in place of `settings.learning_rate`.
    """
    ppo = MaskablePPO(
        StrictMaskablePolicy,
        env,
        learning_rate=learning_rate or settings.learning_rate,
        n_steps=n_steps,
        batch_size=settings.batch_size,
        n_epochs=settings.n_epochs,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        ent_coef=settings.ent_coef,
        clip_range=settings.clip_range,
        max_grad_norm=settings.max_grad_norm,
        policy_kwargs={
            "net_arch": list(settings.net_arch),
            "activation_fn": ACTIVATIONS[settings.activation],
            "safe_action": safe_action,
        },
        seed=seed,
        device="cpu",
    )
    # Without this sb3 makes a folder for its own logs among the temporary files.
    ppo.set_logger(Logger(folder=None, output_formats=[]))
    return ppo


# Constant within an epoch: sb3's own progress starts anew with every call of learn().
def _rate(config: OnlineConfig, real_steps: int) -> FloatSchedule:
    first, last = config.ppo.learning_rate, config.ppo.final_learning_rate
    share = min(real_steps / config.max_real_steps, 1.0)
    return FloatSchedule(first if last is None else first + share * (last - first))


def _learn(ppo: MaskablePPO, horizon: int, steps: int) -> None:
    if ppo.n_steps != horizon:
        ppo.n_steps = ppo.rollout_buffer.buffer_size = horizon
    ppo.learn(steps, callback=_Rebranching(), reset_num_timesteps=False)


def _collect(
    real: RealRows, steps: int, policy: StrictMaskablePolicy | None, cut: int | None, rng: np.random.Generator
) -> None:
    for _ in range(math.ceil(steps / real.num_rows)):
        masks = real.action_masks
        if policy is None:
            actions = random_actions(masks, real.num_actions, rng)
        else:
            actions = act(policy, real.obs, masks, deterministic=False)
        step = real.step(actions)
        real.restart(np.flatnonzero(step.terminated | step.truncated))
        if cut is not None:
            late = np.flatnonzero(real.length >= cut)
            if len(late):
                real.cut(late)
