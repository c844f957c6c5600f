"""The worker against a real Redis: nothing lost, nothing twice, whatever is interrupted where."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.cluster import RedisCluster
from services import RealRedis, find_redis, free_port
from serving_parts import request
from stream_parts import Running, TinyEngine, pending, published, record, send, settings_of, wait_for, work

from serving.engine import DecisionEngine
from serving.errors import LedgerError
from serving.ledger.sqlite import SqliteLedger
from serving.records import DecisionRecord, Mode, Reason, encode
from serving.stream.connection import Backoff, connect
from serving.stream.output import DecisionStream
from serving.stream.requests import event_name
from serving.stream.settings import hash_tag
from serving.stream.worker import StreamError, StreamSettings, StreamWorker, ask


@pytest.fixture
def client(redis_client: Any) -> Any:
    return redis_client


@pytest.fixture
def url(redis_server: RealRedis) -> str:
    return redis_server.url


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[TinyEngine]:
    ledger = SqliteLedger(tmp_path / "ledger.db", "paper", fsync="never")
    yield TinyEngine(ledger)
    ledger.close()


def take(client: Any, settings: StreamSettings, consumer: str, count: int) -> None:
    """Read as another consumer, or as ourselves before a crash, without acknowledging."""
    if not client.exists(settings.features) or not client.xinfo_groups(settings.features):
        client.xgroup_create(settings.features, settings.group, id="0", mkstream=True)
    client.xreadgroup(settings.group, consumer, {settings.features: ">"}, count=count)


def events_of(engine: TinyEngine) -> list[str]:
    return [json.loads(entry.body)["event_id"] for entry in engine.ledger.read()]


# --- names ------------------------------------------------------------------------------------------------


def test_streams_of_an_account_share_a_hash_tag() -> None:
    settings = StreamSettings.for_account("paper-1")
    assert (settings.features, settings.decisions) == ("detent:{paper-1}:features", "detent:{paper-1}:decisions")


@pytest.mark.parametrize(
    ("features", "decisions"),
    [
        ("features", "decisions"),
        ("detent:{a}:features", "detent:{b}:decisions"),
        ("detent:{}:features", "detent:{}:decisions"),
        ("detent:{a:features", "detent:{a:decisions"),
        ("detent:{a}:features", "detent:{a}:features"),
    ],
)
def test_keys_of_different_slots_are_refused(features: str, decisions: str) -> None:
    with pytest.raises(ValueError, match=r"same \{hash tag\}, so that Redis Cluster keeps them in one slot"):
        StreamSettings(features=features, decisions=decisions)


@pytest.mark.parametrize("key", ["{a}b", "a{b}c{d}", "{}{a}", "a{}b", "plain", "a}b{c", "{a", "x{{y}z"])
def test_hash_tags_are_those_of_redis(key: str) -> None:
    from redis.crc import key_slot

    assert key_slot(key.encode()) == key_slot((hash_tag(key) or key).encode())


@pytest.mark.parametrize("account", ["", "a}b", "{a"])
def test_an_account_that_would_break_the_tag_is_refused(account: str) -> None:
    with pytest.raises(ValueError, match="account: expected a name without braces"):
        StreamSettings.for_account(account)


@pytest.mark.parametrize(
    ("name", "value"), [("batch", 0), ("block_ms", 0), ("decisions_maxlen", -1), ("backoff_first_s", 0.0)]
)
def test_settings_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected"):
        settings_of(**{name: value})


# --- one decision for each event --------------------------------------------------------------------------


def test_a_request_becomes_one_entry_one_decision_and_is_acknowledged(
    engine: TinyEngine, client: Any, url: str
) -> None:
    settings = settings_of()
    send(client, settings, "e1", "e2")
    worker = work(engine, url, settings, ["e1", "e2"])
    entries = list(engine.ledger.read())
    found = client.xrange(settings.decisions)
    assert [key for key, _ in found] == [b"1-0", b"2-0"]
    for (_, fields), entry, event in zip(found, entries, (b"e1", b"e2"), strict=True):
        assert fields == {
            b"event_id": event,
            b"hash": entry.hash.encode(),
            b"decision": entry.body,
        }
    status = worker.status
    assert (status.decided, status.published, status.acknowledged, status.refused, status.failures) == (2, 2, 2, 0, 0)


def test_pending_messages_come_first_in_the_order_of_the_stream(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of(batch=2)
    events = [f"e{number}" for number in range(8)]
    send(client, settings, *events[:6])
    for consumer, count in (("other", 2), ("me", 2), ("other", 1)):
        take(client, settings, consumer, count)
    send(client, settings, *events[6:])
    work(engine, url, settings, events)
    assert engine.asked == events


def test_messages_that_another_takes_meanwhile_keep_their_place(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of()
    send(client, settings, "e1")

    def stolen(event: str) -> None:
        if event in ("e1", "e3"):
            number = int(event[1])
            send(client, settings, f"e{number + 1}")
            take(client, settings, "other", 1)
            if event == "e1":
                send(client, settings, "e3")

    engine.on_decide = stolen
    work(engine, url, settings, ["e1", "e2", "e3", "e4"])
    assert engine.asked == ["e1", "e2", "e3", "e4"]


def test_messages_that_others_are_still_busy_with_are_left_to_them(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of(takeover_idle_ms=3_600_000, upkeep_s=0.01)
    send(client, settings, "theirs", "new")
    take(client, settings, "other", 1)
    worker = StreamWorker(engine, url, settings)
    with Running(worker) as running:
        running.until(lambda: worker.status.acknowledged == 1)
    assert engine.asked == ["new"]
    assert pending(client, settings) == 1


def test_messages_that_nobody_finishes_are_taken_over_later(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of(takeover_idle_ms=1_000, upkeep_s=0.01)
    send(client, settings, "theirs", "new")
    take(client, settings, "other", 1)
    work(engine, url, settings, ["theirs", "new"])
    assert sorted(engine.asked) == ["new", "theirs"]


def test_an_event_that_comes_twice_is_decided_on_once(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of()
    send(client, settings, "e1", "e1", "e2", "e1")
    worker = work(engine, url, settings, ["e1", "e2"])
    assert published(client, settings) == [("1-0", "e1"), ("2-0", "e2")]
    assert (worker.status.acknowledged, worker.status.published) == (4, 2)


@pytest.mark.parametrize("crashed_after", ["recording", "publishing"])
def test_a_crash_before_the_acknowledgement_repeats_nothing(
    engine: TinyEngine, client: Any, url: str, crashed_after: str
) -> None:
    settings = settings_of()
    send(client, settings, "e1")
    take(client, settings, "me", 1)
    engine.decide(request("e1"), body=b"")
    if crashed_after == "publishing":
        DecisionStream(engine.ledger, settings).publish(client)
        assert published(client, settings) == [("1-0", "e1")]
    worker = work(engine, url, settings, ["e1"])
    assert published(client, settings) == [("1-0", "e1")]
    assert events_of(engine) == ["e1"]
    assert worker.status.acknowledged == 1


def test_the_batch_in_hand_is_finished_when_it_is_to_stop(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of(batch=4)
    send(client, settings, *(f"e{number}" for number in range(10)))
    worker = StreamWorker(engine, url, settings)
    stop = threading.Event()
    engine.on_decide = lambda _: stop.set()
    worker.run(stop)
    assert [event for _, event in published(client, settings)] == ["e0", "e1", "e2", "e3"]
    assert pending(client, settings) == 0
    assert worker.status.connected is False


# --- what cannot be read ----------------------------------------------------------------------------------

GOOD = json.loads(encode(request("good")))


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"other": "x"}, "message: expected a field 'request'"),
        ({"request": b""}, "request: "),
        ({"request": b"\xff\xfe"}, "request: "),
        ({"request": b"{" * 50_000}, "request: "),
        ({"request": b"[" * 50_000}, "request: "),
        ({"request": json.dumps({**GOOD, "bar_time": "noon"})}, r"request: .*bar_time"),
        ({"request": json.dumps({**GOOD, "colour": "red"})}, r"request: .*colour"),
        ({"request": json.dumps({**GOOD, "event_id": ""})}, "event_id: expected 1 to 200 printable"),
        ({"request": json.dumps({**GOOD, "event_id": "x" * 201})}, "event_id: expected 1 to 200 printable"),
        ({"request": json.dumps({**GOOD, "event_id": "a\0b"})}, "event_id: expected 1 to 200 printable"),
        ({"request": json.dumps({**GOOD, "event_id": "\ud800"})}, "request: |event_id: "),
        ({"request": json.dumps({**GOOD, "event_id": "e", "bundle_hash": "x" * 100_000})}, "at most 100000 bytes"),
    ],
    ids=["no field", "empty", "not utf-8", "braces", "deep", "type", "unknown", "no name", "long name", "nul",
         "surrogate", "too long"],
)  # fmt: skip
def test_what_cannot_be_read_is_held_acknowledged_and_never_comes_back(
    engine: TinyEngine, client: Any, url: str, fields: dict[str, bytes], detail: str
) -> None:
    settings = settings_of(max_request_bytes=100_000)
    send(client, settings, "before")
    client.xadd(settings.features, fields)
    send(client, settings, "after")
    worker = work(engine, url, settings, ["before", "after"])
    records = [entry.record for entry in engine.ledger.read()]
    assert len(records) == 3
    refused = records[1]
    assert isinstance(refused, DecisionRecord)
    assert (refused.reason, refused.executed) == (Reason.INVALID_REQUEST, 0)
    assert re.search(detail, refused.detail), refused.detail
    assert [event for _, event in published(client, settings)] == ["before", refused.event_id, "after"]
    assert (worker.status.refused, worker.status.failures) == (1, 0)


def test_a_refused_request_keeps_its_event_where_that_can_be_read() -> None:
    assert event_name(b"5-0", json.dumps({**GOOD, "bar_time": None}).encode()) == "good"
    assert event_name(b"5-0", b'{"event_id": "a\\u0000"}').startswith("unreadable:5-0:")
    names = {event_name(b"5-0", b"x"), event_name(b"6-0", b"x"), event_name(b"5-0", b"y"), event_name(b"5-0", None)}
    assert len(names) == 4


def test_a_message_that_is_deleted_at_the_last_moment_is_done_with(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of()
    ids = send(client, settings, "gone", "there")
    take(client, settings, "me", 2)
    client.xdel(settings.features, ids[0])
    worker = StreamWorker(engine, url, settings)
    worker._client = client
    worker._handle(worker._next())
    assert (worker.status.deleted, worker.status.acknowledged, pending(client, settings)) == (1, 2, 0)
    assert events_of(engine) == ["there"]


def test_a_message_that_was_deleted_does_not_come_back_for_ever(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of()
    ids = send(client, settings, "gone", "gone too", "there")
    take(client, settings, "me", 1)
    take(client, settings, "other", 1)
    client.xdel(settings.features, *ids[:2])
    worker = work(engine, url, settings, ["there"])
    assert events_of(engine) == ["there"]
    assert worker.status.deleted == 2
    assert worker.status.failures == 0


# --- the engine fails -------------------------------------------------------------------------------------


@pytest.mark.parametrize("takeover_idle_ms", [0, 3_600_000])
def test_what_is_not_recorded_is_neither_published_nor_acknowledged_but_tried_again_in_order(
    engine: TinyEngine, client: Any, url: str, takeover_idle_ms: int
) -> None:
    settings = settings_of(batch=4, takeover_idle_ms=takeover_idle_ms, upkeep_s=3600.0)
    send(client, settings, "e1", "e2", "e3")
    engine.failures["e2"] = [Reason.LEDGER_FAILED] * 20
    seen: list[tuple[int, int, int]] = []

    def look(event: str) -> None:
        if event == "e2" and engine.asked.count("e2") > 1:
            seen.append((len(published(client, settings)), pending(client, settings), len(events_of(engine))))

    engine.on_decide = look
    worker = work(engine, url, settings, ["e1", "e2", "e3"])
    assert set(seen) == {(1, 2, 1)}
    assert engine.asked == ["e1", *["e2"] * 21, "e3"]
    assert published(client, settings) == [("1-0", "e1"), ("2-0", "e2"), ("3-0", "e3")]
    assert worker.status.failures == 20
    assert worker.status.last_error == "LedgerError: event e2: as told"


def test_a_request_that_breaks_the_engine_is_refused_in_the_end(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of()
    send(client, settings, "e1", "bad", "e2")
    engine.failures["bad"] = [Reason.INTERNAL_ERROR] * 100
    work(engine, url, settings, ["e1", "bad", "e2"])
    assert engine.asked.count("bad") == 3
    entry = engine.ledger.find("bad")
    assert entry is not None
    refused = entry.record
    assert isinstance(refused, DecisionRecord)
    assert refused.reason is Reason.INVALID_REQUEST
    assert "failed 3 times: as told" in refused.detail


def test_an_engine_that_only_says_so_loses_nothing(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of()
    send(client, settings, "e1")
    engine.forgets = True
    worker = StreamWorker(engine, url, settings)
    with Running(worker) as running:
        running.until(lambda: worker.status.failures >= 3)
        assert "e1: expected its decision in the ledger" in worker.status.last_error
        assert (pending(client, settings), published(client, settings)) == (1, [])
        engine.forgets = False
        running.until(lambda: pending(client, settings) == 0)
    assert published(client, settings) == [("1-0", "e1")]


# --- the decision stream ----------------------------------------------------------------------------------


def test_only_live_decisions_are_published_whoever_asked(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of()
    engine.ledger.append(b'{"kind":"control"}')
    engine.decide(request("by http"), body=b"")
    engine.ledger.append(encode(record("by http", Reason.OK, "", Mode.SHADOW)))
    send(client, settings, "e1")
    work(engine, url, settings, ["e1"])
    assert published(client, settings) == [("2-0", "by http"), ("4-0", "e1")]


def test_decisions_that_were_asked_for_another_way_do_not_wait_for_a_message(
    engine: TinyEngine, client: Any, url: str
) -> None:
    settings = settings_of()
    worker = StreamWorker(engine, url, settings)
    with Running(worker) as running:
        running.until(lambda: worker.status.connected)
        engine.decide(request("by http"), body=b"")
        running.until(lambda: published(client, settings) == [("1-0", "by http")])


@pytest.mark.parametrize("lost", ["newest", "all"])
def test_what_redis_lost_is_published_again_in_order(
    engine: TinyEngine, client: Any, url: str, redis_server: RealRedis, lost: str, tmp_path: Path
) -> None:
    if redis_server.external:
        pytest.skip("the Redis server comes from the environment: tests do not stop it")
    settings = settings_of()
    files, kept = redis_server.folder / "appendonlydir", tmp_path / "kept"
    worker = StreamWorker(engine, url, settings)
    with Running(worker) as running:
        if lost == "newest":
            send(client, settings, *(f"e{number}" for number in range(5)))
            running.until(lambda: len(published(client, settings)) == 5)
        # The files of now, as a server finds them that lost what came after.
        shutil.copytree(files, kept)
        send(client, settings, *(f"e{number}" for number in range(5, 10)))
        running.until(lambda: len(published(client, settings)) == (10 if lost == "newest" else 5))
        before = client.xrange(settings.decisions)
        redis_server.kill()
        shutil.rmtree(files)
        shutil.copytree(kept, files, copy_function=shutil.copy)
        for path in (files, *files.iterdir()):
            shutil.chown(path, *[redis_server.folder.stat().st_uid] * 2)
        redis_server.start()
        send(client, settings, "after")
        running.until(lambda: bool(published(client, settings)) and published(client, settings)[-1][1] == "after")
    found = client.xrange(settings.decisions)
    assert found[:-1] == before
    assert [fields[b"event_id"].decode() for _, fields in found] == events_of(engine)


def test_an_emptied_redis_gets_group_and_decisions_again(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of()
    worker = StreamWorker(engine, url, settings)
    with Running(worker) as running:
        send(client, settings, "e1", "e2")
        running.until(lambda: len(published(client, settings)) == 2)
        client.delete(settings.features, settings.decisions)
        running.until(lambda: len(published(client, settings)) == 2)
        send(client, settings, "e3")
        running.until(lambda: len(published(client, settings)) == 3)
    assert published(client, settings) == [("1-0", "e1"), ("2-0", "e2"), ("3-0", "e3")]


def test_a_stream_that_lost_its_end_is_not_written_behind_the_gap(engine: TinyEngine, client: Any) -> None:
    settings = settings_of()
    output = DecisionStream(engine.ledger, settings)
    for event in ("e1", "e2"):
        engine.decide(request(event), body=b"")
    assert output.publish(client) == (2, 0)
    client.delete(settings.decisions)
    engine.decide(request("e3"), body=b"")
    message = send(client, settings, "e3")
    take(client, settings, "me", 1)
    with pytest.raises(Exception, match="expected to end at 2-0, ends at 0-0"):
        output.publish(client, message, ["e3"])
    assert (published(client, settings), pending(client, settings)) == ([], 1)
    output.find_end(client)
    assert output.publish(client, message, ["e3"]) == (3, 1)


def test_two_publishers_of_one_ledger_do_not_disturb_each_other(engine: TinyEngine, client: Any) -> None:
    settings = settings_of()
    first, second = DecisionStream(engine.ledger, settings), DecisionStream(engine.ledger, settings)
    for number in range(6):
        engine.decide(request(f"e{number}"), body=b"")
        (first, second)[number % 2].publish(client)
    assert published(client, settings) == [(f"{number + 1}-0", f"e{number}") for number in range(6)]


def test_the_stream_of_another_ledger_is_refused(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of()
    engine.decide(request("e1"), body=b"")
    fields = {"event_id": "e1", "hash": "0" * 64, "decision": "{}"}
    client.xadd(settings.decisions, fields, id="1-0")
    worker = StreamWorker(engine, url, settings)
    with (
        pytest.raises(StreamError, match="1-0: expected entry 1 of the ledger, was another"),
        Running(worker) as running,
    ):
        running.until_it_ends()
    assert (worker.status.ended, worker.status.connected) == (True, False)
    assert "was another" in worker.status.last_error


@pytest.mark.parametrize("message_id", ["2-0", "1-1", "1700000000000-0"])
def test_a_stream_that_is_ahead_of_the_ledger_is_refused(
    engine: TinyEngine, client: Any, url: str, message_id: str
) -> None:
    settings = settings_of()
    engine.decide(request("e1"), body=b"")
    client.xadd(settings.decisions, {"event_id": "e"}, id=message_id)
    with (
        pytest.raises(StreamError, match=f"expected to end at 1-0 or before, .* ends at {message_id}"),
        Running(StreamWorker(engine, url, settings)) as running,
    ):
        running.until_it_ends()


def test_a_long_ledger_is_published_in_pages_and_completely(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of()
    for number in range(1203):
        engine.decide(request(f"e{number}"), body=b"")
    work(engine, url, settings, ["e1202"])
    assert published(client, settings) == [(f"{number + 1}-0", f"e{number}") for number in range(1203)]


def test_a_new_stream_starts_with_as_much_of_the_ledger_as_it_keeps(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of(decisions_maxlen=13)
    for number in range(50):
        engine.decide(request(f"e{number}"), body=b"")
    worker = work(engine, url, settings, ["e49"])
    assert worker.status.published == 13


def test_the_decision_stream_is_trimmed(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of(decisions_maxlen=200)
    output = DecisionStream(engine.ledger, settings)
    for number in range(1000):
        engine.decide(request(f"e{number}"), body=b"")
        if number % 50 == 0:
            output.publish(client)
    output.publish(client)
    assert 200 <= client.xlen(settings.decisions) <= 400
    assert published(client, settings)[-1] == ("1000-0", "e999")


def test_requests_are_trimmed_but_none_that_somebody_still_needs(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of(features_maxlen=100, upkeep_s=0.01, batch=100)
    ids = send(client, settings, *(f"e{number}" for number in range(1000)))
    # Another group holds those from number 450 to 649, which is more than Redis keeps together.
    client.xgroup_create(settings.features, "theirs", id=ids[449])
    client.xreadgroup("theirs", "them", {settings.features: ">"}, count=200)
    worker = work(engine, url, settings, ["e999"])
    assert len(events_of(engine)) == 1000
    worker._client = client
    worker._trim()
    assert 350 <= ids.index(client.xrange(settings.features, count=1)[0][0]) <= 450
    client.xgroup_destroy(settings.features, "theirs")
    worker._trim()
    assert client.xlen(settings.features) <= 100


# --- connections ------------------------------------------------------------------------------------------


def test_a_redis_that_dies_does_not_end_the_worker(
    engine: TinyEngine, client: Any, url: str, redis_server: RealRedis
) -> None:
    settings = settings_of()
    worker = StreamWorker(engine, url, settings)
    redis_server.kill()
    with Running(worker) as running:
        running.until(lambda: worker.status.failures >= 3)
        for number in range(3):
            redis_server.start()
            send(client, settings, f"e{number}")
            running.until(partial(lambda count: len(published(client, settings)) == count, number + 1))
            assert worker.status.connected
            before = worker.status.failures
            redis_server.kill()
            running.until(partial(lambda before: worker.status.failures > before, before))
            assert not worker.status.connected
    redis_server.start()
    assert published(client, settings) == [("1-0", "e0"), ("2-0", "e1"), ("3-0", "e2")]


def test_waits_double_up_to_a_limit_and_are_spread() -> None:
    backoff = Backoff(0.1, 1.0, seed=1)
    waits = [backoff.next_s() for _ in range(2000)]
    for wait, longest in zip(waits, [0.1, 0.2, 0.4, 0.8, *[1.0] * 1996], strict=True):
        assert longest / 2 <= wait <= longest
    assert len(set(waits)) == len(waits)
    backoff.reset()
    assert backoff.next_s() <= 0.1


def test_two_clients_do_not_wait_in_step() -> None:
    first, second = Backoff(0.1, 1.0), Backoff(0.1, 1.0)
    assert [first.next_s() for _ in range(5)] != [second.next_s() for _ in range(5)]


class ClusterRedis(RealRedis):
    """One node that serves all slots."""

    def _command(self) -> list[str]:
        # Its second port would be 10,000 above the first, where the kernel takes those of outgoing connections.
        return [*super()._command(), "--cluster-enabled", "yes", "--cluster-port", str(free_port())]


@pytest.fixture
def cluster() -> Iterator[str]:
    found = find_redis()
    if found.external:
        pytest.skip("the Redis server comes from the environment: it may be no cluster")
    server = ClusterRedis(binary=found.binary)
    try:
        server.start()
        with Redis.from_url(server.url) as node:
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            wait_for(lambda: b"cluster_state:ok" in node.execute_command("CLUSTER", "INFO"))
        yield server.url
    finally:
        server.close()
        found.close()


def test_a_cluster_keeps_both_streams_together(engine: TinyEngine, cluster: str) -> None:
    settings = settings_of(cluster=True)
    worker = StreamWorker(engine, cluster, settings)
    client = connect(cluster, timeout_s=30.0, cluster=True)
    assert isinstance(client, RedisCluster)
    with Running(worker) as running:
        send(client, settings, "e1", "e2")
        running.until(lambda: worker.status.acknowledged == 2)
        assert ask(client, settings, request("e3"), 60.0).event_id == "e3"
    assert published(client, settings) == [("1-0", "e1"), ("2-0", "e2"), ("3-0", "e3")]
    assert worker.status.failures == 0
    client.close()


def test_keys_of_different_slots_would_fail_there(engine: TinyEngine, cluster: str) -> None:
    settings = settings_of(cluster=True)
    object.__setattr__(settings, "decisions", "detent:{other}:decisions")
    engine.decide(request("e1"), body=b"")
    client = connect(cluster, timeout_s=30.0, cluster=True)
    with pytest.raises(Exception, match="slot"):
        DecisionStream(engine.ledger, settings).publish(client)
    client.close()


# --- request and reply ------------------------------------------------------------------------------------


def test_clients_get_the_decision_of_their_own_event(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of()

    def asks(name: int) -> list[str]:
        with Redis.from_url(url) as own:
            return [ask(own, settings, request(f"{name}-{n}"), 60.0).event_id for n in range(20)]

    with Running(StreamWorker(engine, url, settings)), ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(asks, range(4)))
    assert answers == [[f"{name}-{n}" for n in range(20)] for name in range(4)]


def test_an_answer_is_waited_for_and_not_searched_for(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of()
    client.config_resetstat()
    with Running(StreamWorker(engine, url, settings)):
        assert ask(client, settings, request("e1"), 60.0).event_id == "e1"
    assert "cmdstat_xrevrange" not in client.info("commandstats")


def test_a_client_that_asks_again_gets_the_same_decision(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of()
    with Running(StreamWorker(engine, url, settings)):
        first = ask(client, settings, request("e1"), 60.0)
        send(client, settings, *(f"x{number}" for number in range(600)))
        wait_for(lambda: len(published(client, settings)) == 601)
        assert ask(client, settings, request("e1"), 0.05) == first
    assert events_of(engine).count("e1") == 1


def test_a_client_whom_nobody_answers_is_told(client: Any) -> None:
    settings = settings_of()
    with pytest.raises(TimeoutError, match=r"event e1: expected a decision on .*:decisions within 0\.05 s"):
        ask(client, settings, request("e1"), 0.05)
    assert client.xlen(settings.features) == 1


def test_the_real_engine_decides_over_streams(bundle_path: Path, tmp_path: Path, client: Any, url: str) -> None:
    from serving import open_bundle

    ledger = SqliteLedger(tmp_path / "ledger.db", "paper", fsync="never")
    engine = DecisionEngine(open_bundle(bundle_path), ledger)
    settings = settings_of()
    with Running(StreamWorker(engine, url, settings)):
        found = ask(client, settings, request("e1"), 60.0)
        assert found == engine.recent[0]
        client.xadd(settings.features, {"request": b"?"})
        wait_for(lambda: len(published(client, settings)) == 2)
    assert [record.reason is Reason.INVALID_REQUEST for record in engine.recent] == [True, False]
    # Entry 1 says that the engine started.
    assert [key for key, _ in published(client, settings)] == ["2-0", "3-0"]
    engine.close()


def test_a_closed_ledger_is_a_failure_like_any_other(engine: TinyEngine, client: Any, url: str) -> None:
    settings = settings_of()
    send(client, settings, "e1")
    engine.ledger.close()
    worker = StreamWorker(engine, url, settings)
    with Running(worker) as running:
        running.until(lambda: worker.status.failures >= 2)
    assert worker.status.last_error.startswith(LedgerError.__name__)
