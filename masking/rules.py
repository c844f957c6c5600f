"""The rules: pure batched functions of named state, written once against the array API.

A rule receives a mapping of state columns, each `[B, 1]`, plus `target_position` `[B, A]`: the position each
action leads to, so a rule judges the state *after* the trade. It returns a bool array `[B, 1]` or `[B, A]`, True
where the action is allowed. Comparisons are written so that NaN yields False: unknown forbids. The same function
runs on NumPy, on torch and inside exported ONNX graphs. A user's rule takes six lines::

    @register_rule("no_friday_entries")
    @dataclass(frozen=True, kw_only=True)
    class NoFridayEntries:
        fields: ClassVar[tuple[str, ...]] = ("weekday", "position")
        def __call__(self, state):
            return (state["weekday"] < 4) | is_reduction(state)

Operators and `abs` suffice for most rules; others find their functions with `array_api_compat.array_namespace`.
A rule may have a method `reason(observed) -> str`: why it denied, in words. `observed` holds one number per field and
`target_position`. Without it a denial lists parameters and observed values.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar

from masking.actions import namespace
from masking.errors import RuleError
from masking.ladder import DrawdownLadder, TradingState
from masking.parameters import check_parameters, check_rule_class, parameter

TOLERANCE = 1e-6
"""Slack of position comparisons, multiples of equity: float32 keeps about 6e-8."""

State = Mapping[str, Any]
Observed = Mapping[str, float]


class Rule(Protocol):
    """A frozen dataclass whose fields are its parameters: bool, int, float, str, tuples of them, or | None."""

    fields: ClassVar[tuple[str, ...]]
    """State columns the rule reads; a non-finite value in any of them leaves only Hold."""

    def __call__(self, state: State) -> Any:
        """Allowed actions, bool [B, 1] or [B, A]."""
        ...


RULES: dict[str, type[Any]] = {}
_RuleT = TypeVar("_RuleT", bound=type[Any])


def register_rule(name: str) -> Callable[[_RuleT], _RuleT]:
    """Class decorator, above `@dataclass(frozen=True)`, that makes a rule loadable by name.

    Defined again, by a notebook cell or a reload, a class replaces its earlier self.
    Raises: RuleError for no name, a name that another class has, or a class that is no frozen dataclass.
    """
    if not isinstance(name, str) or not name:
        raise RuleError(f'register_rule: expected a name, was {name!r}; use @register_rule("name")')

    def register(cls: _RuleT) -> _RuleT:
        known = RULES.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            twice = known.__qualname__ == cls.__qualname__ and _file(known) == _file(cls)
            advice = "import the module under one name" if twice else "choose another name"
            raise RuleError(f"rule {name!r} is already registered by {_home(known)}, now by {_home(cls)}; {advice}")
        check_rule_class(cls)
        cls.name = name
        RULES[name] = cls
        return cls

    return register


def _file(cls: type[Any]) -> str | None:
    return getattr(sys.modules.get(cls.__module__), "__file__", None)


def _home(cls: type[Any]) -> str:
    file = _file(cls)
    return f"{cls.__module__}.{cls.__qualname__}" + (f" ({file})" if file else "")


class StateView(Mapping[str, Any]):
    """What the rules of a set see of one batch: read-only columns, and arrays that several rules derive from them."""

    __slots__ = ("_columns", "_derived")

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self._columns = columns
        self._derived: dict[Callable[[State], Any], Any] = {}

    def __getitem__(self, name: str) -> Any:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def derived(self, function: Callable[[State], Any]) -> Any:
        """`function(state)`, computed once for all rules."""
        if function not in self._derived:
            self._derived[function] = function(self)
        return self._derived[function]


def shared(function: Callable[[State], Any]) -> Callable[[State], Any]:
    """Decorator for a function of state that several rules call: a rule set computes it once per batch."""

    def once(state: State) -> Any:
        return state.derived(function) if isinstance(state, StateView) else function(state)

    once.__doc__ = function.__doc__
    return once


@shared
def is_reduction(state: State) -> Any:
    """True [B, A] where the target lies between zero and the position, within `TOLERANCE`."""
    target, position = state["target_position"], state["position"]
    xp = namespace(position)
    # Two bounds per row, not signs and sizes per action: fewer operations, and no 0 * inf or inf - inf, which would
    # warn on every live decision with a broken position.
    ceiling, floor = xp.maximum(position, 0.0) + TOLERANCE, xp.minimum(position, 0.0) - TOLERANCE
    return (target <= ceiling) & (target >= floor)


@shared
def is_exempt(state: State) -> Any:
    """True [B, A] for a reduction while trading is not ACTIVE: no limit on trading may trap risk."""
    return (state["trading_state"] >= TradingState.REDUCE_ONLY.value) & is_reduction(state)


@shared
def size_after(state: State) -> Any:
    """|position after the trade| [B, A]."""
    return abs(state["target_position"])


@register_rule("max_exposure")
@dataclass(frozen=True, kw_only=True)
class MaxExposure:
    """|position after the trade| stays within `limit`."""

    fields: ClassVar[tuple[str, ...]] = ("position",)
    limit: float = parameter(1.25, above=0.0)

    def __post_init__(self) -> None:
        check_parameters(self)

    def __call__(self, state: State) -> Any:
        """Allowed actions [B, A]."""
        return size_after(state) <= self.limit + TOLERANCE

    def reason(self, observed: Observed) -> str:
        """Why, in words."""
        return f"|position after the trade| {_size(observed)} would exceed the limit {self.limit:g}"


@register_rule("paper_only_leverage")
@dataclass(frozen=True, kw_only=True)
class PaperOnlyLeverage:
    """|position after the trade| above `above` needs paper mode."""

    fields: ClassVar[tuple[str, ...]] = ("position",)
    paper: bool = False
    above: float = parameter(1.0, above=0.0)

    def __post_init__(self) -> None:
        check_parameters(self)

    def __call__(self, state: State) -> Any:
        """Allowed actions [B, A]."""
        size = size_after(state)
        return size < float("inf") if self.paper else size <= self.above + TOLERANCE

    def reason(self, observed: Observed) -> str:
        """Why, in words."""
        return f"|position after the trade| {_size(observed)} would exceed the limit {self.above:g} outside paper mode"


@register_rule("drawdown_ladder")
@dataclass(frozen=True, kw_only=True)
class DrawdownRule:
    """REDUCE_ONLY allows smaller positions only, HALTED nothing but Hold.

    Reads both the trading state and the drawdown itself, so that a stale trading state cannot open the gate.
    """

    fields: ClassVar[tuple[str, ...]] = ("drawdown", "trading_state", "position")
    soft: float = DrawdownLadder.soft
    hard: float = DrawdownLadder.hard
    kill: float = DrawdownLadder.kill
    cooldown_bars: int = DrawdownLadder.cooldown_bars

    def __post_init__(self) -> None:
        check_parameters(self)
        _ = self.ladder  # raises unless the levels ascend

    @classmethod
    def of(cls, ladder: DrawdownLadder) -> DrawdownRule:
        """The rule that enforces a ladder."""
        return cls(**dataclasses.asdict(ladder))

    @cached_property
    def ladder(self) -> DrawdownLadder:
        """The ladder that moves the trading state, with the same levels."""
        return DrawdownLadder(**dataclasses.asdict(self))

    def __call__(self, state: State) -> Any:
        """Allowed actions [B, A]."""
        code, drawdown = state["trading_state"], state["drawdown"]
        active = (code < TradingState.REDUCE_ONLY.value) & (drawdown < self.soft)
        not_halted = (code < TradingState.HALTED.value) & (drawdown < self.hard)
        return not_halted & (active | is_reduction(state))

    def reason(self, observed: Observed) -> str:
        """Why, in words."""
        drawdown, code = observed["drawdown"], observed["trading_state"]
        if drawdown >= self.hard:
            return f"drawdown {_percent(drawdown)} reached the hard limit {_percent(self.hard)}, only Hold is allowed"
        if code >= TradingState.HALTED:
            return "trading is HALTED, only Hold is allowed"
        if drawdown >= self.soft:
            return f"drawdown {_percent(drawdown)} reached the soft limit {_percent(self.soft)}, {_shrink(observed)}"
        return f"trading is REDUCE_ONLY, {_shrink(observed)}"


@register_rule("min_holding")
@dataclass(frozen=True, kw_only=True)
class MinHolding:
    """An open position is kept for `bars` bars; reducing in REDUCE_ONLY is exempt so that no limit traps risk."""

    fields: ClassVar[tuple[str, ...]] = ("holding_time", "position", "trading_state")
    bars: int = parameter(3, at_least=0)

    def __post_init__(self) -> None:
        check_parameters(self)

    def __call__(self, state: State) -> Any:
        """Allowed actions [B, A]."""
        free = (state["holding_time"] >= self.bars) | (state["position"] == 0)
        return free | is_exempt(state)

    def reason(self, observed: Observed) -> str:
        """Why, in words."""
        held, position = observed["holding_time"], observed["position"]
        return f"the position {position:.4g} was held for {held:g} of at least {self.bars} bars"


@register_rule("max_position_change")
@dataclass(frozen=True, kw_only=True)
class MaxPositionChange:
    """|target - position| of one decision stays within `limit`; reducing in REDUCE_ONLY is exempt as above."""

    fields: ClassVar[tuple[str, ...]] = ("position", "trading_state")
    limit: float = parameter(0.6, above=0.0)

    def __post_init__(self) -> None:
        check_parameters(self)

    def __call__(self, state: State) -> Any:
        """Allowed actions [B, A]."""
        target, position, slack = state["target_position"], state["position"], self.limit + TOLERANCE
        # Two bounds, not |target - position|: inf - inf would warn on every live decision with a broken position.
        near = (target <= position + slack) & (target >= position - slack)
        return near | is_exempt(state)

    def reason(self, observed: Observed) -> str:
        """Why, in words."""
        change = observed["target_position"] - observed["position"]
        return f"the change of {change:+.4g} would exceed the limit {self.limit:g} of one decision"


@register_rule("volatility_breaker")
@dataclass(frozen=True, kw_only=True)
class VolatilityBreaker:
    """At or above `limit` of `volatility_20` (annualised) only smaller positions are allowed."""

    fields: ClassVar[tuple[str, ...]] = ("volatility_20", "position")
    limit: float = parameter(0.6, above=0.0)

    def __post_init__(self) -> None:
        check_parameters(self)

    def __call__(self, state: State) -> Any:
        """Allowed actions [B, A]."""
        return (state["volatility_20"] < self.limit) | is_reduction(state)

    def reason(self, observed: Observed) -> str:
        """Why, in words."""
        volatility = observed["volatility_20"]
        return f"annualised volatility {volatility:.4g} reached the limit {self.limit:g}, {_shrink(observed)}"


@register_rule("stale_data")
@dataclass(frozen=True, kw_only=True)
class StaleData:
    """With the newest bar older than `max_age_bars` only Hold is allowed."""

    fields: ClassVar[tuple[str, ...]] = ("data_age",)
    max_age_bars: float = parameter(1.0, at_least=0.0)

    def __post_init__(self) -> None:
        check_parameters(self)

    def __call__(self, state: State) -> Any:
        """Allowed actions [B, 1]."""
        return (state["data_age"] >= 0) & (state["data_age"] <= self.max_age_bars)

    def reason(self, observed: Observed) -> str:
        """Why, in words."""
        age = observed["data_age"]
        if age < 0:
            return f"the newest bar lies {-age:.4g} bars in the future"
        return f"the newest bar is {age:.4g} bars old, at most {self.max_age_bars:g} allowed"


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
        DrawdownRule.of(ladder or DrawdownLadder()),
        VolatilityBreaker(limit=max_volatility),
        MaxExposure(limit=max_exposure),
        PaperOnlyLeverage(paper=paper),
        MaxPositionChange(limit=max_position_change),
        MinHolding(bars=min_holding_bars),
    )


# --- words ------------------------------------------------------------------------------------------------


def _size(observed: Observed) -> str:
    return f"{abs(observed['target_position']):g}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g} %"


def _shrink(observed: Observed) -> str:
    return f"the position {observed['position']:.4g} may only shrink"
