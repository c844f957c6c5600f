"""What a suite or a walk-forward showed: policies by training length, the claim, multiple testing, checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.comparison import SEED, Arrays, Comparison, Walked, arrays_of, best_on_validation, compare, gather
from benchmarks.contenders import learner_of
from benchmarks.folds import FoldResult
from benchmarks.suite import Cell
from configs import DetentConfig
from evaluation.statistics import DeflatedSharpe, NotDecidable, SuperiorPolicies, deflated_sharpe, superior_policies


@dataclass(frozen=True, eq=False, kw_only=True)
class SizeFindings:
    """One training length; of a walk-forward the only one."""

    train_bars: int
    """0 for a walk-forward."""
    policies: dict[str, Walked]
    claim: Comparison
    """The challenger against the model-free policy that was best on validation."""
    others: tuple[Comparison, ...]
    """The challenger against every other policy but the oracle, which is told what the market hides, and the other
    model-based policies against the same rival."""
    superior: SuperiorPolicies | None
    """Which policies beat buy and hold, all tested at once; None where the data are too few."""
    deflated: DeflatedSharpe | None
    """Of the challenger, every trial counted; None where it never trades, or one run cannot say how trials scatter."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Check:
    """A learner with tomorrow's return among its features, or with labels that mean nothing."""

    variant: str
    policy: str
    sharpe: float
    yardstick: str
    threshold: float
    passed: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class Findings:
    """Everything a report is written from."""

    sizes: dict[int, SizeFindings]
    primary: int
    """The training length whose verdict is given."""
    checks: tuple[Check, ...] = ()
    stress: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    """Policy -> metric -> [S, P] on GARCH-t paths, of the longest training length."""
    first_path: dict[str, Arrays] = field(default_factory=dict)
    """Policy -> what it did on the first test path, first run, primary length."""

    @property
    def main(self) -> SizeFindings:
        """The primary training length."""
        return self.sizes[self.primary]


LEAK_FACTOR = 1.5
"""With tomorrow's return a learner must reach this multiple of the oracle, which knows the market, not the future.
Knowing one bar perfectly is worth less than it seems: a position must be kept for three."""

SHUFFLED_MARGIN = 0.15
"""A learner on signals of another time may exceed itself without signals by so much, training noise included."""


def suite_findings(config: DetentConfig, results: Sequence[FoldResult], cells: Sequence[Cell]) -> Findings:
    """Join the cells of a suite."""
    plain: dict[tuple[str, int], list[tuple[Arrays, Mapping[str, Any]]]] = {}
    altered: dict[tuple[str, str], NDArray[np.float64]] = {}
    stress: dict[str, list[dict[str, NDArray[np.float64]]]] = {}
    for result, cell in zip(results, cells, strict=True):
        for name, facts in result.values["facts"].items():
            arrays = arrays_of(result, name)
            if cell.variant != "plain":
                altered[cell.variant, name] = arrays["sharpe"]
                continue
            plain.setdefault((name, cell.train_bars), []).append((arrays, facts))
            if "stress_sharpe" in arrays:
                entry = {key.removeprefix("stress_"): arrays[key] for key in arrays if key.startswith("stress_")}
                stress.setdefault(name, []).append(entry)
    walked = {key: gather(key[0], runs) for key, runs in plain.items()}
    primary = config.evaluation.suite.primary_train_bars
    sizes = {
        bars: size_findings(
            config,
            {name: one for (name, size), one in walked.items() if size in (0, bars)},
            bars,
            config.evaluation.market.bars_per_year,
        )
        for bars in sorted(config.evaluation.suite.train_bars)
    }
    oracle = float(walked["oracle", 0].metrics["sharpe"].mean())
    return Findings(
        sizes=sizes,
        primary=primary,
        checks=tuple(_checks(altered, oracle)),
        stress={name: {key: np.stack([run[key] for run in runs]) for key in runs[0]} for name, runs in stress.items()},
        first_path={name: runs[0][0] for (name, size), runs in plain.items() if size in (0, primary)},
    )


def size_findings(
    config: DetentConfig, policies: dict[str, Walked], train_bars: int, bars_per_year: int
) -> SizeFindings:
    """Hold the claim and every other comparison against the policies of one training length."""
    rules = config.evaluation.verdict
    rival = best_on_validation(one for one in policies.values() if one.family == "model_free")
    challenger = policies[rules.challenger]
    pairs = [
        *((challenger, one) for one in policies.values() if one.name not in (challenger.name, rival.name, "oracle")),
        *((one, rival) for one in policies.values() if one.family == "model_based" and one is not challenger),
    ]
    return SizeFindings(
        train_bars=train_bars,
        policies=policies,
        claim=compare(challenger, rival, rules, bars_per_year),
        others=tuple(compare(a, b, rules, bars_per_year) for a, b in pairs),
        superior=_superior(policies, rules.confidence, rules.resamples),
        deflated=_deflated(config, challenger, bars_per_year),
    )


def book(walked: Walked) -> NDArray[np.float64]:
    """Returns [n] of a book that spreads its money evenly over all runs and paths, every bar anew."""
    returns: NDArray[np.float64] = walked.returns.astype(np.float64).mean(axis=(0, 1))
    return returns


def _superior(policies: Mapping[str, Walked], level: float, resamples: int) -> SuperiorPolicies | None:
    base = policies["buy_and_hold"]
    rivals = {
        name: book(one)
        for name, one in policies.items()
        if name not in ("buy_and_hold", "flat", "oracle", "belief_filter") and one.paths == base.paths
    }
    try:
        return superior_policies(book(base), rivals, level=level, resamples=resamples, seed=SEED)
    except NotDecidable:
        return None


def _deflated(config: DetentConfig, challenger: Walked, bars_per_year: int) -> DeflatedSharpe | None:
    # One training run on one path is what somebody would look at; the trials are all that were tried on validation.
    ratios = challenger.metrics["sharpe"]
    middle = np.unravel_index(np.argsort(ratios, axis=None)[ratios.size // 2], ratios.shape)
    trials = config.evaluation.suite.trials.get(learner_of(challenger.name), 1)
    if trials > 1 and len(ratios) == 1:
        return None
    spread = float(ratios.mean(axis=1).std(ddof=1)) if len(ratios) > 1 else 0.0
    returns = challenger.returns[middle if challenger.paths > 1 else (middle[0], 0)].astype(np.float64)
    try:
        return deflated_sharpe(returns, trials, spread, bars_per_year)
    except ValueError:  # a policy that stays flat has no ratio to deflate
        return None


def _checks(altered: Mapping[tuple[str, str], NDArray[np.float64]], oracle: float) -> list[Check]:
    checks = []
    for (variant, name), ratios in sorted(altered.items()):
        if variant == "leak":
            threshold, said = LEAK_FACTOR * oracle, f"{LEAK_FACTOR:g} x oracle"
            passed = ratios.mean() >= threshold
        elif variant == "shuffled" and ("no_signal", name) in altered:
            # Both walked the same paths; two trained networks differ by more than the paths alone would say.
            without = float(altered["no_signal", name].mean())
            threshold, said = without + SHUFFLED_MARGIN, f"without signal + {SHUFFLED_MARGIN:g}"
            passed = ratios.mean() <= threshold
        else:
            continue
        checks.append(
            Check(
                variant=variant,
                policy=name,
                sharpe=float(ratios.mean()),
                yardstick=said,
                threshold=threshold,
                passed=bool(passed),
            )
        )
    return checks
