"""Scaler: golden numbers, and the same obs in NumPy, torch, the strict array API and an exported graph."""

import json
from pathlib import Path

import array_api_strict
import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data.errors import DataError
from data.fields import Field
from data.files import canonical_json
from data.scaler import Scaler


class ScalerModule(torch.nn.Module):
    """What the exported policy does with its scaler."""

    def __init__(self, scaler: Scaler) -> None:
        super().__init__()
        self.scaler = scaler

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.scaler(state)


def fitted() -> Scaler:
    values = np.random.default_rng(0).normal(size=(500, 3)) * [1.0, 1e-4, 1e6] + [0.0, 0.5, -3e6]
    account = Scaler.with_fixed([Field("position", "account", "of equity", 0.0, 1.25, "")])
    return Scaler.concat([Scaler.fit(values, ("a", "b", "c")), account])


def some_states(num_rows: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    states = rng.normal(size=(num_rows, 4)) * [3.0, 3e-4, 3e6, 1.0] + [0.0, 0.5, -3e6, 0.5]
    return states.astype(np.float32)


def test_quantile_range_becomes_minus_one_to_one() -> None:
    # 0..100: the 1 % quantile is 1, the 99 % quantile 99: centre 50, half width 49
    scaler = Scaler.fit(np.arange(101.0)[:, None], ("a",))
    state = np.array([[1.0], [50.0], [99.0], [74.5], [0.0], [1e9], [-np.inf]], dtype=np.float32)
    assert scaler(state)[:, 0].tolist() == [-1.0, 0.0, 1.0, 0.5, -1.0, 1.0, -1.0]


def test_quantiles_are_arguments() -> None:
    scaler = Scaler.fit(np.arange(101.0)[:, None], ("a",), low_q=0.1, high_q=0.5)
    assert (scaler.centre[0], scaler.scale[0]) == (30.0, 20.0)
    with pytest.raises(ValueError, match=r"expected 0 <= low_q < high_q <= 1, was 0\.9, 0\.1"):
        Scaler.fit(np.arange(101.0)[:, None], ("a",), low_q=0.9, high_q=0.1)


@pytest.mark.parametrize("width", [0.0, 1e-40])
def test_column_without_range_keeps_its_unit(width: float) -> None:
    values = np.linspace(0.25 - width, 0.25 + width, 50)[:, None]
    scaler = Scaler.fit(values, ("a",))
    assert (scaler.centre[0], scaler.scale[0]) == (0.25, 1.0)
    assert scaler(np.array([[0.25], [0.75]], dtype=np.float32))[:, 0].tolist() == [0.0, 0.5]


def test_fixed_columns_use_the_bounds_of_their_field() -> None:
    fields = [
        Field("position", "account", "of equity", 0.0, 1.25, ""),
        Field("return", "account", "log return", -0.5, 0.5, ""),
    ]
    scaler = Scaler.with_fixed(fields)
    assert scaler.names == ("position", "return")
    assert scaler(np.array([[1.25, -0.5], [0.625, 0.25]], dtype=np.float32)).tolist() == [[1.0, -1.0], [0.0, 0.5]]


def test_fixed_column_without_bounds_is_refused() -> None:
    with pytest.raises(DataError, match=r"field 'a': expected finite bounds, was \[0.0, inf\]"):
        Scaler.with_fixed([Field("a", "account", "1", 0.0, np.inf, "")])


def test_concat_keeps_order_and_refuses_a_repeated_name() -> None:
    assert fitted().names == ("a", "b", "c", "position")
    with pytest.raises(DataError, match="column 'a': expected once, was 2 times"):
        Scaler.concat([fitted(), fitted()])
    with pytest.raises(ValueError, match="expected at least one scaler"):
        Scaler.concat([])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_training_values_that_are_not_finite_are_refused_by_column(bad: float) -> None:
    values = np.zeros((10, 3))
    values[4, 1] = bad
    with pytest.raises(DataError, match="column 'b': expected finite values only"):
        Scaler.fit(values, ("a", "b", "c"))


def test_fit_refuses_no_rows_and_wrong_width() -> None:
    with pytest.raises(DataError, match="expected at least one row, was 0"):
        Scaler.fit(np.zeros((0, 2)), ("a", "b"))
    with pytest.raises(ValueError, match=r"expected values \[T, 2\], was \[5, 3\]"):
        Scaler.fit(np.zeros((5, 3)), ("a", "b"))


@settings(deadline=None, derandomize=True)
@given(
    values=arrays(np.float64, (20, 2), elements=st.floats(-1e30, 1e30)),
    state=arrays(np.float32, (5, 2), elements=st.floats(width=32, allow_nan=False)),
)
def test_obs_never_leaves_minus_one_to_one(values: np.ndarray, state: np.ndarray) -> None:
    with np.errstate(over="ignore"):  # the largest floats overflow in the subtraction and are clipped
        obs = Scaler.fit(values, ("a", "b"))(state)
    assert obs.dtype == np.float32
    assert (np.abs(obs) <= 1.0).all()


def test_nan_stays_nan_for_the_decision_to_see() -> None:
    state = some_states(2)
    state[1, 2] = np.nan
    obs = fitted()(state)
    assert np.isnan(obs).sum() == 1
    assert torch.isnan(fitted()(torch.from_numpy(state))).sum() == 1


def test_numpy_torch_and_strict_array_api_agree_to_the_bit() -> None:
    state, scaler = some_states(1000), fitted()
    expected = scaler(state)
    assert scaler(torch.from_numpy(state)).numpy().tobytes() == expected.tobytes()
    strict = scaler(array_api_strict.asarray(state))
    assert np.asarray(strict).tobytes() == expected.tobytes()
    assert expected.dtype == np.float32
    assert scaler(state[0]).tobytes() == expected[0].tobytes()


def test_input_is_not_changed() -> None:
    state = some_states(5)
    before = state.copy()
    fitted()(state)
    assert np.array_equal(state, before)


def test_traced_program_takes_any_batch_and_agrees_to_the_bit() -> None:
    scaler = fitted()
    program = torch.export.export(
        ScalerModule(scaler),
        (torch.from_numpy(some_states(2)),),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    ).module()
    for num_rows in (1, 3, 100):
        state = some_states(num_rows)
        assert program(torch.from_numpy(state)).numpy().tobytes() == scaler(state).tobytes()


# torch.export warns about its own use of a deprecated call
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
def test_onnx_graph_agrees_to_the_bit(tmp_path: Path) -> None:
    scaler, path = fitted(), tmp_path / "scaler.onnx"
    torch.onnx.export(
        ScalerModule(scaler).eval(),
        (torch.from_numpy(some_states(2)),),
        path,
        dynamo=True,
        external_data=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["state"],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    for num_rows in (1, 100):
        state = some_states(num_rows)
        assert session.run(None, {"state": state})[0].tobytes() == scaler(state).tobytes()


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (np.zeros((2, 3), np.float32), r"expected float32 \[..., 4\], was float32 \[2, 3\]"),
        (np.zeros((2, 4)), "was float64"),
        (np.zeros((2, 4), np.int64), "was int64"),
        (np.zeros((), np.float32), r"was float32 \[\]"),
        (torch.zeros(2, 4, dtype=torch.float64), "was torch.float64"),
    ],
)
def test_wrong_shape_or_dtype_is_refused(state: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fitted()(state)


def test_json_round_trip_is_exact() -> None:
    scaler = fitted()
    loaded = Scaler.from_dict(json.loads(canonical_json(scaler.to_dict())))
    assert loaded.names == scaler.names
    assert loaded.centre.tobytes() == scaler.centre.tobytes()
    assert loaded.scale.tobytes() == scaler.scale.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"centre": [0.0]},
        {"scale": [1.0, 1.0, 1.0, 0.0]},
        {"scale": [1.0, 1.0, 1.0, -1.0]},
        {"centre": [0.0, 0.0, 0.0, None]},
        {"centre": [[0.0], [0.0], [0.0], [0.0]]},
        {"scale": "abc"},
        {"names": ["a", "a", "b", "c"]},
        {"extra": 1},
    ],
)
def test_foreign_json_is_a_data_error(change: dict[str, object]) -> None:
    with pytest.raises(DataError):
        Scaler.from_dict(fitted().to_dict() | change)


def test_arrays_of_another_dtype_are_a_caller_mistake() -> None:
    with pytest.raises(ValueError, match=r"scaler.scale: expected float32 \[1\], was float64 \[1\]"):
        Scaler(("a",), np.zeros(1, np.float32), np.ones(1))
