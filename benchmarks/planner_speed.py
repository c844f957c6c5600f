"""How fast exported planners decide: beside the matrix products in them, plain torch, and peers' planners.

Batch 1, one thread. Every series runs in blocks, all contenders in turn, so that whatever else the machine does falls
on all alike; how far the blocks of a series lie apart says what a difference has to exceed. *Hot* calls come back to
back, *paced* ones after a sleep, as in a live system. The garbage collector runs before each round of blocks and stays
enabled in it.

Peers plan in an interpreter of their own (`benchmarks.peer_planning`) with the same weights; what their plans earn is
counted by the same model as Detent's. One that cannot run is reported as absent, with the reason.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import peer_planning
from benchmarks.latency import Percentiles
from benchmarks.machine import library_versions, machine
from benchmarks.planner_plans import PlanQuality, WorldPlanners, compare_plans
from benchmarks.planner_tasks import (
    DEEP,
    FLOORS,
    POLICY,
    PREDICT,
    SAMPLED,
    SCENARIOS,
    TREE,
    Call,
    PlannerSizes,
    trading_calls,
)
from benchmarks.planner_tasks import SMOKE as SMOKE_SIZES
from benchmarks.world_model_speed import Peer

LIBRARIES = ("numpy", "onnxruntime", "torch", "sb3-contrib")
BLOCKS = 10
SAME_VALUE = 1e-6
"""Plans whose mean values differ by less are equally good."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What hot calls may take; None asks nothing."""

    p50_ms: float | None = None
    p99_ms: float | None = None
    to_floor: float | None = None
    """Median over that of its floor, at most: the products alone."""
    to_policy: float | None = None
    """Median over that of the policy's graph, at least: what another way to ask the policy costs."""


GOALS = {
    POLICY: Goal(p50_ms=0.020, p99_ms=0.050),
    PREDICT: Goal(to_policy=15.0),
    TREE: Goal(p50_ms=0.8, p99_ms=1.2, to_floor=1.8),
    DEEP: Goal(p99_ms=6.0),
    SAMPLED: Goal(p50_ms=9.0, p99_ms=12.5, to_floor=1.6),
    SCENARIOS: Goal(p50_ms=1.2, p99_ms=2.0),
}
PEER_GOALS = {
    "mbrl-lib, 5 particles": 50.0,
    "mbrl-lib, 20 particles": 50.0,
    "TorchRL, 5 particles": 50.0,
    "TorchRL, 20 particles": 50.0,
    "mctx, 216 simulations": 3.0,
    "mctx, 50 simulations": 1.0,
}
"""Median of a peer's plan over that of the exact search, at least."""
SMOKE: dict[str, Any] = {
    "sizes": SMOKE_SIZES,
    "calls": 2 * BLOCKS,
    "paced_calls": BLOCKS,
    "calls_per_second": 1000.0,
    "peer_calls": BLOCKS,
    "peer_options": {"candidates": 10, "elites": 3, "iterations": 2, "particles": (2, 4), "simulations": (8, 4)},
}
"""Does it run at all?"""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One series of calls, milliseconds, and its consecutive blocks."""

    whole: Percentiles
    block_p50_ms: tuple[float, ...]
    block_p99_ms: tuple[float, ...]

    @classmethod
    def of(cls, blocks: Sequence[Sequence[float]]) -> Series:
        """Summarise blocks of milliseconds. Raises: ValueError on an empty or not finite block."""
        parts = [Percentiles.of(np.asarray(block, dtype=np.float64)) for block in blocks]
        return cls(
            whole=Percentiles.of(np.concatenate(blocks)),
            block_p50_ms=tuple(part.p50_ms for part in parts),
            block_p99_ms=tuple(part.p99_ms for part in parts),
        )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Decisions of one contender."""

    hot: Series
    paced: Series


@dataclass(frozen=True, kw_only=True)
class PeerSettings:
    """What peers plan with; the CEM is that of mbrl-lib's example of PETS, with more candidates."""

    problem: str
    """File of weights and start rows, see `WorldPlanners.write_problem`."""
    horizon: int
    candidates: int = 500
    elites: int = 50
    iterations: int = 5
    particles: tuple[int, ...] = (5, 20)
    simulations: tuple[int, ...] = (216, 50)


@dataclass(frozen=True, kw_only=True)
class PlannerSpeedReport:
    """Every series with everything needed to read it."""

    sizes: PlannerSizes
    entries: dict[str, Entry]
    peers: dict[str, Percentiles]
    """Hot calls by "peer, task"; wall milliseconds."""
    plans: dict[str, PlanQuality]
    """Of Detent's planners in the world, of random sequences and of peers."""
    absent: dict[str, str]
    """Peers that could not run, and why."""
    peer_versions: dict[str, dict[str, str]]
    calls_per_second: float
    """Pace of the paced series."""
    machine: dict[str, str | int]
    versions: dict[str, str]

    def to_floor(self, name: str) -> float | None:
        """Median over that of the products, or of the network, alone; None where there is no such series."""
        floor = FLOORS.get(name)
        return None if floor is None else self.entries[name].hot.whole.p50_ms / self.entries[floor].hot.whole.p50_ms

    def times_slower(self, peer: str, than: str = TREE) -> float:
        """Median of a peer over that of a planner of ours."""
        return self.peers[peer].p50_ms / self.entries[than].hot.whole.p50_ms

    @property
    def missed(self) -> tuple[str, ...]:
        """Goals that are missed, in words."""
        found = []
        for name, goal in GOALS.items():
            hot = self.entries[name].hot.whole
            limits = {
                "p50, ms": (hot.p50_ms, goal.p50_ms),
                "p99, ms": (hot.p99_ms, goal.p99_ms),
                "times the products alone": (self.to_floor(name), goal.to_floor),
            }
            for what, (value, limit) in limits.items():
                if value is not None and limit is not None and value > limit:
                    found.append(f"{name}: {what}: expected at most {limit:g}, was {value:.3g}")
            times = hot.p50_ms / self.entries[POLICY].hot.whole.p50_ms
            if goal.to_policy is not None and times < goal.to_policy:
                found.append(f"{name}: times the policy's graph: expected at least {goal.to_policy:g}, was {times:.3g}")
        for name in self.peers:
            times, least = self.times_slower(name), PEER_GOALS.get(name, 0.0)
            if times < least:
                found.append(f"{name}: times the tree: expected at least {least:g}, was {times:.3g}")
        for name, plan in self.plans.items():
            if plan.value > plan.best_value + SAME_VALUE:
                found.append(f"{name}: plans worth {plan.value:.6g}, the tree's {plan.best_value:.6g}")
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {
            **asdict(self),
            "to_floor": {name: self.to_floor(name) for name in FLOORS},
            "times_slower": {
                name: {than: self.times_slower(name, than) for than in (TREE, SAMPLED)} for name in self.peers
            },
            "goals": {name: asdict(goal) for name, goal in GOALS.items()},
            "peer_goals": PEER_GOALS,
            "missed": list(self.missed),
            "batch": 1,
            "threads": 1,
            "blocks": BLOCKS,
            "garbage_collector": "collected before each round of blocks, enabled in it",
        }


def measure_planner_speed(
    sizes: PlannerSizes | None = None,
    *,
    calls: int = 2_000,
    paced_calls: int = 100,
    calls_per_second: float = 20.0,
    peers: Sequence[str] = (),
    peer_python: Path | None = None,
    peer_calls: int = 50,
    peer_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> PlannerSpeedReport:
    """Time every planner, in turn, and compare what the plans in the world are worth.

    Args:
        sizes: None takes those of the goals.
        calls, paced_calls: of each series, rounded up to whole blocks; a tenth as many warm each block up.
        calls_per_second: pace of the paced series.
        peers: names in `peer_planning.PEERS`.
        peer_python: interpreter that has the peers; None takes this one.
        peer_calls: of each peer and task, rounded up likewise, each from a start row of its own while there are any.
        peer_options: fields of `PeerSettings` to change.
        progress: called with (steps done, steps in all, what comes next). Whatever it leaves running is measured too.

    Raises: ValueError on an unknown peer, or a count or rate that is not positive; RuntimeError if a peer ends in the
        middle.
    """
    counts = {
        "calls": calls,
        "paced_calls": paced_calls,
        "calls_per_second": calls_per_second,
        "peer_calls": peer_calls,
    }
    for name, count in counts.items():
        if not count > 0:
            raise ValueError(f"{name}: expected > 0, was {count}")
    unknown = sorted({*peers} - {*peer_planning.PEERS})
    if unknown:
        raise ValueError(f"peers: expected names of {sorted(peer_planning.PEERS)}, was {unknown}")
    sizes, tell = sizes or PlannerSizes(), progress or (lambda *_: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ExitStack() as cleanup:
        cleanup.callback(torch.set_num_threads, threads)
        tell(0, BLOCKS + 2, "graphs of the world")
        planners = WorldPlanners(sizes)
        own = planners.calls()
        tell(1, BLOCKS + 2, "graphs of the market")
        ours = _OwnCalls(own | trading_calls(sizes), calls, paced_calls, 1.0 / calls_per_second)
        problem = Path(cleanup.enter_context(tempfile.TemporaryDirectory())) / "problem.npz"
        planners.write_problem(problem, min(peer_calls, len(planners.starts)))
        settings = PeerSettings(problem=str(problem), horizon=sizes.horizon, **(peer_options or {}))
        python, script = peer_python or Path(sys.executable), peer_planning.__file__
        opened = {name: cleanup.enter_context(Peer(name, settings, python, script)) for name in peers}
        theirs = _PeerCalls(opened, peer_calls)
        for block in range(BLOCKS):
            tell(block + 2, BLOCKS + 2, f"block {block + 1} of {BLOCKS}")
            ours.run(block)
            theirs.run()
    return PlannerSpeedReport(
        sizes=sizes,
        entries=ours.entries(),
        peers=theirs.percentiles(),
        plans=compare_plans(planners, theirs.plans),
        absent={name: peer.absent for name, peer in opened.items() if peer.absent},
        peer_versions={name: peer.versions for name, peer in opened.items() if not peer.absent},
        calls_per_second=calls_per_second,
        machine=machine(),
        versions=library_versions(LIBRARIES),
    )


def compare_planner_speed(report: PlannerSpeedReport, previous: str | os.PathLike[str]) -> dict[str, Any]:
    """Compare with the JSON of an earlier report.

    Returns: for p50 and p99 of each series in both, `now`, `before`, `ratio` (above 1 is slower) and `beyond_noise`:
        whether they lie further apart than the blocks of either series do among each other; `same_machine`: ratios
        between machines say nothing about the code; `same_sizes`.
    Raises: ValueError if the file is no report of planners.
    """
    path = Path(previous)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        series = {
            f"{name}, {kind}, {key}": _change(asdict(getattr(entry, kind)), before["entries"][name][kind], key)
            for name, entry in report.entries.items()
            if name in before["entries"]
            for kind in ("hot", "paced")
            for key in ("p50_ms", "p99_ms")
        }
        return {
            "same_machine": before["machine"] == report.machine,
            "same_sizes": before["sizes"] == json.loads(json.dumps(asdict(report.sizes))),
            "series": series,
        }
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: expected the JSON of a report of planners: {error!r}") from error


def timed_block(call: Call, block: int, count: int, *, pause: float = 0.0) -> list[float]:
    """Milliseconds of `count` calls, the block's own rows, each after a pause of so many seconds."""
    for index in range(-(-count // 10)):
        call(index)
    nanoseconds = []
    for index in range(block * count, (block + 1) * count):
        if pause > 0.0:
            time.sleep(pause)
        start = time.perf_counter_ns()
        call(index)
        nanoseconds.append(time.perf_counter_ns() - start)
    return [one / 1e6 for one in nanoseconds]


class _OwnCalls:
    # Series of every contender, block by block. Args: pause: seconds before a paced call.
    def __init__(self, contenders: Mapping[str, Call], calls: int, paced_calls: int, pause: float) -> None:
        self.contenders = contenders
        self.series = {"hot": (_share(calls), 0.0), "paced": (_share(paced_calls), pause)}
        self.blocks: dict[str, dict[str, list[list[float]]]] = {
            name: {kind: [] for kind in self.series} for name in contenders
        }

    def run(self, block: int) -> None:
        gc.collect()
        for name, call in self.contenders.items():
            for kind, (count, pause) in self.series.items():
                self.blocks[name][kind].append(timed_block(call, block, count, pause=pause))

    def entries(self) -> dict[str, Entry]:
        return {
            name: Entry(**{kind: Series.of(found) for kind, found in series.items()})
            for name, series in self.blocks.items()
        }


class _PeerCalls:
    # What each task of each peer took and found; the first call of each, which may compile, does not count.
    def __init__(self, peers: Mapping[str, Peer], calls: int) -> None:
        self.count = _share(calls)
        self.tasks = {f"{name}, {task}": (peer, task) for name, peer in peers.items() for task in peer.tasks}
        self.milliseconds: dict[str, list[float]] = {name: [] for name in self.tasks}
        self.plans: dict[str, dict[int, list[int]]] = {name: {} for name in self.tasks}
        for peer, task in self.tasks.values():
            peer.run(task)

    def run(self) -> None:
        for name, (peer, task) in self.tasks.items():
            for _ in range(self.count):
                wall, _, (row, *plan) = peer.run(task)
                self.milliseconds[name].append(1e3 * wall)
                self.plans[name][row] = plan

    def percentiles(self) -> dict[str, Percentiles]:
        return {name: Percentiles.of(np.asarray(found)) for name, found in self.milliseconds.items()}


# Calls of one block.
def _share(count: int) -> int:
    return -(-count // BLOCKS)


def _change(now: Mapping[str, Any], before: Mapping[str, Any], key: str) -> dict[str, float | bool]:
    value, earlier = float(now["whole"][key]), float(before["whole"][key])
    spread = max(max(part[f"block_{key}"]) - min(part[f"block_{key}"]) for part in (now, before))
    return {
        "now": value,
        "before": earlier,
        "ratio": value / earlier,
        "beyond_noise": abs(value - earlier) > spread,
    }
