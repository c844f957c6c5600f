"""The nightly retraining job: from bars to a registered, gated ONNX policy.

Its steps are `pipeline.result.STAGES`. Everything is written below the work directory; the bundle appears only after
it has proved itself against torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.latency import measure_latency
from configs import DetentConfig, config_hash, flat_values, resolved_yaml
from data import TEMP_PREFIX, atomic_write_json, atomic_write_text
from evaluation import BacktestResult, BuyAndHold, Flat, RandomValid, backtest, evaluate
from mbpo import TorchPolicy, branch_summary
from pipeline.bundling import bundle_run
from pipeline.errors import ExitCode, TrackingUnavailable
from pipeline.figures import log_figures
from pipeline.inputs import RunInputs, check_extra_rules, load_inputs
from pipeline.last_night import with_warm_start
from pipeline.lock import WorkdirLock, create_workdir
from pipeline.progress import Reporter
from pipeline.promotion import register
from pipeline.provenance import git_commit
from pipeline.result import RetrainResult, run_directory
from pipeline.tracking import Tracker
from pipeline.training import (
    MBPO_NAME,
    PLANNER_NAME,
    LearnedMarket,
    imagination_stage,
    mbpo_stage,
    model_free_stage,
    replay_stage,
    world_model_stage,
)
from serving import OnnxPlanner, OnnxPolicy, open_bundle

WINDOWS = ("validation", "test")
PARITY_REAL_STATES = 1000
"""Visited states that parity compares in addition to the probe states."""


def retrain(
    config: DetentConfig, workdir: str | Path, *, reporter: Reporter | None = None, force: bool = False
) -> RetrainResult:
    """Run every stage; a run that was interrupted continues after its last finished stage.

    Args:
        config: what to run; workdir: everything is written below it (created).
        force: compute again even if a finished run with the same config, data, code and libraries exists.

    Raises: DataError, ConfigError, RuleError, LockedError, TrackingUnavailable, ParityError, OSError; `exit_code_for`
        maps them.
    """
    reporter = reporter or Reporter(quiet=True)
    torch.set_num_threads(config.torch_threads)
    root = Path(workdir).resolve()
    create_workdir(root)
    try:
        with WorkdirLock(root):
            with reporter.stage("data"):
                inputs = with_warm_start(load_inputs(config), root)
                check_extra_rules(inputs)
                settings = config.tracking
                tracker = Tracker(settings.uri, settings.experiment, root, settings.model_name)
            finished = tracker.find_finished(inputs.run_key)
            report = run_directory(root, inputs.run_key) / "report.json"
            if finished is not None and report.is_file() and not force:
                return _already_done(inputs, root, tracker, finished.run_id)
            return _run(inputs, root, tracker, reporter, force)
    finally:
        reporter.close()


def _already_done(inputs: RunInputs, root: Path, tracker: Tracker, run_id: str) -> RetrainResult:
    result = RetrainResult(ExitCode.ALREADY_DONE, inputs.run_key, inputs.data_hash, root, inputs.windows())
    result.rule_sources = inputs.rule_sources
    folder = run_directory(root, inputs.run_key)
    result.bundle = folder / "bundle"
    result.earlier = json.loads((folder / "report.json").read_text())
    result.tracking_uri, result.run_id, result.model_name = tracker.uri, run_id, tracker.model_name
    result.model_version = tracker.find_version(inputs.run_key)
    return result


def _run(inputs: RunInputs, root: Path, tracker: Tracker, reporter: Reporter, force: bool) -> RetrainResult:
    config = inputs.config
    run_dir = run_directory(root, inputs.run_key)
    if force and run_dir.exists():
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    # The lock is ours, so every temporary in here is a killed run's.
    for stray in run_dir.glob(f"{TEMP_PREFIX}*"):
        shutil.rmtree(stray) if stray.is_dir() else stray.unlink()
    atomic_write_text(run_dir / "config.yaml", resolved_yaml(config))

    result = RetrainResult(ExitCode.CHAMPION_KEPT, inputs.run_key, inputs.data_hash, root, inputs.windows())
    result.rule_sources = inputs.rule_sources
    result.run_id = tracker.start(f"retrain-{inputs.table.timestamps[-1]:%Y-%m-%d}", inputs.run_key)
    result.tracking_uri, result.model_name = tracker.uri, tracker.model_name
    try:
        tracker.log_params(flat_values(config))
        tracker.log_tags(
            {"data_hash": inputs.data_hash, "config_hash": config_hash(config), "git_commit": git_commit()}
        )
        tracker.log_artifact(run_dir / "config.yaml")

        with reporter.stage("replay") as progress:
            visited = replay_stage(inputs, run_dir, progress)
        with reporter.stage("world model") as progress:
            market = world_model_stage(inputs, visited, run_dir, tracker, progress)
            result.world_model = market.metrics
        with reporter.stage("imagination") as progress:
            branches = imagination_stage(inputs, visited, market, progress)
            years = config.data.bars_per_year
            result.imagination = branch_summary(branches, visited.features, inputs.table.names, years)
        with reporter.stage("model-free") as progress:
            model_free = model_free_stage(inputs, run_dir, tracker, progress)
        with reporter.stage("mbpo") as progress:
            trained = mbpo_stage(inputs, visited, market, branches, run_dir, tracker, progress)
        with reporter.stage("export"):
            result.bundle = run_dir / "bundle"
            result.parity = _export(inputs, trained, market, visited.states, result.bundle)
            served = _served(result.bundle)
            result.bundle_hash = served[0].bundle.hash
        with reporter.stage("evaluation") as progress:
            backtests = _backtests(inputs, served, model_free, market, progress)
            result.policies = {
                window: {name: evaluate(run, years) for name, run in by_policy.items()}
                for window, by_policy in backtests.items()
            }
        with reporter.stage("latency"):
            latency = measure_latency(
                result.bundle,
                decisions=config.export.latency_decisions,
                paced_calls=max(config.export.latency_decisions // 100, 10),
                budget_ms=config.export.latency_budget_ms,
                seed=config.seed,
            )
            result.latency = latency.to_dict()
        with reporter.stage("registry"):
            log_figures(tracker, inputs, market, backtests, latency, served[0].bundle.rule_set.actions.names)
            register(inputs, root, tracker, served, result)
    except BaseException as error:
        # What went wrong matters more than a tracking server that is away at the same time.
        with suppress(TrackingUnavailable):
            tracker.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    result.timings = dict(reporter.timings)
    atomic_write_json(run_dir / "report.json", result.to_dict())
    tracker.log_artifact(run_dir / "report.json")
    tracker.finish()
    return result


def _export(
    inputs: RunInputs, policy: TorchPolicy, market: LearnedMarket, states: np.ndarray, destination: Path
) -> dict[str, Any]:
    report = destination.with_name("parity.json")
    if not (destination.exists() and report.exists()):
        if destination.exists():
            shutil.rmtree(destination)
        sample = states[:: max(len(states) // PARITY_REAL_STATES, 1)]
        info = bundle_run(inputs, policy, market.model, destination, states=sample)
        atomic_write_json(report, info.parity.to_dict())
    return dict(json.loads(report.read_text()))


def _served(path: Path) -> list[OnnxPolicy]:
    # Everything in a bundle that decides, the policy first.
    bundle = open_bundle(path)
    served = [OnnxPolicy(bundle, name=MBPO_NAME)]
    if bundle.planner_session is not None:
        served.append(OnnxPlanner(bundle, name=PLANNER_NAME))
    return served


def _backtests(
    inputs: RunInputs, served: Sequence[OnnxPolicy], model_free: TorchPolicy, market: LearnedMarket, progress: Any
) -> dict[str, dict[str, BacktestResult]]:
    # The learned policy is judged as it will be served: the exported graph, not the torch network.
    dynamics, config = inputs.dynamics, inputs.config
    runs: dict[str, dict[str, BacktestResult]] = {}
    for window in WINDOWS:
        rows = getattr(inputs.split, window)
        table = inputs.table.rows(rows)
        policies: dict[str, tuple[Any, np.ndarray | None, int]] = {
            **{one.name: (one, market.uncertainty[rows], 1) for one in served},
            model_free.name: (model_free, None, 1),
            "buy_and_hold": (BuyAndHold(dynamics), None, 1),
            "flat": (Flat(dynamics), None, 1),
            "random_valid": (RandomValid(config.seed), None, config.evaluation.random_seeds),
        }
        runs[window] = {}
        for name, (policy, uncertainty, batch) in policies.items():
            runs[window][name] = backtest(
                dynamics, table.values, table.timestamps, policy, uncertainty, batch=batch, progress=progress
            )
    return runs
