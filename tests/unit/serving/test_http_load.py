"""Decisions that take long, too many callers, a server that stops: nobody waits who need not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from http_worlds import Answer, Client, decide_body, error_of, running

from masking import TradingState
from serving.engine import DecisionEngine
from serving.http.server import HttpLimits
from serving.records import DecisionRecord

COMMAND = {"person": "Ada", "reason": "a test"}
INFERENCE = {"inputs": [{"name": "state", "shape": [1, 14], "datatype": "FP32", "data": [0] * 14}]}


class Gatekeeper:
    """Holds every decision back until it is let go."""

    def __init__(self, engine: DecisionEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self._decide = engine.decide
        monkeypatch.setattr(engine, "decide", self.decide)

    def decide(self, *args: Any, **kwargs: Any) -> DecisionRecord:
        self.entered.set()
        assert self.go.wait(120)
        return self._decide(*args, **kwargs)


@pytest.fixture
def held(engine: DecisionEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gatekeeper]:
    gatekeeper = Gatekeeper(engine, monkeypatch)
    yield gatekeeper
    gatekeeper.go.set()


class Later:
    """A call in a thread."""

    def __init__(self, call: Callable[[], Answer]) -> None:
        self._answers: list[Answer] = []
        self._thread = threading.Thread(target=lambda: self._answers.append(call()))
        self._thread.start()

    def answer(self) -> Answer:
        self._thread.join(120)
        return self._answers[0]


def test_health_queries_and_commands_go_on_while_a_decision_takes_long(
    engine: DecisionEngine, client: Client, held: Gatekeeper
) -> None:
    late = Later(lambda: client.post("/decide", decide_body()))
    assert held.entered.wait(120)
    assert client.get("/v2/health/live").json == {"live": True}
    assert client.get("/v2/health/ready").json == {"ready": True}
    assert client.get("/state").status == 200
    assert client.post("/v2/models/policy/infer", INFERENCE).status == 200
    assert client.post("/kill", COMMAND).status == 200
    held.go.set()
    decision = late.answer().json
    assert (decision["executed"], decision["trading_state"]) == (0, TradingState.HALTED)


def test_too_many_at_once_are_refused_but_not_health_and_commands(engine: DecisionEngine, held: Gatekeeper) -> None:
    with running(engine, limits=HttpLimits(max_concurrency=1, max_wait=120.0)) as client:
        first = Later(lambda: client.post("/decide", decide_body()))
        assert held.entered.wait(120)
        refused = client.post("/decide", decide_body("second"))
        assert "at once" in error_of(refused, 503)
        assert refused.headers["retry-after"] == "1"
        error_of(client.get("/state"), 503)
        assert client.get("/v2/health/live").status == 200
        assert client.post("/kill", COMMAND).status == 200
        held.go.set()
        assert first.answer().status == 200
        assert client.post("/decide", decide_body("third")).status == 200


def test_what_could_not_begin_in_time_is_never_decided(engine: DecisionEngine, held: Gatekeeper) -> None:
    with running(engine, limits=HttpLimits(max_wait=0.05)) as client:
        first = Later(lambda: client.post("/decide", decide_body()))
        assert held.entered.wait(120)
        assert "not begun" in error_of(client.post("/decide", decide_body("second")), 503)
        held.go.set()
        assert first.answer().status == 200
    assert [record.event_id for record in engine.recent] == ["event"]


def test_a_stopped_server_finishes_what_it_began(engine: DecisionEngine, held: Gatekeeper) -> None:
    with running(engine) as client:
        first = Later(lambda: client.post("/decide", decide_body()))
        assert held.entered.wait(120)
        release = threading.Timer(0.3, held.go.set)
        release.start()
    release.join()
    assert first.answer().json["reason"] == "ok"
    assert engine.ledger.find("event") is not None


def test_a_bug_is_500_in_json_without_its_text(
    engine: DecisionEngine, client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(engine, "decide", fail)
    assert error_of(client.post("/decide", decide_body()), 500) == "internal error"
    assert "secret" in caplog.text
    assert client.get("/state").status == 200
