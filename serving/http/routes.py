"""The one table of routes: what is served, to whom, and in which form. Server and OpenAPI document are made from it."""

from __future__ import annotations

from typing import Any, NamedTuple

from serving.http.auth import Role
from serving.http.inference import InferenceRequest, InferenceResponse
from serving.http.models import ModelMetadata
from serving.http.service import (
    MAX_RECENT,
    CommandRequest,
    Liveness,
    ModelReadiness,
    Readiness,
    ServerMetadata,
)
from serving.http.state import ServiceState
from serving.records import ControlRecord, DecisionRecord, DecisionRequest


class QueryParameter(NamedTuple):
    """A parameter of the URL."""

    name: str
    schema: dict[str, Any]
    text: str


class RouteSpec(NamedTuple):
    """One route."""

    method: str
    path: str
    """Parts in braces are parameters."""
    handler: str
    """Name of the method of `Service`."""
    role: Role
    """Who may call it."""
    summary: str
    reply: Any
    """Type of the answer, or its media type where it is no JSON."""
    body: Any = None
    """Type of the request's body."""
    query: tuple[QueryParameter, ...] = ()
    changes: bool = False
    """Whether trading may change: such calls must be sent as JSON, which no foreign page can do unasked."""
    limited: bool = True
    """Whether it counts for the limit of requests at once."""
    known_caller: bool = False
    """Whether it is refused where there are no tokens to know callers by."""


_MODEL = "/v2/models/{model}"
_VERSION = _MODEL + "/versions/{version}"
_EXPLAIN = QueryParameter("explain", {"type": "boolean", "default": False}, "Add `explanation`: sentences.")
_LIMIT = QueryParameter(
    "limit", {"type": "integer", "minimum": 1, "maximum": MAX_RECENT, "default": 20}, "How many, newest first."
)


def _command(name: str, summary: str, *, known_caller: bool = False) -> RouteSpec:
    return RouteSpec(
        "POST",
        f"/{name}",
        name,
        Role.OPERATOR,
        summary,
        ControlRecord,
        CommandRequest,
        changes=True,
        limited=False,
        known_caller=known_caller,
    )


ROUTES = (
    RouteSpec(
        "POST",
        "/decide",
        "decide",
        Role.DECIDE,
        "Decide on an event; the same event gets the same decision again.",
        DecisionRecord,
        DecisionRequest,
        query=(_EXPLAIN,),
        changes=True,
    ),
    *(
        RouteSpec(
            "POST",
            f"{path}/infer",
            "infer",
            Role.READ,
            "Stateless inference: nothing is recorded, no order comes of it.",
            InferenceResponse,
            InferenceRequest,
        )
        for path in (_MODEL, _VERSION)
    ),
    RouteSpec("GET", "/v2/health/live", "live", Role.PUBLIC, "The process answers.", Liveness, limited=False),
    RouteSpec("GET", "/v2/health/ready", "ready", Role.PUBLIC, "A bundle is in force.", Readiness, limited=False),
    RouteSpec("GET", "/v2", "server", Role.READ, "The server.", ServerMetadata),
    *(
        route
        for path in (_MODEL, _VERSION)
        for route in (
            RouteSpec("GET", path, "model", Role.READ, "A model: `policy`, or `planner`.", ModelMetadata),
            RouteSpec("GET", f"{path}/ready", "model_ready", Role.READ, "The model can be asked.", ModelReadiness),
        )
    ),
    RouteSpec("GET", "/state", "state", Role.READ, "Trading state, bundles, ledger, latency, drift.", ServiceState),
    RouteSpec(
        "GET", "/decisions", "decisions", Role.READ, "The newest decisions.", list[DecisionRecord], query=(_LIMIT,)
    ),
    RouteSpec("GET", "/metrics", "prometheus", Role.READ, "Metrics for Prometheus.", "text/plain"),
    _command("kill", "Halt trading and latch: an open position is closed at the next decision."),
    _command("reduce_only", "Allow nothing but smaller positions until a reset."),
    _command("reset", "Trade again; the running peak starts anew. Refused without tokens.", known_caller=True),
    RouteSpec("GET", "/openapi.json", "openapi", Role.PUBLIC, "This document.", dict[str, Any], limited=False),
    RouteSpec("GET", "/", "page", Role.PUBLIC, "The operator page.", "text/html", limited=False),
    RouteSpec("GET", "/app.js", "script", Role.PUBLIC, "Script of the page.", "text/javascript", limited=False),
    RouteSpec("GET", "/style.css", "style", Role.PUBLIC, "Style of the page.", "text/css", limited=False),
)
