"""Masked argmax and max-backup over action values, against plain loops, in NumPy, torch and the strict array API."""

from __future__ import annotations

import math
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from masking import InvalidMaskError, MaskingError
from masking.values import masked_argmax, masked_max

NAN, INF = math.nan, math.inf


def loop(values: np.ndarray, masks: np.ndarray) -> tuple[list[int], list[float]]:
    """The best valid action and its value, row by row; NaN counts as -inf."""
    actions, maxima = [], []
    for value_row, mask_row in zip(values.tolist(), masks.tolist(), strict=True):
        best, most = -1, -INF
        for action, (value, valid) in enumerate(zip(value_row, mask_row, strict=True)):
            known = -INF if math.isnan(value) else value
            if valid and (best < 0 or known > most):
                best, most = action, known
        actions.append(best)
        maxima.append(most)
    return actions, maxima


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    batch, num_actions = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    special = st.sampled_from([0.0, -0.0, 1.0, -1.0, NAN, INF, -INF, 1e30, -1e30])
    values = draw(hnp.arrays(np.float64, (batch, num_actions), elements=special | st.floats(-10, 10)))
    masks = draw(hnp.arrays(np.bool_, (batch, num_actions)))
    masks[np.arange(batch), draw(hnp.arrays(np.int64, batch, elements=st.integers(0, num_actions - 1)))] = True
    return values, masks


# --- golden ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "mask", "action", "value"),
    [
        ([1.0, 3.0, 2.0], [1, 1, 1], 1, 3.0),
        ([1.0, 3.0, 2.0], [1, 0, 1], 2, 2.0),
        ([-5.0, 9.0, -7.0], [1, 0, 1], 0, -5.0),  # every valid value below 0: no fill of zeros may win
        ([-1e30, 0.0, -2e30], [1, 0, 1], 0, -1e30),  # and no large negative fill either
        ([2.0, 2.0, 2.0], [0, 1, 1], 1, 2.0),  # ties: lowest valid index
        ([NAN, -3.0, 0.0], [1, 1, 0], 1, -3.0),  # NaN never wins against a known value
        ([NAN, NAN, 5.0], [1, 1, 0], 0, -INF),
        ([9.0, NAN, NAN], [0, 1, 1], 1, -INF),  # all valid NaN: lowest valid index, not action 0, which is masked
        ([9.0, -INF, -INF], [0, 1, 1], 1, -INF),
        ([INF, INF, -INF], [0, 1, 1], 1, INF),
        ([INF, 4.0, NAN], [0, 1, 0], 1, 4.0),
    ],
)
@pytest.mark.parametrize("namespace", [np, torch, array_api_strict], ids=["numpy", "torch", "strict"])
def test_worked_examples(namespace: Any, values: list[float], mask: list[int], action: int, value: float) -> None:
    rows = namespace.asarray([values], dtype=namespace.float32)
    masks = namespace.asarray([[bool(valid) for valid in mask]])
    best, most = masked_argmax(rows, masks), masked_max(rows, masks)
    assert (tuple(best.shape), int(best[0])) == ((1,), action)
    assert most.dtype == namespace.float32
    assert float(most[0]) == np.float32(value)


# --- properties --------------------------------------------------------------------------------------------------


@given(cases())
def test_both_equal_a_plain_loop(case: tuple[np.ndarray, np.ndarray]) -> None:
    values, masks = case
    actions, maxima = loop(values, masks)
    for backend in (np.asarray, torch.as_tensor):
        assert masked_argmax(backend(values), backend(masks)).tolist() == actions
        assert masked_max(backend(values), backend(masks)).tolist() == maxima


@given(cases(), st.sampled_from([NAN, INF, -INF, 1e300]))
def test_masked_values_do_not_matter_and_inputs_are_left_alone(
    case: tuple[np.ndarray, np.ndarray], other: float
) -> None:
    values, masks = case
    before, changed = values.copy(), np.where(masks, values, other)
    np.testing.assert_array_equal(masked_argmax(values, masks), masked_argmax(changed, masks))
    np.testing.assert_array_equal(masked_max(values, masks), masked_max(changed, masks))
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_is_kept_and_masked_values_get_no_gradient(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, NAN, 3.0], [-2.0, INF, -4.0]], dtype=dtype, requires_grad=True)
    masks = torch.tensor([[True, False, True], [True, False, True]])
    most = masked_max(values, masks)
    most.sum().backward()
    assert most.dtype == dtype
    assert most.tolist() == [3.0, -2.0]
    assert values.grad is not None
    assert values.grad.tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [masked_argmax, masked_max])
@pytest.mark.parametrize("backend", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_wrong_masks_and_values_raise(function: Any, backend: Any) -> None:
    values = backend(np.ones((2, 3)))
    with pytest.raises(InvalidMaskError, match="at least one valid action in every row, not so in 1 of 2 rows"):
        function(values, backend(np.array([[True, True, True], [False, False, False]])))
    with pytest.raises(InvalidMaskError, match="dtype bool"):
        function(values, backend(np.zeros((2, 3))))
    with pytest.raises(InvalidMaskError, match=r"expected shape \[2, 3\]"):
        function(values, backend(np.ones((3, 2), dtype=bool)))
    with pytest.raises(MaskingError, match=r"values: expected floating point \[B, A\], was .*int64"):
        function(backend(np.ones((2, 3), dtype=np.int64)), backend(np.ones((2, 3), dtype=bool)))
    with pytest.raises(MaskingError, match=r"values: expected floating point \[B, A\]"):
        function(values[0], backend(np.ones((2, 3), dtype=bool)))
