"""What the commands share: consoles, one line per failure, one JSON object per result."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console

from configs import ConfigError
from masking.declare import import_rule_modules
from pipeline.errors import ExitCode, exit_code_for

INTERRUPTED = 130

BundleOption = Annotated[Path, typer.Option("--bundle", "-b", help="Bundle directory.")]
RuleModules = Annotated[
    list[str] | None,
    typer.Option("--rule-module", metavar="MODULE", help="Python module with rules of your own; may be repeated."),
]


# Not the checks of Typer, whose messages leave the value out or put noise in front.
def one_of(choices: Any) -> dict[str, Any]:
    """Settings of a `typer.Option` whose value is one of those of a `Literal`."""
    known = get_args(choices)

    def parse(value: str) -> str:
        if value not in known:
            raise typer.BadParameter(f"expected one of {', '.join(map(repr, known))}, was {value!r}")
        return value

    return {"parser": parse, "metavar": f"[{'|'.join(known)}]"}


def whole_number(*, at_least: int) -> dict[str, Any]:
    """Settings of a `typer.Option` whose value is a whole number, 0 or more."""

    def parse(value: str | int) -> int:
        if not str(value).isdecimal() or int(value) < at_least:
            raise typer.BadParameter(f"expected a whole number of at least {at_least}, was {str(value)!r}")
        return int(value)

    return {"parser": parse, "metavar": "NUMBER"}


def positive_number() -> dict[str, Any]:
    """Settings of a `typer.Option` whose value is a finite number above 0."""

    def parse(value: str | float) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number > 0.0):
            raise typer.BadParameter(f"expected a number above 0, was {str(value)!r}")
        return number

    return {"parser": parse, "metavar": "NUMBER"}


stdout = Console()
stderr = Console(stderr=True)


def import_rules(modules: list[str] | None) -> None:
    """Import the modules named by `--rule-module`. Raises: RuleError."""
    import_rule_modules(modules or (), origin="--rule-module")


def check_output_file(option: str, path: Path | None) -> None:
    """Refuse a file that cannot be written before minutes go into its content; its folder is created.

    Raises: ConfigError.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{option}: expected a file, was the directory {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):  # permission bits do not tell of read-only file systems
            pass
    except OSError as error:
        # mkdir says "File exists" of a file where a folder belongs.
        reason = os.strerror(errno.ENOTDIR) if isinstance(error, FileExistsError) else error.strerror
        raise ConfigError(f"{option}: expected a file in a folder that can be written, was {path}: {reason}") from error


@contextmanager
def reported(as_json: bool, *, resumable: bool = False) -> Iterator[None]:
    """Turn every failure into one readable line, its exit code, and with --json an object on standard output.

    Args: resumable: an interrupted command continues when it is started again, and may say so.
    """
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        # Shells and schedulers often signal twice. Python restores the default handlers while it shuts down: a second
        # signal would replace the exit code that is reported here by death from that signal.
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_IGN)
        if as_json:
            emit({"status": "interrupted", "exit_code": INTERRUPTED})
        advice = "; start again to continue after the last finished stage" if resumable else ""
        stderr.print(f"interrupted{advice}")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        code = exit_code_for(error)
        if as_json:
            emit({"status": "error", "exit_code": int(code), "error": str(error), "kind": type(error).__name__})
        stderr.print(f"[red]{type(error).__name__}[/]:", end=" ")
        stderr.print(str(error), markup=False, highlight=False, soft_wrap=True)
        if code == ExitCode.BUG:
            stderr.print(traceback.format_exc(), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(int(code)) from error


def emit(entries: dict[str, Any]) -> None:
    """Write one JSON object on standard output."""
    sys.stdout.write(json.dumps(entries, allow_nan=False, sort_keys=True) + "\n")
    sys.stdout.flush()
