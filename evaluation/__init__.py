"""Backtests of policies over history, what they add up to, and how they look.

Every policy, baseline or trained, walks the same exact account step under the same masks. Figures live in
`evaluation.plots` and are not imported here: matplotlib is slow to load and most callers only need numbers.
"""

from evaluation.backtest import BacktestResult, Progress, backtest
from evaluation.metrics import (
    PolicyMetrics,
    annual_return,
    annual_volatility,
    calmar_ratio,
    cost_paid,
    evaluate,
    hit_rate,
    kill_switch_rate,
    max_drawdown,
    mean_exposure,
    metrics_by_path,
    sharpe_ratio,
    sortino_ratio,
    time_in_state,
    turnover_per_year,
)
from evaluation.policy import BuyAndHold, Flat, Policy, RandomValid

__all__ = [
    "BacktestResult",
    "BuyAndHold",
    "Flat",
    "Policy",
    "PolicyMetrics",
    "Progress",
    "RandomValid",
    "annual_return",
    "annual_volatility",
    "backtest",
    "calmar_ratio",
    "cost_paid",
    "evaluate",
    "hit_rate",
    "kill_switch_rate",
    "max_drawdown",
    "mean_exposure",
    "metrics_by_path",
    "sharpe_ratio",
    "sortino_ratio",
    "time_in_state",
    "turnover_per_year",
]
