"""The training benchmark at smoke size: what it counts and refuses; nothing is decided by time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.training_loop import SMOKE, LoopReport, measure_training_loop


@pytest.fixture(scope="module")
def measured() -> LoopReport:
    return measure_training_loop(truncated=0.2, **SMOKE)


def test_every_step_is_counted_and_parts_add_up(measured: LoopReport) -> None:
    assert measured.steps == 64 * 3 * 2
    assert measured.batch_size == 192
    # Collecting is a part of training, and the loop's own part is not all of it.
    assert measured.collected_per_second > measured.steps_per_second > 0
    assert measured.own_share > 0


def test_a_report_is_json_and_is_judged_by_all_three_goals(measured: LoopReport) -> None:
    assert json.loads(json.dumps(measured.to_dict()))["truncated"] == 0.2
    met = replace(measured, steps_per_second=15_000, collected_per_second=100_000, own_share=0.1)
    assert met.within_goals
    for missed in ({"steps_per_second": 14_999}, {"collected_per_second": 99_999}, {"own_share": 0.11}):
        assert not replace(met, **missed).within_goals


@pytest.mark.parametrize("settings", [{"num_envs": 1}, {"rollouts": 0}, {"truncated": 1.5}])
def test_counts_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected >= 2, >= 1 and a share"):
        measure_training_loop(**settings)  # type: ignore[arg-type]
