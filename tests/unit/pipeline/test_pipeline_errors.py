"""Every way a run can end has the exit code that the scheduler was promised."""

from __future__ import annotations

import errno
import os

import pytest

from configs.errors import ConfigError
from data.errors import DataError
from pipeline.errors import ExitCode, LockedError, TrackingUnavailable, exit_code_for


def test_codes_are_the_documented_numbers() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "PROMOTED": 0,
        "CHAMPION_KEPT": 10,
        "ALREADY_DONE": 11,
        "BAD_DATA": 65,
        "UNAVAILABLE": 69,
        "BUG": 70,
        "LOCKED": 75,
        "BAD_CONFIG": 78,
    }


class NarrowDataError(DataError):
    """A subclass as the data package has several."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("seed"), 78),
        (DataError("bars"), 65),
        (NarrowDataError("bars"), 65),
        (LockedError("var"), 75),
        (TrackingUnavailable("http://host"), 69),
        (PermissionError(errno.EACCES, "denied", "var"), 78),
        (NotADirectoryError(errno.ENOTDIR, "file", "var"), 78),
        (OSError(errno.EROFS, "read-only", "var"), 78),
        (OSError(errno.ENOSPC, "full", "var"), 69),
        (OSError(errno.EDQUOT, "quota", "var"), 69),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), 69),
        (TimeoutError("slow"), 69),
        (OSError(errno.EIO, "broken disk"), 70),
        (FileNotFoundError(errno.ENOENT, "absent"), 70),
        (ValueError("plain"), 70),
        (AssertionError(), 70),
        (ZeroDivisionError(), 70),
    ],
    ids=repr,
)
def test_error_ends_in_its_code(error: Exception, code: int) -> None:
    assert exit_code_for(error) == code


def test_an_explicit_cause_decides_where_the_error_itself_is_unknown() -> None:
    error = RuntimeError("saving failed")
    error.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert exit_code_for(error) == ExitCode.UNAVAILABLE


def test_the_outermost_known_error_wins_over_its_cause() -> None:
    error = DataError("bars.csv: not readable")
    error.__cause__ = PermissionError(errno.EACCES, "denied")
    assert exit_code_for(error) == ExitCode.BAD_DATA


def test_an_error_while_handling_another_one_is_a_bug() -> None:
    error = KeyError("typo in a handler")
    error.__context__ = DataError("bars")
    assert exit_code_for(error) == ExitCode.BUG
