"""The benchmark of serving: what is said of the numbers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from serve_reports import GOOD, entry, footprint, serve_report, swap_report

from benchmarks.serve_speed import DECIDE, INFER, measure_serving


def test_every_goal_can_be_met() -> None:
    assert serve_report().missed == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": {INFER: entry(0.26)}}, "infer: p50, ms: expected at most 0.25, was 0.26"),
        ({"entries": {DECIDE: entry(0.2, slowest=0.6)}}, "decide: p99, ms: expected at most 0.5, was 0.6"),
        ({"entries": {INFER: entry(0.2, paced=1.6)}}, "infer: paced p99, ms: expected at most 1.5, was 1.6"),
        ({"entries": {"stream": entry(0.5, slowest=1.1)}}, "stream: p99, ms: expected at most 1, was 1.1"),
        (
            {"entries": {"infer, planner": entry(2.0, paced=3.1)}},
            "infer, planner: paced p99, ms: expected at most 3, was 3.1",
        ),
        (
            {"footprints": {"policy": footprint(start_s=2.1)}},
            "service policy: seconds to start: expected at most 2, was 2.1",
        ),
        (
            {"footprints": {"policy": footprint(ready_mib=201.0)}},
            "service policy: MiB when ready: expected at most 200, was 201",
        ),
        (
            {"footprints": {"policy": footprint(growth=0.1)}},
            "service policy: MiB more in an hour: expected at most 20, was 72",
        ),
        ({"swaps": swap_report(99)}, "hot swaps: swaps: expected at least 100, was 99"),
        ({"swaps": swap_report(asked=9_999)}, "hot swaps: requests: expected at least 10,000, was 9,999"),
        (
            {"swaps": swap_report(wrong=1, complaints=["row 3"])},
            "hot swaps: expected 0 failed and 0 wrong of 10,000, was 0 and 1: row 3",
        ),
        (
            {"entries": {DECIDE: entry(0.2, failed=2)}},
            "decide: expected 0 failed and 0 wrong of 100, was 2 and 0: ",
        ),
    ],
)
def test_every_goal_can_be_missed_alone(changes: dict[str, Any], message: str) -> None:
    assert serve_report(**changes).missed == (message,)


def test_what_could_not_be_asked_is_no_missed_goal() -> None:
    report = serve_report()
    kept = {name: one for name, one in report.entries.items() if name not in ("stream", "infer, planner")}
    assert dataclasses.replace(report, entries=kept, absent={"stream": "no server"}).missed == ()


def test_growth_is_that_of_the_second_half_by_hand() -> None:
    early = [(1_000, 100.0), (2_000, 150.0), (3_000, 180.0), (4_000, 190.0), (5_000, 195.0)]
    late = [(6_000, 200.0), (7_000, 201.0), (8_000, 202.0), (9_000, 203.0), (10_000, 204.0)]
    found = dataclasses.replace(footprint(), samples=(*early, *late))
    # One MiB per thousand requests, 720,000 an hour.
    assert found.growth_mib == pytest.approx(720.0)


def test_all_of_it_is_json_with_ratios_to_the_floor() -> None:
    written = json.loads(json.dumps(serve_report().to_dict(), allow_nan=False))
    assert written["to_floor"]["infer"] == pytest.approx({"hot": 10.0, "paced": 10.0})
    assert written["entries"]["infer"]["hot"]["p50_ms"] == 0.2
    assert set(written["entries"]) == set(GOOD)
    assert written["growth_mib"] == {"policy": pytest.approx(0.0, abs=1e-6)}
    assert written["swaps"]["tally"]["asked"] == 10_000


@pytest.mark.parametrize("name", ["calls", "seconds", "swaps", "swap_requests"])
def test_counts_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected > 0, was 0"):
        measure_serving(**{name: 0})
