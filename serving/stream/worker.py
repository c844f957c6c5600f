"""Redis Streams: requests come in on one stream, decisions go out on another, exactly one for each event.

::

    producer --XADD--> detent:{account}:features --consumer group--> worker --> engine --> ledger
                                                                       |                      |
    executor <-XREAD-- detent:{account}:decisions <--- one script: XADD from the ledger, XACK-+

The ledger comes first, and the output stream is a copy of it: what a crash or a Redis that lost data left out is
published again, in order. Every live decision of the account is in it, also those that were asked for another way,
and after an outage decisions come late: who acts on them looks at `time`.

A message is acknowledged in the same script that publishes, and only when its decision is in the ledger. Whatever
goes wrong before is repeated from the group's pending messages, and the engine gives a known event the decision that
is recorded. Events are decided on in the order of the stream: one that cannot be recorded holds up those behind it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from redis.exceptions import ResponseError

from serving.errors import LedgerError, StreamError
from serving.ledger.base import Ledger
from serving.records import DecisionRecord, DecisionRequest, Reason
from serving.stream.client import ask
from serving.stream.connection import REDIS_ERRORS, Backoff, connect
from serving.stream.output import DecisionStream
from serving.stream.requests import REQUEST_FIELD, event_name, parse_request
from serving.stream.settings import StreamSettings, StreamStatus

__all__ = ["Decider", "StreamError", "StreamSettings", "StreamStatus", "StreamWorker", "ask"]

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often a request that makes the engine fail is tried before it is refused."""
UNRECORDED = (Reason.LEDGER_FAILED, Reason.INTERNAL_ERROR)
"""Answers that are in no ledger."""

Messages = Sequence[tuple[bytes, Mapping[bytes, bytes]]]


class Decider(Protocol):
    """What a worker needs of `DecisionEngine`."""

    @property
    def ledger(self) -> Ledger:
        """Where it records."""
        ...

    def decide(self, request: DecisionRequest, *, body: bytes | None = None) -> DecisionRecord:
        """Decide and record; a known event gets the decision that is recorded."""
        ...

    def refuse(self, event_id: str, body: bytes, detail: str) -> DecisionRecord:
        """Record Hold for a request that cannot be read."""
        ...


class StreamWorker:
    """Takes requests from a consumer group, lets the engine decide, publishes what is in its ledger."""

    def __init__(self, engine: Decider, redis_url: str, settings: StreamSettings) -> None:
        """Connects to nothing yet."""
        self.engine, self.settings = engine, settings
        self.status = StreamStatus()
        self._url = redis_url
        self._client: Any = None
        self._output = DecisionStream(engine.ledger, settings)
        self._pending: bytes | None = b"0"
        """Our pending messages were looked at again up to here; None once there are no more."""
        self._upkeep_due = 0.0
        self._broken: dict[bytes, int] = {}

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; messages that were taken by then are finished.

        A Redis or a ledger that fails is asked again, with growing waits, for ever.

        Raises: StreamError where the decision stream is not a copy of the ledger: going on could hide decisions.
        """
        settings = self.settings
        backoff = Backoff(settings.backoff_first_s, settings.backoff_longest_s)
        try:
            while not stop.is_set():
                try:
                    if not self.status.connected:
                        self._resume()
                        self.status.connected = True
                    self._turn()
                    backoff.reset()
                except (*REDIS_ERRORS, LedgerError) as error:
                    self._note(error)
                    backoff.wait(stop)
        # Of another kind: a mistake of ours or of the settings, which would come again and again.
        except Exception as error:
            self.status.ended, self.status.last_error = True, str(error)
            log.critical("stream %s: the worker ends, nothing more is decided from it: %s", settings.features, error)
            raise
        finally:
            self.status.connected = False
            if self._client is not None:
                self._client.close()
                self._client = None

    def _note(self, error: Exception) -> None:
        self.status.connected = False
        self.status.failures += 1
        self.status.last_error = f"{type(error).__name__}: {error}"
        log.warning("stream %s: %s", self.settings.features, self.status.last_error)

    # Others' pending messages are taken over before our own are looked at, so that all come in the stream's order.
    def _resume(self) -> None:
        settings = self.settings
        if self._client is None:
            timeout_s = settings.timeout_s + settings.block_ms / 1e3
            self._client = connect(self._url, timeout_s=timeout_s, cluster=settings.cluster)
        try:
            self._client.xgroup_create(settings.features, settings.group, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        self._output.find_end(self._client)
        self._take_over()

    def _turn(self) -> None:
        if time.monotonic() >= self._upkeep_due:
            self._trim()
            self._take_over()
        self._handle(self._next())

    def _next(self) -> Messages:
        settings = self.settings
        if self._pending is None:
            # In one go: when messages come, it is already known whether others hold older ones.
            pipeline = self._client.pipeline(transaction=False)
            self._read(pipeline, b">", settings.block_ms)
            pipeline.xpending(settings.features, settings.group)
            answer, pending = pipeline.execute()
            messages = _messages(answer)
            if pending["pending"] <= len(messages) or settings.takeover_idle_ms:
                return messages
            # A worker that was suspended, or lost its ledger, took them before it knew.
            self._take_over()
        messages = _messages(self._read(self._client, self._pending, None))
        self._pending = messages[-1][0] if messages else None
        return messages

    def _read(self, client: Any, start: bytes | None, block_ms: int | None) -> Any:
        settings = self.settings
        streams = {settings.features: start}
        return client.xreadgroup(settings.group, settings.consumer, streams, count=settings.batch, block=block_ms)

    # --- decisions ----------------------------------------------------------------------------------------

    def _handle(self, messages: Messages) -> None:
        done: list[bytes] = []
        events: list[str] = []
        failure = ""
        for message_id, fields in messages:
            if fields:
                record = self._decide(message_id, fields.get(REQUEST_FIELD))
                if record.reason in UNRECORDED:
                    failure = f"event {record.event_id}: {record.detail}"
                    break
                events.append(record.event_id)
            else:
                self._count_deleted(message_id)
            done.append(message_id)
        published, acknowledged = self._output.publish(self._client, done, events)
        self.status.published += published
        self.status.acknowledged += acknowledged
        if failure:
            raise LedgerError(failure)

    def _decide(self, message_id: bytes, body: bytes | None) -> DecisionRecord:
        self.status.decided += 1
        try:
            request = parse_request(body, self.settings.max_request_bytes)
        except ValueError as error:
            self.status.refused += 1
            return self.engine.refuse(event_name(message_id, body), body or b"", str(error))
        record = self.engine.decide(request, body=body)
        if record.reason is Reason.INTERNAL_ERROR:
            return self._failed(message_id, body or b"", record)
        return record

    # A request that makes the engine fail again and again would hold up all others.
    def _failed(self, message_id: bytes, body: bytes, record: DecisionRecord) -> DecisionRecord:
        attempts = self._broken.get(message_id, 0) + 1
        self._broken = {message_id: attempts}
        if attempts < ATTEMPTS:
            return record
        return self.engine.refuse(record.event_id, body, f"the engine failed {attempts} times: {record.detail}")

    # Nothing is left of it to decide on.
    def _count_deleted(self, message_id: bytes) -> None:
        self.status.deleted += 1
        log.error("stream %s: %r was deleted before it was acknowledged", self.settings.features, message_id)

    # --- upkeep -------------------------------------------------------------------------------------------

    def _take_over(self) -> None:
        settings, start = self.settings, b"0-0"
        while True:
            start, _, deleted = self._client.xautoclaim(
                settings.features, settings.group, settings.consumer, settings.takeover_idle_ms, start, count=100
            )
            for message_id in deleted:
                self._count_deleted(message_id)
            if start == b"0-0":
                break
        self._pending = b"0"
        self._upkeep_due = time.monotonic() + settings.upkeep_s

    # Up to the oldest message that a group has still to do with.
    def _trim(self) -> None:
        key, kept = self.settings.features, self.settings.features_maxlen
        if not kept or self._client.xlen(key) <= kept:
            return
        oldest = []
        for group in self._client.xinfo_groups(key):
            pending = self._client.xpending(key, group["name"])
            oldest.append(pending["min"] or group["last-delivered-id"])
        if not oldest:
            return
        safe = min(oldest, key=lambda message_id: tuple(map(int, message_id.split(b"-"))))
        self._client.xtrim(key, minid=safe, approximate=True)


def _messages(answer: Any) -> Messages:
    messages: Messages = answer[0][1] if answer else ()
    return messages
