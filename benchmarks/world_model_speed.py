"""How fast a world model learns and imagines: Detent, plain torch, the matrix products alone, and peers.

One thread, one run, repeats in turn, so that whatever else the machine does falls on all alike. Processor seconds are
what ratios are built from; wall seconds stand beside them. Peers run in an interpreter of their own
(`benchmarks.peer_speed`) and one that cannot run is reported as absent, with the reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from benchmarks import peer_speed
from benchmarks.machine import library_versions, machine
from benchmarks.world_model_tasks import Shapes, Tasks, detent_tasks, floor_tasks, plain_torch_tasks

LIBRARIES = ("numpy", "torch")
TASKS = ("epoch", "imagine", "sample")
OWN, PLAIN, FLOOR = "Detent", "plain torch", "matrix products"
CONTENDERS: dict[str, Callable[[Shapes], Tasks]] = {OWN: detent_tasks, PLAIN: plain_torch_tasks, FLOOR: floor_tasks}

GOALS = {"epoch": 1.6 / 1.86, "imagine": 60 / 104, "sample": 13 / 19.3}
"""What Detent may take at most, as a share of what plain torch takes in the same run: the goals of a quiet AMD EPYC
(1.6 s, 60 ms, 13 ms) over what plain torch took there (1.86 s, 104 ms, 19.3 ms)."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One task of one contender, seconds."""

    contender: str
    task: str
    repeats: int
    median: float
    """Processor seconds."""
    lowest: float
    highest: float
    wall_median: float

    @classmethod
    def of(cls, contender: str, task: str, runs: Sequence[tuple[float, float]]) -> Timing:
        """Summarise runs of (wall, processor) seconds."""
        wall, processor = np.array(runs).T
        return cls(
            contender=contender,
            task=task,
            repeats=len(runs),
            median=float(np.median(processor)),
            lowest=float(processor.min()),
            highest=float(processor.max()),
            wall_median=float(np.median(wall)),
        )


@dataclass(frozen=True, kw_only=True)
class WorldModelReport:
    """Every timing with everything needed to read it."""

    shapes: Shapes
    timings: tuple[Timing, ...]
    absent: dict[str, str]
    """Peers that could not run, and why."""
    peer_versions: dict[str, dict[str, str]]
    machine: dict[str, str | int]
    versions: dict[str, str]

    def timing(self, contender: str, task: str) -> Timing | None:
        """The timing of one task; None where a contender has no such task or is absent."""
        for timing in self.timings:
            if (timing.contender, timing.task) == (contender, task):
                return timing
        return None

    def ratio(self, contender: str, task: str, to: str) -> float | None:
        """Processor time of a contender over that of another; None where either is missing."""
        mine, other = self.timing(contender, task), self.timing(to, task)
        return None if mine is None or other is None else mine.median / other.median

    @property
    def missed(self) -> tuple[str, ...]:
        """Tasks whose goal is missed, or in which a peer is faster."""
        tasks = []
        for task, goal in GOALS.items():
            share = self.ratio(OWN, task, PLAIN)
            peers = [self.ratio(OWN, task, timing.contender) for timing in self.timings if timing.contender != FLOOR]
            slower = any(ratio is not None and ratio > 1.0 for ratio in peers)
            if slower or (share is not None and share > goal):
                tasks.append(task)
        return tuple(tasks)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        ratios = {
            task: {
                timing.contender: {
                    "to_floor": self.ratio(timing.contender, task, FLOOR),
                    "detent_to_it": self.ratio(OWN, task, timing.contender),
                }
                for timing in self.timings
                if timing.task == task
            }
            for task in TASKS
        }
        return {**asdict(self), "threads": 1, "ratios": ratios, "goals": GOALS, "missed": self.missed}


def measure_world_model(
    shapes: Shapes | None = None,
    *,
    repeats: int = 7,
    peers: Sequence[str] = (),
    peer_python: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> WorldModelReport:
    """Time every task of every contender, in turn, after one run that does not count.

    Args:
        shapes: None takes those of the goals.
        repeats: rounds; each runs every task of every contender once.
        peers: names in `peer_speed.PEERS`.
        peer_python: interpreter that has the peers; None takes this one.
        progress: called with (rounds done, rounds in all).

    Raises: ValueError on an unknown peer or no repeat; RuntimeError if a peer ends in the middle.
    """
    shapes = shapes or Shapes()
    unknown = sorted(set(peers) - set(peer_speed.PEERS))
    if unknown or repeats < 1:
        raise ValueError(
            f"peers, repeats: expected names of {sorted(peer_speed.PEERS)} and >= 1, was {unknown or repeats}"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ExitStack() as cleanup:
        cleanup.callback(torch.set_num_threads, threads)
        opened = {
            name: cleanup.enter_context(Peer(name, shapes, peer_python or Path(sys.executable))) for name in peers
        }
        run: dict[tuple[str, str], Callable[[], tuple[float, float]]] = {}
        for name, build in CONTENDERS.items():
            run |= {(name, task): _timed(call) for task, call in build(shapes).items()}
        for name, peer in opened.items():
            run |= {(name, task): peer.timed(task) for task in peer.tasks}
        runs: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in run}
        for round_ in range(repeats + 1):
            for key, call in run.items():
                runs[key].append(call())
            if progress is not None:
                progress(round_, repeats)
    return WorldModelReport(
        shapes=shapes,
        timings=tuple(Timing.of(*key, found[1:]) for key, found in runs.items()),
        absent={name: peer.absent for name, peer in opened.items() if peer.absent},
        peer_versions={name: peer.versions for name, peer in opened.items() if not peer.absent},
        machine=machine(),
        versions=library_versions(LIBRARIES),
    )


class Peer:
    """A peer in a process of its own: `tasks` it has, or why it is `absent`.

    Args:
        name: in the table of the script.
        settings: dataclass that its tasks are built of.
        python: interpreter.
        script: file that serves peers by the protocol of `peer_speed`; None is that one.
    """

    def __init__(self, name: str, settings: Any, python: Path, script: str | None = None) -> None:
        self._name = name
        self._process = subprocess.Popen(
            [str(python), script or peer_speed.__file__, name, json.dumps(asdict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        greeting = self._answer()
        self.tasks: list[str] = greeting.get("tasks", [])
        self.versions: dict[str, str] = greeting.get("versions", {})
        self.absent: str = greeting.get("absent", "")

    def timed(self, task: str) -> Callable[[], tuple[float, float]]:
        """A call that runs the task once and returns (wall, processor) seconds."""

        def call() -> tuple[float, float]:
            wall, processor, *_ = self.run(task)
            return wall, processor

        return call

    def run(self, task: str) -> Any:
        """Run the task once; its wall and processor seconds, and third what it returned where that is a list."""
        assert self._process.stdin is not None  # noqa: S101 - a pipe was asked for
        self._process.stdin.write(task + "\n")
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name}: expected an answer, the process ended with code {self._process.wait()}")
        return json.loads(line)


def _timed(call: Callable[[], object]) -> Callable[[], tuple[float, float]]:
    def timed() -> tuple[float, float]:
        wall, processor = time.perf_counter(), time.process_time()
        call()
        return time.perf_counter() - wall, time.process_time() - processor

    return timed
