"""uvicorn's HTTP protocol with what it lacks: limits on heads and connections, and errors as JSON.

uvicorn waits for a head without end and stores one of any size; a few slow callers could keep everybody else out.
"""

from __future__ import annotations

import asyncio
from functools import partial
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.http.limits import HttpLimits
from serving.http.messages import error_body


def guarded_protocol(limits: HttpLimits) -> type[HttpToolsProtocol]:
    """The protocol class for `uvicorn.Config(http=...)` under these limits."""
    return type("GuardedProtocol", (_GuardedProtocol,), {"limits": limits})


class _GuardedProtocol(HttpToolsProtocol):
    limits: HttpLimits
    _head_timer: asyncio.TimerHandle | None = None
    _in_head = False
    _head_bytes = 0
    _large = False
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(503, f"connections: expected at most {self.limits.max_connections}, was one more")
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_ends()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing() or self._refused:
            return
        # Otherwise the data may begin with the end of another message.
        begins_here = self._in_head or self._resting
        self._large = len(data) + self._head_bytes > self.limits.max_head
        super().data_received(data)
        if self.transport.is_closing() or self._refused:
            return
        if self._in_head and begins_here:
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.max_head:
                self._refuse_head()
        elif self._resting and not self._in_head:
            # Empty lines are no message, yet they stop the clock of a connection at rest.
            self._await_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        # Those behind the body are read by nobody, and a list of them would grow without limit.
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_ends()
        if self._large:
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > self.limits.max_head:
                self._refuse_head()
                raise ValueError("head")  # the parser stops
        super().on_headers_complete()
        joined = _HeadWithBody(self.transport)
        self.cycle.transport = joined  # type: ignore[assignment]
        self.cycle.on_response = partial(self._answered, joined)

    def _answered(self, joined: _HeadWithBody) -> None:
        # There may have been no body to take it along.
        joined.flush()
        self.on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    @property
    def _resting(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_ends()
        self._in_head, self._head_bytes = True, 0
        self._head_timer = self.loop.call_later(self.limits.head_timeout, self._head_is_late)

    def _head_ends(self) -> None:
        self._in_head, self._head_bytes = False, 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._refuse(408, f"head: expected within {self.limits.head_timeout:g} s, was not all there")

    def _refuse_head(self) -> None:
        self._refuse(431, f"head: expected at most {self.limits.max_head} bytes, was more")

    def _refuse(self, status: int, text: str) -> None:
        if self.transport.is_closing() or self._refused:
            return
        self._head_ends()
        if self._resting or (self.cycle.more_body and not self.cycle.response_started):
            self.transport.write(_whole_answer(status, text))
            self.transport.close()
        else:
            # An answer is under way: it is the last one.
            self.cycle.keep_alive, self._refused = False, True


class _HeadWithBody:
    """A transport that holds a head back until its body comes: one packet, and one caller woken up, not two."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""

    def write(self, data: bytes) -> None:
        if data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100 ") and not self._head:
            self._head = data
        else:
            self._transport.write(self._head + data)
            self._head = b""

    def flush(self) -> None:
        if self._head:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


def _whole_answer(status: int, text: str) -> bytes:
    body = error_body(text)
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode("ascii") + body
