"""The action table: Hold first, then target positions."""

from __future__ import annotations

import math

import array_api_strict
import numpy as np
import pytest
import torch

from masking import HOLD, ActionTable, RuleError


def test_hold_is_action_zero_and_the_others_are_target_factors() -> None:
    table = ActionTable()
    assert HOLD == 0
    assert table.factors == (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    assert table.num_actions == 7
    assert table.names == (
        "hold", "target 0", "target 0.25", "target 0.5", "target 0.75", "target 1", "target 1.25"
    )  # fmt: skip


def test_target_positions_put_the_position_itself_under_hold() -> None:
    targets = ActionTable().target_positions(np.array([0.3, 0.0]))
    np.testing.assert_array_equal(
        targets, [[0.3, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25], [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25]]
    )


def test_target_of_is_the_chosen_column_of_target_positions() -> None:
    table = ActionTable()
    position = np.full(table.num_actions, 0.3)
    action = np.arange(table.num_actions)
    np.testing.assert_array_equal(table.target_of(action, position), np.diagonal(table.target_positions(position)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_position_keeps_its_dtype_in_every_namespace(dtype: str) -> None:
    for xp in (np, torch, array_api_strict):
        position = xp.asarray([0.3, 1.0], dtype=getattr(xp, dtype))
        action = xp.asarray([0, 6])
        targets = ActionTable().target_positions(position)
        chosen = ActionTable().target_of(action, position)
        assert targets.dtype == chosen.dtype == position.dtype
        expected = [np.asarray(0.3, dtype).item(), 1.25]
        assert [float(value) for value in chosen] == expected


def test_equal_tables_are_equal_however_their_numbers_are_spelled() -> None:
    table = ActionTable((-1, -0.0, 1))
    assert [str(factor) for factor in table.factors] == ["-1.0", "0.0", "1.0"]
    assert table == ActionTable((-1.0, 0, 1.0))


@pytest.mark.parametrize("factors", [("0", "1"), (False, True), (None, 1.0)])
def test_factors_that_are_no_numbers_are_refused(factors: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match="strictly ascending finite numbers"):
        ActionTable(factors)


@pytest.mark.parametrize("factors", [(), (0.5, 0.25), (0.0, 0.0, 1.0), (0.0, math.nan), (math.nan,), (0.0, math.inf),
                                     (0.0, 3.5e38), (-(10**400), 0.0)])  # fmt: skip
def test_factors_that_are_not_ascending_finite_numbers_are_refused(factors: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="strictly ascending finite numbers"):
        ActionTable(factors)


@pytest.mark.parametrize("position", [np.array([1]), np.array([True]), np.array([1.0], dtype=object)])
def test_a_position_that_is_no_floating_number_is_refused(position: np.ndarray) -> None:
    # As an integer, 1.25 would be judged as 1 and pass every limit that 1 passes.
    with pytest.raises(RuleError, match="position: expected floating numbers, was"):
        ActionTable().target_positions(position)
    with pytest.raises(RuleError, match="position: expected floating numbers, was"):
        ActionTable().target_of(np.array([6]), position)


def test_an_integer_tensor_is_refused_as_a_position() -> None:
    with pytest.raises(RuleError, match=r"was torch\.int64"):
        ActionTable().target_positions(torch.tensor([1]))
