"""What the observed columns say about the hidden regime and signal of a known market, and the policy that uses it.

Letters: P paths, T bars, K regimes, B batch, A actions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from configs.evaluation import SyntheticMarketConfig
from data import Field
from envs import TradingDynamics
from envs.panel import FeaturePanel
from envs.synthetic import signal_persistence, stationary_law, transition_matrix
from evaluation.oracle import MarketSolution, best_valid, columns_of

Floats = NDArray[np.float64]

MIN_SPREAD_NOISE = 1e-3
"""Without noise the spread names the regime; a floor keeps its density finite."""

_BELIEF = Field("belief_calm", "signals", "probability", 0.0, 1.0, "calm regime, given all bars so far")
BELIEF_FIELDS: tuple[Field, ...] = (
    _BELIEF,
    replace(_BELIEF, name="belief_sideways", description="sideways regime, given all bars so far"),
    replace(_BELIEF, name="belief_stressed", description="stressed regime, given all bars so far"),
    Field("filtered_signal", "signals", "standard deviations", -math.inf, math.inf, "mean of the true signal so far"),
)
"""The columns `with_beliefs` adds."""


@dataclass(frozen=True, eq=False)
class Beliefs:
    """The hidden state of P markets at each close, given the rows up to it."""

    regime: Floats
    """[P, T, K] probabilities."""
    signal: Floats
    """[P, T] mean of the true signal."""
    variance: Floats
    """[T] variance of the true signal around it; no observation changes it."""


def filter_beliefs(panel: FeaturePanel, market: SyntheticMarketConfig) -> Beliefs:
    """Forward-filter regime and signal from gap, intraday return, spread and observed signal.

    A Kalman filter of the signal from its observations, and a forward filter of the regime (Hamilton 1989) that takes
    the filtered signal for the true one. Not exact in two things, both of order (signal_drift / volatility)^2 / bars
    per year: returns say a little about the signal too, and they scatter by the signal's remaining variance. Volume is
    left out: it is known only relative to its own last bars.

    Raises: ValueError naming a missing column, or a market in which a return or a spread has no density.
    """
    if not (min(market.volatility) > 0 and 0 < market.gap_share < 1 and min(market.spread_bps) > 0):
        raise ValueError(
            "market: expected volatility and spread_bps > 0 and 0 < gap_share < 1, so that returns and spreads have "
            f"densities, was {market.volatility}, {market.spread_bps} and {market.gap_share}"
        )
    gap, intraday, observed, spread = _columns(panel, ("gap_return", "intraday_return", "signal", "spread"))
    signal, variance = _filter_signal(observed, market)
    # The move into row t is driven by the signal at the close before; before the first row nothing is known of it.
    driving = np.concatenate((np.zeros((len(panel), 1)), signal[:, :-1]), axis=1)
    evidence = _log_likelihood(gap, intraday, spread, driving, market)
    transition = transition_matrix(market)
    regime = np.empty_like(evidence)
    predicted = np.broadcast_to(stationary_law(transition), evidence[:, 0].shape)
    for bar in range(evidence.shape[1]):
        with np.errstate(divide="ignore"):  # the log of an impossible regime
            joint = np.log(predicted) + evidence[:, bar]
        # Only ratios count: with the likeliest regime at 1 the sum cannot vanish.
        weight = np.exp(joint - joint.max(axis=1, keepdims=True))
        regime[:, bar] = weight / weight.sum(axis=1, keepdims=True)
        predicted = regime[:, bar] @ transition
    return Beliefs(regime, signal, variance)


def with_beliefs(panel: FeaturePanel, market: SyntheticMarketConfig) -> FeaturePanel:
    """The panel widened by `BELIEF_FIELDS`."""
    beliefs = filter_beliefs(panel, market)
    return panel.widened(BELIEF_FIELDS, np.concatenate((beliefs.regime, beliefs.signal[..., None]), axis=2))


def filtered_signal_std(market: SyntheticMarketConfig) -> float:
    """Stationary standard deviation of the filtered signal: what `solve_oracle` needs for a `BeliefPolicy`.

    The filtered signal is an AR(1) of the true one's persistence; its variance and the remaining one, the fixed point
    of the filter, add up to 1.
    """
    persistence, noise = signal_persistence(market), market.signal_noise**2
    shock = 1 - persistence**2
    # Predicted variance v: v = persistence^2 * v * noise / (v + noise) + shock.
    half = (noise * shock - shock) / 2
    predicted = -half + math.sqrt(half**2 + shock * noise)
    remaining = predicted * noise / (predicted + noise)
    return math.sqrt(1 - remaining)


class BeliefPolicy:
    """Acts on the average of the values in each regime, weighted by belief (QMDP, Littman et al. 1995).

    Reads `BELIEF_FIELDS` from a wider feature table. QMDP values an action as if the regime became known after one bar,
    so its value is an upper bound and its choice a heuristic: it never trades to learn, which here costs nothing
    because prices do not react, but it does expect to correct itself sooner than it can. It is not the exact optimum
    under partial observation. The solution must be that of the filtered signal, `filtered_signal_std`.

    Raises: ValueError if the state row lacks the columns.
    """

    name = "belief_filter"

    def __init__(self, dynamics: TradingDynamics, solution: MarketSolution) -> None:
        beliefs = tuple(field.name for field in BELIEF_FIELDS[:-1])
        self._solution = solution
        self._columns = columns_of(dynamics, ("filtered_signal", "position", "holding_time", *beliefs))

    def act(self, state: NDArray[np.float32], action_masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The best valid action on average over the regimes; Hold among equally good ones."""
        signal, position, holding_time, *belief = state[:, self._columns].astype(np.float64).T
        values = self._solution.action_values(signal, position, holding_time)
        return best_valid((np.stack(belief, axis=1)[:, :, None] * values).sum(axis=1), action_masks)


def _columns(panel: FeaturePanel, names: tuple[str, ...]) -> list[Floats]:
    missing = [name for name in names if name not in panel.names]
    if missing:
        raise ValueError(f"panel: expected columns {', '.join(names)}, missing {missing}")
    return [panel.values[:, :, panel.names.index(name)] for name in names]


def _filter_signal(observed: Floats, market: SyntheticMarketConfig) -> tuple[Floats, Floats]:
    # Kalman filter of a unit-variance AR(1) in noise, begun in its stationary law. [P, T], [T].
    persistence, noise = signal_persistence(market), market.signal_noise**2
    signal, variance = np.empty_like(observed), np.empty(observed.shape[1])
    mean, spread = np.zeros(len(observed)), 1.0
    for bar in range(observed.shape[1]):
        gain = spread / (spread + noise)
        signal[:, bar] = mean + gain * (observed[:, bar] - mean)
        variance[bar] = (1 - gain) * spread
        mean, spread = persistence * signal[:, bar], persistence**2 * variance[bar] + 1 - persistence**2
    return signal, variance


def _log_likelihood(
    gap: Floats, intraday: Floats, spread: Floats, signal: Floats, market: SyntheticMarketConfig
) -> Floats:
    # Of one bar in each regime, [P, T, K], up to what is the same in all of them.
    bar = 1.0 / market.bars_per_year
    share = market.gap_share
    mean = (np.asarray(market.drift) + market.signal_drift * signal[..., None]) * bar
    variance = np.asarray(market.volatility) ** 2 * bar
    jump = np.asarray(market.jump_rate) * bar
    quiet = _log_normal(gap[..., None], share * mean, share * variance)
    jumped = _log_normal(gap[..., None], share * mean, share * variance + market.jump_std**2)
    with np.errstate(divide="ignore"):  # a jump rate of zero: the log of an impossible event
        log_gap = np.logaddexp(np.log1p(-jump) + quiet, np.log(jump) + jumped)
    noise = max(market.spread_noise, MIN_SPREAD_NOISE)
    typical = np.log(np.asarray(market.spread_bps) * 1e-4) - noise**2 / 2
    log_spread = _log_normal(np.log(spread)[..., None], typical, np.asarray(noise**2))
    return log_gap + _log_normal(intraday[..., None], (1 - share) * mean, (1 - share) * variance) + log_spread


def _log_normal(value: Floats, mean: Floats, variance: Floats) -> Floats:
    # Without the constant.
    density: Floats = -0.5 * (np.log(variance) + (value - mean) ** 2 / variance)
    return density
