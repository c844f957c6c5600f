"""The codec of the Open Inference Protocol: both encodings say the same, and nothing malformed gets through."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.http.inference import (
    Inference,
    InferenceRequest,
    InferenceRequestError,
    TensorSpec,
    check_outputs,
    read_inference,
    write_inference,
)

INPUTS = (TensorSpec("state", "FP32", 3), TensorSpec("masks", "BOOL", 2, optional=True))
OUTPUTS = (TensorSpec("action", "INT64"), TensorSpec("value", "FP32"), TensorSpec("masks", "BOOL", 2))
MAX_BATCH = 4
STATE = np.array([[1.5, -2.0, 3.25], [0.1, 1e30, -0.0]], dtype=np.float32)
MASKS = np.array([[True, False], [False, True]])


def tensor(name: str, datatype: str, array: npt.NDArray[Any], **changes: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(array.shape), "datatype": datatype, "data": array.ravel().tolist()} | changes


def json_request(*tensors: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"inputs": tensors, **more}).encode()


def binary_request(
    arrays: dict[str, tuple[str, npt.NDArray[Any]]], sizes: dict[str, Any] | None = None, tail: bytes = b""
) -> tuple[bytes, bytes]:
    inputs = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": datatype,
            "parameters": {"binary_data_size": (sizes or {}).get(name, array.nbytes)},
        }
        for name, (datatype, array) in arrays.items()
    ]
    head = json.dumps({"inputs": inputs}).encode()
    return head + b"".join(array.tobytes() for _, array in arrays.values()) + tail, str(len(head)).encode()


def read(body: bytes, header_length: bytes | None = None) -> Inference:
    return read_inference(body, header_length, INPUTS, MAX_BATCH)


def refused(body: bytes, header_length: bytes | None = None) -> str:
    with pytest.raises(InferenceRequestError) as caught:
        read(body, header_length)
    return str(caught.value)


def test_json_and_binary_tensors_are_the_same_arrays() -> None:
    flat = read(json_request(tensor("state", "FP32", STATE), tensor("masks", "BOOL", MASKS)))
    nested = read(json_request(tensor("state", "FP32", STATE, data=STATE.tolist()), tensor("masks", "BOOL", MASKS)))
    binary = read(*binary_request({"masks": ("BOOL", MASKS), "state": ("FP32", STATE)}))
    for inference in (flat, nested, binary):
        np.testing.assert_array_equal(inference.arrays["state"], STATE)
        np.testing.assert_array_equal(inference.arrays["masks"], MASKS)
        assert {name: array.dtype for name, array in inference.arrays.items()} == {
            "state": np.dtype(np.float32),
            "masks": np.dtype(np.bool_),
        }


def test_arrays_are_aligned_and_owned() -> None:
    # The head is of odd length, so the tensor begins at an odd byte of the body.
    body, length = binary_request({"masks": ("BOOL", MASKS[:1]), "state": ("FP32", STATE[:1])})
    for shift in range(4):
        padded = body[: int(length)] + b" " * shift + body[int(length) :]
        state = read(padded, str(int(length) + shift).encode()).arrays["state"]
        assert state.flags.aligned
        assert state.flags.owndata or (state.base is not None and state.base.flags.owndata)
        assert state.flags.writeable


def test_one_input_binary_and_the_other_in_json() -> None:
    head = json.dumps(
        {
            "inputs": [
                tensor("masks", "BOOL", MASKS),
                {
                    "name": "state",
                    "shape": [2, 3],
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": STATE.nbytes},
                },
            ]
        }
    ).encode()
    found = read(head + STATE.tobytes(), str(len(head)).encode()).arrays
    np.testing.assert_array_equal(found["state"], STATE)
    np.testing.assert_array_equal(found["masks"], MASKS)


def test_nan_may_come_binary_but_not_in_json() -> None:
    broken = np.array([[np.nan, np.inf, 0.0]], dtype=np.float32)
    np.testing.assert_array_equal(read(*binary_request({"state": ("FP32", broken)})).arrays["state"], broken)
    for text in ("NaN", "Infinity", "null", "1e39", "1e999", '"1"', "true", "[]"):
        body = json_request(tensor("state", "FP32", STATE[:1], data=[0, 0, "?"])).replace(b'"?"', text.encode())
        assert "state" in refused(body) or "request" in refused(body)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [1, 3]}, "expected 3 values"),
        ({"shape": [2, 4]}, "expected shape [B >= 1, 3]"),
        ({"shape": [6]}, "expected shape"),
        ({"shape": [2, 3, 1]}, "expected shape"),
        ({"shape": []}, "expected shape"),
        ({"shape": [0, 3], "data": []}, "expected shape"),
        ({"shape": [-2, 3]}, "expected shape"),
        ({"shape": [10**18, 3]}, "at most 4 rows"),
        ({"shape": [10**30, 3]}, "at most 4 rows"),
        ({"shape": [10**4200, 3]}, "rows"),
        ({"shape": [2.0, 3]}, "request"),
        ({"shape": ["2", 3]}, "request"),
        ({"datatype": "FP64"}, "expected FP32"),
        ({"datatype": "x" * 10_000}, "expected FP32"),
        ({"datatype": 3}, "request"),
        ({"name": "other"}, "expected some of"),
        ({"data": "text"}, "data"),
        ({"data": {"a": 1}}, "data"),
        ({"data": [[1, 2, 3]]}, "rows as in shape"),
        ({"data": [[1, 2], [3, 4], [5, 6]]}, "rows as in shape"),
        ({"data": [[[1, 2, 3], [4, 5, 6]]]}, "data"),
        ({"parameters": {"shared_memory_region": "x"}}, "not supported"),
        ({"parameters": {"binary_data_size": 24}}, "was both"),
        ({"parameters": []}, "request"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    said = refused(json_request(tensor("state", "FP32", STATE) | change))
    assert words in said
    assert len(said) < 400


def test_missing_twice_and_uneven_inputs_are_refused() -> None:
    state, masks = tensor("state", "FP32", STATE), tensor("masks", "BOOL", MASKS)
    assert "missing ['state']" in refused(json_request(masks))
    assert "missing ['state']" in refused(json_request())
    assert "twice" in refused(json_request(state, state))
    assert "expected 2 rows" in refused(json_request(state, tensor("masks", "BOOL", MASKS[:1])))
    assert "at most 4 rows" in refused(json_request(tensor("state", "FP32", np.zeros((5, 3)))))
    assert "neither" in refused(json_request({"name": "state", "shape": [2, 3], "datatype": "FP32"}))


@pytest.mark.parametrize(
    "length", [b"0", b"-1", b"+5", b" 5", b"5.0", b"", b"abc", b"9" * 5000, b"99999", "²".encode()]
)
def test_a_lying_length_of_the_json_part_is_refused(length: bytes) -> None:
    body, _ = binary_request({"state": ("FP32", STATE)})
    assert "Inference-Header-Content-Length" in refused(body, length)


def test_a_length_that_cuts_the_json_is_refused() -> None:
    body, length = binary_request({"state": ("FP32", STATE)})
    for wrong in range(1, int(length)):
        refused(body, str(wrong).encode())
    refused(body, None)


@pytest.mark.parametrize("size", [0, 23, 25, -24, 2**40, 10**25, 24.5, "24", None, True, [24], {}])
def test_a_lying_binary_size_is_refused(size: Any) -> None:
    refused(*binary_request({"state": ("FP32", STATE)}, {"state": size}))


def test_bytes_too_few_or_too_many_are_refused() -> None:
    body, length = binary_request({"state": ("FP32", STATE)})
    assert "binary bytes, was 23" in refused(body[:-1], length)
    assert "was 1 more" in refused(body + b"x", length)
    assert "more" in refused(*binary_request({"state": ("FP32", STATE), "masks": ("BOOL", MASKS)}, tail=b"12345"))


def test_a_bool_is_a_byte_of_0_or_1() -> None:
    body, length = binary_request({"masks": ("BOOL", MASKS), "state": ("FP32", STATE)})
    broken = bytearray(body)
    broken[int(length) + 1] = 2
    assert "expected bytes 0 and 1, was 2" in refused(bytes(broken), length)
    assert "masks" in refused(
        json_request(tensor("state", "FP32", STATE), tensor("masks", "BOOL", MASKS, data=[1, 0, 1, 0]))
    )


def test_deep_nesting_and_broken_text_are_refused() -> None:
    deep = b"[" * 200_000
    for body in (
        deep,
        b'{"x":' + deep,
        b'{"inputs":[],"x":' + deep + b"]" * 200_000 + b"}",
        b'{"inputs":[{"name":"state","shape":[1,3],"datatype":"FP32","data":' + deep + b"]" * 200_000 + b"}]}",
        b'{"inputs":[{"name":"\xff\xfe"}]}',
        b'{"inputs":[],"id":"\\ud800"}',
        b"\xff",
        b"",
        b"null",
        b"[]",
    ):
        refused(body)


def test_outputs_are_all_or_those_asked_for() -> None:
    arrays = {"action": np.array([4, 0]), "value": STATE[:, 0], "masks": MASKS}
    body, length = write_inference(InferenceRequest(inputs=[], id="7"), "m", "v", OUTPUTS, arrays)
    assert length is None
    response = json.loads(body)
    assert (response["model_name"], response["model_version"], response["id"]) == ("m", "v", "7")
    assert response["outputs"] == [
        {"name": "action", "datatype": "INT64", "shape": [2], "data": [4, 0]},
        {"name": "value", "datatype": "FP32", "shape": [2], "data": STATE[:, 0].tolist()},
        {"name": "masks", "datatype": "BOOL", "shape": [2, 2], "data": [True, False, False, True]},
    ]
    wanted = msgspec.convert({"inputs": [], "outputs": [{"name": "masks"}, {"name": "action"}]}, InferenceRequest)
    body, _ = write_inference(wanted, "m", "v", OUTPUTS, arrays)
    assert [output["name"] for output in json.loads(body)["outputs"]] == ["masks", "action"]


def test_binary_outputs_follow_the_json_in_order() -> None:
    arrays = {"action": np.array([4, 0]), "value": STATE[:, 0], "masks": MASKS}
    request = msgspec.convert(
        {
            "inputs": [],
            "parameters": {"binary_data_output": True},
            "outputs": [{"name": "masks"}, {"name": "value", "parameters": {"binary_data": False}}, {"name": "action"}],
        },
        InferenceRequest,
    )
    body, length = write_inference(request, "m", "v", OUTPUTS, arrays)
    assert length is not None
    masks, value, action = json.loads(body[:length])["outputs"]
    assert (masks["parameters"], action["parameters"]) == ({"binary_data_size": 4}, {"binary_data_size": 16})
    assert "data" not in masks
    assert value["data"] == STATE[:, 0].tolist()
    assert body[length:] == MASKS.tobytes() + np.array([4, 0], dtype="<i8").tobytes()


def test_numbers_that_are_not_finite_are_null_in_json() -> None:
    arrays = {"action": np.array([0]), "value": np.array([np.nan], dtype=np.float32), "masks": MASKS[:1]}
    body, _ = write_inference(InferenceRequest(inputs=[]), "m", "v", OUTPUTS, arrays)
    assert json.loads(body)["outputs"][1]["data"] == [None]


@pytest.mark.parametrize(
    "request_",
    [
        {"outputs": [{"name": "nothing"}]},
        {"outputs": [{"name": "action"}, {"name": "action"}]},
        {"outputs": [{"name": "action", "parameters": {"classification": 3}}]},
        {"outputs": [{"name": "action", "parameters": {"shared_memory_region": "x"}}]},
        {"outputs": [{"name": "action", "parameters": {"binary_data": 1}}]},
        {"parameters": {"binary_data_output": "yes"}},
    ],
)
def test_outputs_that_cannot_be_given_are_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(InferenceRequestError):
        check_outputs(msgspec.convert({"inputs": [], **request_}, InferenceRequest), OUTPUTS)


@given(
    st.binary(max_size=200), st.one_of(st.none(), st.binary(max_size=6), st.integers(0, 200).map(lambda n: b"%d" % n))
)
def test_any_bytes_are_read_or_refused(body: bytes, length: bytes | None) -> None:
    with suppress(InferenceRequestError):
        read(body, length)


@given(st.data())
def test_a_damaged_request_is_read_or_refused(data: st.DataObject) -> None:
    body, length = binary_request({"state": ("FP32", STATE), "masks": ("BOOL", MASKS)})
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 5))
    try:
        found = read(bytes(damaged[: len(damaged) - cut]), length)
    except InferenceRequestError:
        return
    assert found.arrays["state"].shape[1] == 3
    assert all(len(array) <= MAX_BATCH for array in found.arrays.values())


@given(st.integers(1, MAX_BATCH), st.data())
def test_every_finite_float32_comes_through_json_bit_for_bit(batch: int, data: st.DataObject) -> None:
    numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
    rows = data.draw(st.lists(numbers, min_size=3 * batch, max_size=3 * batch))
    state = np.array(rows, dtype=np.float32).reshape(batch, 3)
    found = read(json_request(tensor("state", "FP32", state))).arrays["state"]
    assert found.tobytes() == state.tobytes()
