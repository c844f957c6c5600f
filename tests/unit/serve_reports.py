"""Reports of serving with numbers made up, for what is said of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.latency import Percentiles
from benchmarks.serve_answers import Tally
from benchmarks.serve_speed import (
    DECIDE,
    DECIDE_NO_FSYNC,
    DECIDE_PLANNER,
    ECHO,
    ENGINE,
    FSYNC,
    INFER,
    INFER_JSON,
    INFER_PLANNER,
    STREAM,
    Entry,
    Footprint,
    ServeReport,
)
from benchmarks.serve_swaps import SwapReport

GOOD = {
    ECHO: 0.02,
    FSYNC: 0.1,
    ENGINE: 0.1,
    INFER: 0.2,
    INFER_JSON: 0.2,
    DECIDE: 0.25,
    DECIDE_NO_FSYNC: 0.2,
    STREAM: 0.5,
    INFER_PLANNER: 2.0,
    DECIDE_PLANNER: 2.0,
}
"""Milliseconds that meet every goal."""


def entry(milliseconds: float, *, slowest: float | None = None, paced: float | None = None, **tally: Any) -> Entry:
    """Equal requests but for the slowest two of a hundred."""
    hot = [milliseconds] * 98 + [slowest or milliseconds] * 2
    return Entry(
        hot=Percentiles.of(np.array(hot)),
        paced=Percentiles.of(np.array([paced or milliseconds] * 100)),
        per_second=1e3 / milliseconds,
        tally=Tally(asked=100, **tally),
    )


def footprint(*, start_s: float = 1.0, ready_mib: float = 90.0, growth: float = 0.0) -> Footprint:
    """Growth: MiB per thousand requests."""
    samples = tuple((1_000 * block, 100.0 + growth * block) for block in range(1, 11))
    return Footprint(start_s=start_s, ready_mib=ready_mib, samples=samples)


def swap_report(swaps: int = 100, **tally: Any) -> SwapReport:
    return SwapReport(
        swaps=swaps,
        seconds=20.0,
        bundles=3,
        telling_rows=40,
        tally=Tally(**{"asked": 10_000, **tally}),
        latency=Percentiles.of(np.array([0.5])),
    )


def serve_report(**changes: Any) -> ServeReport:
    """Entries and footprints in `changes` replace those that are good."""
    return ServeReport(
        **{
            "bundle_hash": "b" * 64,
            "swaps": swap_report(),
            "absent": {},
            "machine": {"cpu": "abacus", "cores": 2, "system": "x"},
            "versions": {"python": "3"},
            **changes,
            "entries": {name: entry(value) for name, value in GOOD.items()} | changes.get("entries", {}),
            "footprints": {"policy": footprint()} | changes.get("footprints", {}),
        }
    )
