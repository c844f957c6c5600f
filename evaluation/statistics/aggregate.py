"""Robust summaries over seeds and paths, after Agarwal et al. 2021 (arXiv:2108.13264, rliable).

There every task has training runs of its own, which are resampled task by task, and tasks are fixed. Here one training
run walks all test paths and the paths are a sample too, so whole seeds and whole paths are resampled. Letters: S seeds,
P paths, R resamples.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from evaluation.statistics.crossed import Floats, crossed_mean, finite, seeds_said
from evaluation.statistics.interval import Interval, NotDecidable, t_interval
from evaluation.statistics.sharpe import SAME

BATCH = 1_000_000
"""Resampled scores held in memory at once."""


def interquartile_mean(scores: ArrayLike, *, level: float, resamples: int, seed: int) -> Interval:
    """Mean of the middle half of all scores: less swayed by outliers than the mean, less noisy than the median.

    Seeds and paths are resampled one margin at a time; each margin's variance is scaled by `K / (K - 1)` and widened by
    its t quantile (`t_interval`), since percentiles of a handful of seeds are too narrow.

    Args: scores [S, P >= 2], any finite score per seed and path.
    """
    table = finite("scores", scores, "[S, P]")
    S, P = table.shape
    if P < 2:
        raise NotDecidable(1, "paths", f"expected at least 2 paths to see how they differ, was {P}")
    rng = np.random.default_rng(seed)
    margins = [(_margin(part, resamples, rng), len(part) - 1) for part in (table, table.T) if len(part) > 1]
    method = f"t interval, {P} paths resampled whole{seeds_said(S)}"
    return t_interval(float(_middle(table.reshape(1, -1))[0]), *margins, level=level, method=method)


def probability_of_improvement(a: ArrayLike, b: ArrayLike, *, level: float) -> Interval:
    """Share of seed-path pairs on which `a` scores higher than `b`; ties count half.

    Pairs share their seed and path, where rliable compares every run of one with every run of the other. Where all
    pairs agree there is no spread to estimate from: the bound is exact binomial on the min(S, P) pairs of a diagonal,
    which have no seed or path in common.

    Args: a, b: [S, P >= 2], any finite score; either may have S = 1. Returns: cut off at 0 and 1.
    """
    first, second = finite("a", a, "[S, P]"), finite("b", b, "[S, P]")
    if first.shape[1] != second.shape[1] or (len(first) != len(second) and 1 not in (len(first), len(second))):
        raise ValueError(
            f"a, b: expected the same [S, P], or one seed on a side, was {list(first.shape)} and {list(second.shape)}"
        )
    gap = first - second
    # The same policy at another leverage differs by rounding alone, which is a tie.
    rounding = SAME * max(float(np.abs(first).max()), float(np.abs(second).max()))
    wins = (np.sign(np.where(np.abs(gap) <= rounding, 0.0, gap)) + 1.0) / 2.0
    # Nothing of the resampling but its closed form is used.
    interval = crossed_mean(wins, level=level, resamples=1, seed=0).interval
    if np.ptp(wins) == 0.0 and wins.flat[0] != 0.5:
        S, P = wins.shape
        pairs = P if S == 1 else min(S, P)
        exact = stats.binomtest(round(pairs * wins.flat[0]), pairs).proportion_ci(level, method="exact")
        method = f"exact binomial of {pairs} independent pairs{seeds_said(S)}"
        return Interval(interval.estimate, float(exact.low), float(exact.high), level, method)
    return replace(interval, low=max(interval.low, 0.0), high=min(interval.high, 1.0))


def _margin(part: Floats, resamples: int, rng: np.random.Generator) -> float:
    # Variance of the interquartile mean when the rows are drawn again with replacement.
    if resamples < 2:
        raise ValueError(f"resamples: expected at least 2, was {resamples}")
    K = len(part)
    draws = rng.integers(K, size=(resamples, K))
    batches = np.array_split(draws, 1 + resamples * part.size // BATCH)
    redrawn = np.concatenate([_middle(part[rows].reshape(len(rows), -1)) for rows in batches if len(rows)])
    return float(redrawn.var(ddof=1)) * K / (K - 1)


def _middle(rows: Floats) -> Floats:
    return np.asarray(stats.trim_mean(rows, 0.25, axis=1))
