"""Is the world model's density of the next return as good as GARCH's? Walk-forward over daily bars, test rows only.

Every contestant sees the same training window: the fold's training and validation windows in one piece. It is fitted
there once and predicts each test bar from the bars before it. Settings of the world model were chosen on the first
`DEVELOPMENT_FOLDS` folds of each market, which are reported apart; the later ones took no part in any choice. Import it
where it is needed: it loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray

from benchmarks.machine import library_versions, machine
from benchmarks.walk_forward import plan_folds
from configs import DetentConfig
from data import LOOKBACK, FeatureTable, Split, compute_features
from data.bars import BundledBars
from evaluation.statistics.influence import hac_variance
from evaluation.statistics.interval import Interval, t_interval
from evaluation.volatility import constant_log_density, ewma_log_density, garch_log_density
from world_model import evaluate_market_model, fit_market_model
from world_model.bar_return import return_log_density
from world_model.volatility import BAR_MOVES

Floats = NDArray[np.float64]

LIBRARIES = ("arch", "numpy", "scipy", "torch")
MARKETS = ("sp500", "nasdaq")
DEVELOPMENT_FOLDS = 3
MODELS: dict[str, dict[str, Any]] = {
    "plain_gaussian": {"volatility_line": False, "likelihood": "gaussian"},
    "gaussian": {"volatility_line": True, "likelihood": "gaussian"},
    "student_t": {"volatility_line": True, "likelihood": "student_t"},
}
"""Settings of the world model that are compared; `plain_gaussian` is the ensemble without the volatility line."""
YARDSTICK = "garch_t"
CONTESTANTS = ("constant", "ewma", YARDSTICK, "gjr_garch_t", *MODELS)
LEVEL = 0.95
SMOKE: dict[str, Any] = {"markets": ("sp500",), "max_folds": 1}
"""Together with few epochs."""


@dataclass(frozen=True, kw_only=True)
class FoldLikelihood:
    """One test window of one market."""

    market: str
    fold: int
    """Counted from 0 over all folds of the market."""
    development: bool
    """Whether settings were chosen with this fold in sight."""
    first: str
    """Date of the first test bar."""
    train_bars: int
    test_bars: int
    totals: dict[str, float]
    """Log-likelihood of the whole window by contestant, nats; mean over training seeds."""
    coverage: dict[str, dict[str, dict[str, float]]]
    """Of the world models on the test rows: share inside the central 50/80/95 % intervals, by field group or `all`."""
    no_better: dict[str, list[str]]
    """Features on which a model is no better than a constant on the test rows, by model; of the first seed."""
    follows_baseline: dict[str, list[str]]
    """Features it knew to be so after its fit."""

    def gain(self, name: str) -> float:
        """Nats by which a contestant beats GARCH-t over the window."""
        return self.totals[name] - self.totals[YARDSTICK]


@dataclass(frozen=True, kw_only=True)
class LikelihoodReport:
    """Every fold, and the gain over GARCH-t in nats per bar with its interval."""

    folds: tuple[FoldLikelihood, ...]
    gains: dict[str, dict[str, Interval]]
    """By contestant, then by `judged` (folds that no choice saw), `development` and market (judged folds)."""
    seeds: int
    machine: dict[str, str | int]
    versions: dict[str, str]

    def won(self, name: str, *, development: bool = False) -> tuple[int, int]:
        """Folds in which a contestant's total is at least that of GARCH-t, and how many there are."""
        folds = [fold for fold in self.folds if fold.development == development]
        return sum(fold.gain(name) >= 0.0 for fold in folds), len(folds)

    @property
    def within_goal(self) -> bool:
        """Whether the Student-t model is as good as GARCH-t in every judged fold and better on average."""
        won, folds = self.won("student_t")
        return folds > 0 and won == folds and self.gains["student_t"]["judged"].estimate > 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {
            "folds": [asdict(fold) for fold in self.folds],
            "gains": {
                name: {part: interval.to_dict() for part, interval in parts.items()}
                for name, parts in self.gains.items()
            },
            "folds_won": {name: self.won(name) for name in CONTESTANTS if name != YARDSTICK},
            "seeds": self.seeds,
            "within_goal": self.within_goal,
            "machine": self.machine,
            "versions": self.versions,
            "threads": 1,
        }


def measure_likelihood(
    config: DetentConfig,
    *,
    markets: Iterable[str] = MARKETS,
    max_folds: int | None = None,
    seeds: int = 1,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> LikelihoodReport:
    """Fit every contestant on every fold.

    Args:
        config: windows of `data.split`, the world model, and the seed of the first training run.
        markets: bundled symbols. max_folds: the latest ones only; None is all.
        seeds: training runs of each world model. jobs: processes.
        progress: called with (folds done, folds).
    """
    if seeds < 1 or jobs < 1:
        raise ValueError(f"seeds and jobs: expected at least 1, was {seeds} and {jobs}")
    tasks = []
    for market in markets:
        table = compute_features(BundledBars(market).load(), config.data.bars_per_year, market)
        folds = list(enumerate(plan_folds(config, len(table))))
        tasks += [(table, number, fold) for number, fold in folds[-max_folds if max_folds else 0 :]]
    results = []
    # In the order of the tasks: the report must not depend on which process is faster.
    for result in Parallel(n_jobs=jobs, return_as="generator")(
        delayed(work_on_fold)(config, table, number, fold, seeds) for table, number, fold in tasks
    ):
        results.append(result)
        if progress is not None:
            progress(len(results), len(tasks))
    return LikelihoodReport(
        folds=tuple(fold for fold, _ in results),
        gains={name: _gains(results, name) for name in CONTESTANTS if name != YARDSTICK},
        seeds=seeds,
        machine=machine(),
        versions=library_versions(LIBRARIES),
    )


def work_on_fold(
    config: DetentConfig, table: FeatureTable, number: int, fold: Split, seeds: int
) -> tuple[FoldLikelihood, dict[str, Floats]]:
    """One fold: its report, and the log density [T] of every test bar by contestant."""
    torch.set_num_threads(1)
    window, test = slice(fold.train.start, fold.validation.stop), fold.test
    returns = table.values[:, [table.index(name) for name in BAR_MOVES]].sum(axis=1)
    parts = returns[window], returns[window.stop : test.start], returns[test]
    densities = {
        "constant": constant_log_density(*parts),
        "ewma": ewma_log_density(*parts),
        YARDSTICK: garch_log_density(*parts),
        "gjr_garch_t": garch_log_density(*parts, asymmetric=True),
    }
    coverage, no_better, follows = {}, {}, {}
    seen = table.values[test.start - 1 : test.stop]
    for name, settings in MODELS.items():
        runs = []
        for seed in range(config.seed, config.seed + seeds):
            chosen = config.world_model.model_copy(update=settings)
            model, _ = fit_market_model(table.values[window], table.fields, chosen, seed, purge=LOOKBACK)
            runs.append(return_log_density(model, seen))
            if seed == config.seed:
                scores = evaluate_market_model(model, seen, table.fields)
                coverage[name] = {"all": scores.coverage, **scores.coverage_by_group}
                no_better[name], follows[name] = [*scores.no_better], [*scores.follows_baseline]
        densities[name] = np.mean(runs, axis=0)
    report = FoldLikelihood(
        market=table.symbol,
        fold=number,
        development=number < DEVELOPMENT_FOLDS,
        first=f"{table.timestamps[test.start]:%Y-%m-%d}",
        train_bars=window.stop - window.start,
        test_bars=test.stop - test.start,
        totals={name: float(density.sum()) for name, density in densities.items()},
        coverage=coverage,
        no_better=no_better,
        follows_baseline=follows,
    )
    return report, densities


def _gains(results: list[tuple[FoldLikelihood, dict[str, Floats]]], name: str) -> dict[str, Interval]:
    parts = {
        "development": [one for one in results if one[0].development],
        "judged": [one for one in results if not one[0].development],
    }
    for market in {fold.market for fold, _ in results}:
        parts[market] = [one for one in parts["judged"] if one[0].market == market]
    return {part: _gain(chosen, name) for part, chosen in sorted(parts.items()) if chosen}


# Markets share their days: the mean over markets of one day is one observation. Test windows follow each other, so that
# all of them are one series.
def _gain(results: list[tuple[FoldLikelihood, dict[str, Floats]]], name: str) -> Interval:
    by_fold: dict[int, list[Floats]] = {}
    for fold, densities in results:
        by_fold.setdefault(fold.fold, []).append(densities[name] - densities[YARDSTICK])
    series = np.concatenate([np.mean(gains, axis=0) for _, gains in sorted(by_fold.items())])
    mean = float(series.mean())
    return t_interval(
        mean,
        (hac_variance(series - mean), np.inf),
        level=LEVEL,
        method=f"normal interval, HAC error over {len(series)} days",
    )
