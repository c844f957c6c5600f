"""Sliding-window reductions whose result does not depend on how many windows are computed at once.

NumPy's own reductions choose their summation order by memory layout, so the mean of a window inside a long
history can differ in the last bit from the mean of the same window alone. Here a window is reduced by one
elementwise pass per lag, oldest first: the order is fixed, a live row equals its offline row bit for bit,
and the memory stays at one array of results.

Everything is measured relative to the window's last value, so a constant window gives exactly 0.
In shapes N is the number of values and W the window; results have N - W + 1 rows, one per full window.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def window_sum(values: Floats, window: int) -> Floats:
    """Sum over each window. values [N] -> [N-W+1]."""
    count = len(values) - window + 1
    total = np.zeros(count)
    for lag in range(window):
        total += values[lag : lag + count]
    return total


def mean_offset(values: Floats, window: int) -> Floats:
    """Mean of each window minus its last value; exactly 0 if constant. values [N] -> [N-W+1]."""
    return weighted_offset(values, [1.0] * window) / window


def weighted_offset(values: Floats, weights: Sequence[float]) -> Floats:
    """Weighted sum over each window of the differences from its last value.

    Args: values [N]; weights [W], oldest first.
    Returns: [N-W+1]; exactly 0 for a constant window.
    """
    window = len(weights)
    count = len(values) - window + 1
    last = values[window - 1 :]
    total = np.zeros(count)
    for lag, weight in enumerate(weights):
        total += weight * (values[lag : lag + count] - last)
    return total


def window_std(values: Floats, window: int, ddof: int) -> Floats:
    """Two-pass standard deviation of each window; exactly 0 if constant. values [N] -> [N-W+1]."""
    count = len(values) - window + 1
    last = values[window - 1 :]
    mean = mean_offset(values, window)
    total = np.zeros(count)
    for lag in range(window):
        total += np.square(values[lag : lag + count] - last - mean)
    return np.sqrt(total / (window - ddof))
