"""The report in one to two pages of Markdown, for people who decide: the recommendation comes first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from evaluation.report.content import Cell, Column, Report, Table
from evaluation.report.display import VERDICT_MARKS, criterion_name, fact, headline, number, sentence, words
from evaluation.statistics.interval import Interval
from evaluation.verdict import Verdict

MAX_ROWS = 15
"""Rows of the main result; the rest are in its CSV file."""
MAX_POINTS = 8
"""Items of what was not shown; the rest are in the page."""


def render_summary(report: Report) -> str:
    """Recommendation, criteria, main result, what was not shown, how to reproduce, facts."""
    parts = [
        f"# {_text(report.title)}",
        _text(report.subtitle),
        f"**Recommendation: {report.verdict.decision}.** {_text(headline(report.verdict))}",
        f"**Next step.** {_text(report.verdict.next_step)}",
        "## Criteria",
        *_criteria(report.verdict),
        f"## {_text(report.results.name)}",
        *_results(report.results),
    ]
    if report.not_shown:
        left = len(report.not_shown) - MAX_POINTS
        more = [f"- {left} more in report.html."] if left > 0 else []
        parts += ["## What was not shown", "\n".join([*_points(report.not_shown[:MAX_POINTS]), *more])]
    if report.reproduce:
        # Indented, not fenced: no command can end the block.
        parts += ["## How to reproduce", "\n".join(f"    {_line(command)}" for command in report.reproduce)]
    if report.facts:
        parts.append("\n".join(_points(f"{name}: {fact(value)}" for name, value in report.facts.items())))
    parts.append("Figures and all tables: report.html. The same numbers: report.json and tables/.")
    return "\n\n".join(parts) + "\n"


def _criteria(verdict: Verdict) -> list[str]:
    rows = []
    for criterion in verdict.criteria:
        sign, meaning = VERDICT_MARKS[criterion.passed]
        rows.append(
            [criterion_name(criterion), words(criterion.observed), words(criterion.threshold), f"{sign} {meaning}"]
        )
    reasons = [f"{criterion_name(criterion)}: {sentence(criterion.reason)}" for criterion in verdict.criteria]
    return [_grid(["criterion", "observed", "threshold", "result"], "lrrl", rows), "\n".join(_points(reasons))]


def _results(table: Table) -> list[str]:
    header = [f"{column.label}, {column.unit}" if column.unit else column.label for column in table.columns]
    sides = "l" + "r" * (len(header) - 1)
    shown = table.rows[:MAX_ROWS]
    rows = [[_cell(cell, column) for cell, column in zip(row, table.columns, strict=True)] for row in shown]
    left = len(table.rows) - MAX_ROWS
    parts = [_grid(header, sides, rows)]
    if left > 0:
        parts.append(f"{left} more rows in tables/{table.slug}.csv.")
    if table.note:
        parts.append(_text(table.note))
    return parts


def _cell(cell: Cell, column: Column) -> str:
    if isinstance(cell, Interval):
        low, high = number(cell.low, column.format), number(cell.high, column.format)
        return f"{number(cell.estimate, column.format)} ({low} to {high})"
    return words(cell, column.format)


def _grid(header: Sequence[str], sides: str, rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "No rows."
    rule = [{"l": "---", "r": "--:"}[side] for side in sides]
    lines = [[_text(name) for name in header], rule, *([_text(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _points(items: Iterable[str]) -> list[str]:
    return [f"- {_text(item)}" for item in items]


def _line(text: str) -> str:
    return " ".join(text.split())


def _text(text: str) -> str:
    """One line in which HTML, links, emphasis, code and table borders are only characters."""
    line = _line(text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for character in "`*|":
        line = line.replace(character, "\\" + character)
    return line.replace("](", "]\\(")
