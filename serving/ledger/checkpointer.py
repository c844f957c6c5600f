"""Moves entries from SQLite's log into the file, in a thread of its own: a decision does not wait for that.

Left to itself SQLite does it within the append that makes the log long enough, which takes some ten milliseconds.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
LONG_LOG = 8192
"""Pages of 4 KiB; a log that is longer is emptied while appends wait, or it would grow as long as they come."""


class Checkpointer:
    """Works from construction to `close`.

    Args: lock: held by whoever appends.
    """

    def __init__(self, path: Path, lock: threading.RLock) -> None:
        self._path, self._lock = path, lock
        self._stop = threading.Event()
        self._limit = LONG_LOG
        self._thread = threading.Thread(target=self._work, name="ledger-checkpoints", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. Not with the lock held."""
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        connection = sqlite3.connect(f"{self._path.as_uri()}?mode=rw", uri=True, isolation_level=None)
        with closing(connection):
            while not self._stop.wait(INTERVAL_S):
                try:
                    self._limit = checkpoint(connection, self._lock, self._limit)
                except sqlite3.Error as error:
                    # The log still holds every entry; appends fail by themselves where there is no room for it.
                    log.warning("%s: checkpoint: %s", self._path, error)


def checkpoint(connection: sqlite3.Connection, lock: threading.RLock, limit: int = LONG_LOG) -> int:
    """Move what can be moved; empty a log of `limit` pages or more. Returns: the next limit. Raises: sqlite3.Error."""
    pages, moved = _checkpoint(connection)
    if pages < limit or moved == pages:
        return LONG_LOG
    with lock:
        pages, moved = _checkpoint(connection)
    # A reader that stays where it is keeps the log; appends do not wait for it each time.
    return LONG_LOG if moved == pages else pages + LONG_LOG


def _checkpoint(connection: sqlite3.Connection) -> tuple[int, int]:
    _, pages, moved = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return pages, moved
