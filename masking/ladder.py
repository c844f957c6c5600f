"""Trading states and the drawdown ladder that moves between them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import array_api_compat

from masking.errors import RuleError


class TradingState(IntEnum):
    """What the risk manager allows at all; stored as a number in the state row."""

    ACTIVE = 0
    REDUCE_ONLY = 1
    HALTED = 2


class LadderState(NamedTuple):
    """Arrays [B] of floats that the ladder carries from bar to bar."""

    trading_state: Any
    """Code of `TradingState`."""
    killed: Any
    """1 after the kill switch latched, else 0."""
    flat_bars: Any
    """Consecutive bars spent flat while not ACTIVE."""


@dataclass(frozen=True, kw_only=True)
class DrawdownLadder:
    """Running drawdown -> trading state: soft REDUCE_ONLY, hard HALTED, kill HALTED and latched.

    REDUCE_ONLY ends when the drawdown falls below `soft` again. HALTED ends only by the cool-down: after
    `cooldown_bars` flat bars the caller starts a new running peak (`released`), since a flat account cannot
    recover. The kill switch is never released here; a person resets it.
    """

    soft: float = 0.08
    hard: float = 0.12
    kill: float = 0.15
    cooldown_bars: int = 20

    def __post_init__(self) -> None:
        if not 0.0 < self.soft < self.hard < self.kill < 1.0:
            raise RuleError(
                f"drawdown ladder: expected 0 < soft < hard < kill < 1, was {self.soft}, {self.hard}, {self.kill}"
            )
        if self.cooldown_bars < 1:
            raise RuleError(f"drawdown ladder: expected cooldown_bars >= 1, was {self.cooldown_bars}")

    def step(self, ladder: LadderState, drawdown: Any, position: Any) -> tuple[LadderState, Any]:
        """Advance at the close of a bar.

        Args: ladder of [B] arrays; drawdown [B], fraction of the running peak; position [B].
        Returns: next ladder, and `released` [B] bool where the running peak must start anew.
        A NaN drawdown counts as the kill level: unknown risk halts.
        """
        xp = array_api_compat.array_namespace(drawdown)
        killed = (ladder.killed > 0) | ~(drawdown < self.kill)
        halted = killed | (drawdown >= self.hard) | (ladder.trading_state >= TradingState.HALTED.value)
        reduce = drawdown >= self.soft
        code = xp.where(halted, float(TradingState.HALTED), xp.astype(reduce, drawdown.dtype))
        flat_bars = xp.where((code > 0) & (position == 0), ladder.flat_bars + 1, 0.0)
        released = (flat_bars >= self.cooldown_bars) & ~killed
        code = xp.where(released, 0.0, code)
        flat_bars = xp.where(released, 0.0, flat_bars)
        return LadderState(code, xp.astype(killed, drawdown.dtype), flat_bars), released
