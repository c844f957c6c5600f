"""Drift, live: the monitor sees the bars that are decided on, and speaks up where they are not as training saw them.

A decision does no more than put its record into a queue; likelihood, statistics and commands are the business of a
thread of its own, because whoever is told of a record holds the engine's lock.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from serving.bundle import Bundle
from serving.drift.monitor import DriftLevel, DriftMonitor, DriftSettings, DriftStatus
from serving.drift.reference import WINDOW
from serving.engine import SERVICE, DecisionEngine
from serving.ledger.base import Ledger
from serving.records import ControlRecord, DecisionRecord, Entry, Mode, Record

log = logging.getLogger(__name__)

KEPT_BARS = 1000
"""Newest bars that are kept for the next bundle."""
MAX_ENTRIES = 20_000
"""Newest entries of a ledger that are read for a window."""
PAUSE_S = 0.02
"""How long a bar waits until its decision is answered."""
PAGE = 500
"""Entries read at once."""
_LEVELS = list(DriftLevel)


class Bar(NamedTuple):
    """The features of one bar."""

    time: float
    """Close, seconds since 1970 UTC."""
    row: npt.NDArray[np.float32]
    """[M], raw units."""
    finite: bool


class DriftWatch:
    """Watches the live decisions of an engine, under the bundle that is in force."""

    def __init__(
        self,
        bundle: Bundle,
        settings: DriftSettings | None = None,
        *,
        reduce_only_on_alarm: bool = False,
        longest_gap: float = math.inf,
    ) -> None:
        """Begin with an empty window.

        Args:
            bundle: in force; one without a reference is not watched, its bars are kept for the next one.
            settings: when to warn.
            reduce_only_on_alarm: let an alarm move trading to REDUCE_ONLY, once until the level has gone down.
            longest_gap: seconds between two bars; where there are more, bars are missing between them, and no
                likelihood is computed.
        """
        self._window = _Window(bundle, settings or DriftSettings(), longest_gap)
        self._reduce_only = reduce_only_on_alarm
        self._level = DriftLevel.OK
        self._engine: DecisionEngine | None = None
        self._queue: queue.Queue[DecisionRecord | Bundle | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="drift", daemon=True)

    def refill(self, ledger: Ledger) -> None:
        """Take in the newest recorded bars, as if there had been no restart.

        What was noted is not noted again; what the newest bar led to and a crash kept from being noted is, once
        attached. Where few entries are of new bars, at most the newest `MAX_ENTRIES` are read.

        Raises: LedgerError; RuntimeError once attached.
        """
        if self._engine is not None:
            raise RuntimeError("drift: expected to be refilled before `attach`, was attached")
        bars, notes = self._newest_bars(ledger)
        before = DriftLevel.OK
        for bar in reversed(bars):
            if self._window.wants(bar.time):
                before = _level(self._window.status())
                self._window.take(bar)
        status = self._window.status()
        noted = status is None or status.words in notes
        self._level = _level(status) if noted else before

    def attach(self, engine: DecisionEngine) -> None:
        """Watch the decisions of an engine, under the bundle it has in force, from now on; once only."""
        self._engine = engine
        self._queue.put(engine.bundle)
        self._thread.start()
        engine.subscribe(self._observe)

    def status(self) -> DriftStatus | None:
        """The verdict on the newest window; None while the bundle in force has no reference."""
        return self._window.status()

    def flush(self) -> None:
        """Return once all decisions made before are taken in, and commands given."""
        self._queue.join()

    def close(self) -> None:
        """Take in what is left and end the thread; twice does nothing. The engine is to be closed afterwards."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    # In the thread that decides, under the engine's lock.
    def _observe(self, record: Record, _shadow: DecisionRecord | None) -> None:
        if isinstance(record, ControlRecord):
            if record.command == "bundle" and self._engine is not None:
                self._queue.put(self._engine.bundle)
        elif record.state and record.bar_time is not None and self._window.wants(record.bar_time):
            self._queue.put(record)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._queue.empty():
                # The decision is answered first.
                time.sleep(PAUSE_S)
            try:
                if isinstance(item, Bundle):
                    self._window.use(item)
                elif (bar := self._window.bar(item)) is not None:
                    self._window.take(bar)
                self._speak_up()
            # A graph, a ledger or a mistake of ours: one bar less is no reason to stop watching.
            except Exception as error:
                log.exception("drift: a bar is left out, or what it shows is not told: %r", error)
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _speak_up(self) -> None:
        status, engine = self._window.status(), self._engine
        before, self._level = self._level, _level(status)
        if status is None or engine is None or _LEVELS.index(self._level) <= _LEVELS.index(before):
            return
        log.warning("drift, %s", status.words)
        if self._level is DriftLevel.ALARM and self._reduce_only:
            engine.reduce_only(SERVICE, f"drift: {status.words}")
        engine.note("drift", status.words)

    # Newest first: two full windows, one bar apart, the bar before them, and one more, of which some decisions may be
    # missing; and what was noted meanwhile.
    def _newest_bars(self, ledger: Ledger) -> tuple[list[Bar], set[str]]:
        bars: list[Bar] = []
        times: set[float] = set()
        notes: set[str] = set()
        for entry in _backwards(ledger):
            record = _record(entry)
            if isinstance(record, ControlRecord) and record.command == "drift":
                notes.add(record.detail)
            bar = self._window.bar(record)
            if bar is not None:
                bars.append(bar)
                times |= {bar.time} if bar.finite else set()
            if len(times) == self._window.size + 3:
                break
        return bars, notes


# The newest bars and the monitor of one bundle. Only one thread changes it, any may ask.
class _Window:
    def __init__(self, bundle: Bundle, settings: DriftSettings, longest_gap: float) -> None:
        self._settings, self._longest_gap = settings, longest_gap
        self._bars: deque[Bar] = deque(maxlen=KEPT_BARS)
        self._newest: Bar | None = None
        self._bundle, self._monitor = bundle, self._new_monitor(bundle)

    @property
    def size(self) -> int:
        return WINDOW if self._bundle.drift is None else self._bundle.drift.window

    def status(self) -> DriftStatus | None:
        monitor = self._monitor
        return None if monitor is None else monitor.status()

    # A bar counts once, by the first of its rows that is finite.
    def wants(self, bar_time: float) -> bool:
        newest = self._newest
        return newest is None or bar_time > newest.time or (bar_time == newest.time and not newest.finite)

    def take(self, bar: Bar) -> None:
        if not self.wants(bar.time):
            return
        if self._bars and self._bars[-1].time == bar.time:
            self._bars.pop()
        if self._monitor is not None:
            self._show(self._monitor, self._bundle, self._bars[-1] if self._bars else None, bar)
        self._bars.append(bar)
        self._newest = bar

    # Rows mean the same under every bundle of the same layout.
    def use(self, bundle: Bundle) -> None:
        if bundle.manifest.layout_hash != self._bundle.manifest.layout_hash:
            self._bars.clear()
            self._newest = None
        monitor, before = self._new_monitor(bundle), None
        if monitor is not None:
            for bar in self._bars:
                self._show(monitor, bundle, before, bar)
                before = bar
        self._bundle, self._monitor = bundle, monitor

    # None where a record is none of a bar, or was made on another layout.
    def bar(self, record: Record | None) -> Bar | None:
        manifest = self._bundle.manifest
        if not isinstance(record, DecisionRecord) or record.mode is not Mode.LIVE or record.bar_time is None:
            return None
        if len(record.state) != 4 * len(manifest.state_names):
            return None
        row = np.frombuffer(record.state, dtype="<f4", count=len(manifest.feature_fields)).astype(np.float32)
        return Bar(record.bar_time, row, bool(np.isfinite(row).all()))

    def _new_monitor(self, bundle: Bundle) -> DriftMonitor | None:
        return None if bundle.drift is None else DriftMonitor(bundle.drift, self._settings)

    def _show(self, monitor: DriftMonitor, bundle: Bundle, before: Bar | None, bar: Bar) -> None:
        nll = None
        if before is not None and before.finite and bar.time - before.time <= self._longest_gap:
            nll = float(bundle.run_likelihood(before.row[None], bar.row[None])[0])
        monitor.observe(bar.row, nll, bar_time=bar.time)


def _level(status: DriftStatus | None) -> DriftLevel:
    return DriftLevel.OK if status is None else status.level


def _backwards(ledger: Ledger) -> Iterator[Entry]:
    page = list(ledger.read(-PAGE))
    count = 0
    while page and count < MAX_ENTRIES:
        yield from reversed(page)
        count += len(page)
        first = page[0].seq
        page = list(ledger.read(max(first - PAGE, 1), first - 1)) if first > 1 else []


# What is no record is the audit's business.
def _record(entry: Entry) -> Record | None:
    try:
        return entry.record
    except msgspec.DecodeError:
        return None
