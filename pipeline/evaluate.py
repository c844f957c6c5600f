"""`detent evaluate`: the suite on known markets, or a walk-forward over real bars, to a verdict and a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.findings import Findings, size_findings, suite_findings
from benchmarks.folds import Engine, FoldResult, FoldTask, Work, check_engine, run_folds
from benchmarks.machine import machine
from benchmarks.suite import plan_suite, suite_tasks, work_on_cell
from benchmarks.tuning import Trial, draw_trials, rank_trials, tuning_tasks, work_on_trial
from benchmarks.walk_forward import first_runs, fold_tasks, join_folds, panel_of, plan_folds, work_on_fold
from configs import ConfigError, DetentConfig, config_hash, flat_values, load_config, resolved_yaml
from data import FeatureTable, atomic_write_text, canonical_json, sha256_bytes
from envs import REWARDS, TradingDynamics
from envs.synthetic import MARKET_FIELDS, transition_matrix
from evaluation.report import Report, ReportFiles, write_report
from pipeline.errors import ExitCode, TrackingUnavailable
from pipeline.inputs import RunInputs, check_extra_rules, load_inputs
from pipeline.lock import WorkdirLock, create_workdir
from pipeline.progress import Reporter
from pipeline.provenance import git_commit, library_versions, rule_sources
from pipeline.tracking import Tracker

MOST_NAMED = 5
"""Changed settings that a report names; their number says the rest."""
EXPERIMENT = "detent-evaluation"
"""Of the MLflow runs."""
SUITE = "suite"
SMOKE = ("suite-smoke", "smoke")
"""Profiles whose numbers mean nothing."""
FOLDER = "evaluations"
"""Below the work directory: a folder for each report, and `cells` with the results they are written from."""


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation came to."""

    report: Report
    files: ReportFiles
    findings: Findings
    run_key: str
    """Names what was computed: tasks and settings."""
    computed: int
    """Tasks computed now; the others were read back."""
    resumed: int
    """Tasks whose results were found."""
    run_id: str | None
    """MLflow run."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: caveats, the verdict, that of every training length of a suite, and where the report lies."""
        sizes = {str(bars): str(one.claim.verdict.decision) for bars, one in self.findings.sizes.items() if bars}
        return {
            "status": "evaluated",
            "exit_code": int(ExitCode.PROMOTED),
            "caveats": list(self.report.caveats),
            "verdict": self.findings.main.claim.verdict.to_dict(),
            "by_train_bars": sizes,
            "tasks": {"computed": self.computed, "resumed": self.resumed},
            "report": str(self.files.html),
            "numbers": str(self.files.json),
            "summary": str(self.files.summary),
            "run_key": self.run_key,
            "run_id": self.run_id,
        }


@dataclass(frozen=True, kw_only=True)
class Job:
    """How an evaluation is computed; nothing here changes its numbers."""

    engine: Engine = "joblib"
    jobs: int = 1
    """Tasks computed at once."""
    reporter: Reporter | None = None
    track: bool = True
    """Log to MLflow."""


@dataclass(frozen=True)
class Tuning:
    """Settings of one learner, tried on the suite's validation markets."""

    learner: str
    trials: int = 12
    """The settings in force included."""
    runs: int = 2
    """Training runs of each trial."""

    def tasks(self, config: DetentConfig) -> tuple[list[dict[str, Any]], list[FoldTask]]:
        """The trials and their tasks. Raises: ConfigError on a learner or number of trials that cannot be tried."""
        _check_market(config)
        drawn = draw_trials(self.learner, self.trials, config.seed)
        bars = config.evaluation.suite.primary_train_bars
        return drawn, tuning_tasks(config, self.learner, drawn, train_bars=bars, runs=self.runs)


def planned(
    config: DetentConfig, workdir: Path, *, is_suite: bool, tuning: Tuning | None = None, engine: Engine = "joblib"
) -> dict[str, bool]:
    """Label of every task -> whether its result is stored; nothing is written.

    Raises: as `evaluate_suite`, `evaluate_walk_forward` and `tune` before they compute anything, and ConfigError on an
        engine that is not installed.
    """
    check_engine(engine)
    if tuning is not None:
        tasks = tuning.tasks(config)[1]
    elif is_suite:
        tasks = _tasks_of_suite(config)
    else:
        tasks = _tasks_of_walk_forward(config, load_inputs(config))
    return {task.label: (_cells(workdir) / task.key).exists() for task in tasks}


def evaluate_suite(config: DetentConfig, workdir: Path, job: Job, command: str) -> Evaluated:
    """Run every cell of the suite that is not stored yet and write the report.

    Args: command: shell command that gives the same numbers, for the report.
    Raises: ConfigError, RuleError, LockedError, TrackingUnavailable, OSError, FoldError; `exit_code_for` maps them.
    """
    tasks = _tasks_of_suite(config)

    def conclude(results: Sequence[FoldResult]) -> tuple[Findings, Report]:
        from benchmarks.report import suite_report

        findings = suite_findings(config, results, plan_suite(config))
        title = "Detent: masked model-based against model-free policies on known markets"
        facts = _facts(config, results)
        return findings, suite_report(config, findings, title=title, reproduce=(command,), facts=facts)

    return _evaluate(SUITE, config, workdir, tasks, work_on_cell, conclude, job)


def evaluate_walk_forward(config: DetentConfig, workdir: Path, job: Job, command: str) -> Evaluated:
    """Run every fold over the bars of the config that is not stored yet and write the report.

    Raises: as `evaluate_suite`, and DataError for anything wrong with the bars.
    """
    inputs = load_inputs(config)
    table = inputs.table
    tasks = _tasks_of_walk_forward(config, inputs)

    def conclude(results: Sequence[FoldResult]) -> tuple[Findings, Report]:
        from benchmarks.report import walk_forward_report
        from benchmarks.report_pictures import fold_market

        policies = join_folds(results, tasks)
        size = size_findings(config, policies, 0, config.data.bars_per_year)
        findings = Findings(sizes={0: size}, primary=0, first_path=first_runs(results, tasks))
        folds = plan_folds(config, len(table))
        report = walk_forward_report(
            config,
            findings,
            fold_market(panel_of(table), [fold.test for fold in folds]),
            [{name: _span(table, window) for name, window in asdict(fold).items()} for fold in folds],
            title=f"Detent: walk-forward over {config.data.source.symbol}",
            reproduce=(command,),
            facts=_facts(config, results) | {"data": inputs.data_hash},
        )
        return findings, report

    return _evaluate("walk-forward", config, workdir, tasks, work_on_fold, conclude, job)


def tune(config: DetentConfig, workdir: Path, job: Job, tuning: Tuning) -> list[Trial]:
    """Try settings of one learner on the suite's validation markets, best first; finished trials are kept.

    Raises: ConfigError, RuleError, LockedError, OSError, FoldError.
    """
    drawn, tasks = tuning.tasks(config)
    reporter = job.reporter or Reporter(quiet=True)
    root = Path(workdir).resolve()
    create_workdir(root)
    try:
        with WorkdirLock(root):
            return rank_trials(drawn, _run("trials", tasks, work_on_trial, root, job, reporter))
    finally:
        reporter.close()


def departures(config: DetentConfig, *, is_suite: bool) -> tuple[str, ...]:
    """What a reader must know first: that it is a smoke run, that the suite is not the frozen one, that thresholds are
    not the registered ones; empty where nothing differs.

    The profile is the one whose settings the config shares most: a changed seed makes no smoke run a real one.
    """
    said = []
    profiles = ("suite-smoke", "suite") if is_suite else ("suite-smoke", "smoke", "suite", "default")
    known = {name: load_config(name) for name in profiles}
    changes = {name: _differences(config, frozen) for name, frozen in known.items()}
    # Of two that are equally near the smaller run: a warning too many does no harm.
    nearest = min(profiles, key=lambda name: len(changes[name]))
    is_smoke = nearest in SMOKE
    if is_smoke:
        said.append("Smoke run: its numbers mean nothing.")
    changed = changes[nearest]
    if is_suite and changed:
        more = f" and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else ""
        frozen = "smoke" if is_smoke else "frozen"
        said.append(f"Not the {frozen} suite: {', '.join(changed[:MOST_NAMED])}{more}.")
    registered, rules = known[nearest].evaluation.verdict, config.evaluation.verdict
    other = [
        f"{name} {getattr(rules, name)} instead of {getattr(registered, name)}"
        for name in type(rules).model_fields
        if getattr(rules, name) != getattr(registered, name)
    ]
    if other:
        said.append(f"Not the registered verdict: {', '.join(other)}.")
    return tuple(said)


# Where results are logged, and threads, do not change a number.
def _differences(config: DetentConfig, frozen: DetentConfig) -> list[str]:
    ours, theirs = flat_values(config), flat_values(frozen)
    free = ("tracking.", "torch_threads", "export.", "gates.", "evaluation.verdict.", "evaluation.walk_forward.")
    return [
        f"{name} {ours[name]} instead of {theirs[name]}"
        for name in ours
        if ours[name] != theirs[name] and not name.startswith(free)
    ]


# --- before anything is computed ---------------------------------------------------------------------------------


def _tasks_of_suite(config: DetentConfig) -> list[FoldTask]:
    _check_market(config)
    dynamics = TradingDynamics.from_config([field.name for field in MARKET_FIELDS], config)
    return _with_rules(suite_tasks(config), rule_sources(dynamics.rule_set.rules, config.limits.rule_modules))


def _tasks_of_walk_forward(config: DetentConfig, inputs: RunInputs) -> list[FoldTask]:
    check_extra_rules(inputs)
    return _with_rules(fold_tasks(config, inputs.table, inputs.data_hash), inputs.rule_sources)


# Rules of the user's own decide what a task computes; their source does not stand in any setting.
def _with_rules(tasks: list[FoldTask], sources: Mapping[str, str]) -> list[FoldTask]:
    if not sources:
        return tasks
    return [replace(task, identity={**task.identity, "rule_sources": dict(sources)}) for task in tasks]


# Workers would find the same out, one failed task at a time.
def _check_market(config: DetentConfig) -> None:
    if config.reward.name not in REWARDS:
        raise ConfigError(f"reward.name: expected one of {sorted(REWARDS)}, was {config.reward.name!r}")
    TradingDynamics.from_config([field.name for field in MARKET_FIELDS], config)
    try:
        transition_matrix(config.evaluation.market)
    except ValueError as error:
        raise ConfigError(str(error)) from error


# --- the work ----------------------------------------------------------------------------------------------------


def _evaluate(
    kind: str,
    config: DetentConfig,
    workdir: Path,
    tasks: Sequence[FoldTask],
    work: Work,
    conclude: Callable[[Sequence[FoldResult]], tuple[Findings, Report]],
    job: Job,
) -> Evaluated:
    reporter = job.reporter or Reporter(quiet=True)
    root = Path(workdir).resolve()
    create_workdir(root)
    # The tasks alone would not do: thresholds and sample sizes of the verdict change the report, not the cells.
    key = sha256_bytes(canonical_json([kind, config_hash(config), [task.key for task in tasks]]).encode())
    folder = root / FOLDER / f"{kind}-{key[:12]}"
    try:
        with WorkdirLock(root):
            tracker = Tracker(config.tracking.uri, EXPERIMENT, root, config.tracking.model_name) if job.track else None
            results = _run(kind, tasks, work, root, job, reporter)
            with reporter.stage("statistics"):
                findings, report = conclude(results)
            with reporter.stage("report"):
                report = replace(report, caveats=departures(config, is_suite=kind == SUITE))
                files = write_report(report, folder)
                atomic_write_text(folder / "config.yaml", resolved_yaml(config))
                run_id = None if tracker is None else _log(tracker, kind, key, config, findings, folder)
    finally:
        reporter.close()
    resumed = sum(result.resumed for result in results)
    return Evaluated(report, files, findings, key, len(results) - resumed, resumed, run_id)


def _run(
    stage: str, tasks: Sequence[FoldTask], work: Work, root: Path, job: Job, reporter: Reporter
) -> list[FoldResult]:
    with reporter.stage(stage) as progress:
        return run_folds(tasks, work, _cells(root), engine=job.engine, jobs=job.jobs, progress=progress)


def _cells(workdir: Path) -> Path:
    return Path(workdir).resolve() / FOLDER / "cells"


def _log(tracker: Tracker, kind: str, key: str, config: DetentConfig, findings: Findings, folder: Path) -> str:
    run_id = tracker.start(kind, key)
    try:
        verdict = findings.main.claim.verdict
        tracker.log_params(flat_values(config))
        tags = {"decision": str(verdict.decision), "git_commit": git_commit(), "config_hash": config_hash(config)}
        tracker.log_tags(tags)
        for bars, metrics in _metrics(findings).items():
            tracker.log_metrics(metrics, bars)
        tracker.log_artifacts(folder, "report")
    except BaseException as error:
        # What went wrong matters more than a tracking server that is away at the same time.
        with suppress(TrackingUnavailable):
            tracker.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    tracker.finish()
    return run_id


# By training length, which is the step in MLflow; what has no value is left out, for MLflow keeps NaN as a number.
def _metrics(findings: Findings) -> dict[int, dict[str, float]]:
    metrics = {}
    for bars, size in findings.sizes.items():
        values: dict[str, float] = {}
        if size.claim.sharpe is not None:
            gain = size.claim.sharpe.interval
            values |= {"gain": gain.estimate, "gain_low": gain.low, "gain_high": gain.high}
        for name, one in size.policies.items():
            for metric in ("sharpe", "max_drawdown", "killed"):
                values[f"{metric}/{name}"] = float(one.metrics[metric].mean())
        metrics[bars] = {name: float(value) for name, value in values.items() if np.isfinite(value)}
    return metrics


def _facts(config: DetentConfig, results: Sequence[FoldResult]) -> dict[str, Any]:
    minutes = sum(result.seconds for result in results) / 60
    return {
        "machine": machine(),
        "versions": library_versions(),
        "git commit": git_commit(),
        "config": config_hash(config),
        "rendered": datetime.now(UTC).isoformat(timespec="seconds"),
        "computing": f"{len(results)} tasks, {minutes:,.1f} minutes one after the other",
    }


def _span(table: FeatureTable, window: slice) -> str:
    times = table.timestamps[window]
    return f"{times[0]:%Y-%m-%d} to {times[-1]:%Y-%m-%d}"
