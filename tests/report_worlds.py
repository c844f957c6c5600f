"""Small reports for the tests: one verdict of three kinds of answer, a table, a figure."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure as Canvas

from evaluation.plots import png_bytes
from evaluation.report import Column, Figure, Report, Section, Table
from evaluation.statistics.interval import Interval
from evaluation.verdict import Criterion, Decision, Verdict

UGLY = 0.1 + 0.2
"""Has 17 digits, of which people are shown three."""


def interval(estimate: float, low: float, high: float) -> Interval:
    return Interval(estimate, low, high, level=0.95, method="by hand")


def verdict(
    decision: Decision = Decision.CONDITIONAL, headline: str = "b replaces a; Sharpe higher by 0.12."
) -> Verdict:
    return Verdict(
        decision,
        (
            Criterion(name="sharpe_point", passed=True, observed=UGLY, threshold=0.1, reason="gain 0.30 of 0.10"),
            Criterion(
                name="sharpe_full_margin",
                passed=False,
                observed=0.03,
                threshold=0.02,
                reason="not established, short by -3 %",
            ),
            Criterion(
                name="latency",
                passed=None,
                observed=math.nan,
                threshold=50.0,
                reason="decision time was not measured",
                settled_by="measure the decision time",
            ),
        ),
        f"{decision}: {headline}",
        "Keep a for now. Measure the decision time.",
    )


def results(name: str = "Results", policy: str = "b + planner") -> Table:
    """One cell of each kind, missing ones too."""
    return Table(
        name,
        (
            Column("policy"),
            Column("Sharpe", "annualised", "+.2f", interval=True),
            Column("drawdown", "share", ".1%"),
            Column("seeds"),
            Column("safe"),
        ),
        (
            (policy, interval(UGLY, -0.05, 1.25), 0.0712345, 5, True),
            ("a", interval(-0.001, -0.2, math.nan), math.nan, 1234567, False),
            ("flat", None, None, math.inf, True),
        ),
        note="100 paths.",
    )


def png(width: float = 4.0) -> bytes:
    canvas = Canvas(figsize=(width, 3))
    canvas.subplots().plot([1, 2, 3])
    return png_bytes(canvas, dpi=100)


def report(**changes: Any) -> Report:
    fields: dict[str, Any] = {
        "title": "A against B",
        "subtitle": "two policies on a known market",
        "verdict": verdict(),
        "results": results(),
        "sections": (
            Section(
                "Per fold",
                ("Each fold is half a year.",),
                (Table("Folds", (Column("fold"), Column("difference", "annualised", "+.2f")), ((1, 0.25), (2, -0.5))),),
                (Figure("Equity", png(), "Two lines that rise.", "Both after costs."),),
            ),
        ),
        "not_shown": ("Nothing about real markets.",),
        "reproduce": ("detent evaluate --suite",),
        "facts": {"seeds": (20260001, 20260002), "versions": {"numpy": "2.0"}, "commit": "1a2b3c"},
    }
    return Report(**fields | changes)
