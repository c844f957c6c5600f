"""Hypothetical P&L of pairs of decisions: each gets the returns of the two bars after it, from later state rows.

A decision made at a close is executed at the next open and stays in force until the open after that. It earns
`intraday_return` of the next bar and `gap_return` of the one after on the position after the decision, less costs for
what it trades at the open: from the position that was really held, which has drifted with the gap before it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from serving.records import DecisionRecord

RETURN_TOLERANCE = 1e-5
"""How far the returns of two bars may be from `return_2`, log return, for the bars to be neighbours."""

NO_COLUMNS = "the bundle that decided is not given: its columns have no names"
NO_RETURNS = "the columns hold no position, gap_return and intraday_return"
NOT_FINITE = "a return or the position is not finite"
BAR_MISSING = "a bar is missing between decisions"
REPLACED = "another decision on the same bar took its place"
NO_ROW = "a decision after it has no state row"
NOT_YET = "the two bars after it are not in the ledger"


class Book(Protocol):
    """Where values go."""

    left_out: Counter[str]
    """Why a pair has no value -> pairs."""

    def value(self, live: float, shadow: float) -> None:
        """Take in the P&L of one bar, fractions of equity."""
        ...


class _Bar(NamedTuple):
    """What the state row of a close says of the bar that ended there."""

    time: float
    gap: float
    intraday: float
    two: float
    """Log return of this bar and the one before; NaN where the bundle has no such column."""
    position: float
    """Held at the close, multiples of equity."""
    problem: str
    """Why the numbers cannot be used; empty where they can."""


@dataclass
class _Held:
    """A pair whose positions wait for their returns."""

    book: Book
    position: float
    targets: tuple[float | None, float | None]
    """Of live and shadow; None keeps the position."""
    next_bar: _Bar
    """The bar at whose open it was executed; until that is known, the one that was decided on."""


class Valuation:
    """Takes in decisions in the order of the ledger; what waits for its returns is at most one pair a bar and book."""

    def __init__(self, columns: Mapping[str, Sequence[str]], cost_rate: float, bar_seconds: float) -> None:
        """Args: columns: hash of a bundle -> names of its state columns; else as `shadow_report`."""
        self._columns, self._cost_rate, self._bar_seconds = columns, cost_rate, bar_seconds
        self._bar: _Bar | None = None
        self._now: list[_Held] = []
        self._waiting: list[_Held] = []

    def see(self, live: DecisionRecord) -> None:
        """Take in the state row of a live decision."""
        # Of a bar that was refused as it came, the time may be anything.
        if live.bar_time is None or (not live.state and live.bar_time > live.time):
            return
        before, bar = self._bar, self._read(live)
        if before is not None and bar.time <= before.time:
            if live.state:
                self._leave_out(self._now, REPLACED)
                self._now = []
            return
        problem = bar.problem or ("" if before is None or self._follows(before, bar) else BAR_MISSING)
        if problem:
            self._leave_out([*self._waiting, *self._now], problem)
            self._now = []
        else:
            for one in self._waiting:
                self._settle(one, bar)
            for one in self._now:
                one.next_bar = bar
        self._bar, self._waiting, self._now = bar, self._now, []

    def hold(self, book: Book, live: DecisionRecord, shadow: DecisionRecord) -> None:
        """Let a pair wait for the bars after it. Args: live: the one last seen."""
        row = self._read(live)
        if row.problem:
            book.left_out[row.problem] += 1
        else:
            self._now.append(_Held(book, row.position, (live.target_position, shadow.target_position), row))

    def end(self) -> None:
        """No more bars come."""
        self._leave_out([*self._waiting, *self._now], NOT_YET)

    @staticmethod
    def _leave_out(held: list[_Held], why: str) -> None:
        for one in held:
            one.book.left_out[why] += 1

    def _settle(self, one: _Held, after: _Bar) -> None:
        gap = math.expm1(one.next_bar.gap)
        if 1.0 + one.position * gap <= 0.0:
            one.book.left_out[NOT_FINITE] += 1
            return
        at_open = one.position * (1.0 + gap) / (1.0 + one.position * gap)
        earned = math.expm1(one.next_bar.intraday + after.gap)
        values = [
            target * earned - self._cost_rate * abs(target - at_open)
            for target in (at_open if wanted is None else wanted for wanted in one.targets)
        ]
        one.book.value(*values)

    # With `return_2` neighbours are known by their numbers, else by the time between them alone.
    def _follows(self, before: _Bar, bar: _Bar) -> bool:
        if bar.time - before.time > self._bar_seconds:
            return False
        expected = before.gap + before.intraday + bar.gap + bar.intraday
        return not (math.isfinite(expected) and abs(bar.two - expected) > RETURN_TOLERANCE)

    def _read(self, record: DecisionRecord) -> _Bar:
        names = self._columns.get(record.bundle_hash)
        values = np.frombuffer(record.state, dtype="<f4").tolist()
        row = dict(zip(names, values, strict=False)) if names is not None and len(names) == len(values) else {}
        gap, intraday, two, position = (
            row.get(name, math.nan) for name in ("gap_return", "intraday_return", "return_2", "position")
        )
        problem = ""
        if not record.state:
            problem = NO_ROW
        elif not row:
            problem = NO_COLUMNS
        elif not {"gap_return", "intraday_return", "position"} <= row.keys():
            problem = NO_RETURNS
        elif not all(map(math.isfinite, (gap, intraday, position))):
            problem = NOT_FINITE
        return _Bar(record.bar_time or 0.0, gap, intraday, two, position, problem)
