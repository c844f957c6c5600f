"""How much higher one Sharpe ratio is than another, and how sure that is.

Letters: S training seeds, P independent test paths, n bars, R resamples. Policies are compared in pairs: seed s, path p
and bar t are the same for both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from arch.bootstrap import StationaryBootstrap
from numpy.typing import ArrayLike

from evaluation.statistics.crossed import (
    CrossedMean,
    Floats,
    VarianceComponents,
    crossed_mean,
    finite,
    resampled_deviations,
    seed_margin,
    seeds_said,
)
from evaluation.statistics.influence import block_length, hac_variance, influence
from evaluation.statistics.interval import Interval, NotDecidable, t_interval, widening

MIN_BARS = 30
"""Below this the error of a Sharpe ratio cannot be estimated from its own bars."""

SAME = 1e-6
"""What differs by a smaller share is the same: returns are stored as float32, which keeps seven digits."""

BATCH = 50
"""Resamples of one series held in memory at once: a year of one-minute bars is 100,000 numbers each."""

NO_SPREAD = 1e-12
"""Share of the second moment below which the variance of a resample is rounding."""


@dataclass(frozen=True)
class SharpeDifference:
    """The difference `a - b` of annualised Sharpe ratios, by two methods."""

    interval: Interval
    """Of resampled seeds and paths, or seeds and time on a single path."""
    hac: Interval
    """Cross-check: Ledoit and Wolf's standard error within each path, in place of the resampling."""
    samples: Floats
    """Bootstrap distribution [R] of the difference, for a plot; as wide as `interval` (see `CrossedMean.samples`)."""
    components: VarianceComponents
    correlation: float
    """Mean correlation of the paired returns; NaN where one of them never moves."""
    block: float
    """Mean block length of the time bootstrap, bars; NaN with several paths, which are resampled whole."""
    by_seed: Floats
    """Difference of each training run [S], mean over paths. Intervals suppose roughly normal training luck: five runs
    that all went well do not rule out one in three that fails."""
    seeds: int
    paths: int
    bars: int


def sharpe_by_path(returns: ArrayLike, bars_per_year: float) -> Floats:
    """Annualised Sharpe ratio of each path, `evaluation.sharpe_ratio` over the last axis.

    Args: returns [..., n >= 2], simple return per bar.
    Returns: [...]; 0.0 where every return is zero, NaN where all are equal but not zero or one is NaN.
    """
    values = np.asarray(returns, dtype=np.float64)
    if values.ndim < 1 or values.shape[-1] < 2:
        raise ValueError(f"returns: expected [..., n >= 2], was shape {list(values.shape)}")
    if not 0 < bars_per_year < math.inf:
        raise ValueError(f"bars_per_year: expected a positive number, was {bars_per_year}")
    largest = np.abs(values).max(axis=-1)
    same = np.ptp(values, axis=-1) <= SAME * largest
    spread = np.where(same, math.nan, values.std(axis=-1, ddof=1))
    return np.where(largest == 0.0, 0.0, values.mean(axis=-1) / spread * math.sqrt(bars_per_year))


def sharpe_difference(
    a: ArrayLike,
    b: ArrayLike,
    bars_per_year: float,
    *,
    level: float,
    resamples: int,
    seed: int,
    block: float | None = None,
) -> SharpeDifference:
    """Mean over seeds and paths of `Sharpe(a) - Sharpe(b)`, with a two-sided confidence interval.

    Several paths are resampled whole, crossed with the seeds (`crossed_mean`). Of a single path the bars are resampled
    in stationary blocks (Politis and Romano 1994), for both policies and all seeds together, because they saw the same
    market; the seeds are resampled as well. There the spread between seeds counts whole, although part of it is the
    noise of their bars, and the interval is wider than it need be if seeds differ by nothing else.

    Args:
        a, b: simple returns per bar, [S, P, n]; either may have S = 1 (a policy without training) and is paired with
            every seed of the other.
        block: mean block length for a single path, bars; None takes Politis and White's of the difference.
    Raises: ValueError on wrong shapes, NaN, and returns without a Sharpe ratio; NotDecidable on fewer than 30 bars, or
        fewer than two blocks.
    """
    a, b = _paired(a, b)
    A, B = _ratios("a", a, bars_per_year), _ratios("b", b, bars_per_year)
    # The same policy at another leverage differs by the rounding of its float32 returns alone, which no interval may
    # take for a finding; absolute as well, since a mean near zero is rounded as coarsely as a large one.
    D = np.where(np.isclose(A, B, rtol=SAME, atol=SAME), 0.0, A - B)
    S, P = D.shape
    # To first order D is the mean of these; averaged over seeds, which share the market of their path.
    contributions = (influence(a) - influence(b)).mean(axis=0) * math.sqrt(bars_per_year)
    if P > 1:
        length = math.nan
        resampled = crossed_mean(D, level=level, resamples=resamples, seed=seed)
    else:
        length = block_length(contributions[0], block)
        resampled = _over_time(a[:, 0], b[:, 0], D[:, 0], bars_per_year, length, level, resamples, seed)
    within = sum(hac_variance(path) for path in contributions) / P**2
    hac = t_interval(
        float(D.mean()),
        (within, math.inf),
        *seed_margin(D.mean(axis=1)),
        level=level,
        method=f"t interval, Ledoit-Wolf HAC error within {f'{P} paths' if P > 1 else 'the series'}{seeds_said(S)}",
    )
    return SharpeDifference(
        interval=resampled.interval,
        hac=hac,
        samples=resampled.samples,
        components=resampled.components,
        correlation=_correlation(a, b),
        block=length,
        by_seed=D.mean(axis=1),
        seeds=S,
        paths=P,
        bars=a.shape[-1],
    )


def _over_time(
    a: Floats, b: Floats, D: Floats, bars_per_year: float, block: float, level: float, resamples: int, seed: int
) -> CrossedMean:
    S, n = len(D), a.shape[-1]
    if resamples < 2:
        raise ValueError(f"resamples: expected at least 2, was {resamples}")
    rng = np.random.default_rng(seed)
    bootstrap = StationaryBootstrap(block, np.arange(n), seed=rng)
    batches = []
    for first in range(0, resamples, BATCH):
        draws = range(min(BATCH, resamples - first))
        counts = np.stack([np.bincount(bootstrap.update_indices(), minlength=n) for _ in draws]).astype(float)
        batches.append(_resampled_ratios(counts, a, bars_per_year) - _resampled_ratios(counts, b, bars_per_year))
    redrawn = np.concatenate(batches)
    mean = redrawn.mean(axis=1)
    # As many independent pieces as there are blocks.
    pieces = n / block - 1.0
    between, samples = float(mean.var(ddof=1)), D.mean() + widening(pieces, level) * (mean - mean.mean())
    components = VarianceComponents(math.nan, between, 0.0)
    if S > 1:
        samples = samples + widening(S - 1, level) * resampled_deviations(D, resamples, rng)
        residual = float((redrawn - mean[:, None]).var(axis=0, ddof=1).mean()) * S / (S - 1)
        seeds = max(float(D.var(ddof=1)) - residual, 0.0)
        components = VarianceComponents(seeds, max(between - residual / S, 0.0), residual)
    margins = ((between, pieces), *seed_margin(D))
    method = f"t interval, stationary bootstrap of {n} bars in blocks of {block:.1f}{seeds_said(S)}"
    return CrossedMean(t_interval(float(D.mean()), *margins, level=level, method=method), samples, components)


def _resampled_ratios(counts: Floats, returns: Floats, bars_per_year: float) -> Floats:
    # [R, S] from how often each bar was drawn [R, n] and returns [S, n]. A Sharpe ratio needs the sums of r and r^2
    # alone, which are matrix products; around the mean, so that the squares do not cancel.
    n = returns.shape[-1]
    centre = returns.mean(axis=-1)
    deviation = (returns - centre[:, None]).T
    mean, square = counts @ deviation / n, counts @ deviation**2 / n
    variance = (square - mean**2) * n / (n - 1)
    still = counts @ (returns != 0.0).T == 0.0
    if np.any((variance <= NO_SPREAD * square) & ~still):
        raise NotDecidable(n, "bars", "some resamples of the bars hold one return only and have no Sharpe ratio")
    ratios = (mean + centre) / np.sqrt(np.where(still, 1.0, variance)) * math.sqrt(bars_per_year)
    return np.where(still, 0.0, ratios)


def _correlation(a: Floats, b: Floats) -> float:
    a, b = a - a.mean(axis=-1, keepdims=True), b - b.mean(axis=-1, keepdims=True)
    scale = np.sqrt((a**2).mean(axis=-1) * (b**2).mean(axis=-1))
    moving = scale > 0.0
    return float(((a * b).mean(axis=-1)[moving] / scale[moving]).mean()) if moving.any() else math.nan


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    first, second = finite("a", a, "[S, P, n]"), finite("b", b, "[S, P, n]")
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"a, b: expected the same paths and bars, was [P, n] = {list(first.shape[1:])} and "
            f"{list(second.shape[1:])}; policies are compared on identical bars"
        )
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise ValueError(
            f"a, b: expected the same seeds, or one on a side, was {len(first)} and {len(second)}; seeds are paired"
        )
    n = first.shape[-1]
    if n < MIN_BARS:
        raise NotDecidable(MIN_BARS - n, "bars", f"expected at least {MIN_BARS} bars of each path, was {n}")
    return first, second


def _ratios(name: str, returns: Floats, bars_per_year: float) -> Floats:
    ratios = sharpe_by_path(returns, bars_per_year)
    if np.isnan(ratios).any():
        at = np.argwhere(np.isnan(ratios))[0].tolist()
        raise ValueError(
            f"{name}: expected returns that vary, was the same nonzero return on every bar at [seed, path] = {at}; "
            "no Sharpe ratio exists"
        )
    return ratios
