from __future__ import annotations

import numpy as np
import pytest

from evaluation import BuyAndHold, Flat, RandomValid, nearest_valid
from masking import ActionTable, InvalidMaskError

TABLE = ActionTable()
HOLD, ZERO, QUARTER, HALF, ALL = 0, 1, 2, 3, 5


def masks(*valid: set[int]) -> np.ndarray:
    return np.array([[action in row for action in range(TABLE.num_actions)] for row in valid])


def state(dynamics, positions: list[float]) -> np.ndarray:
    rows = np.zeros((len(positions), len(dynamics.state_names)), np.float32)
    rows[:, dynamics.state_names.index("position")] = positions
    return rows


def test_nearest_valid_takes_the_wanted_position_if_it_is_valid():
    chosen = nearest_valid(1.0, np.array([0.0]), masks({HOLD, HALF, ALL}), TABLE)
    assert chosen.tolist() == [ALL]
    assert chosen.dtype == np.int64


def test_nearest_valid_takes_the_next_best_where_the_mask_forbids_the_wanted_position():
    chosen = nearest_valid(1.0, np.array([0.0, 0.9]), masks({HOLD, ZERO, QUARTER, HALF}, {HOLD, ZERO, HALF}), TABLE)
    assert chosen.tolist() == [HALF, HOLD]


def test_nearest_valid_prefers_hold_to_an_equal_trade_and_lower_to_higher():
    everything = set(range(7))
    assert nearest_valid(0.5, np.array([0.5]), masks(everything), TABLE).tolist() == [HOLD]
    # 0.25 and 0.75 are equally far from 0.5, and the position 2 is farther.
    assert nearest_valid(0.5, np.array([2.0]), masks({HOLD, QUARTER, 4}), TABLE).tolist() == [QUARTER]


def test_nearest_valid_does_not_trade_to_repair_float32_rounding():
    almost = np.array([np.nextafter(np.float32(0.75), np.float32(0))])
    assert nearest_valid(0.75, almost, masks(set(range(7))), TABLE).tolist() == [HOLD]


def test_nearest_valid_accepts_one_target_per_row():
    chosen = nearest_valid(np.array([0.0, 1.0]), np.array([0.5, 0.5]), masks(set(range(7)), set(range(7))), TABLE)
    assert chosen.tolist() == [ZERO, ALL]


def test_nearest_valid_holds_where_the_position_is_unknown():
    assert nearest_valid(1.0, np.array([np.nan]), masks(set(range(7))), TABLE).tolist() == [HOLD]


def test_nearest_valid_refuses_malformed_input():
    with pytest.raises(InvalidMaskError, match="dtype bool"):
        nearest_valid(1.0, np.zeros(1), np.ones((1, 7)), TABLE)
    with pytest.raises(InvalidMaskError, match="Hold"):
        nearest_valid(1.0, np.zeros(1), np.zeros((1, 7), bool), TABLE)
    with pytest.raises(ValueError, match=r"positions: expected \[B\], was \[1, 1\]"):
        nearest_valid(1.0, np.zeros((1, 1)), np.ones((1, 7), bool), TABLE)
    with pytest.raises(ValueError, match=r"target: expected a number or \[2\], was \[3\]"):
        nearest_valid(np.zeros(3), np.zeros(2), np.ones((2, 7), bool), TABLE)


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
