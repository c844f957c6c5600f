"""From findings to a report: the tables and pictures of a suite, or of a walk-forward over real bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.findings import Findings
from benchmarks.report_pictures import Market, equity, first_market, suite_market, world_model
from benchmarks.report_sections import checks, comparisons, not_shown, stress, the_claim, training_lengths
from benchmarks.report_tables import fold_by_fold, more_metrics, results_table, summary_columns, summary_rows
from configs import DetentConfig
from evaluation.report import Report, Section
from evaluation.report.policies import glossary


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
    market = suite_market(config)
    sections = (
        training_lengths(findings, config),
        equity(main, market),
        the_claim(main, config),
        comparisons(findings),
        more_metrics(main),
        first_market(config, findings, market),
        *world_model(findings),
        *checks(findings),
        *stress(findings, config),
    )
    return _report(findings, title, subtitle, sections, reproduce, facts, config)


def walk_forward_report(
    config: DetentConfig,
    findings: Findings,
    market: Market,
    folds: Sequence[Mapping[str, str]],
    *,
    title: str,
    reproduce: Sequence[str],
    facts: Mapping[str, Any],
) -> Report:
    """The report of a walk-forward.

    Args: market: `fold_market` of the folds; folds: first and last time of the windows of each.
    """
    main = findings.main
    seeds = config.evaluation.walk_forward.num_seeds
    subtitle = (
        f"{len(main.policies)} policies over {len(folds)} folds of {config.data.source.symbol}, "
        f"{main.policies['flat'].returns.shape[-1]:,} test bars in all, {seeds} training runs each."
    )
    sections = (
        fold_by_fold(main, folds),
        equity(main, market),
        the_claim(main, config),
        comparisons(findings),
        more_metrics(main),
        first_market(config, findings, market),
        *world_model(findings),
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
        summary_columns=summary_columns(findings.main),
        summary_rows=summary_rows(findings.main),
        glossary=glossary(findings.main.policies),
        sections=tuple(sections),
        not_shown=not_shown(findings),
        reproduce=tuple(reproduce),
        facts=facts,
    )
