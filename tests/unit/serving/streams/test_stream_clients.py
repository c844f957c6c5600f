"""Names of streams, a cluster, waits between attempts, and clients that ask for one decision."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from redis import Redis
from redis.cluster import RedisCluster
from services import RealRedis, find_redis, free_port
from serving_parts import request
from stream_parts import Running, TinyEngine, events_of, published, send, settings_of, wait_for

from serving.stream.connection import Backoff, connect
from serving.stream.output import DecisionStream
from serving.stream.settings import hash_tag
from serving.stream.worker import StreamSettings, StreamWorker, ask

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


# --- connections ----------------------------------------------------------------------------------------


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
    found.require_own("it may be no cluster")
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
