"""A running engine, asked over HTTP, and an empty Redis; test modules with needs of their own say so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_worlds import Client, make_engine, running
from services import RealRedis
from stream_parts import clear

from serving import Bundle
from serving.engine import DecisionEngine


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
