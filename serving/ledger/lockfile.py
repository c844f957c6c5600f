"""A lock on a file that names its holder; the kernel releases it when the process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from serving.errors import LedgerError


class LockFile:
    """Holds `path` from construction to `release`.

    Raises: LedgerError saying who holds it, or why it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without O_TRUNC: whoever loses must still be able to read the holder's name.
            self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise LedgerError(f"{path}: cannot lock the ledger for writing: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 4096, 0).decode(errors="replace").strip() or "a process that left no name"
            os.close(self._fd)
            if error.errno != errno.EWOULDBLOCK:
                raise LedgerError(f"{path}: cannot lock the ledger for writing: {error.strerror}") from error
            raise LedgerError(
                f"{path}: expected to be free, was held by {holder}: one process writes at a time; end it first, or "
                "open the ledger for reading"
            ) from error
        since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._name(self._fd, f"pid {os.getpid()} on {socket.gethostname()} since {since}\n")

    def release(self) -> None:
        """Give it back; twice does nothing. The file stays, or two processes could lock two files of one name."""
        if self._fd is not None:
            self._name(self._fd, "")
            # Closing alone would leave the lock with any child that still has a copy of the descriptor.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = None

    # What the file says is for people; a disk too full to say it stops nobody.
    @staticmethod
    def _name(fd: int, text: str) -> None:
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, text.encode(), 0)
        except OSError:
            return
