from __future__ import annotations

import numpy as np
import pytest

from evaluation import BuyAndHold, Flat, RandomValid
from masking import ActionTable, InvalidMaskError

TABLE = ActionTable()
HOLD, ZERO, QUARTER, HALF, ALL = 0, 1, 2, 3, 5


def masks(*valid: set[int]) -> np.ndarray:
    return np.array([[action in row for action in range(TABLE.num_actions)] for row in valid])


def state(dynamics, positions: list[float]) -> np.ndarray:
    rows = np.zeros((len(positions), len(dynamics.state_names)), np.float32)
    rows[:, dynamics.state_names.index("position")] = positions
    return rows


def test_flat_holds_when_flat_and_sells_when_not(make_dynamics):
    dynamics = make_dynamics()
    rows, everything = state(dynamics, [0.0, 0.8]), masks(set(range(7)), set(range(7)))
    assert Flat(dynamics).act(rows, everything).tolist() == [HOLD, ZERO]


def test_buy_and_hold_goes_all_in_and_then_holds(make_dynamics):
    dynamics = make_dynamics()
    rows, everything = state(dynamics, [0.0, 1.0]), masks(set(range(7)), set(range(7)))
    assert BuyAndHold(dynamics).act(rows, everything).tolist() == [ALL, HOLD]


def test_random_valid_is_uniform_over_valid_actions_only():
    rows, allowed = np.zeros((30_000, 3), np.float32), np.tile(masks({HOLD, HALF, ALL}), (30_000, 1))
    chosen = RandomValid(seed=1).act(rows, allowed)
    counts = np.bincount(chosen, minlength=7)
    assert counts[[ZERO, QUARTER, 4, 6]].sum() == 0
    # Standard error of a count is 82; the seed is fixed.
    np.testing.assert_allclose(counts[[HOLD, HALF, ALL]], 10_000, atol=330)


def test_random_valid_repeats_with_its_seed_only():
    rows, allowed = np.zeros((100, 3), np.float32), np.ones((100, 7), bool)
    first, again, other = (RandomValid(seed).act(rows, allowed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_random_valid_refuses_a_row_without_hold():
    with pytest.raises(InvalidMaskError, match="Hold"):
        RandomValid(0).act(np.zeros((1, 3), np.float32), np.zeros((1, 7), bool))
