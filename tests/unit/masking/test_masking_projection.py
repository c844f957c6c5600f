"""The nearest valid action to a wanted position: golden rows, and a plain loop under any masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from masking import TOLERANCE, ActionTable, InvalidMaskError, nearest_valid

TABLE = ActionTable()
HOLD, ZERO, QUARTER, HALF, THREE_QUARTERS, ALL = range(6)
EVERYTHING = set(range(7))


def masks(*valid: set[int]) -> np.ndarray:
    return np.array([[action in row for action in range(TABLE.num_actions)] for row in valid])


@pytest.mark.parametrize(
    ("target", "position", "valid", "expected"),
    [
        (1.0, 0.0, {HOLD, HALF, ALL}, ALL),
        # Where the mask forbids the wanted position, the next best; Hold where that is nearer.
        (1.0, 0.0, {HOLD, ZERO, QUARTER, HALF}, HALF),
        (1.0, 0.9, {HOLD, ZERO, HALF}, HOLD),
        # Ties: Hold before a trade, the lower target before the higher.
        (0.5, 0.5, EVERYTHING, HOLD),
        (0.5, 2.0, {HOLD, QUARTER, THREE_QUARTERS}, QUARTER),
        # Rounding of a float32 position is no reason to trade.
        (0.75, float(np.nextafter(np.float32(0.75), np.float32(0))), EVERYTHING, HOLD),
        # What is not known holds.
        (1.0, math.nan, EVERYTHING, HOLD),
        (math.nan, 0.5, EVERYTHING, HOLD),
    ],
)
def test_one_row(target: float, position: float, valid: set[int], expected: int) -> None:
    chosen = nearest_valid(target, np.array([position]), masks(valid), TABLE)
    assert chosen.tolist() == [expected]
    assert chosen.dtype == np.int64


def test_each_row_has_its_own_target() -> None:
    chosen = nearest_valid(np.array([0.0, 1.0]), np.array([0.5, 0.5]), masks(EVERYTHING, EVERYTHING), TABLE)
    assert chosen.tolist() == [ZERO, ALL]


@given(
    st.lists(
        st.tuples(
            st.floats(-2, 2), st.floats(-2, 2, width=32), st.sets(st.integers(1, 6)).map(lambda some: some | {0})
        ),
        min_size=1,
        max_size=8,
    )
)
def test_no_valid_action_is_nearer_than_the_chosen_one(rows: list[tuple[float, float, set[int]]]) -> None:
    targets, positions, valid = zip(*rows, strict=True)
    chosen = nearest_valid(np.array(targets), np.array(positions, np.float32), masks(*valid), TABLE)
    for (target, position, allowed), action in zip(rows, chosen.tolist(), strict=True):
        distance = {other: abs((position if other == HOLD else TABLE.factors[other - 1]) - target) for other in allowed}
        assert action in allowed
        assert distance[action] <= min(distance.values()) + TOLERANCE
        assert all(distance[other] > min(distance.values()) + TOLERANCE for other in allowed if other < action)


def test_malformed_input_is_refused() -> None:
    with pytest.raises(InvalidMaskError, match="dtype bool"):
        nearest_valid(1.0, np.zeros(1), np.ones((1, 7)), TABLE)
    with pytest.raises(InvalidMaskError, match="Hold"):
        nearest_valid(1.0, np.zeros(1), np.zeros((1, 7), bool), TABLE)
    with pytest.raises(ValueError, match=r"positions: expected \[B\], was \[1, 1\]"):
        nearest_valid(1.0, np.zeros((1, 1)), np.ones((1, 7), bool), TABLE)
    with pytest.raises(ValueError, match=r"target: expected a number or \[2\], was \[3\]"):
        nearest_valid(np.zeros(3), np.zeros(2), np.ones((2, 7), bool), TABLE)
