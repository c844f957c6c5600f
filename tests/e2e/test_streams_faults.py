"""Redis, PostgreSQL and workers are killed at random moments: every event that was sent is decided on once.

What was acknowledged to the producer must be in the ledger and on the decision stream, in the order in which it was
sent, and nothing else. The same harness finds what a worker loses that acknowledges before it records.

`DETENT_FAULT_EVENTS` sets the number of events of the largest run, 10,000 if it is not set.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError
from services import RealPostgres, RealRedis, RealServer
from stream_outcome import Outcome
from stream_processes import Plan

from serving import Bundle, open_bundle
from serving.records import Reason

EVENTS = int(os.environ.get("DETENT_FAULT_EVENTS", "10000"))
WORKER_KILLS = 25
PATIENCE_S = 240.0
"""Without any progress."""

WRITE_BUNDLE = "import sys, pathlib, bundle_parts; bundle_parts.write(pathlib.Path(sys.argv[1]))"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("faults") / "bundle"
    parts = str(Path(__file__).parents[1] / "unit")
    subprocess.run([sys.executable, "-c", WRITE_BUNDLE, str(path)], check=True, env=environment(parts))
    return open_bundle(path)


def environment(*folders: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*folders, *filter(None, sys.path)])}


# --- the run ----------------------------------------------------------------------------------------------


class Run:
    """A producer, two workers of which one decides and one stands by, and somebody who kills."""

    def __init__(self, plan: Plan, redis: RealRedis, worker: str) -> None:
        self.plan, self.redis, self.role = plan, redis, worker
        self.rng = random.Random(plan.seed)
        self.client: Any = Redis.from_url(plan.redis, retry=None, socket_timeout=10.0)
        self.log = Path(plan.folder, "processes.log").open("wb")  # noqa: SIM115 - closed with the run
        self.workers: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
        self.started = 0
        self.killed_at: list[int] = []
        """Decisions on the stream before each kill."""
        self.producer = self._start("producer")
        for _ in range(2):
            self.start_worker()

    def _start(self, role: str, **own: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.plan.command(role, **own), env=environment(), stdout=self.log, stderr=self.log, cwd=self.plan.folder
        )

    def start_worker(self, consumer: str | None = None) -> None:
        self.started += 1
        consumer = consumer or f"worker-{self.started}"
        process = self._start(self.role, consumer=consumer)
        self.workers[process.pid] = consumer, process

    def decided(self) -> int:
        """Decisions on the stream; -1 while Redis is away."""
        try:
            return int(self.client.xlen(self.plan.settings().decisions))
        except (RedisError, OSError):
            return -1

    def done(self) -> bool:
        """Whether everything was sent, delivered and acknowledged."""
        settings = self.plan.settings()
        if self.producer.poll() is None:
            return False
        try:
            newest = self.client.xinfo_stream(settings.features)["last-generated-id"]
            groups: list[dict[str, Any]] = self.client.xinfo_groups(settings.features)
        except (RedisError, OSError):
            return False
        return bool(groups) and groups[0]["last-delivered-id"] == newest and groups[0]["pending"] == 0

    def active(self) -> int:
        """Process number of the worker that decides, once there is one."""
        found: list[int] = []

        def look() -> bool:
            with contextlib.suppress(OSError, ValueError):
                found.extend(self.workers.keys() & {int(self.plan.active.read_text())})
            return bool(found)

        self.wait(look, "no worker decides")
        return found[0]

    def kill_worker(self) -> str:
        """SIGKILL to the one that decides; returns its name as a consumer."""
        consumer, process = self.workers.pop(self.active())
        process.kill()
        process.wait()
        return consumer

    def kill_server(self, server: RealServer) -> None:
        server.kill()
        time.sleep(self.rng.uniform(0.0, 0.2))
        server.start()

    def wait(self, condition: Any, complaint: str) -> None:
        progress, deadline = -1, time.monotonic() + PATIENCE_S
        while not condition():
            for consumer, process in self.workers.values():
                assert process.poll() is None, f"{consumer} ended by itself:\n{self.output()}"
            assert self.producer.poll() in (None, 0), f"the producer ended:\n{self.output()}"
            decided = self.decided()
            if decided > progress:
                progress, deadline = decided, time.monotonic() + PATIENCE_S
            assert time.monotonic() < deadline, f"{complaint}; {decided} decisions:\n{self.output()}"
            time.sleep(0.01)

    def output(self) -> str:
        return Path(self.plan.folder, "processes.log").read_text(errors="replace")[-6000:]

    def play(self, victims: Sequence[RealServer | None]) -> None:
        """Kill each, None being a worker, at random points of progress; then wait for the end and stop the workers."""
        order = self.rng.sample(victims, len(victims))
        points = sorted(self.rng.uniform(0.01, 0.95) * self.plan.events for _ in order)
        for victim, point in zip(order, points, strict=True):
            self.wait(lambda point=point: self.decided() >= point, "no progress")
            time.sleep(self.rng.uniform(0.0, 0.02))
            self.killed_at.append(self.decided())
            if victim is None:
                # Another takes its place, half of the time under its name.
                self.start_worker(self.rng.choice([self.kill_worker(), None]))
            else:
                self.kill_server(victim)
        self.finish()

    def finish(self) -> None:
        """Wait for the end and stop the workers."""
        self.wait(self.done, "it does not come to an end")
        for consumer, process in self.workers.values():
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0, f"{consumer}:\n{self.output()}"
        self.workers.clear()

    def close(self) -> None:
        for process in (self.producer, *(process for _, process in self.workers.values())):
            process.kill()
            process.wait()
        if self.redis.external:
            settings = self.plan.settings()
            self.client.delete(settings.features, settings.decisions)
        self.client.close()
        self.log.close()


@contextlib.contextmanager
def running(plan: Plan, redis: RealRedis, worker: str = "worker") -> Iterator[Run]:
    run = Run(plan, redis, worker)
    try:
        yield run
    finally:
        run.close()


def report(outcome: Outcome, victims: Sequence[RealServer | None], seconds: float) -> str:
    kills = Counter("worker" if victim is None else victim.name for victim in victims)
    return f"{len(outcome.sent)} events, killed {dict(kills)}, {seconds:.0f} s"


# --- tests ------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1800)
def test_nothing_is_lost_or_decided_twice_through_kills_of_everything(
    bundle: Bundle, redis_server: RealRedis, postgres_server: RealPostgres, tmp_path: Path
) -> None:
    redis_server.require_own()
    postgres_server.require_own()
    plan = Plan(
        redis=redis_server.url,
        ledger=postgres_server.new_database(),
        bundle=str(bundle.path),
        folder=str(tmp_path),
        events=EVENTS,
        seed=7,
    )
    victims = [*[redis_server] * 15, *[postgres_server] * 2, *[None] * WORKER_KILLS]
    begin = time.monotonic()
    with running(plan, redis_server) as run:
        run.play(victims)
        outcome = Outcome.of(plan, run.client)
    sys.stderr.write(f"\n{report(outcome, victims, time.monotonic() - begin)}\n")
    assert outcome.problems(bundle) == {}
    assert len(outcome.sent) == len(outcome.decisions) == len(outcome.published) > EVENTS
    assert len(run.killed_at) == len(victims)
    assert max(run.killed_at) < len(outcome.sent)
    # What was proved would say little if nothing was ever traded or forbidden.
    reasons = Counter(record.reason for _, record in outcome.decisions)
    assert set(reasons) <= {Reason.OK, Reason.NO_VALID_ACTION, Reason.INVALID_REQUEST}
    assert reasons[Reason.INVALID_REQUEST] == len(outcome.sent) - EVENTS
    assert sum(record.executed != 0 for _, record in outcome.decisions) > EVENTS / 10
    assert sum(record.trading_state == 1 for _, record in outcome.decisions) > EVENTS / 50
    # One that started for each that was killed, and the first.
    assert len(outcome.entries) - len(outcome.decisions) > WORKER_KILLS


@pytest.mark.timeout(1800)
def test_a_worker_that_was_cut_off_stands_by_and_takes_over_again(
    bundle: Bundle, redis_server: RealRedis, postgres_server: RealPostgres, tmp_path: Path
) -> None:
    events = min(EVENTS, 2000)
    plan = Plan(
        redis=redis_server.url,
        ledger=postgres_server.new_database(),
        bundle=str(bundle.path),
        folder=str(tmp_path),
        events=events,
        seed=10,
    )
    with running(plan, redis_server) as run:
        run.wait(lambda: run.decided() > events / 10, "no progress")
        first = run.active()
        os.kill(first, signal.SIGSTOP)
        cut_off(plan.ledger, first)
        run.wait(lambda: run.active() != first, "nobody takes over")
        # It wakes up in the middle of what it did, and believes that it decides.
        os.kill(first, signal.SIGCONT)
        run.wait(lambda: run.decided() > events / 4, "no progress")
        assert run.active() != first
        run.kill_worker()
        assert not run.done()
        assert list(run.workers) == [first]
        run.finish()
        outcome = Outcome.of(plan, run.client)
    assert outcome.problems(bundle) == {}
    assert len(outcome.sent) == len(outcome.published) > events


def cut_off(database: str, process: int) -> None:
    import psycopg

    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE %s",
            (f"detent pid {process} on %",),
        )


@pytest.mark.timeout(1800)
def test_nothing_is_lost_with_a_ledger_in_a_file(bundle: Bundle, redis_server: RealRedis, tmp_path: Path) -> None:
    redis_server.require_own()
    events = min(EVENTS, 1500)
    plan = Plan(
        redis=redis_server.url,
        ledger=str(tmp_path / "ledger.db"),
        bundle=str(bundle.path),
        folder=str(tmp_path),
        events=events,
        seed=8,
    )
    with running(plan, redis_server) as run:
        run.play([*[redis_server] * 4, *[None] * 4])
        outcome = Outcome.of(plan, run.client)
    assert outcome.problems(bundle) == {}
    assert len(outcome.sent) == len(outcome.published) > events


@pytest.mark.timeout(1800)
def test_the_check_finds_what_a_worker_loses_that_acknowledges_first(
    bundle: Bundle, redis_server: RealRedis, tmp_path: Path
) -> None:
    plan = Plan(
        redis=redis_server.url,
        ledger=str(tmp_path / "ledger.db"),
        bundle=str(bundle.path),
        folder=str(tmp_path),
        events=min(EVENTS, 1500),
        seed=9,
    )
    with running(plan, redis_server, "wrong") as run:
        run.play([None] * 6)
        outcome = Outcome.of(plan, run.client)
    problems = outcome.problems(bundle)
    assert problems["lost"]
    assert set(problems) == {"lost"}
