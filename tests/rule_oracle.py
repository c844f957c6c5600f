"""The trading rules once more, one state and one target at a time, in plain Python: what a test holds against them.

Shares nothing with `masking`. Numbers are compared exactly, positions with a slack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SLACK = 1.2e-6
"""Multiples of equity: a millionth that the rules allow, and what float32 rounds."""


@dataclass(frozen=True, kw_only=True)
class RuleOracle:
    """Limits as numbers."""

    soft: float = 0.08
    hard: float = 0.12
    volatility: float = 0.6
    exposure: float = 1.25
    unleveraged: float = math.inf
    """Largest |position|, where leverage is for paper trading only."""
    change: float = 0.6
    bars: int = 3
    age: float = 1.0

    def broken(
        self,
        target: float,
        *,
        position: float,
        drawdown: float,
        trading_state: float,
        holding_time: float,
        volatility_20: float,
        data_age: float,
    ) -> list[str]:
        """Names of the rules that trading to `target` would break; none for one that is allowed."""
        if not all(map(math.isfinite, (position, drawdown, trading_state, holding_time, volatility_20, data_age))):
            return ["non_finite"]
        shrinks = min(position, 0.0) - SLACK <= target <= max(position, 0.0) + SLACK
        exempt = trading_state >= 1.0 and shrinks
        broken = []
        if not 0.0 <= data_age <= self.age:
            broken.append("stale_data")
        halted, reduces = drawdown >= self.hard or trading_state >= 2.0, drawdown >= self.soft or trading_state >= 1.0
        if halted or (reduces and not shrinks):
            broken.append("drawdown_ladder")
        if volatility_20 >= self.volatility and not shrinks:
            broken.append("volatility_breaker")
        if abs(target) > self.exposure + SLACK:
            broken.append("max_exposure")
        if abs(target) > self.unleveraged + SLACK:
            broken.append("paper_only_leverage")
        if abs(target - position) > self.change + SLACK and not exempt:
            broken.append("max_position_change")
        if holding_time < self.bars and position != 0.0 and not exempt:
            broken.append("min_holding")
        return broken
