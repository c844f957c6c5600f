"""Connections to Redis as the transports need them: one answer per command, and waits that grow.

Importing this costs what importing redis costs, half a second; only who talks to Redis does.
"""

from __future__ import annotations

import random
import threading
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.exceptions import RedisClusterException, RedisError
from redis.retry import Retry

REDIS_ERRORS = (RedisError, RedisClusterException, OSError)
"""What a command may raise."""


def connect(url: str, *, timeout_s: float, cluster: bool = False) -> Any:
    """A client that repeats nothing by itself; nothing is sent yet, unless it is a cluster.

    Args: url: `redis://`, `rediss://` or `unix://`; timeout_s: for a connection and for each answer; cluster: ask the
        node at `url` which node serves which key.
    Raises: ValueError for another kind of URL; one of `REDIS_ERRORS` if no node of a cluster answers.
    """
    # A command that is repeated unseen delivers messages that nobody handles; who calls knows what to do again.
    settings: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
    }
    return RedisCluster.from_url(url, **settings) if cluster else Redis.from_url(url, **settings)


class Backoff:
    """Waits that double with each failure up to a limit, shortened by chance so that clients do not march in step."""

    def __init__(self, first_s: float, longest_s: float, seed: int | str | None = None) -> None:
        self.first_s, self.longest_s = first_s, longest_s
        self.failures = 0
        self._rng = random.Random(seed)  # noqa: S311 - spreads clients, hides nothing

    def reset(self) -> None:
        """Begin with the shortest wait again."""
        self.failures = 0

    def next_s(self) -> float:
        """The next wait, seconds."""
        longest = min(self.longest_s, self.first_s * 2.0 ** min(self.failures, 60))
        self.failures += 1
        return longest * self._rng.uniform(0.5, 1.0)

    def wait(self, stop: threading.Event) -> None:
        """Wait, but not longer than until `stop`."""
        stop.wait(self.next_s())
