"""The newest end of a ledger: what every kind of ledger checks before it adds to it."""

from __future__ import annotations

from typing import Any

import msgspec

from serving.errors import LedgerError
from serving.ledger.base import Head, Ledger, chain, genesis
from serving.records import Entry, RiskState

CHECKED = 100
"""Entries."""


def check_newest(ledger: Ledger, where: str) -> None:
    """Check the newest entries against the chain: a writer that adds to a broken end would bury where it broke.

    Raises: LedgerError naming the first that does not follow.
    """
    newest = list(ledger.read(-CHECKED - 1))
    previous = Entry(0, b"", genesis(ledger.account))
    if newest and newest[-1].seq > CHECKED:
        # The one before is taken as it is; where it is missing nothing follows from it.
        before = newest[-1].seq - CHECKED
        previous = newest.pop(0) if newest[0].seq == before else Entry(before, b"", "")
    for entry in newest:
        if entry.seq != previous.seq + 1 or entry.hash != chain(previous.hash, entry.body):
            raise LedgerError(
                f"{where}: entry {entry.seq} does not follow from entry {previous.seq}; nothing is added to it: "
                "see `detent audit verify`, keep what is there, and restore it or start another"
            )
        previous = entry


def to_head(rows: list[Any], account: str, where: str) -> Head:
    """The head from at most one row of number, hash, and number and JSON of the risk state.

    Raises: LedgerError where the risk state is none, or not that of the last entry.
    """
    if not rows:
        return Head(0, genesis(account), None)
    seq, digest, risk_seq, state = rows[0]
    if risk_seq != seq or state is None:
        raise LedgerError(f"{where}: risk state: expected that of entry {seq}, was that of {risk_seq}")
    try:
        return Head(seq, digest, msgspec.json.decode(state, type=RiskState))
    except msgspec.MsgspecError as error:
        raise LedgerError(f"{where}: risk state of entry {seq}: {error}") from error


def moved_on(told: Head | None, head: Head, where: str) -> LedgerError:
    """The error of an append to another end than the caller knows, whose risk state is an old one then."""
    known = "nothing" if told is None else f"entry {told.seq}"
    return LedgerError(f"{where}: the caller knows {known} as the last, it is entry {head.seq}: ask for the head first")
