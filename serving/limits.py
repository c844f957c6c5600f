"""Limits that another system keeps for an account, as the engine asks for them before every decision."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class ExternalLimits(NamedTuple):
    """What the other system allows now."""

    trading_state: int
    """Code of `masking.TradingState`; at least REDUCE_ONLY where `stale`."""
    max_position: float
    """Largest |position| that may be traded to, multiples of equity; infinity where there is no such limit."""
    stale: bool
    """Missing, malformed, or older than it may be: nothing is traded then."""
    detail: str
    """Why it is stale, in words; empty otherwise."""


class LimitsSource(Protocol):
    """Where limits come from; asked in the middle of a decision, so it answers from memory."""

    def current(self, now: float) -> ExternalLimits:
        """The limits in force. Never waits, never raises.

        Args: now: wall clock, seconds since 1970 UTC.
        """
        ...
