"""Every kind of wrong action mask raises an error that says what was expected."""

from __future__ import annotations

from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch

from masking import InvalidActionError, InvalidMaskError, MaskingError, valid_actions, validate_action_masks

VALID = np.array([[True, False, True], [True, True, False]])
NAMESPACES = {"numpy": np.asarray, "torch": torch.as_tensor, "strict": array_api_strict.asarray}


def refused(masks: Any, message: str, **expected: Any) -> None:
    with pytest.raises(InvalidMaskError, match=message):
        validate_action_masks(masks, **{"num_actions": 3, **expected})


@pytest.mark.parametrize("convert", NAMESPACES.values(), ids=NAMESPACES)
def test_valid_masks_come_back_unchanged(convert: Any) -> None:
    masks = convert(VALID)
    assert validate_action_masks(masks, num_actions=3) is masks
    assert validate_action_masks(masks, num_actions=3, batch=2) is masks


@pytest.mark.parametrize("convert", NAMESPACES.values(), ids=NAMESPACES)
@pytest.mark.parametrize(
    ("masks", "dtype"),
    [
        (np.array([[1, 0, 1]]), "int64"),
        (np.array([[1, 0, 1]], dtype=np.int8), "int8"),
        (np.array([[1, 0, 1]], dtype=np.uint8), "uint8"),
        (np.array([[1.0, 0.0, 1.0]]), "float64"),
        (np.array([[1.0, 0.0, 1.0]], dtype=np.float32), "float32"),
        (np.array([[0.0, -np.inf, 0.0]]), "float64"),
        (np.array([[np.nan, 1.0, 1.0]]), "float64"),
    ],
    ids=["int64 0/1", "int8 0/1", "uint8 0/1", "float 0/1", "float32 0/1", "additive", "NaN"],
)
def test_masks_that_are_not_bool_are_refused(convert: Any, masks: np.ndarray, dtype: str) -> None:
    refused(convert(masks), f"expected dtype bool with True = valid, was {dtype}")


def test_masks_of_python_objects_are_refused() -> None:
    refused(np.array([[True, None, True]], dtype=object), "expected dtype bool with True = valid, was object")


@pytest.mark.parametrize("masks", [[[True, False, True]], None, True, "mask"])
def test_masks_that_are_not_arrays_are_refused(masks: Any) -> None:
    refused(masks, r"expected a bool array \[B, 3\], was <class")


@pytest.mark.parametrize("convert", NAMESPACES.values(), ids=NAMESPACES)
@pytest.mark.parametrize(
    ("masks", "shape"),
    [
        (VALID.T, r"\[3, 2\]"),
        (VALID[0], r"\[3\]"),
        (VALID[None], r"\[1, 2, 3\]"),
        (VALID[:, :2], r"\[2, 2\]"),
        (np.ones((2, 4), dtype=bool), r"\[2, 4\]"),
    ],
    ids=["transposed", "one row", "three axes", "an action short", "an action more"],
)
def test_masks_of_another_shape_are_refused(convert: Any, masks: np.ndarray, shape: str) -> None:
    refused(convert(masks.copy()), rf"expected shape \[B, 3\], was {shape}")


def test_masks_of_another_batch_are_refused() -> None:
    refused(VALID, r"expected shape \[4, 3\], was \[2, 3\]", batch=4)


@pytest.mark.parametrize("convert", NAMESPACES.values(), ids=NAMESPACES)
def test_a_row_without_any_valid_action_is_refused(convert: Any) -> None:
    masks = np.array([[True, False, True], [False, False, False], [False, False, False]])
    refused(convert(masks), r"the safe action 0 valid in every row, not so in 2 of 3 rows, first row 1")


def test_a_row_that_forbids_hold_is_refused() -> None:
    refused(np.array([[False, True, True]]), "not so in 1 of 1 rows, first row 0; are they inverted")


def test_inverted_masks_are_refused_because_they_forbid_hold() -> None:
    refused(~VALID, "not so in 2 of 2 rows")


def test_a_square_transposed_mask_is_refused_where_it_forbids_hold() -> None:
    square = np.array([[True, True, True], [True, False, False], [True, False, False]])
    assert validate_action_masks(square.T.copy(), num_actions=3) is not None  # symmetric: the same mask
    refused(np.array([[True, False, False], [True, True, True], [True, True, True]]).T, "safe action 0")


def test_without_a_safe_action_one_valid_action_per_row_is_enough() -> None:
    masks = np.array([[False, True, True], [False, False, True]])
    assert validate_action_masks(masks, num_actions=3, safe_action=None) is masks
    masks[1] = False
    refused(masks, r"at least one valid action in every row, not so in 1 of 2 rows, first row 1", safe_action=None)


@pytest.mark.parametrize("convert", NAMESPACES.values(), ids=NAMESPACES)
def test_flat_masks_are_judged_dimension_by_dimension(convert: Any) -> None:
    masks = np.array([[True, False, False, True, True]])
    options = {"num_actions": (2, 3), "safe_action": (0, 1)}
    assert validate_action_masks(convert(masks), **options) is not None
    masks[0, 3] = False
    refused(convert(masks), "the safe action 1 valid in every row of dimension 1, not so in 1 of 1 rows", **options)
    masks[0, 2:] = False
    refused(
        convert(masks), "at least one valid action in every row of dimension 1", num_actions=(2, 3), safe_action=None
    )
    refused(convert(masks[:, :4]), r"expected shape \[B, 5\], was \[1, 4\]", **options)


@pytest.mark.parametrize(
    ("num_actions", "safe_action", "message"),
    [
        (3, 7, "expected 0 to 2 or None, was 7"),
        (3, -1, "expected 0 to 2 or None, was -1"),
        (3, "a", "expected 0 to 2 or None, was 'a'"),
        (3, 1.0, "expected 0 to 2 or None, was 1.0"),
        (3, (0, 0), r"expected one action or 1 of them, was \(0, 0\)"),
        ((1, 2), 1, "expected 0 to 0 or None, was 1"),
        ((1, 2), (0, 2), r"expected 0 to 1 or None, was \(0, 2\)"),
        ((1, 2), (0, 0, 0), "expected one action or 2 of them"),
    ],
)
def test_a_safe_action_that_does_not_exist_is_refused(num_actions: Any, safe_action: Any, message: str) -> None:
    with pytest.raises(MaskingError, match=f"^safe_action: {message}"):
        validate_action_masks(np.ones((2, 3), dtype=bool), num_actions=num_actions, safe_action=safe_action)


@pytest.mark.parametrize("safe_action", [np.int64(0), [0], np.array([0])])
def test_a_safe_action_may_be_a_numpy_number_or_a_sequence_of_one(safe_action: Any) -> None:
    assert validate_action_masks(VALID, num_actions=3, safe_action=safe_action) is VALID


def test_a_caller_without_a_safe_action_is_not_told_to_declare_none() -> None:
    masks = np.zeros((1, 3), dtype=bool)
    refused(masks, "first row 0; are they inverted\\? An environment without Hold declares a safe_action")
    refused(masks, "first row 0$", safe_action=None)


def test_a_transposed_mask_is_named_as_such() -> None:
    refused(VALID.T.copy(), r"expected shape \[B, 3\], was \[3, 2\]; it looks transposed")


def test_actions_of_several_dimensions_are_judged_under_flat_masks() -> None:
    masks = np.array([[True, False, False, True, True]])
    for dtype in (np.int8, np.uint64, np.int64):
        assert valid_actions(np.array([[0, 2]], dtype=dtype), masks, (2, 3)).tolist() == [True]
        assert valid_actions(np.array([[1, 2]], dtype=dtype), masks, (2, 3)).tolist() == [False]
        assert valid_actions(np.array([[0, 0]], dtype=dtype), masks, (2, 3)).tolist() == [False]
    assert valid_actions(np.array([[0, 3]]), masks, (2, 3)).tolist() == [False]
    assert valid_actions(np.array([[0, -1]]), masks, (2, 3)).tolist() == [False]
    with pytest.raises(InvalidActionError, match=r"action_masks: expected \[B, 6\], was \[1, 5\]"):
        valid_actions(np.array([[0, 2]]), masks, (3, 3))
