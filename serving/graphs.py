"""The graphs of a bundle: what goes in and comes out, and a session that proves it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from data import Scaler
from serving.errors import BundleFormatError, BundleMismatchError
from serving.manifest import (
    LIKELIHOOD_FILE,
    MASK_FILE,
    PLANNER_FILE,
    POLICY_FILE,
    UNCERTAINTY_FILE,
    Manifest,
    graph_metadata,
)

# Graph inputs and outputs as (name, type, shape), "B" standing for any batch.
Port = tuple[str, str, tuple[Any, ...]]


def signatures(manifest: Manifest) -> Mapping[str, tuple[tuple[Port, ...], tuple[Port, ...]]]:
    """Graph file -> its inputs and its outputs."""
    columns, actions = len(manifest.state_names), len(manifest.actions.names)
    width = ("B", len(manifest.feature_fields))
    state: Port = ("state", "tensor(float)", ("B", columns))
    masks: Port = ("action_masks", "tensor(bool)", ("B", actions))
    callers: Port = ("caller_masks", "tensor(bool)", ("B", actions))
    graphs: dict[str, tuple[tuple[Port, ...], tuple[Port, ...]]] = {
        POLICY_FILE: (
            (state, callers),
            (
                ("action", "tensor(int64)", ("B",)),
                ("probabilities", "tensor(float)", ("B", actions)),
                masks,
                ("value", "tensor(float)", ("B",)),
                ("fallback", "tensor(bool)", ("B",)),
            ),
        ),
        MASK_FILE: ((state,), (masks,)),
        UNCERTAINTY_FILE: (
            (("features", "tensor(float)", width),),
            (("model_uncertainty", "tensor(float)", ("B",)),),
        ),
    }
    if manifest.drift:
        graphs[LIKELIHOOD_FILE] = (
            (("features", "tensor(float)", width), ("next_features", "tensor(float)", width)),
            (("nll", "tensor(float)", ("B",)),),
        )
    if manifest.planner is not None:
        graphs[PLANNER_FILE] = (
            (state, callers, ("seed", "tensor(int64)", ("B",))),
            (
                ("action", "tensor(int64)", ("B",)),
                ("value", "tensor(float)", ("B",)),
                ("action_values", "tensor(float)", ("B", actions)),
                ("sequence", "tensor(int64)", ("B", manifest.planner.horizon)),
                masks,
                ("fallback", "tensor(bool)", ("B",)),
            ),
        )
    return graphs


def load_graph(role: str, data: bytes, manifest: Manifest, scaler: Scaler) -> Any:
    """An onnxruntime session of a graph file whose bytes were verified.

    Raises: BundleFormatError where it cannot be loaded; BundleMismatchError where it is not the bundle's.
    """
    # onnxruntime would queue usage events in the home directory; it reads this when it is first imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # One thread: two collapse under contention, and sums keep their order.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    # Finding memory to use again takes a small graph longer than it saves; a planner needs it, its arrays are large.
    options.enable_mem_reuse = role == PLANNER_FILE
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    # onnxruntime's exceptions share no base but Exception.
    except Exception as error:
        raise BundleFormatError(f"{role}: onnxruntime cannot load it: {error}") from error
    expected = signatures(manifest)[role]
    actual = tuple(tuple(map(_port, ports)) for ports in (session.get_inputs(), session.get_outputs()))
    if actual != expected:
        raise BundleMismatchError(f"{role}: expected inputs and outputs {expected}, was {actual}")
    planner = manifest.planner if role == PLANNER_FILE else None
    wanted = graph_metadata(
        role,
        layout=manifest.layout_hash,
        rule_set_hash=manifest.rule_set_hash,
        scaler=np.stack([scaler.centre, scaler.scale]),
        noise_tables=None if planner is None else planner.noise_tables,
    )
    found = dict(session.get_modelmeta().custom_metadata_map)
    for key, value in wanted.items():
        if found.get(key) != value:
            raise BundleMismatchError(f"{role}: {key}: expected {value}, was {found.get(key)}")
    return session


# A batch frozen at export shows up as a number here and is refused.
def _port(port: Any) -> Port:
    shape = list(port.shape)
    if shape and not isinstance(shape[0], int):
        shape[0] = "B"
    return (port.name, port.type, tuple(shape))
