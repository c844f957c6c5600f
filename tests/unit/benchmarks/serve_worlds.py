"""A server to ask in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.serve_answers import ROWS, Tally
from benchmarks.serve_calls import (
    Calls,
)
from benchmarks.serve_speed import Series
from serving import Bundle
from serving.engine import DecisionEngine
from serving.http.auth import Tokens
from serving.http.limits import HttpLimits
from serving.http.server import HttpServer
from serving.ledger.sqlite import SqliteLedger
from serving.settings import EngineSettings

# A busy machine is no reason to hold.
PATIENT = EngineSettings(inference_ms=60_000.0, decision_ms=60_000.0, timeout_ms=60_000.0, planner=False)


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
