"""Limits from a real Redis: what is missing, malformed, old or out of reach is stale, never fresh."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from services import RealRedis
from serving_parts import START, Hands, request
from stream_parts import wait_for

from masking import TradingState
from serving import open_bundle
from serving.engine import DecisionEngine
from serving.ledger.sqlite import SqliteLedger
from serving.limits import ExternalLimits
from serving.records import Reason
from serving.stream.limits import RedisLimits

KEY = "detent:{paper}:limits"
MAX_AGE = 5.0
FRESH = {"trading_state": "ACTIVE", "max_position": "1.5", "updated_at": str(START)}


@pytest.fixture
def client(redis_client: Any) -> Any:
    return redis_client


@pytest.fixture
def limits(redis_server: RealRedis) -> Iterator[RedisLimits]:
    with_hands = RedisLimits(redis_server.url, KEY, MAX_AGE, poll_s=0.01, clock=lambda: START)
    yield with_hands
    with_hands.close()


def put(client: Any, **changes: str | None) -> None:
    fields = {name: value for name, value in {**FRESH, **changes}.items() if value is not None}
    client.delete(KEY)
    client.hset(KEY, mapping=fields)


@pytest.mark.parametrize("state", list(TradingState))
def test_what_the_risk_system_wrote_is_in_force(client: Any, limits: RedisLimits, state: TradingState) -> None:
    put(client, trading_state=state.name)
    limits.refresh()
    assert limits.current(START + 1.0) == ExternalLimits(state.value, 1.5, stale=False, detail="")


def test_without_a_largest_position_there_is_none(client: Any, limits: RedisLimits) -> None:
    put(client, max_position=None)
    limits.refresh()
    assert limits.current(START).max_position == math.inf


@pytest.mark.parametrize(
    ("age", "stale"), [(0.0, False), (5.0, False), (5.01, True), (-1.0, False), (-1.01, True), (math.nan, True)]
)
def test_limits_are_stale_when_too_old_or_from_the_future(
    client: Any, limits: RedisLimits, age: float, stale: bool
) -> None:
    put(client)
    limits.refresh()
    found = limits.current(START + age)
    assert found.stale is stale
    assert bool(found.detail) is stale
    if stale:
        assert f"{KEY}: updated_at: expected at most 5 s old, was {age:.1f} s" in found.detail
        assert found.trading_state == TradingState.REDUCE_ONLY


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"trading_state": None}, "trading_state: expected ACTIVE, REDUCE_ONLY, HALTED, was ''"),
        ({"trading_state": "active"}, "trading_state: expected ACTIVE, REDUCE_ONLY, HALTED, was 'active'"),
        ({"trading_state": "0"}, "trading_state: expected"),
        ({"max_position": "0"}, "max_position: expected a positive number, was 0"),
        ({"max_position": "-1"}, "max_position: expected a positive number"),
        ({"max_position": "nan"}, "max_position: expected a finite number, was 'nan'"),
        ({"max_position": "Infinity"}, "max_position: expected a finite number"),
        ({"max_position": "1e999"}, "max_position: expected a finite number"),
        ({"max_position": "1_0"}, "max_position: expected a finite number"),
        ({"max_position": ""}, "max_position: expected a finite number"),
        ({"updated_at": None}, "updated_at: expected a finite number, was ''"),
        ({"updated_at": "now"}, "updated_at: expected a finite number, was 'now'"),
        ({"max_postion": "0.5"}, "expected the fields trading_state, max_position, updated_at, was also max_postion"),
    ],
)
def test_a_malformed_hash_is_stale_at_once(
    client: Any, limits: RedisLimits, changes: dict[str, Any], detail: str
) -> None:
    put(client)
    limits.refresh()
    assert not limits.current(START).stale
    put(client, **changes)
    limits.refresh()
    found = limits.current(START)
    assert found.stale
    assert f"{KEY}: {detail}" in found.detail


def test_a_hash_that_is_no_more_is_stale_at_once_and_again_in_force_when_back(client: Any, limits: RedisLimits) -> None:
    assert limits.current(START).detail == f"{KEY}: not read yet"
    limits.refresh()
    assert limits.current(START).detail == f"{KEY}: expected a hash, there is none"
    client.set(KEY, "a string")
    limits.refresh()
    assert limits.current(START).stale
    put(client)
    limits.refresh()
    assert not limits.current(START).stale


def test_what_was_halted_stays_halted_while_stale(client: Any, limits: RedisLimits) -> None:
    put(client, trading_state="HALTED")
    limits.refresh()
    client.delete(KEY)
    limits.refresh()
    found = limits.current(START)
    assert (found.trading_state, found.max_position, found.stale) == (TradingState.HALTED, 1.5, True)


def test_a_server_that_lost_its_last_second_takes_nothing_back(client: Any, limits: RedisLimits) -> None:
    put(client, trading_state="HALTED")
    limits.refresh()
    put(client, updated_at=str(START - 1.0))
    limits.refresh()
    assert limits.current(START).trading_state == TradingState.HALTED
    put(client, updated_at=str(START + 0.5))
    limits.refresh()
    assert limits.current(START + 0.5).trading_state == TradingState.ACTIVE


def test_a_date_in_the_future_does_not_lock_out_the_right_one(client: Any, limits: RedisLimits) -> None:
    put(client, updated_at=str(1000.0 * START))
    limits.refresh()
    assert limits.current(START).stale
    put(client)
    limits.refresh()
    assert not limits.current(START).stale


def test_the_copy_bridges_a_redis_that_is_away_until_it_is_too_old(
    client: Any, limits: RedisLimits, redis_server: RealRedis
) -> None:
    put(client)
    with limits:
        wait_for(lambda: not limits.current(START).stale)
        redis_server.kill()
        wait_for(lambda: "Redis does not answer" in limits.current(START + 6.0).detail)
        assert not limits.current(START + 5.0).stale
        assert limits.current(START + 6.0).stale
        redis_server.start()
        put(client, trading_state="REDUCE_ONLY", updated_at=str(START + 1.0))
        wait_for(lambda: limits.current(START + 6.0) == (TradingState.REDUCE_ONLY, 1.5, False, ""))


def test_a_redis_that_never_answers_is_stale_and_says_why(redis_server: RealRedis) -> None:
    redis_server.kill()
    with RedisLimits(redis_server.url, KEY, MAX_AGE, poll_s=0.01) as limits:
        wait_for(lambda: "not read yet; Redis does not answer" in limits.current(START).detail)
        assert limits.current(START).stale
    with pytest.raises(RedisConnectionError):
        limits.refresh()


def test_changes_arrive_by_themselves(client: Any, limits: RedisLimits) -> None:
    with limits:
        for state in (*TradingState, TradingState.ACTIVE):
            put(client, trading_state=state.name)
            expected = ExternalLimits(state.value, 1.5, stale=False, detail="")
            wait_for(partial(lambda expected: limits.current(START) == expected, expected))


@pytest.mark.parametrize("name", ["max_age_s", "poll_s", "timeout_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_times_that_make_no_sense_are_refused(name: str, value: float) -> None:
    make: Any = partial(RedisLimits, "redis://127.0.0.1:1", KEY)
    with pytest.raises(ValueError, match=f"{name}: expected a positive number of seconds"):
        make(**{"max_age_s": 1.0, name: value})


def test_the_engine_obeys(client: Any, limits: RedisLimits, bundle_path: Path, tmp_path: Path) -> None:
    hands = Hands()
    ledger = SqliteLedger(tmp_path / "ledger.db", "paper", fsync="never")
    engine = DecisionEngine(open_bundle(bundle_path), ledger, clock=hands.clock(), limits=limits)
    limits.refresh()
    assert engine.decide(request("e1")).reason is Reason.STALE_LIMITS
    put(client)
    limits.refresh()
    assert engine.decide(request("e2")).reason is Reason.OK
    put(client, trading_state="HALTED")
    limits.refresh()
    halted = engine.decide(request("e3", position=0.5))
    assert (halted.executed, halted.flatten, halted.trading_state) == (0, True, TradingState.HALTED)
    put(client, max_position="0.5")
    limits.refresh()
    masks = engine.decide(request("e4")).action_masks
    assert masks == (True, True, True, True, False, False, False)
    hands.wall += MAX_AGE + 1.0
    stale = engine.decide(request("e5"))
    assert (stale.reason, stale.executed) == (Reason.STALE_LIMITS, 0)
    engine.close()
