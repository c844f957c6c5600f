"""The decision service as a process, and what happens to it: kills, a ledger that fails, graphs that hang, clocks.

Clients ask until each event is answered. Afterwards every answer is in the ledger bit for bit, nothing was decided
twice, nothing forbidden was executed, and the risk manager remembered everything.

`DETENT_SERVE_KILLS` sets how often the service is killed, 25 times if it is not set.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from http_processes import bundle_path, environment
from serve_load import Load, loading
from serve_outcome import Outcome
from serve_processes import CLOCK, SLOW_PLANNER, SLOW_POLICY, Server, detent_serve, faulty_server, running
from services import RealPostgres

from serving.ledger.sqlite import SqliteLedger
from serving.records import ControlRecord, Reason

KILLS = int(os.environ.get("DETENT_SERVE_KILLS", "25"))
COMMAND = {"person": "Ada", "reason": "a test"}
# As many actions, of another meaning.
WRITE_ANOTHER_LAYOUT = """
import functools, sys, pathlib, bundle_parts
bundle_parts.ActionTable = functools.partial(bundle_parts.ActionTable, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
bundle_parts.write(pathlib.Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_path(tmp_path_factory)


def progress(server: Server, load: Load, events: int) -> None:
    """Until so many more events are answered."""
    wanted = load.answered + events
    server.wait(lambda: load.answered >= wanted, f"{load.answered} of {wanted} events are answered")


def refusal(server: Server, load: Load, answers: int) -> None:
    """Until so many more answers say that nothing is recorded."""
    wanted = len(load.unrecorded) + answers
    server.wait(lambda: len(load.unrecorded) >= wanted, "nothing is held")


def command(server: Server, name: str) -> bytes:
    status, answer = server.ask("POST", f"/{name}", COMMAND)
    assert status == 200, answer
    return answer


# --- killed -----------------------------------------------------------------------------------------------


def kill_at_random(server: Server, load: Load, rng: random.Random, kills: int) -> list[bytes]:
    """Kill it again and again; one time in five while it starts. Returns: answers to commands."""
    commands = []
    for kill in range(kills):
        load.next_bar(deep=kill % 3 == 2)
        if kill % 5 == 4:
            time.sleep(rng.uniform(0.0, 1.5))
        else:
            progress(server, load, rng.randrange(1, 60))
            if kill % 10 in (2, 6):
                # The answer is all that there was time for.
                commands.append(command(server, "kill" if kill % 10 == 2 else "reset"))
            else:
                time.sleep(rng.uniform(0.0, 0.02))
        server.kill()
        server.start()
    progress(server, load, 20)
    return commands


@pytest.mark.timeout(1800)
def test_a_service_killed_at_random_moments_loses_nothing_and_decides_nothing_twice(
    bundle: Path, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger.db"
    server = detent_serve(bundle, str(ledger), tmp_path)
    with running(server), loading(server.port, seed=1) as load:
        commands = kill_at_random(server, load, random.Random(1), KILLS)
        load.finish()
        server.stop()
    outcome = Outcome.of(load, str(ledger), commands)
    assert outcome.problems() == {}
    # What was proved would say little if nothing was traded, limited, or asked for twice.
    records = [record for _, record in outcome.decisions]
    assert len(records) == len(load.bodies) > 10 * KILLS
    assert sum(record.executed != 0 for record in records) > KILLS
    assert sum(len(answers) > 1 for answers in load.answers.values()) > 5 * KILLS
    assert {record.trading_state for record in records} == ({0, 1, 2} if KILLS > 2 else {0})
    starts = [entry for entry in outcome.entries if getattr(entry.record, "command", "") == "start"]
    assert len(starts) > KILLS // 2


@pytest.mark.timeout(1800)
def test_the_check_finds_what_a_service_loses_that_answers_before_it_writes(bundle: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.db"
    server = faulty_server(bundle, ledger, tmp_path, "--answers-first")
    with running(server), loading(server.port, seed=2) as load:
        kill_at_random(server, load, random.Random(2), 2)
        load.finish()
        server.stop()
    problems = Outcome.of(load, str(ledger), []).problems()
    assert problems["lost"]
    # A twin of what was lost may have been decided once more.
    assert set(problems) <= {"lost", "altered"}


# --- a ledger that fails ----------------------------------------------------------------------------------


@pytest.mark.timeout(1800)
def test_with_its_database_killed_the_service_holds_and_goes_on_once_it_is_back(
    bundle: Path, tmp_path: Path, postgres_server: RealPostgres
) -> None:
    postgres_server.require_own()
    ledger, rng, commands = postgres_server.new_database(), random.Random(3), []
    server = detent_serve(bundle, ledger, tmp_path)
    with running(server), loading(server.port, seed=3) as load:
        for kill in range(4):
            progress(server, load, rng.randrange(1, 100))
            if kill == 1:
                commands.append(command(server, "kill"))
            postgres_server.kill()
            refusal(server, load, 20)
            if kill == 2:
                server.kill()
            postgres_server.start()
            if kill == 2:
                server.start()
            progress(server, load, 20)
            if kill == 2:
                commands.append(command(server, "reset"))
        load.finish()
        server.stop()
    outcome = Outcome.of(load, ledger, commands)
    assert outcome.problems() == {}
    assert {record.reason for record in load.unrecorded} == {Reason.LEDGER_FAILED}
    records = [record for _, record in outcome.decisions]
    assert {record.trading_state for record in records} >= {0, 2}
    assert sum(record.executed != 0 for record in records) > 20


@pytest.mark.timeout(1800)
def test_on_a_full_disk_the_service_holds_and_goes_on_without_a_restart_once_there_is_room(
    bundle: Path, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger.db"
    server = detent_serve(bundle, str(ledger), tmp_path)
    with running(server), loading(server.port, seed=4) as load:
        progress(server, load, 50)
        assert server.process is not None
        limit_files(server.process.pid, 0)
        refusal(server, load, 20)
        status, answer = server.ask("POST", "/kill", COMMAND)
        assert status == 503
        assert "could not be recorded" in json.loads(answer)["error"]
        assert json.loads(server.ask("GET", "/state")[1])["killed"] is True
        assert server.ask("GET", "/metrics")[0] == 200
        limit_files(server.process.pid, resource.RLIM_INFINITY)
        progress(server, load, 20)
        # Not in the ledger as a command, and in force nevertheless, now and after a crash.
        server.kill()
        server.start()
        server.wait_until_ready()
        assert json.loads(server.ask("GET", "/state")[1])["killed"] is True
        commands = [command(server, "reset")]
        progress(server, load, 50)
        load.finish()
        server.stop()
    outcome = Outcome.of(load, str(ledger), commands)
    assert outcome.problems() == {}
    assert {record.reason for record in load.unrecorded} == {Reason.LEDGER_FAILED}
    states = [record.trading_state for _, record in outcome.decisions]
    assert Counter(states)[2] >= 10
    assert 2 not in (states[0], states[-1])


def limit_files(process: int, size: int) -> None:
    """A process writes no file beyond so many bytes; with 0 its disk is full."""
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# --- graphs that hang, clocks that jump ------------------------------------------------------------------


@pytest.fixture
def faulty(bundle: Path, tmp_path: Path) -> Iterator[Server]:
    with running(faulty_server(bundle, tmp_path / "ledger.db", tmp_path)) as server:
        yield server


def decide(server: Server, event: str, *, bar_time: float | None = None, **changes: Any) -> dict[str, Any]:
    """A decision; only what an active account may do is asked for, unless changes say otherwise."""
    request = {
        "event_id": event,
        "bar_time": time.time() - 1.0 if bar_time is None else bar_time,
        "features": {"gap_return": 0.001, "intraday_return": 0.002, "volatility_20": 0.2, "momentum": 0.1},
        "account": {"equity": 1000.0, "position": 0.0, "holding_time": 10.0} | changes,
        "action_masks": [False, False, True, True, False, False, False],
    }
    status, answer = server.ask("POST", "/decide", request)
    assert status == 200, answer
    record: dict[str, Any] = json.loads(answer)
    assert record["event_id"] == event
    return record


def held(record: dict[str, Any]) -> str:
    """The reason of a decision that must be Hold."""
    assert (record["executed"], record["target_position"], record["flatten"]) == (0, None, False)
    return str(record["reason"])


def test_a_planner_that_hangs_leaves_it_to_the_policy(faulty: Server, tmp_path: Path) -> None:
    assert decide(faulty, "before")["source"] == "planner"
    (tmp_path / SLOW_PLANNER).touch()
    for event in ("late", "busy"):
        record = decide(faulty, event)
        assert (record["source"], record["reason"]) == ("policy", "ok")
        assert record["executed"] in (2, 3)
    (tmp_path / SLOW_PLANNER).unlink()
    events = iter(range(1000))
    faulty.wait(lambda: decide(faulty, f"after {next(events)}")["source"] == "planner", "it plans no more")


def test_a_policy_that_hangs_holds_and_a_kill_switch_pulled_meanwhile_stays(faulty: Server, tmp_path: Path) -> None:
    (tmp_path / SLOW_POLICY).touch()
    found: list[dict[str, Any]] = []
    late = threading.Thread(target=lambda: found.append(decide(faulty, "late")))
    late.start()
    faulty.wait(lambda: json.loads(faulty.ask("GET", "/v2/health/live")[1])["live"], "it is not alive")
    command(faulty, "kill")
    late.join()
    assert held(found[0]) == Reason.INFERENCE_LATE
    assert held(decide(faulty, "busy")) == Reason.INFERENCE_LATE
    (tmp_path / SLOW_POLICY).unlink()
    events = iter(range(1000))
    faulty.wait(lambda: held(decide(faulty, f"after {next(events)}")) != Reason.INFERENCE_LATE, "it decides no more")
    assert decide(faulty, "killed")["trading_state"] == 2
    command(faulty, "reset")
    assert decide(faulty, "on")["executed"] in (2, 3)


def test_clocks_that_jump_stop_trading_but_not_the_closing_of_a_halted_account(faulty: Server, tmp_path: Path) -> None:
    clock = tmp_path / CLOCK
    assert decide(faulty, "a")["executed"] in (2, 3)
    clock.write_text("-3600")
    assert held(decide(faulty, "back")) == Reason.CLOCK_BACKWARDS
    command(faulty, "kill")
    halted = decide(faulty, "halted", position=0.5)
    assert (halted["executed"], halted["flatten"], halted["target_position"]) == (0, True, 0.0)
    clock.unlink()
    command(faulty, "reset")
    assert decide(faulty, "b")["executed"] in (2, 3)
    clock.write_text(str(30 * 86_400))
    assert held(decide(faulty, "ahead")) == Reason.STALE_DATA
    clock.unlink()
    assert held(decide(faulty, "c")) == Reason.CLOCK_BACKWARDS
    # The same after a crash.
    faulty.kill()
    faulty.start()
    faulty.wait_until_ready()
    assert held(decide(faulty, "d")) == Reason.CLOCK_BACKWARDS


def test_a_reset_ends_what_a_clock_that_was_ahead_left_behind(faulty: Server, tmp_path: Path) -> None:
    (tmp_path / CLOCK).write_text(str(30 * 86_400))
    assert held(decide(faulty, "ahead")) == Reason.STALE_DATA
    (tmp_path / CLOCK).unlink()
    assert held(decide(faulty, "back")) == Reason.CLOCK_BACKWARDS
    command(faulty, "reset")
    assert decide(faulty, "on")["executed"] in (2, 3)


# --- another bundle ---------------------------------------------------------------------------------------


def refused(server: Server, ledger: Path, number: int) -> str:
    """Why a bundle was refused, in words, once so many were refused before."""

    def found() -> list[str]:
        with closing(SqliteLedger(ledger, read_only=True)) as book:
            records = [entry.record for entry in book.read()]
        return [one.detail for one in records if isinstance(one, ControlRecord) and one.command == "refused_bundle"]

    server.wait(lambda: len(found()) > number, "nothing is refused")
    return found()[number]


def test_a_bundle_that_was_tampered_with_or_is_of_another_layout_is_refused_and_the_old_one_goes_on(
    bundle: Path, tmp_path: Path
) -> None:
    ledger, link = tmp_path / "ledger.db", tmp_path / "champion"
    other = tmp_path / "other"
    parts = str(Path(__file__).parents[1] / "unit")
    subprocess.run([sys.executable, "-c", WRITE_ANOTHER_LAYOUT, str(other)], check=True, env=environment(parts))
    tampered = shutil.copytree(bundle, tmp_path / "tampered")
    manifest = (bundle / "manifest.json").read_bytes()
    assert manifest.count(b'"git_commit": "0') == 1
    (tampered / "manifest.json").write_bytes(manifest.replace(b'"git_commit": "0', b'"git_commit": "1'))
    link.symlink_to(bundle)
    server = detent_serve(link, str(ledger), tmp_path, "--watch-seconds", "0.1")
    with running(server), loading(server.port, seed=5) as load:
        progress(server, load, 10)
        for number, (candidate, words) in enumerate([(other, "layout_hash: expected"), (tampered, "manifest.json: ")]):
            move(link, candidate)
            assert words in refused(server, ledger, number)
            progress(server, load, 10)
        load.finish()
        server.stop()
    outcome = Outcome.of(load, str(ledger), [])
    assert outcome.problems() == {}
    assert len({record.bundle_hash for _, record in outcome.decisions}) == 1


def move(link: Path, target: Path) -> None:
    fresh = link.with_name("fresh")
    fresh.symlink_to(target)
    fresh.replace(link)
