"""The mean of a table of training seeds by test paths, and how far it may be off.

Seeds and paths are crossed random effects, `values[s, p] = mean + seed_s + path_p + residual_sp`; what is estimated is
the mean over *all* seeds and paths, not only over those at hand. Letters: S seeds, P paths, R resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluation.statistics.interval import Interval, NotDecidable, t_interval, widening

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class VarianceComponents:
    """Variances of the effect of one seed, one path and one seed-path cell; unbiased, cut off at zero."""

    seed: float
    """NaN with one seed: nothing is known about others."""
    path: float
    """Of one path of the observed number of bars; for a Sharpe ratio it falls as one over the bars."""
    residual: float
    """Of a seed and a path together; 0 with one seed, where it is part of `path`."""


@dataclass(frozen=True)
class CrossedMean:
    """A mean over seeds and paths."""

    interval: Interval
    samples: Floats
    """Bootstrap distribution [R], for a plot: each margin widened by its t quantile, so as wide as `interval`."""
    components: VarianceComponents


def crossed_mean(values: ArrayLike, *, level: float, resamples: int, seed: int) -> CrossedMean:
    """Mean over seeds and paths, both resampled whole and crossed (pigeonhole bootstrap, Owen 2007).

    Three to ten seeds make percentile intervals too narrow: the interval is `t_interval` over the two margins, and the
    deviations of each resampled margin are scaled by `sqrt(S / (S - 1))` and by its t over the normal quantile. Each
    margin counts whole; the residual,
    part of both, counts twice, which is conservative by `residual / (S P)`. With one seed the interval covers paths
    only and says so.

    Args: values [S, P >= 2], finite.
    Raises: NotDecidable on a single path.
    """
    table = finite("values", values, "[S, P]")
    S, P = table.shape
    if P < 2:
        raise NotDecidable(1, "paths", f"expected at least 2 paths to see how they differ, was {P}")
    rng = np.random.default_rng(seed)
    rows, columns = table.mean(axis=1), table.mean(axis=0)
    mean, between = float(table.mean()), float(columns.var(ddof=1))
    samples = mean + widening(P - 1, level) * resampled_deviations(columns, resamples, rng)
    components = VarianceComponents(math.nan, between, 0.0)
    if S > 1:
        samples = samples + widening(S - 1, level) * resampled_deviations(rows, resamples, rng)
        cells = table - rows[:, None] - columns + mean
        residual = float((cells**2).sum()) / ((S - 1) * (P - 1))
        seeds = float(rows.var(ddof=1)) - residual / P
        components = VarianceComponents(max(seeds, 0.0), max(between - residual / S, 0.0), residual)
    margins = ((between / P, P - 1), *seed_margin(rows))
    method = f"t interval, {P} paths resampled whole{seeds_said(S)}"
    return CrossedMean(t_interval(mean, *margins, level=level, method=method), samples, components)


def seed_margin(rows: Floats) -> tuple[tuple[float, float], ...]:
    """Variance that the spread between seeds' means [S] adds, with its degrees of freedom; nothing with one seed."""
    S = len(rows)
    return ((float(rows.var(ddof=1)) / S, S - 1),) if S > 1 else ()


def seeds_said(S: int) -> str:
    """End of a `method`: what the interval says about seeds."""
    if S > 1:
        return f", crossed with {S} training runs"
    return "; one training run, so it does not cover the spread between runs"


def resampled_deviations(effects: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Deviations [R] of the mean of `effects` [K >= 2] when they are drawn again with replacement.

    Scaled by `sqrt(K / (K - 1))`, so that their variance is the unbiased one of the mean.
    """
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, was {resamples}")
    K = len(effects)
    counts = rng.multinomial(K, np.full(K, 1.0 / K), size=resamples)
    return np.asarray(counts @ (effects - effects.mean()) / math.sqrt(K * (K - 1.0)))


def finite(name: str, values: ArrayLike, shape: str) -> Floats:
    """Return a float array of the rank that `shape` shows, for example "[S, P]".

    Raises: ValueError on another rank, an empty axis, NaN or infinity.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != shape.count(",") + 1 or 0 in array.shape:
        raise ValueError(f"{name}: expected {shape}, was shape {list(array.shape)}")
    if not np.isfinite(array).all():
        at = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(
            f"{name}: expected finite {shape}, was {array[tuple(at)]} at {at}; find out why it is undefined, "
            "do not fill it"
        )
    return array
