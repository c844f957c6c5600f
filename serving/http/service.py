"""What the HTTP server does for each route; how requests get here and answers back is not its business."""

from __future__ import annotations

import importlib.resources
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, TypeVar

import msgspec

from serving.engine import DecisionEngine
from serving.errors import ControlError, LedgerError
from serving.http.explanation import explain
from serving.http.inference import EXTENSIONS, HEADER_LENGTH, InferenceRequestError
from serving.http.limits import HttpLimits
from serving.http.messages import Call, HttpError, Reply
from serving.http.metrics import MEDIA_TYPE, ServiceMetrics
from serving.http.models import POLICY, Models, UnknownModelError
from serving.http.state import detent_version, service_state
from serving.http.work_thread import WorkThread
from serving.records import ControlRecord, DecisionRequest, decode_request, encode

T = TypeVar("T")

MAX_RECENT = 100
"""Decisions that `/decisions` knows."""
SHORT_BODY = 1 << 14
"""Bytes of an inference that holds few enough rows for the policy to answer at once, a hundred or so."""
PAGE_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; base-uri 'none'; "
    b"form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_DIGITS = re.compile(r"[0-9]{1,9}")


class CommandRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A command to the risk manager."""

    person: Annotated[str, msgspec.Meta(min_length=1, max_length=100, pattern=r"\S")]
    """Who answers for it."""
    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=500, pattern=r"\S")]
    """Why."""


class Liveness(msgspec.Struct, frozen=True):
    """The process answers."""

    live: bool = True


class Readiness(msgspec.Struct, frozen=True):
    """A bundle is in force."""

    ready: bool = True


class ModelReadiness(msgspec.Struct, frozen=True):
    """A model can be asked."""

    name: str
    ready: bool = True


class ServerMetadata(msgspec.Struct, frozen=True):
    """The server as the Open Inference Protocol describes it."""

    name: str
    version: str
    extensions: list[str]


class Service:
    """One method per route, each from a call to a reply; errors are `HttpError`."""

    def __init__(self, engine: DecisionEngine, limits: HttpLimits, metrics: ServiceMetrics) -> None:
        self.engine, self.limits, self.metrics = engine, limits, metrics
        self.models = Models(engine, limits)
        self.document = b"{}"
        self.started_at = time.time()
        # Apart, so that a command waits for no query, a decision for no inference, and health for none of them.
        self._decisions = WorkThread("decisions", limits.max_wait)
        self._inferences = WorkThread("inferences", limits.max_wait)
        self._commands = WorkThread("commands", limits.max_wait)
        # A kill waits behind no other command: those may wait for a ledger.
        self._kills = WorkThread("kills", limits.max_wait)
        self._queries = WorkThread("queries", limits.max_wait)
        folder = importlib.resources.files("serving.http.page")
        self._page = {name: folder.joinpath(name).read_bytes() for name in ("index.html", "app.js", "style.css")}

    def close(self) -> None:
        """End the threads."""
        for thread in (self._decisions, self._inferences, self._commands, self._kills, self._queries):
            thread.close()

    # --- decisions ----------------------------------------------------------------------------------------

    async def decide(self, call: Call) -> Reply:
        """Decide on an event."""
        wordy = _flag(call, "explain")
        request = _decoded(decode_request, call.body)
        return Reply(await self._decisions.run(self._decide, request, call.body, wordy))

    def _decide(self, request: DecisionRequest, body: bytes, wordy: bool) -> bytes:
        record = self.engine.decide(request, body=body)
        text = encode(record)
        if not wordy:
            return text
        challenger = self.engine.challenger
        sentences = explain(record, [self.engine.bundle, *([] if challenger is None else [challenger])])
        return text[:-1] + b',"explanation":' + msgspec.json.encode(sentences) + b"}"

    async def decisions(self, call: Call) -> Reply:
        """The newest decisions."""
        limit = _number(call, "limit", 20, MAX_RECENT)
        return Reply(await self._queries.run(self._recent, limit))

    def _recent(self, limit: int) -> bytes:
        return b"[" + b",".join(encode(record) for record in self.engine.recent[:limit]) + b"]"

    # --- commands -----------------------------------------------------------------------------------------

    async def kill(self, call: Call) -> Reply:
        """Halt and latch."""
        return await self._command(self.engine.kill, call, self._kills)

    async def reduce_only(self, call: Call) -> Reply:
        """Only smaller positions."""
        return await self._command(self.engine.reduce_only, call, self._commands)

    async def reset(self, call: Call) -> Reply:
        """Back to ACTIVE."""
        return await self._command(self.engine.reset, call, self._commands)

    async def _command(self, command: Callable[[str, str], ControlRecord], call: Call, thread: WorkThread) -> Reply:
        request = _decoded(_COMMANDS.decode, call.body)
        try:
            return Reply(encode(await thread.run(command, request.person, request.reason)))
        except ControlError as error:
            raise HttpError(400, str(error)) from error
        except LedgerError as error:
            raise HttpError(503, f"the command could not be recorded: {error}") from error

    # --- what is seen -------------------------------------------------------------------------------------

    async def state(self, _: Call) -> Reply:
        """Everything at a glance."""
        found = await self._queries.run(service_state, self.engine, self.metrics, self.started_at)
        return Reply(msgspec.json.encode(found))

    async def prometheus(self, _: Call) -> Reply:
        """Metrics."""
        return Reply(await self._queries.run(self.metrics.text), media_type=MEDIA_TYPE)

    async def openapi(self, _: Call) -> Reply:
        """The OpenAPI document."""
        return Reply(self.document)

    async def page(self, _: Call) -> Reply:
        """The operator page."""
        policy = ((b"content-security-policy", PAGE_POLICY),)
        return Reply(self._page["index.html"], media_type=b"text/html; charset=utf-8", headers=policy)

    async def script(self, _: Call) -> Reply:
        """Script of the page."""
        return Reply(self._page["app.js"], media_type=b"text/javascript; charset=utf-8")

    async def style(self, _: Call) -> Reply:
        """Style of the page."""
        return Reply(self._page["style.css"], media_type=b"text/css; charset=utf-8")

    # --- Open Inference Protocol --------------------------------------------------------------------------

    async def server(self, _: Call) -> Reply:
        """The server described."""
        return Reply(msgspec.json.encode(ServerMetadata("detent", detent_version(), list(EXTENSIONS))))

    async def live(self, _: Call) -> Reply:
        """The event loop turns."""
        return Reply(b'{"live":true}')

    async def ready(self, _: Call) -> Reply:
        """A bundle is in force: without one there is no engine, and no server."""
        return Reply(b'{"ready":true}')

    async def model(self, call: Call) -> Reply:
        """A model described."""
        with _unknown_is_404():
            return Reply(msgspec.json.encode(self.models.metadata(*_named(call))))

    async def model_ready(self, call: Call) -> Reply:
        """Whether a model can be asked."""
        with _unknown_is_404():
            return Reply(msgspec.json.encode(ModelReadiness(self.models.find(*_named(call)).name)))

    async def infer(self, call: Call) -> Reply:
        """Stateless inference."""
        with _unknown_is_404():
            model = self.models.find(*_named(call))
        arguments = call.body, call.headers.get(HEADER_LENGTH), self.metrics.inferred
        try:
            # What takes less time than handing it over is not handed over.
            if model.name == POLICY and len(call.body) <= SHORT_BODY:
                body, header_length = model.infer(*arguments)
            else:
                body, header_length = await self._inferences.run(model.infer, *arguments)
        except InferenceRequestError as error:
            raise HttpError(400, str(error)) from error
        if header_length is None:
            return Reply(body)
        length = ((HEADER_LENGTH, str(header_length).encode("ascii")),)
        return Reply(body, media_type=b"application/octet-stream", headers=length)


_COMMANDS = msgspec.json.Decoder(CommandRequest)


def _decoded(decode: Callable[[bytes], T], body: bytes) -> T:
    try:
        return decode(body)
    # Deep nesting and broken UTF-8 come as errors of their own.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise HttpError(400, f"body: {error}") from error


def _named(call: Call) -> tuple[str, str | None]:
    return call.path_params["model"], call.path_params.get("version")


def _flag(call: Call, name: str) -> bool:
    text = call.query.get(name, "false")
    if text not in ("true", "false"):
        raise HttpError(400, f"{name}: expected true or false, was {text[:40]!r}")
    return text == "true"


def _number(call: Call, name: str, default: int, largest: int) -> int:
    text = call.query.get(name, str(default))
    if not _DIGITS.fullmatch(text) or not 1 <= int(text) <= largest:
        raise HttpError(400, f"{name}: expected 1 to {largest}, was {text[:40]!r}")
    return int(text)


@contextmanager
def _unknown_is_404() -> Iterator[None]:
    try:
        yield
    except UnknownModelError as error:
        raise HttpError(404, str(error)) from error
