"""The worker against a real Redis: nothing lost, nothing twice, whatever is interrupted where."""

from __future__ import annotations

import json
import re
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from services import RealRedis
from serving_parts import request
from stream_parts import Running, TinyEngine, events_of, pending, published, send, settings_of, take, wait_for, work

from serving.engine import DecisionEngine
from serving.errors import LedgerError
from serving.ledger.sqlite import SqliteLedger
from serving.records import DecisionRecord, Reason, encode
from serving.stream.output import DecisionStream
from serving.stream.requests import event_name
from serving.stream.worker import StreamWorker, ask

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


# --- Redis and the ledger fail -------------------------------------------------------------------------


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
