"""A real server in a thread on loopback, and a client that sends exactly what it is told."""

from __future__ import annotations

import dataclasses
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from serving_parts import Hands, request

from serving import Bundle, PlannerOutputs
from serving.engine import DecisionEngine
from serving.http.auth import Tokens
from serving.http.metrics import ServiceMetrics
from serving.http.server import HttpLimits, HttpServer
from serving.ledger.sqlite import SqliteLedger
from serving.manifest import PlannerEntry
from serving.records import encode
from serving.settings import EngineSettings

READ, DECIDE, OPERATOR = "read-token-0123456789", "decide-token-0123456789", "operator-token-0123456789"
TOKENS = Tokens(read=READ, decide=DECIDE, operator=OPERATOR)
# A busy machine is no reason to hold.
PATIENT = EngineSettings(inference_ms=60_000.0, decision_ms=60_000.0, timeout_ms=60_000.0)
PATIENT_LIMITS = HttpLimits(max_wait=60.0, head_timeout=60.0, body_timeout=60.0)


def make_engine(bundle: Bundle, folder: Path, **settings: Any) -> DecisionEngine:
    """An engine over a ledger of its own; its clock stands still."""
    ledger = SqliteLedger(folder / "ledger.db", fsync="never")
    return DecisionEngine(bundle, ledger, dataclasses.replace(PATIENT, **settings), clock=Hands().clock())


def decide_body(event: str = "event", **changes: Any) -> bytes:
    return encode(request(event, **changes))


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    """By lower-case name."""
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Client:
    """Calls a server; each call on a connection of its own."""

    host: str
    port: int
    token: str | None = None

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Header names with underscores for hyphens."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.token is not None:
            named.setdefault("authorization", f"Bearer {self.token}")
        if body is not None:
            named.setdefault("content-type", "application/json")
        try:
            connection.request(method, path, body, named)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.call("GET", path, None, **headers)

    def post(self, path: str, body: bytes | dict[str, Any], **headers: str) -> Answer:
        return self.call("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), **headers)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=120)

    def raw(self, data: bytes) -> bytes:
        """What comes back for these bytes until the server ends the connection."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    found = bytearray()
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            return bytes(found)
        if not part:
            return bytes(found)
        found += part


@contextmanager
def running(
    engine: DecisionEngine,
    *,
    tokens: Tokens | None = None,
    limits: HttpLimits = PATIENT_LIMITS,
    metrics: ServiceMetrics | None = None,
    allowed_hosts: tuple[str, ...] | None = None,
) -> Iterator[Client]:
    """A server in a thread, gone afterwards."""
    server = HttpServer(
        engine, port=0, tokens=tokens or Tokens(), limits=limits, metrics=metrics, allowed_hosts=allowed_hosts
    )
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield Client(server.host, server.port)
    finally:
        server.stop()
        thread.join()


class LastActionPlanner:
    """Stands for a planner session: plans the last action that is valid."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def run(self, _: None, inputs: Mapping[str, Any]) -> PlannerOutputs:
        masks = self._bundle.run_masks(inputs["state"]) & inputs["caller_masks"]
        actions = masks.shape[1] - 1 - masks[:, ::-1].argmax(axis=1)
        values = np.where(masks, 0.5, -np.inf).astype(np.float32)
        rows = np.arange(len(masks))
        return PlannerOutputs(actions, values[rows, actions], values, actions[:, None], masks, ~masks.any(axis=1))


def with_planner(bundle: Bundle) -> Bundle:
    """A bundle of another name that has a planner; writing a real one takes long."""
    changes = {"bundle_hash": "1" * 64, "planner": PlannerEntry(horizon=1, noise_tables=1)}
    manifest = bundle.manifest.model_copy(update=changes)
    return dataclasses.replace(bundle, manifest=manifest, planner_session=LastActionPlanner(bundle))


def error_of(answer: Answer, status: int) -> str:
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json) == ["error"]
    return str(answer.json["error"])
