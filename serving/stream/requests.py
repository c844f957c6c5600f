"""Messages of the feature stream: what can be read of them, and the names of those that cannot."""

from __future__ import annotations

import hashlib

import msgspec

from serving.records import MAX_EVENT_ID, DecisionRequest, decode_request, is_event_id

REQUEST_FIELD = b"request"
"""Field of a message: JSON of a `DecisionRequest`."""


def parse_request(body: bytes | None, max_bytes: int) -> DecisionRequest:
    """The request in a message.

    Args: body: content of the field; None where there is no such field.
    Raises: ValueError with the reason in words.
    """
    if body is None:
        raise ValueError(f"message: expected a field {REQUEST_FIELD.decode()!r}, was none")
    if len(body) > max_bytes:
        raise ValueError(f"request: expected at most {max_bytes} bytes, was {len(body)}")
    try:
        request = decode_request(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ValueError(f"request: {error}") from error
    if not is_event_id(request.event_id):
        raise ValueError(f"event_id: expected 1 to {MAX_EVENT_ID} printable characters, was others")
    return request


def event_name(message_id: bytes, body: bytes | None) -> str:
    """The event of a request that is refused, if that much can be read; else a name of message and content."""
    try:
        name = msgspec.json.decode(body or b"", type=_Named).event_id
    except (msgspec.MsgspecError, ValueError, RecursionError):
        name = ""
    if is_event_id(name):
        return name
    return f"unreadable:{message_id.decode()}:{hashlib.sha256(body or b'').hexdigest()[:16]}"


class _Named(msgspec.Struct, frozen=True):
    event_id: str
