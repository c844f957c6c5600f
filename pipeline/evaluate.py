"""`detent evaluate`: the suite on known markets, or a walk-forward over real bars, to a verdict and a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.findings import Findings, size_findings, suite_findings
from benchmarks.folds import Engine, FoldResult, FoldTask, run_folds
from benchmarks.machine import machine
from benchmarks.report import suite_report, walk_forward_report
from benchmarks.suite import plan_suite, suite_tasks, work_on_cell
from benchmarks.tuning import Trial, draw_trials, rank_trials, tuning_tasks, work_on_trial
from benchmarks.walk_forward import fold_tasks, join_folds, plan_folds, work_on_fold
from configs import DetentConfig, config_hash, flat_values, resolved_yaml
from data import FeatureTable, atomic_write_text, canonical_json, sha256_bytes
from evaluation.report import Report, ReportFiles, write_report
from pipeline.errors import ExitCode
from pipeline.inputs import load_inputs
from pipeline.lock import WorkdirLock, create_workdir
from pipeline.progress import Reporter
from pipeline.provenance import git_commit, library_versions
from pipeline.tracking import Tracker

EXPERIMENT = "detent-evaluation"


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation came to."""

    report: Report
    files: ReportFiles
    findings: Findings
    run_id: str | None
    """MLflow run."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the verdict of every training length and where the report lies."""
        return {
            "status": "evaluated",
            "exit_code": int(ExitCode.PROMOTED),
            "verdict": self.findings.main.claim.verdict.to_dict(),
            "by_train_bars": {str(bars): str(one.claim.verdict.decision) for bars, one in self.findings.sizes.items()},
            "report": str(self.files.html),
            "numbers": str(self.files.json),
            "summary": str(self.files.summary),
            "run_id": self.run_id,
        }


@dataclass(frozen=True)
class Job:
    """How much is computed at once, and whether it is shown."""

    engine: Engine = "joblib"
    jobs: int = 1
    reporter: Reporter | None = None
    track: bool = True
    """Log to MLflow."""


def planned(config: DetentConfig, is_suite: bool) -> list[str]:
    """Labels of the tasks that an evaluation consists of, stored or not."""
    if is_suite:
        return [task.label for task in suite_tasks(config)]
    inputs = load_inputs(config)
    return [task.label for task in fold_tasks(config, inputs.table, inputs.data_hash)]


def evaluate_suite(config: DetentConfig, workdir: Path, job: Job, command: str) -> Evaluated:
    """Run every cell of the suite that is not stored yet and write the report.

    Raises: ConfigError, LockedError, TrackingUnavailable, OSError, FoldError; `exit_code_for` maps them.
    """

    def conclude(results: Sequence[FoldResult]) -> tuple[Findings, Report]:
        findings = suite_findings(config, results, plan_suite(config))
        title = "Detent: masked model-based against model-free policies on known markets"
        return findings, suite_report(
            config, findings, title=title, reproduce=(command,), facts=_facts(config, results)
        )

    return _evaluate("suite", config, workdir, suite_tasks(config), work_on_cell, conclude, job)


def evaluate_walk_forward(config: DetentConfig, workdir: Path, job: Job, command: str) -> Evaluated:
    """Run every fold over the bars of the config that is not stored yet and write the report.

    Raises: as `evaluate_suite`, and DataError for anything wrong with the bars.
    """
    inputs = load_inputs(config)
    table = inputs.table
    tasks = fold_tasks(config, table, inputs.data_hash)

    def conclude(results: Sequence[FoldResult]) -> tuple[Findings, Report]:
        policies = join_folds(results, tasks)
        size = size_findings(config, policies, 0, config.data.bars_per_year)
        findings = Findings(sizes={0: size}, primary=0)
        folds = plan_folds(config, len(table))
        report = walk_forward_report(
            config,
            findings,
            _joined_times(table, [fold.test for fold in folds]),
            [{name: _span(table, getattr(fold, name)) for name in ("train", "test")} for fold in folds],
            title=f"Detent: walk-forward over {config.data.source.symbol}",
            reproduce=(command,),
            facts=_facts(config, results) | {"data": inputs.data_hash},
        )
        return findings, report

    return _evaluate("walk-forward", config, workdir, tasks, work_on_fold, conclude, job)


def tune(config: DetentConfig, workdir: Path, job: Job, learner: str, *, trials: int, runs: int) -> list[Trial]:
    """Try settings of one learner on the suite's validation markets, best first; finished trials are kept.

    Raises: ConfigError, LockedError, OSError, FoldError.
    """
    reporter = job.reporter or Reporter(quiet=True)
    root = Path(workdir).resolve()
    drawn = draw_trials(learner, trials, config.seed)
    bars = config.evaluation.suite.primary_train_bars
    tasks = tuning_tasks(config, learner, drawn, train_bars=bars, runs=runs)
    create_workdir(root)
    try:
        with WorkdirLock(root), reporter.stage("trials") as progress:
            results = run_folds(
                tasks,
                work_on_trial,
                root / "evaluations" / "cells",
                engine=job.engine,
                jobs=job.jobs,
                progress=progress,
            )
    finally:
        reporter.close()
    return rank_trials(drawn, results)


def _evaluate(
    kind: str,
    config: DetentConfig,
    workdir: Path,
    tasks: Sequence[FoldTask],
    work: Callable[[FoldTask], Mapping[str, Any]],
    conclude: Callable[[Sequence[FoldResult]], tuple[Findings, Report]],
    job: Job,
) -> Evaluated:
    reporter = job.reporter or Reporter(quiet=True)
    root = Path(workdir).resolve()
    create_workdir(root)
    key = sha256_bytes(canonical_json([kind, [task.key for task in tasks]]).encode())
    folder = root / "evaluations" / f"{kind}-{key[:12]}"
    try:
        with WorkdirLock(root):
            tracker = Tracker(config.tracking.uri, EXPERIMENT, root, config.tracking.model_name) if job.track else None
            with reporter.stage(kind) as progress:
                results = run_folds(
                    tasks, work, root / "evaluations" / "cells", engine=job.engine, jobs=job.jobs, progress=progress
                )
            with reporter.stage("statistics"):
                findings, report = conclude(results)
            with reporter.stage("report"):
                files = write_report(report, folder)
                atomic_write_text(folder / "config.yaml", resolved_yaml(config))
                run_id = None if tracker is None else _log(tracker, kind, key, config, findings, folder)
    finally:
        reporter.close()
    return Evaluated(report, files, findings, run_id)


def _log(tracker: Tracker, kind: str, key: str, config: DetentConfig, findings: Findings, folder: Path) -> str:
    run_id = tracker.start(kind, key)
    try:
        verdict = findings.main.claim.verdict
        tracker.log_params(flat_values(config))
        tracker.log_tags({"decision": str(verdict.decision), "git_commit": git_commit()})
        for bars, size in findings.sizes.items():
            sharpe = {f"sharpe/{name}": float(one.metrics["sharpe"].mean()) for name, one in size.policies.items()}
            gain = size.claim.sharpe.interval
            claim = {"gain": gain.estimate, "gain_low": gain.low, "gain_high": gain.high}
            tracker.log_metrics({key: value for key, value in (sharpe | claim).items() if np.isfinite(value)}, bars)
        tracker.log_artifacts(folder, "report")
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish()
    return run_id


def _facts(config: DetentConfig, results: Sequence[FoldResult]) -> dict[str, Any]:
    seconds = sum(result.seconds for result in results)
    return {
        "machine": machine(),
        "versions": library_versions(),
        "git commit": git_commit(),
        "config": config_hash(config),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "computing": f"{seconds / 60:.0f} minutes on one core, {len(results)} tasks",
    }


def _joined_times(table: FeatureTable, windows: Sequence[slice]) -> np.ndarray[Any, Any]:
    # Returns stand at the close that ended them; one more time in front, where the first fold starts flat.
    times = table.timestamps.tz_convert("UTC").tz_localize(None).to_numpy()
    return np.concatenate([times[windows[0].start : windows[0].start + 1], *(times[w][1:] for w in windows)])


def _span(table: FeatureTable, window: slice) -> str:
    times = table.timestamps[window]
    return f"{times[0]:%Y-%m-%d} to {times[-1]:%Y-%m-%d}"
