"""The rules: pure batched functions of named state, written once against the array API.

A rule receives a mapping of state columns, each `[B, 1]`, plus `target_position` `[B, A]`: the position each
action leads to, so a rule judges the state *after* the trade. It returns a bool array that broadcasts to
`[B, A]`, True where the action is allowed. Comparisons are written so that NaN yields False: unknown forbids.
The same function runs on NumPy, on torch and inside exported ONNX graphs. A user's rule takes six lines::

    @register_rule("no_friday_entries")
    @dataclass(frozen=True, kw_only=True)
    class NoFridayEntries:
        fields: ClassVar[tuple[str, ...]] = ("weekday", "position")
        def __call__(self, state):
            return (state["weekday"] < 4) | is_reduction(state)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import array_api_compat

from masking.errors import RuleError
from masking.ladder import DrawdownLadder, TradingState

TOLERANCE = 1e-6
"""Slack of position comparisons, multiples of equity: float32 keeps about 6e-8."""

State = Mapping[str, Any]


class Rule(Protocol):
    """A frozen dataclass whose fields are its parameters."""

    fields: ClassVar[tuple[str, ...]]
    """State columns the rule reads; a non-finite value in any of them leaves only Hold."""

    def __call__(self, state: State) -> Any:
        """Allowed actions, broadcastable to [B, A]."""
        ...


RULES: dict[str, type[Any]] = {}
_RuleT = TypeVar("_RuleT", bound=type[Any])


def register_rule(name: str) -> Callable[[_RuleT], _RuleT]:
    """Class decorator that makes a rule loadable by name; a taken name is an error."""

    def register(cls: _RuleT) -> _RuleT:
        if name in RULES:
            raise RuleError(f"rule {name!r} is already registered by {RULES[name].__qualname__}")
        cls.name = name
        RULES[name] = cls
        return cls

    return register


def is_reduction(state: State) -> Any:
    """True [B, A] where the target is no larger than the position and on the same side of zero."""
    xp = array_api_compat.array_namespace(state["target_position"])
    target, position = state["target_position"], state["position"]
    # Comparisons, not `target * position >= 0`: 0 * inf would warn on every live decision with a broken position.
    same_side = ((target >= 0) & (position >= 0)) | ((target <= 0) & (position <= 0))
    return (xp.abs(target) <= xp.abs(position) + TOLERANCE) & same_side


@register_rule("max_exposure")
@dataclass(frozen=True, kw_only=True)
class MaxExposure:
    """|position after the trade| stays within `limit`."""

    fields: ClassVar[tuple[str, ...]] = ("position",)
    limit: float = 1.25

    def __call__(self, state: State) -> Any:
        """Allowed actions [B, A]."""
        xp = array_api_compat.array_namespace(state["target_position"])
        return xp.abs(state["target_position"]) <= self.limit + TOLERANCE


@register_rule("paper_only_leverage")
@dataclass(frozen=True, kw_only=True)
class PaperOnlyLeverage:
    """|position after the trade| above `above` needs paper mode."""

    fields: ClassVar[tuple[str, ...]] = ("position",)
    paper: bool = False
    above: float = 1.0

    def __call__(self, state: State) -> Any:
        """Allowed actions [B, A]."""
        xp = array_api_compat.array_namespace(state["target_position"])
        size = xp.abs(state["target_position"])
        return size < float("inf") if self.paper else size <= self.above + TOLERANCE


@register_rule("drawdown_ladder")
@dataclass(frozen=True, kw_only=True)
class DrawdownRule:
    """REDUCE_ONLY allows smaller positions only, HALTED nothing but Hold.

    Reads both the trading state and the drawdown itself, so that a stale trading state cannot open the gate.
    """

    fields: ClassVar[tuple[str, ...]] = ("drawdown", "trading_state", "position")
    ladder: DrawdownLadder = field(default_factory=DrawdownLadder)

    def __call__(self, state: State) -> Any:
        """Allowed actions [B, A]."""
        code, drawdown = state["trading_state"], state["drawdown"]
        active = (code < TradingState.REDUCE_ONLY.value) & (drawdown < self.ladder.soft)
        not_halted = (code < TradingState.HALTED.value) & (drawdown < self.ladder.hard)
        return not_halted & (active | is_reduction(state))


@register_rule("min_holding")
@dataclass(frozen=True, kw_only=True)
class MinHolding:
    """An open position is kept for `bars` bars; reducing in REDUCE_ONLY is exempt so that no limit traps risk."""

    fields: ClassVar[tuple[str, ...]] = ("holding_time", "position", "trading_state")
    bars: int = 3

    def __call__(self, state: State) -> Any:
        """Allowed actions [B, A]."""
        free = (state["holding_time"] >= self.bars) | (state["position"] == 0)
        return free | ((state["trading_state"] >= TradingState.REDUCE_ONLY.value) & is_reduction(state))


@register_rule("max_position_change")
@dataclass(frozen=True, kw_only=True)
class MaxPositionChange:
    """|target - position| of one decision stays within `limit`."""

    fields: ClassVar[tuple[str, ...]] = ("position",)
    limit: float = 0.6

    def __call__(self, state: State) -> Any:
        """Allowed actions [B, A]."""
        target, position, slack = state["target_position"], state["position"], self.limit + TOLERANCE
        # Two bounds, not |target - position|: inf - inf would warn on every live decision with a broken position.
        return (target <= position + slack) & (target >= position - slack)


@register_rule("volatility_breaker")
@dataclass(frozen=True, kw_only=True)
class VolatilityBreaker:
    """At or above `limit` of `volatility_20` (annualised) only smaller positions are allowed."""

    fields: ClassVar[tuple[str, ...]] = ("volatility_20", "position")
    limit: float = 0.6

    def __call__(self, state: State) -> Any:
        """Allowed actions [B, A]."""
        return (state["volatility_20"] < self.limit) | is_reduction(state)


@register_rule("stale_data")
@dataclass(frozen=True, kw_only=True)
class StaleData:
    """With the newest bar older than `max_age_bars` only Hold is allowed."""

    fields: ClassVar[tuple[str, ...]] = ("data_age",)
    max_age_bars: float = 1.0

    def __call__(self, state: State) -> Any:
        """Allowed actions [B, 1]."""
        return (state["data_age"] >= 0) & (state["data_age"] <= self.max_age_bars)


def trading_rules(
    *,
    max_exposure: float = 1.25,
    paper: bool = False,
    ladder: DrawdownLadder | None = None,
    min_holding_bars: int = 3,
    max_position_change: float = 0.6,
    max_volatility: float = 0.6,
    max_data_age_bars: float = 1.0,
) -> tuple[Rule, ...]:
    """All trading rules with the given limits, in the order in which reasons are listed."""
    return (
        StaleData(max_age_bars=max_data_age_bars),
        DrawdownRule(ladder=ladder or DrawdownLadder()),
        VolatilityBreaker(limit=max_volatility),
        MaxExposure(limit=max_exposure),
        PaperOnlyLeverage(paper=paper),
        MaxPositionChange(limit=max_position_change),
        MinHolding(bars=min_holding_bars),
    )
