"""Budgets and tolerances of a decision engine, and where it gets its time from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from serving.canary import Canary


class Clock(NamedTuple):
    """Where time comes from; tests bring their own."""

    wall: Callable[[], float] = time.time
    """Seconds since 1970 UTC."""
    steady: Callable[[], float] = time.perf_counter
    """Seconds that never run backwards."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Budgets and tolerances of an engine."""

    inference_ms: float = 10.0
    """What the policy may take before the answer is Hold."""
    decision_ms: float = 50.0
    """What a decision may take; the planner gets what is left of it."""
    timeout_ms: float = 80.0
    """After this the answer is Hold, whatever was found."""
    planner: bool = True
    """Let the bundle's planner decide, where it has one."""
    seed: int = 0
    """Noise table of the planner."""
    bar_seconds: float = 4 * 86_400.0
    """Longest time between two bars, weekends and holidays included: the unit of `data_age`."""
    clock_tolerance_s: float = 2.0
    """How far clocks may disagree."""
    canary: Canary | None = None
    """Limits of a bundle on trial; None for one that is trusted."""

    def __post_init__(self) -> None:
        if not 0.0 < self.inference_ms <= self.decision_ms <= self.timeout_ms < math.inf:
            raise ValueError(
                "inference_ms, decision_ms, timeout_ms: expected 0 < inference <= decision <= timeout, "
                f"was {self.inference_ms:g}, {self.decision_ms:g}, {self.timeout_ms:g}"
            )
        if not 0.0 < self.bar_seconds < math.inf:
            raise ValueError(f"bar_seconds: expected > 0, was {self.bar_seconds:g}")
        if not 0.0 <= self.clock_tolerance_s < math.inf:
            raise ValueError(f"clock_tolerance_s: expected >= 0, was {self.clock_tolerance_s:g}")
