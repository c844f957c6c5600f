"""Callers that send too much, too slowly, too often, or nonsense: an error in JSON, and everybody else is served."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from http_worlds import PATIENT_LIMITS, Client, decide_body, make_engine, read_all, running

from serving import Bundle, ServingError
from serving.engine import DecisionEngine
from serving.http.server import HttpLimits

HEAD = b"POST /decide HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
LIVE = b"GET /v2/health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"
SMALL = dataclasses.replace(PATIENT_LIMITS, max_body=2000, max_head=4000)


@pytest.fixture(scope="module")
def engine(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DecisionEngine]:
    engine = make_engine(bundle, tmp_path_factory.mktemp("limits"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: DecisionEngine) -> Iterator[Client]:
    with running(engine, limits=SMALL) as client:
        yield client


def parsed(answer: bytes) -> tuple[int, bytes, str]:
    """Status, head and error of the only answer in these bytes."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 "), answer
    assert b"content-type: application/json" in head
    found = json.loads(body)
    assert list(found) == ["error"]
    return int(head[9:12]), head, found["error"]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def test_a_body_that_is_declared_too_long_is_not_waited_for(client: Client) -> None:
    for length in (b"2001", b"1000000000", b"9" * 19):
        status, head, said = parsed(client.raw(HEAD + b"content-length: " + length + b"\r\n\r\n"))
        assert (status, b"connection: close" in head) == (413, True)
        assert said.startswith("body: expected at most 2000 bytes, was ")


def test_a_body_that_grows_too_long_is_cut_off(client: Client) -> None:
    with client.connect() as connection:
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk(b" " * 1500))
        connection.sendall(chunk(b" " * 501))
        # Not ended: the answer comes without it.
        assert parsed(read_all(connection))[0] == 413


def test_a_body_that_comes_at_once_and_is_too_long_is_refused(client: Client) -> None:
    whole = HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk(b" " * 2001) + chunk(b"")
    assert parsed(client.raw(whole + LIVE))[0] == 413


def test_a_body_in_many_pieces_is_one(client: Client) -> None:
    body = decide_body("pieces")
    pieces = b"".join(chunk(body[index : index + 7]) for index in range(0, len(body), 7))
    answer = client.raw(HEAD + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n" + pieces + chunk(b""))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"event_id":"pieces"' in answer


def test_a_body_of_just_the_limit_is_taken(client: Client) -> None:
    padded = decide_body("padded").ljust(2000)
    assert client.post("/decide", padded).status == 200
    assert client.post("/decide", padded + b" ").status == 413


def test_a_slow_body_is_given_up(engine: DecisionEngine) -> None:
    with running(engine, limits=dataclasses.replace(PATIENT_LIMITS, body_timeout=0.2)) as client:
        status, head, said = parsed(client.raw(HEAD + b"content-length: 500\r\n\r\n{"))
        assert (status, b"connection: close" in head) == (408, True)
        assert said.startswith("body: expected within 0.2 s")
        assert client.post("/decide", decide_body("after")).status == 200


@pytest.mark.parametrize("begin", [b"", b"\r\n" * 10, b"GET", b"GET / HTTP/1.1\r\nhost: localhost\r\nx-slow: 1"])
def test_a_slow_head_is_given_up(engine: DecisionEngine, begin: bytes) -> None:
    with running(engine, limits=dataclasses.replace(PATIENT_LIMITS, head_timeout=0.2)) as client:
        status, _, said = parsed(client.raw(begin))
        assert (status, said) == (408, "head: expected within 0.2 s, was not all there")


@pytest.mark.parametrize("again", [b"\r\n", b"GET / HT"])
def test_a_head_that_is_slow_on_a_connection_in_use_is_given_up(engine: DecisionEngine, again: bytes) -> None:
    with running(engine, limits=dataclasses.replace(PATIENT_LIMITS, head_timeout=0.2)) as client:
        connection = client.connect()
        with connection:
            connection.sendall(LIVE)
            first = connection.recv(65536)
            assert first.endswith(b'{"live":true}')
            connection.sendall(again)
            assert parsed(read_all(connection))[0] == 408


def test_a_head_that_came_in_time_has_no_end_later(engine: DecisionEngine) -> None:
    with running(engine, limits=dataclasses.replace(PATIENT_LIMITS, head_timeout=0.2)) as client:
        body = decide_body("late body")
        with client.connect() as connection:
            connection.sendall(HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body))
            assert not readable(connection, 0.6)
            connection.sendall(body)
            assert b"200 OK" in read_all(connection)


def readable(connection: socket.socket, seconds: float) -> bool:
    """Whether anything comes in this time."""
    connection.settimeout(seconds)
    try:
        connection.recv(1, socket.MSG_PEEK)
        return True
    except TimeoutError:
        return False
    finally:
        connection.settimeout(120)


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx-long: " + b"x" * 4000 + b"\r\n\r\n",
        b"GET /?" + b"x" * 4000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 3000 + b"\r\n",
    ],
)
def test_a_head_that_is_too_long_is_refused(client: Client, head: bytes) -> None:
    assert parsed(client.raw(head))[0] == 431


@pytest.mark.parametrize("line", [b"x-long: " + b"x" * 300_000, b"x-more: y\r\n" * 30_000])
def test_a_head_without_end_is_cut_off(client: Client, line: bytes) -> None:
    with client.connect() as connection:
        # The server closes while this is still sent, and what it said may be lost with the connection.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n" + line)
        answer = read_all(connection)
    assert not answer or parsed(answer)[0] == 431
    assert client.get("/state").status == 200


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nbad header\r\n\r\n",
        HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_400_and_the_end(client: Client, data: bytes) -> None:
    assert parsed(client.raw(data))[0] == 400
    assert client.get("/state").status == 200


def test_nonsense_behind_a_request_does_not_cost_its_answer(client: Client) -> None:
    body = decide_body("before nonsense")
    answer = client.raw(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body + b"nonsense\r\n\r\n" + LIVE)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in answer


def test_requests_in_a_row_are_answered_in_order(client: Client) -> None:
    bodies = [decide_body(f"row-{number}") for number in range(5)]
    requests = [HEAD + b"content-length: %d\r\n\r\n" % len(body) + body for body in bodies]
    answer = client.raw(b"".join(requests) + LIVE.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
    events = [part[:5] for part in answer.split(b'"event_id":"')[1:]]
    assert events == [b"row-%d" % number for number in range(5)]
    assert answer.endswith(b'{"live":true}')


def test_headers_behind_a_body_are_dropped(client: Client) -> None:
    body = decide_body("trailers")
    trailers = b"host: example.com\r\n" + b"x: y\r\n" * 20_000
    answer = client.raw(
        HEAD + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n" + chunk(body) + b"0\r\n" + trailers + b"\r\n"
    )
    assert b'"event_id":"trailers"' in answer


def test_a_caller_who_leaves_in_the_middle_takes_nothing_along(client: Client) -> None:
    for cut in range(1, len(HEAD), 13):
        with client.connect() as connection:
            connection.sendall(HEAD[:cut])
    with client.connect() as connection:
        connection.sendall(HEAD + b"content-length: 50\r\n\r\n{")
    assert client.get("/state").status == 200


def test_a_refused_body_ends_the_connection(client: Client) -> None:
    # Otherwise the rest, which may be long, would be read to its end.
    answer = client.raw(HEAD.replace(b"application/json", b"text/plain") + b"content-length: 1000\r\n\r\n{}")
    status, head, _ = parsed(answer)
    assert (status, b"connection: close" in head) == (415, True)


def test_a_compressed_body_is_refused(client: Client) -> None:
    answer = client.post("/v2/models/policy/infer", b"x", content_encoding="gzip")
    assert (answer.status, answer.json["error"]) == (415, "content-encoding: expected none")


def test_an_upgrade_is_answered_as_if_it_were_none(client: Client) -> None:
    upgrade = b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: eA==\r\n"
    with client.connect() as connection:
        connection.sendall(LIVE[:-2] + upgrade + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_one_connection_too_many_is_told_so(engine: DecisionEngine) -> None:
    with running(engine, limits=dataclasses.replace(PATIENT_LIMITS, max_connections=3)) as client, ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(client.connect())
            connection.sendall(LIVE)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        refused = stack.enter_context(client.connect())
        assert parsed(read_all(refused))[0] == 503
        connection.sendall(LIVE)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_head_request_has_no_body(client: Client) -> None:
    answer = client.call("HEAD", "/v2/health/live")
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "13")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v2/", 404),
        ("GET", "/state/", 404),
        ("GET", "//state", 404),
        ("GET", "/%2e%2e/etc/passwd", 404),
        ("GET", "/v2/models//ready", 404),
        ("GET", "/app.js/..", 404),
        ("DELETE", "/decide", 405),
        ("GET", "/kill", 405),
        ("POST", "/state", 405),
        ("TRACE", "/", 405),
    ],
)
def test_what_is_not_served_is_an_error_in_json(client: Client, method: str, path: str, status: int) -> None:
    answer = client.call(method, path)
    assert (answer.status, list(answer.json)) == (status, ["error"])
    assert ("allow" in answer.headers) is (status == 405)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(HttpLimits)])
def test_a_limit_that_is_none_is_refused(field: str) -> None:
    for value in (0, -1, float("nan")):
        with pytest.raises(ServingError, match=f"{field}: expected a positive number"):
            HttpLimits(**{field: value})  # type: ignore[arg-type]
