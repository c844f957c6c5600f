"""The Open Inference Protocol, version 2: requests to arrays and arrays to responses, as JSON or with binary tensors.

The binary extension puts tensors behind the JSON, in the order in which they are named there; the header
`Inference-Header-Content-Length` says where the JSON ends. Whatever does not fit raises `InferenceRequestError`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from serving.errors import ServingError

HEADER_LENGTH = b"inference-header-content-length"
"""Name of the header with the length of the JSON part."""
EXTENSIONS = ("binary_tensor_data",)
DTYPES: Mapping[str, Any] = {"FP32": np.dtype("<f4"), "BOOL": np.dtype("?"), "INT64": np.dtype("<i8")}
"""Data types spoken here; all little-endian."""

Array = npt.NDArray[Any]

_LENGTH = re.compile(rb"[0-9]{1,12}")
_UNSUPPORTED = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", "classification")


class InferenceRequestError(ServingError):
    """A request is not what the model takes."""


class TensorSpec(NamedTuple):
    """One input or output; the first axis is the batch."""

    name: str
    datatype: str
    width: int | None = None
    """Second axis; None where there is none."""
    optional: bool = False

    @property
    def shape(self) -> list[int]:
        """As metadata tell it: -1 stands for any batch."""
        return [-1] if self.width is None else [-1, self.width]


class InputTensor(msgspec.Struct, frozen=True, kw_only=True):
    """An input as the request names it."""

    name: str
    datatype: str
    shape: list[int]
    """[B, width]."""
    parameters: dict[str, Any] = {}
    """`binary_data_size`: bytes behind the JSON."""
    data: Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "array"})] = msgspec.field(
        default_factory=msgspec.Raw
    )
    """Values row by row, flat or nested; left out where they are binary."""


class RequestedOutput(msgspec.Struct, frozen=True, kw_only=True):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] = {}
    """`binary_data`: whether it is sent behind the JSON."""


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON part of a request; what is unknown in it is passed over, as the protocol says."""

    inputs: list[InputTensor]
    outputs: list[RequestedOutput] = []
    """All where none is named."""
    id: str = ""
    parameters: dict[str, Any] = {}
    """`binary_data_output`: whether outputs are sent behind the JSON unless they say otherwise."""


class OutputTensor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An output; `data` or `parameters.binary_data_size`."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] = {}
    data: list[float | int | bool | None] | None = None
    """Values row by row, flat; null where one is not finite."""


class InferenceResponse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The JSON part of a response."""

    model_name: str
    model_version: str
    id: str = ""
    outputs: list[OutputTensor] = msgspec.field(default_factory=list)


class Inference(NamedTuple):
    """A request, read."""

    request: InferenceRequest
    arrays: dict[str, Array]
    """Inputs by name, each [B, width], owned and contiguous."""


_REQUESTS = msgspec.json.Decoder(InferenceRequest)
_FLAT = {name: msgspec.json.Decoder(list[kind]) for name, kind in (("FP32", float), ("BOOL", bool), ("INT64", int))}  # type: ignore[valid-type]
_NESTED = {
    name: msgspec.json.Decoder(list[list[kind]])  # type: ignore[valid-type]
    for name, kind in (("FP32", float), ("BOOL", bool), ("INT64", int))
}


def read_inference(body: bytes, header_length: bytes | None, specs: Sequence[TensorSpec], max_batch: int) -> Inference:
    """Read a request.

    Args: header_length: value of the header of that name, None without one; specs: the model's inputs.
    Raises: InferenceRequestError naming what was expected and what came.
    """
    split = _json_length(body, header_length)
    try:
        request = _REQUESTS.decode(body[:split])
    # Deep nesting and broken UTF-8 come as errors of their own.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InferenceRequestError(f"request: {error}") from error
    known = {spec.name: spec for spec in specs}
    arrays: dict[str, Array] = {}
    binary, batch = memoryview(body)[split:], None
    for tensor in request.inputs:
        spec = known.get(tensor.name)
        if spec is None:
            raise InferenceRequestError(f"inputs: expected some of {list(known)}, was {tensor.name[:80]!r}")
        if tensor.name in arrays:
            raise InferenceRequestError(f"inputs: expected each once, was {tensor.name!r} twice")
        batch = _checked_batch(tensor, spec, batch, max_batch)
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            arrays[tensor.name] = _from_json(tensor)
        else:
            arrays[tensor.name], binary = _from_binary(tensor, size, binary)
    missing = [spec.name for spec in specs if not spec.optional and spec.name not in arrays]
    if missing:
        raise InferenceRequestError(f"inputs: expected {list(known)}, missing {missing}")
    if binary:
        raise InferenceRequestError(f"body: expected no bytes behind those of the inputs, was {len(binary)} more")
    return Inference(request, arrays)


def write_inference(
    request: InferenceRequest,
    model_name: str,
    model_version: str,
    specs: Sequence[TensorSpec],
    arrays: Mapping[str, Array],
) -> tuple[bytes, int | None]:
    """Write a response. Returns: the body, and the length of its JSON part where binary tensors follow."""
    outputs, tails = [], []
    for spec, binary in _wanted(request, specs):
        array = np.ascontiguousarray(arrays[spec.name], dtype=DTYPES[spec.datatype])
        shape = list(array.shape)
        if binary:
            tails.append(array.tobytes())
            size = {"binary_data_size": len(tails[-1])}
            outputs.append(OutputTensor(name=spec.name, datatype=spec.datatype, shape=shape, parameters=size))
        else:
            data = array.ravel().tolist()
            outputs.append(OutputTensor(name=spec.name, datatype=spec.datatype, shape=shape, data=data))
    response = InferenceResponse(model_name=model_name, model_version=model_version, id=request.id, outputs=outputs)
    head = msgspec.json.encode(response)
    return (b"".join([head, *tails]), len(head)) if tails else (head, None)


def check_outputs(request: InferenceRequest, specs: Sequence[TensorSpec]) -> None:
    """Raise InferenceRequestError unless every output asked for exists: before the model runs, not after."""
    _wanted(request, specs)


def _wanted(request: InferenceRequest, specs: Sequence[TensorSpec]) -> list[tuple[TensorSpec, bool]]:
    by_default = _flag(request.parameters, "binary_data_output", False)
    if not request.outputs:
        return [(spec, by_default) for spec in specs]
    known = {spec.name: spec for spec in specs}
    wanted: dict[str, tuple[TensorSpec, bool]] = {}
    for output in request.outputs:
        if output.name not in known:
            raise InferenceRequestError(f"outputs: expected some of {list(known)}, was {output.name[:80]!r}")
        if output.name in wanted:
            raise InferenceRequestError(f"outputs: expected each once, was {output.name!r} twice")
        _check_supported(output.name, output.parameters)
        wanted[output.name] = known[output.name], _flag(output.parameters, "binary_data", by_default)
    return list(wanted.values())


def _json_length(body: bytes, header_length: bytes | None) -> int:
    if header_length is None:
        return len(body)
    if not _LENGTH.fullmatch(header_length) or not 0 < int(header_length) <= len(body):
        raise InferenceRequestError(
            f"Inference-Header-Content-Length: expected 1 to {len(body)}, the length of the body, "
            f"was {header_length[:40].decode('latin-1')!r}"
        )
    return int(header_length)


# Everything about a tensor's size is settled here, before anything of that size is made.
def _checked_batch(tensor: InputTensor, spec: TensorSpec, batch: int | None, max_batch: int) -> int:
    _check_supported(tensor.name, tensor.parameters)
    if tensor.datatype != spec.datatype:
        raise InferenceRequestError(f"{tensor.name}: expected {spec.datatype}, was {tensor.datatype[:40]!r}")
    rank = len(spec.shape)
    if len(tensor.shape) != rank or tensor.shape[1:] != spec.shape[1:] or tensor.shape[0] < 1:
        expected = "[B >= 1]" if spec.width is None else f"[B >= 1, {spec.width}]"
        raise InferenceRequestError(f"{tensor.name}: expected shape {expected}, was {_short(tensor.shape)}")
    rows = tensor.shape[0]
    if rows > max_batch:
        raise InferenceRequestError(f"{tensor.name}: expected at most {max_batch} rows, was {_short(rows)}")
    if batch is not None and rows != batch:
        raise InferenceRequestError(f"{tensor.name}: expected {batch} rows as in the input before, was {rows}")
    return rows


def _check_supported(name: str, parameters: Mapping[str, Any]) -> None:
    found = [parameter for parameter in _UNSUPPORTED if parameter in parameters]
    if found:
        raise InferenceRequestError(f"{name}: parameters: {', '.join(found)} is not supported")


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InferenceRequestError(f"parameters: {name}: expected true or false, was {_short(value)}")
    return value


def _from_json(tensor: InputTensor) -> Array:
    text, name = bytes(tensor.data), tensor.name
    if not text:
        raise InferenceRequestError(f"{name}: expected data, or parameters.binary_data_size, was neither")
    count = math.prod(tensor.shape)
    try:
        values = _FLAT[tensor.datatype].decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as flat_error:
        try:
            rows = _NESTED[tensor.datatype].decode(text)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise InferenceRequestError(f"{name}: data: {flat_error}") from flat_error
        if len(tensor.shape) != 2 or [len(row) for row in rows] != [tensor.shape[1]] * tensor.shape[0]:
            raise InferenceRequestError(f"{name}: data: expected rows as in shape {tensor.shape}, was others") from None
        values = [value for row in rows for value in row]
    if len(values) != count:
        raise InferenceRequestError(f"{name}: data: expected {count} values for {tensor.shape}, was {len(values)}")
    return _array(name, tensor, values)


def _array(name: str, tensor: InputTensor, values: list[Any]) -> Array:
    try:
        with np.errstate(over="ignore"):
            array: Array = np.array(values, dtype=DTYPES[tensor.datatype]).reshape(tensor.shape)
    except OverflowError as error:
        raise InferenceRequestError(f"{name}: data: {error}") from error
    # JSON has no infinity; a number that becomes one in float32 is a mistake.
    if tensor.datatype == "FP32" and not np.isfinite(array).all():
        raise InferenceRequestError(f"{name}: data: expected numbers within float32, was a larger one")
    return array


def _from_binary(tensor: InputTensor, size: Any, binary: memoryview) -> tuple[Array, memoryview]:
    dtype, name = DTYPES[tensor.datatype], tensor.name
    expected = math.prod(tensor.shape) * dtype.itemsize
    if type(size) is not int or size != expected:
        raise InferenceRequestError(
            f"{name}: binary_data_size: expected {expected} for {tensor.datatype} {tensor.shape}, was {_short(size)}"
        )
    if bytes(tensor.data):
        raise InferenceRequestError(f"{name}: expected data or binary_data_size, was both")
    if len(binary) < expected:
        raise InferenceRequestError(f"{name}: expected {expected} binary bytes, was {len(binary)}")
    raw = np.frombuffer(binary[:expected], dtype=np.uint8 if tensor.datatype == "BOOL" else dtype)
    if tensor.datatype == "BOOL" and raw.max() > 1:
        raise InferenceRequestError(f"{name}: expected bytes 0 and 1, was {int(raw.max())}")
    # A copy: the bytes in the body need not be aligned.
    return raw.astype(dtype).reshape(tensor.shape), binary[expected:]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
