"""What a report says, apart from how it looks. Tables are the only place of a number: every file is written from them.

Text is plain text: markup in it is shown, not obeyed.
"""

from __future__ import annotations

import math
import re
import struct
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evaluation.statistics.interval import Interval
from evaluation.verdict import Verdict

Scalar = str | int | float | bool | None
"""A plain value; None is a value that is missing."""
Cell = Scalar | Interval
Fact = Scalar | Sequence[Scalar] | Mapping[str, Scalar]

PNG_HEADER = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Raises: ValueError on a format that does not fit a float.
    """

    label: str
    unit: str = ""
    """Of the stored value: a share shown as 12 % by the format ".0%" is stored as 0.12."""
    format: str = ""
    """Python format of a float, for example "+.2f" or ".1%"; three digits without. Stored values are never rounded."""
    interval: bool = False
    """The cells are `Interval`s, stored as estimate, low and high."""

    def __post_init__(self) -> None:
        try:
            format(1.0, self.format)
        except ValueError as error:
            raise ValueError(f"column {self.label!r}: format {self.format!r} does not fit a float: {error}") from error

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the stored values: one, or three of an interval."""
        unit = f" ({self.unit})" if self.unit else ""
        parts = (" low", " high") if self.interval else ()
        return (self.label + unit, *(self.label + part + unit for part in parts))


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first column names the row.

    NaN becomes None, NumPy scalars become Python's. Raises: ValueError on a length, a type, or a field named twice.
    """

    name: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    """What the reader must know to read it: samples, levels, what is missing."""

    def __post_init__(self) -> None:
        where = f"table {self.name!r}"
        if not self.columns:
            raise ValueError(f"{where}: expected at least one column, was none")
        _refuse_repeats(f"{where}, columns", self.fields)
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"{where}, row {index}: expected {len(self.columns)} cells, was {len(row)}")
        rows = tuple(
            tuple(_checked(cell, column, where) for cell, column in zip(row, self.columns, strict=True))
            for row in self.rows
        )
        object.__setattr__(self, "rows", rows)

    @property
    def slug(self) -> str:
        """The name as a file name and an anchor."""
        return slug(self.name)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the stored values of a row."""
        return tuple(name for column in self.columns for name in column.fields)

    @property
    def records(self) -> list[tuple[Scalar, ...]]:
        """Rows of stored values, in the order of `fields`; a missing interval is three times None."""
        return [
            tuple(value for cell, column in zip(row, self.columns, strict=True) for value in _flat(cell, column))
            for row in self.rows
        ]


@dataclass(frozen=True)
class Figure:
    """A picture; `alt` says in words what there is to see, for those who cannot.

    Raises: ValueError on bytes that are no PNG, or no alt text.
    """

    name: str
    png: bytes = field(repr=False)
    alt: str
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.png.startswith(PNG_HEADER) or len(self.png) < 24:
            raise ValueError(f"figure {self.name!r}: expected PNG bytes, was {self.png[:8]!r}")
        if not self.alt.strip():
            raise ValueError(f"figure {self.name!r}: expected an alt text that says what is seen, was empty")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the PNG header."""
        width, height = struct.unpack(">II", self.png[16:24])
        return width, height


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, then tables, then figures."""

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """A verdict with its reasons, and the evidence.

    Raises: ValueError on tables, figures or sections whose names give the same file name or anchor, and on columns or
        rows of the summary that the main result has not.
    """

    title: str
    subtitle: str
    """What was compared on what: policies, markets, sizes."""
    verdict: Verdict
    results: Table
    """The main result, shown right after the criteria and in the summary."""
    caveats: tuple[str, ...] = ()
    """What the reader must know before the verdict, for example that the numbers mean nothing."""
    summary_columns: tuple[str, ...] = ()
    """Labels of the columns of the main result that the summary shows; all where empty."""
    summary_rows: tuple[str, ...] = ()
    """Names of the rows of the main result that the summary shows; all where empty."""
    glossary: Mapping[str, str] = field(default_factory=dict)
    """What the names in the main result mean."""
    sections: tuple[Section, ...] = ()
    not_shown: tuple[str, ...] = ()
    """What the evidence does not say."""
    reproduce: tuple[str, ...] = ()
    """Shell commands that give the same numbers."""
    facts: Mapping[str, Fact] = field(default_factory=dict)
    """Machine, seeds, versions, hashes, commit, time of creation."""

    def __post_init__(self) -> None:
        _refuse_repeats("tables", [table.slug for table in self.tables])
        _refuse_repeats("figures", [slug(figure.name) for part in self.sections for figure in part.figures])
        _refuse_repeats("sections", [slug(part.title) for part in self.sections])
        labels = [column.label for column in self.results.columns]
        _refuse_unknown("summary_columns", self.summary_columns, labels)
        _refuse_unknown("summary_rows", self.summary_rows, [str(row[0]) for row in self.results.rows])

    @property
    def summary_places(self) -> list[int]:
        """Places, in a row of the main result, of what the summary shows."""
        labels = [column.label for column in self.results.columns]
        return [at for at, label in enumerate(labels) if not self.summary_columns or label in self.summary_columns]

    @property
    def tables(self) -> tuple[Table, ...]:
        """The results, then every table of the sections."""
        return (self.results, *(table for section in self.sections for table in section.tables))


def slug(name: str) -> str:
    """Lower-case ASCII letters, digits and hyphens. Raises: ValueError if nothing of `name` is left."""
    ascii_only = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    text = re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")
    if not text:
        raise ValueError(f"name: expected at least one ASCII letter or digit, was {name!r}")
    return text


def _checked(cell: Any, column: Column, where: str) -> Any:
    if isinstance(cell, np.generic) and not isinstance(cell, np.datetime64 | np.timedelta64):
        cell = cell.item()
    if isinstance(cell, float) and math.isnan(cell):
        cell = None
    expected: tuple[type, ...] = (Interval,) if column.interval else (str, int, float, bool)
    if cell is not None and not isinstance(cell, expected):
        wanted = "an Interval" if column.interval else "a number, text or bool"
        raise ValueError(f"{where}, column {column.label!r}: expected {wanted} or None, was {cell!r}")
    return cell


def _flat(cell: Cell, column: Column) -> tuple[Scalar, ...]:
    if isinstance(cell, Interval):
        parts = (cell.estimate, cell.low, cell.high)
        return tuple(None if math.isnan(part) else float(part) for part in parts)
    return (cell,) * len(column.fields)


def _refuse_repeats(what: str, names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{what}: expected distinct names, found {', '.join(repeated)} more than once")


def _refuse_unknown(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{what}: expected names of {list(known)}, was {', '.join(unknown)}")
