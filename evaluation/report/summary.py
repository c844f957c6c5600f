"""The report in one to two pages of Markdown, for people who decide: the recommendation comes first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from evaluation.report.content import Cell, Column, Report
from evaluation.report.display import (
    CODE,
    VERDICT_MARKS,
    asked,
    criterion_name,
    fact,
    headline,
    number,
    observed,
    prose,
    sentence,
    settled_by,
    words,
)
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
        *(f"**{_text(caveat)}**" for caveat in report.caveats),
        f"**Recommendation: {report.verdict.decision}.** {_text(headline(report.verdict))}",
        f"**Next step.** {_text(report.verdict.next_step)}",
        "## Criteria",
        *_criteria(report.verdict),
        f"## {_text(report.results.name)}",
        *_results(report),
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
    rows, reasons = [], []
    for criterion in verdict.criteria:
        sign, meaning = VERDICT_MARKS[criterion.passed]
        name = criterion_name(criterion)
        rows.append([name, " ".join(observed(criterion)), " ".join(asked(criterion)), f"{sign} {meaning}"])
        settled = settled_by(criterion)
        reasons.append(f"{name}: {sentence(criterion.reason)}{f' To settle it: {settled}' if settled else ''}")
    return [_grid(["criterion", "observed", "threshold", "result"], "llll", rows), "\n".join(_points(reasons))]


def _results(report: Report) -> list[str]:
    table = report.results
    at = report.summary_places
    columns = [table.columns[index] for index in at]
    header = [f"{column.label}, {column.unit}" if column.unit else column.label for column in columns]
    kept = [row for row in table.rows if row[0] in report.summary_rows or not report.summary_rows][:MAX_ROWS]
    rows = [[_cell(row[index], table.columns[index]) for index in at] for row in kept]
    # Right where there are numbers, or nothing at all.
    sides = ["r" if index and not any(isinstance(row[index], str) for row in kept) else "l" for index in at]
    parts = [_grid(header, sides, rows)]
    left = {"row": len(table.rows) - len(kept), "column": len(table.columns) - len(at)}
    more = [f"{count} more {what}{'s' * (count > 1)}" for what, count in left.items() if count]
    if more:
        parts.append(f"{' and '.join(more)} in tables/{table.slug}.csv.")
    if table.note:
        parts.append(_text(table.note))
    shown = {name: said for name, said in report.glossary.items() if name in [row[0] for row in kept]}
    if shown:
        parts.append(_text("; ".join(f"{name}: {said}" for name, said in shown.items()) + "."))
    return parts


def _cell(cell: Cell, column: Column) -> str:
    if isinstance(cell, Interval):
        low, high = number(cell.low, column.format), number(cell.high, column.format)
        return f"{number(cell.estimate, column.format)} ({low} to {high})"
    return words(cell, column.format)


def _grid(header: Sequence[str], sides: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
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
    """One line in which HTML, links, emphasis and table borders are only characters; code spans stay what they are."""
    line = prose(_line(text))
    # Every second part is a code span, whose characters mean nothing to Markdown.
    return "".join(part if index % 2 else _escaped(part) for index, part in enumerate(CODE.split(line)))


def _escaped(text: str) -> str:
    line = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for character in "`*|":
        line = line.replace(character, "\\" + character)
    return line.replace("](", "]\\(")
