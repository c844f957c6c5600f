"""How long one decision takes, from a raw state row to a checked action.

Measured on a bundle as serving opens it, batch 1, one thread, through `OnnxPolicy.decide` (validation, graph, last
check), through `OnnxPlanner.decide` where the bundle has a planner, and through the bare onnxruntime session, *hot*
(back to back) and *paced* (asleep between calls, as a live system is: caches and clock have cooled down). The garbage
collector runs once before each series and stays enabled in it, as in a service: its pauses belong to the tail.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.machine import library_versions, machine
from serving import Bundle, OnnxPlanner, OnnxPolicy, open_bundle

LIBRARIES = ("numpy", "onnxruntime")
SERIES = ("decide_hot", "session_hot", "decide_paced", "planner_hot", "planner_paced")
STATES = 256
"""Distinct state rows that the calls cycle through."""


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """Distribution of one series, milliseconds."""

    count: int
    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float

    @classmethod
    def of(cls, samples_ms: npt.NDArray[np.float64]) -> Percentiles:
        """Summarise samples [N] in milliseconds (linear interpolation). Raises: ValueError if empty or not finite."""
        if samples_ms.ndim != 1 or samples_ms.size == 0 or not np.isfinite(samples_ms).all():
            raise ValueError(f"samples_ms: expected finite [N >= 1], was {list(samples_ms.shape)}")
        p50, p99, p999 = (float(value) for value in np.percentile(samples_ms, (50.0, 99.0, 99.9)))
        return cls(count=samples_ms.size, p50_ms=p50, p99_ms=p99, p999_ms=p999, max_ms=float(samples_ms.max()))


@dataclass(frozen=True, kw_only=True, eq=False)
class LatencyReport:
    """Latency of single decisions with everything needed to read the numbers."""

    bundle_hash: str
    decide_hot: Percentiles
    """`OnnxPolicy.decide`, back to back."""
    session_hot: Percentiles
    """The policy graph alone, back to back."""
    decide_paced: Percentiles
    """`OnnxPolicy.decide`, asleep between calls."""
    planner_hot: Percentiles | None = None
    """`OnnxPlanner.decide`, back to back; None without a planner, like the next."""
    planner_paced: Percentiles | None = None
    calls_per_second: float
    """Pace of the paced series."""
    budget_ms: float
    """Budget of one decision."""
    seed: int
    """Seed of the state rows."""
    machine: dict[str, str | int]
    versions: dict[str, str]
    samples_ms: npt.NDArray[np.float64]
    """Durations of the `decide_hot` series [decisions], for a histogram; not part of `to_dict`."""

    @property
    def p99_ms(self) -> float:
        """99th percentile of hot decisions, of the planner's where they are slower."""
        return max(series.p99_ms for series in (self.decide_hot, self.planner_hot) if series is not None)

    @property
    def within_budget(self) -> bool:
        """Whether the 99th percentile of hot decisions is at most `budget_ms`."""
        return self.p99_ms <= self.budget_ms

    @property
    def series(self) -> dict[str, Percentiles]:
        """What was measured, by name."""
        found = {name: getattr(self, name) for name in SERIES}
        return {name: series for name, series in found.items() if series is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {
            "bundle_hash": self.bundle_hash,
            **{name: asdict(series) for name, series in self.series.items()},
            "p99_ms": self.p99_ms,
            "calls_per_second": self.calls_per_second,
            "budget_ms": self.budget_ms,
            "within_budget": self.within_budget,
            "seed": self.seed,
            "batch": 1,
            "threads": 1,
            "garbage_collector": "collected before each series, enabled in it",
            "machine": self.machine,
            "versions": self.versions,
        }


def measure_latency(
    bundle_path: str | os.PathLike[str],
    decisions: int = 10_000,
    *,
    warmup: int = 500,
    paced_calls: int = 100,
    calls_per_second: float = 20.0,
    budget_ms: float = 50.0,
    seed: int = 0,
) -> LatencyReport:
    """Time single decisions of a bundle.

    Args:
        bundle_path: bundle directory, opened and verified as serving does.
        decisions: calls per hot series.
        warmup: calls before each hot series, not timed.
        paced_calls: calls of the paced series; it lasts `paced_calls / calls_per_second` seconds.
        calls_per_second: pace of the paced series.
        budget_ms: what `within_budget` compares with.
        seed: of the state rows, which are spread over the scaler's range.

    Raises: serving.BundleError; ValueError on a count or rate that is not positive.
    """
    named = {"decisions": decisions, "paced_calls": paced_calls, "calls_per_second": calls_per_second}
    for name, value in {**named, "budget_ms": budget_ms}.items():
        if not value > 0:
            raise ValueError(f"{name}: expected > 0, was {value}")
    if warmup < 0:
        raise ValueError(f"warmup: expected >= 0, was {warmup}")
    bundle = open_bundle(bundle_path)
    policy = OnnxPolicy(bundle)
    rows = _state_rows(bundle, np.random.default_rng(seed))
    free = np.ones((1, bundle.rule_set.actions.num_actions), dtype=np.bool_)

    def decide(row: npt.NDArray[np.float32]) -> object:
        return policy.decide(row)

    def session(row: npt.NDArray[np.float32]) -> object:
        return bundle.run_policy(row, free)

    planned = {}
    if bundle.planner_session is not None:
        plan, pause = OnnxPlanner(bundle).decide, 1.0 / calls_per_second
        planned = {
            "planner_hot": Percentiles.of(_timed(plan, rows, decisions, warmup=warmup, pause=0.0)),
            "planner_paced": Percentiles.of(_timed(plan, rows, paced_calls, warmup=0, pause=pause)),
        }
    samples = _timed(decide, rows, decisions, warmup=warmup, pause=0.0)
    return LatencyReport(
        bundle_hash=bundle.hash,
        decide_hot=Percentiles.of(samples),
        session_hot=Percentiles.of(_timed(session, rows, decisions, warmup=warmup, pause=0.0)),
        decide_paced=Percentiles.of(_timed(decide, rows, paced_calls, warmup=0, pause=1.0 / calls_per_second)),
        **planned,
        calls_per_second=calls_per_second,
        budget_ms=budget_ms,
        seed=seed,
        machine=machine(),
        versions=library_versions(LIBRARIES),
        samples_ms=samples,
    )


def compare_latency(report: LatencyReport, previous: str | os.PathLike[str]) -> dict[str, Any]:
    """Compare with the JSON of an earlier report.

    Returns: ratio now / before of p50 and p99 of each series (above 1 is slower), and `same_machine`: ratios between
        machines say nothing about the code.
    Raises: ValueError if the file is no latency report.
    """
    path = Path(previous)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        ratios = {
            f"{name}.{key}": getattr(series, key) / float(before[name][key])
            for name, series in report.series.items()
            if name in before or not name.startswith("planner")
            for key in ("p50_ms", "p99_ms")
        }
        return {
            "same_machine": before["machine"] == report.machine,
            "same_bundle": before["bundle_hash"] == report.bundle_hash,
            "ratios": ratios,
        }
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: expected the JSON of a latency report: {error!r}") from error


def _state_rows(bundle: Bundle, rng: np.random.Generator) -> list[npt.NDArray[np.float32]]:
    scaler = bundle.scaler
    obs = rng.uniform(-1.0, 1.0, (STATES, len(scaler.names)))
    fresh = np.zeros((STATES, 1))
    state = np.concatenate([scaler.centre + scaler.scale * obs, fresh], axis=1).astype(np.float32)
    return [np.ascontiguousarray(row[None, :]) for row in state]


def _timed(
    call: Callable[[npt.NDArray[np.float32]], object],
    rows: list[npt.NDArray[np.float32]],
    count: int,
    *,
    warmup: int,
    pause: float,
) -> npt.NDArray[np.float64]:
    for index in range(warmup):
        call(rows[index % len(rows)])
    nanoseconds = np.empty(count, dtype=np.int64)
    gc.collect()
    for index in range(count):
        row = rows[index % len(rows)]
        if pause > 0.0:
            time.sleep(pause)
        start = time.perf_counter_ns()
        call(row)
        nanoseconds[index] = time.perf_counter_ns() - start
    return nanoseconds / 1e6
