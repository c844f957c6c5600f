"""How much one caller may ask of the HTTP server, and for how long."""

from __future__ import annotations

from dataclasses import dataclass, fields

from serving.errors import ServingError


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """Every number is positive."""

    max_body: int = 1 << 20
    """Bytes of a request's body; more is 413."""
    max_head: int = 32 << 10
    """Bytes of request line and headers; more is 431."""
    max_batch: int = 1024
    """Rows of one inference by the policy."""
    max_planner_batch: int = 32
    """Rows of one inference by the planner, which takes a thousand times as long."""
    max_concurrency: int = 64
    """Requests that wait for an answer at once; more is 503. Health and commands are not counted."""
    max_connections: int = 512
    """Open connections; more is 503."""
    max_wait: float = 1.0
    """Seconds until an answer is begun; longer is 503, and then nothing was decided."""
    head_timeout: float = 5.0
    """Seconds for request line and headers; longer is 408."""
    body_timeout: float = 5.0
    """Seconds for the body; longer is 408."""
    keep_alive: int = 75
    """Seconds that a connection may rest between two requests."""
    shutdown_timeout: int = 10
    """Seconds that requests under way get to finish when the server stops."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ServingError(f"{field.name}: expected a positive number, was {value!r}")
