"""The mask benchmark at smoke size: what it reports, what it refuses, and that nothing is decided by time."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from benchmarks import masks as bench
from benchmarks.machine import machine
from benchmarks.masks import MaskReport, Series, measure_masks
from masking import ActionTable, RuleSet, trading_rules


@pytest.fixture(scope="module")
def measured() -> MaskReport:
    return measure_masks(40, batch=64, warmup=3, seed=1)


def test_percentiles_by_hand() -> None:
    # 0, 1, ..., 1000: the q-th percentile is 10 q.
    assert dataclasses.astuple(Series.of(np.arange(1001.0)[::-1])) == (1001, 500.0, 950.0, 990.0, None)


@pytest.mark.parametrize("samples", [[], [np.nan], [1.0, np.inf], [[1.0]]])
def test_samples_that_mean_nothing_are_refused(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="samples_us"):
        Series.of(np.array(samples, dtype=np.float64))


def test_a_goal_may_be_met_exactly_and_is_judged_by_the_median() -> None:
    samples = np.array([20.0] * 51 + [900.0] * 49)
    assert Series.of(samples, goal_us=20.0).within_goal
    assert not Series.of(samples, goal_us=19.9).within_goal
    assert Series.of(samples).within_goal


def test_the_report_has_everything_that_is_needed_to_read_it(measured: MaskReport) -> None:
    raw = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    for name, calls in {"numpy_row": 40, "batch_row": 40, "onnx_row": 40, "torch_batch": 10, "explain_row": 40}.items():
        series = raw[name]
        assert series["calls"] == calls
        assert 0 < series["p50_us"] <= series["p95_us"] <= series["p99_us"]
    goals = (measured.numpy_row.goal_us, measured.onnx_row.goal_us, measured.torch_batch.goal_us)
    assert goals == (40.0, 20.0, 1000.0)
    assert raw["rule_set_hash"] == RuleSet(trading_rules(paper=True), ActionTable()).hash
    assert raw["rules"][0] == "stale_data"
    assert (raw["batch"], raw["num_actions"], raw["seed"], raw["threads"]) == (64, 7, 1, 1)
    assert raw["machine"] == machine()
    assert set(raw["versions"]) == {"python", "array-api-compat", "numpy", "onnxruntime", "torch"}


def test_one_missed_goal_is_a_missed_report(measured: MaskReport) -> None:
    fast = dataclasses.replace(measured.numpy_row, p50_us=1.0)
    easy = dataclasses.replace(
        measured,
        numpy_row=fast,
        onnx_row=dataclasses.replace(fast, goal_us=20.0),
        torch_batch=dataclasses.replace(fast, goal_us=1000.0),
    )
    assert easy.within_goals
    assert not dataclasses.replace(easy, onnx_row=dataclasses.replace(fast, p50_us=20.1, goal_us=20.0)).within_goals


def test_the_states_are_worth_judging() -> None:
    rules = RuleSet(trading_rules(paper=True), ActionTable())
    states = bench._states(rules, 4096, np.random.default_rng(0))
    blocked = rules.blocked({name: states[:, index] for index, name in enumerate(rules.fields)})
    for name in ("stale_data", "drawdown_ladder", "volatility_breaker", "max_position_change", "min_holding"):
        assert 0.01 < blocked[name].mean() < 0.9, name


def test_backends_that_disagree_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    tight = bench._session(RuleSet(trading_rules(max_position_change=0.3), ActionTable()))
    monkeypatch.setattr(bench, "_session", lambda rules: tight)
    with pytest.raises(RuntimeError, match="onnxruntime: expected the masks of NumPy, was others in"):
        measure_masks(10, batch=64)


def test_the_thread_count_of_torch_is_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        measure_masks(10, batch=8, warmup=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("arguments", [{"calls": 0}, {"batch": 0}, {"warmup": -1}])
def test_counts_must_be_positive(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        measure_masks(**arguments)
