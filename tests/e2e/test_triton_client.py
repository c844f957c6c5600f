"""The client of another server, unchanged, over a real socket: the Open Inference Protocol as it is spoken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from http_processes import bundle_path, running
from tritonclient import http as triton  # type: ignore[import-untyped]
from tritonclient.utils import InferenceServerException  # type: ignore[import-untyped]

from serving import Bundle, Decisions, OnnxPlanner, OnnxPolicy, open_bundle

READ, OPERATOR = "read-token-0123456789", "operator-token-0123456789"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_path(tmp_path_factory)


@pytest.fixture(scope="module")
def bundle(path: Path) -> Bundle:
    return open_bundle(path)


@pytest.fixture(scope="module")
def client(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[triton.InferenceServerClient]:
    tokens = {"DETENT_READ_TOKEN": READ, "DETENT_OPERATOR_TOKEN": OPERATOR}
    ledger = tmp_path_factory.mktemp("triton") / "ledger.db"
    with running(path, ledger, tokens=tokens) as service, triton.InferenceServerClient(service.address) as client:
        yield client


@pytest.fixture(scope="module")
def states(bundle: Bundle) -> np.ndarray:
    golden = bundle.golden.state
    return golden[np.isfinite(golden).all(axis=1)][:8]


def headers() -> dict[str, str]:
    """Anew for each call: the client writes into them."""
    return {"Authorization": f"Bearer {READ}"}


def inputs(states: np.ndarray, masks: np.ndarray | None = None, *, binary: bool = True) -> list[triton.InferInput]:
    state = triton.InferInput("state", list(states.shape), "FP32")
    state.set_data_from_numpy(states, binary_data=binary)
    if masks is None:
        return [state]
    callers = triton.InferInput("caller_masks", list(masks.shape), "BOOL")
    callers.set_data_from_numpy(masks, binary_data=binary)
    return [callers, state]


def agrees(result: triton.InferResult, expected: Decisions) -> None:
    np.testing.assert_array_equal(result.as_numpy("action"), expected.actions)
    np.testing.assert_array_equal(result.as_numpy("probabilities"), expected.probabilities)
    np.testing.assert_array_equal(result.as_numpy("action_masks"), expected.action_masks)
    np.testing.assert_array_equal(result.as_numpy("value"), expected.value)
    np.testing.assert_array_equal(result.as_numpy("fallback"), expected.fallback)
    np.testing.assert_array_equal(result.as_numpy("overridden"), expected.overridden)


def test_health_and_metadata(client: triton.InferenceServerClient, bundle: Bundle) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    for version in ("", bundle.hash, bundle.hash[:12]):
        assert client.is_model_ready("policy", version, headers=headers())
        assert client.is_model_ready("planner", version, headers=headers())
    assert not client.is_model_ready("policy", "0" * 64, headers=headers())
    assert not client.is_model_ready("other", headers=headers())
    assert client.get_server_metadata(headers=headers())["name"] == "detent"
    metadata = client.get_model_metadata("policy", bundle.hash, headers=headers())
    assert metadata["versions"] == [bundle.hash]
    assert [one["name"] for one in metadata["inputs"]] == ["state", "caller_masks"]
    assert metadata["outputs"][0] == {"name": "action", "datatype": "INT64", "shape": [-1]}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("binary_out", [None, False, True])
@pytest.mark.parametrize("binary_in", [True, False])
def test_both_encodings_give_what_the_bundle_decides(
    client: triton.InferenceServerClient,
    bundle: Bundle,
    states: np.ndarray,
    binary_in: bool,
    binary_out: bool | None,
    masked: bool,
) -> None:
    masks = np.ones((len(states), 7), dtype=bool)
    masks[:, ::2] = False
    sent = masks if masked else None
    names = ("action", "probabilities", "action_masks", "value", "fallback", "overridden")
    wanted = None
    if binary_out is not None:
        wanted = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in names]
    result = client.infer(
        "policy", inputs(states, sent, binary=binary_in), outputs=wanted, request_id="7", headers=headers()
    )
    agrees(result, OnnxPolicy(bundle).decide(states, sent))
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("7", "policy", bundle.hash)
    binary = [bool(output.get("parameters")) for output in response["outputs"]]
    assert set(binary) == {binary_out is not False}


def test_the_planner_is_a_model_too(client: triton.InferenceServerClient, bundle: Bundle, states: np.ndarray) -> None:
    expected = OnnxPlanner(bundle).decide(states)
    result = client.infer("planner", inputs(states), model_version=bundle.hash[:12], headers=headers())
    agrees(result, expected)
    np.testing.assert_array_equal(result.as_numpy("planned"), expected.planned)


def test_a_state_that_cannot_be_judged_holds(client: triton.InferenceServerClient, states: np.ndarray) -> None:
    broken = states.copy()
    broken[0, 0] = np.nan
    result = client.infer("policy", inputs(broken), headers=headers())
    assert (result.as_numpy("action")[0], result.as_numpy("fallback")[0]) == (0, True)


def test_one_output_at_a_time(client: triton.InferenceServerClient, states: np.ndarray) -> None:
    result = client.infer("policy", inputs(states), outputs=[triton.InferRequestedOutput("value")], headers=headers())
    assert result.as_numpy("value").shape == (len(states),)
    assert result.as_numpy("action") is None


def test_many_at_once(client: triton.InferenceServerClient, bundle: Bundle, states: np.ndarray) -> None:
    waiting = [client.async_infer("policy", inputs(states), headers=headers()) for _ in range(20)]
    expected = OnnxPolicy(bundle).decide(states)
    for request in waiting:
        agrees(request.get_result(), expected)


@pytest.mark.parametrize(
    ("call", "status", "words"),
    [
        ({"model_name": "other"}, "404", "model: expected one of ['policy', 'planner'], was 'other'"),
        ({"model_version": "12"}, "404", "version of 'policy'"),
        ({"inputs": []}, "400", "missing ['state']"),
        ({"outputs": [triton.InferRequestedOutput("nothing")]}, "400", "outputs: expected some of"),
        ({"outputs": [triton.InferRequestedOutput("action", class_count=3)]}, "400", "not supported"),
        ({"request_compression_algorithm": "gzip"}, "415", "content-encoding"),
        ({"headers": {}}, "401", "authorization"),
        ({"inputs": inputs(np.zeros((1, 3), dtype=np.float32))}, "400", "expected shape [B >= 1, 14], was [1, 3]"),
        ({"inputs": inputs(np.zeros((1025, 14), dtype=np.float32))}, "400", "at most 1024 rows"),
        ({"inputs": inputs(np.zeros((30_000, 14), dtype=np.float32))}, "413", "body: expected at most"),
    ],
)  # fmt: skip
def test_errors_come_with_their_words(
    client: triton.InferenceServerClient, states: np.ndarray, call: dict[str, Any], status: str, words: str
) -> None:
    usual = {"model_name": "policy", "inputs": inputs(states), "headers": headers()}
    with pytest.raises(InferenceServerException) as caught:
        client.infer(**{**usual, **call})
    assert caught.value.status() == status
    assert words in caught.value.message()
