"""What a backtest adds up to.

Each metric is a pure function of one path. NaN in gives NaN out unless a docstring says otherwise: a metric never
repairs its input. Letters: n bars of one path, B paths.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluation.backtest import BacktestResult
from masking import TradingState

SAME = 1e-9
"""Returns whose spread is below this share of their size are constant up to rounding."""


def sharpe_ratio(returns: ArrayLike, bars_per_year: float) -> float:
    """Annualised Sharpe ratio: `mean / std(ddof=1) * sqrt(bars_per_year)`, dimensionless.

    Of simple returns (Sharpe 1994), with a risk-free rate of zero; serial correlation is not corrected for.

    Args: returns [n >= 2], simple return per bar.
    Returns: 0.0 where every return is zero (nothing was risked); NaN where all are equal but not zero, since no
        ratio exists.
    Raises: ValueError on fewer than two bars.
    """
    values = _path("returns", returns, at_least=2)
    if not np.any(values):
        return 0.0
    if np.ptp(values) <= SAME * np.abs(values).max():
        return math.nan
    return float(values.mean() / values.std(ddof=1) * math.sqrt(_positive(bars_per_year)))


def annual_return(log_returns: ArrayLike, bars_per_year: float) -> float:
    """Compound growth: `exp(sum(log_returns) * bars_per_year / n) - 1`, fraction per year.

    Infinite where a few huge bars annualise beyond what a float holds. Args: log_returns [n >= 1].
    """
    values = _path("log_returns", log_returns)
    with np.errstate(over="ignore"):
        return float(np.expm1(values.sum() * _positive(bars_per_year) / len(values)))


def annual_volatility(returns: ArrayLike, bars_per_year: float) -> float:
    """`std(ddof=1) * sqrt(bars_per_year)` of simple returns, fraction per square root of a year.

    Args: returns [n >= 2]. Raises: ValueError on fewer than two bars.
    """
    return float(_path("returns", returns, at_least=2).std(ddof=1) * math.sqrt(_positive(bars_per_year)))


def max_drawdown(equity: ArrayLike) -> float:
    """Largest `1 - equity / highest equity so far`, fraction; the starting equity counts as a peak.

    Args: equity [n + 1 >= 1], the start first.
    """
    values = _path("equity", equity)
    return float((1.0 - values / np.maximum.accumulate(values)).max())


def kill_switch_rate(killed: ArrayLike) -> float:
    """Share of paths on which the kill switch latched. Args: killed [B >= 1] bool."""
    return float(_path("killed", killed).mean())


def turnover_per_year(turnover: ArrayLike, bars_per_year: float) -> float:
    """`mean(turnover) * bars_per_year`, multiples of equity traded per year.

    In and out of the market once is 2. Args: turnover [n >= 1], |trade| per bar.
    """
    return float(_path("turnover", turnover).mean() * _positive(bars_per_year))


def mean_exposure(position: ArrayLike) -> float:
    """`mean(|position|)`, multiples of equity. Args: position [n >= 1] at the close of each bar."""
    return float(np.abs(_path("position", position)).mean())


def cost_paid(cost: ArrayLike) -> float:
    """`1 - prod(1 - cost)`: the share of the final equity that trading costs took, over the whole path.

    Without costs the same trades would have ended at `equity / (1 - cost_paid)`. Args: cost [n >= 1], fraction of
    equity per bar.
    """
    return float(1.0 - np.prod(1.0 - _path("cost", cost)))


def time_in_state(trading_state: ArrayLike, state: TradingState) -> float:
    """Share of closes that left the account in `state`. Args: trading_state [n >= 1], codes."""
    return float((_path("trading_state", trading_state) == state.value).mean())


def hit_rate(returns: ArrayLike) -> float:
    """Share of winning bars among the bars that won or lost: `#(r > 0) / #(r != 0)`.

    NaN where no bar won or lost, or where a return is NaN. Args: returns [n >= 1].
    """
    values = _path("returns", returns)
    moved = np.count_nonzero(values)
    if moved == 0 or np.isnan(values).any():
        return math.nan
    return float(np.count_nonzero(values > 0) / moved)


@dataclass(frozen=True, kw_only=True)
class PolicyMetrics:
    """Metrics of one policy over one window: the mean over paths where nothing else is said.

    A metric that is NaN on one path is NaN here. Gates must compare so that NaN does not pass.
    """

    policy: str
    bars: int
    """Bars of each path."""
    paths: int
    sharpe: float
    """Annualised, of simple returns."""
    annual_return: float
    """Fraction per year, compounded."""
    annual_volatility: float
    """Fraction per square root of a year."""
    max_drawdown: float
    """Fraction of the all-time peak."""
    worst_drawdown: float
    """The largest `max_drawdown` of any path."""
    kill_switch_rate: float
    """Share of paths."""
    turnover_per_year: float
    """Multiples of equity."""
    exposure: float
    """Mean |position|, multiples of equity."""
    cost_paid: float
    """Share of the final equity, over the whole window."""
    hit_rate: float
    """Winning bars among bars that won or lost."""
    time_active: float
    """Share of closes."""
    time_reduce_only: float
    """Share of closes."""
    time_halted: float
    """Share of closes."""
    reward_per_bar: float
    """Mean reward."""
    invalid_actions: int
    """Count over all paths; anything but 0 is a bug."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary; NaN and infinity become None, because JSON has neither."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def evaluate(result: BacktestResult, bars_per_year: float) -> PolicyMetrics:
    """Compute all metrics of a backtest.

    Raises: ValueError on fewer than two bars.
    """
    simple = np.expm1(result.log_returns)
    drawdowns = _each(max_drawdown, result.equity)
    # The first close comes before any decision and says nothing about the policy.
    position, trading_state = result.position[1:], result.trading_state[1:]
    return PolicyMetrics(
        policy=result.policy,
        bars=simple.shape[0],
        paths=simple.shape[1],
        sharpe=_mean(lambda path: sharpe_ratio(path, bars_per_year), simple),
        annual_return=_mean(lambda path: annual_return(path, bars_per_year), result.log_returns),
        annual_volatility=_mean(lambda path: annual_volatility(path, bars_per_year), simple),
        max_drawdown=float(drawdowns.mean()),
        worst_drawdown=float(drawdowns.max()),
        kill_switch_rate=kill_switch_rate(result.killed),
        turnover_per_year=_mean(lambda path: turnover_per_year(path, bars_per_year), result.turnover),
        exposure=_mean(mean_exposure, position),
        cost_paid=_mean(cost_paid, result.cost),
        hit_rate=_mean(hit_rate, simple),
        time_active=_mean(lambda codes: time_in_state(codes, TradingState.ACTIVE), trading_state),
        time_reduce_only=_mean(lambda codes: time_in_state(codes, TradingState.REDUCE_ONLY), trading_state),
        time_halted=_mean(lambda codes: time_in_state(codes, TradingState.HALTED), trading_state),
        reward_per_bar=float(result.reward.mean()),
        invalid_actions=result.invalid_actions,
    )


def _each(metric: Callable[[NDArray[Any]], float], columns: NDArray[Any]) -> NDArray[np.float64]:
    return np.array([metric(columns[:, path]) for path in range(columns.shape[1])])


def _mean(metric: Callable[[NDArray[Any]], float], columns: NDArray[Any]) -> float:
    return float(_each(metric, columns).mean())


def _path(name: str, values: ArrayLike, at_least: int = 1) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < at_least:
        raise ValueError(f"{name}: expected one path of at least {at_least} values, was shape {list(array.shape)}")
    return array


def _positive(bars_per_year: float) -> float:
    if not 0 < bars_per_year < math.inf:
        raise ValueError(f"bars_per_year: expected a positive number, was {bars_per_year}")
    return float(bars_per_year)
