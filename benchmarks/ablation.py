"""What each part of MBPO is worth: the settings in force with one thing changed, on markets whose truth is known.

Every variant learns on the same training paths, which no run of the suite and no tuning has seen, with the same seeds,
and is judged on the same test markets, so a difference is taken run by run. Two variants change more than a setting:
one imagines without masks, one declares nothing of trading and learns state, reward, termination and mask whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import (
    Fitted,
    Lesson,
    disagreement_of,
    fit_world_model,
    history_env,
    silent,
    train_mbpo,
    walk_panel,
)
from benchmarks.folds import FoldTask, Progress, run_folds
from benchmarks.machine import library_versions, machine
from benchmarks.suite import LIBRARIES, Cell, judged_market, lesson_of, source_hash
from benchmarks.tuning import with_settings
from configs import DetentConfig
from configs.section import PPOConfig
from envs.batch import BatchStep, BatchVecEnv
from evaluation import metrics_by_path
from evaluation.statistics import Interval, t_interval
from evaluation.statistics.crossed import seed_margin
from masking import valid_actions
from masking.strict_policy import StrictMaskablePolicy
from mbpo import MixedVecEnv, OnlineConfig, TorchPolicy, train_online
from mbpo.online import PPOSettings
from mbpo.ramp import Ramp
from world_model import WorldFitConfig

ABLATION_RUNS = 70_000
"""Training runs are numbered from here on: paths of their own."""
PATHS = 60
"""Test markets, the first of the suite's."""
SMOKE_PATHS = 2
"""The same in a run that answers nothing."""
LEVEL = 0.95
WHOLE_EPOCHS = 5
"""Fits of the world that is learned whole; each is followed by an equal share of the steps and a validation."""

Fit = Callable[[Lesson], Fitted]


class UnmaskedImagination(MixedVecEnv):
    """Imagined rows may take every action; real ones stay masked."""

    imagined = forbidden = 0
    """Imagined actions so far, and those of them that the mask forbids."""

    def _advance(self, actions: np.ndarray) -> BatchStep:
        masks = self.dynamics.action_masks(self._state[self.num_real :])
        self.imagined += len(masks)
        self.forbidden += int((~valid_actions(actions[self.num_real :], masks)).sum())
        return super()._advance(actions)

    def _show(self, now: Any, features: np.ndarray, uncertainty: np.ndarray) -> None:
        super()._show(now, features, uncertainty)
        now.action_masks = np.ones_like(now.action_masks)


def fit_mbpo(lesson: Lesson) -> Fitted:
    """As the suite fits it."""
    model = fit_world_model(lesson, silent)
    policy, notes = train_mbpo(lesson, model, silent)
    return Fitted(policy, "model_based", partial(disagreement_of, model), notes=notes)


def fit_unmasked(lesson: Lesson) -> Fitted:
    """Without masks in imagined states; the policy is judged under masks like every other one."""
    model = fit_world_model(lesson, silent)
    built: list[UnmaskedImagination] = []

    def build(*parts: Any, **settings: Any) -> MixedVecEnv:
        built.append(UnmaskedImagination(*parts, **settings))
        return built[0]

    policy, notes = train_mbpo(lesson, model, silent, env_type=build)
    share = built[0].forbidden / built[0].imagined
    return Fitted(policy, "model_based", partial(disagreement_of, model), notes={**notes, "forbidden_share": share})


def fit_whole(lesson: Lesson) -> Fitted:
    """Nothing declared: one world model of observation, reward, termination and mask, from as many transitions.

    Observations, reward and PPO settings are those of the others; so is the number of real transitions, eight
    for each training row: half of them by a random walk, the others between fits by its own policy.
    """
    config, rows = lesson.config, len(lesson.train) - 1

    def build(num_envs: int, _: int) -> BatchVecEnv:
        return history_env(lesson, num_envs)

    def evaluate(policy: StrictMaskablePolicy, _: int) -> dict[str, float]:
        return lesson.validate(TorchPolicy("whole", policy, lesson.scaler))

    ppo, epochs = config.mbpo.ppo, WHOLE_EPOCHS
    real = 8 * rows
    settings = OnlineConfig(
        max_real_steps=real,
        initial_steps=real // 2,
        steps_per_epoch=max(real // 2 // (epochs - 1), 1),
        imagined_steps=ppo.total_steps // epochs,
        num_envs=ppo.num_envs,
        collect_rows=8,
        horizon=Ramp(config.mbpo.rollout_length, config.mbpo.rollout_length),
        penalty_coef=config.mbpo.penalty_coef,
        world=WorldFitConfig(hidden=config.world_model.hidden, max_epochs=30, patience=8, batch_size=1024),
        ppo=_online_settings(ppo),
    )
    result = train_online(build, settings, seed=config.seed, evaluate=evaluate)
    policy = TorchPolicy("whole", result.policy, lesson.scaler)
    notes = {"best_step": float(result.best_real_steps), "validation_score": result.best_score}
    return Fitted(policy, "model_based", notes=notes)


@dataclass(frozen=True)
class Variant:
    """What is different."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted path -> value."""
    fit: Fit = fit_mbpo


def _horizon(bars: int) -> Variant:
    # As many steps per rollout as with three bars, so that the number of updates is the same.
    return Variant({"mbpo.rollout_length": bars, "mbpo.ppo.num_envs": round(512 * 3 / bars)})


IN_FORCE = "in force"
VARIANTS: dict[str, Variant] = {
    IN_FORCE: Variant(),
    "penalty 0.1": Variant({"mbpo.penalty_coef": 0.1}),
    "penalty 0.5": Variant({"mbpo.penalty_coef": 0.5}),
    **{f"H = {bars}": _horizon(bars) for bars in (1, 5, 10)},
    **{f"real ratio {ratio:g}": Variant({"mbpo.real_ratio": ratio}) for ratio in (0.0, 0.05, 0.5, 1.0)},
    "single model": Variant({"world_model.num_elites": 1}),
    "no volatility line": Variant({"world_model.volatility_line": False}),
    "drift as fitted": Variant({"world_model.calibrate_drift": False}),
    "rewards with luck": Variant({"mbpo.control_variate": 0.0}),
    "risk aversion 5": Variant({"mbpo.usual_position": None, "mbpo.risk_aversion": 5.0}),
    "risk aversion 20": Variant({"mbpo.usual_position": None, "mbpo.risk_aversion": 20.0}),
    "risk aversion from the start": Variant({"mbpo.risk_aversion_ramp": 0.0}),
    "no mask in imagination": Variant(fit=fit_unmasked),
    "no structure": Variant(fit=fit_whole),
}
"""The settings in force have H = 3, a real ratio of 0.25 and no penalty."""


@dataclass(frozen=True, kw_only=True)
class AblationRow:
    """One variant over its runs."""

    variant: str
    sharpe: tuple[float, ...]
    """Mean over the test markets, by run."""
    difference: Interval | None
    """To the settings in force, paired by run; None for those themselves and for a single run."""
    turnover: float
    """Traded notional per year in multiples of equity, mean over runs and markets."""
    forbidden_share: float | None
    """Share of imagined actions that the mask forbids, where imagination does not ask it."""

    @property
    def mean(self) -> float:
        """Mean Sharpe ratio over runs."""
        return float(np.mean(self.sharpe))


@dataclass(frozen=True, kw_only=True)
class AblationReport:
    """All variants, the settings in force first."""

    rows: tuple[AblationRow, ...]
    train_bars: int
    runs: int
    paths: int
    machine: dict[str, str | int]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return asdict(self)


def measure_ablation(
    config: DetentConfig,
    directory: Path,
    *,
    runs: int = 5,
    jobs: int = 1,
    variants: Mapping[str, Variant] | None = None,
    paths: int = PATHS,
    progress: Progress | None = None,
) -> AblationReport:
    """Fit and judge every variant on every run; finished ones are read back from `directory`.

    Args: variants by name; None takes VARIANTS.
    Raises: ValueError on counts below 1 or without the settings in force; FoldError where a fit failed.
    """
    variants = VARIANTS if variants is None else variants
    if runs < 1 or paths < 1:
        raise ValueError(f"runs, paths: expected at least 1, was {runs} and {paths}")
    if IN_FORCE not in variants:
        raise ValueError(f"variants: expected {IN_FORCE!r} among them, was {list(variants)}")
    bars = config.evaluation.suite.primary_train_bars
    code = source_hash("benchmarks/ablation.py")
    tasks = [
        FoldTask(
            f"{name}, run {run + 1}",
            {"ablation": name, "run": run, "paths": paths, "config": tried.model_dump(mode="json"), "version": code},
            (tried, variant.fit, bars, run, paths),
        )
        for run in range(runs)
        for name, variant in variants.items()
        for tried in (with_settings(config, variant.settings),)
    ]
    results = run_folds(tasks, work_on_variant, directory, jobs=jobs, progress=progress)
    found = {
        name: [result for task, result in zip(tasks, results, strict=True) if task.identity["ablation"] == name]
        for name in variants
    }
    sharpe = {name: [float(one.arrays["sharpe"].mean()) for one in mine] for name, mine in found.items()}
    rows = []
    for name, mine in found.items():
        forbidden = [one.values["notes"].get("forbidden_share") for one in mine]
        rows.append(
            AblationRow(
                variant=name,
                sharpe=tuple(sharpe[name]),
                difference=None if name == IN_FORCE or runs < 2 else _paired(sharpe[name], sharpe[IN_FORCE]),
                turnover=float(np.mean([one.arrays["turnover_per_year"].mean() for one in mine])),
                forbidden_share=None if None in forbidden else float(np.mean(forbidden)),
            )
        )
    return AblationReport(
        rows=tuple(rows),
        train_bars=bars,
        runs=runs,
        paths=paths,
        machine=machine(),
        versions=library_versions(LIBRARIES),
    )


def work_on_variant(task: FoldTask) -> dict[str, Any]:
    """Fit one variant once. Returns: metrics by test market, each [P]; notes of the fit."""
    config, fit, bars, run, paths = task.payload
    lesson = lesson_of(config, Cell("mbpo", bars, ABLATION_RUNS + run))
    fitted = fit(lesson)
    panel = judged_market(config).features.first_paths(paths)
    walked = walk_panel(lesson.dynamics, panel, fitted.policy, fitted.disagreement)
    return {**metrics_by_path(walked, lesson.bars_per_year), "notes": dict(fitted.notes)}


def _paired(ours: list[float], reference: list[float]) -> Interval:
    gain = np.subtract(ours, reference)
    return t_interval(
        float(gain.mean()), *seed_margin(gain), level=LEVEL, method=f"t interval over {len(gain)} training runs"
    )


def _online_settings(ppo: PPOConfig) -> PPOSettings:
    shared = ("learning_rate", "batch_size", "n_epochs", "gamma", "gae_lambda", "ent_coef", "clip_range", "net_arch")
    return PPOSettings(**{name: getattr(ppo, name) for name in shared})
