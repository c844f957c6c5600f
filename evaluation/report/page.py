"""The report as one HTML page that needs nothing else: no script, no font, no request."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from evaluation.report.content import Cell, Column, Figure, Report, Table, slug
from evaluation.report.display import (
    VERDICT_MARKS,
    criterion_name,
    fact,
    headline,
    number,
    prose,
    sentence,
    settled_by,
    stored,
    words,
)
from evaluation.statistics.interval import Interval
from evaluation.verdict import Decision

DECISION_MARKS = {Decision.GO: "✓", Decision.CONDITIONAL: "◐", Decision.NO_GO: "✗"}


def render_page(report: Report) -> str:
    """The whole page; the same report gives the same text."""
    return _template().render(
        report=report,
        verdict=report.verdict,
        headline=headline(report.verdict),
        mark=DECISION_MARKS[report.verdict.decision],
        tone=slug(report.verdict.decision),
        results=_table(report.results),
        sections=[
            {
                "id": "part-" + slug(section.title),
                "title": section.title,
                "text": section.text,
                "tables": [_table(table) for table in section.tables],
                "figures": [_figure(figure) for figure in section.figures],
            }
            for section in report.sections
        ],
        style=Markup(_resource("report.css")),  # noqa: S704  our own file
        marks=VERDICT_MARKS,
        criterion_name=criterion_name,
        fact=fact,
        sentence=sentence,
        settled_by=settled_by,
        words=words,
    )


@dataclass(frozen=True)
class _Shown:
    """One cell: its text, and for the machine its stored value; an interval adds its ends and their place."""

    text: str
    value: str | None = None
    ends: tuple[tuple[str, str], ...] = ()
    marks: tuple[float, float, float, float] | None = None
    """Of low, estimate, high and zero on the column's common scale, 0 to 100; zero outside it is not drawn."""


def _table(table: Table) -> dict[str, object]:
    scales = [_scale(table, index) for index in range(len(table.columns))]
    numeric = [
        column.interval or any(isinstance(row[index], int | float) for row in table.rows)
        for index, column in enumerate(table.columns)
    ]
    return {
        "id": "table-" + table.slug,
        "name": table.name,
        "note": table.note,
        "columns": list(zip(table.columns, numeric, strict=True)),
        "rows": [[_shown(*parts) for parts in zip(row, table.columns, scales, strict=True)] for row in table.rows],
    }


def _shown(cell: Cell, column: Column, scale: tuple[float, float] | None) -> _Shown:
    if isinstance(cell, Interval):
        low, estimate, high = cell.low, cell.estimate, cell.high
        marks = None
        if scale is not None and math.isfinite(low + estimate + high):
            start, width = scale
            at_low, middle, at_high, zero = (round(100 * (p - start) / width, 1) for p in (low, estimate, high, 0.0))
            marks = (at_low, middle, at_high, zero)
        return _Shown(
            number(estimate, column.format),
            _value(estimate),
            tuple((_value(end) or "", number(end, column.format)) for end in (low, high)),
            marks,
        )
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return _Shown(number(cell, column.format), _value(cell))
    return _Shown(words(cell))


def _scale(table: Table, index: int) -> tuple[float, float] | None:
    """Start and width of the axis that the intervals of one column share; None where nothing can be drawn."""
    cells = [row[index] for row in table.rows]
    ends = [end for cell in cells if isinstance(cell, Interval) for end in (cell.low, cell.high)]
    ends = [end for end in ends if math.isfinite(end)]
    width = max(ends) - min(ends) if ends else 0.0
    return (min(ends), width) if width > 0 else None


def _value(value: float) -> str | None:
    kept = stored(value)
    return None if kept is None else kept if isinstance(kept, str) else repr(kept)


def _figure(figure: Figure) -> dict[str, object]:
    width, height = figure.size
    return {
        "id": "figure-" + slug(figure.name),
        "name": figure.name,
        "alt": figure.alt,
        "caption": figure.caption,
        "width": width,
        "height": height,
        "source": "data:image/png;base64," + base64.b64encode(figure.png).decode(),
    }


def _resource(name: str) -> str:
    return files("evaluation.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = prose
    return environment.from_string(_resource("report.html.j2"))
