"""A ledger in PostgreSQL: many accounts in one database, one writer each, a standby on another machine if need be.

Who writes an account holds an advisory lock, which the server keeps for as long as the session lives, and writes
through that session only: whoever has lost the lock cannot write. A pooler that hands one session to several clients
breaks that; connect to the server itself, or have the pooler keep sessions.

No call waits for a connection: one that is lost is made again by a thread, at growing intervals, and calls fail until
it is there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg
from psycopg.errors import UniqueViolation

from serving.errors import LedgerError
from serving.ledger.base import Head, chain
from serving.ledger.session import Address, Session
from serving.ledger.tail import CHECKED, find_end, known_or_moved_on, to_head
from serving.records import Entry

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.1, 5.0

# One statement is one transaction and one round trip.
_APPEND = "INSERT INTO detent.entries (account, seq, body, hash, event_id) VALUES (%s, %s, %s, %s, %s)"
_FIND = "SELECT seq, body, hash FROM detent.entries WHERE account = %s AND event_id = %s"
_READ = """
SELECT seq, body, hash FROM detent.entries WHERE account = %s AND seq > %s AND seq <= %s ORDER BY seq LIMIT 1000
"""
# From each account to the next in an index; PostgreSQL's own DISTINCT reads every entry.
_ACCOUNTS = """
WITH RECURSIVE accounts AS (
    SELECT min(account) AS account FROM detent.entries
    UNION ALL
    SELECT (SELECT min(e.account) FROM detent.entries e WHERE e.account > a.account)
    FROM accounts a WHERE a.account IS NOT NULL)
SELECT account FROM accounts WHERE account IS NOT NULL LIMIT 10
"""
_WATCH_S = 0.2


class PostgresLedger:
    """A ledger of one account; safe to use from several threads."""

    def __init__(
        self,
        url: str,
        account: str | None = "default",
        *,
        wait: bool = False,
        read_only: bool = False,
        timeout_s: float = 2.0,
    ) -> None:
        """Connect, create the tables where there are none, and take the lock of the account.

        Args:
            url: `postgresql://user@host:port/database`; a password may be in it, in PGPASSWORD or in a password file.
            account: whose ledger; None takes the only one there is, and is for reading only.
            wait: until the writer that is there has gone; else that is an error.
            read_only: without the lock; several may read while one writes.
            timeout_s: a server that does not answer for so long is given up.

        Raises: LedgerError if the server cannot be reached, another process writes, the newest entries do not follow
            from each other, or the last one is no record. No message holds a password.
        """
        self._address = Address.parse(url, timeout_s)
        self.where = self._address.name
        if account is None and not read_only:
            raise LedgerError(f"{self.where}: account: expected a name to write under, was None")
        self._read_only, self._timeout_s = read_only, timeout_s
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._trouble = "closed"
        # Since when a statement waits for its answer.
        self._since: float | None = None
        # The last entry: that the caller knows, and that is in the table as far as known: None after a failure.
        self._told: Entry | None = None
        self._end: Entry | None = None
        self._thread: threading.Thread | None = None
        self._writes_as = None if read_only else account
        self._session: Session | None = Session(self._address, self._writes_as, wait=self._stop if wait else None)
        try:
            self.account = self._only_account() if account is None else account
            if not read_only:
                self.head()
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(target=self._tend, name="ledger-connection", daemon=True)
        self._thread.start()

    def head(self) -> Head:
        """Where the next entry goes. Raises: LedgerError, also where the last entry is no record."""
        with self._lock:
            if self._read_only:
                self._end = None
            end = self._current()
            head = to_head(end, self.where)
            self._told = end
            return head

    def find(self, event_id: str) -> Entry | None:
        """The live decision on an event, if there is one. Raises: LedgerError."""
        rows = self._run(_FIND, self.account, event_id)
        return Entry(*rows[0]) if rows else None

    def append(self, body: bytes, *, event_id: str | None = None) -> Entry:
        """Write a record.

        Args: event_id: of a live decision. One that is in the ledger gets its entry again, and nothing is written.
        Raises: LedgerError if it could not be written, or if that is unknown: the connection may be lost after the
            server has written and before it has said so, and another process may have written in between. A later
            append fails then until `head` was called; `find` knows what became of the event.
        """
        with self._lock:
            if self._read_only:
                raise LedgerError(f"{self.where}: expected to be open for writing, was for reading only")
            end = self._current()
            if self._told != end:
                return known_or_moved_on(self, event_id, self._told, end, self.where)
            entry = Entry(end.seq + 1, body, chain(end.hash, body))
            self._end = None
            try:
                self._run(_APPEND, self.account, entry.seq, body, entry.hash, event_id, prepare=True)
            except LedgerError as error:
                known = None
                if event_id is not None and isinstance(error.__cause__, UniqueViolation):
                    known = self.find(event_id)
                if known is None:
                    raise
                return known
            self._told = self._end = entry
            return entry

    def read(self, first: int = 1, last: int | None = None) -> Iterator[Entry]:
        """Entries by number, both ends included, up to what is there when reading starts.

        Args: first: negative counts from the end.
        Raises: LedgerError.
        """
        newest = self._run("SELECT max(seq) FROM detent.entries WHERE account = %s", self.account)[0][0] or 0
        cursor = (max(newest + 1 + first, 1) if first < 0 else first) - 1
        last = newest if last is None else min(last, newest)
        while cursor < last:
            rows = self._run(_READ, self.account, cursor, last)
            if not rows:
                return
            for row in rows:
                yield Entry(*row)
            cursor = rows[-1][0]

    def close(self) -> None:
        """Give it back; twice does nothing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            self._drop("closed")

    def _current(self) -> Entry:
        # Asked even where the head is known: a session made anew may find another.
        self._open_session()
        if self._end is None:
            self._end = find_end(self, self.where, 0 if self._read_only else CHECKED)
        return self._end

    def _only_account(self) -> str:
        found = [str(row[0]) for row in self._run(_ACCOUNTS)]
        if len(found) > 1:
            raise LedgerError(f"{self.where}: account: expected one of {', '.join(found)}, was none given")
        return found[0] if found else "default"

    # --- the session --------------------------------------------------------------------------------------

    def _run(self, statement: str, *values: Any, prepare: bool | None = None) -> list[Any]:
        with self._lock:
            session = self._open_session()
            self._since = time.monotonic()
            try:
                return session.query(statement, *values, prepare=prepare)
            except (psycopg.Error, UnicodeError) as error:
                text = self._address.words(error)
                if not session.alive:
                    self._drop(text)
                raise LedgerError(text) from error
            finally:
                self._since = None

    def _open_session(self) -> Session:
        if self._session is None:
            raise LedgerError(f"{self.where}: not connected: {self._trouble.removeprefix(f'{self.where}: ')}")
        return self._session

    def _drop(self, trouble: str) -> None:
        session, self._session, self._end, self._trouble = self._session, None, None, trouble
        if session is not None:
            session.close()

    # The thread: gives up a server that does not answer, and connects again.
    def _tend(self) -> None:
        backoff = FIRST_BACKOFF_S
        while not self._stop.is_set():
            session, since = self._session, self._since
            if session is not None:
                backoff = FIRST_BACKOFF_S
                if since is not None and time.monotonic() - since > self._timeout_s:
                    session.cut()
                self._stop.wait(_WATCH_S)
                continue
            try:
                session = Session(self._address, self._writes_as)
            except LedgerError as error:
                self._trouble = str(error)
                self._stop.wait(backoff)
                backoff = min(2.0 * backoff, LAST_BACKOFF_S)
                continue
            with self._lock:
                self._session = session
