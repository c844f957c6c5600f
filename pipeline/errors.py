"""Errors of a nightly run, and the exit code each one ends in.

Exception
└── PipelineError
    ├── LockedError            another run holds the work directory (75)
    └── TrackingUnavailable    the tracking server or registry cannot be used now (69)

The codes follow sysexits.h where it has one, so that a scheduler can tell "try again" (69, 75) from "call a
person" (65, 70, 78).
"""

from __future__ import annotations

import errno
from enum import IntEnum

from configs.errors import ConfigError
from data.errors import DataError
from masking import RuleError
from serving.errors import BundleError, LedgerError


class ExitCode(IntEnum):
    """What the process returns to the scheduler."""

    PROMOTED = 0
    CHAMPION_KEPT = 10
    ALREADY_DONE = 11
    BAD_DATA = 65
    UNAVAILABLE = 69
    BUG = 70
    LOCKED = 75
    BAD_CONFIG = 78


class PipelineError(Exception):
    """Base of the errors of a run."""


class LockedError(PipelineError):
    """Another run holds the work directory."""


class TrackingUnavailable(PipelineError):  # noqa: N818  (a state of the service, not a mistake of ours)
    """The tracking server or registry cannot be reached, or its storage cannot be used."""


_BY_TYPE: tuple[tuple[type[BaseException], ExitCode], ...] = (
    (ConfigError, ExitCode.BAD_CONFIG),
    (RuleError, ExitCode.BAD_CONFIG),
    (DataError, ExitCode.BAD_DATA),
    # A bundle that does not verify is bad input, wherever it comes from.
    (BundleError, ExitCode.BAD_DATA),
    (LedgerError, ExitCode.UNAVAILABLE),
    (LockedError, ExitCode.LOCKED),
    (TrackingUnavailable, ExitCode.UNAVAILABLE),
    # A work directory that cannot be written is a setting to correct, not a service to wait for.
    (PermissionError, ExitCode.BAD_CONFIG),
    (NotADirectoryError, ExitCode.BAD_CONFIG),
    # So is an output path that is taken.
    (FileExistsError, ExitCode.BAD_CONFIG),
    (IsADirectoryError, ExitCode.BAD_CONFIG),
    (ConnectionError, ExitCode.UNAVAILABLE),
    (TimeoutError, ExitCode.UNAVAILABLE),
)
_BY_ERRNO = {
    errno.EROFS: ExitCode.BAD_CONFIG,
    errno.ENOSPC: ExitCode.UNAVAILABLE,
    errno.EDQUOT: ExitCode.UNAVAILABLE,
    errno.EFBIG: ExitCode.UNAVAILABLE,
    # Whoever has the address may go away; an address that is not this machine's stays so.
    errno.EADDRINUSE: ExitCode.UNAVAILABLE,
    errno.EADDRNOTAVAIL: ExitCode.BAD_CONFIG,
}


def exit_code_for(error: BaseException) -> ExitCode:
    """Exit code of an error: its own, else that of the nearest explicit cause, else 70 (a bug).

    Only `raise ... from cause` counts as a cause: an error that merely happened while another one was handled
    is a bug of its own.
    """
    link: BaseException | None = error
    while link is not None:
        for kind, code in _BY_TYPE:
            if isinstance(link, kind):
                return code
        if isinstance(link, OSError) and link.errno in _BY_ERRNO:
            return _BY_ERRNO[link.errno]
        link = link.__cause__
    return ExitCode.BUG
