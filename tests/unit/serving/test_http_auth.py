"""Who may call what: tokens, roles, names and origins; and what is refused before a server starts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
from http_worlds import DECIDE, OPERATOR, READ, TOKENS, Client, decide_body, make_engine, running
from hypothesis import given
from hypothesis import strategies as st

from serving import Bundle, ServingError
from serving.engine import DecisionEngine
from serving.http.auth import Role, Tokens, check_bind, host_name, is_loopback
from serving.http.routes import ROUTES, RouteSpec
from serving.http.server import HttpServer

COMMAND = b'{"person":"Ada","reason":"a test"}'


@pytest.fixture(scope="module")
def engine(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DecisionEngine]:
    engine = make_engine(bundle, tmp_path_factory.mktemp("auth"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def guarded(engine: DecisionEngine) -> Iterator[Client]:
    with running(engine, tokens=TOKENS) as client:
        yield client


@pytest.fixture(scope="module")
def open_to_all(engine: DecisionEngine) -> Iterator[Client]:
    with running(engine) as client:
        yield client


def call(client: Client, route: RouteSpec, **headers: str) -> int:
    path = route.path.format(model="policy", version="1")
    return client.call(route.method, path, None if route.body is None else b"{}", **headers).status


@pytest.mark.parametrize(
    ("token", "role"),
    [
        (None, Role.PUBLIC),
        ("wrong-token-0123456789", Role.PUBLIC),
        (READ, Role.READ),
        (DECIDE, Role.DECIDE),
        (OPERATOR, Role.OPERATOR),
    ],
)
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_each_role_may_do_its_own_and_what_is_below(
    guarded: Client, token: str | None, role: Role, route: RouteSpec
) -> None:
    status = call(replace(guarded, token=token), route)
    expected = None if role >= route.role else 401 if role is Role.PUBLIC else 403
    assert status == expected if expected is not None else status in (200, 400, 404)


def test_what_each_role_is_for() -> None:
    roles = {(route.method, route.path): route.role for route in ROUTES}
    operator = {path for (_, path), role in roles.items() if role is Role.OPERATOR}
    assert operator == {"/kill", "/reduce_only", "/reset"}
    assert {path for (_, path), role in roles.items() if role is Role.DECIDE} == {"/decide"}
    public = {path for (_, path), role in roles.items() if role is Role.PUBLIC}
    assert public == {"/", "/app.js", "/style.css", "/openapi.json", "/v2/health/live", "/v2/health/ready"}
    assert all(route.changes for route in ROUTES if route.role >= Role.DECIDE)


def test_a_refused_caller_is_told_how_and_learns_no_more(guarded: Client) -> None:
    answer = guarded.get("/state")
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert list(answer.json) == ["error"]
    said = replace(guarded, token=READ).post("/kill", COMMAND).json["error"]
    assert said == "authorization: expected the role operator, was read"
    # Before the body is read: whoever may not speak is not listened to.
    assert guarded.call("POST", "/kill", b"{", content_type="text/plain").status == 401


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        READ,
        f"Basic {READ}",
        f"Bearer{READ}",
        "Bearer ",
        f"Bearer {READ}x",
        f"Bearer {READ[:-1]}",
        f"Bearer {READ} {READ}",
        f"Token {READ}",
    ],
)
def test_only_a_bearer_token_counts(guarded: Client, authorization: str) -> None:
    assert guarded.get("/state", authorization=authorization).status == 401


@pytest.mark.parametrize("authorization", [f"Bearer {READ}", f"bearer {READ}", f"BEARER   {READ} "])
def test_the_scheme_is_written_as_one_likes(guarded: Client, authorization: str) -> None:
    assert guarded.get("/state", authorization=authorization).status == 200


@given(st.binary(max_size=60))
def test_no_other_bytes_are_a_token(header: bytes) -> None:
    assert TOKENS.role(header) is Role.PUBLIC
    assert TOKENS.role(b"Bearer " + header) is Role.PUBLIC


@pytest.mark.parametrize("headers", [{}, {"authorization": f"Bearer {OPERATOR}"}])
def test_without_tokens_everything_is_open_but_to_trade_again(
    engine: DecisionEngine, open_to_all: Client, headers: dict[str, str]
) -> None:
    for route in ROUTES:
        if route.path != "/reset":
            assert call(open_to_all, route, **headers) in (200, 400, 404)
    assert open_to_all.post("/kill", COMMAND).status == 200
    answer = open_to_all.post("/reset", COMMAND, **headers)
    assert (answer.status, list(answer.json)) == (403, ["error"])
    assert "expected DETENT_OPERATOR_TOKEN, this service was started without one" in answer.json["error"]
    assert engine.risk.killed


def test_tokens_come_from_the_environment() -> None:
    environ = {"DETENT_READ_TOKEN": READ, "DETENT_OPERATOR_TOKEN": OPERATOR}
    tokens = Tokens.from_environment(environ)
    assert tokens == Tokens(read=READ, operator=OPERATOR)
    assert tokens.role(f"Bearer {OPERATOR}".encode()) is Role.OPERATOR
    assert not Tokens.from_environment({}).required
    for text in (repr(tokens), str(tokens)):
        assert READ not in text
        assert OPERATOR not in text


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"DETENT_OPERATOR_TOKEN": "short"}, "DETENT_OPERATOR_TOKEN: expected 16"),
        ({"DETENT_OPERATOR_TOKEN": ""}, "DETENT_OPERATOR_TOKEN: expected 16"),
        ({"DETENT_OPERATOR_TOKEN": "with a space 0123456789"}, "without spaces"),
        ({"DETENT_OPERATOR_TOKEN": "tökén-0123456789012"}, "ASCII"),
        ({"DETENT_READ_TOKEN": READ}, "DETENT_OPERATOR_TOKEN: expected one"),
        ({"DETENT_DECIDE_TOKEN": DECIDE, "DETENT_READ_TOKEN": READ}, "nobody could halt"),
        ({"DETENT_READ_TOKEN": READ, "DETENT_OPERATOR_TOKEN": READ}, "different tokens"),
    ],
)
def test_tokens_that_protect_nothing_are_refused(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ServingError) as caught:
        Tokens.from_environment(environ)
    assert words in str(caught.value)
    assert not any(token and token in str(caught.value) for token in environ.values())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", "", "localhost.example.com"])  # noqa: S104
def test_other_machines_get_in_with_tokens_only(engine: DecisionEngine, host: str) -> None:
    assert not is_loopback(host)
    check_bind(host, TOKENS)
    with pytest.raises(ServingError, match="host: expected a loopback address"):
        check_bind(host, Tokens())
    with pytest.raises(ServingError, match="host: expected a loopback address"):
        HttpServer(engine, host, 0, tokens=Tokens())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    check_bind(host, Tokens())


def test_the_log_says_who_may_what(engine: DecisionEngine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "serving.http.server"), running(engine):
        pass
    assert (
        "without tokens: whoever is on this machine may decide and halt; a reset needs DETENT_OPERATOR_TOKEN"
        in caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.INFO, "serving.http.server"), running(engine, tokens=TOKENS):
        pass
    assert "bearer tokens required" in caplog.text
    assert OPERATOR not in caplog.text


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8080", "localhost."]
)
def test_loopback_names_are_answered(open_to_all: Client, host: str) -> None:
    assert open_to_all.get("/state", host=host).status == 200


@pytest.mark.parametrize(
    "host", ["example.com", "localhost.example.com", "127.0.0.1.example.com", "", "evil@localhost", "[::2]", "10.0.0.1"]
)
@pytest.mark.parametrize("path", ["/state", "/", "/v2/health/live"])
def test_other_names_are_not(open_to_all: Client, host: str, path: str) -> None:
    answer = open_to_all.get(path, host=host)
    assert (answer.status, list(answer.json)) == (400, ["error"])
    assert answer.json["error"].startswith("host: ")


def test_names_can_be_chosen(engine: DecisionEngine) -> None:
    with running(engine, allowed_hosts=("detent.example",)) as client:
        assert client.get("/state", host="detent.example:443").status == 200
        assert client.get("/state").status == 400


@given(st.binary(max_size=30))
def test_any_host_header_has_a_name(header: bytes) -> None:
    assert host_name(header) == host_name(header).lower()


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx"]
)
@pytest.mark.parametrize("path", ["/decide", "/kill", "/reduce_only", "/reset"])
def test_what_changes_trading_must_be_sent_as_json(guarded: Client, path: str, content_type: str) -> None:
    answer = replace(guarded, token=OPERATOR).post(path, COMMAND, content_type=content_type)
    assert (answer.status, list(answer.json)) == (415, ["error"])


def test_json_may_have_parameters(open_to_all: Client) -> None:
    assert open_to_all.post("/decide", decide_body(), content_type="Application/JSON; charset=utf-8").status == 200


@pytest.mark.parametrize("origin", ["null", "http://example.com", "http://localhost", "http://127.0.0.1:1", ""])
@pytest.mark.parametrize("path", ["/kill", "/v2/models/policy/infer"])
def test_pages_of_other_origins_may_not_send(open_to_all: Client, path: str, origin: str) -> None:
    answer = open_to_all.post(path, COMMAND, origin=origin)
    assert (answer.status, list(answer.json)) == (403, ["error"])


def test_its_own_page_may(open_to_all: Client) -> None:
    own = f"http://127.0.0.1:{open_to_all.port}"
    assert open_to_all.post("/kill", COMMAND, origin=own, host=own.removeprefix("http://")).status == 200


def test_no_page_gets_leave_to_ask_across_origins(open_to_all: Client) -> None:
    answer = open_to_all.call("OPTIONS", "/kill", origin="http://example.com", access_control_request_method="POST")
    assert answer.status == 405
    assert not any(name.startswith("access-control") for name in answer.headers)
