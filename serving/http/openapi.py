"""The OpenAPI 3.1 document, made from the table of routes and the types of its messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from serving.http.auth import Role
from serving.http.models import PLANNER, POLICY, SHORT_VERSION
from serving.http.routes import RouteSpec
from serving.http.state import detent_version
from serving.records import DecisionRecord

_PARAMETER = re.compile(r"{(\w+)}")
_PATH_SCHEMAS = {
    "model": {"type": "string", "enum": [POLICY, PLANNER]},
    "version": {
        "type": "string",
        "pattern": f"^([0-9a-f]{{{SHORT_VERSION}}}|[0-9a-f]{{64}})$",
        "description": f"Hash of a bundle, or its first {SHORT_VERSION} characters.",
    },
}
_TEXTS = {
    400: "Malformed, or not what is taken",
    401: "No token, or an unknown one",
    403: "The token's role may not do this, or another site's page asked",
    404: "Unknown model or version",
    408: "The body came too slowly",
    413: "The body is too long",
    415: "Not sent as application/json, or compressed",
    503: "Too much to do, or the ledger cannot be written",
}
_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "string"}},
    "required": ["error"],
    "additionalProperties": False,
}
_BINARY = {
    "schema": {"type": "string", "contentMediaType": "application/octet-stream"},
}
"""The JSON part, then tensors; the header `Inference-Header-Content-Length` says where they begin."""


def openapi_document(routes: Sequence[RouteSpec]) -> bytes:
    """The document as JSON."""
    types = [kind for route in routes for kind in (route.body, route.reply) if _is_message(kind)]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    by_type = dict(zip(map(repr, types), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, by_type)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "detent",
            "version": detent_version(),
            "description": "Decisions that cannot do the forbidden thing, and the Open Inference Protocol, version 2.",
        },
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }
    return msgspec.json.encode(document)


def _is_message(kind: Any) -> bool:
    return kind is not None and not isinstance(kind, str)


def _operation(route: RouteSpec, by_type: dict[str, Any]) -> dict[str, Any]:
    path = [
        {"name": name, "in": "path", "required": True, "schema": _PATH_SCHEMAS[name]}
        for name in _PARAMETER.findall(route.path)
    ]
    query = [{"name": one.name, "in": "query", "schema": one.schema, "description": one.text} for one in route.query]
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{route.method}{route.path}").strip("_").lower(),
        "summary": route.summary,
        "parameters": [*path, *query],
        "responses": {
            "200": {"description": "Answered", "content": _reply(route, by_type)},
            **{str(status): _error(status) for status in _statuses(route, bool(path))},
        },
        "x-role": route.role.name.lower(),
    }
    if route.role > Role.PUBLIC:
        operation["security"] = [{"bearer": []}]
    if route.body is not None:
        content = {"application/json": {"schema": by_type[repr(route.body)]}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _reply(route: RouteSpec, by_type: dict[str, Any]) -> dict[str, Any]:
    if isinstance(route.reply, str):
        return {route.reply: {"schema": {"type": "string"}}}
    schema = by_type[repr(route.reply)]
    if route.reply is DecisionRecord:
        sentences = {"type": "array", "items": {"type": "string"}}
        schema = {"allOf": [schema, {"type": "object", "properties": {"explanation": sentences}}]}
    content = {"application/json": {"schema": schema}}
    if route.handler == "infer":
        content["application/octet-stream"] = _BINARY
    return content


def _statuses(route: RouteSpec, has_parameters: bool) -> list[int]:
    found = [400]
    if route.role > Role.PUBLIC:
        found += [401, 403]
    if has_parameters:
        found.append(404)
    if route.body is not None:
        found += [403, 408, 413, 415]
    if route.role > Role.PUBLIC:
        found.append(503)
    return sorted(set(found))


def _error(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"description": _TEXTS[status], "content": content}
