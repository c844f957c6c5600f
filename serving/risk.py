"""The risk manager: moves the trading state, and checks every action once more before it may become an order.

It knows nothing of policies. The ladder is that of the bundle's rules and is stepped as the account step of training
steps it, once per bar; between bars a deeper drawdown may only tighten it.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import msgspec
import numpy as np

from masking import DrawdownLadder, LadderState, RuleSet, TradingState
from masking.rules import DrawdownRule
from serving.errors import ControlError
from serving.records import RiskState


class RiskManager:
    """Pure functions of `RiskState`; who calls keeps the state."""

    def __init__(self, rule_set: RuleSet) -> None:
        ladders = [rule.ladder for rule in rule_set.rules if isinstance(rule, DrawdownRule)]
        self.ladder = ladders[0] if ladders else DrawdownLadder()

    def observe(self, state: RiskState, *, equity: float, position: float, bar_time: float) -> RiskState:
        """The state at a close.

        Args: equity: money, finite; position: multiples of equity, finite; bar_time: of the newest bar, seconds.
        """
        peak = max(state.peak, equity)
        # An account without money is as deep as it gets.
        drawdown = 1.0 - equity / peak if equity > 0.0 else 1.0
        # Numbers, not arrays of one, which take longer.
        before = LadderState(*map(np.float64, _ladder_values(state)))
        after, released = self.ladder.step(before, np.float64(drawdown), np.float64(position))
        if bar_time == state.bar_time:
            # Bars are counted once, and nothing is released in the middle of one.
            code = max(state.ladder_state, self._code(drawdown))
            after, released = after._replace(trading_state=code, flat_bars=state.flat_bars), False
        rung = sum(drawdown >= level for level in (self.ladder.soft, self.ladder.hard, self.ladder.kill))
        event = 0 if released else max(state.last_risk_event, rung)
        return _joined(
            msgspec.structs.replace(
                state,
                ladder_state=int(after.trading_state),
                killed=bool(after.killed),
                flat_bars=float(after.flat_bars),
                last_risk_event=event,
                peak=equity if released else peak,
                equity=equity,
                position=position,
                bar_time=bar_time,
            )
        )

    def _code(self, drawdown: float) -> int:
        if drawdown >= self.ladder.hard:
            return TradingState.HALTED.value
        return TradingState.REDUCE_ONLY.value if drawdown >= self.ladder.soft else TradingState.ACTIVE.value


def kill(state: RiskState) -> RiskState:
    """HALTED and latched."""
    return _joined(msgspec.structs.replace(state, killed=True, manual_state=TradingState.HALTED.value))


def reduce_only(state: RiskState) -> RiskState:
    """At least REDUCE_ONLY until a reset."""
    code = max(state.manual_state, TradingState.REDUCE_ONLY.value)
    return _joined(msgspec.structs.replace(state, manual_state=code))


def reset(state: RiskState, now: float) -> RiskState:
    """ACTIVE; the running peak starts anew at the newest equity.

    Args: now: wall clock. What was decided on a clock that was ahead of it holds up nothing any more.
    """
    fresh = RiskState(
        equity=state.equity,
        peak=state.equity,
        position=state.position,
        bar_time=min(state.bar_time, now),
        decided_at=min(state.decided_at, now),
    )
    return _joined(fresh)


def check_command(person: str, reason: str) -> None:
    """Raise ControlError unless somebody answers for a command."""
    for name, text in {"person": person, "reason": reason}.items():
        if not isinstance(text, str) or not text.strip():
            raise ControlError(f"{name}: expected a text that is not empty, was {text!r}")


def is_finite(value: float | None) -> TypeGuard[float]:
    """Whether a number is there and finite."""
    return value is not None and math.isfinite(value)


def _ladder_values(state: RiskState) -> tuple[float, float, float]:
    return float(state.ladder_state), float(state.killed), state.flat_bars


def _joined(state: RiskState) -> RiskState:
    code = max(state.ladder_state, state.manual_state, TradingState.HALTED.value if state.killed else 0)
    return msgspec.structs.replace(state, trading_state=code)
