"""One session with PostgreSQL: connected, with the tables there, and holding the lock of an account if it writes."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from serving.errors import LedgerError

FORMAT = 2
STANDBY_POLL_S = 0.5

# The number in its last line is FORMAT.
_SCHEMA = """
CREATE SCHEMA IF NOT EXISTS detent;
CREATE TABLE IF NOT EXISTS detent.ledger (format integer NOT NULL);
CREATE TABLE IF NOT EXISTS detent.entries (
    account text NOT NULL, seq bigint NOT NULL, body bytea NOT NULL, hash text NOT NULL, event_id text,
    PRIMARY KEY (account, seq), UNIQUE (account, event_id));
INSERT INTO detent.ledger SELECT 2 WHERE NOT EXISTS (SELECT 1 FROM detent.ledger);
"""
_HOLDER = """
SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.granted AND (l.classid::bigint << 32) | l.objid::bigint = %s AND l.objsubid = 1
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
# What is acknowledged is on disk, also where the server's default says otherwise.
_DURABLE = """
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'
"""


@dataclass(frozen=True)
class Address:
    """Where a database is."""

    conninfo: str = field(repr=False)
    name: str
    """For messages: without user and password."""
    password: str = field(repr=False)

    @classmethod
    def parse(cls, url: str, timeout_s: float) -> Address:
        """Raises: LedgerError for a URL that cannot be read."""
        try:
            given = conninfo_to_dict(url)
        except psycopg.Error:
            # Neither in the message nor as its cause: libpq repeats what it could not read, a password with it.
            text = "ledger: expected postgresql://user@host:port/database, was a URL that cannot be read"
            raise LedgerError(text) from None
        limit = int(1000 * timeout_s)
        settings: dict[str, Any] = {
            "connect_timeout": max(2, round(timeout_s)),
            "application_name": f"detent pid {os.getpid()} on {socket.gethostname()}",
            # The lock of a writer whose machine vanished without a word is free when its server gives it up.
            "options": f"-c statement_timeout={limit} -c tcp_keepalives_idle=5 -c tcp_keepalives_interval=2 "
            "-c tcp_keepalives_count=3",
        }
        host, port = given.get("host", "localhost"), given.get("port", 5432)
        name = f"postgresql://{host}:{port}/{given.get('dbname', '')}"
        return cls(make_conninfo("", **{**settings, **given}), name, str(given.get("password") or ""))

    def words(self, error: Exception) -> str:
        """What went wrong, in one line without the password."""
        text = " ".join(str(error).split()) or type(error).__name__
        return f"{self.name}: {text.replace(self.password, '***') if self.password else text}"


class Session:
    """Open from construction to `close`; for one thread at a time, but for `cut`."""

    def __init__(self, address: Address, account: str | None, *, wait: threading.Event | None = None) -> None:
        """Connect.

        Args: account: whose lock to take; None reads only. wait: for the lock until it is set; None does not wait.
        Raises: LedgerError.
        """
        self._address = address
        try:
            self._connection = psycopg.connect(address.conninfo, autocommit=True)
        except psycopg.Error as error:
            raise LedgerError(address.words(error)) from error
        # A descriptor of its own, so that `cut` can never hit a socket that was opened since.
        self._socket = socket.socket(fileno=os.dup(self._connection.fileno()))
        try:
            self._prepare(account)
            if account is not None:
                self._take_lock(account, wait)
        except psycopg.Error as error:
            self.close()
            raise LedgerError(address.words(error)) from error
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether the server still answers, as far as known."""
        return not self._connection.closed and not self._connection.broken

    def query(self, statement: str, *values: Any, prepare: bool | None = None) -> list[Any]:
        """Rows of one statement, which is a transaction. Raises: psycopg.Error, UnicodeError."""
        cursor = self._connection.execute(statement.encode(), values, prepare=prepare)
        return cursor.fetchall() if cursor.description is not None else []

    def cut(self) -> None:
        """End it under a statement that waits for an answer; from any thread."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give connection and lock back; twice does nothing."""
        with suppress(psycopg.Error):
            self._connection.close()
        self._socket.close()

    def _prepare(self, account: str | None) -> None:
        if account is None:
            self.query("SET default_transaction_read_only = on")
        self.query(_DURABLE)
        if self.query("SELECT to_regclass('detent.entries') IS NULL")[0][0]:
            if account is None:
                raise LedgerError(f"{self._address.name}: expected a ledger, was a database without one")
            with self._connection.transaction():
                # IF NOT EXISTS alone fails where two create at the same time.
                self.query("SELECT pg_advisory_xact_lock(%s)", _lock_key("schema"))
                self._connection.execute(_SCHEMA.encode())
        found = [row[0] for row in self.query("SELECT format FROM detent.ledger")]
        if found != [FORMAT]:
            raise LedgerError(f"{self._address.name}: format: expected {FORMAT}, was {found}, of another version")

    def _take_lock(self, account: str, wait: threading.Event | None) -> None:
        key = _lock_key(f"account {account}")
        while not self.query("SELECT pg_try_advisory_lock(%s)", key)[0][0]:
            if wait is None or wait.wait(STANDBY_POLL_S):
                holders = ", ".join(row[0] for row in self.query(_HOLDER, key)) or "a session that just ended"
                raise LedgerError(
                    f"{self._address.name}: account {account!r}: expected to be free, was held by {holders}: one "
                    "process writes at a time; end it first, or open the ledger for reading"
                )


# Accounts share a database with whatever else takes advisory locks there.
def _lock_key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"detent ledger {name}".encode()).digest()[:8], "big", signed=True)
