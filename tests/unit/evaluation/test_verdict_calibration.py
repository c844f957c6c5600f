"""How often the whole chain, from returns to decision, would switch for no reason, and how often for a good one.

Two policies trade the same markets: most of their returns is the market, a little is their own noise, and every
training run of each has a luck of its own that lasts over all paths.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from configs.evaluation import VerdictConfig
from evaluation.statistics.limits import drawdown_non_inferiority, kill_switch_difference
from evaluation.statistics.sharpe import sharpe_difference
from evaluation.verdict import Decision, decide

BARS_PER_YEAR = 252
VOLATILITY = 0.01
MARKET = 0.95
"""Share of a policy's variance that is the market."""


def comparison(
    rng: np.random.Generator, *, gain: float, luck: float, seeds: int, paths: int, bars: int, config: VerdictConfig
):
    """One simulated study, from returns to decision; luck: standard deviation of a seed's annual Sharpe ratio."""
    market = math.sqrt(MARKET) * rng.standard_normal((1, paths, bars))

    def returns(sharpe: float) -> np.ndarray:
        of_seed = luck * rng.standard_normal((seeds, 1, 1))
        noise = math.sqrt(1.0 - MARKET) * rng.standard_normal((seeds, paths, bars))
        return VOLATILITY * (market + noise + (sharpe + of_seed) / math.sqrt(BARS_PER_YEAR))

    a, b = returns(0.5 + gain), returns(0.5)
    drawdowns = [_drawdowns(policy) for policy in (a, b)]
    level = config.confidence
    return decide(
        "challenger",
        "baseline",
        sharpe=sharpe_difference(a, b, BARS_PER_YEAR, level=level, resamples=2, seed=0),
        drawdown=drawdown_non_inferiority(*drawdowns, margin=config.drawdown_margin, level=level),
        kill_switch=kill_switch_difference(
            drawdowns[0] > 0.5, drawdowns[1] > 0.5, margin=config.kill_switch_margin, level=level
        ),
        latency_ms=1.0,
        invalid_actions=0,
        exposures=(0.5, 0.5),
        failed_checks=(),
        config=config,
    )


def _drawdowns(returns: np.ndarray) -> np.ndarray:
    height = np.cumsum(np.log1p(returns), axis=-1)
    return -np.expm1((height - np.maximum(np.maximum.accumulate(height, axis=-1), 0.0)).min(axis=-1))


@pytest.mark.parametrize(("seeds", "luck"), [(3, 0.5), (5, 0.1)])
def test_equal_policies_are_rarely_switched(seeds, luck):
    """Without a registered gain and with wide margins GO hangs on the lower bound alone: its error is 2.5 %."""
    bare = VerdictConfig(min_sharpe_gain=0.0, drawdown_margin=0.9, kill_switch_margin=0.9)
    rng = np.random.default_rng(11 + seeds)
    decisions = Counter(
        comparison(rng, gain=0.0, luck=luck, seeds=seeds, paths=12, bars=100, config=bare).decision for _ in range(500)
    )
    assert decisions[Decision.GO] / 500 <= 0.025 + 2 * math.sqrt(0.025 * 0.975 / 500)
    # The instrument is not simply blind: about half of the point estimates are above zero.
    assert decisions[Decision.CONDITIONAL] > 150


def test_a_true_gain_is_mostly_found_at_the_registered_thresholds():
    registered = VerdictConfig()
    rng = np.random.default_rng(13)
    verdicts = [comparison(rng, gain=0.3, luck=0.08, seeds=5, paths=220, bars=60, config=registered) for _ in range(25)]
    decisions = Counter(verdict.decision for verdict in verdicts)
    assert decisions[Decision.GO] >= 20
    assert decisions[Decision.NO_GO] <= 1


def test_too_few_paths_to_rule_a_kill_out_never_switch():
    """However large the gain: 30 paths without an event do not show a rate below 2 %."""
    rng = np.random.default_rng(14)
    verdicts = [
        comparison(rng, gain=1.0, luck=0.08, seeds=5, paths=30, bars=100, config=VerdictConfig()) for _ in range(20)
    ]
    assert {verdict.decision for verdict in verdicts} == {Decision.CONDITIONAL}
    assert all("187 more paths decide the kill-switch rate" in verdict.next_step for verdict in verdicts)
