"""What a backtest adds up to.

Each metric is a pure function of one path. NaN in gives NaN out unless a docstring says otherwise: a metric never
repairs its input. Letters: n bars of one path, B paths.
"""

from __future__ import annotations

import math
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
    return float(_sharpe(_path("returns", returns, at_least=2), _positive(bars_per_year)))


def sortino_ratio(returns: ArrayLike, bars_per_year: float) -> float:
    """Annualised Sortino ratio: `mean / sqrt(mean(min(r, 0)^2)) * sqrt(bars_per_year)`, dimensionless.

    Downside deviation against zero, over all bars and not only the losing ones (Sortino and Price 1994): an account
    that loses rarely must not look as risky as one that loses often.

    Args: returns [n >= 1], simple return per bar.
    Returns: 0.0 where every return is zero; NaN where bars gained and none lost, since no ratio exists.
    """
    return float(_sortino(_path("returns", returns), _positive(bars_per_year)))


def annual_return(log_returns: ArrayLike, bars_per_year: float) -> float:
    """Compound growth: `exp(sum(log_returns) * bars_per_year / n) - 1`, fraction per year.

    Infinite where a few huge bars annualise beyond what a float holds. Args: log_returns [n >= 1].
    """
    return float(_growth(_path("log_returns", log_returns), _positive(bars_per_year)))


def annual_volatility(returns: ArrayLike, bars_per_year: float) -> float:
    """`std(ddof=1) * sqrt(bars_per_year)` of simple returns, fraction per square root of a year.

    Args: returns [n >= 2]. Raises: ValueError on fewer than two bars.
    """
    return float(_volatility(_path("returns", returns, at_least=2), _positive(bars_per_year)))


def max_drawdown(equity: ArrayLike) -> float:
    """Largest `1 - equity / highest equity so far`, fraction; the starting equity counts as a peak.

    Args: equity [n + 1 >= 1], the start first.
    """
    return float(_drawdown(_path("equity", equity)))


def calmar_ratio(log_returns: ArrayLike, bars_per_year: float) -> float:
    """Annual return over maximum drawdown, dimensionless (Young 1991, there over the last three years).

    Args: log_returns [n >= 1], log growth of equity per bar.
    Returns: 0.0 where every return is zero; NaN where equity never fell below a peak, since no ratio exists.
    """
    values = _path("log_returns", log_returns)
    equity = np.exp(np.concatenate(([0.0], np.cumsum(values))))
    return float(_calmar(_growth(values, _positive(bars_per_year)), _drawdown(equity)))


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
    return float(_cost(_path("cost", cost)))


def time_in_state(trading_state: ArrayLike, state: TradingState) -> float:
    """Share of closes that left the account in `state`. Args: trading_state [n >= 1], codes."""
    return float((_path("trading_state", trading_state) == state.value).mean())


def hit_rate(returns: ArrayLike) -> float:
    """Share of winning bars among the bars that won or lost: `#(r > 0) / #(r != 0)`.

    NaN where no bar won or lost, or where a return is NaN. Args: returns [n >= 1].
    """
    return float(_hits(_path("returns", returns)))


def metrics_by_path(result: BacktestResult, bars_per_year: float) -> dict[str, NDArray[np.float64]]:
    """Every metric of every path: name -> [B], names and units as in `PolicyMetrics`; `killed` is 0 or 1.

    Raises: ValueError on fewer than two bars.
    """
    bars_per_year = _positive(bars_per_year)
    if len(result.log_returns) < 2:
        raise ValueError(f"log_returns: expected at least 2 bars, was {len(result.log_returns)}")
    simple = np.expm1(result.log_returns)
    growth, drawdown = _growth(result.log_returns, bars_per_year), _drawdown(result.equity)
    # The first close comes before any decision and says nothing about the policy.
    position, trading_state = result.position[1:], result.trading_state[1:]
    return {
        "sharpe": _sharpe(simple, bars_per_year),
        "sortino": _sortino(simple, bars_per_year),
        "calmar": _calmar(growth, drawdown),
        "annual_return": growth,
        "annual_volatility": _volatility(simple, bars_per_year),
        "max_drawdown": drawdown,
        "turnover_per_year": result.turnover.mean(axis=0) * bars_per_year,
        "exposure": np.abs(position).mean(axis=0),
        "cost_paid": _cost(result.cost),
        "hit_rate": _hits(simple),
        **{f"time_{state.name.lower()}": (trading_state == state.value).mean(axis=0) for state in TradingState},
        "killed": result.killed.astype(np.float64),
        "reward_per_bar": result.reward.mean(axis=0, dtype=np.float64),
    }


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
    sortino: float
    """Annualised, of simple returns."""
    calmar: float
    """Annual return over maximum drawdown."""
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
    by_path = metrics_by_path(result, bars_per_year)
    averages = {name: float(values.mean()) for name, values in by_path.items() if name != "killed"}
    return PolicyMetrics(
        policy=result.policy,
        bars=result.log_returns.shape[0],
        paths=result.log_returns.shape[1],
        worst_drawdown=float(by_path["max_drawdown"].max()),
        kill_switch_rate=float(by_path["killed"].mean()),
        invalid_actions=result.invalid_actions,
        **averages,
    )


# The formulas, over the first axis: [n, ...] -> [...]. One path and many share them.


def _sharpe(returns: NDArray[Any], bars_per_year: float) -> NDArray[np.float64]:
    size = np.abs(returns).max(axis=0)
    ratio = _ratio(returns.mean(axis=0), returns.std(axis=0, ddof=1), np.ptp(returns, axis=0) > SAME * size, size)
    return ratio * math.sqrt(bars_per_year)


def _sortino(returns: NDArray[Any], bars_per_year: float) -> NDArray[np.float64]:
    size, losses = np.abs(returns).max(axis=0), np.minimum(returns, 0.0)
    deviation = np.sqrt((losses**2).mean(axis=0))
    return _ratio(returns.mean(axis=0), deviation, -losses.min(axis=0) > SAME * size, size) * math.sqrt(bars_per_year)


def _calmar(growth: NDArray[Any], drawdown: NDArray[Any]) -> NDArray[np.float64]:
    return _ratio(growth, drawdown, drawdown > SAME, np.maximum(np.abs(growth), drawdown))


# gain / risk where something was at risk, 0 where nothing ever moved, NaN elsewhere.
def _ratio(gain: Any, risk: Any, is_risky: Any, size: Any) -> NDArray[np.float64]:
    quotient = np.full(np.shape(gain), math.nan)
    np.divide(gain, risk, out=quotient, where=is_risky)
    return np.where(size == 0.0, 0.0, quotient)


def _growth(log_returns: NDArray[Any], bars_per_year: float) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        growth: NDArray[np.float64] = np.expm1(log_returns.sum(axis=0) * bars_per_year / len(log_returns))
    return growth


def _volatility(returns: NDArray[Any], bars_per_year: float) -> NDArray[np.float64]:
    volatility: NDArray[np.float64] = returns.std(axis=0, ddof=1) * math.sqrt(bars_per_year)
    return volatility


def _drawdown(equity: NDArray[Any]) -> NDArray[np.float64]:
    drawdown: NDArray[np.float64] = (1.0 - equity / np.maximum.accumulate(equity, axis=0)).max(axis=0)
    return drawdown


def _cost(cost: NDArray[Any]) -> NDArray[np.float64]:
    paid: NDArray[np.float64] = 1.0 - np.prod(1.0 - cost, axis=0)
    return paid


def _hits(returns: NDArray[Any]) -> NDArray[np.float64]:
    won, moved = np.count_nonzero(returns > 0, axis=0), np.count_nonzero(returns, axis=0)
    known = (moved > 0) & ~np.isnan(returns).any(axis=0)
    return np.where(known, won / np.maximum(moved, 1), math.nan)


def _path(name: str, values: ArrayLike, at_least: int = 1) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < at_least:
        raise ValueError(f"{name}: expected one path of at least {at_least} values, was shape {list(array.shape)}")
    return array


def _positive(bars_per_year: float) -> float:
    if not 0 < bars_per_year < math.inf:
        raise ValueError(f"bars_per_year: expected a positive number, was {bars_per_year}")
    return float(bars_per_year)
