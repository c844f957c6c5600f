"""The shadow report: what a challenger decided beside the bundle in force, on the same state rows.

A shadow record follows the live record of its event; the two are a pair. One pass over the ledger, in memory that grows
with the number of challengers, not with that of records.

The hypothetical P&L values one bar at a time, from the position that was really held. A decision made at a close is
executed at the next open and stays in force until the open after that: it earns `intraday_return` of the next bar and
`gap_return` of the one after, as they stand in the live state rows that follow, on the position after the decision,
less costs for what it trades. What it cannot say: where the challenger's own positions would have led, for each bar
starts again from the position the live account had; what its orders would have done to prices; how the drawdown ladder
would have moved, for trading state and masks are those of the live account. Bars whose returns are not in the ledger
are left out and counted; no return is made up. Standard errors and intervals take decisions as independent, which
those on neighbouring bars seldom are: they are rather too narrow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from masking import HOLD, TradingState
from serving.errors import LedgerError
from serving.ledger.audit import Progress
from serving.ledger.base import Ledger
from serving.ledger.tally import LEVEL, Agreement, Latency, Moments, Pnl, Quantiles
from serving.ledger.valuation import Valuation
from serving.records import ControlRecord, DecisionRecord, Entry, Mode, Reason

INFERENCE_STAGES = ("policy", "plan", "infer")
"""Stages of `latency_us` that together are the time of the graphs; a shadow has the last one only."""

_STEP = 500


@dataclass(frozen=True)
class Side:
    """One of the two that are compared."""

    holds: dict[str, int]
    """Reason -> decisions that ended in Hold; `ok` where Hold was chosen."""
    inference: Latency
    """Of the graphs."""
    total: Latency
    """Of the decision, up to its record."""
    pnl: Pnl

    @property
    def overridden(self) -> int:
        """Decisions that the risk manager refused."""
        return self.holds.get(Reason.OVERRIDDEN.value, 0)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A challenger beside what was in force."""

    challenger: str
    """Hash of its bundle."""
    bundles: dict[str, int]
    """Hash of a bundle in force -> decisions compared with it."""
    first_seq: int | None
    """First live record that was compared; None where none was."""
    last_seq: int | None
    first_time: float | None
    """Of that record, seconds since 1970 UTC."""
    last_time: float | None
    agreement: Agreement
    free: Agreement
    """Of the pairs where nothing but the two bundles had a say: the reason of both is `ok`."""
    actions: dict[tuple[int, int], int]
    """(live, shadow) executed -> pairs."""
    states: dict[str, int]
    """Trading state of the live decision -> pairs."""
    kills: dict[str, int]
    """Who -> times that the kill switch latched during the trial: `ladder` or `person`."""
    commands: dict[str, int]
    """Command -> times given during the trial."""
    live: Side
    shadow: Side
    difference: Pnl
    """P&L of the shadow less that of the live decision, bar by bar."""
    left_out: dict[str, int]
    """Why a pair has no P&L -> pairs."""

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; agreements with share and interval, sides with overridden decisions."""
        found: dict[str, Any] = asdict(self)
        for name in ("agreement", "free"):
            one: Agreement = getattr(self, name)
            found[name] |= {"share": one.share, "interval": one.interval, "level": LEVEL}
        for name in ("live", "shadow"):
            side: Side = getattr(self, name)
            parts = {part: getattr(side, part)._asdict() for part in ("inference", "total", "pnl")}
            found[name] = {"holds": side.holds, "overridden": side.overridden, **parts}
        found["difference"] = self.difference._asdict()
        found["actions"] = [
            {"live": live, "shadow": shadow, "pairs": pairs} for (live, shadow), pairs in self.actions.items()
        ]
        return found


@dataclass(frozen=True)
class ShadowReport:
    """What `shadow_report` found."""

    decisions: int
    """Live decisions."""
    unpaired: int
    """Shadow records whose live record is not just before them."""
    trials: tuple[Trial, ...]
    """By challenger, in the order of their first appearance."""


def shadow_report(
    ledger: Ledger,
    columns: Mapping[str, Sequence[str]],
    *,
    cost_rate: float,
    bar_seconds: float,
    first: int = 1,
    last: int | None = None,
    progress: Progress | None = None,
) -> ShadowReport:
    """Compare live decisions with those of challengers.

    Args:
        columns: hash of a bundle that was in force -> names of its state columns.
        cost_rate: of trading a notional of 1, as a fraction.
        bar_seconds: longest time between two bars; decisions further apart have a bar missing between them.
        first, last: as for `Ledger.read`.
        progress: called now and then with entries done and entries in all.

    Raises: LedgerError if the ledger cannot be read, or an entry holds no record.
    """
    total = max((entry.seq for entry in ledger.read(-1)), default=0)
    reader = _Reader(Valuation(columns, cost_rate, bar_seconds))
    for entry in ledger.read(first, last):
        reader.read(entry)
        if progress is not None and entry.seq % _STEP == 0:
            progress(entry.seq, total)
    if progress is not None:
        progress(total, total)
    return reader.report()


# --- one pass over the ledger -----------------------------------------------------------------------------


class _Reader:
    def __init__(self, valuation: Valuation) -> None:
        self._valuation = valuation
        self._trials: dict[str, _Trial] = {}
        self._on_trial: _Trial | None = None
        self._live: tuple[int, DecisionRecord] | None = None
        self._killed: bool | None = None
        self._decisions = self._unpaired = 0

    def read(self, entry: Entry) -> None:
        try:
            record = entry.record
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise LedgerError(f"entry {entry.seq}: expected a record, was none: {error}") from error
        if isinstance(record, ControlRecord):
            self._command(record)
        elif record.mode is Mode.LIVE:
            self._decisions += 1
            self._live = entry.seq, record
            self._valuation.see(record)
        else:
            self._shadow(record)
        self._watch_kill_switch(record)

    def report(self) -> ShadowReport:
        self._valuation.end()
        return ShadowReport(self._decisions, self._unpaired, tuple(trial.result() for trial in self._trials.values()))

    def _command(self, record: ControlRecord) -> None:
        if record.command == "start":
            self._on_trial = None
        elif record.command == "shadow":
            self._on_trial = None if record.detail == "none" else self._trial(record.detail)
        elif self._on_trial is not None:
            self._on_trial.commands[record.command] += 1

    def _shadow(self, record: DecisionRecord) -> None:
        trial = self._on_trial = self._trial(record.bundle_hash)
        if self._live is None or self._live[1].event_id != record.event_id:
            self._unpaired += 1
            return
        trial.add(*self._live, record)
        self._valuation.hold(trial, self._live[1], record)

    def _watch_kill_switch(self, record: DecisionRecord | ControlRecord) -> None:
        if record.risk.killed and self._killed is False and self._on_trial is not None:
            self._on_trial.kills["person" if isinstance(record, ControlRecord) else "ladder"] += 1
        self._killed = record.risk.killed

    def _trial(self, challenger: str) -> _Trial:
        return self._trials.setdefault(challenger, _Trial(challenger))


class _Side:
    def __init__(self) -> None:
        self.holds: Counter[str] = Counter()
        self.inference, self.total, self.pnl = Quantiles(), Quantiles(), Moments()

    def add(self, record: DecisionRecord) -> None:
        if record.executed == HOLD:
            self.holds[record.reason.value] += 1
        stages = [record.latency_us[stage] for stage in INFERENCE_STAGES if stage in record.latency_us]
        if stages:
            self.inference.add(sum(stages))
        if "total" in record.latency_us:
            self.total.add(record.latency_us["total"])

    def result(self) -> Side:
        return Side(dict(self.holds), self.inference.result(), self.total.result(), self.pnl.result())


@dataclass
class _Trial:
    challenger: str
    bundles: Counter[str] = field(default_factory=Counter)
    actions: Counter[tuple[int, int]] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    live: _Side = field(default_factory=_Side)
    shadow: _Side = field(default_factory=_Side)
    difference: Moments = field(default_factory=Moments)
    free: Counter[bool] = field(default_factory=Counter)
    span: list[tuple[int, float]] = field(default_factory=list)

    def add(self, seq: int, live: DecisionRecord, shadow: DecisionRecord) -> None:
        self.span = [*self.span[:1], (seq, live.time)]
        self.bundles[live.bundle_hash] += 1
        self.actions[live.executed, shadow.executed] += 1
        self.states[TradingState(live.trading_state).name] += 1
        if live.reason is shadow.reason is Reason.OK:
            self.free[live.executed == shadow.executed] += 1
        self.live.add(live)
        self.shadow.add(shadow)

    def value(self, live: float, shadow: float) -> None:
        self.live.pnl.add(live)
        self.shadow.pnl.add(shadow)
        self.difference.add(shadow - live)

    def result(self) -> Trial:
        first, last = (self.span[0], self.span[-1]) if self.span else ((None, None), (None, None))
        equal = sum(pairs for (live, shadow), pairs in self.actions.items() if live == shadow)
        return Trial(
            challenger=self.challenger,
            bundles=dict(self.bundles),
            first_seq=first[0],
            last_seq=last[0],
            first_time=first[1],
            last_time=last[1],
            agreement=Agreement(equal, self.actions.total()),
            free=Agreement(self.free[True], self.free.total()),
            actions=dict(sorted(self.actions.items())),
            states=dict(self.states),
            kills=dict(self.kills),
            commands=dict(self.commands),
            live=self.live.result(),
            shadow=self.shadow.result(),
            difference=self.difference.result(),
            left_out=dict(self.left_out),
        )
