"""Every kind of wrong action mask raises an error that says what was expected."""

from __future__ import annotations

from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch

from masking import InvalidMaskError, validate_action_masks

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
    refused(convert(masks), r"Hold \(action 0\) valid in every row, was False in 2 of 3 rows, first row 1")


def test_a_row_that_forbids_hold_is_refused() -> None:
    refused(np.array([[False, True, True]]), "was False in 1 of 1 rows, first row 0")


def test_inverted_masks_are_refused_because_they_forbid_hold() -> None:
    refused(~VALID, "was False in 2 of 2 rows")


def test_a_square_transposed_mask_is_refused_where_it_forbids_hold() -> None:
    square = np.array([[True, True, True], [True, False, False], [True, False, False]])
    assert validate_action_masks(square.T.copy(), num_actions=3) is not None  # symmetric: the same mask
    refused(np.array([[True, False, False], [True, True, True], [True, True, True]]).T, "Hold")
