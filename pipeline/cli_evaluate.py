"""`detent evaluate`: policies compared, with intervals, to a verdict people can act on."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from configs import load_config
from pipeline.cli_output import emit, reported, stdout

Engine = Literal["serial", "joblib", "ray"]

SUITES = {"standard": "suite", "smoke": "suite-smoke"}
"""Frozen suites by name, and their profiles."""

COLOURS = {"GO": "green", "CONDITIONAL": "yellow", "NO-GO": "red"}


def evaluate(
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            metavar="NAME",
            help=f"A frozen suite on simulated markets: {', '.join(SUITES)}. Without it: walk-forward over real bars.",
        ),
    ] = None,
    profile: Annotated[
        str,
        typer.Option("--profile", "-p", help="Profile of the walk-forward (default, smoke) or path of a YAML file."),
    ] = "default",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one setting, e.g. data.source.symbol=nasdaq."),
    ] = None,
    workdir: Annotated[
        Path, typer.Option("--workdir", "-w", help="Everything is written below this folder (created).")
    ] = Path("var"),
    engine: Annotated[
        Engine, typer.Option(help="joblib: the cores of this machine; ray: a cluster (pip install detent[ray]).")
    ] = "joblib",
    jobs: Annotated[int | None, typer.Option(min=1, help="Tasks at once; the number of cores if left out.")] = None,
    tune: Annotated[
        str | None,
        typer.Option(
            metavar="LEARNER",
            help="Instead of an evaluation, try settings of one learner on the suite's validation markets.",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Settings tried by --tune, those in force included.")] = 12,
    runs: Annotated[int, typer.Option(min=1, help="Training runs of each trial.")] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be computed, write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")] = False,
) -> None:
    """Compare policies on equal terms and give a verdict: GO, CONDITIONAL or NO-GO, each with its reasons.

    What was finished is kept: an interrupted evaluation goes on where it stopped. The exit code is 0 whatever the
    verdict is; scripts read it from --json.
    """
    with reported(as_json, resumable=not dry_run):
        if suite is not None and suite not in SUITES:
            raise typer.BadParameter(f"expected one of {', '.join(SUITES)}, was {suite!r}", param_hint="--suite")
        if tune is not None and suite is None:
            raise typer.BadParameter(
                "expected --suite beside it: settings are tried on its markets", param_hint="--tune"
            )
        config = load_config(profile if suite is None else SUITES[suite], overrides or ())
        from pipeline import evaluate as evaluation

        if dry_run:
            _print_plan(evaluation.planned(config, suite is not None), as_json)
            return
        from pipeline.progress import Reporter

        job = evaluation.Job(engine, jobs or len(os.sched_getaffinity(0)), Reporter(quiet=quiet))
        if tune is not None:
            ranked = evaluation.tune(config, workdir, job, tune, trials=trials, runs=runs)
            if as_json:
                emit({"status": "tuned", "exit_code": 0, "learner": tune, "trials": [vars(one) for one in ranked]})
            else:
                _print_trials(tune, ranked)
            return
        run = evaluation.evaluate_walk_forward if suite is None else evaluation.evaluate_suite
        found = run(config, workdir, job, shlex.join(["detent", *sys.argv[1:]]))
        if as_json:
            emit(found.to_dict())
        else:
            _print_verdict(found)


def _print_plan(labels: list[str], as_json: bool) -> None:
    if as_json:
        emit({"status": "dry_run", "exit_code": 0, "tasks": labels})
        return
    for label in labels:
        stdout.print(f"  {label}", markup=False, highlight=False)
    stdout.print(f"{len(labels)} tasks")


def _print_trials(learner: str, ranked: list[Any]) -> None:
    table = Table(title=f"{learner}, best validation score first", title_justify="left")
    for header in ("score", "of each run", "fit, s", "settings"):
        table.add_column(header, justify="left" if header == "settings" else "right")
    for trial in ranked:
        said = " ".join(f"{name}={value}" for name, value in trial.settings.items()) or "those in force"
        each = " ".join(f"{score:.3f}" for score in trial.scores)
        table.add_row(f"{trial.score:.3f}", each, f"{trial.seconds:.0f}", said)
    stdout.print(table)


def _print_verdict(found: Any) -> None:
    report = found.report
    table = Table(title=report.title, title_justify="left")
    for index, column in enumerate(report.results.columns[:8]):
        table.add_column(column.label, justify="left" if index < 2 else "right")
    for row in report.results.rows:
        table.add_row(*(_cell(cell, column) for cell, column in zip(row[:8], report.results.columns, strict=False)))
    stdout.print(table)
    verdict = report.verdict
    stdout.print(f"[{COLOURS[verdict.decision]}]{verdict.decision}[/]", end=" ")
    stdout.print(verdict.headline.partition(": ")[2], markup=False, highlight=False)
    for criterion in verdict.criteria:
        mark = {True: "[green]passed[/]   ", False: "[red]missed[/]   ", None: "[yellow]undecided[/]"}[criterion.passed]
        stdout.print(f"  {mark}", end=" ")
        stdout.print(f"{criterion.name}: {criterion.reason}", markup=False, highlight=False)
    stdout.print(verdict.next_step, markup=False, highlight=False)
    stdout.print(f"report {found.files.html}", soft_wrap=True)


def _cell(cell: Any, column: Any) -> str:
    from evaluation.report.display import number

    if cell is None:
        return "-"
    if hasattr(cell, "estimate"):
        ends = (number(cell.low, column.format), number(cell.high, column.format))
        return f"{number(cell.estimate, column.format)} ({ends[0]} to {ends[1]})"
    return number(cell, column.format) if isinstance(cell, float) else str(cell)
