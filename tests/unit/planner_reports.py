"""Reports of planners' speed with numbers made up, for what is said of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.latency import Percentiles
from benchmarks.planner_plans import PlanQuality
from benchmarks.planner_speed import BLOCKS, Entry, PlannerSpeedReport, Series
from benchmarks.planner_tasks import (
    DEEP,
    DEEP_FLOOR,
    NETWORK,
    POLICY,
    PREDICT,
    SAMPLED,
    SAMPLED_FLOOR,
    SCENARIOS,
    SCENARIOS_DEFAULT,
    SCENARIOS_MIXED,
    TREE,
    TREE_FLOOR,
    TREE_TORCH,
    PlannerSizes,
)

GOOD = {
    POLICY: 0.01,
    NETWORK: 0.005,
    PREDICT: 0.5,
    TREE: 0.7,
    TREE_FLOOR: 0.5,
    TREE_TORCH: 2.0,
    DEEP: 5.0,
    DEEP_FLOOR: 4.0,
    SAMPLED: 8.0,
    SAMPLED_FLOOR: 6.0,
    SCENARIOS: 1.1,
    SCENARIOS_MIXED: 1.0,
    SCENARIOS_DEFAULT: 0.4,
}
"""Milliseconds that meet every goal."""


def entry(milliseconds: float, spread: float = 0.0) -> Entry:
    """Blocks of two equal calls, the last block slower by `spread`."""
    blocks = [[milliseconds] * 2] * (BLOCKS - 1) + [[milliseconds + spread] * 2]
    return Entry(hot=Series.of(blocks), paced=Series.of(blocks))


def speed_report(peers: dict[str, float] | None = None, **changes: Any) -> PlannerSpeedReport:
    """Args: peers: milliseconds by name; entries in `changes` replace those of GOOD."""
    entries = {name: entry(value) for name, value in GOOD.items()} | changes.pop("entries", {})
    return PlannerSpeedReport(
        **{
            "sizes": PlannerSizes(),
            "entries": entries,
            "peers": {name: Percentiles.of(np.array([value])) for name, value in (peers or {}).items()},
            "plans": {TREE: PlanQuality(rows=4, value=1.0, best_value=1.0, best_actions=1.0)},
            "absent": {},
            "peer_versions": {},
            "calls_per_second": 20.0,
            "machine": {"cpu": "abacus", "cores": 1, "system": "x"},
            "versions": {"python": "3"},
            **changes,
        }
    )
