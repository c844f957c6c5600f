"""What a suite or a walk-forward showed: policies by training length, the claim, multiple testing, checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.comparison import SEED, Arrays, Comparison, Walked, arrays_of, best_on_validation, compare, gather
from benchmarks.contenders import learner_of
from benchmarks.folds import FoldResult
from benchmarks.suite import Cell
from configs import DetentConfig
from evaluation.statistics import (
    DeflatedSharpe,
    NotDecidable,
    SuperiorPolicies,
    deflated_sharpe,
    sharpe_by_path,
    superior_policies,
)


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
    """Of the challenger, counting the settings tried for it; None where nobody counted them, where the middling run and
    path never trades, or where one run cannot say how trials scatter."""

    @property
    def unit(self) -> str:
        """What metrics are counted on: "path", or the "fold" of a walk-forward."""
        return "path" if self.train_bars else "fold"


@dataclass(frozen=True, eq=False, kw_only=True)
class Check:
    """A learner with tomorrow's return among its features, or with labels that mean nothing."""

    variant: str
    policy: str
    sharpe: float
    yardstick: str
    threshold: float
    passed: bool

    @property
    def failure(self) -> str:
        """What went wrong, in words; of a check that failed."""
        side = "below" if self.variant == "leak" else "above"
        return f"{self.policy} with {LABELS[self.variant]} has Sharpe {self.sharpe:.2f}, {side} {self.threshold:.2f}"


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
    """Policy -> what it did on the first test path, first run, primary length; of a walk-forward `first_runs`."""

    @property
    def main(self) -> SizeFindings:
        """The primary training length."""
        return self.sizes[self.primary]


LABELS = {"leak": "tomorrow's return as a feature", "shuffled": "signals of another time"}
"""Variants of the market that check the instrument, in words."""

LEAK_FACTOR = 1.5
"""With tomorrow's return a learner must reach this multiple of the oracle, which knows the market, not the future.
Knowing one bar perfectly is worth less than it seems: a position must be kept for three."""

SHUFFLED_MARGIN = 0.15
"""With signals of another time a learner may exceed by so much, training noise included, what the best of those checked
makes of no signal at all."""


def suite_findings(config: DetentConfig, results: Sequence[FoldResult], cells: Sequence[Cell]) -> Findings:
    """Join the cells of a suite."""
    plain: dict[tuple[str, int], list[tuple[Arrays, Mapping[str, Any]]]] = {}
    altered: dict[tuple[str, str], NDArray[np.float64]] = {}
    stress: dict[str, list[dict[str, NDArray[np.float64]]]] = {}
    for result, cell in zip(results, cells, strict=True):
        for name, facts in result.values["facts"].items():
            arrays = arrays_of(result, name)
            if cell.variant != "plain":
                # Planners come with a learner, but do not learn: tomorrow beyond their horizon is nothing to them.
                if name == cell.learner:
                    altered[cell.variant, name] = arrays["sharpe"]
                continue
            plain.setdefault((name, cell.train_bars), []).append((arrays, facts))
            if "stress_sharpe" in arrays:
                entry = {key.removeprefix("stress_"): arrays[key] for key in arrays if key.startswith("stress_")}
                stress.setdefault(name, []).append(entry)
    walked = {key: gather(key[0], runs) for key, runs in plain.items()}
    primary = config.evaluation.suite.primary_train_bars
    checks = tuple(_checks(altered, walked["oracle", 0].metrics["sharpe"].mean(axis=0)))
    failed = tuple(check.failure for check in checks if not check.passed) if checks else None
    sizes = {
        bars: size_findings(
            config,
            {name: one for (name, size), one in walked.items() if size in (0, bars)},
            bars,
            config.evaluation.market.bars_per_year,
            failed,
        )
        for bars in sorted(config.evaluation.suite.train_bars)
    }
    return Findings(
        sizes=sizes,
        primary=primary,
        checks=checks,
        stress={name: {key: np.stack([run[key] for run in runs]) for key in runs[0]} for name, runs in stress.items()},
        first_path={name: runs[0][0] for (name, size), runs in plain.items() if size in (0, primary)},
    )


def size_findings(
    config: DetentConfig,
    policies: dict[str, Walked],
    train_bars: int,
    bars_per_year: int,
    failed_checks: tuple[str, ...] | None = (),
) -> SizeFindings:
    """Hold the claim and every other comparison against the policies of one training length.

    Args: train_bars: 0 for a walk-forward, whose policies are counted by fold; failed_checks as `decide` takes them.
    """
    rules = config.evaluation.verdict
    rival = best_on_validation(one for one in policies.values() if one.family == "model_free")
    challenger = policies[rules.challenger]
    pairs = [
        *((challenger, one) for one in policies.values() if one.name not in (challenger.name, rival.name, "oracle")),
        *((one, rival) for one in policies.values() if one.family == "model_based" and one is not challenger),
    ]
    held = partial(
        compare,
        config=rules,
        bars_per_year=bars_per_year,
        failed_checks=failed_checks,
        unit="path" if train_bars else "fold",
    )
    return SizeFindings(
        train_bars=train_bars,
        policies=policies,
        claim=held(challenger, rival),
        others=tuple(held(a, b) for a, b in pairs),
        superior=_superior(policies, rules.confidence, rules.resamples),
        deflated=_deflated(config, challenger, bars_per_year),
    )


def _superior(policies: Mapping[str, Walked], level: float, resamples: int) -> SuperiorPolicies | None:
    base = policies["buy_and_hold"]
    rivals = {
        name: one.returns
        for name, one in policies.items()
        if name not in ("buy_and_hold", "flat", "oracle", "belief_filter") and one.paths == base.paths
    }
    try:
        return superior_policies(base.returns, rivals, level=level, resamples=resamples, seed=SEED)
    except NotDecidable:
        return None


def _deflated(config: DetentConfig, challenger: Walked, bars_per_year: int) -> DeflatedSharpe | None:
    # One training run on one path is what somebody would look at. The scores of the settings that were tried are not
    # kept, so the spread of the training runs stands for theirs.
    trials = config.evaluation.suite.trials.get(learner_of(challenger.name))
    ratios = sharpe_by_path(challenger.returns, bars_per_year)
    if trials is None or (trials > 1 and len(ratios) == 1):
        return None
    middle = np.unravel_index(np.argsort(ratios, axis=None)[ratios.size // 2], ratios.shape)
    # Between runs on one and the same path, as the ratio that is deflated is one of a single path.
    spread = float(np.sqrt(ratios.var(axis=0, ddof=1).mean())) if len(ratios) > 1 else 0.0
    picked = challenger.returns[middle].astype(np.float64)
    if not picked.any():  # an account that stays flat has no ratio to deflate
        return None
    try:
        return deflated_sharpe(picked, trials, spread, bars_per_year)
    except NotDecidable:
        return None


def _checks(altered: Mapping[tuple[str, str], NDArray[np.float64]], oracle: NDArray[np.float64]) -> list[Check]:
    # Ratios [P] of each learner and of the oracle, on the same paths.
    unheard = [float(ratios.mean()) for (variant, _), ratios in altered.items() if variant == "no_signal"]
    checks = []
    for (variant, name), ratios in sorted(altered.items()):
        if variant == "leak":
            threshold, said = LEAK_FACTOR * float(oracle[: len(ratios)].mean()), f"{LEAK_FACTOR:g} x oracle"
            passed = ratios.mean() >= threshold > 0.0
        elif variant == "shuffled" and unheard:
            # A learner that failed without signals would be a yardstick that any luck exceeds.
            threshold, said = max(unheard) + SHUFFLED_MARGIN, f"best without signal + {SHUFFLED_MARGIN:g}"
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
