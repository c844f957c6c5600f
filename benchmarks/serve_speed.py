"""How fast `detent serve` answers, end to end over loopback, and whether its memory stays flat and swaps lose nothing.

A real service process with a fresh ledger, one client, one connection that is kept alive. Every series runs in blocks,
all contenders in turn, beside an echo server on the same pattern, so that whatever else the machine does falls on all
alike. *Hot* requests come back to back; *paced* ones at a fixed rate whatever the answers do (open loop), and their
latency counts from when each was due, so a slow answer delays those behind it. Every answer is computed again in the
client and compared; that happens between blocks, like preparing requests.
"""

from __future__ import annotations

import contextlib
import gc
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.latency import Percentiles
from benchmarks.machine import library_versions, machine
from benchmarks.serve_answers import Tally, Verdict
from benchmarks.serve_calls import (
    Calls,
    decide_calls,
    echo_calls,
    engine_calls,
    fsync_calls,
    infer_calls,
    stream_calls,
)
from benchmarks.serve_process import MissingServerError, Service, echo_server, redis_server
from benchmarks.serve_swaps import SwapReport, measure_swaps
from benchmarks.serve_variants import make_variant
from serving import open_bundle
from serving.engine import DecisionEngine
from serving.http.models import PLANNER as PLANNER_MODEL
from serving.ledger.open import open_ledger
from serving.settings import EngineSettings

LIBRARIES = ("numpy", "onnxruntime", "uvicorn", "uvloop", "httptools", "msgspec")
BLOCKS = 10
RATE = 200.0
"""Paced requests a second."""
HOUR = round(3600 * RATE)

ECHO, FSYNC, ENGINE = "echo", "fsync", "engine"
INFER, INFER_JSON, DECIDE, DECIDE_NO_FSYNC = "infer", "infer, JSON", "decide", "decide, no fsync"
STREAM, INFER_PLANNER, DECIDE_PLANNER = "stream", "infer, planner", "decide, planner"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What requests may take, milliseconds; None asks nothing."""

    p50_ms: float | None = None
    p99_ms: float | None = None
    paced_p99_ms: float | None = None


POLICY_GOAL = Goal(p50_ms=0.25, p99_ms=0.5, paced_p99_ms=1.5)
PLANNER_GOAL = Goal(paced_p99_ms=3.0)
GOALS = {
    INFER: POLICY_GOAL,
    INFER_JSON: POLICY_GOAL,
    DECIDE: POLICY_GOAL,
    DECIDE_NO_FSYNC: POLICY_GOAL,
    STREAM: Goal(p99_ms=1.0),
    INFER_PLANNER: PLANNER_GOAL,
    DECIDE_PLANNER: PLANNER_GOAL,
}
START_GOAL_S = 2.0
RSS_GOAL_MIB = 200.0
GROWTH_GOAL_MIB = 20.0
"""Growth in an hour of paced requests that counts as flat, a tenth of what the service may take."""
SWAPS_GOAL, SWAP_REQUESTS_GOAL = 100, 10_000
SMOKE: dict[str, Any] = {"calls": 5 * BLOCKS, "seconds": 0.5, "swaps": 3, "swap_requests": 100}
"""Does it run at all?"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Requests of one kind."""

    hot: Percentiles
    paced: Percentiles
    per_second: float
    """Hot requests a second."""
    tally: Tally


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Start and memory of one service."""

    start_s: float
    """From the start of the process to the first answer."""
    ready_mib: float
    """Resident memory then."""
    samples: tuple[tuple[int, float], ...]
    """Requests answered and MiB after each block."""

    @property
    def growth_mib(self) -> float:
        """Growth over an hour of paced requests, from the slope of the second half of the blocks."""
        answered, mib = np.array(self.samples[len(self.samples) // 2 :], dtype=np.float64).T
        return float(np.polyfit(answered, mib, 1)[0]) * HOUR


@dataclass(frozen=True, kw_only=True)
class ServeReport:
    """Every series with everything needed to read it."""

    bundle_hash: str
    entries: dict[str, Entry]
    footprints: dict[str, Footprint]
    swaps: SwapReport
    absent: dict[str, str]
    """Kinds of requests that could not be made, and why."""
    machine: dict[str, str | int]
    versions: dict[str, str]

    def to_floor(self, name: str, kind: str = "hot") -> float:
        """Median over that of the echo server."""
        ours, floor = (getattr(self.entries[one], kind).p50_ms for one in (name, ECHO))
        return float(ours / floor)

    @property
    def broken(self) -> tuple[str, ...]:
        """What went wrong, in words: requests that failed or were answered wrongly."""
        tallies = {name: entry.tally for name, entry in self.entries.items()} | {"hot swaps": self.swaps.tally}
        return tuple(
            f"{name}: expected 0 failed and 0 wrong of {tally.asked:,}, was {tally.failed:,} and {tally.wrong:,}: "
            + "; ".join(tally.complaints)
            for name, tally in tallies.items()
            if tally.broken
        )

    @property
    def missed(self) -> tuple[str, ...]:
        """Goals that are missed, in words."""
        found = []
        for name, goal in GOALS.items():
            if name in self.entries:
                found += [
                    f"{name}: {what}, ms: expected at most {limit:g}, was {value:.3g}"
                    for what, value, limit in _limits(self.entries[name], goal)
                    if limit is not None and value > limit
                ]
        for name, one in self.footprints.items():
            for what, size, most in (
                ("seconds to start", one.start_s, START_GOAL_S),
                ("MiB when ready", one.ready_mib, RSS_GOAL_MIB),
                ("MiB more in an hour", one.growth_mib, GROWTH_GOAL_MIB),
            ):
                if size > most:
                    found.append(f"service {name}: {what}: expected at most {most:g}, was {size:.3g}")
        for what, count, least in (
            ("swaps", self.swaps.swaps, SWAPS_GOAL),
            ("requests", self.swaps.tally.asked, SWAP_REQUESTS_GOAL),
        ):
            if count < least:
                found.append(f"hot swaps: {what}: expected at least {least:,}, was {count:,}")
        return (*found, *self.broken)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {
            **asdict(self),
            "swaps": self.swaps.to_dict(),
            "growth_mib": {name: one.growth_mib for name, one in self.footprints.items()},
            "to_floor": {name: {kind: self.to_floor(name, kind) for kind in ("hot", "paced")} for name in self.entries},
            "goals": {name: asdict(goal) for name, goal in GOALS.items()},
            "footprint_goals": {"start_s": START_GOAL_S, "ready_mib": RSS_GOAL_MIB, "growth_mib": GROWTH_GOAL_MIB},
            "swap_goals": {"swaps": SWAPS_GOAL, "requests": SWAP_REQUESTS_GOAL, "failed": 0, "wrong": 0},
            "missed": list(self.missed),
            "rate": RATE,
            "blocks": BLOCKS,
            "connections": 1,
            "garbage_collector": "of the client: frozen before the first block, enabled in all",
        }


def measure_serving(
    bundles: Sequence[Path] = (),
    *,
    calls: int = 5_000,
    seconds: float = 60.0,
    swaps: int = SWAPS_GOAL,
    swap_requests: int = SWAP_REQUESTS_GOAL,
    planner: bool = False,
    rule_modules: Sequence[str] = (),
    workdir: Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> ServeReport:
    """Start services and ask them.

    Args:
        bundles: the first is measured, all are swapped; with fewer than two, variants of it are made. None at all makes
            one.
        calls: hot requests of each kind, rounded up to whole blocks; a tenth as many warm each block up.
        seconds: of each paced series.
        swaps, swap_requests: at least so many.
        planner: give the bundle that is made an exact planner, which takes minutes.
        rule_modules: modules with rules that the bundles need.
        workdir: where ledgers are written, for its disk; None takes the folder for temporary files.
        progress: called with (steps done, steps in all, what comes next). Whatever it leaves running is measured too.

    Raises: ValueError on a count that is not positive, or bundles that cannot be told apart; serving.BundleError;
        RuntimeError or TimeoutError where a service ends or does not start.
    """
    for name, count in {"calls": calls, "seconds": seconds, "swaps": swaps, "swap_requests": swap_requests}.items():
        if not count > 0:
            raise ValueError(f"{name}: expected > 0, was {count}")
    tell, steps = progress or (lambda *_: None), BLOCKS + 3
    options = [word for module in rule_modules for word in ("--rule-module", module)]
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="detent-serve-", dir=workdir)))
        tell(0, steps, "bundles")
        paths = _bundles(folder, list(bundles), planner=planner)
        tell(1, steps, "services")
        bench = _Bench(cleanup, folder, paths[0], options)
        with _frozen():
            for block in range(BLOCKS):
                tell(block + 2, steps, f"block {block + 1} of {BLOCKS}")
                bench.run(_share(calls), _share(seconds * RATE))
        entries, footprints = bench.entries(), bench.footprints()
        bench.close()
        tell(steps - 1, steps, "hot swaps")
        swapped = measure_swaps(folder / "swaps", paths, requests=swap_requests, swaps=swaps, options=options)
    return ServeReport(
        bundle_hash=bench.bundle.hash,
        entries=entries,
        footprints=footprints,
        swaps=swapped,
        absent=bench.absent,
        machine=machine(),
        versions=library_versions(LIBRARIES),
    )


class Series:
    """Requests of one kind: what each took, and whether the answers were right."""

    def __init__(self, calls: Calls) -> None:
        self.calls, self.tally = calls, Tally()
        self.hot_ms, self.paced_ms = list[float](), list[float]()
        self._hot_s = 0.0

    def run_hot(self, count: int) -> None:
        """A block back to back, after a warm-up of a tenth as many."""
        warm_up = -(-count // 10)
        asked = self.calls.prepare(warm_up + count)
        answers, marks = [], [time.perf_counter()]
        for one in asked:
            answers.append(self._answer(one.message))
            marks.append(time.perf_counter())
        self.hot_ms += (1e3 * np.diff(marks[warm_up:])).tolist()
        self._hot_s += marks[-1] - marks[warm_up]
        self._judge(asked, answers)

    def run_paced(self, count: int, rate: float = RATE) -> None:
        """A block at a fixed rate, whatever the answers do; latencies count from when each request was due."""
        asked = self.calls.prepare(count)
        answers, begin = [], time.perf_counter() + 1.0 / rate
        for index, one in enumerate(asked):
            due = begin + index / rate
            _sleep_until(due)
            answers.append(self._answer(one.message))
            self.paced_ms.append(1e3 * (time.perf_counter() - due))
        self._judge(asked, answers)

    def entry(self) -> Entry:
        """All blocks together."""
        return Entry(
            hot=Percentiles.of(np.array(self.hot_ms)),
            paced=Percentiles.of(np.array(self.paced_ms)),
            per_second=len(self.hot_ms) / self._hot_s,
            tally=self.tally,
        )

    def _answer(self, message: Any) -> Any:
        try:
            return self.calls.send(message)
        except Exception as error:  # whatever the transport raises is an answer that did not come
            return error

    def _judge(self, asked: Sequence[Any], answers: Sequence[Any]) -> None:
        for one, answer in zip(asked, answers, strict=True):
            failed = isinstance(answer, Exception)
            self.tally.count(Verdict("failed", repr(answer)) if failed else self.calls.judge(one, answer))


class _Bench:
    # Services, what is asked of them, and their memory.
    def __init__(self, cleanup: ExitStack, folder: Path, path: Path, options: Sequence[str]) -> None:
        self.bundle, self.absent = open_bundle(path), dict[str, str]()
        self._cleanup, self._folder, self._path, self._options = ExitStack(), folder, path, options
        cleanup.push(self._cleanup)
        self.services: dict[str, Service] = {}
        self._samples: dict[str, list[tuple[int, float]]] = {}
        self._owners: dict[str, str] = {}
        self.series: dict[str, Series] = {}
        self._add_floors()
        self._add_policy()
        self._add_planner()

    def run(self, calls: int, paced_calls: int) -> None:
        gc.collect()
        for series in self.series.values():
            series.run_hot(calls)
            series.run_paced(paced_calls)
        for name, service in self.services.items():
            answered = sum(self.series[one].tally.asked for one, owner in self._owners.items() if owner == name)
            self._samples[name].append((answered, service.rss_mib))

    def entries(self) -> dict[str, Entry]:
        return {name: series.entry() for name, series in self.series.items()}

    def footprints(self) -> dict[str, Footprint]:
        return {
            name: Footprint(start_s=service.start_s, ready_mib=service.ready_mib, samples=tuple(self._samples[name]))
            for name, service in self.services.items()
        }

    def close(self) -> None:
        self._cleanup.close()

    def _add_floors(self) -> None:
        port = self._cleanup.enter_context(echo_server())
        self._add(ECHO, echo_calls(port, self.bundle))
        self._add(FSYNC, fsync_calls(self._folder / "fsync"))
        ledger = open_ledger(str(self._folder / "engine.db"), fsync="never")
        self._add(ENGINE, engine_calls(DecisionEngine(self.bundle, ledger, EngineSettings(planner=False)), ENGINE))

    def _add_policy(self) -> None:
        port = self._serve("policy", "--no-planner", "--fsync").port
        self._add(INFER, infer_calls(port, self.bundle), "policy")
        self._add(INFER_JSON, infer_calls(port, self.bundle, binary=False), "policy")
        self._add(DECIDE, decide_calls(port, self.bundle, DECIDE), "policy")
        account, more, environment = f"bench-{secrets.token_hex(4)}", list[str](), dict[str, str]()
        try:
            environment["DETENT_REDIS_URL"] = self._cleanup.enter_context(redis_server(self._folder / "redis"))
            more = ["--redis", "--account", account]
        except MissingServerError as error:
            self.absent[STREAM] = str(error)
        name = "policy, no fsync, Redis" if more else "policy, no fsync"
        port = self._serve(name, "--no-planner", "--no-fsync", *more, environment=environment).port
        self._add(DECIDE_NO_FSYNC, decide_calls(port, self.bundle, DECIDE_NO_FSYNC), name)
        if more:
            self._add(STREAM, stream_calls(self.bundle, STREAM, environment["DETENT_REDIS_URL"], account), name)

    def _add_planner(self) -> None:
        if self.bundle.planner_session is None:
            self.absent |= dict.fromkeys((INFER_PLANNER, DECIDE_PLANNER), "the bundle has no planner")
            return
        port = self._serve("planner", "--planner", "--no-fsync").port
        self._add(INFER_PLANNER, infer_calls(port, self.bundle, PLANNER_MODEL), "planner")
        self._add(DECIDE_PLANNER, decide_calls(port, self.bundle, DECIDE_PLANNER), "planner")

    def _add(self, name: str, calls: Calls, owner: str = "") -> None:
        self._cleanup.callback(calls.close)
        self.series[name], self._owners[name] = Series(calls), owner

    def _serve(self, name: str, *options: str, environment: Mapping[str, str] | None = None) -> Service:
        where = self._folder / f"service-{len(self.services)}"
        service = Service(self._path, where, "--watch-seconds", "0", *options, *self._options, environment=environment)
        self._cleanup.callback(service.close)
        self.services[name], self._samples[name] = service, []
        return service


def _bundles(folder: Path, given: list[Path], *, planner: bool) -> list[Path]:
    if not given:
        # It needs torch; whoever brings a bundle does not.
        from benchmarks.serve_bundles import EXACT, make_bundle

        given = [make_bundle(folder / "made", EXACT if planner else None)]
    if len(given) == 1:
        given += [make_variant(given[0], folder / f"variant-{shift}", shift) for shift in (1, 2)]
    return given


# As the service itself does with what it has loaded.
@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# Sleeping alone wakes up late, by as much as an answer takes.
def _sleep_until(due: float) -> None:
    left = due - time.perf_counter()
    if left > 1e-3:
        time.sleep(left - 1e-3)
    while time.perf_counter() < due:
        pass


def _share(count: float) -> int:
    return -(-round(count) // BLOCKS)


def _limits(entry: Entry, goal: Goal) -> tuple[tuple[str, float, float | None], ...]:
    return (
        ("p50", entry.hot.p50_ms, goal.p50_ms),
        ("p99", entry.hot.p99_ms, goal.p99_ms),
        ("paced p99", entry.paced.p99_ms, goal.paced_p99_ms),
    )
