"""A market whose truth is known: hidden regimes, a predictive signal seen through noise, a spread and jumps.

What a policy may see are the columns of `market_features`; regime and true signal stay beside them, for reference
policies and for tests. Rates are annual, so that one configuration serves one-minute and daily bars.

Shapes: P paths, T bars, M features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from configs.evaluation import SyntheticMarketConfig
from data import FEATURE_FIELDS, Field
from data.windows import mean_offset, window_std, window_sum
from envs.panel import FeaturePanel

Floats = NDArray[np.float64]

WARMUP = 20
"""Bars before the first feature row: the longest window."""
_KNOWN = {field.name: field for field in FEATURE_FIELDS}
_SIGNAL = Field("signal", "signals", "standard deviations", -math.inf, math.inf, "observed signal")
MARKET_FIELDS: tuple[Field, ...] = (
    *(_KNOWN[name] for name in ("gap_return", "intraday_return", "return_5", "return_20", "volatility_20")),
    _SIGNAL,
    replace(_SIGNAL, name="signal_5", description="mean observed signal of 5 bars"),
    replace(_SIGNAL, name="signal_20", description="mean observed signal of 20 bars"),
    replace(_KNOWN["spread"], description="quoted bid-ask spread"),
    _KNOWN["volume"],
)
"""The M columns of `market_features`."""
TRUTH_FIELDS: tuple[Field, ...] = (
    Field("true_regime", "market", "code", 0.0, 2.0, "hidden regime: 0 calm, 1 sideways, 2 stressed"),
    replace(_SIGNAL, name="true_signal", description="signal without its noise"),
)
"""The columns `SyntheticPanel.with_truth` adds."""

_MIN_BARS = 60
_FIRST_DAY = np.datetime64("2000-01-03")
_FIRST_CLOSE = 100.0
_BASE_VOLUME = 1e6
_REGIME_LOG_VOLUME = np.array((0.0, 0.1, 0.5))


@dataclass(frozen=True, eq=False)
class MarketPaths:
    """P simulated markets on one clock; arrays [P, T] are float64 unless said otherwise and read-only."""

    timestamps: NDArray[np.datetime64]
    """[T] UTC closes on weekdays: midnights for daily bars, minutes from midnight on for intraday ones."""
    open: Floats
    high: Floats
    low: Floats
    close: Floats
    volume: Floats
    spread: Floats
    """Quoted, as a fraction of price."""
    signal: Floats
    """Observed at the close, in standard deviations of the true signal."""
    regime: NDArray[np.int8]
    """Hidden: 0 calm, 1 sideways, 2 stressed."""
    true_signal: Floats
    """Hidden; moves the return of the next bar."""

    def __post_init__(self) -> None:
        for field in fields(self):
            getattr(self, field.name).setflags(write=False)


@dataclass(frozen=True, eq=False)
class SyntheticPanel:
    """What is seen of P simulated markets, and the truth beside it.

    Raises: ValueError unless the truth has one entry per feature row.
    """

    features: FeaturePanel
    """[P, T, M], columns `MARKET_FIELDS`."""
    regime: NDArray[np.int8]
    """[P, T] 0 calm, 1 sideways, 2 stressed."""
    true_signal: Floats
    """[P, T] in its standard deviations."""

    def __post_init__(self) -> None:
        expected = self.features.values.shape[:2]
        for name in ("regime", "true_signal"):
            if getattr(self, name).shape != expected:
                raise ValueError(f"{name}: expected [P, T] = {list(expected)}, was {list(getattr(self, name).shape)}")

    def with_truth(self) -> FeaturePanel:
        """The features widened by `true_regime` and `true_signal`."""
        return self.features.widened(TRUTH_FIELDS, np.stack((self.regime, self.true_signal), axis=2))


def transition_matrix(config: SyntheticMarketConfig) -> Floats:
    """Regime law of the next bar given this one, [3, 3].

    Raises: ValueError if a mean stay is shorter than one bar.
    """
    stay_bars = np.array(config.duration_days) * config.bars_per_day
    if (stay_bars < 1.0).any():
        raise ValueError(
            f"evaluation.market.duration_days: expected at least one bar ({1 / config.bars_per_day:g} days) "
            f"in every regime, was {list(config.duration_days)}"
        )
    leave = 1.0 / stay_bars
    transition = np.repeat(leave[:, None] / 2.0, 3, axis=1)
    np.fill_diagonal(transition, 1.0 - leave)
    return transition


def stationary_law(transition: Floats) -> Floats:
    """Long-run share of each regime: the law [K] that `transition` [K, K] keeps."""
    states = len(transition)
    # law (I - P) = 0 and sum(law) = 1 in one regular system.
    return np.linalg.solve(np.eye(states) - transition.T + 1.0, np.ones(states)).astype(np.float64, copy=False)


def signal_persistence(config: SyntheticMarketConfig) -> float:
    """Autocorrelation of the true signal from one bar to the next."""
    return float(2.0 ** (-1.0 / (config.signal_half_life_days * config.bars_per_day)))


def simulate_market(config: SyntheticMarketConfig, *, paths: int, bars: int, seed: int) -> MarketPaths:
    """Simulate P = `paths` independent markets of T = `bars` bars; path i is the same for every `paths` > i.

    The bar after close t has log return N((drift + signal_drift * true_signal[t]) * dt, volatility^2 * dt) with the
    regime it is in, plus jumps in its gap.

    Raises: ValueError on paths < 1, bars < 60, or a configuration no such market has.
    """
    check_size(paths, bars)
    generator = np.random.default_rng(seed)
    regimes, returns, jumps, jump_sizes = generator.spawn(4)
    regime = _regimes(config, regimes.random((paths, bars)))
    dt = 1.0 / config.bars_per_year
    scale = np.array(config.volatility)[regime] * math.sqrt(dt)
    jumped = jumps.random((paths, bars)) < np.array(config.jump_rate)[regime] * dt
    return assemble_market(
        config,
        generator,
        regime=regime,
        drift=np.array(config.drift)[regime],
        scale=scale,
        diffusion=scale * returns.standard_normal((paths, bars)),
        jump=np.where(jumped, config.jump_std * jump_sizes.standard_normal((paths, bars)), 0.0),
    )


def assemble_market(
    config: SyntheticMarketConfig,
    generator: np.random.Generator,
    *,
    regime: NDArray[np.int8],
    drift: Floats,
    scale: Floats,
    diffusion: Floats,
    jump: Floats,
) -> MarketPaths:
    """Complete given returns to a market: signal, the split at the open, high and low, spread, volume.

    Args: arrays [P, T]; regime; drift, log return per year without the signal's part; scale, standard deviation of the
        bar's diffusion; diffusion and jump, log returns.

    The diffusion is split at the open by a Brownian bridge of the same scale, so both parts are independent where it
    is normal, and uncorrelated otherwise. High and low are exact for a Brownian motion from open to close given both
    ends (reflection principle), each by itself; they are drawn independently of each other.
    """
    paths, bars = regime.shape
    signals, observations, splits, highs, lows, spreads, volumes = generator.spawn(7)
    signal = _autoregression(signal_persistence(config), signals.standard_normal((paths, bars + 1)))
    before, true_signal = signal[:, :-1], signal[:, 1:]

    share = config.gap_share
    total = (drift + config.signal_drift * before) / config.bars_per_year + diffusion
    bridge = math.sqrt(share * (1.0 - share)) * scale * splits.standard_normal((paths, bars))
    gap = share * total + bridge + jump
    intraday = (1.0 - share) * total - bridge
    log_close = math.log(_FIRST_CLOSE) + np.cumsum(gap + intraday, axis=1)
    log_open = log_close - intraday
    # -log(uniform) is exponential. Maximum and minimum with the ends guard the last bit.
    variance = (1.0 - share) * np.square(scale)
    above = np.sqrt(np.square(intraday) + 2.0 * variance * highs.standard_exponential((paths, bars)))
    below = np.sqrt(np.square(intraday) + 2.0 * variance * lows.standard_exponential((paths, bars)))
    log_high = np.maximum(log_open + (intraday + above) / 2.0, np.maximum(log_open, log_close))
    log_low = np.minimum(log_open + (intraday - below) / 2.0, np.minimum(log_open, log_close))

    noise = config.spread_noise
    log_spread = noise * spreads.standard_normal((paths, bars)) - noise**2 / 2.0
    log_volume = _REGIME_LOG_VOLUME[regime] + config.volume_noise * volumes.standard_normal((paths, bars))
    return MarketPaths(
        timestamps=_clock(config.bars_per_day, bars),
        open=np.exp(log_open),
        high=np.exp(log_high),
        low=np.exp(log_low),
        close=np.exp(log_close),
        volume=_BASE_VOLUME * np.exp(log_volume),
        spread=np.array(config.spread_bps)[regime] * 1e-4 * np.exp(log_spread),
        signal=true_signal + config.signal_noise * observations.standard_normal((paths, bars)),
        regime=regime,
        true_signal=true_signal,
    )


def market_features(market: MarketPaths, config: SyntheticMarketConfig) -> FeaturePanel:
    """Columns `MARKET_FIELDS` of bars WARMUP .. T-1, [P, T-WARMUP, M]; row t uses bars up to t only.

    Columns that `data.features` has too are defined as there; the spread is the quoted one, not an estimate.

    Raises: ValueError on fewer than WARMUP + 1 bars.
    """
    close = market.close
    if close.shape[1] <= WARMUP:
        raise ValueError(f"bars: expected at least {WARMUP + 1}, was {close.shape[1]}")
    bar_return = _log_return(close, 1)
    columns = {
        "gap_return": np.log(market.open[:, 1:] / close[:, :-1]),
        "intraday_return": np.log(close / market.open),
        **{f"return_{lag}": _log_return(close, lag) for lag in (5, 20)},
        "volatility_20": _slide(partial(window_std, window=20, ddof=1), bar_return) * math.sqrt(config.bars_per_year),
        "signal": market.signal,
        **{f"signal_{bars}": _slide(partial(window_sum, window=bars), market.signal) / bars for bars in (5, 20)},
        "spread": market.spread,
        "volume": 0.0 - _slide(partial(mean_offset, window=20), np.log1p(market.volume)),
    }
    rows = close.shape[1] - WARMUP
    values = np.stack([columns[field.name][:, -rows:] for field in MARKET_FIELDS], axis=2)
    return FeaturePanel(market.timestamps[WARMUP:], MARKET_FIELDS, values)


def simulate_panel(config: SyntheticMarketConfig, *, paths: int, bars: int, seed: int) -> SyntheticPanel:
    """Features and truth of `paths` markets, exactly `bars` rows each; WARMUP bars before them are simulated too."""
    check_size(paths, bars)
    return observe_market(simulate_market(config, paths=paths, bars=bars + WARMUP, seed=seed), config)


def observe_market(market: MarketPaths, config: SyntheticMarketConfig) -> SyntheticPanel:
    """Features of a market with the truth cut to the same rows."""
    features = market_features(market, config)
    return SyntheticPanel(features, market.regime[:, WARMUP:], market.true_signal[:, WARMUP:])


def check_size(paths: int, bars: int) -> None:
    """Raises: ValueError unless there is a path and enough bars to mean anything."""
    if paths < 1:
        raise ValueError(f"paths: expected >= 1, was {paths}")
    if bars < _MIN_BARS:
        raise ValueError(f"bars: expected >= {_MIN_BARS}, was {bars}")


# uniforms [P, T] -> regimes by inverting the law of each bar given the one before.
def _regimes(config: SyntheticMarketConfig, uniforms: Floats) -> NDArray[np.int8]:
    transition = transition_matrix(config)
    thresholds = np.cumsum(transition, axis=1)[:, :-1]
    regime = np.empty(uniforms.shape, dtype=np.int8)
    regime[:, 0] = np.searchsorted(np.cumsum(stationary_law(transition))[:-1], uniforms[:, 0], side="right")
    for bar in range(1, uniforms.shape[1]):
        regime[:, bar] = (uniforms[:, bar, None] >= thresholds[regime[:, bar - 1]]).sum(axis=1)
    return regime


# AR(1) of unit variance along axis 1, begun in its stationary law.
def _autoregression(persistence: float, normals: Floats) -> Floats:
    shocks = np.concatenate((normals[:, :1], math.sqrt(1.0 - persistence**2) * normals[:, 1:]), axis=1)
    series: Floats = lfilter([1.0], [1.0, -persistence], shocks, axis=1)
    return series


def _clock(bars_per_day: int, bars: int) -> NDArray[np.datetime64]:
    minutes_of_a_day = 24 * 60
    if bars_per_day > minutes_of_a_day:
        raise ValueError(f"evaluation.market.bars_per_day: expected at most {minutes_of_a_day}, was {bars_per_day}")
    day, minute = np.divmod(np.arange(bars), bars_per_day)
    days = np.busday_offset(np.full(bars, _FIRST_DAY), day)
    clock: NDArray[np.datetime64] = days.astype("datetime64[us]") + minute.astype("timedelta64[m]")
    return clock


def _log_return(close: Floats, lag: int) -> Floats:
    return np.log(close[:, lag:] / close[:, :-lag])


# Sliding reductions [N] -> [N-W+1] of `data.windows` over every path [P, T] -> [P, T-W+1]: paths are laid end to end,
# and the windows that straddle two of them are cut off.
def _slide(reduce: Callable[[Floats], Floats], values: Floats) -> Floats:
    reduced = reduce(np.ravel(values))
    straddling = values.size - len(reduced)
    return np.append(reduced, np.zeros(straddling)).reshape(values.shape)[:, : values.shape[1] - straddling]
