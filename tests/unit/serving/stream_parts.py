"""A small engine on a real ledger that fails when it is told to, and a worker that runs until something is so."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from redis import Redis
from serving_parts import request

from serving.errors import LedgerError
from serving.ledger.base import Ledger
from serving.records import DecisionRecord, DecisionRequest, Mode, Reason, RiskState, Source, encode
from serving.stream.settings import StreamSettings
from serving.stream.worker import StreamWorker

ACCOUNT = "paper"
PATIENCE_S = 120.0
"""For what happens at once on an idle machine."""


class TinyEngine:
    """Records Hold for every event."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.asked: list[str] = []
        self.failures: dict[str, list[Reason]] = {}
        """Event -> answers that are not recorded, to be given first."""
        self.forgets = False
        """Pretend to record."""
        self.on_decide: Callable[[str], None] = lambda event_id: None

    def decide(self, request: DecisionRequest, *, body: bytes | None = None) -> DecisionRecord:
        assert body is not None
        self.asked.append(request.event_id)
        self.on_decide(request.event_id)
        waiting = self.failures.get(request.event_id)
        if waiting:
            return record(request.event_id, waiting.pop(0), "as told")
        return self._record(record(request.event_id, Reason.OK, ""))

    def refuse(self, event_id: str, body: bytes, detail: str) -> DecisionRecord:
        return self._record(record(event_id, Reason.INVALID_REQUEST, detail))

    def _record(self, new: DecisionRecord) -> DecisionRecord:
        if self.forgets:
            return new
        known = self.ledger.find(new.event_id)
        if known is not None:
            found = known.record
            assert isinstance(found, DecisionRecord)
            return found
        try:
            self.ledger.append(encode(new), event_id=new.event_id)
        except LedgerError as error:
            return record(new.event_id, Reason.LEDGER_FAILED, str(error))
        return new


def record(event_id: str, reason: Reason, detail: str, mode: Mode = Mode.LIVE) -> DecisionRecord:
    return DecisionRecord(
        event_id=event_id, mode=mode, time=0.0, bar_time=0.0, input_hash="", state=b"", caller_masks=None,
        action_masks=(True,), blocked={}, proposed=0, executed=0, flatten=False, target_position=None,
        source=Source.HOLD, reason=reason, detail=detail, value=None, probabilities=(), uncertainty=None, seed=0,
        trading_state=0, drawdown=0.0, risk=RiskState(), bundle_hash="", rule_set_hash="", latency_us={},
    )  # fmt: skip


def settings_of(**changes: Any) -> StreamSettings:
    quick = {"consumer": "me", "block_ms": 20, "backoff_first_s": 0.01, "backoff_longest_s": 0.1}
    return StreamSettings.for_account(ACCOUNT, **{**quick, **changes})


def send(client: Any, settings: StreamSettings, *events: str) -> list[bytes]:
    """Put requests on the feature stream; returns the messages' ids."""
    return [client.xadd(settings.features, {"request": encode(request(event))}) for event in events]


def published(client: Any, settings: StreamSettings) -> list[tuple[str, str]]:
    """Id and event of each decision on the stream."""
    return [(key.decode(), fields[b"event_id"].decode()) for key, fields in client.xrange(settings.decisions)]


def pending(client: Any, settings: StreamSettings) -> int:
    """Messages that were delivered and not acknowledged, by all consumers together."""
    return int(client.xpending(settings.features, settings.group)["pending"])


def clear(client: Any) -> None:
    """Remove what tests left behind; a server of somebody else's is not emptied for them."""
    for key in client.scan_iter(f"detent:{{{ACCOUNT}}}:*"):
        client.delete(key)


def wait_for(condition: Callable[[], bool], what: str = "it did not happen") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


class Running:
    """A worker in a thread; leaving it stops it and raises what it raised."""

    def __init__(self, worker: StreamWorker) -> None:
        self.worker = worker
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name="worker")

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the worker does not stop"
        if self.errors:
            raise self.errors[0]

    def until(self, condition: Callable[[], bool]) -> None:
        wait_for(
            lambda: condition() or bool(self.errors),
            f"it did not happen; last error of the worker: {self.worker.status.last_error!r}",
        )

    def until_it_ends(self) -> None:
        wait_for(lambda: not self._thread.is_alive(), "the worker does not end")

    def _run(self) -> None:
        try:
            self.worker.run(self.stop)
        except BaseException as error:
            self.errors.append(error)


def work(engine: TinyEngine, url: str, settings: StreamSettings, events: Sequence[str]) -> StreamWorker:
    """Run a worker until each of these events is answered and acknowledged."""
    worker = StreamWorker(engine, url, settings)
    with Redis.from_url(url) as client, Running(worker) as running:

        def done() -> bool:
            names = {event for _, event in published(client, settings)}
            return names.issuperset(events) and pending(client, settings) == 0

        running.until(done)
    return worker


def take(client: Any, settings: StreamSettings, consumer: str, count: int) -> None:
    """Read as another consumer, or as ourselves before a crash, without acknowledging."""
    if not client.exists(settings.features) or not client.xinfo_groups(settings.features):
        client.xgroup_create(settings.features, settings.group, id="0", mkstream=True)
    client.xreadgroup(settings.group, consumer, {settings.features: ">"}, count=count)


def events_of(engine: TinyEngine) -> list[str]:
    return [json.loads(entry.body)["event_id"] for entry in engine.ledger.read()]
