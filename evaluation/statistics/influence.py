"""What one bar contributes to a Sharpe ratio, and the error that follows from serially dependent bars."""

from __future__ import annotations

import math

import numpy as np
from arch.bootstrap import optimal_block_length
from arch.covariance.kernel import Parzen
from numpy.typing import NDArray

from evaluation.statistics.interval import NotDecidable

Floats = NDArray[np.float64]

MAX_ROOT = 0.97
"""Largest autoregressive root in prewhitening (Andrews and Monahan 1992)."""


def influence(returns: Floats) -> Floats:
    """First-order contribution of each bar to the Sharpe ratio per bar: `z - ratio / 2 * (z**2 - 1)`, with mean zero.

    z is the standardised return; this is the delta method of Jobson and Korkie (1981) bar by bar, so that any estimator
    of the variance of a mean becomes one of the variance of a Sharpe ratio.

    Args: returns [..., n]. Returns: [..., n], zero for an account that never moves.
    """
    mean, spread = returns.mean(axis=-1, keepdims=True), returns.std(axis=-1, keepdims=True)
    safe = np.where(spread == 0.0, 1.0, spread)
    z = (returns - mean) / safe
    return np.where(spread == 0.0, 0.0, z - mean / safe / 2.0 * (z**2 - 1.0))


def hac_variance(contributions: Floats) -> float:
    """Variance of the mean of serially dependent contributions [n], Ledoit and Wolf (2008).

    An AR(1) whitens, a Parzen kernel with automatic bandwidth (Newey and West 1994, by arch) estimates the long-run
    variance, the AR(1) colours it again; divided by n - 4 as theirs. They filter the four moments by a VAR(1) and
    combine them by the delta method afterwards; here the combination is filtered.
    """
    if not contributions.any():
        return 0.0
    lagged, now = contributions[:-1], contributions[1:]
    root = float(np.clip(lagged @ now / (lagged @ lagged), -MAX_ROOT, MAX_ROOT))
    white = float(Parzen(now - root * lagged).cov.long_run.item())
    return white / (1.0 - root) ** 2 / (len(contributions) - 4)


def block_length(contributions: Floats, block: float | None) -> float:
    """Mean length of the blocks of a stationary bootstrap of contributions [n], bars.

    Args: block: taken if given; None is Politis and White's (2004, corrected 2009), at least 1.
    Raises: NotDecidable on fewer than two blocks of bars.
    """
    n = len(contributions)
    if block is None:
        # A series of zeros has no dependence to keep.
        block = float(optimal_block_length(contributions)["stationary"].iloc[0]) if contributions.any() else 1.0
        block = max(1.0, block)
    if not 1.0 <= block < math.inf:
        raise ValueError(f"block: expected a mean length of at least 1 bar, was {block}")
    if n < 2.0 * block:
        needed = math.ceil(2.0 * block) - n
        raise NotDecidable(needed, "bars", f"expected at least two blocks of {block:.1f} bars, was {n} bars")
    return block
