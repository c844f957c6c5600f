"""The way of a request: who asks, in which form, how much of it, then the handler, then the answer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection

from starlette.types import Receive, Scope, Send

from serving.http.auth import OPERATOR_TOKEN, Role, Tokens, host_name
from serving.http.limits import HttpLimits
from serving.http.messages import JSON, Call, HttpError, Reply, send_reply
from serving.http.metrics import ServiceMetrics
from serving.http.routes import RouteSpec
from serving.http.work_thread import OverloadError

log = logging.getLogger(__name__)

BEARER = ((b"www-authenticate", b"Bearer"),)
RETRY = ((b"retry-after", b"1"),)


class Gate:
    """What every request must pass."""

    def __init__(
        self, tokens: Tokens, limits: HttpLimits, metrics: ServiceMetrics, allowed_hosts: Collection[str] | None
    ) -> None:
        """Open. Args: allowed_hosts: names to be called by; None allows all."""
        self.tokens, self.limits, self.metrics = tokens, limits, metrics
        self._hosts = None if allowed_hosts is None else frozenset(allowed_hosts)
        self._active = 0

    def check_head(self, route: RouteSpec, call: Call) -> None:
        """Raise HttpError unless the caller may do this, as far as the headers tell."""
        host = call.headers.get(b"host", b"")
        # A page of another site may point its own name at this machine; it cannot choose what it is called by.
        if self._hosts is not None and host_name(host) not in self._hosts:
            raise HttpError(400, f"host: expected one of {sorted(self._hosts)}, was {host[:80].decode('latin-1')!r}")
        if route.role > Role.PUBLIC:
            self._check_role(route, call)
        if route.method != "GET":
            self._check_sender(route, call, host)

    def enter(self) -> None:
        """Count a request. Raises: HttpError 503 where there are too many."""
        if self._active >= self.limits.max_concurrency:
            raise HttpError(503, f"requests: expected at most {self.limits.max_concurrency} at once", RETRY)
        self._active += 1

    def leave(self) -> None:
        """The request is answered."""
        self._active -= 1

    def _check_role(self, route: RouteSpec, call: Call) -> None:
        role = self.tokens.role(call.headers.get(b"authorization"))
        if role is Role.PUBLIC:
            raise HttpError(401, "authorization: expected a bearer token that is known here", BEARER)
        if route.known_caller and not self.tokens.required:
            raise HttpError(403, f"authorization: expected {OPERATOR_TOKEN}, this service was started without one")
        if role < route.role:
            raise HttpError(403, f"authorization: expected the role {route.role.name.lower()}, was {role.name.lower()}")

    def _check_sender(self, route: RouteSpec, call: Call, host: bytes) -> None:
        origin = call.headers.get(b"origin")
        if origin is not None and origin.lower().partition(b"://")[2] != host.lower():
            raise HttpError(403, f"origin: expected none or this server, was {origin[:80].decode('latin-1')!r}")
        if b"content-encoding" in call.headers:
            raise HttpError(415, "content-encoding: expected none")
        media_type = call.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if route.changes and media_type != JSON:
            raise HttpError(415, f"content-type: expected application/json, was {media_type[:80].decode('latin-1')!r}")


class Endpoint:
    """One route as an ASGI application."""

    def __init__(self, route: RouteSpec, handler: Callable[[Call], Awaitable[Reply]], gate: Gate) -> None:
        self.route, self._handler, self._gate = route, handler, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, whatever happens."""
        call = Call.of(scope)
        try:
            reply = await self._reply(call, receive)
        except HttpError as error:
            reply = error.reply()
        except OverloadError:
            waited = f"{self._gate.limits.max_wait:g} s"
            reply = HttpError(503, f"not begun within {waited}, and it will not be", RETRY).reply()
        # A mistake of ours: whoever asked is told, the log says which, and the service goes on.
        except Exception as error:
            log.exception("%s %s: answered with 500: %r", self.route.method, self.route.path, error)
            reply = HttpError(500, "internal error").reply()
        self._gate.metrics.answered(self.route.path, reply.status)
        # What is left of a body would be read to its end, however long.
        await send_reply(send, reply, close=call.body_pending)

    async def _reply(self, call: Call, receive: Receive) -> Reply:
        gate, route = self._gate, self.route
        gate.check_head(route, call)
        if route.query:
            _check_query(route, call)
        if route.body is not None:
            await call.read_body(receive, gate.limits)
        if not route.limited:
            return await self._handler(call)
        # Counted from here: who sends slowly takes nobody's place.
        gate.enter()
        try:
            return await self._handler(call)
        finally:
            gate.leave()


def _check_query(route: RouteSpec, call: Call) -> None:
    known = [one.name for one in route.query]
    unknown = [name for name in call.query if name not in known]
    if unknown:
        raise HttpError(400, f"query: expected some of {known}, was {unknown[0][:80]!r}")
