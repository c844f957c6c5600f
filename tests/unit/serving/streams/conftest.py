"""A small engine and an empty Redis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from services import RealRedis
from stream_parts import TinyEngine

from serving.ledger.sqlite import SqliteLedger


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
