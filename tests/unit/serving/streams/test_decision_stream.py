"""The decision stream is a copy of the ledger, whatever Redis lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from services import RealRedis
from serving_parts import request
from stream_parts import Running, TinyEngine, events_of, pending, published, record, send, settings_of, take, work

from serving.records import Mode, Reason, encode
from serving.stream.output import DecisionStream
from serving.stream.worker import StreamError, StreamWorker


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
    redis_server.require_own()
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
