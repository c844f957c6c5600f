"""Every policy that is compared, behind one interface: a learner gets the same lesson and hands back fitted policies.

All of them see the same bars, walk under the same masks and pay the same costs; whatever is chosen, a snapshot or a
point of a grid, is chosen by the same score on the same validation rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import pandas as pd

from configs import ConfigError, DetentConfig
from configs.section import PPOConfig
from data import FeatureTable, Scaler
from envs import TradingDynamics, observation_scaler
from envs.panel import FeaturePanel
from envs.vec_env import HistoryVecEnv
from evaluation import BacktestResult, BuyAndHold, Flat, Policy, RandomValid, backtest, metrics_by_path
from evaluation.forecast import fit_ridge
from evaluation.rules import VolatilityTarget, fit_linear_signal
from mbpo import (
    TorchPolicy,
    TrainedPolicy,
    Visited,
    collect_transitions,
    historical_forecast,
    historical_uncertainty,
    imagine_branches,
    mixed_env,
    train_policy,
)
from mbpo.dqn import train_dqn
from mbpo.planning import PlannerPolicy
from mbpo.sac import train_sac
from mbpo.vec_env import MixedVecEnv
from world_model import MarketModel, calibrate_drift, evaluate_market_model, fit_market_model

Family = Literal["reference", "rule", "forecast", "model_free", "model_based"]
"""What kind of policy it is; the claim compares the best of `model_based` with the best of `model_free`."""

Progress = Callable[[int, int], None]
"""Receives steps done and steps in all."""


def silent(done: int, total: int) -> None:
    """Show no progress."""


Disagreement = Callable[[np.ndarray], np.ndarray]
"""Model disagreement [..] of feature rows [.., M]."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a learner may look at."""

    config: DetentConfig
    """Limits, costs and the learners' settings; `config.seed` seeds every generator."""
    train: FeatureTable
    """Rows to learn from."""
    validation: FeaturePanel
    """Markets on which choices are made."""
    bars_per_year: int
    lookback: int
    """Bars that a feature row looks back over."""
    score: str = "sharpe"
    """Metric of `metrics_by_path` by which everything is chosen. On many markets that is the Sharpe ratio that is
    compared; on a single short one it picks policies that are nearly flat, and the reward is the better judge."""

    @cached_property
    def dynamics(self) -> TradingDynamics:
        """The known part of trading on these columns."""
        return TradingDynamics.from_config(self.train.names, self.config)

    @cached_property
    def scaler(self) -> Scaler:
        """Of observations without a world model, fitted on the training rows."""
        return observation_scaler(self.train)

    def walk(self, policy: Policy, disagreement: Disagreement | None = None) -> BacktestResult:
        """Walk a policy over the validation markets."""
        return walk_panel(self.dynamics, self.validation, policy, disagreement)

    def validate(self, policy: Policy, disagreement: Disagreement | None = None) -> dict[str, float]:
        """Mean metrics over the validation markets, and `score`, higher is better."""
        by_path = metrics_by_path(self.walk(policy, disagreement), self.bars_per_year)
        means = {f"validation_{name}": float(np.mean(values)) for name, values in by_path.items()}
        score = means[f"validation_{self.score}"]
        if means["validation_exposure"] < self.config.evaluation.verdict.min_exposure:
            # Nearly flat is worth what flat is worth: a ratio does not know how little was at stake.
            score = min(score, 0.0)
        return {"score": score, **means}


@dataclass(frozen=True, eq=False)
class Fitted:
    """A policy ready to be judged."""

    policy: Policy
    family: Family
    disagreement: Disagreement | None = None
    """Fills the `model_uncertainty` column of its state rows; zero when None."""
    max_paths: int | None = None
    """Walk only the first test markets: for a policy that is slow over many."""
    notes: Mapping[str, float] = field(default_factory=dict)
    """How it was fitted."""
    evidence: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Arrays for a report."""

    def facts(self, fit_seconds: float) -> dict[str, Any]:
        """What is kept of it as JSON, which has no NaN: a note that is none is left out."""
        notes = {name: float(value) for name, value in self.notes.items() if math.isfinite(value)}
        return {"family": self.family, "notes": notes, "fit_seconds": fit_seconds}


Learner = Callable[[Lesson, Progress], dict[str, Fitted]]
"""Fits one or several policies, by name."""


def walk_panel(
    dynamics: TradingDynamics, panel: FeaturePanel, policy: Policy, disagreement: Disagreement | None = None
) -> BacktestResult:
    """Walk a policy over every market of a panel, one path each."""
    uncertainty = None if disagreement is None else disagreement(panel.values)
    return backtest(dynamics, panel.values, panel.timestamps, policy, uncertainty)


def feature_table(panel: FeaturePanel, market: int = 0, symbol: str = "synthetic") -> FeatureTable:
    """One market of a panel as a table."""
    index = pd.DatetimeIndex(panel.timestamps, name="timestamp").tz_localize("UTC")
    return FeatureTable(index, symbol, panel.fields, panel.values[market])


# --- without learning ----------------------------------------------------------------------------------------


def fit_references(lesson: Lesson, _: Progress) -> dict[str, Fitted]:
    """Policies that need no training rows."""
    dynamics, seed = lesson.dynamics, lesson.config.seed
    return {
        "flat": Fitted(Flat(dynamics), "reference"),
        "buy_and_hold": Fitted(BuyAndHold(dynamics), "reference"),
        "random_valid": Fitted(RandomValid(seed), "reference"),
        "vol_target": Fitted(VolatilityTarget(dynamics), "rule"),
    }


def fit_linear(lesson: Lesson, _: Progress) -> dict[str, Fitted]:
    """Long where one signal is high, flat where it is low."""
    policy = fit_linear_signal(lesson.dynamics, lesson.train.values, _score(lesson))
    return {policy.name: Fitted(policy, "rule", notes={"validation_score": _score(lesson)(policy)})}


def fit_forecast(lesson: Lesson, _: Progress) -> dict[str, Fitted]:
    """Ridge forecast of the next returns and a cost-aware choice."""
    ridge = lesson.config.evaluation.ridge
    policy = fit_ridge(
        lesson.dynamics,
        lesson.train.values,
        lesson.train.names,
        ridge,
        _score(lesson),
        bars_per_year=lesson.bars_per_year,
    )
    return {policy.name: Fitted(policy, "forecast", notes={"validation_score": _score(lesson)(policy)})}


def _score(lesson: Lesson) -> Callable[[Policy], float]:
    return lambda policy: lesson.validate(policy)["score"]


# --- model-free ------------------------------------------------------------------------------------------------


def fit_model_free(lesson: Lesson, progress: Progress) -> dict[str, Fitted]:
    """MaskablePPO on the training rows alone."""
    ppo: PPOConfig = lesson.config.model_free
    trained = train_policy(
        history_env(lesson, ppo.num_envs),
        ppo,
        n_steps=ppo.n_steps,
        seed=lesson.config.seed,
        name="model_free",
        validate=lesson.validate,
        progress=progress,
    )
    return {"model_free": Fitted(trained.policy, "model_free", notes=_notes(trained))}


def fit_sac(lesson: Lesson, progress: Progress) -> dict[str, Fitted]:
    """SAC on the continuous position, projected onto the valid actions."""
    sac = lesson.config.evaluation.sac
    env = history_env(lesson, sac.num_envs)
    trained = train_sac(env, sac, seed=lesson.config.seed, validate=lesson.validate, progress=progress)
    return {"sac": Fitted(trained.policy, "model_free", notes=_notes(trained))}


def fit_dqn(lesson: Lesson, progress: Progress) -> dict[str, Fitted]:
    """Masked double DQN."""
    dqn = lesson.config.evaluation.dqn
    env = history_env(lesson, dqn.num_envs)
    trained = train_dqn(env, dqn, seed=lesson.config.seed, validate=lesson.validate, progress=progress)
    return {"masked_dqn": Fitted(trained.policy, "model_free", notes=_notes(trained))}


def history_env(lesson: Lesson, num_envs: int) -> HistoryVecEnv:
    """Walks over the training rows."""
    return HistoryVecEnv(
        lesson.dynamics,
        lesson.scaler,
        lesson.train.values,
        num_envs=num_envs,
        episode_bars=lesson.config.env.episode_bars,
        seed=lesson.config.seed,
    )


def _notes(trained: TrainedPolicy[Any]) -> dict[str, float]:
    return {"steps": trained.steps, "best_step": trained.best_step, "validation_score": trained.best_score}


# --- model-based -----------------------------------------------------------------------------------------------


def fit_world_model(lesson: Lesson, progress: Progress) -> MarketModel:
    """The ensemble on the training rows alone, the holdout being their end; its drift is calibrated on validation."""
    config = lesson.config
    table = lesson.train
    model, _ = fit_market_model(
        table.values,
        table.fields,
        config.world_model,
        config.seed,
        lambda epoch, total, _: progress(epoch, total),
        purge=lesson.lookback,
    )
    if config.world_model.calibrate_drift:
        calibrate_drift(model, table.values, lesson.validation.values)
    return model


def fit_model_based(lesson: Lesson, progress: Progress) -> dict[str, Fitted]:
    """MBPO, the planner over the same world model, and both together."""
    config = lesson.config
    model = fit_world_model(lesson, progress)
    disagreement = partial(disagreement_of, model)
    policy, notes = train_mbpo(lesson, model, progress)
    fitted = {"mbpo": Fitted(policy, "model_based", disagreement, notes=notes, evidence=calibration(lesson, model))}
    few = config.evaluation.planner.max_paths
    if not few:
        return fitted
    # Plans end with the value of the policy, so they are judged by the reward that it has learned.
    dynamics = lesson.dynamics.with_risk_aversion(notes["risk_aversion"])
    planner = partial(PlannerPolicy, dynamics, model, config.planner, gamma=config.mbpo.ppo.gamma)
    alone = planner(seed=config.seed, name="planner")
    joined = planner(seed=config.seed, value=policy, name="mbpo_planner")
    return {
        **fitted,
        "planner": Fitted(alone, "model_based", disagreement, max_paths=few),
        "mbpo_planner": Fitted(joined, "model_based", disagreement, max_paths=few),
    }


def calibration(lesson: Lesson, model: MarketModel) -> dict[str, np.ndarray]:
    """How the world model does on the first validation market.

    Returns: `pit` [N, M] probability integral transforms, `coverage` [3] of central 50, 80 and 95 % intervals.
    """
    scores = evaluate_market_model(model, lesson.validation.values[0], lesson.validation.fields)
    return {
        "pit": scores.pit.astype(np.float32),
        "coverage": np.array([scores.coverage[level] for level in ("50", "80", "95")]),
    }


def train_mbpo(
    lesson: Lesson, model: MarketModel, progress: Progress, env_type: Callable[..., MixedVecEnv] = MixedVecEnv
) -> tuple[TorchPolicy, dict[str, float]]:
    """Masked PPO on real and imagined rows. Args: env_type: builds the environment, for one that differs on purpose."""
    config, table = lesson.config, lesson.train
    transitions = collect_transitions(
        lesson.dynamics, lesson.scaler, table, seed=config.seed, episode_bars=config.env.episode_bars
    )
    visited = Visited.of(transitions, len(table.names))
    branches = imagine_branches(model, visited.features, config)
    uncertainty = historical_uncertainty(model, visited.features)
    scaler = observation_scaler(table, uncertainty)
    env = mixed_env(
        config,
        lesson.dynamics,
        scaler,
        visited,
        uncertainty,
        historical_forecast(model, visited.features),
        branches,
        env_type=env_type,
    )
    trained = train_policy(
        env,
        config.mbpo.ppo,
        n_steps=config.mbpo.rollout_length,
        seed=config.seed,
        name="mbpo",
        validate=lambda policy: lesson.validate(policy, partial(disagreement_of, model)),
        progress=progress,
    )
    return trained.policy, {**_notes(trained), "risk_aversion": env.dynamics.reward.risk_aversion}


def disagreement_of(model: MarketModel, features: np.ndarray) -> np.ndarray:
    """Disagreement [..] of the elites at feature rows [.., M]."""
    flat = historical_uncertainty(model, features.reshape(-1, features.shape[-1]))
    return flat.reshape(features.shape[:-1])


LEARNERS: dict[str, Learner] = {
    "references": fit_references,
    "linear_signal": fit_linear,
    "ridge": fit_forecast,
    "model_free": fit_model_free,
    "sac": fit_sac,
    "masked_dqn": fit_dqn,
    "mbpo": fit_model_based,
}
"""By name; a learner may return several policies."""

MODEL_FREE = ("model_free", "sac", "masked_dqn")
"""Learners whose only policy, of the same name, may be the rival."""
MODEL_BASED = {"mbpo": ("mbpo", "planner", "mbpo_planner")}
"""Learners with the policies that may challenge it."""


def check_learners(setting: str, names: Sequence[str], challenger: str | None = None) -> None:
    """Refuse learners that do not exist, or that leave the claim without one of its sides.

    Args: setting: path of the setting the names stand in; challenger: policy the claim is about, None where the
        learners are not compared.
    Raises: ConfigError.
    """
    known = [name for name in LEARNERS if name != "references"]
    for name in names:
        if name not in known:
            raise ConfigError(f"{setting}: expected names of {known}, was {name!r}")
        if names.count(name) > 1:
            raise ConfigError(f"{setting}: expected each learner once, was {name!r} {names.count(name)} times")
    if challenger is None:
        return
    if not set(names) & set(MODEL_FREE):
        raise ConfigError(f"{setting}: expected one of {list(MODEL_FREE)} to compare with, was {list(names)}")
    possible = [policy for name in names for policy in MODEL_BASED.get(name, ())]
    if challenger not in possible:
        raise ConfigError(
            f"evaluation.verdict.challenger: expected a model-based policy of {setting}={list(names)}, which are "
            f"{possible}, was {challenger!r}"
        )


def learner_of(policy: str) -> str:
    """The learner a policy comes from."""
    return next((learner for learner, policies in MODEL_BASED.items() if policy in policies), policy)


_SETTINGS: dict[str, tuple[str, ...]] = {
    "ridge": ("evaluation.ridge",),
    "model_free": ("model_free",),
    "sac": ("evaluation.sac",),
    "masked_dqn": ("evaluation.dqn",),
    "mbpo": ("world_model", "mbpo", "planner", "evaluation.planner"),
}


def shared_settings(config: DetentConfig) -> dict[str, Any]:
    """What every learner reads: limits, costs, reward, episodes, and the exposure below which a score is none."""
    shared: dict[str, Any] = config.model_dump(mode="json", include={"limits", "account", "reward", "env"})
    return {**shared, "min_exposure": config.evaluation.verdict.min_exposure}


def settings_of(config: DetentConfig, learner: str) -> dict[str, Any]:
    """The sections of a config that only this learner reads."""
    values: dict[str, Any] = {}
    for path in _SETTINGS.get(learner, ()):
        section: Any = config
        for name in path.split("."):
            section = getattr(section, name)
        values[path] = section.model_dump(mode="json") if hasattr(section, "model_dump") else section
    return values
