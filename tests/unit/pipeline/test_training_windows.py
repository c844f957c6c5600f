"""Who sees which window: fitting sees training rows, choices see validation, test is only reported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pipeline.retrain as retrain_module
from configs import load_config
from data.features import LOOKBACK
from evaluation import Flat
from mbpo import Forecast, MarketBranches, TrainedPolicy
from pipeline import promotion, training
from pipeline.inputs import RunInputs, load_inputs
from pipeline.training import LearnedMarket, Visited


class Stop(Exception):
    """Ends a stage once it has shown what it was given."""


@pytest.fixture(scope="module")
def inputs() -> RunInputs:
    return load_inputs(load_config("smoke"))


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch, inputs: RunInputs) -> list[tuple[np.ndarray, Any]]:
    """Features and uncertainty of every backtest that `training` and `promotion` start."""
    seen: list[tuple[np.ndarray, Any]] = []
    for module in (training, promotion, retrain_module):
        real = module.backtest

        def record(dynamics: Any, features: Any, *rest: Any, _real: Any = real, **options: Any) -> Any:
            seen.append((features, rest[2] if len(rest) > 2 else None))
            return _real(dynamics, features, *rest, **options)

        monkeypatch.setattr(module, "backtest", record)
    return seen


def capture_training(monkeypatch: pytest.MonkeyPatch, inputs: RunInputs) -> list[Any]:
    environments: list[Any] = []

    def train(env: Any, config: Any, *, validate: Any, **options: Any) -> TrainedPolicy:
        env.reset()
        environments.append(env)
        validate(Flat(inputs.dynamics))
        raise Stop

    monkeypatch.setattr(training, "train_policy", train)
    return environments


def market_of(inputs: RunInputs) -> LearnedMarket:
    uncertainty = np.linspace(0.0, 1.0, len(inputs.table))
    return LearnedMarket(None, inputs.scaler, {}, uncertainty)  # type: ignore[arg-type]


def visited_of(inputs: RunInputs) -> Visited:
    values = inputs.train.values
    states = np.zeros((len(values), len(inputs.dynamics.state_names)), np.float32)
    states[:, : values.shape[1]] = values
    return Visited(values, np.arange(len(values)), states)


def test_the_replay_store_holds_the_training_window(inputs: RunInputs, tmp_path: Path) -> None:
    visited = training.replay_stage(inputs, tmp_path)
    np.testing.assert_array_equal(visited.features, inputs.train.values.astype(np.float32))


def test_the_world_model_is_fitted_to_replayed_rows_with_a_purged_holdout(
    inputs: RunInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited, given = visited_of(inputs), {}

    def fit(features: Any, fields: Any, config: Any, seed: int, progress: Any, *, purge: int, warm_start: Any) -> None:
        given.update(features=features, purge=purge, warm_start=warm_start)
        raise Stop

    monkeypatch.setattr(training, "fit_market_model", fit)
    with pytest.raises(Stop):
        training.world_model_stage(inputs, visited, tmp_path)
    assert given["features"] is visited.features
    assert (given["purge"], given["warm_start"]) == (LOOKBACK, None)


def test_the_drift_is_calibrated_on_the_validation_window_alone(
    inputs: RunInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited, given = visited_of(inputs), []

    def calibrate(model: Any, train: np.ndarray, validation: np.ndarray) -> None:
        given.extend((train, validation))
        raise Stop

    monkeypatch.setattr(training, "fit_market_model", lambda *_, **__: (None, None))
    monkeypatch.setattr(training, "calibrate_drift", calibrate)
    with pytest.raises(Stop):
        training.world_model_stage(inputs, visited, tmp_path)
    assert given[0] is visited.features
    np.testing.assert_array_equal(given[1], inputs.validation.values)


def test_the_baseline_trains_on_training_rows_and_is_chosen_on_validation(
    inputs: RunInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walked: list[tuple[np.ndarray, Any]]
) -> None:
    environments = capture_training(monkeypatch, inputs)
    with pytest.raises(Stop):
        training.model_free_stage(inputs, tmp_path)
    np.testing.assert_array_equal(environments[0].walks.features[0], inputs.train.values)
    assert len(walked) == 1
    np.testing.assert_array_equal(walked[0][0], inputs.validation.values)


def test_mbpo_trains_on_replayed_rows_and_is_chosen_on_validation_with_its_uncertainty(
    inputs: RunInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walked: list[tuple[np.ndarray, Any]]
) -> None:
    environments = capture_training(monkeypatch, inputs)
    monkeypatch.setattr(training, "historical_uncertainty", lambda model, features: np.zeros(len(features)))
    monkeypatch.setattr(training, "model_error", lambda model, features: np.ones(len(features) - 1))
    visited, market = visited_of(inputs), market_of(inputs)
    shape = (len(visited.features), 1, 3)
    nothing = Forecast(*np.zeros((2, len(visited.features), 2)))
    monkeypatch.setattr(training, "historical_forecast", lambda model, features: nothing)
    branches = MarketBranches(
        np.zeros((*shape, visited.features.shape[1]), np.float32),
        np.zeros(shape, np.float32),
        np.ones(shape, bool),
        Forecast(*np.zeros((2, *shape, 2), np.float32)),
    )
    with pytest.raises(Stop):
        training.mbpo_stage(inputs, visited, market, branches, tmp_path)
    np.testing.assert_array_equal(environments[0].walks.features[0], inputs.train.values)
    assert environments[0].scaler is market.scaler
    np.testing.assert_array_equal(walked[0][0], inputs.validation.values)
    np.testing.assert_array_equal(walked[0][1], market.uncertainty[inputs.split.validation])


def test_reported_backtests_give_the_served_policy_the_uncertainty_of_each_window(
    inputs: RunInputs, walked: list[tuple[np.ndarray, Any]]
) -> None:
    served, planner, baseline = (named(Flat(inputs.dynamics), name) for name in ("mbpo", "mbpo_planner", "model_free"))
    market = market_of(inputs)
    runs = retrain_module._backtests(inputs, [served, planner], baseline, market, None)
    for (features, uncertainty), window in (
        (walked[0], "validation"),
        (walked[1], "validation"),
        (walked[6], "test"),
        (walked[7], "test"),
    ):
        rows = getattr(inputs.split, window)
        np.testing.assert_array_equal(features, inputs.table.values[rows])
        np.testing.assert_array_equal(uncertainty, market.uncertainty[rows])
        assert len(runs[window]["mbpo"].timestamps) == len(runs[window]["mbpo_planner"].timestamps) == len(features)


def test_gates_read_the_validation_window_only(inputs: RunInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def decide(config: Any, **settings: Any) -> None:
        given.update(settings)
        raise Stop

    monkeypatch.setattr(promotion, "decide_gates", decide)
    validation, test = object(), object()
    result = SimpleNamespace(
        policies={"validation": {"mbpo": validation}, "test": {"mbpo": test}},
        world_model={"validation": {"nll_gain_tightest": 1.0}, "test": {"nll_gain_tightest": 2.0}},
        latency={"p99_ms": 3.0},
    )
    for by_policy in result.policies.values():
        by_policy["flat"] = SimpleNamespace(invalid_actions=2)
    monkeypatch.setitem(result.policies["validation"], "mbpo", SimpleNamespace(invalid_actions=0, tag="validation"))
    monkeypatch.setitem(result.policies["test"], "mbpo", SimpleNamespace(invalid_actions=0, tag="test"))
    for window, by_policy in result.policies.items():
        by_policy["mbpo_planner"] = SimpleNamespace(invalid_actions=0, tag=f"planner, {window}")
    tracker = SimpleNamespace(champion=lambda: None)
    served = [SimpleNamespace(overridden_total=5), SimpleNamespace(overridden_total=7)]
    with pytest.raises(Stop):
        promotion.register(inputs, Path(), tracker, served, result)  # type: ignore[arg-type]
    assert given["challenger"].tag == "validation"
    assert given["planner"].tag == "planner, validation"
    assert (given["nll_gain"], given["latency_p99_ms"]) == (1.0, 3.0)
    # Two forbidden actions in either window, and those of policy and planner that the last check replaced.
    assert given["invalid_actions"] == 16


def test_the_champion_walks_the_validation_window(
    inputs: RunInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walked: list[tuple[np.ndarray, Any]]
) -> None:
    class Served(Flat):
        def __init__(self, bundle: Any, name: str) -> None:
            super().__init__(inputs.dynamics)

        def uncertainty(self, features: np.ndarray) -> np.ndarray:
            return features[:, 0]

    champion = SimpleNamespace(version=7, tags={"bundle_hash": "other"})
    tracker = SimpleNamespace(champion=lambda: champion, fetch_bundle=lambda version, folder: folder)
    served = SimpleNamespace(bundle=SimpleNamespace(hash="mine", manifest=SimpleNamespace(layout_hash="same")))
    monkeypatch.setattr(promotion, "open_bundle", lambda path, expected: served.bundle)
    monkeypatch.setattr(promotion, "OnnxPolicy", Served)
    metrics, why = promotion._champion_metrics(inputs, tmp_path, tracker, served)  # type: ignore[arg-type]
    assert metrics is not None
    assert why == ""
    np.testing.assert_array_equal(walked[0][0], inputs.validation.values)
    np.testing.assert_allclose(walked[0][1], inputs.validation.values[:, 0], rtol=1e-6)


def named(policy: Flat, name: str) -> Any:
    act: Mapping[str, Any] = {"name": name, "act": policy.act}
    return SimpleNamespace(**act)
