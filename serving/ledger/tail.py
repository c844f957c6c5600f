"""The newest end of a ledger: what every kind of ledger makes of it, and checks before it adds to it."""

from __future__ import annotations

import msgspec

from serving.errors import LedgerError
from serving.ledger.base import Head, Ledger, chain, genesis
from serving.records import Entry

CHECKED = 100
"""Entries."""


def find_end(ledger: Ledger, where: str, checked: int) -> Entry:
    """The last entry; in an empty ledger one with number 0, without a body.

    Args: checked: so many entries up to it are held against the chain: a writer that adds to a broken end would bury
        where it broke.
    Raises: LedgerError naming the first that does not follow.
    """
    newest = list(ledger.read(-checked - 1))
    previous = Entry(0, b"", genesis(ledger.account))
    if newest and newest[-1].seq > checked:
        # The one before is taken as it is; where it is missing nothing follows from it.
        before = newest[-1].seq - checked
        previous = newest.pop(0) if newest[0].seq == before else Entry(before, b"", "")
    for entry in newest:
        if entry.seq != previous.seq + 1 or entry.hash != chain(previous.hash, entry.body):
            raise LedgerError(
                f"{where}: entry {entry.seq} does not follow from entry {previous.seq}; nothing is added to it: "
                "see `detent audit verify`, keep what is there, and restore it or start another"
            )
        previous = entry
    return previous


def to_head(end: Entry, where: str) -> Head:
    """The head, of which `end` is the last entry. Raises: LedgerError where that is no record."""
    if not end.seq:
        return Head(0, end.hash, None)
    try:
        return Head(end.seq, end.hash, end.record.risk)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise LedgerError(f"{where}: entry {end.seq}: expected a record, was none: {error}") from error


def known_or_moved_on(ledger: Ledger, event_id: str | None, told: Entry | None, end: Entry, where: str) -> Entry:
    """What comes of an append to another end than the caller knows: the entry of its event, if there is one.

    Raises: LedgerError if there is none: the caller's risk state is an old one.
    """
    entry = None if event_id is None else ledger.find(event_id)
    if entry is None:
        known = "nothing" if told is None else f"entry {told.seq}"
        text = f"the caller knows {known} as the last, it is entry {end.seq}: ask for the head first"
        raise LedgerError(f"{where}: {text}")
    return entry
