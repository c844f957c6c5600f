"""One run per work directory.

The lock is `flock(2)` on a file: the kernel releases it when the process ends, however it ends, so a crash at
night never leaves a stale lock behind. What the file says is for people; only the kernel's lock counts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.errors import LockedError

LOCK_NAME = ".lock"


def create_workdir(path: Path) -> None:
    """Create a work directory and its parents where missing.

    Raises: NotADirectoryError where the path is a file (mkdir's own FileExistsError would say the opposite of
    what is wrong); OSError where it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "expected a work directory, was a file", str(path)) from error
    except FileNotFoundError as error:
        raise NotADirectoryError(errno.ENOTDIR, "expected a place for a work directory", str(path)) from error


class WorkdirLock:
    """Context manager that holds a work directory, which is created where it is missing.

    Raises on entry: LockedError saying who holds it; NotADirectoryError where the path is a file; OSError where
    the directory cannot be created or written.
    """

    def __init__(self, workdir: str | Path) -> None:
        self.workdir = Path(workdir)
        self.path = self.workdir / LOCK_NAME
        self._fd: int | None = None

    def __enter__(self) -> Self:
        if self._fd is not None:
            raise LockedError(f"{self.workdir}: expected one lock per object, was entered twice")
        create_workdir(self.workdir)
        # Opened without O_TRUNC: a second process must not wipe the holder's name before it knows it lost.
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 4096, 0).decode(errors="replace").strip() or "a process that left no name"
            os.close(fd)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise LockedError(f"{self.workdir}: expected to be free, was held by {holder}") from error
            raise
        self._fd = fd
        since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        _write(fd, f"pid {os.getpid()} on {socket.gethostname()} since {since}\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None:
            # The file stays: unlinking it would let two processes lock two files of the same name.
            _write(self._fd, "")
            # Closing alone would leave the lock with any child that still has a copy of the descriptor.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = None


# A full disk must not stop a run whose lock is already held, nor turn its result into an error.
def _write(fd: int, text: str) -> None:
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, text.encode(), 0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
