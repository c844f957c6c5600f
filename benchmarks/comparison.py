"""From walked policies to comparisons: every policy with its intervals, the claim with its verdict.

Letters: S training runs, P test paths, n bars.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.folds import FoldResult
from configs.evaluation import VerdictConfig
from evaluation.statistics import (
    Interval,
    KillSwitchTest,
    NonInferiority,
    NotDecidable,
    PowerRow,
    SharpeDifference,
    crossed_mean,
    drawdown_non_inferiority,
    interquartile_mean,
    kill_switch_difference,
    power_table,
    probability_of_improvement,
    quantile_upper_bound,
    sharpe_difference,
)
from evaluation.verdict import Verdict, decide

SEED = 0
"""Of the bootstraps."""
RESAMPLES = 200
"""Of means that are shown without their distribution."""


Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Walked:
    """One policy, all its training runs, over the same test paths; the folds of a walk-forward join to one path."""

    name: str
    family: str
    train_bars: int
    """0 for a policy that does not learn."""
    returns: NDArray[np.float32]
    """[S, P, n] simple return per bar."""
    metrics: Mapping[str, NDArray[np.float64]]
    """Each [S, P], or [S, F] of the F folds of a walk-forward; see `evaluation.metrics_by_path`."""
    decision_ms: NDArray[np.float64]
    """[k] single decisions."""
    invalid_actions: int
    validation_score: float
    """Mean over runs of the score that chose the snapshots; NaN where nothing was chosen."""
    fit_seconds: float
    """Mean over runs."""

    @property
    def paths(self) -> int:
        """P."""
        return int(self.returns.shape[1])

    def first_paths(self, count: int) -> Walked:
        """The same runs on the first test paths only."""
        if count == self.paths:
            return self
        metrics = {name: values[:, :count] for name, values in self.metrics.items()}
        return Walked(**{**vars(self), "returns": self.returns[:, :count], "metrics": metrics})


METRICS = (
    "sharpe",
    "sortino",
    "calmar",
    "annual_return",
    "annual_volatility",
    "max_drawdown",
    "turnover_per_year",
    "exposure",
    "cost_paid",
    "hit_rate",
    "time_active",
    "time_reduce_only",
    "time_halted",
    "killed",
    "reward_per_bar",
)
"""What is kept of `metrics_by_path`."""


def arrays_of(result: FoldResult, policy: str) -> dict[str, NDArray[Any]]:
    """The arrays of one policy, without the policy's name in front."""
    prefix = f"{policy}."
    return {key.removeprefix(prefix): value for key, value in result.arrays.items() if key.startswith(prefix)}


def gather(name: str, runs: Sequence[tuple[Arrays, Mapping[str, Any]]]) -> Walked:
    """Join the runs of one policy.

    Args: runs: arrays as `benchmarks.suite.judge` names them, and facts of `benchmarks.suite.work_on_cell`.
    Raises: ValueError if runs differ in paths or bars.
    """
    shapes = {arrays["returns"].shape for arrays, _ in runs}
    if len(shapes) != 1:
        raise ValueError(f"{name}: expected runs over the same paths and bars, was {sorted(shapes)}")
    facts = [entry for _, entry in runs]
    scores = [entry["notes"].get("validation_score", math.nan) for entry in facts]
    return Walked(
        name=name,
        family=facts[0]["family"],
        train_bars=facts[0]["train_bars"],
        returns=np.stack([arrays["returns"] for arrays, _ in runs]),
        metrics={key: np.stack([np.asarray(arrays[key], np.float64) for arrays, _ in runs]) for key in METRICS},
        decision_ms=np.concatenate([arrays["decision_ms"] for arrays, _ in runs]),
        invalid_actions=int(sum(int(arrays["invalid_actions"].sum()) for arrays, _ in runs)),
        validation_score=float(np.mean(scores)),
        fit_seconds=float(np.mean([entry["fit_seconds"] for entry in facts])),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison:
    """One policy against another on the same paths; None where the data are too few to say, which the verdict tells."""

    challenger: str
    baseline: str
    train_bars: int
    sharpe: SharpeDifference | None
    drawdown: NonInferiority | None
    kill_switch: KillSwitchTest | None
    latency_ms: float | None
    """Upper bound on the 99th percentile of a decision of the challenger."""
    improvement: Interval | None
    """Chance that the challenger has the higher Sharpe ratio on a path, or a fold."""
    power: tuple[PowerRow, ...]
    verdict: Verdict

    @property
    def gain(self) -> Interval:
        """Difference of the Sharpe ratios; NaN where it cannot be decided."""
        unknown = Interval(math.nan, math.nan, math.nan, math.nan, "cannot be decided")
        return unknown if self.sharpe is None else self.sharpe.interval


def compare(
    challenger: Walked,
    baseline: Walked,
    config: VerdictConfig,
    bars_per_year: int,
    *,
    failed_checks: tuple[str, ...] | None = (),
    unit: str = "path",
) -> Comparison:
    """Hold the claim against two policies, on the paths that both have walked.

    Args: failed_checks and unit as `evaluation.verdict.decide` takes them.
    Raises: ValueError on malformed returns, or different bars or runs.
    """
    paths = min(challenger.paths, baseline.paths)
    a, b = challenger.first_paths(paths), baseline.first_paths(paths)
    level = config.confidence
    sharpe = _or_undecidable(
        sharpe_difference, a.returns, b.returns, bars_per_year, level=level, resamples=config.resamples, seed=SEED
    )
    drawdown = _or_undecidable(
        drawdown_non_inferiority,
        a.metrics["max_drawdown"],
        b.metrics["max_drawdown"],
        margin=config.drawdown_margin,
        level=level,
    )
    kill_switch = _or_undecidable(
        kill_switch_difference,
        a.metrics["killed"] > 0,
        b.metrics["killed"] > 0,
        margin=config.kill_switch_margin,
        level=level,
    )
    latency = _or_undecidable(quantile_upper_bound, a.decision_ms, 0.99, level=level)
    improvement = _or_undecidable(
        probability_of_improvement,
        a.metrics["sharpe"],
        b.metrics["sharpe"],
        level=level,
    )
    verdict = decide(
        a.name,
        b.name,
        sharpe=sharpe,
        drawdown=drawdown,
        kill_switch=kill_switch,
        latency_ms=latency,
        config=config,
        invalid_actions=a.invalid_actions,
        exposures=(float(np.mean(a.metrics["exposure"])), float(np.mean(b.metrics["exposure"]))),
        failed_checks=failed_checks,
        unit=unit,
    )
    rows = []
    if not isinstance(sharpe, NotDecidable):
        rows = power_table(sharpe, bars_per_year, min_gain=config.min_sharpe_gain, power=config.power)
    return Comparison(
        challenger=a.name,
        baseline=b.name,
        train_bars=a.train_bars,
        sharpe=_decided(sharpe),
        drawdown=_decided(drawdown),
        kill_switch=_decided(kill_switch),
        latency_ms=_decided(latency),
        improvement=_decided(improvement),
        power=tuple(rows),
        verdict=verdict,
    )


def best_on_validation(candidates: Iterable[Walked]) -> Walked:
    """The policy with the highest validation score; one without a score wins only where none has one, the first.

    Raises: ValueError if there is no candidate.
    """
    listed = list(candidates)
    if not listed:
        raise ValueError("candidates: expected at least one policy, was none")
    return max(listed, key=lambda one: one.validation_score if math.isfinite(one.validation_score) else -math.inf)


def metric_interval(walked: Walked, metric: str, level: float) -> Interval:
    """Mean of a metric over runs and paths; without an interval where there is one path, or a run without a value."""
    table = np.asarray(walked.metrics[metric], np.float64)
    if table.shape[1] < 2 or not np.isfinite(table).all():
        return Interval(float(table.mean()), math.nan, math.nan, level, "mean without an interval")
    return crossed_mean(table, level=level, resamples=RESAMPLES, seed=SEED).interval


def sharpe_aggregates(walked: Walked, config: VerdictConfig) -> tuple[Interval, Interval | None]:
    """Mean and interquartile mean of the Sharpe ratio over runs and paths; None for one path, or a missing value."""
    ratios = walked.metrics["sharpe"]
    if not np.isfinite(ratios).all():
        return metric_interval(walked, "sharpe", config.confidence), None
    middle = _or_undecidable(
        interquartile_mean,
        ratios,
        level=config.confidence,
        resamples=config.resamples,
        seed=SEED,
    )
    return metric_interval(walked, "sharpe", config.confidence), _decided(middle)


def _or_undecidable(function: Any, *arguments: Any, **settings: Any) -> Any:
    try:
        return function(*arguments, **settings)
    except NotDecidable as reason:
        return reason


def _decided(result: Any) -> Any:
    return None if isinstance(result, NotDecidable) else result
