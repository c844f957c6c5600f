"""Market and signal features: from bars to one row of named numbers per bar.

Every feature of bar t uses the bars t-LOOKBACK+1 .. t only and is computed by the order-stable reductions of
`data.windows`. So the row of a live feed that keeps just LOOKBACK bars is bit-identical to the row of the full
history, and nothing of the future can enter.

Columns 0 and 1 split the bar's move at its open: a decision after bar t is executed at the open of t+1, so the
account step earns `gap_return` of row t+1 on the old position and `intraday_return` on the new one.

Degenerate windows are finite: where nothing moved, returns, volatilities, distances, RSI, MACD and Bollinger
position are exactly 0, and `volume` is 0 where volume was constant, zero included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from data.bars import COLUMNS
from data.errors import DataError, HistoryError
from data.fields import Field
from data.windows import Floats, mean_offset, weighted_offset, window_std, window_sum

LOOKBACK = 120
"""Bars needed for one row: the longest window."""

INF = math.inf

FEATURE_FIELDS: tuple[Field, ...] = (
    Field("gap_return", "market", "log return", -INF, INF, "log(open / previous close)"),
    Field("intraday_return", "market", "log return", -INF, INF, "log(close / open)"),
    Field("return_2", "market", "log return", -INF, INF, "close-to-close return over 2 bars"),
    Field("return_5", "market", "log return", -INF, INF, "close-to-close return over 5 bars"),
    Field("return_10", "market", "log return", -INF, INF, "close-to-close return over 10 bars"),
    Field("return_20", "market", "log return", -INF, INF, "close-to-close return over 20 bars"),
    Field("volatility_5", "market", "per sqrt(year)", 0.0, INF, "annualised standard deviation of 5 bar returns"),
    Field("volatility_20", "market", "per sqrt(year)", 0.0, INF, "annualised standard deviation of 20 bar returns"),
    Field(
        "range_volatility", "market", "per sqrt(year)", 0.0, INF, "annualised Parkinson volatility, average of span 32"
    ),
    Field(
        "gap_volatility_20", "market", "overnight, per sqrt(year)", 0.0, INF, "annualised root mean square of 20 gaps"
    ),
    Field("range", "market", "log ratio", 0.0, INF, "log(high / low)"),
    Field("volume", "market", "log ratio", -INF, INF, "log(1 + volume) minus its mean over 20 bars"),
    Field("spread", "market", "fraction of price", 0.0, 2.0, "Corwin-Schultz bid-ask spread of the last 2 bars"),
    Field("momentum_60", "signals", "log return", -INF, INF, "close-to-close return over 60 bars"),
    Field("rsi_14", "signals", "1", -1.0, 1.0, "Cutler's RSI over 14 changes, mapped from 0..100 to -1..1"),
    Field("macd", "signals", "bar volatilities", -INF, INF, "12/26 average difference per price and bar volatility"),
    Field("bollinger_20", "signals", "2 deviations", -INF, INF, "(close - mean) / (2 deviations) over 20 bars"),
    Field("ma_distance_20", "signals", "log ratio", -INF, INF, "log(close / mean close of 20 bars)"),
    Field("ma_distance_50", "signals", "log ratio", -INF, INF, "log(close / mean close of 50 bars)"),
    Field("ma_distance_120", "signals", "log ratio", -INF, INF, "log(close / mean close of 120 bars)"),
)

# Below one millionth per bar, volatility is rounding noise; dividing by it would blow MACD up.
_MIN_BAR_VOLATILITY = 1e-6


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Features of one instrument in time order.

    Attributes: timestamps [T], UTC; symbol; fields [M]; values [T, M], float64, raw units.
    Raises: ValueError on shape or dtype; DataError naming the field if a value is NaN or infinite.
    """

    timestamps: pd.DatetimeIndex
    symbol: str
    fields: tuple[Field, ...]
    values: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        expected = (len(self.timestamps), len(self.fields))
        if self.values.shape != expected or self.values.dtype != np.float64:
            raise ValueError(
                f"features: expected float64 {list(expected)}, was {self.values.dtype} {list(self.values.shape)}"
            )
        bad = ~np.isfinite(self.values)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise DataError(
                f"{self.symbol}: feature {self.fields[column].name!r} at {self.timestamps[row].isoformat()}: "
                f"expected a finite number, was {self.values[row, column]}"
            )

    def __len__(self) -> int:
        return len(self.values)

    @property
    def names(self) -> tuple[str, ...]:
        """Column names, in order."""
        return tuple(field.name for field in self.fields)

    def index(self, name: str) -> int:
        """Return the column of a field. Raises: KeyError naming the known fields."""
        if name not in self.names:
            raise KeyError(f"feature {name!r}: expected one of {', '.join(self.names)}")
        return self.names.index(name)

    def rows(self, rows: slice) -> FeatureTable:
        """Return a stretch of rows as a view."""
        return FeatureTable(self.timestamps[rows], self.symbol, self.fields, self.values[rows])


def compute_features(bars: pd.DataFrame, bars_per_year: int, symbol: str) -> FeatureTable:
    """Return one row per bar from the LOOKBACK-th bar on.

    Args: bars as `data.bars.validate_bars` returns them; bars_per_year annualises volatility.
    Raises: HistoryError on fewer than LOOKBACK bars; DataError if a feature is not finite.
    """
    if bars_per_year < 1:
        raise ValueError(f"bars_per_year: expected at least 1, was {bars_per_year}")
    if len(bars) < LOOKBACK:
        raise HistoryError(f"{symbol}: features need {LOOKBACK} bars, {len(bars)} available")
    # Copied so that each array is contiguous: strided input could take another code path inside np.log.
    open_, high, low, close, volume = (bars[name].to_numpy(dtype=np.float64, copy=True) for name in COLUMNS)
    num_rows = len(bars) - LOOKBACK + 1
    columns = _market(open_, high, low, close, volume, bars_per_year=bars_per_year) | _signals(close)
    values = np.stack([columns[field.name][-num_rows:] for field in FEATURE_FIELDS], axis=1)
    return FeatureTable(pd.DatetimeIndex(bars.index)[LOOKBACK - 1 :], symbol, FEATURE_FIELDS, values)


def latest_features(bars: pd.DataFrame, bars_per_year: int, symbol: str) -> FeatureTable:
    """Return the row of the newest bar as a one-row table; reads only the last LOOKBACK bars."""
    return compute_features(bars.iloc[-LOOKBACK:], bars_per_year, symbol)


# Columns differ in length, each ending at the last bar; the caller cuts them to their common tail.
def _market(
    open_: Floats, high: Floats, low: Floats, close: Floats, volume: Floats, *, bars_per_year: int
) -> dict[str, Floats]:
    bar_return, gap = _log_return(close, 1), np.log(open_[1:] / close[:-1])
    year = math.sqrt(bars_per_year)
    return {
        "gap_return": gap,
        "intraday_return": np.log(close / open_),
        **{f"return_{lag}": _log_return(close, lag) for lag in (2, 5, 10, 20)},
        **{f"volatility_{window}": window_std(bar_return, window, ddof=1) * year for window in (5, 20)},
        "range_volatility": _parkinson(high, low) * year,
        "gap_volatility_20": np.sqrt(np.maximum(window_sum(np.square(gap), 20), 0.0) / 20.0) * year,
        "range": np.log(high / low),
        "volume": 0.0 - mean_offset(np.log1p(volume), 20),
        "spread": _corwin_schultz(high, low, close),
    }


def _signals(close: Floats) -> dict[str, Floats]:
    return {
        "momentum_60": _log_return(close, 60),
        "rsi_14": _cutler_rsi(close, 14),
        "macd": _macd(close),
        "bollinger_20": _bollinger(close, 20),
        **{f"ma_distance_{window}": _ma_distance(close, window) for window in (20, 50, 120)},
    }


def _log_return(close: Floats, lag: int) -> Floats:
    return np.log(close[lag:] / close[:-lag])


def _ma_distance(close: Floats, window: int) -> Floats:
    # close / mean = 1 / (1 + offset / close), written so that a constant window is exactly 0.
    return 0.0 - np.log1p(mean_offset(close, window) / close[window - 1 :])


def _bollinger(close: Floats, window: int) -> Floats:
    deviation = window_std(close, window, ddof=0)
    return (0.0 - mean_offset(close, window)) / (2.0 * np.where(deviation > 0.0, deviation, 1.0))


def _cutler_rsi(close: Floats, window: int) -> Floats:
    # Cutler's simple means, because Wilder's smoothing never forgets and so has no finite window.
    change = np.diff(close)
    gain = window_sum(np.maximum(change, 0.0), window)
    loss = window_sum(np.maximum(0.0 - change, 0.0), window)
    moved = gain + loss
    return (gain - loss) / np.where(moved > 0.0, moved, 1.0)


# Weights of an exponential average of the given span, cut to LOOKBACK bars and made to sum to 1; oldest first.
# The cut drops 0.01 % of the weight at span 26.
def _exponential_weights(span: int) -> list[float]:
    decay = 1.0 - 2.0 / (span + 1.0)
    raw = [decay**age for age in reversed(range(LOOKBACK))]
    total = math.fsum(raw)
    return [weight / total for weight in raw]


_MACD_WEIGHTS = [fast - slow for fast, slow in zip(_exponential_weights(12), _exponential_weights(26), strict=True)]


# Span 32 forgets 6 % per bar, as RiskMetrics does (J.P. Morgan 1996).
_VOLATILITY_WEIGHTS = _exponential_weights(32)


def _parkinson(high: Floats, low: Floats) -> Floats:
    """Volatility per bar from the range, averaged exponentially over LOOKBACK bars.

    Parkinson (1980), "The Extreme Value Method for Estimating the Variance of the Rate of Return", Journal of Business
    53(1), equation 8: squared log ranges over 4 log 2 are an estimate of variance five times as precise as squared
    returns. It leaves out the gap between bars.
    """
    variance = np.square(np.log(high / low)) / (4.0 * math.log(2.0))
    average = variance[LOOKBACK - 1 :] + weighted_offset(variance, _VOLATILITY_WEIGHTS)
    return np.sqrt(np.maximum(average, 0.0))


def _macd(close: Floats) -> Floats:
    last = close[LOOKBACK - 1 :]
    volatility = window_std(_log_return(close, 1), 20, ddof=1)[-len(last) :]
    return weighted_offset(close, _MACD_WEIGHTS) / last / np.maximum(volatility, _MIN_BAR_VOLATILITY)


def _corwin_schultz(high: Floats, low: Floats, close: Floats) -> Floats:
    """Spread of each bar with its predecessor, clipped at 0.

    Corwin and Schultz (2012), "A Simple Way to Estimate Bid-Ask Spreads from Daily High and Low Prices",
    Journal of Finance 67(2), equations 14 and 18, with their overnight adjustment: if the bar lies wholly
    above or below the previous close, it is shifted by the distance. 2(e^a - 1)/(1 + e^a) is 2 tanh(a / 2).
    Negative estimates are set to 0, the paper's preferred treatment.
    """
    previous = close[:-1]
    jump = np.maximum(low[1:] - previous, 0.0) + np.minimum(high[1:] - previous, 0.0)
    high_now, low_now = high[1:] - jump, low[1:] - jump
    beta = np.square(np.log(high_now / low_now)) + np.square(np.log(high[:-1] / low[:-1]))
    gamma = np.square(np.log(np.maximum(high_now, high[:-1]) / np.minimum(low_now, low[:-1])))
    denominator = 3.0 - 2.0 * math.sqrt(2.0)
    alpha = (np.sqrt(2.0 * beta) - np.sqrt(beta)) / denominator - np.sqrt(gamma / denominator)
    spread: Floats = np.maximum(2.0 * np.tanh(alpha / 2.0), 0.0)
    return spread
