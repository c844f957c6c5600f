"""The learning stages of a run: replay, world model, imagination, model-free baseline, MBPO.

A stage that finished before a crash is read back from the run directory instead of being computed again, and a policy
in training goes on from its last validation; every stage seeds its own generators, so a resumed run ends in the same
bundle as an undisturbed one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from configs import ConfigError
from configs.section import PPOConfig
from data import DataError, FeatureTable, ReplayStore, Scaler, atomic_write_json
from data.features import LOOKBACK
from envs import observation_scaler
from envs.vec_env import HistoryVecEnv, TradingVecEnv
from evaluation import PolicyMetrics, backtest, evaluate
from mbpo import (
    Checkpoint,
    CheckpointError,
    MarketBranches,
    TorchPolicy,
    Visited,
    collect_transitions,
    historical_forecast,
    historical_uncertainty,
    imagine_branches,
    mixed_env,
    model_error,
    train_policy,
)
from pipeline.inputs import RunInputs
from pipeline.progress import Advance, silent
from pipeline.tracking import Tracker
from world_model import (
    MarketModel,
    ModelFileError,
    TrainingError,
    calibrate_drift,
    evaluate_horizons,
    evaluate_market_model,
    fit_market_model,
)

MBPO_NAME = "mbpo"
PLANNER_NAME = "mbpo_planner"
MODEL_FREE_NAME = "model_free"
HORIZON_PATHS = 100
"""Imagined from every bar of the validation window, to see how good they are several bars ahead."""


@dataclass(frozen=True)
class LearnedMarket:
    """World model with its metrics and the disagreement at every historical row."""

    model: MarketModel
    scaler: Scaler
    """Of the observation, with `model_uncertainty` scaled by its training quantiles."""
    metrics: dict[str, Any]
    """`holdout` (end of the training window, used for early stopping), `validation` and `test`; `horizons` says how
    good imagined bars are 1 to 5 bars ahead on the validation window."""
    uncertainty: np.ndarray
    """[T] over the whole feature table."""


def replay_stage(inputs: RunInputs, run_dir: Path, progress: Advance = silent) -> Visited:
    """Walk the training window with random valid actions into the run's store and read the transitions back."""
    store = ReplayStore(run_dir / "replay")
    if store.num_rows == 0:
        config = inputs.config
        store.append(
            collect_transitions(
                inputs.dynamics, inputs.scaler, inputs.train, seed=config.seed, episode_bars=config.env.episode_bars
            )
        )
    transitions = store.read()
    progress(len(transitions), len(transitions), "transitions")
    return Visited.of(transitions, len(inputs.table.names))


def world_model_stage(
    inputs: RunInputs, visited: Visited, run_dir: Path, tracker: Tracker | None = None, progress: Advance = silent
) -> LearnedMarket:
    """Fit the ensemble to the replayed rows, calibrate its drift on the validation window, and score it.

    Its scores on the validation window know these two numbers; those on the test window know nothing.
    """
    directory, fields = run_dir / "world_model", inputs.table.fields
    report_file = run_dir / "world_model_fit.json"
    if directory.exists():
        with _checkpoint(directory):
            model = MarketModel.load(directory, fields)
            report = json.loads(report_file.read_text())
    else:
        scores: list[float] = []

        def on_epoch(epoch: int, total: int, score: float) -> None:
            progress(epoch, total, f"holdout {score:.4f}")
            scores.append(score)

        try:
            model, fit = fit_market_model(
                visited.features,
                fields,
                inputs.config.world_model,
                inputs.config.seed,
                on_epoch,
                purge=LOOKBACK,
                warm_start=None if inputs.warm_start is None else MarketModel.load(inputs.warm_start.folder, fields),
            )
        except TrainingError as error:
            raise ConfigError(f"world_model: {error}") from error
        calibrated = inputs.config.world_model.calibrate_drift
        drift = asdict(calibrate_drift(model, visited.features, inputs.validation.values)) if calibrated else None
        report = {**fit.to_dict(), "drift": drift, "holdout_scores": scores}
        atomic_write_json(report_file, report)
        model.save(directory)
    if tracker is not None:
        for epoch, score in enumerate(report["holdout_scores"], start=1):
            tracker.log_metrics({"world_model/holdout_score": score}, epoch)
    scored: dict[str, FeatureTable] = {"validation": inputs.validation, "test": inputs.test}
    ahead = evaluate_horizons(
        model,
        inputs.validation.values,
        fields,
        generator=torch.Generator().manual_seed(inputs.config.seed),
        num_paths=HORIZON_PATHS,
    )
    metrics = {name: evaluate_market_model(model, table.values, fields).to_dict() for name, table in scored.items()}
    metrics["holdout"] = report["holdout"]
    metrics["fit"] = {key: report[key] for key in ("train_rows", "holdout_rows", "epochs", "elites", "drift")}
    metrics["horizons"] = {str(one.step): one.to_dict() for one in ahead}
    uncertainty = historical_uncertainty(model, inputs.table.values)
    scaler = observation_scaler(inputs.train, uncertainty[inputs.split.train])
    return LearnedMarket(model, scaler, metrics, uncertainty)


def imagination_stage(
    inputs: RunInputs, visited: Visited, market: LearnedMarket, progress: Advance = silent
) -> MarketBranches:
    """Imagine the market branches that every policy update reuses."""
    return imagine_branches(market.model, visited.features, inputs.config, progress)


def model_free_stage(
    inputs: RunInputs, run_dir: Path, tracker: Tracker | None = None, progress: Advance = silent
) -> TorchPolicy:
    """Train the baseline: MaskablePPO on history alone, with the same data, masks, costs and selection."""
    config = inputs.config

    def build() -> TradingVecEnv:
        return HistoryVecEnv(
            inputs.dynamics,
            inputs.scaler,
            inputs.train.values,
            num_envs=config.model_free.num_envs,
            episode_bars=config.env.episode_bars,
            seed=config.seed,
        )

    return _policy_stage(
        MODEL_FREE_NAME, config.model_free, None, inputs.scaler, build, inputs, run_dir, tracker, progress
    )


def mbpo_stage(
    inputs: RunInputs,
    visited: Visited,
    market: LearnedMarket,
    branches: MarketBranches,
    run_dir: Path,
    tracker: Tracker | None = None,
    progress: Advance = silent,
) -> TorchPolicy:
    """Train masked PPO on real and imagined rows."""
    config = inputs.config
    uncertainty = historical_uncertainty(market.model, visited.features)
    errors = model_error(market.model, visited.features)

    def build() -> TradingVecEnv:
        return mixed_env(
            config,
            inputs.dynamics,
            market.scaler,
            visited,
            uncertainty,
            historical_forecast(market.model, visited.features),
            branches,
            errors,
        )

    return _policy_stage(
        MBPO_NAME, config.mbpo.ppo, market.uncertainty, market.scaler, build, inputs, run_dir, tracker, progress
    )


def _policy_stage(
    name: str,
    ppo: PPOConfig,
    uncertainty: np.ndarray | None,
    scaler: Scaler,
    build: Callable[[], TradingVecEnv],
    inputs: RunInputs,
    run_dir: Path,
    tracker: Tracker | None,
    progress: Advance,
) -> TorchPolicy:
    weights, summary = run_dir / f"{name}.safetensors", run_dir / f"{name}.json"
    training = Checkpoint(run_dir / f"{name}_training.safetensors", inputs.run_key)
    best = float("-inf")

    def log(metrics: Mapping[str, float], step: int) -> None:
        nonlocal best
        best = max(best, metrics["score"])
        if tracker is not None:
            tracker.log_metrics({f"{name}/{key}": value for key, value in metrics.items()}, step)

    if weights.exists():
        with _checkpoint(weights):
            policy = TorchPolicy.load(weights, name, inputs.dynamics, scaler, ppo.net_arch)
            history = json.loads(summary.read_text())["history"]
        for entry in history:
            log({key: value for key, value in entry.items() if key != "step"}, int(entry["step"]))
        training.remove()
        return policy

    def validate(policy: TorchPolicy) -> Mapping[str, float]:
        metrics = window_metrics(inputs, policy, inputs.split.validation, uncertainty)
        return {
            "score": metrics.reward_per_bar,
            "validation_sharpe": metrics.sharpe,
            "validation_drawdown": metrics.max_drawdown,
            "validation_turnover": metrics.turnover_per_year,
        }

    def on_step(done: int, total: int) -> None:
        progress(done, total, "" if best == float("-inf") else f"best validation reward {best:+.4f}")

    horizon = inputs.config.mbpo.rollout_length if name == MBPO_NAME else ppo.n_steps
    seed = inputs.config.seed
    try:
        trained = train_policy(
            build(),
            ppo,
            n_steps=horizon,
            seed=seed,
            name=name,
            validate=validate,
            log=log,
            progress=on_step,
            checkpoint=training,
        )
    except CheckpointError as error:
        raise DataError(f"{error}; --force computes the run again") from error
    except FloatingPointError as error:
        raise ConfigError(f"{error}; a smaller learning_rate may help") from error
    atomic_write_json(
        summary,
        {
            "best_step": trained.best_step,
            "best_score": trained.best_score,
            "steps": trained.steps,
            "history": trained.history,
        },
    )
    trained.policy.save(weights)
    training.remove()
    return trained.policy


@contextmanager
def _checkpoint(path: Path) -> Iterator[None]:
    # Checkpoints are written atomically, so one that cannot be read was damaged from outside.
    try:
        yield
    except (ModelFileError, SafetensorError, RuntimeError, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: expected the checkpoint of this run: {error}; --force computes it again") from error


def window_metrics(inputs: RunInputs, policy: Any, window: slice, uncertainty: np.ndarray | None) -> PolicyMetrics:
    """Backtest one policy over one window of the feature table."""
    table = inputs.table.rows(window)
    part = None if uncertainty is None else uncertainty[window]
    result = backtest(inputs.dynamics, table.values, table.timestamps, policy, part)
    return evaluate(result, inputs.config.data.bars_per_year)
