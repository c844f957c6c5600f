"""`detent evaluate`: policies compared, with intervals, to a verdict people can act on."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from configs import load_config
from pipeline.caches import keep_caches_in, no_caches
from pipeline.cli_output import emit, one_of, reported, stdout, whole_number
from pipeline.lock import create_workdir

if TYPE_CHECKING:
    from benchmarks.tuning import Trial
    from evaluation.report import Report
    from pipeline.evaluate import Evaluated

# Written out, because their homes import torch: tests hold them equal.
Engine = Literal["serial", "joblib", "ray"]
Suite = Literal["standard", "smoke"]
Learner = Literal["model_free", "sac", "masked_dqn", "mbpo"]

PROFILES: dict[Suite, str] = {"standard": "suite", "smoke": "suite-smoke"}
"""Profiles of the frozen suites."""
TRIALS, RUNS = 12, 2
DEFAULT_PROFILE = "default"
"""Of a walk-forward."""
FITTING = 4
"""Columns of the summary that fit a terminal of 80; the report has them all."""
COLOURS = {"GO": "green", "CONDITIONAL": "yellow", "NO-GO": "red"}
MARK_COLOURS = {True: "green", False: "red", None: "yellow"}


def evaluate(
    suite: Annotated[
        Suite | None,
        typer.Option(
            help="A frozen suite on simulated markets; without it a walk-forward over real bars.", **one_of(Suite)
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            "-p",
            help="Profile of the walk-forward (default, smoke) or path of a YAML file; a suite has its own.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one setting, e.g. data.source.symbol=nasdaq."),
    ] = None,
    workdir: Annotated[
        Path, typer.Option("--workdir", "-w", help="Everything is written below this folder (created).")
    ] = Path("var"),
    engine: Annotated[
        Engine,
        typer.Option(
            help="joblib: the cores of this machine; ray: a cluster (pip install detent\\[ray]).", **one_of(Engine)
        ),
    ] = "joblib",
    jobs: Annotated[
        int | None, typer.Option(help="Tasks at once; the number of cores if left out.", **whole_number(at_least=1))
    ] = None,
    tune: Annotated[
        Learner | None,
        typer.Option(
            help="Instead of an evaluation, try settings of a learner on the suite's validation markets.",
            **one_of(Learner),
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(help=f"Settings tried by --tune, those in force included; {TRIALS}.", **whole_number(at_least=1)),
    ] = None,
    runs: Annotated[
        int | None, typer.Option(help=f"Training runs of each trial; {RUNS}.", **whole_number(at_least=1))
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be computed, write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")] = False,
) -> None:
    """Compare policies on equal terms and give a verdict: GO, CONDITIONAL or NO-GO, each with its reasons.

    What was finished is kept: an interrupted evaluation goes on where it stopped. The exit code is 0 whatever the
    verdict is; scripts read it from --json.
    """
    if suite is not None and profile is not None:
        raise typer.BadParameter("expected none beside --suite; change single settings by --set", param_hint="-p")
    if suite is None and tune is not None:
        raise typer.BadParameter("expected --suite beside it: settings are tried on its markets", param_hint="--tune")
    if tune is None and (trials is not None or runs is not None):
        raise typer.BadParameter("expected --tune beside them", param_hint="--trials, --runs")
    with reported(as_json, resumable=not dry_run):
        name = (profile or DEFAULT_PROFILE) if suite is None else PROFILES[suite]
        config = load_config(name, overrides or ())
        if dry_run:
            with no_caches():
                from pipeline import evaluate as evaluation

                tuning = None if tune is None else evaluation.Tuning(tune, trials or TRIALS, runs or RUNS)
                plan = evaluation.planned(config, workdir, is_suite=suite is not None, tuning=tuning, engine=engine)
                _print_plan(plan, as_json)
            return
        create_workdir(workdir)
        keep_caches_in(workdir)
        from pipeline import evaluate as evaluation
        from pipeline.progress import Reporter

        cores = len(os.sched_getaffinity(0))
        job = evaluation.Job(engine=engine, jobs=jobs or cores, reporter=Reporter(quiet=quiet))
        if tune is not None:
            _print_trials(
                tune,
                evaluation.tune(config, workdir, job, evaluation.Tuning(tune, trials or TRIALS, runs or RUNS)),
                as_json,
            )
            return
        run = evaluation.evaluate_walk_forward if suite is None else evaluation.evaluate_suite
        found = run(config, workdir, job, _command(suite, name, overrides or ()))
        if as_json:
            emit(found.to_dict())
        else:
            _print_verdict(found)


# Without work directory and engine, which do not change the numbers.
def _command(suite: Suite | None, profile: str, overrides: Sequence[str]) -> str:
    what = ["--profile", profile] if suite is None else ["--suite", suite]
    return shlex.join(["detent", "evaluate", *what, *(part for one in overrides for part in ("--set", one))])


def _print_plan(tasks: Mapping[str, bool], as_json: bool) -> None:
    if as_json:
        listed = [{"label": label, "stored": stored} for label, stored in tasks.items()]
        emit({"status": "dry_run", "exit_code": 0, "tasks": listed})
        return
    for label, stored in tasks.items():
        stdout.print(f"  {label}{'  (stored)' * stored}", markup=False, highlight=False)
    stdout.print(f"{len(tasks)} tasks, {sum(tasks.values())} of them stored", highlight=False)


def _print_trials(learner: str, ranked: Sequence[Trial], as_json: bool) -> None:
    if as_json:
        trials = [
            {
                "settings": trial.settings,
                "score": _finite(trial.score),
                "scores": [_finite(score) for score in trial.scores],
                "seconds": trial.seconds,
            }
            for trial in ranked
        ]
        emit({"status": "tuned", "exit_code": 0, "learner": learner, "trials": trials})
        return
    table = _table(f"{learner}, best validation score first")
    for header in ("score", "of each run", "fit, s"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("settings")
    for trial in ranked:
        said = "\n".join(f"{name}={value}" for name, value in trial.settings.items()) or "those in force"
        each = " ".join(f"{score:.3f}" for score in trial.scores)
        table.add_row(f"{trial.score:.3f}", each, f"{trial.seconds:.0f}", said)
    stdout.print(table)


def _print_verdict(found: Evaluated) -> None:
    from evaluation.report.display import VERDICT_MARKS, criterion_name, headline, prose, sentence

    stdout.print(_results(found.report))
    verdict = found.report.verdict
    for caveat in found.report.caveats:
        stdout.print(Text(f"! {prose(caveat)}", style="bold yellow"))
    said = prose(headline(verdict))
    stdout.print(Text.assemble((verdict.decision, f"bold {COLOURS[verdict.decision]}"), " ", said))
    criteria = Table.grid(padding=(0, 2, 0, 0))
    for criterion in verdict.criteria:
        sign, meaning = VERDICT_MARKS[criterion.passed]
        mark = Text(sign, style=MARK_COLOURS[criterion.passed])
        criteria.add_row(mark, criterion_name(criterion), meaning, Text(prose(sentence(criterion.reason))))
    stdout.print(criteria)
    stdout.print(prose(verdict.next_step), markup=False, highlight=False)
    # Unwrapped, so that it can be copied.
    stdout.print(f"report {found.files.html}", soft_wrap=True, highlight=False)


# The interval of the Sharpe ratio alone: another one would not fit.
def _results(report: Report) -> Table:
    from evaluation.report.display import words
    from evaluation.statistics import Interval

    table = _table(report.title)
    shown = [(index, report.results.columns[index]) for index in report.summary_places[:FITTING]]
    for index, column in shown:
        table.add_column(column.label, justify="right" if index else "left", no_wrap=True)
    for row in report.results.rows:
        cells = []
        for index, column in shown:
            cell, form = row[index], column.format
            if not isinstance(cell, Interval):
                cells.append(words(cell, form))
            elif column.label == "Sharpe" and math.isfinite(cell.low):
                cells.append(f"{words(cell.estimate, form)} ({words(cell.low, form)} to {words(cell.high, form)})")
            else:
                cells.append(words(cell.estimate, form))
        table.add_row(*map(Text, cells))
    return table


def _table(title: str) -> Table:
    # As text: a symbol of the user's own may look like markup.
    return Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
