"""A client that costs little: prebuilt requests over one keep-alive connection, a blocking socket, no library.

It reads what this project's service writes: lower-case names in the head and `content-length`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from serving.http.inference import DTYPES, HEADER_LENGTH, InferenceResponse

CHUNK = 1 << 16
TIMEOUT_S = 30.0
"""For each piece of an answer: whoever waits longer waits for nothing."""
LENGTH = b"\r\ncontent-length: "


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int
    head: bytes
    body: bytes


class Connection:
    """One connection to a server on loopback; a broken one is opened anew by the next exchange."""

    def __init__(self, port: int, read: Callable[[socket.socket, bytes], Any]) -> None:
        """Args: read: takes the answer to a request from a socket."""
        self.port, self._read = port, read
        self._socket: socket.socket | None = None

    def exchange(self, request: bytes) -> Any:
        """Send a request, wait for its answer. Raises: OSError."""
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._socket.sendall(request)
            return self._read(self._socket, request)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Twice does nothing."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def read_http(connection: socket.socket, _: bytes = b"") -> Answer:
    """One HTTP answer. Raises: OSError where the connection ends before, or has no length."""
    found = _received(connection)
    while (end := found.find(b"\r\n\r\n")) < 0:
        found += _received(connection)
    start = found.find(LENGTH, 0, end) + len(LENGTH)
    if start < len(LENGTH):
        raise OSError(f"answer: expected a content-length, was {found[:end]!r}")
    stop = found.find(b"\r\n", start)
    size = end + 4 + int(found[start:stop])
    while len(found) < size:
        found += _received(connection)
    return Answer(int(found[9:12]), found[:end], found[end + 4 :])


def read_echo(connection: socket.socket, request: bytes) -> bytes:
    """As many bytes as were sent. Raises: OSError where the connection ends before."""
    found = _received(connection)
    while len(found) < len(request):
        found += _received(connection)
    return found


def post(path: str, body: bytes, *, media_type: str = "application/json", header_length: int | None = None) -> bytes:
    """A whole POST request. Args: header_length: of the JSON part where binary tensors follow."""
    lines = [
        f"POST {path} HTTP/1.1",
        "host: 127.0.0.1",
        f"content-type: {media_type}",
        f"content-length: {len(body)}",
    ]
    if header_length is not None:
        lines.append(f"{HEADER_LENGTH.decode()}: {header_length}")
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body


def get(path: str) -> bytes:
    """A whole GET request."""
    return f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode("ascii")


def infer_request(model: str, state: npt.NDArray[np.float32], *, binary: bool) -> bytes:
    """An inference over the Open Inference Protocol. Args: state [B, S]; binary: tensors behind the JSON, both ways."""
    path, tensor = f"/v2/models/{model}/infer", {"name": "state", "datatype": "FP32", "shape": list(state.shape)}
    if not binary:
        return post(path, msgspec.json.encode({"inputs": [{**tensor, "data": state.ravel().tolist()}]}))
    raw = state.astype("<f4").tobytes()
    head = msgspec.json.encode(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}],
            "parameters": {"binary_data_output": True},
        }
    )
    return post(path, head + raw, media_type="application/octet-stream", header_length=len(head))


def infer_outputs(answer: Answer) -> tuple[str, dict[str, npt.NDArray[Any]]]:
    """Version and outputs by name of an answer to `infer_request`.

    Raises: ValueError or msgspec.MsgspecError where it is none.
    """
    length = len(answer.body)
    for line in answer.head.split(b"\r\n"):
        name, _, value = line.partition(b": ")
        if name == HEADER_LENGTH:
            length = int(value)
    response = msgspec.json.decode(answer.body[:length], type=InferenceResponse)
    arrays, tail = {}, answer.body[length:]
    for tensor in response.outputs:
        dtype, size = DTYPES[tensor.datatype], tensor.parameters.get("binary_data_size")
        if size is None:
            flat = np.array(tensor.data, dtype=dtype)
        else:
            flat, tail = np.frombuffer(tail[:size], dtype=dtype), tail[size:]
        arrays[tensor.name] = flat.reshape(tensor.shape)
    return response.model_version, arrays


def _received(connection: socket.socket) -> bytes:
    part = connection.recv(CHUNK)
    if not part:
        raise ConnectionResetError("expected an answer, but the connection ended")
    return part
