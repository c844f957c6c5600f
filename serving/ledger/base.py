"""The ledger: append-only records, chained by hashes; the newest one tells the state of the risk manager."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from serving.records import Entry, RiskState


class Head(NamedTuple):
    """The end of a ledger."""

    seq: int
    """Number of entries."""
    hash: str
    """Of the last entry, or `genesis(account)`."""
    risk: RiskState | None
    """Of the last record; None in an empty ledger."""


class Ledger(Protocol):
    """Where decisions are recorded; one process at a time may have one open for writing."""

    account: str

    def head(self) -> Head:
        """Where the next entry goes. Raises: LedgerError, also where the last entry is no record."""
        ...

    def find(self, event_id: str) -> Entry | None:
        """The live decision on an event, if there is one."""
        ...

    def append(self, body: bytes, *, event_id: str | None = None) -> Entry:
        """Write a record.

        Args: event_id: of a live decision; at most one entry each.
        Raises: LedgerError if it could not be written; nothing is then.
        """
        ...

    def read(self, first: int = 1, last: int | None = None) -> Iterator[Entry]:
        """Entries by number, both ends included. Negative `first` counts from the end."""
        ...

    def close(self) -> None:
        """Give it back; twice does nothing."""
        ...


def genesis(account: str) -> str:
    """The hash before the first entry."""
    return hashlib.sha256(f"detent ledger 1 {account}".encode()).hexdigest()


def chain(previous: str, body: bytes) -> str:
    """The hash of an entry."""
    return hashlib.sha256(previous.encode("ascii") + body).hexdigest()
