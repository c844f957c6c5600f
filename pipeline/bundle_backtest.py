"""Backtest of an exported bundle, the way it is served."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from configs import ConfigError, DetentConfig
from evaluation import BacktestResult, BuyAndHold, Flat, PolicyMetrics, RandomValid, backtest, evaluate
from pipeline.inputs import load_inputs
from serving import OnnxPlanner, OnnxPolicy, open_bundle


def backtest_bundle(
    bundle_path: Path, config: DetentConfig, window: str
) -> tuple[dict[str, BacktestResult], dict[str, PolicyMetrics]]:
    """Walk a bundle and the simple baselines over one window.

    Rules come from the bundle, costs, reward and bars from the config.

    Args: window: train, validation, test or all.
    Raises: BundleError, DataError; ConfigError for an unknown window or a bundle with another state layout.
    """
    inputs = load_inputs(config)
    windows = {
        "train": inputs.split.train,
        "validation": inputs.split.validation,
        "test": inputs.split.test,
        "all": slice(None),
    }
    if window not in windows:
        raise ConfigError(f"window: expected one of {sorted(windows)}, was {window!r}")
    policy = OnnxPolicy(open_bundle(bundle_path), name="bundle")
    dynamics = inputs.dynamics.with_rule_set(policy.bundle.rule_set)
    if policy.bundle.manifest.state_names != dynamics.state_names:
        raise ConfigError(
            f"{bundle_path}: expected state columns {dynamics.state_names}, was {policy.bundle.manifest.state_names}"
        )
    table = inputs.table.rows(windows[window])
    uncertainty = policy.uncertainty(table.values.astype(np.float32)).astype(np.float64)
    years = config.data.bars_per_year
    results = {"bundle": backtest(dynamics, table.values, table.timestamps, policy, uncertainty)}
    if policy.bundle.planner_session is not None:
        planner = OnnxPlanner(policy.bundle, name="bundle_planner")
        results[planner.name] = backtest(dynamics, table.values, table.timestamps, planner, uncertainty)
    for name, baseline, paths in (
        ("buy_and_hold", BuyAndHold(dynamics), 1),
        ("flat", Flat(dynamics), 1),
        ("random_valid", RandomValid(config.seed), config.evaluation.random_seeds),
    ):
        results[name] = backtest(dynamics, table.values, table.timestamps, baseline, batch=paths)
    return results, {name: evaluate(result, years) for name, result in results.items()}
