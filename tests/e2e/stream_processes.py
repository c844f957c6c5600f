"""Programs of the fault test: one that sends requests, workers, and a worker that is wrong on purpose.

`python stream_processes.py worker|wrong|producer JSON` with the arguments of `Plan` and its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import secrets
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from serving import Bundle, open_bundle
from serving.engine import DecisionEngine
from serving.errors import LedgerError
from serving.ledger.open import open_ledger
from serving.records import AccountSnapshot, DecisionRequest, encode
from serving.settings import EngineSettings
from serving.stream.requests import event_name
from serving.stream.worker import StreamSettings, StreamWorker

BACKLOG = 400
"""Requests that may wait for their decision before the producer pauses."""
CHUNK = 10


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all processes of one run know."""

    redis: str
    ledger: str
    bundle: str
    folder: str
    account: str = field(default_factory=lambda: f"fault-{secrets.token_hex(4)}")
    events: int = 1000
    seed: int = 0

    def settings(self, consumer: str = "none") -> StreamSettings:
        return StreamSettings.for_account(
            self.account,
            consumer=consumer,
            decisions_maxlen=0,
            features_maxlen=0,
            block_ms=100,
            backoff_first_s=0.01,
            backoff_longest_s=0.2,
        )

    def command(self, role: str, **own: Any) -> list[str]:
        return [sys.executable, __file__, role, json.dumps({**asdict(self), **own})]

    @property
    def active(self) -> Path:
        """Holds the process number of the worker that decides."""
        return Path(self.folder) / "active"

    @property
    def sent(self) -> Path:
        """One JSON line for each request that Redis has acknowledged."""
        return Path(self.folder) / "sent"


class AcknowledgesFirst(StreamWorker):
    """Wrong: a message is acknowledged before its decision is recorded."""

    def _next(self) -> Any:
        messages = super()._next()
        if messages:
            names = [message_id for message_id, _ in messages]
            self._client.xack(self.settings.features, self.settings.group, *names)
        return messages


def work(plan: Plan, consumer: str, worker_class: type[StreamWorker]) -> None:
    """Wait for the ledger, decide until SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    bundle = open_bundle(plan.bundle)
    engine = None
    while engine is None and not stop.is_set():
        engine = open_engine(plan, bundle)
        if engine is None:
            stop.wait(0.05)
    if engine is not None:
        engine.subscribe(lambda *_: claim(plan.active))
        worker_class(engine, plan.redis, plan.settings(consumer)).run(stop)
        engine.close()


def claim(active: Path) -> None:
    """Write that this process decides, where another did before."""
    own = str(os.getpid())
    if not active.exists() or active.read_text() != own:
        fresh = active.with_name(f"{active.name}-{own}")
        fresh.write_text(own)
        fresh.replace(active)


def open_engine(plan: Plan, bundle: Bundle) -> DecisionEngine | None:
    """None while another process writes the ledger, or its server is away."""
    try:
        ledger = open_ledger(plan.ledger, plan.account)
    except LedgerError:
        return None
    # A busy machine is no reason to hold: decisions are to be made of the rules.
    budgets = EngineSettings(inference_ms=60_000.0, decision_ms=60_000.0, timeout_ms=60_000.0, clock_tolerance_s=60.0)
    try:
        return DecisionEngine(bundle, ledger, budgets)
    except LedgerError:
        ledger.close()
        return None


def produce(plan: Plan) -> None:
    """Send all requests, each acknowledged before the next chunk; ids are explicit, so nothing is in twice."""
    client = Redis.from_url(plan.redis, retry=None, socket_timeout=10.0)
    settings = plan.settings()
    messages = list(enumerate(bodies(plan), start=1))
    with plan.sent.open("w") as sent:
        for start in range(0, len(messages), CHUNK):
            chunk = messages[start : start + CHUNK]
            times = [(number, stamped(body)) for number, body in chunk]
            while not send(client, settings, times):
                time.sleep(0.01)
            for number, body in times:
                message_id = f"{number}-0".encode()
                line = {"event": event_name(message_id, body), "sha256": hashlib.sha256(body).hexdigest()}
                sent.write(json.dumps(line) + "\n")
            sent.flush()
            hold_back(client, settings, chunk[-1][0])


def send(client: Any, settings: StreamSettings, messages: list[tuple[int, bytes]]) -> bool:
    """Whether all are acknowledged; an id that is there already was taken at an earlier try."""
    pipeline = client.pipeline(transaction=False)
    for number, body in messages:
        pipeline.xadd(settings.features, {"request": body}, id=f"{number}-0")
    try:
        answers = pipeline.execute(raise_on_error=False)
    except (RedisError, OSError):
        return False
    return all(isinstance(answer, bytes) or _is_there(answer) for answer in answers)


def _is_there(answer: object) -> bool:
    return isinstance(answer, ResponseError) and "equal or smaller" in str(answer)


def hold_back(client: Any, settings: StreamSettings, sent: int) -> None:
    """Wait until not too many requests wait."""
    while True:
        try:
            if sent - int(client.xlen(settings.decisions)) <= BACKLOG:
                return
        except (RedisError, OSError):
            pass
        time.sleep(0.01)


def bodies(plan: Plan) -> list[bytes]:
    """Requests of `plan.events` events, and between them some that cannot be read."""
    rng = random.Random(plan.seed)
    equity, found = 1000.0, []
    for number in range(plan.events):
        # Down to where only smaller positions are allowed, never to where trading is halted.
        equity = min(1000.0, max(900.0, equity * (1.0 + rng.gauss(0.0, 0.01))))
        position = rng.choice([0.0, 0.25, 0.5, 0.75, 1.0, 1.25])
        request = DecisionRequest(
            event_id=f"event-{number}",
            bar_time=0.0,
            features={
                "gap_return": rng.gauss(0.0, 0.01),
                "intraday_return": rng.gauss(0.0, 0.01),
                "volatility_20": rng.uniform(0.05, 0.6),
                "momentum": rng.gauss(0.0, 0.1),
            },
            account=AccountSnapshot(equity=equity, position=position, holding_time=float(rng.randrange(20))),
            action_masks=tuple(rng.random() < 0.6 for _ in range(7)) if rng.random() < 0.3 else None,
        )
        found.append(encode(request))
        if number % 100 == 50:
            found.append(rng.choice([b"{", b"", f'{{"event_id": "unreadable-{number}"}}'.encode()]))
    return found


def stamped(body: bytes) -> bytes:
    """With the time of now, so that bars come in the order of sending."""
    return body.replace(b'"bar_time":0.0', f'"bar_time":{time.time()!r}'.encode())


def main() -> None:
    role, arguments = sys.argv[1], json.loads(sys.argv[2])
    consumer = arguments.pop("consumer", "")
    plan = Plan(**arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if role == "producer":
        produce(plan)
    else:
        work(plan, consumer, {"worker": StreamWorker, "wrong": AcknowledgesFirst}[role])


if __name__ == "__main__":
    main()
