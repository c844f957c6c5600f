"""The audit of a ledger: is it whole, and does each decision come out again as it was recorded.

The hashes form a chain from the first entry on, so no entry can be altered, dropped, inserted or moved without a break
that `verify` finds, unless everything after it is rewritten too. Two things a chain alone cannot show: that entries at
the end were cut off, and that all of it was rewritten from some entry on. Both show when the hash of a former head,
noted down elsewhere, is no longer in the chain: give it to `verify`.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from masking import HOLD
from serving.bundle import Bundle
from serving.deciders import Redecision, redecide
from serving.ledger.base import Ledger, chain, genesis
from serving.records import ControlRecord, DecisionRecord, Entry

Progress = Callable[[int, int], None]
"""Called now and then with entries done and entries in all."""
_STEP = 500
_LOOK_AHEAD = 1000


def _silent(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    entries: int
    """Entries from the first on that follow from each other."""
    head_hash: str
    """Hash of the last of them."""
    broken_seq: int | None = None
    """Number of the first entry that is wrong; None where all are right, and where only the end is."""
    problem: str = ""
    """What is wrong, in words; empty where nothing is."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problem


def verify(ledger: Ledger, head_hash: str | None = None, *, progress: Progress = _silent) -> Verification:
    """Check the chain from the first entry to the last.

    Args: head_hash: of the head at some time before, noted down elsewhere; it must be in the chain.
    Raises: LedgerError if the ledger cannot be read.
    """
    total = max((entry.seq for entry in ledger.read(-1)), default=0)
    previous = Entry(0, b"", genesis(ledger.account))
    seen = head_hash in (None, previous.hash)
    entries = ledger.read()
    for entry in entries:
        problem = _link_problem(previous, entry, entries)
        if problem:
            return Verification(previous.seq, previous.hash, previous.seq + 1, problem)
        previous = entry
        seen = seen or entry.hash == head_hash
        if entry.seq % _STEP == 0:
            progress(entry.seq, total)
    progress(total, total)
    problem = (
        f"expected the hash {head_hash} in the chain, was none of {previous.seq} entries: entries at the end are "
        "missing, or were written anew"
    )
    return Verification(previous.seq, previous.hash, None, "" if seen else problem)


def _link_problem(previous: Entry, entry: Entry, rest: Iterator[Entry]) -> str:
    expected = previous.seq + 1
    if entry.seq != expected:
        last = entry.seq - 1
        return f"entry {expected} is missing" if last == expected else f"entries {expected} to {last} are missing"
    proper = chain(previous.hash, entry.body)
    if entry.hash == proper:
        return ""
    following = list(itertools.islice(rest, _LOOK_AHEAD))
    for other in following:
        if other.hash == chain(previous.hash, other.body):
            return f"entry {entry.seq} is not the one that belongs there: entry {other.seq} is; entries changed places"
    after = following[0] if following else None
    if after is not None and after.hash == chain(proper, after.body):
        return f"entry {entry.seq}: hash: expected {proper}, was {entry.hash}: it was altered"
    if after is not None and after.hash == chain(entry.hash, after.body):
        return (
            f"entry {entry.seq} does not follow from entry {previous.seq}, but the ones after it follow from it: its "
            "body was altered, or an entry before it was dropped, inserted or rewritten"
        )
    return f"entry {entry.seq} does not follow from entry {previous.seq}, nor does the rest follow from it"


@dataclass(frozen=True)
class Difference:
    """A decision that does not come out again."""

    seq: int
    event_id: str
    what: str
    """Field, recorded and new value, in words."""

    def __str__(self) -> str:
        return f"entry {self.seq}, event {self.event_id!r}: {self.what}"


@dataclass(frozen=True)
class Replay:
    """What `replay` found."""

    decisions: int
    """Decisions that were made again."""
    differences: tuple[Difference, ...]
    missing_bundles: dict[str, tuple[int, ...]]
    """Hash of a bundle that is not at hand -> entries that need it."""
    stateless: tuple[tuple[int, str], ...]
    """Number and reason of decisions without a state row: of requests that were refused before there was one."""
    controls: int
    """Commands; nothing in them is decided."""

    @property
    def ok(self) -> bool:
        """Whether each decision that has a state row was made again, and none differs."""
        return not self.differences and not self.missing_bundles


def replay(
    ledger: Ledger,
    find_bundle: Callable[[str], Bundle | None],
    decide_again: Callable[[Bundle, DecisionRecord], Redecision] = redecide,
    *,
    first: int = 1,
    last: int | None = None,
    progress: Progress = _silent,
) -> Replay:
    """Make the decisions again, from their state rows, and compare them bit for bit.

    Args:
        find_bundle: hash -> bundle, None where it is not at hand.
        first, last: as for `Ledger.read`.

    Raises: LedgerError if the ledger cannot be read.
    """
    total = max((entry.seq for entry in ledger.read(-1)), default=0)
    decisions = controls = 0
    differences: list[Difference] = []
    missing: dict[str, list[int]] = {}
    stateless: list[tuple[int, str]] = []
    for entry in ledger.read(first, last):
        if entry.seq % _STEP == 0:
            progress(entry.seq, total)
        try:
            record = entry.record
        except (msgspec.MsgspecError, UnicodeError) as error:
            differences.append(Difference(entry.seq, "", f"expected a record, was none: {error}"))
            continue
        if isinstance(record, ControlRecord):
            controls += 1
        elif not record.state:
            stateless.append((entry.seq, record.reason.value))
            if record.executed != HOLD or record.target_position != (0.0 if record.flatten else None):
                what = (
                    f"executed, target_position: expected Hold without a state row, "
                    f"was {record.executed}, {record.target_position}"
                )
                differences.append(Difference(entry.seq, record.event_id, what))
        elif (bundle := find_bundle(record.bundle_hash)) is None:
            missing.setdefault(record.bundle_hash, []).append(entry.seq)
        else:
            decisions += 1
            found = _differences(record, bundle, decide_again)
            differences += [Difference(entry.seq, record.event_id, what) for what in found]
    progress(total, total)
    needed = {name: tuple(seqs) for name, seqs in missing.items()}
    return Replay(decisions, tuple(differences), needed, tuple(stateless), controls)


def _differences(
    record: DecisionRecord, bundle: Bundle, decide_again: Callable[[Bundle, DecisionRecord], Redecision]
) -> list[str]:
    try:
        again = decide_again(bundle, record)
    # A record that was tampered with may fail anywhere, and onnxruntime's errors share no base but Exception.
    except Exception as error:
        return [f"cannot be decided again: {error}"]
    pairs = [(name, getattr(record, name), getattr(again, name)) for name in Redecision._fields]
    return [f"{name}: recorded {was!r}, now {now!r}" for name, was, now in pairs if _bits(was) != _bits(now)]


# Equal only where each bit is: 0.0 is not -0.0, and NaN is NaN.
def _bits(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_bits, value))
    return struct.pack("<d", value) if isinstance(value, float) else value
