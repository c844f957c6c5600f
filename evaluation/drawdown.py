"""How sure a maximum drawdown is. Letters: S training seeds, P independent paths, n bars."""

from __future__ import annotations

import numpy as np
from arch.bootstrap import StationaryBootstrap
from numpy.typing import ArrayLike, NDArray

from evaluation.statistics.crossed import crossed_mean, finite
from evaluation.statistics.influence import block_length
from evaluation.statistics.interval import Interval


def drawdown_interval(returns: ArrayLike, *, level: float, resamples: int, seed: int) -> Interval:
    """Two-sided interval of the mean maximum drawdown over seeds and paths, fraction of the all-time peak.

    Of several paths the t interval of `crossed_mean`. One path has one drawdown: its bars are drawn anew in
    stationary blocks (Politis and Romano 1994), all seeds together, and the percentiles say what drawdowns a market of
    these bars brings. They need not lie around the one that came: a trend longer than a block is broken up.

    Args: returns [S, P, n], simple return per bar.
    Raises: ValueError on shape, NaN, a return of -1 or less, `level` or `resamples`; NotDecidable on fewer bars than
        two blocks.
    """
    values = finite("returns", returns, "[S, P, n]")
    if not (values > -1.0).all():
        raise ValueError(f"returns: expected numbers above -1, was {values.min():g}: the account lost more than it had")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a number between 0 and 1, was {level}")
    if resamples < 2:
        raise ValueError(f"resamples: expected at least 2, was {resamples}")
    growth = np.log1p(values)
    S, P, n = growth.shape
    if P > 1:
        return crossed_mean(_drawdowns(growth), level=level, resamples=resamples, seed=seed).interval
    series = growth[:, 0]
    mean = series.mean(axis=0)
    # A drawdown feeds on trends and on clustered volatility: the longer of the two memories sets the blocks.
    block = max(block_length(memory - memory[0], None) for memory in (mean, mean**2))
    rng = np.random.default_rng(seed)
    bootstrap = StationaryBootstrap(block, np.arange(n), seed=rng)
    redrawn = np.empty(resamples)
    for resample in range(resamples):
        drawn = rng.integers(S, size=S)
        redrawn[resample] = _drawdowns(series[:, bootstrap.update_indices()])[drawn].mean()
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(redrawn, [tail, 1.0 - tail])
    return Interval(
        estimate=float(_drawdowns(series).mean()),
        low=float(low),
        high=float(high),
        level=level,
        method=f"percentiles, stationary block bootstrap of {n} bars in blocks of {block:.1f}, {S} seed{'s' * (S > 1)}",
        standard_error=float(redrawn.std(ddof=1)),
    )


# [..., n] log returns -> [...].
def _drawdowns(growth: NDArray[np.float64]) -> NDArray[np.float64]:
    height = np.cumsum(growth, axis=-1)
    peak = np.maximum(np.maximum.accumulate(height, axis=-1), 0.0)
    deepest: NDArray[np.float64] = (height - peak).min(axis=-1)
    return -np.expm1(deepest)
