"""From findings to a report: the tables and pictures of a suite, or of a walk-forward over real bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.findings import Findings
from benchmarks.report_pictures import equity, first_market, world_model
from benchmarks.report_sections import (
    checks,
    comparisons,
    fold_by_fold,
    more_metrics,
    not_shown,
    results_table,
    stress,
    the_claim,
    training_lengths,
)
from benchmarks.suite import judged_market
from configs import DetentConfig
from evaluation.report import Report, Section


def suite_report(
    config: DetentConfig, findings: Findings, *, title: str, reproduce: Sequence[str], facts: Mapping[str, Any]
) -> Report:
    """The report of a suite on synthetic markets."""
    suite = config.evaluation.suite
    main = findings.main
    subtitle = (
        f"{len(main.policies)} policies on {suite.test_paths} simulated markets of {suite.test_bars:,} bars, trained "
        f"on {', '.join(f'{bars:,}' for bars in sorted(findings.sizes))} bars, {suite.num_seeds} training runs each. "
        f"The verdict is that of {findings.primary:,} training bars."
    )
    sections = (
        training_lengths(findings, config),
        equity(main, judged_market(config).features.timestamps),
        the_claim(main, config),
        comparisons(findings),
        more_metrics(main),
        first_market(config, findings),
        *world_model(findings),
        *checks(findings),
        *stress(findings, config),
    )
    return _report(findings, title, subtitle, sections, reproduce, facts, config)


def walk_forward_report(
    config: DetentConfig,
    findings: Findings,
    timestamps: NDArray[np.datetime64],
    folds: Sequence[Mapping[str, str]],
    *,
    title: str,
    reproduce: Sequence[str],
    facts: Mapping[str, Any],
) -> Report:
    """The report of a walk-forward.

    Args: timestamps [n + 1] of the joined test windows; folds: first and last time of the windows of each fold.
    """
    main = findings.main
    seeds = config.evaluation.walk_forward.num_seeds
    subtitle = (
        f"{len(main.policies)} policies over {len(folds)} folds of {config.data.source.symbol}, "
        f"{main.policies['flat'].returns.shape[-1]:,} test bars in all, {seeds} training runs each."
    )
    sections = (
        fold_by_fold(main, folds),
        equity(main, timestamps),
        the_claim(main, config),
        comparisons(findings),
        more_metrics(main),
    )
    return _report(findings, title, subtitle, sections, reproduce, facts, config)


def _report(
    findings: Findings,
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    reproduce: Sequence[str],
    facts: Mapping[str, Any],
    config: DetentConfig,
) -> Report:
    return Report(
        title=title,
        subtitle=subtitle,
        verdict=findings.main.claim.verdict,
        results=results_table("Results", findings.main, config),
        sections=tuple(sections),
        not_shown=not_shown(findings),
        reproduce=tuple(reproduce),
        facts=facts,
    )
