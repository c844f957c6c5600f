"""The Open Inference Protocol over HTTP: stateless, by model and version, as JSON and binary."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import pytest
from http_worlds import Client, error_of, running, with_planner

from serving import Bundle, OnnxPlanner, OnnxPolicy
from serving.engine import DecisionEngine
from serving.http.server import HttpLimits
from serving.http.service import SHORT_BODY

STATES = np.array([[0, 0, 0.2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0.01, 0, 0.3, 0.1, *[0] * 10]], dtype=np.float32)


@pytest.fixture
def planned(bundle: Bundle) -> Bundle:
    return with_planner(bundle)


def tensor(array: np.ndarray) -> dict[str, Any]:
    return {"name": "state", "shape": list(array.shape), "datatype": "FP32", "data": array.ravel().tolist()}


def test_inference_is_that_of_the_bundle_and_leaves_no_trace(engine: DecisionEngine, client: Client) -> None:
    before = list(engine.ledger.read(-1))
    answer = client.post("/v2/models/policy/infer", {"id": "7", "inputs": [tensor(STATES)]})
    assert answer.status == 200
    assert (answer.json["id"], answer.json["model_version"]) == ("7", engine.bundle.hash)
    found = {output["name"]: output for output in answer.json["outputs"]}
    expected = OnnxPolicy(engine.bundle).decide(STATES)
    assert found["action"]["data"] == expected.actions.tolist()
    assert found["probabilities"]["shape"] == [2, 7]
    assert found["probabilities"]["data"] == expected.probabilities.ravel().tolist()
    assert found["action_masks"]["data"] == expected.action_masks.ravel().tolist()
    assert found["value"]["data"] == expected.value.tolist()
    assert (found["fallback"]["data"], found["overridden"]["data"]) == ([False, False], [False, False])
    assert list(engine.ledger.read(-1)) == before
    assert not engine.recent


def test_long_inferences_leave_the_event_loop_and_say_the_same(
    engine: DecisionEngine, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    run_policy = Bundle.run_policy

    def watched(self: Bundle, state: Any, masks: Any) -> Any:
        threads.append(threading.current_thread().name)
        return run_policy(self, state, masks)

    monkeypatch.setattr(Bundle, "run_policy", watched)
    answers = [
        client.post("/v2/models/policy/infer", {"inputs": [tensor(np.tile(STATES, (times, 1)))]}).json["outputs"]
        for times in (1, SHORT_BODY // len(json.dumps(tensor(STATES)["data"])) + 1)
    ]
    assert threads == ["server", "inferences"]
    for short, long in zip(*answers, strict=True):
        assert long["data"][: len(short["data"])] == pytest.approx(short["data"], abs=1e-5)


def test_inference_obeys_the_callers_masks(client: Client) -> None:
    masks = {"name": "caller_masks", "shape": [2, 7], "datatype": "BOOL", "data": [True] + [False] * 6 + [False] * 7}
    answer = client.post("/v2/models/policy/infer", {"inputs": [tensor(STATES), masks]})
    found = {output["name"]: output["data"] for output in answer.json["outputs"]}
    assert found["action"] == [0, 0]
    assert found["fallback"] == [False, True]


def test_binary_tensors_both_ways(engine: DecisionEngine, client: Client) -> None:
    state = {"name": "state", "shape": [2, 14], "datatype": "FP32", "parameters": {"binary_data_size": STATES.nbytes}}
    head = json.dumps({"inputs": [state], "parameters": {"binary_data_output": True}}).encode()
    answer = client.post(
        "/v2/models/policy/infer",
        head + STATES.tobytes(),
        inference_header_content_length=str(len(head)),
        content_type="application/octet-stream",
    )
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["inference-header-content-length"])
    outputs = json.loads(answer.body[:length])["outputs"]
    assert sum(output["parameters"]["binary_data_size"] for output in outputs) == len(answer.body) - length
    actions = np.frombuffer(answer.body[length : length + 16], dtype="<i8")
    np.testing.assert_array_equal(actions, OnnxPolicy(engine.bundle).decide(STATES).actions)


def test_models_are_those_of_the_bundles_by_version(engine: DecisionEngine, planned: Bundle, client: Client) -> None:
    champion, short = engine.bundle.hash, engine.bundle.hash[:12]
    body = {"inputs": [tensor(STATES)]}
    assert client.get("/v2").json == {
        "name": "detent",
        "version": client.get("/state").json["version"],
        "extensions": ["binary_tensor_data"],
    }
    metadata = client.get(f"/v2/models/policy/versions/{short}").json
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == ("policy", [champion], "onnxruntime_onnx")
    assert metadata["inputs"][0] == {"name": "state", "datatype": "FP32", "shape": [-1, 14]}
    assert metadata["parameters"]["stateless"] is True
    assert metadata["parameters"]["optional_inputs"] == ["caller_masks"]
    assert client.get(f"/v2/models/policy/versions/{champion}/ready").json == {"name": "policy", "ready": True}
    for wrong in (
        "/v2/models/planner",
        "/v2/models/x",
        f"/v2/models/policy/versions/{champion[:11]}",
        "/v2/models/policy/versions/1",
    ):
        error_of(client.get(wrong), 404)
        error_of(client.get(f"{wrong}/ready"), 404)
        error_of(client.post(f"{wrong}/infer", body), 404)
    engine.challenge(planned)
    challenged = client.post(f"/v2/models/policy/versions/{planned.hash[:12]}/infer", body).json
    assert challenged["model_version"] == planned.hash
    assert client.post("/v2/models/policy/infer", body).json["model_version"] == champion
    # A model of the challenger alone has to be asked for by its version.
    error_of(client.get("/v2/models/planner"), 404)
    assert client.get(f"/v2/models/planner/versions/{planned.hash}").status == 200
    engine.use(planned)
    engine.challenge(None)
    found = client.post("/v2/models/planner/infer", body).json
    expected = OnnxPlanner(planned).decide(STATES)
    assert found["outputs"][0]["data"] == expected.actions.tolist()
    assert found["outputs"][-1] == {
        "name": "planned",
        "datatype": "BOOL",
        "shape": [2],
        "data": expected.planned.tolist(),
    }
    error_of(client.post(f"/v2/models/policy/versions/{champion}/infer", body), 404)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "inputs"),
        ({"inputs": []}, "missing ['state']"),
        ({"inputs": [tensor(STATES[:, :13])]}, "expected shape [B >= 1, 14], was [2, 13]"),
        ({"inputs": [tensor(np.zeros((5, 14)))]}, "at most 4 rows"),
        ({"inputs": [tensor(STATES)], "outputs": [{"name": "actions"}]}, "outputs"),
        ({"inputs": [tensor(STATES) | {"datatype": "INT64"}]}, "expected FP32"),
    ],
)
def test_inference_refuses_what_does_not_fit(engine: DecisionEngine, body: dict[str, Any], words: str) -> None:
    with running(engine, limits=HttpLimits(max_batch=4)) as client:
        assert words in error_of(client.post("/v2/models/policy/infer", body), 400)
