"""The HTTP server over a real socket: every answer as promised, every misuse an error in JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from http_worlds import OPERATOR, TOKENS, Client, decide_body, error_of, running, with_planner

from masking import TradingState
from serving import Bundle
from serving.engine import DecisionEngine
from serving.errors import LedgerError
from serving.http.auth import Tokens
from serving.http.routes import ROUTES
from serving.http.server import create_app

COMMAND = {"person": "Ada", "reason": "a test"}


@pytest.fixture
def planned(bundle: Bundle) -> Bundle:
    return with_planner(bundle)


def test_a_decision_is_its_record_as_in_the_ledger(engine: DecisionEngine, client: Client) -> None:
    answer = client.post("/decide", decide_body())
    assert answer.status == 200
    entry = engine.ledger.find("event")
    assert entry is not None
    assert answer.body == entry.body
    assert answer.json["reason"] == "ok"
    # The same event gets the same decision, not a second one.
    assert client.post("/decide", decide_body()).body == answer.body
    assert len(engine.recent) == 1


def test_an_explanation_names_who_forbids_what(engine: DecisionEngine, client: Client) -> None:
    callers = (True, False, *[True] * 5)
    answer = client.post("/decide?explain=true", decide_body(action_masks=callers))
    decision = answer.json
    said = decision.pop("explanation")
    assert client.post("/decide?explain=false", decide_body()).json == decision
    target = engine.bundle.rule_set.actions.names[decision["executed"]]
    assert said[0] == f"{target} is executed, as the policy chose [ok; ACTIVE]"
    change = "the change of +1.25 would exceed the limit 0.6 of one decision"
    assert f"target 1.25 is denied: {change} [max_position_change; ACTIVE]" in said
    assert "target 0 is denied: the caller's mask or limits forbid it [caller]" in said
    denied = [action for action, valid in enumerate(decision["action_masks"]) if not valid]
    assert len(said) == 1 + len(denied)


def test_an_explanation_of_what_cannot_be_judged_or_is_halted(engine: DecisionEngine, client: Client) -> None:
    said = client.post("/decide?explain=true", decide_body("odd", features={"x": 1.0})).json["explanation"]
    assert len(said) == 1
    assert "hold is executed [missing_feature; ACTIVE]: features: expected" in said[0]
    engine.kill("Ada", "a test")
    said = client.post("/decide?explain=true", decide_body("halted", position=0.5)).json["explanation"]
    assert said[0].startswith("The position is closed by the risk manager [halted; HALTED]")
    assert sum("only Hold is allowed [drawdown_ladder; HALTED]" in sentence for sentence in said) == 6


def test_an_explanation_without_the_bundle_that_decided(
    engine: DecisionEngine, planned: Bundle, client: Client
) -> None:
    before = client.post("/decide", decide_body(action_masks=(True, False, *[True] * 5))).json
    engine.use(planned)
    said = client.post("/decide?explain=true", decide_body()).json["explanation"]
    assert said[0] == f"Action {before['executed']} is executed, as the policy chose [ok; ACTIVE]"
    assert "Action 6 is denied [max_position_change]" in said
    assert "Action 1 is denied: the caller's mask or limits forbid it [caller]" in said


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b"NaN",
        b'{"event_id":"a\xff"}',
        b'{"event_id":"\\ud800"}',
        b'{"account":' + b"[" * 100_000,
        decide_body().replace(b'"bar_time":1699999940.0', b'"bar_time":NaN'),
        decide_body().replace(b'"bar_time":1699999940.0', b'"bar_time":1e999'),
        decide_body().replace(b'"bar_time":1699999940.0', b'"bar_time":"now"'),
        decide_body().replace(b'"event_id":"event"', b'"event_id":7'),
        decide_body().replace(b"{", b'{"extra":1,', 1),
        decide_body() + b"x",
    ],
)
def test_a_request_that_cannot_be_read_is_400_and_not_recorded(
    engine: DecisionEngine, client: Client, body: bytes
) -> None:
    assert error_of(client.post("/decide", body), 400).startswith("body: ")
    assert not engine.recent


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"features": {}}, "missing_feature"),
        ({"equity": None}, "non_finite"),
        ({"position": 1e300}, None),
        ({"bar_time": 1e300}, "future_data"),
        ({"bundle_hash": "0" * 64}, "hash_mismatch"),
        ({"action_masks": (True,)}, "invalid_request"),
    ],
)
def test_a_request_that_cannot_be_followed_is_held(client: Client, changes: dict[str, Any], reason: str | None) -> None:
    answer = client.post("/decide", decide_body(**changes))
    assert (answer.status, answer.json["executed"]) == (200, 0)
    assert reason in (None, answer.json["reason"])


def test_a_decision_that_cannot_be_recorded_is_held_and_counted(
    engine: DecisionEngine, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise LedgerError("disk full")

    monkeypatch.setattr(engine.ledger, "append", fail)
    answer = client.post("/decide", decide_body())
    assert (answer.status, answer.json["executed"], answer.json["reason"]) == (200, 0, "ledger_failed")
    assert b'detent_unrecorded_total{reason="ledger_failed"} 1.0' in client.get("/metrics").body
    # The kill switch holds though it could not be recorded, and says so.
    assert "disk full" in error_of(client.post("/kill", COMMAND), 503)
    assert engine.risk.killed


def test_recent_decisions_are_newest_first_and_limited(client: Client) -> None:
    for number in range(25):
        client.post("/decide", decide_body(f"event-{number}"))
    assert [one["event_id"] for one in client.get("/decisions?limit=3").json] == ["event-24", "event-23", "event-22"]
    assert len(client.get("/decisions").json) == 20
    assert len(client.get("/decisions?limit=100").json) == 25
    for wrong in ("0", "101", "-1", "1.5", "", "x", "²", "9" * 5000, "+3", "%00"):
        assert error_of(
            client.get(f"/decisions?limit={wrong}" if wrong != "²" else "/decisions?limit=%C2%B2"), 400
        ).startswith("limit: ")
    assert error_of(client.post("/decide?explain=yes", decide_body()), 400).startswith("explain: ")
    assert "was one twice" in error_of(client.get("/decisions?limit=3&limit=3"), 400)
    assert "at most 20" in error_of(client.get("/decisions?" + "&".join(["limit=3"] * 21)), 400)
    assert "expected some of ['limit'], was 'limti'" in error_of(client.get("/decisions?limti=3"), 400)


# --- commands ---------------------------------------------------------------------------------------------


@pytest.fixture
def operator(engine: DecisionEngine) -> Iterator[Client]:
    with running(engine, tokens=TOKENS) as client:
        yield dataclasses.replace(client, token=OPERATOR)


def test_commands_move_the_trading_state_and_are_recorded(engine: DecisionEngine, operator: Client) -> None:
    for path, state in (("/reduce_only", "REDUCE_ONLY"), ("/kill", "HALTED"), ("/reset", "ACTIVE")):
        answer = operator.post(path, COMMAND)
        assert answer.status == 200
        assert (answer.json["command"], answer.json["person"], answer.json["detail"]) == (path[1:], "Ada", "a test")
        assert operator.get("/state").json["trading_state"] == state
        assert engine.risk.trading_state == TradingState[state]
    assert [entry.record.command for entry in engine.ledger.read(-3)] == ["reduce_only", "kill", "reset"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"person": "Ada"},
        {"reason": "x"},
        {**COMMAND, "person": " "},
        {**COMMAND, "reason": ""},
        {**COMMAND, "more": 1},
        {**COMMAND, "person": "x" * 101},
        {**COMMAND, "reason": "x" * 501},
        {**COMMAND, "person": None},
        [],
    ],
)
@pytest.mark.parametrize("path", ["/kill", "/reduce_only", "/reset"])
def test_a_command_for_which_nobody_answers_is_refused(
    engine: DecisionEngine, operator: Client, path: str, body: Any
) -> None:
    before = engine.risk
    assert error_of(operator.post(path, json.dumps(body).encode()), 400).startswith("body: ")
    assert engine.risk == before


# --- what is seen -----------------------------------------------------------------------------------------


def test_the_state_tells_all_parts(engine: DecisionEngine, planned: Bundle, client: Client) -> None:
    client.post("/decide", decide_body(equity=900.0))
    engine.challenge(planned)
    client.post("/decide", decide_body("second", equity=850.0, bar_time=1_700_000_000.0))
    state = client.get("/state").json
    assert (state["trading_state"], state["killed"]) == ("ACTIVE", False)
    assert state["drawdown"] == pytest.approx(1 - 850 / 900)
    assert state["risk"]["equity"] == 850.0
    (newest,) = engine.ledger.read(-1)
    assert (state["ledger"]["seq"], state["ledger"]["hash"], state["ledger"]["error"]) == (newest.seq, newest.hash, "")
    assert state["bundle"]["hash"] == engine.bundle.hash
    assert (state["bundle"]["planner"], state["challenger"]["planner"]) == (False, True)
    assert state["challenger"]["hash"] == planned.hash
    assert state["agreement"]["compared"] == 1
    assert state["actions"][0] == "hold"
    assert sum(state["latency"]["counts"]) == 2
    assert len(state["latency"]["counts"]) == len(state["latency"]["upper_ms"]) + 1
    assert state["drift"] is None


def test_looking_at_the_state_never_asks_for_the_head(
    engine: DecisionEngine, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `head` tells the ledger that its writer knows what is there; somebody who only looks must not.
    def fail() -> None:
        raise AssertionError("head")

    monkeypatch.setattr(engine.ledger, "head", fail)
    assert client.get("/state").status == 200
    assert b"detent_ledger_seq 1.0" in client.get("/metrics").body


def test_a_ledger_that_cannot_be_read_is_told(
    engine: DecisionEngine, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise LedgerError("gone")

    monkeypatch.setattr(engine.ledger, "read", fail)
    assert client.get("/state").json["ledger"] == {"account": "default", "seq": 0, "hash": "", "error": "gone"}
    metrics = client.get("/metrics").body
    assert b"detent_trading_state 0.0" in metrics
    assert b"detent_ledger_seq" not in metrics


def test_the_page_is_its_own_and_may_load_nothing_else(client: Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().partition(" ")[::2] for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert client.get("/app.js").headers["content-type"].startswith("text/javascript")
    assert client.get("/style.css").headers["content-type"].startswith("text/css")
    for path in ("/", "/app.js", "/style.css"):
        answer = client.get(path)
        assert answer.headers["x-content-type-options"] == "nosniff"
        text = answer.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in "".join(line for line in text.splitlines() if not line.lstrip().startswith("//"))


def test_the_document_holds_the_routes_that_are_served(engine: DecisionEngine, client: Client) -> None:
    document = client.get("/openapi.json").json
    served = {
        (method, route.path)  # type: ignore[attr-defined]
        for route in create_app(engine, tokens=Tokens()).routes
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == served
    assert len(served) == len(ROUTES)
    names = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(names)) == len(names)
    # Every reference leads somewhere.
    text = json.dumps(document)
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.partition('"')[0] in document["components"]["schemas"]
