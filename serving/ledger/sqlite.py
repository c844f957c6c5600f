"""The default ledger: one SQLite file per account, and a lock file beside it that keeps a second writer out.

The file is in WAL mode: readers (an audit, a page) see whole entries while the writer goes on. Nothing is held in
memory that a crash could lose; with `fsync="always"` no acknowledged entry is lost with the power either.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from serving.errors import LedgerError
from serving.ledger.base import Head, chain
from serving.ledger.checkpointer import Checkpointer
from serving.ledger.lockfile import LockFile
from serving.ledger.tail import CHECKED, find_end, known_or_moved_on, to_head
from serving.records import Entry

Fsync = Literal["always", "never"]

APPLICATION_ID = 0x44744C67
"""Marks the file as a ledger; `file` and SQLite's own tools show it."""
FORMAT = 2

_SCHEMA = (
    "CREATE TABLE ledger (account TEXT NOT NULL)",
    "CREATE TABLE entries (seq INTEGER PRIMARY KEY, body BLOB NOT NULL, hash TEXT NOT NULL, event_id TEXT UNIQUE)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {FORMAT}",
)
# A statement by itself is a transaction.
_APPEND = "INSERT INTO entries VALUES (?, ?, ?, ?)"
_PAGE = 1000
# Opening may have to wait for a reader that puts the file in order after a crash; a decision cannot wait.
_OPENING_S = 5.0
_APPENDING_MS = 50


class SqliteLedger:
    """A ledger in a file; safe to use from several threads."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        account: str | None = "default",
        *,
        fsync: Fsync = "always",
        read_only: bool = False,
    ) -> None:
        """Open, and create where there is none.

        Args:
            account: whose ledger it is; None takes what the file says, and is for reading only.
            fsync: `always` syncs each entry to disk before it is acknowledged. `never` leaves that to the operating
                system: a crash of the process loses nothing, a power failure may lose the newest entries, and the
                file stays whole.
            read_only: several may read while one writes.

        Raises: LedgerError if it is missing (for reading), held by another writer, of another account, no ledger, or
            if its newest entries do not follow from each other or the last one is no record.
        """
        if account is None and not read_only:
            raise LedgerError(f"{path}: account: expected a name to write under, was None")
        self.path = Path(path).absolute()
        self._read_only = read_only
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._held: LockFile | None = None
        self._checkpointer: Checkpointer | None = None
        # The last entry: that the caller knows, and that is in the file as far as known: None after a failure.
        self._told: Entry | None = None
        self._end: Entry | None = None
        if not read_only:
            self._held = LockFile(self.path.with_name(f"{self.path.name}.lock"))
        try:
            self.account = self._open(account, fsync)
            self._files = self._identity()
            if not read_only:
                self.head()
                self._run(f"PRAGMA busy_timeout = {_APPENDING_MS}")
                self._checkpointer = Checkpointer(self.path, self._lock)
        except BaseException:
            self.close()
            raise

    def head(self) -> Head:
        """Where the next entry goes. Raises: LedgerError, also where the last entry is no record."""
        with self._lock:
            if self._read_only:
                self._end = None
            end = self._current()
            head = to_head(end, str(self.path))
            self._told = end
            return head

    def find(self, event_id: str) -> Entry | None:
        """The live decision on an event, if there is one. Raises: LedgerError."""
        with self._lock:
            rows = self._run("SELECT seq, body, hash FROM entries WHERE event_id = ?", (event_id,))
        return _entry(*rows[0]) if rows else None

    def append(self, body: bytes, *, event_id: str | None = None) -> Entry:
        """Write a record.

        Args: event_id: of a live decision. One that is in the ledger gets its entry again, and nothing is written.
        Raises: LedgerError if it could not be written (full disk, file gone, ...); nothing is then, and the next one
            may succeed. Where a failed append was written after all, a later one fails until `head` was called.
        """
        with self._lock:
            if self._read_only:
                raise LedgerError(f"{self.path}: expected to be open for writing, was for reading only")
            self._check_files()
            end = self._current()
            if self._told != end:
                return known_or_moved_on(self, event_id, self._told, end, str(self.path))
            entry = Entry(end.seq + 1, body, chain(end.hash, body))
            self._end = None
            try:
                self._open_connection().execute(_APPEND, (entry.seq, body, entry.hash, event_id))
            except sqlite3.IntegrityError as error:
                known = None if event_id is None else self.find(event_id)
                if known is None:
                    raise self._failed("append to", error) from error
                return known
            except (sqlite3.Error, UnicodeError) as error:
                raise self._failed("append to", error) from error
            self._told = self._end = entry
            return entry

    def read(self, first: int = 1, last: int | None = None) -> Iterator[Entry]:
        """Entries by number, both ends included, up to what is there when reading starts.

        Args: first: negative counts from the end.
        Raises: LedgerError.
        """
        with self._lock:
            newest = (self._run("SELECT max(seq) FROM entries")[0][0]) or 0
        cursor = (max(newest + 1 + first, 1) if first < 0 else first) - 1
        last = newest if last is None else min(last, newest)
        while cursor < last:
            # A page at a time: a long reader must not keep the writer from reusing its log.
            with self._lock:
                rows = self._run(
                    "SELECT seq, body, hash FROM entries WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?",
                    (cursor, last, _PAGE),
                )
            if not rows:
                return
            for row in rows:
                yield _entry(*row)
            cursor = rows[-1][0]

    def close(self) -> None:
        """Give it back; twice does nothing."""
        checkpointer, self._checkpointer = self._checkpointer, None
        if checkpointer is not None:
            checkpointer.close()
        with self._lock:
            if self._connection is not None:
                with suppress(sqlite3.Error):
                    self._connection.close()
                self._connection = None
            if self._held is not None:
                self._held.release()
                self._held = None

    # --- opening ------------------------------------------------------------------------------------------

    def _open(self, account: str | None, fsync: Fsync) -> str:
        mode = "rwc"
        if self._read_only:
            mode = "ro&immutable=1" if self._cannot_change() else "ro"
        try:
            self._connection = sqlite3.connect(
                f"{self.path.as_uri()}?mode={mode}",
                uri=True,
                timeout=_OPENING_S,
                isolation_level=None,
                check_same_thread=False,
            )
            return self._checked_format(account, fsync)
        except sqlite3.Error as error:
            raise self._failed("open", error) from error

    # A file system that cannot be written has no room for the index that readers share, and needs none.
    def _cannot_change(self) -> bool:
        try:
            read_only = bool(os.statvfs(self.path).f_flag & os.ST_RDONLY)
        except OSError as error:
            raise LedgerError(f"{self.path}: expected a ledger, was none: {error.strerror}") from error
        log = self.path.with_name(f"{self.path.name}-wal")
        if read_only and log.exists() and log.stat().st_size > 0:
            raise LedgerError(
                f"{self.path}: has a log to be read first: copy it and {log.name} to where can be written"
            )
        return read_only

    def _checked_format(self, account: str | None, fsync: Fsync) -> str:
        # Before anything is changed: the file may be somebody else's.
        mark, version = self._run("PRAGMA application_id")[0][0], self._run("PRAGMA user_version")[0][0]
        empty = mark == 0 and not self._run("SELECT 1 FROM sqlite_master LIMIT 1")
        if mark != APPLICATION_ID and not (empty and not self._read_only):
            raise LedgerError(f"{self.path}: expected a ledger, was a database of something else")
        if not empty and version != FORMAT:
            raise LedgerError(
                f"{self.path}: format: expected {FORMAT}, was {version}, of another version of this program"
            )
        if not self._read_only:
            self._run("PRAGMA journal_mode = WAL")
            self._run("PRAGMA wal_autocheckpoint = 0")
            self._run(f"PRAGMA synchronous = {'FULL' if fsync == 'always' else 'NORMAL'}")
        if empty:
            for statement in ("BEGIN IMMEDIATE", *_SCHEMA):
                self._run(statement)
            self._run("INSERT INTO ledger VALUES (?)", (account,))
            self._run("COMMIT")
        found = str(self._run("SELECT account FROM ledger")[0][0])
        if account is not None and found != account:
            raise LedgerError(f"{self.path}: account: expected {account!r}, was {found!r}")
        return found

    # --- the file -----------------------------------------------------------------------------------------

    def _current(self) -> Entry:
        self._open_connection()
        if self._end is None:
            self._end = find_end(self, str(self.path), 0 if self._read_only else CHECKED)
        return self._end

    # Device and number of the file and of its log.
    def _identity(self) -> list[tuple[int, int]]:
        names = [str(self.path)] if self._read_only else [str(self.path), f"{self.path}-wal"]
        try:
            return [(status.st_dev, status.st_ino) for status in map(os.stat, names)]
        except OSError as error:
            raise LedgerError(
                f"{error.filename}: expected to stay while the ledger is open, was removed: restore it and restart"
            ) from error

    # SQLite goes on writing into a file that was deleted under it.
    def _check_files(self) -> None:
        self._open_connection()
        if self._identity() != self._files:
            raise LedgerError(
                f"{self.path}: expected to stay while it is open, was replaced: restart to use the new one"
            )

    def _open_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            raise LedgerError(f"{self.path}: expected to be open, was closed")
        return self._connection

    def _run(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        try:
            return self._open_connection().execute(statement, values).fetchall()
        except (sqlite3.Error, UnicodeError) as error:
            raise self._failed("use", error) from error

    def _failed(self, doing: str, error: Exception) -> LedgerError:
        return LedgerError(f"{self.path}: cannot {doing} the ledger: {error}")


# A body that somebody typed in as text is still to be checked, and found right or wrong.
def _entry(seq: int, body: Any, digest: Any) -> Entry:
    return Entry(seq, body if isinstance(body, bytes) else str(body).encode("utf-8", "surrogatepass"), str(digest))
