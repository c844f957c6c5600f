"""The report as one HTML page that needs nothing else: no script, no font, no request."""

from __future__ import annotations

import base64
import math
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape

from evaluation.report.content import Cell, Column, Figure, Report, Table, slug
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
    stored,
    words,
)
from evaluation.statistics.interval import Interval
from evaluation.verdict import Decision

DECISION_MARKS = {Decision.GO: "✓", Decision.CONDITIONAL: "◐", Decision.NO_GO: "✗"}
LONG, SHORT = 40, 26
"""Characters of a text that wants room to wrap, and of one that need not wrap at all."""
PHONE = 42
"""Characters across a phone; what is wider than that scrolls."""


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
        asked=asked,
        criterion_name=criterion_name,
        fact=fact,
        observed=observed,
        sentence=sentence,
        settled_by=settled_by,
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
    rows = [[_shown(*parts) for parts in zip(row, table.columns, scales, strict=True)] for row in table.rows]
    kinds = [_kind(table, index) for index in range(len(table.columns))]
    return {
        "id": "table-" + table.slug,
        "name": table.name,
        "note": table.note,
        "columns": list(zip(table.columns, kinds, strict=True)),
        "rows": rows,
        "is_wide": sum(_width(table, rows, index) for index in range(len(table.columns))) > PHONE,
    }


def _kind(table: Table, index: int) -> str:
    """Class of a column: "number", also where every number of it is missing, "prose", "short" or none."""
    cells = [row[index] for row in table.rows]
    texts = [cell for cell in cells if isinstance(cell, str)]
    if not texts and (index > 0 or any(cell is not None for cell in cells)):
        return "number"
    longest = max(map(len, texts), default=0)
    # The first column is the row's name: it may wrap, since it stays in sight while the others scroll.
    return "prose" if longest > LONG else "short" if 0 < longest <= SHORT and index > 0 else ""


def _width(table: Table, rows: list[list[_Shown]], index: int) -> int:
    """Characters across a column, its padding included; about, for only a browser knows."""
    words_of_label = max(map(len, re.split(r"[ _]", table.columns[index].label)), default=0)
    return (
        3
        + max([words_of_label, *(min(len(row[index].text), LONG) for row in rows)])
        + 10 * any(row[index].ends for row in rows)
    )


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


def _prose(text: str) -> Markup:
    # Escaped first: nothing of the text itself becomes a tag.
    parts = CODE.split(str(escape(prose(text))))
    shown = (f"<code>{part[1:-1]}</code>" if index % 2 else part for index, part in enumerate(parts))
    return Markup("".join(shown))  # noqa: S704


def _breakable(text: str) -> Markup:
    """A name that may end its line after an underscore, and nowhere else."""
    return Markup(escape(prose(text)).replace("_", Markup("_<wbr>")))  # noqa: S704


def _resource(name: str) -> str:
    return files("evaluation.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = _prose
    environment.filters["breakable"] = _breakable
    return environment.from_string(_resource("report.html.j2"))
