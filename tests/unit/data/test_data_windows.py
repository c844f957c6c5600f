"""Order-stable window reductions: golden numbers and independence from the number of windows."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.windows import mean_offset, weighted_offset, window_std, window_sum

WINDOW = 40
"""Longer than the eight accumulators with which NumPy sums a contiguous row: shorter windows prove nothing."""

REDUCTIONS = {
    "sum": lambda x: window_sum(x, WINDOW),
    "mean_offset": lambda x: mean_offset(x, WINDOW),
    "weighted_offset": lambda x: weighted_offset(x, np.linspace(-0.2, 1.0, WINDOW).tolist()),
    "std": lambda x: window_std(x, WINDOW, ddof=1),
}


def test_golden_numbers() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0])
    assert window_sum(values, 2).tolist() == [3.0, 6.0, 12.0]
    # means 7/3 and 14/3, last values 4 and 8
    assert mean_offset(values, 3) == pytest.approx([-5 / 3, -10 / 3], rel=1e-15)
    # 10 * (1 - 2) + 5 * 0 = -10, then -20, -40
    assert weighted_offset(values, [10.0, 5.0]).tolist() == [-10.0, -20.0, -40.0]
    # 1, 2, 4: squared deviations 16/9, 1/9, 25/9 sum to 14/3
    assert window_std(values, 3, ddof=1)[0] == pytest.approx(math.sqrt(7 / 3), rel=1e-15)
    assert window_std(values, 3, ddof=0)[0] == pytest.approx(math.sqrt(14 / 9), rel=1e-15)


@pytest.mark.parametrize("reduction", ["mean_offset", "weighted_offset", "std"])
@pytest.mark.parametrize("level", [0.1, 1 / 3, 4321.09, 1e300, 5e-324])
def test_constant_window_is_exactly_zero(reduction: str, level: float) -> None:
    assert REDUCTIONS[reduction](np.full(WINDOW + 3, level)).tolist() == [0.0] * 4


@pytest.mark.parametrize("reduction", sorted(REDUCTIONS))
@settings(deadline=None, derandomize=True, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 100), spread=st.sampled_from([0.01, 1.0, 10.0]))
def test_a_window_alone_gives_the_same_bits_as_among_many(reduction: str, seed: int, count: int, spread: float) -> None:
    values = np.exp(np.random.default_rng(seed).normal(size=count + WINDOW - 1) * spread)
    together = REDUCTIONS[reduction](values)
    assert len(together) == count
    alone = np.concatenate([REDUCTIONS[reduction](values[i : i + WINDOW].copy()) for i in range(count)])
    assert together.tobytes() == alone.tobytes()
