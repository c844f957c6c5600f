"""Requests made up from the OpenAPI document, and damaged ones: answers as promised, and never 5xx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from http_worlds import DECIDE, OPERATOR, READ, TOKENS, Client, decide_body, make_engine, running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from serving import Bundle
from serving.engine import DecisionEngine
from serving.errors import LedgerError
from serving.http.openapi import openapi_document
from serving.http.routes import ROUTES, RouteSpec
from serving.records import ControlRecord, DecisionRecord

DOCUMENT = json.loads(openapi_document(ROUTES))
EXAMPLES = 25
"""Per operation."""
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
    ignored_auth,
]
STRICT = {"path", "body"}
"""Parts that are sent as they were made up: wrong parameters of a URL may vanish on the way."""


@pytest.fixture(scope="module")
def engine(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DecisionEngine]:
    engine = make_engine(bundle, tmp_path_factory.mktemp("fuzz"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: DecisionEngine) -> Iterator[Client]:
    with running(engine, tokens=TOKENS) as client:
        yield Client(client.host, client.port, OPERATOR)


@pytest.mark.parametrize(
    ("route", "mode"),
    [
        pytest.param(route, mode, id=f"{mode.value} {route.method} {route.path}")
        for mode in GenerationMode
        for route in ROUTES
        # Where nothing is taken, nothing can be wrong with it.
        if mode is GenerationMode.POSITIVE or route.body or route.query or "{" in route.path
    ],
)
def test_what_the_document_allows_and_forbids_is_answered_as_it_says(
    client: Client, route: RouteSpec, mode: GenerationMode
) -> None:
    operation = schemathesis.openapi.from_dict(DOCUMENT)[route.path][route.method]

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def answered(case: Any) -> None:
        case.call_and_validate(
            base_url=f"http://{client.host}:{client.port}",
            headers={"Authorization": f"Bearer {OPERATOR}"},
            checks=[*CHECKS, *([negative_data_rejection] if STRICT & wrong_parts(case) else [])],
        )

    answered()


@pytest.fixture
def without_ledger(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    def fail(*_: Any, **__: Any) -> Any:
        raise LedgerError("the disk is full")

    engine = make_engine(bundle, tmp_path)
    for name in ("append", "find", "head", "read"):
        monkeypatch.setattr(engine.ledger, name, fail)
    with closing(engine), running(engine, tokens=TOKENS) as client:
        yield client


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_with_a_ledger_that_fails_every_answer_is_as_the_document_says(
    without_ledger: Client, route: RouteSpec
) -> None:
    operation = schemathesis.openapi.from_dict(DOCUMENT)[route.path][route.method]

    @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    def answered(case: Any) -> None:
        response = case.call_and_validate(
            base_url=f"http://{without_ledger.host}:{without_ledger.port}",
            headers={"Authorization": f"Bearer {OPERATOR}"},
            checks=[status_code_conformance, content_type_conformance, response_schema_conformance],
        )
        # A command that cannot be recorded is the one thing that fails.
        assert (response.status_code == 503) == (route.reply is ControlRecord)
        if route.reply is DecisionRecord and response.status_code == 200:
            assert (response.json()["reason"], response.json()["executed"]) == ("ledger_failed", 0)

    answered()


def wrong_parts(case: Any) -> set[str]:
    return {part.value for part, info in case.meta.components.items() if info.mode.is_negative}


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_decision_request_is_decided_on_or_refused(client: Client, data: st.DataObject) -> None:
    body = bytearray(decide_body(data.draw(st.text(max_size=5))))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    answer = client.post("/decide?explain=true", bytes(body))
    assert answer.status in (200, 400)
    if answer.status == 200:
        assert answer.json["action_masks"][answer.json["executed"]] is True
    else:
        assert list(answer.json) == ["error"]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([route for route in ROUTES if route.body is not None]),
    st.binary(max_size=300),
    st.sampled_from(["application/json", "application/octet-stream", ""]),
    st.one_of(st.none(), st.text("0123456789-x", max_size=5)),
    st.sampled_from([READ, DECIDE, OPERATOR, "nobody"]),
)
def test_any_bytes_to_any_route_are_refused_in_json(
    client: Client, route: RouteSpec, body: bytes, content_type: str, length: str | None, token: str
) -> None:
    path = route.path.format(model="policy", version="x")
    more = {} if length is None else {"inference_header_content_length": length}
    answer = Client(client.host, client.port, token).post(path, body, content_type=content_type, **more)
    assert 400 <= answer.status < 500
    assert list(answer.json) == ["error"]
