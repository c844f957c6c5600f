"""What is asked of a service, and of what it is held against.

Calls of one kind ask about the same rows in turn; a decision is about a new event and a new bar each time.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.serve_answers import RIGHT, ROWS, Expected, Verdict
from benchmarks.serve_client import TIMEOUT_S, Connection, infer_request, post, read_echo, read_http
from benchmarks.serve_variants import state_rows
from serving import Bundle
from serving.engine import DecisionEngine
from serving.http.models import PLANNER, POLICY
from serving.records import AccountSnapshot, DecisionRecord, DecisionRequest, encode

EQUITY = 1_000_000.0
LINE = b"x" * 4096
"""About what a decision writes to its ledger."""


class Asked(NamedTuple):
    """A request, ready to be sent, and which row it is about."""

    row: int
    message: Any
    event_id: str = ""


@dataclass(frozen=True)
class Calls:
    """One kind of call."""

    prepare: Callable[[int], list[Asked]]
    """So many requests, made before the clock runs."""
    send: Callable[[Any], Any]
    """Asks and waits for the answer; this is timed. Raises whatever goes wrong."""
    judge: Callable[[Asked, Any], Verdict]
    """Whether the answer is right."""
    close: Callable[[], object]


class Requests:
    """Requests for decisions, each about a new event and a new bar; the account is flat, its equity does not move."""

    def __init__(self, expected: Expected, name: str) -> None:
        """Args: name: begins the names of the events."""
        names = next(iter(expected.bundles.values())).manifest.feature_names
        rows = expected.rows[:, : len(names)].astype(np.float64)
        self._features: list[dict[str, float | None]] = [dict(zip(names, row.tolist(), strict=True)) for row in rows]
        self._account = AccountSnapshot(equity=EQUITY, position=0.0, holding_time=10.0)
        self._name, self._numbers = name, itertools.count()

    def take(self) -> tuple[int, DecisionRequest]:
        """The next one, and which row it is about."""
        number = next(self._numbers)
        row = number % ROWS
        return row, DecisionRequest(
            event_id=f"{self._name}-{number}",
            bar_time=time.time(),
            features=self._features[row],
            account=self._account,
        )


def infer_calls(port: int, bundle: Bundle, model: str = POLICY, *, binary: bool = True) -> Calls:
    """`/v2/models/{model}/infer`, one row at a time."""
    expected, connection = Expected([bundle], planner=model == PLANNER), Connection(port, read_http)
    rows = itertools.cycle(range(ROWS))
    messages = [infer_request(model, expected.rows[row : row + 1], binary=binary) for row in range(ROWS)]
    return Calls(
        lambda count: [Asked(row, messages[row]) for row in itertools.islice(rows, count)],
        connection.exchange,
        lambda asked, answer: expected.judge_inference(asked.row, answer),
        connection.close,
    )


def decide_calls(port: int, bundle: Bundle, name: str) -> Calls:
    """`/decide`. Args: name: begins the names of the events."""
    expected, connection = Expected([bundle]), Connection(port, read_http)
    requests = Requests(expected, name)

    def prepare(count: int) -> list[Asked]:
        taken = (requests.take() for _ in range(count))
        return [Asked(row, post("/decide", encode(request)), request.event_id) for row, request in taken]

    return Calls(
        prepare,
        connection.exchange,
        lambda asked, answer: expected.judge_answer(asked.row, asked.event_id, answer),
        connection.close,
    )


def engine_calls(engine: DecisionEngine, name: str) -> Calls:
    """The engine in this process, without HTTP."""
    return _record_calls(engine.bundle, name, engine.decide, engine.close)


def stream_calls(bundle: Bundle, name: str, url: str, account: str) -> Calls:
    """Request and reply over Redis Streams. Raises: one of `REDIS_ERRORS` where no server answers."""
    from serving.stream.client import ask
    from serving.stream.connection import connect
    from serving.stream.settings import StreamSettings

    client, settings = connect(url, timeout_s=TIMEOUT_S), StreamSettings.for_account(account)
    client.ping()

    def close() -> None:
        client.delete(settings.features, settings.decisions)
        client.close()

    return _record_calls(bundle, name, lambda request: ask(client, settings, request, TIMEOUT_S), close)


def echo_calls(port: int, bundle: Bundle) -> Calls:
    """Bytes that come back as they are: those of a binary inference."""
    message, connection = infer_request(POLICY, state_rows(bundle, 1), binary=True), Connection(port, read_echo)
    return Calls(
        lambda count: [Asked(0, message)] * count,
        connection.exchange,
        lambda _, answer: RIGHT if answer == message else Verdict("wrong", "expected the bytes that were sent"),
        connection.close,
    )


def fsync_calls(path: Path) -> Calls:
    """A page appended to a file and forced to the disk, as a ledger must, and nothing else."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def send(message: bytes) -> int:
        written = os.write(file, message)
        os.fdatasync(file)
        return written

    return Calls(
        lambda count: [Asked(0, LINE)] * count,
        send,
        lambda asked, answer: RIGHT if answer == len(asked.message) else Verdict("failed", f"wrote {answer} bytes"),
        lambda: os.close(file),
    )


def _record_calls(
    bundle: Bundle, name: str, decide: Callable[[DecisionRequest], DecisionRecord], close: Callable[[], object]
) -> Calls:
    expected = Expected([bundle])
    requests = Requests(expected, name)
    return Calls(
        lambda count: [Asked(row, one, one.event_id) for row, one in (requests.take() for _ in range(count))],
        decide,
        lambda asked, answer: expected.judge_decision(asked.row, asked.event_id, answer),
        close,
    )
