"""What `detent bench` shows of its reports, and options that its commands share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from configs import ConfigError
from data.files import atomic_write_json
from pipeline.cli_output import stdout

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Small counts: does it run at all? The numbers mean nothing.")]

PeerPython = Annotated[
    Path | None, typer.Option(help="Interpreter that has the peers, e.g. of an environment of their own.")
]

Rows = list[tuple[str, ...]]
WorkTable = tuple[str, tuple[str, ...], Rows]
"""Title, headers, rows."""

TITLES = {
    "epoch": "one epoch of {transitions:,} transitions, batch {batch:,}",
    "imagine": "imagine {rows:,} rows x {horizon} bars, all members, penalty",
    "sample": "imagine {rows:,} rows x {horizon} bars, one member per row (TS1)",
}


def world_model_tables(speed: Mapping[str, Any], reuse: float, year: Mapping[str, Any] | None) -> list[WorkTable]:
    """Tables of the reports' dictionaries.

    Args: reuse: how often training uses an imagined bar; year None leaves the fit of a year out.
    """
    tables = [_contenders(task, speed) for task in TITLES]
    tables.append(_branches(speed, reuse))
    if year is not None:
        tables.append(
            (
                f"{year['transitions']:,} transitions to early stop, {year['epochs']} epochs, {year['threads']} thread",
                ("", "found", "goal"),
                [
                    ("seconds", f"{year['seconds']:.0f}", f"{year['goal_s']:.0f}"),
                    ("processor seconds", f"{year['processor_seconds']:.0f}", "-"),
                    ("peak memory, GiB", f"{year['peak_gib']:.2f}", f"{year['goal_gib']:g}"),
                    ("nats better than a constant Gaussian", f"{year['holdout_nll_gain']:.3f}", "-"),
                ],
            )
        )
    return tables


def _contenders(task: str, speed: Mapping[str, Any]) -> WorkTable:
    rows: Rows = []
    for timing in speed["timings"]:
        if timing["task"] == task:
            ratios = speed["ratios"][task][timing["contender"]]
            rows.append(
                (
                    timing["contender"],
                    f"{timing['median'] * 1e3:.1f}",
                    f"{timing['lowest'] * 1e3:.1f}-{timing['highest'] * 1e3:.1f}",
                    f"{timing['wall_median'] * 1e3:.1f}",
                    f"{ratios['to_floor']:.2f}",
                    f"{ratios['detent_to_it']:.2f}",
                )
            )
    title = TITLES[task].format(**speed["shapes"]) + ", processor milliseconds"
    return title, ("", "median", "range", "wall", "to products", "Detent to it"), rows


# A step used in training: peers imagine it anew for every update, Detent takes it from its pool.
def _branches(speed: Mapping[str, Any], reuse: float) -> WorkTable:
    steps = speed["shapes"]["rows"] * speed["shapes"]["horizon"]
    rows: Rows = []
    for timing in speed["timings"]:
        cost = timing["median"] / steps * 1e6
        if timing["contender"] == "Detent" and timing["task"] == "imagine":
            rows.append((f"Detent, each imagined bar used {reuse:.1f} times", f"{cost / reuse:.2f}"))
        elif timing["contender"] not in ("Detent", "matrix products") and timing["task"] in ("imagine", "sample"):
            rows.append((f"{timing['contender']}, {timing['task']}", f"{cost:.2f}"))
    return "Imagining one step used in training, processor microseconds", ("", "microseconds"), rows


def check_peer_python(peers: bool, python: Path | None) -> None:
    """Refuse an interpreter that is not used or not there. Raises: ConfigError."""
    if python is not None and not peers:
        raise ConfigError("--peer-python: expected --peers beside it, was alone")
    if python is not None and not python.is_file():
        raise ConfigError(f"--peer-python: expected an interpreter, was {python}")


def with_interval(estimate: float, low: float | None, high: float | None, form: str) -> str:
    """An estimate with its interval in brackets, where it has one."""
    if low is None or high is None:
        return format(estimate, form)
    return f"{estimate:{form}} ({low:{form}} to {high:{form}})"


def goal_of(microseconds: float | None) -> str:
    """A goal, or a dash."""
    return "-" if microseconds is None else f"{microseconds:g}"


def show(title: str, headers: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table; names stand left, figures right."""
    table = Table(title=title, title_justify="left")
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    stdout.print(table)


def finish(report: Any, json_file: Path | None) -> None:
    """Say on what machine it was measured and write the report, if a file is wanted."""
    stdout.print(", ".join(f"{key}: {value}" for key, value in {**report.machine, **report.versions}.items()))
    if json_file is not None:
        atomic_write_json(json_file, report.to_dict())
