"""Limits that a risk system keeps in Redis, with a local copy that goes stale safely.

The risk system writes a hash, all fields in one HSET:

    HSET detent:{account}:limits trading_state ACTIVE max_position 1.0 updated_at 1767225600.5

`trading_state` is ACTIVE, REDUCE_ONLY or HALTED; `max_position` may be left out; `updated_at` is when the risk system
last vouched for it, seconds since 1970 UTC, and is to be written again well within `max_age_s`. While Redis does not
answer the copy stays in force until it is too old. A hash that is missing or malformed is stale at once.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import msgspec
from redis.exceptions import ResponseError

from masking import TradingState
from serving.limits import ExternalLimits
from serving.stream.connection import REDIS_ERRORS, Backoff, connect

log = logging.getLogger(__name__)

FIELDS = ("trading_state", "max_position", "updated_at")


class LimitsValues(NamedTuple):
    """The content of the hash."""

    trading_state: TradingState
    max_position: float
    """Multiples of equity; infinity where the hash has none."""
    updated_at: float
    """Seconds since 1970 UTC."""


class _Copy(NamedTuple):
    values: LimitsValues | None
    """As last understood."""
    trouble: str
    """Why nothing of it counts now; empty otherwise."""


class RedisLimits:
    """A `LimitsSource` that a thread keeps up to date; `current` answers from memory."""

    def __init__(
        self,
        redis_url: str,
        key: str,
        max_age_s: float,
        *,
        poll_s: float = 0.25,
        timeout_s: float = 2.0,
        clock_tolerance_s: float = 1.0,
        cluster: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Not started yet: everything is stale until `start` or `refresh`.

        Args: key: of the hash; max_age_s: how old `updated_at` may be; poll_s: between two readings;
            clock_tolerance_s: how far `updated_at` may lie in the future.
        Raises: ValueError where a time is not positive.
        """
        for name, value in {"max_age_s": max_age_s, "poll_s": poll_s, "timeout_s": timeout_s}.items():
            if not 0.0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number of seconds, was {value}")
        self.key, self.max_age_s = key, max_age_s
        self._url, self._cluster = redis_url, cluster
        self._poll_s, self._timeout_s, self._tolerance_s, self._clock = poll_s, timeout_s, clock_tolerance_s, clock
        self._copy = _Copy(None, f"{key}: not read yet")
        self._unreachable = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Read in a thread from now on; twice does nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="limits", daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        """End the thread; twice does nothing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def current(self, now: float) -> ExternalLimits:
        """The limits in force; see `LimitsSource`."""
        values, trouble = self._copy
        if not trouble and values is not None:
            age = now - values.updated_at
            if -self._tolerance_s <= age <= self.max_age_s:
                return ExternalLimits(values.trading_state.value, values.max_position, stale=False, detail="")
            trouble = f"{self.key}: updated_at: expected at most {self.max_age_s:g} s old, was {age:.1f} s"
        # Nothing may be opened on limits that nobody vouches for, and what was halted stays so.
        known = TradingState.ACTIVE if values is None else values.trading_state
        state = max(known.value, TradingState.REDUCE_ONLY.value)
        maximum = math.inf if values is None else values.max_position
        unreachable = f"; {self._unreachable}" if self._unreachable else ""
        return ExternalLimits(state, maximum, stale=True, detail=trouble + unreachable)

    def refresh(self) -> None:
        """Read once, now. Raises: one of `REDIS_ERRORS` if Redis does not answer."""
        client = connect(self._url, timeout_s=self._timeout_s, cluster=self._cluster)
        try:
            self._read(client)
        finally:
            client.close()

    def _read(self, client: Any) -> None:
        before = self._copy.values
        try:
            values = parse_limits(client.hgetall(self.key))
        except (ValueError, ResponseError) as error:
            self._copy = _Copy(before, f"{self.key}: {error}")
        else:
            # A server that lost its last second may not take back what was halted in it.
            if before is None or not values.updated_at < before.updated_at <= self._clock() + self._tolerance_s:
                before = values
            self._copy = _Copy(before, "")
        self._unreachable = ""

    def _run(self) -> None:
        backoff = Backoff(self._poll_s, max(self._poll_s, 2.0))
        client = None
        while not self._stop.is_set():
            try:
                if client is None:
                    client = connect(self._url, timeout_s=self._timeout_s, cluster=self._cluster)
                self._read(client)
            except REDIS_ERRORS as error:
                self._unreachable = f"Redis does not answer: {error}"
                log.warning("limits %s: %s", self.key, self._unreachable)
                backoff.wait(self._stop)
            else:
                backoff.reset()
                self._stop.wait(self._poll_s)
        if client is not None:
            client.close()


def parse_limits(fields: Mapping[bytes, bytes]) -> LimitsValues:
    """The content of the hash, as Redis gives it. Raises: ValueError with the field."""
    if not fields:
        raise ValueError("expected a hash, there is none")
    unknown = sorted(name.decode(errors="replace") for name in fields if name.decode(errors="replace") not in FIELDS)
    if unknown:
        # A limit whose name is misspelt would silently not be one.
        raise ValueError(f"expected the fields {', '.join(FIELDS)}, was also {', '.join(unknown)[:200]}")
    state = fields.get(b"trading_state", b"").decode(errors="replace")
    if state not in TradingState.__members__:
        raise ValueError(f"trading_state: expected {', '.join(TradingState.__members__)}, was {state[:50]!r}")
    maximum = math.inf
    if b"max_position" in fields:
        maximum = _number(fields, b"max_position")
        if maximum <= 0.0:
            raise ValueError(f"max_position: expected a positive number, was {maximum:g}")
    return LimitsValues(TradingState[state], maximum, _number(fields, b"updated_at"))


# As JSON writes numbers: `float` would also read "1_0" and "nan".
def _number(fields: Mapping[bytes, bytes], name: bytes) -> float:
    raw = fields.get(name, b"")
    try:
        value: float = msgspec.json.decode(raw, type=float)
    except msgspec.DecodeError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name.decode()}: expected a finite number, was {raw.decode(errors='replace')[:50]!r}")
    return value
