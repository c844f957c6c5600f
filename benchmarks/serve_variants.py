"""Bundles that differ in what they decide and in nothing else, and the rows that they are asked about."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import numpy_helper

from data import atomic_directory, canonical_json, sha256_bytes
from serving import Bundle, Manifest, PolicyOutputs, open_bundle
from serving.manifest import GOLDEN_FILE, MANIFEST_FILE, POLICY_FILE

ACTION_LAYER = "action_net.weight"
"""Weights of the last layer of a policy's graph, [A, N]: a row for each action."""


def make_variant(source: Path, destination: Path, shift: int = 1) -> Path:
    """Write a bundle in which each action has the logit of the one `shift` before it, its golden outputs made anew.

    Raises: BundleError where the source is no bundle; ValueError where its policy ends in no layer of that name.
    """
    bundle = open_bundle(source)
    graph = onnx.load_from_string((source / POLICY_FILE).read_bytes())
    layer = next((one for one in graph.graph.initializer if one.name == ACTION_LAYER), None)
    if layer is None:
        found = [one.name for one in graph.graph.initializer]
        raise ValueError(f"{source / POLICY_FILE}: expected weights {ACTION_LAYER!r} to vary, was {found}")
    layer.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(layer), shift, axis=0), ACTION_LAYER))
    policy = graph.SerializeToString()
    session = onnxruntime.InferenceSession(policy, providers=["CPUExecutionProvider"])
    inputs = {"state": bundle.golden.state, "caller_masks": bundle.golden.caller_masks}
    golden = dataclasses.replace(bundle.golden, expected=PolicyOutputs(*session.run(None, inputs)))
    changed = {POLICY_FILE: policy, GOLDEN_FILE: canonical_json(golden.to_dict()).encode("utf-8")}
    entries = json.loads((source / MANIFEST_FILE).read_text(encoding="utf-8"))
    for key in ("bundle_hash", "format_version"):
        del entries[key]
    for name, data in changed.items():
        entries["files"][name] = {"sha256": sha256_bytes(data), "size": len(data)}
    changed[MANIFEST_FILE] = Manifest.create(**entries).to_bytes()
    with atomic_directory(destination) as folder:
        for name in (MANIFEST_FILE, *entries["files"]):
            (folder / name).write_bytes(changed[name] if name in changed else (source / name).read_bytes())
    return destination


def state_rows(bundle: Bundle, count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Rows float32 [count, S] spread over the scaler's range, raw units; the age of the data is 0."""
    scaler = bundle.scaler
    obs = np.random.default_rng(seed).uniform(-1.0, 1.0, (count, len(scaler.names)))
    return np.concatenate([scaler.centre + scaler.scale * obs, np.zeros((count, 1))], axis=1).astype(np.float32)
