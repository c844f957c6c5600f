"""One HTTP exchange without a framework's objects: what was asked, what is answered, and every error as JSON."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import parse_qsl

import msgspec
from starlette.types import Receive, Scope, Send

from serving.http.limits import HttpLimits

JSON = b"application/json"
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
MAX_QUERY = 20
"""Parameters of a URL."""
Headers = tuple[tuple[bytes, bytes], ...]


class HttpError(Exception):
    """An answer that is not what was asked for; `str()` tells the caller why."""

    def __init__(self, status: int, text: str, headers: Headers = ()) -> None:
        super().__init__(text)
        self.status, self.headers = status, headers

    def reply(self) -> Reply:
        """The error as the Open Inference Protocol writes it."""
        return Reply(error_body(str(self)), status=self.status, headers=self.headers)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer."""

    body: bytes
    status: int = 200
    media_type: bytes = JSON
    headers: Headers = ()


@dataclass(eq=False)
class Call:
    """One request, its body read or not."""

    scope: Scope
    headers: dict[bytes, bytes]
    """By lower-case name; the last of equal ones."""
    body: bytes = b""
    body_pending: bool = field(default=False)
    """Whether some of the body may still be under way."""

    @classmethod
    def of(cls, scope: Scope) -> Call:
        """The request of an ASGI scope."""
        headers = dict(scope["headers"])
        pending = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        return cls(scope, headers, body_pending=pending)

    @property
    def path_params(self) -> dict[str, str]:
        """Parts of the path by name."""
        params: dict[str, str] = self.scope.get("path_params", {})
        return params

    @cached_property
    def query(self) -> dict[str, str]:
        """Parameters of the URL. Raises: HttpError 400 where one comes twice, or there are too many."""
        text = self.scope.get("query_string", b"").decode("latin-1")
        try:
            pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=MAX_QUERY) if text else []
        except ValueError:
            raise HttpError(400, f"query: expected at most {MAX_QUERY} parameters, was more") from None
        found = dict(pairs)
        if len(found) != len(pairs):
            raise HttpError(400, "query: expected each parameter once, was one twice")
        return found

    async def read_body(self, receive: Receive, limits: HttpLimits) -> None:
        """Read the body. Raises: HttpError 413 for one that is too long, 408 for one that takes too long."""
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared[:20]) > limits.max_body:
            raise _too_long(limits, declared[:20].decode("ascii"))
        try:
            async with asyncio.timeout(limits.body_timeout):
                self.body = await _body(receive, limits)
        except TimeoutError:
            raise HttpError(408, f"body: expected within {limits.body_timeout:g} s, was not all there") from None
        self.body_pending = False


async def send_reply(send: Send, reply: Reply, *, close: bool) -> None:
    """Send an answer. Args: close: end the connection after it."""
    headers = [
        (b"content-type", reply.media_type),
        (b"content-length", str(len(reply.body)).encode("ascii")),
        *SECURITY_HEADERS,
        *reply.headers,
    ]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})


def error_body(text: str) -> bytes:
    """An error as the Open Inference Protocol writes it."""
    return msgspec.json.encode({"error": text})


async def _body(receive: Receive, limits: HttpLimits) -> bytes:
    message = await receive()
    body = message.get("body", b"")
    if not message.get("more_body") and message["type"] == "http.request" and len(body) <= limits.max_body:
        return bytes(body)
    parts = bytearray()
    while True:
        if message["type"] == "http.disconnect":
            raise HttpError(400, "body: expected all of it, but the connection ended before")
        parts += message.get("body", b"")
        if len(parts) > limits.max_body:
            raise _too_long(limits, f"{len(parts)} or more")
        if not message.get("more_body"):
            return bytes(parts)
        message = await receive()


def _too_long(limits: HttpLimits, found: str) -> HttpError:
    return HttpError(413, f"body: expected at most {limits.max_body} bytes, was {found}")
