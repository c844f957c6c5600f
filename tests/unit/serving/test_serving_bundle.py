import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from repack import repack, without_drift

from serving import (
    BundleError,
    BundleFormatError,
    BundleIntegrityError,
    BundleMismatchError,
    GoldenMismatchError,
    open_bundle,
)

FILES = (
    "drift.json",
    "golden.json",
    "likelihood.onnx",
    "manifest.json",
    "mask.onnx",
    "policy.onnx",
    "rules.json",
    "scaler.json",
    "uncertainty.onnx",
)


@pytest.fixture
def copy(bundle_path, tmp_path):
    return Path(shutil.copytree(bundle_path, tmp_path / "copy"))


def test_bundle_opens_and_tells_what_it_is(bundle, bundle_info):
    assert bundle.hash == bundle_info.hash
    assert open_bundle(bundle_info.path, expected_hash=bundle_info.hash).hash == bundle_info.hash
    assert bundle.manifest.provenance.seeds == {"run": 7}
    assert bundle.manifest.limits["drawdown_ladder"]["hard"] == 0.12
    assert bundle.rule_columns["position"] == 4
    assert len(bundle.golden.state) == 64
    assert bundle.golden.expected.fallback.tolist() == [False] * 63 + [True]


def test_another_bundle_than_the_registry_named_is_refused(bundle_path):
    with pytest.raises(BundleIntegrityError, match="expected bundle 0000"):
        open_bundle(bundle_path, expected_hash="0" * 64)


# One process does all corruptions: if onnxruntime had been given a byte, its module would be loaded.
CORRUPT = """
import sys
from pathlib import Path
import numpy as np
from serving import BundleError, BundleIntegrityError, OnnxPolicy, open_bundle

folder, rng, refused = Path(sys.argv[1]), np.random.default_rng(0), 0
for path in sorted(folder.iterdir()):
    original = path.read_bytes()
    for _ in range(20):
        data = bytearray(original)
        position = rng.integers(len(data))
        data[position] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            open_bundle(folder)
        except BundleIntegrityError:
            refused += 1
    path.write_bytes(original)
assert "onnxruntime" not in sys.modules
bundle = open_bundle(folder)
OnnxPolicy(bundle).decide(bundle.golden.state)
assert "onnxruntime" in sys.modules
heavy = {"torch", "stable_baselines3", "sb3_contrib", "mlflow", "gymnasium", "matplotlib", "configs", "envs"}
print(refused, sorted(heavy & set(sys.modules)))
"""


def test_flipped_bits_never_reach_onnxruntime_and_serving_stays_light(copy):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CORRUPT, str(copy)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == f"{20 * len(FILES)} []"


@pytest.mark.parametrize("name", FILES)
def test_missing_truncated_or_lengthened_file_is_refused(copy, name):
    data = (copy / name).read_bytes()
    for wrong in (data[:-1], b"", data + b"\0"):
        (copy / name).write_bytes(wrong)
        with pytest.raises(BundleIntegrityError, match=name):
            open_bundle(copy)
    (copy / name).unlink()
    with pytest.raises(BundleIntegrityError, match=name):
        open_bundle(copy)


def test_foreign_file_is_refused(copy):
    (copy / "policy.onnx.data").write_bytes(b"weights from elsewhere")
    with pytest.raises(BundleIntegrityError, match=r"foreign \['policy.onnx.data'\]"):
        open_bundle(copy)


def test_link_or_folder_in_place_of_a_file_is_refused(copy, tmp_path):
    moved = tmp_path / "elsewhere.json"
    shutil.move(copy / "scaler.json", moved)
    (copy / "scaler.json").symlink_to(moved)
    with pytest.raises(BundleIntegrityError, match="regular file"):
        open_bundle(copy)
    (copy / "scaler.json").unlink()
    (copy / "scaler.json").mkdir()
    with pytest.raises(BundleIntegrityError, match="regular file"):
        open_bundle(copy)


def test_missing_or_empty_directory_is_refused(tmp_path):
    with pytest.raises(BundleIntegrityError, match="expected a bundle directory"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleIntegrityError, match=r"expected manifest\.json"):
        open_bundle(tmp_path)


def test_bundle_may_be_reached_through_a_link(bundle_path, tmp_path):
    link = tmp_path / "champion"
    link.symlink_to(bundle_path)
    assert open_bundle(link).manifest == open_bundle(bundle_path).manifest


def with_limit(raw, value):
    for rule in raw["rules"]:
        if rule["name"] == "max_position_change":
            rule["parameters"]["limit"] = value
    return raw


def test_rules_that_are_not_those_of_the_graphs_are_refused(bundle_path, tmp_path):
    looser = with_limit(json.loads((bundle_path / "rules.json").read_text()), 2.0)
    data = json.dumps(looser).encode()
    with pytest.raises(BundleMismatchError, match="rule_set_hash"):
        open_bundle(repack(bundle_path, tmp_path / "a", {"rules.json": data}))

    from masking import RuleSet

    honest = RuleSet.from_dict(looser).hash
    data = json.dumps({**looser, "hash": honest}).encode()

    def change(raw):
        raw["rule_set_hash"] = honest
        raw["limits"]["max_position_change"]["limit"] = 2.0

    with pytest.raises(BundleMismatchError, match=r"onnx: detent\.rule_set_hash"):
        open_bundle(repack(bundle_path, tmp_path / "b", {"rules.json": data}, change))


def test_limits_in_the_manifest_must_be_those_of_the_rules(bundle_path, tmp_path):
    def change(raw):
        raw["limits"]["max_exposure"]["limit"] = 9.0

    with pytest.raises(BundleMismatchError, match=r"limits: expected those of rules\.json"):
        open_bundle(repack(bundle_path, tmp_path / "a", change=change))


def test_unknown_rule_is_refused_with_a_hint(bundle_path, tmp_path):
    raw = json.loads((bundle_path / "rules.json").read_text())
    raw["rules"][0]["name"] = "my_own_rule"
    with pytest.raises(BundleFormatError, match=r"my_own_rule.*--rule-module"):
        open_bundle(repack(bundle_path, tmp_path / "a", {"rules.json": json.dumps(raw).encode()}))


@pytest.mark.parametrize("data", [b"[]", b"{", b'{"factors": [0], "rules": [{}]}', b'{"factors": 3, "rules": []}'])
def test_malformed_rules_are_refused(bundle_path, tmp_path, data):
    with pytest.raises(BundleFormatError, match=r"rules\.json"):
        open_bundle(repack(bundle_path, tmp_path / "a", {"rules.json": data}))


def test_another_column_order_is_refused(bundle_path, tmp_path):
    raw = json.loads((bundle_path / "scaler.json").read_text())
    for column in raw.values():
        column[5], column[6] = column[6], column[5]
    data = json.dumps(raw).encode()
    with pytest.raises(BundleMismatchError, match=r"scaler\.json: names"):
        open_bundle(repack(bundle_path, tmp_path / "a", {"scaler.json": data}))

    def change(raw):
        raw["state_names"][5], raw["state_names"][6] = raw["state_names"][6], raw["state_names"][5]

    with pytest.raises(BundleMismatchError, match="layout_hash"):
        open_bundle(repack(bundle_path, tmp_path / "b", {"scaler.json": data}, change))


def test_scaler_that_is_not_the_one_inside_the_graph_is_refused(bundle_path, tmp_path):
    raw = json.loads((bundle_path / "scaler.json").read_text())
    raw["scale"][2] *= 2.0
    with pytest.raises(BundleMismatchError, match="scaler_hash"):
        open_bundle(repack(bundle_path, tmp_path / "a", {"scaler.json": json.dumps(raw).encode()}))


def test_action_names_must_be_those_of_the_rules(bundle_path, tmp_path):
    def change(raw):
        raw["actions"]["names"][1:3] = raw["actions"]["names"][2:0:-1]

    with pytest.raises(BundleMismatchError, match="actions: expected"):
        open_bundle(repack(bundle_path, tmp_path / "a", change=change))


def test_swapped_graph_is_refused(bundle_path, tmp_path):
    data = (bundle_path / "mask.onnx").read_bytes()
    with pytest.raises(BundleMismatchError, match=r"policy\.onnx: expected inputs and outputs"):
        open_bundle(repack(bundle_path, tmp_path / "a", {"policy.onnx": data}))


def test_graph_with_a_frozen_batch_is_refused(bundle_path, tmp_path):
    model = onnx.load(bundle_path / "mask.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(BundleMismatchError, match=r"mask\.onnx: expected inputs and outputs"):
        open_bundle(repack(bundle_path, tmp_path / "a", {"mask.onnx": model.SerializeToString()}))


def test_file_that_is_no_graph_is_refused(bundle_path, tmp_path):
    with pytest.raises(BundleFormatError, match=r"uncertainty\.onnx: onnxruntime cannot load it"):
        open_bundle(repack(bundle_path, tmp_path / "a", {"uncertainty.onnx": b"no graph"}))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("policy.onnx", "action_net.bias"),
        ("uncertainty.onnx", "weights.2"),
        ("likelihood.onnx", "variance_scale"),
        ("mask.onnx", None),
    ],
)
def test_graph_that_decides_otherwise_fails_the_golden_inputs(bundle_path, tmp_path, name, tensor):
    model = onnx.load(bundle_path / name)
    if tensor is None:
        # Every "and" of the rules becomes "or": limits no longer bind.
        for node in model.graph.node:
            node.op_type = {"And": "Or"}.get(node.op_type, node.op_type)
    else:
        weights = [weight for weight in model.graph.initializer if weight.data_type == onnx.TensorProto.FLOAT]
        weight = max(weights, key=lambda one: (one.name.endswith(tensor), np.prod(one.dims)))
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.01, weight.name))
    with pytest.raises(GoldenMismatchError, match=name):
        open_bundle(repack(bundle_path, tmp_path / "a", {name: model.SerializeToString()}))


def test_bundle_says_what_training_saw_and_how_likely_a_bar_is(bundle):
    assert bundle.drift.names == bundle.manifest.feature_names
    assert bundle.drift.window == 12
    rows = np.array([[0.001, 0.002, 0.2, 0.1]] * 3, dtype=np.float32)
    following = rows.copy()
    following[1, 0] = np.nan
    following[2] += 1.0
    usual, unknown, unlikely = bundle.run_likelihood(rows, following)
    assert usual < 0.0
    assert np.isnan(unknown)
    assert unlikely > 100.0
    assert np.isnan(bundle.run_likelihood(following[1:2], rows[:1])).all()


def test_bundle_without_drift_opens_and_has_no_likelihood(bundle_path, tmp_path):
    bundle = open_bundle(without_drift(bundle_path, tmp_path / "a"))
    assert (bundle.drift, bundle.golden.nll, bundle.manifest.drift) == (None, None, False)
    with pytest.raises(BundleMismatchError, match=r"expected a bundle with likelihood\.onnx"):
        bundle.run_likelihood(np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32))


def test_drift_of_other_columns_is_refused(bundle_path, tmp_path):
    raw = json.loads((bundle_path / "drift.json").read_text())
    raw["names"][:2] = raw["names"][1::-1]
    with pytest.raises(BundleMismatchError, match=r"drift\.json: names: expected \['gap_return', 'intraday_return'"):
        open_bundle(repack(bundle_path, tmp_path / "a", {"drift.json": json.dumps(raw).encode()}))
    raw["window"] = 0
    with pytest.raises(BundleFormatError, match=r"drift\.json: window"):
        open_bundle(repack(bundle_path, tmp_path / "b", {"drift.json": json.dumps(raw).encode()}))


def test_graph_in_place_of_the_likelihood_is_refused(bundle_path, tmp_path):
    data = (bundle_path / "uncertainty.onnx").read_bytes()
    with pytest.raises(BundleMismatchError, match=r"likelihood\.onnx: expected inputs and outputs"):
        open_bundle(repack(bundle_path, tmp_path / "a", {"likelihood.onnx": data}))
    model = onnx.load(bundle_path / "likelihood.onnx")
    (role,) = [entry for entry in model.metadata_props if entry.key == "detent.role"]
    role.value = "uncertainty.onnx"
    with pytest.raises(BundleMismatchError, match=r"likelihood\.onnx: detent\.role"):
        open_bundle(repack(bundle_path, tmp_path / "b", {"likelihood.onnx": model.SerializeToString()}))


def test_every_refusal_is_a_bundle_error():
    for error in (BundleFormatError, BundleIntegrityError, BundleMismatchError, GoldenMismatchError):
        assert issubclass(error, BundleError)
        assert issubclass(error, ValueError)
