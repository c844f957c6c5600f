"""How long the markets of the suite take to simulate, to solve and to walk, on one thread.

Everything the suite does with markets is vectorised over paths; the policies it walks are not timed here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from threadpoolctl import threadpool_limits

from benchmarks.machine import library_versions, machine
from configs import DetentConfig
from envs import TradingDynamics
from envs.synthetic import simulate_panel
from evaluation import BuyAndHold, backtest
from evaluation.belief import with_beliefs
from evaluation.oracle import solve_oracle

LIBRARIES = ("numpy", "scipy")
GOAL_S = 2.0
"""What simulating 100 paths of 2,520 bars, features included, may take."""


@dataclass(frozen=True, kw_only=True)
class MarketReport:
    """Best of several repeats of each task, seconds."""

    paths: int
    bars: int
    repeats: int
    simulate_s: float
    """Bars, hidden truth and features of all paths."""
    beliefs_s: float
    """Hidden-Markov and Kalman filter over all paths."""
    oracle_s: float
    """The dynamic programme, whatever the paths."""
    walk_s: float
    """One account per path from the first bar to the last, buying and holding: what masks and accounts cost."""
    machine: dict[str, str | int]
    versions: dict[str, str]

    @property
    def within_goal(self) -> bool:
        """Whether simulating took at most the goal, scaled from 100 paths of 2,520 bars to these."""
        return self.simulate_s <= GOAL_S * self.paths * self.bars / (100 * 2520)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return {**asdict(self), "goal_s": GOAL_S, "within_goal": self.within_goal, "threads": 1}


def measure_market(config: DetentConfig, *, paths: int = 100, bars: int = 2520, repeats: int = 3) -> MarketReport:
    """Time the synthetic market of `config.evaluation.market`.

    Raises: ValueError on sizes below those of `simulate_panel`, or no repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected >= 1, was {repeats}")
    market = config.evaluation.market

    def simulate() -> Any:
        return simulate_panel(market, paths=paths, bars=bars, seed=config.seed)

    with threadpool_limits(1):
        panel = simulate().features
        dynamics = TradingDynamics.from_config(panel.names, config)
        return MarketReport(
            paths=paths,
            bars=bars,
            repeats=repeats,
            simulate_s=_best(simulate, repeats),
            beliefs_s=_best(lambda: with_beliefs(panel, market), repeats),
            oracle_s=_best(lambda: solve_oracle(market, dynamics), repeats),
            walk_s=_best(lambda: backtest(dynamics, panel.values, panel.timestamps, BuyAndHold(dynamics)), repeats),
            machine=machine(),
            versions=library_versions(LIBRARIES),
        )


def _best(task: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        task()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
