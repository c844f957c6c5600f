import dataclasses
import json

import numpy as np
import pytest

from benchmarks import LatencyReport, Percentiles, compare_latency, measure_latency
from benchmarks.machine import cpu_model, machine
from data import atomic_write_json
from serving import BundleIntegrityError


def report(samples_ms, budget_ms=50.0, **changes):
    samples = np.asarray(samples_ms, dtype=np.float64)
    series = Percentiles.of(samples)
    return LatencyReport(
        **{
            "bundle_hash": "b" * 64,
            "decide_hot": series,
            "session_hot": series,
            "decide_paced": series,
            "calls_per_second": 20.0,
            "budget_ms": budget_ms,
            "seed": 0,
            "machine": {"cpu": "abacus", "cores": 1, "system": "x"},
            "versions": {"python": "3"},
            "samples_ms": samples,
            **changes,
        }
    )


def test_percentiles_by_hand():
    # 0, 1, ..., 1000: the q-th percentile is 10 q.
    series = Percentiles.of(np.arange(1001, dtype=np.float64)[::-1])
    assert dataclasses.astuple(series) == pytest.approx((1001, 500.0, 990.0, 999.0, 1000.0))


@pytest.mark.parametrize("samples", [[], [np.nan], [1.0, np.inf], [[1.0]]])
def test_samples_that_mean_nothing_are_refused(samples):
    with pytest.raises(ValueError, match="samples_ms"):
        Percentiles.of(np.array(samples, dtype=np.float64))


def test_budget_is_judged_by_the_99th_percentile_and_may_be_met_exactly():
    samples = [1.0] * 990 + [2.0] * 9 + [500.0]
    assert report(samples).decide_hot.p99_ms == pytest.approx(1.01)
    assert report(samples, budget_ms=2.0).within_budget
    assert not report(samples, budget_ms=1.0).within_budget
    assert report([3.0] * 5, budget_ms=3.0).within_budget
    assert not report([3.0] * 5, budget_ms=2.999).within_budget


def test_a_planner_that_is_slower_than_the_policy_is_what_the_budget_is_for():
    planned = report([1.0] * 10, budget_ms=2.0, planner_hot=Percentiles.of(np.full(10, 3.0)))
    assert planned.p99_ms == 3.0
    assert not planned.within_budget
    assert report([1.0] * 10).p99_ms == 1.0
    assert set(planned.series) == {"decide_hot", "session_hot", "decide_paced", "planner_hot"}
    assert planned.to_dict()["planner_hot"]["p50_ms"] == 3.0


def test_reports_are_compared_as_ratios(tmp_path):
    path = tmp_path / "latency.json"
    before = report([2.0] * 10)
    atomic_write_json(path, before.to_dict())
    assert "samples_ms" not in before.to_dict()
    compared = compare_latency(report([3.0] * 10), path)
    assert compared["ratios"]["decide_hot.p50_ms"] == 1.5
    assert set(compared["ratios"].values()) == {1.5}
    assert (compared["same_machine"], compared["same_bundle"]) == (True, True)
    planned = report([3.0] * 10, planner_hot=before.decide_hot)
    assert compare_latency(planned, path)["ratios"].keys() == compared["ratios"].keys()
    atomic_write_json(path, planned.to_dict())
    assert compare_latency(planned, path)["ratios"]["planner_hot.p99_ms"] == 1.0
    atomic_write_json(path, before.to_dict())
    elsewhere = dataclasses.replace(report([3.0] * 10), machine={"cpu": "other"}, bundle_hash="c" * 64)
    compared = compare_latency(elsewhere, path)
    assert (compared["same_machine"], compared["same_bundle"]) == (False, False)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"decide_hot": {"p50_ms": 0}}'])
def test_comparison_with_something_else_is_refused(tmp_path, text):
    path = tmp_path / "latency.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected the JSON of a latency report"):
        compare_latency(report([1.0]), path)


def test_measurement_has_everything_that_is_needed_to_read_it(bundle_path, bundle_info):
    measured = measure_latency(bundle_path, 120, warmup=10, paced_calls=3, calls_per_second=200.0, seed=4)
    raw = measured.to_dict()
    assert json.loads(json.dumps(raw, allow_nan=False)) == raw
    assert raw["bundle_hash"] == bundle_info.hash
    assert (raw["decide_hot"]["count"], raw["session_hot"]["count"], raw["decide_paced"]["count"]) == (120, 120, 3)
    assert measured.samples_ms.shape == (120,)
    for name in ("decide_hot", "session_hot", "decide_paced"):
        series = raw[name]
        assert 0 < series["p50_ms"] <= series["p99_ms"] <= series["p999_ms"] <= series["max_ms"]
    assert raw["machine"] == machine()
    assert raw["machine"]["cpu"] == cpu_model() != ""
    assert set(raw["versions"]) == {"python", "numpy", "onnxruntime"}
    assert "enabled" in raw["garbage_collector"]


@pytest.mark.parametrize(
    "arguments",
    [{"decisions": 0}, {"paced_calls": 0}, {"calls_per_second": 0.0}, {"budget_ms": float("nan")}, {"warmup": -1}],
)
def test_counts_and_rates_must_be_positive(tmp_path, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        measure_latency(tmp_path, **arguments)


def test_something_that_is_no_bundle_is_not_measured(tmp_path):
    with pytest.raises(BundleIntegrityError):
        measure_latency(tmp_path)
