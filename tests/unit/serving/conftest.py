"""A running engine, asked over HTTP, and an empty Redis; test modules with needs of their own say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_worlds import Client, make_engine, running
from services import RealRedis
from serving_parts import Hands
from stream_parts import clear

from serving import Bundle
from serving.engine import DecisionEngine
from serving.ledger.sqlite import SqliteLedger
from serving.settings import EngineSettings


@pytest.fixture
def engine(bundle: Bundle, tmp_path: Path) -> Iterator[DecisionEngine]:
    engine = make_engine(bundle, tmp_path)
    yield engine
    engine.close()


@pytest.fixture
def client(engine: DecisionEngine) -> Iterator[Client]:
    with running(engine) as client:
        yield client


@pytest.fixture
def redis_client(redis_server: RealRedis) -> Iterator[Any]:
    """Of a server that is empty before and afterwards."""
    from redis import Redis

    with Redis.from_url(redis_server.url) as client:
        clear(client)
        yield client
        if redis_server.running:
            clear(client)


@pytest.fixture
def hands() -> Hands:
    return Hands()


@pytest.fixture
def engine_of(tmp_path: Path, bundle: Bundle, hands: Hands) -> Iterator[Callable[..., DecisionEngine]]:
    opened: list[DecisionEngine] = []

    def make(used: Bundle | None = None, **changes: Any) -> DecisionEngine:
        for engine in opened:
            engine.close()
        chosen = {name: changes.pop(name) for name in ("limits",) if name in changes}
        ledger = SqliteLedger(tmp_path / "ledger.db", fsync="never")
        # A busy machine may be late for real; budgets are tested with a clock of their own.
        budgets = {"inference_ms": 60_000.0, "decision_ms": 60_000.0, "timeout_ms": 60_000.0} | changes
        engine = DecisionEngine(used or bundle, ledger, EngineSettings(**budgets), clock=hands.clock(), **chosen)
        opened.append(engine)
        return engine

    yield make
    for engine in opened:
        engine.close()
