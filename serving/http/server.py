"""The decision service over HTTP: Open Inference Protocol v2, decisions, commands, metrics and the operator page.

Everything that may take long runs in threads beside the event loop (`work_thread`), so health checks are answered
while a planner thinks or a disk is slow.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.engine import DecisionEngine
from serving.errors import ServingError
from serving.http.auth import LOOPBACK_HOSTS, OPERATOR_TOKEN, Tokens, check_bind, is_loopback
from serving.http.endpoint import Endpoint, Gate
from serving.http.limits import HttpLimits
from serving.http.messages import error_body
from serving.http.metrics import ServiceMetrics
from serving.http.openapi import openapi_document
from serving.http.protocol import guarded_protocol
from serving.http.routes import ROUTES
from serving.http.service import Service

__all__ = ["HttpLimits", "HttpServer", "create_app"]

log = logging.getLogger(__name__)

BACKLOG = 1024
"""Connections that wait to be accepted."""


def create_app(
    engine: DecisionEngine,
    *,
    tokens: Tokens,
    limits: HttpLimits | None = None,
    metrics: ServiceMetrics | None = None,
    allowed_hosts: Collection[str] | None = LOOPBACK_HOSTS,
) -> Starlette:
    """The service as an ASGI application; its lifespan ends its threads, the engine stays open.

    Args:
        tokens: who may call; `Tokens()` asks nobody, see `serving.http.auth.check_bind`.
        metrics: of this engine; made here when None.
        allowed_hosts: names in the Host header that are answered, against DNS rebinding; None answers all.
    """
    limits, metrics = limits or HttpLimits(), metrics or ServiceMetrics(engine)
    service, gate = Service(engine, limits, metrics), Gate(tokens, limits, metrics, allowed_hosts)
    service.document = openapi_document(ROUTES)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    app = Starlette(
        routes=[
            Route(route.path, Endpoint(route, getattr(service, route.handler), gate), methods=[route.method])
            for route in ROUTES
        ],
        exception_handlers={HTTPException: _unrouted},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


class HttpServer:
    """The application behind a listening socket; runs in the thread that calls `run`. The engine stays open."""

    def __init__(
        self,
        engine: DecisionEngine,
        host: str = "127.0.0.1",
        port: int = 8080,
        *,
        tokens: Tokens | None = None,
        limits: HttpLimits | None = None,
        metrics: ServiceMetrics | None = None,
        allowed_hosts: Collection[str] | None = None,
    ) -> None:
        """Bind.

        Args:
            port: 0 takes a free one.
            tokens: None reads them from the environment.
            allowed_hosts: names in the Host header that are answered; None means loopback names where a loopback
                address is bound, else all.

        Raises: ServingError for malformed tokens, without any on an address that other machines reach, or for a name
            that is unknown; OSError where the address cannot be bound.
        """
        self._tokens = Tokens.from_environment() if tokens is None else tokens
        check_bind(host, self._tokens)
        limits = limits or HttpLimits()
        if allowed_hosts is None and is_loopback(host):
            allowed_hosts = {*LOOPBACK_HOSTS, host}
        self._socket = _listen(host, port)
        app = create_app(engine, tokens=self._tokens, limits=limits, metrics=metrics, allowed_hosts=allowed_hosts)
        self.host, self.port = host, int(self._socket.getsockname()[1])
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=guarded_protocol(limits),
                ws="none",
                lifespan="on",
                interface="asgi3",
                access_log=False,
                log_config=None,
                # Below it tells of every malformed request, and anyone can send those.
                log_level="error",
                # Whoever asks is who the socket says, and what answers is nobody's business.
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=limits.keep_alive,
                timeout_graceful_shutdown=limits.shutdown_timeout,
            )
        )

    @property
    def url(self) -> str:
        """Address to call."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def started(self) -> bool:
        """Whether requests are answered."""
        return self._server.started

    def run(self, on_start: Callable[[str], None] | None = None) -> None:
        """Answer until `stop`, SIGTERM or SIGINT; requests under way are finished first.

        Args: on_start: told the address; whoever calls it from then on is answered.
        """
        with _signals_call(self.stop):
            log.info("%s, %s", self.url, self._access())
            if on_start is not None:
                on_start(self.url)
            self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Make `run` return; from any thread."""
        self._server.should_exit = True

    def _access(self) -> str:
        if self._tokens.required:
            return "bearer tokens required"
        return f"without tokens: whoever is on this machine may decide and halt; a reset needs {OPERATOR_TOKEN}"


# What the router itself refuses.
async def _unrouted(request: Request, error: Exception) -> Response:
    status, found = (error.status_code, error.headers) if isinstance(error, HTTPException) else (500, None)
    path = request.url.path[:80]
    text = f"path: {path!r} is not served" if status == 404 else f"{request.method} {path!r}: not allowed"
    headers = {**(found or {}), "connection": "close"}
    return Response(error_body(text), status, headers, "application/json")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ServingError(f"host: expected an address of this machine, was {host!r}: {error}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # From here on callers wait until they are answered.
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


# uvicorn listens to signals while it runs, and raises those that ended it once more for whoever listened before. What
# comes before it runs must not get lost, and what comes after must not end the process: the ledger is still open.
@contextmanager
def _signals_call(stop: Callable[[], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
