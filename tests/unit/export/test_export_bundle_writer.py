import dataclasses
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bundle_parts
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bundle_parts import (
    FIELDS,
    make_drift,
    make_dynamics,
    make_market_model,
    make_policy,
    make_scaler,
    sideways_dynamics,
)

from configs.schema import PlannerConfig, RewardConfig
from data import Scaler
from export import ExportError, ParityError, bundle_writer, check_parity
from export.reference import Reference
from masking import DrawdownLadder
from masking.strict_policy import StrictMaskablePolicy
from mbpo import TorchPolicy
from mbpo.planning import PlannerPolicy
from serving import PolicyOutputs

NAMES = [
    "drift.json",
    "golden.json",
    "likelihood.onnx",
    "manifest.json",
    "mask.onnx",
    "policy.onnx",
    "rules.json",
    "scaler.json",
    "uncertainty.onnx",
]


def test_bundle_holds_exactly_its_files_and_no_path_of_the_machine(bundle_path):
    assert sorted(os.listdir(bundle_path)) == NAMES
    repository = Path(bundle_parts.__file__).parents[2]
    for name in NAMES:
        data = (bundle_path / name).read_bytes()
        for trace in (b"site-packages", b".py", b"/home", b"/tmp", str(repository).encode(), b"stack_trace"):
            assert trace not in data


def test_parity_was_close_and_put_every_action_to_the_test(bundle_info):
    parity = bundle_info.parity
    assert parity.states == parity.likelihoods == 1000
    assert parity.max_probability_error < 1e-5
    assert parity.max_value_error < 1e-4
    assert parity.ties <= 2
    assert min(parity.valid_actions) >= 30
    assert max(parity.valid_actions[1:]) < 1000
    assert 20 <= parity.fallbacks <= 200
    assert parity.to_dict()["valid_actions"] == list(parity.valid_actions)


WRITE = "import sys; from pathlib import Path; import bundle_parts; bundle_parts.write(Path(sys.argv[1]))"


def test_another_process_writes_the_same_bytes(bundle_path, tmp_path):
    # Another working directory, hash seed and destination name must not show.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(bundle_parts.__file__).parent), *filter(None, map(str, sys.path))]),
        "PYTHONHASHSEED": "12345",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WRITE, str(tmp_path / "other")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for name in NAMES:
        assert (tmp_path / "other" / name).read_bytes() == (bundle_path / name).read_bytes(), name


def test_full_disk_leaves_nothing_behind(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses every byte beyond 4 KiB of a file, as a full disk does in the middle of a write.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            bundle_parts.write(tmp_path / "bundle")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == []


class OtherTemperature(StrictMaskablePolicy):
    """Decides by something that is in no layer, so that the exported layers are not the policy."""

    def get_distribution(self, obs, action_masks=None):
        distribution = super().get_distribution(obs, action_masks)
        latent, _ = self.mlp_extractor(self.extract_features(obs))
        distribution.proba_distribution(self.action_net(latent) * 0.5)
        distribution.apply_masking(action_masks)
        return distribution


def test_graph_that_is_not_the_policy_fails_parity_and_leaves_nothing_behind(tmp_path):
    policy = make_policy(make_dynamics(), OtherTemperature)
    generator = torch.get_rng_state()
    with pytest.raises(ParityError, match="probabilities"):
        bundle_parts.write(tmp_path / "bundle", policy=policy)
    assert os.listdir(tmp_path) == []
    assert torch.equal(torch.get_rng_state(), generator)


def test_existing_destination_is_refused_and_kept(bundle_path):
    before = (bundle_path / "manifest.json").read_bytes()
    with pytest.raises(FileExistsError):
        bundle_parts.write(bundle_path)
    assert (bundle_path / "manifest.json").read_bytes() == before


def wider_policy():
    dynamics = make_dynamics()
    policy = make_policy(dynamics)
    policy.action_space.n = 8
    return policy


def other_extractor():
    policy = make_policy(make_dynamics())
    policy.features_extractor = torch.nn.Identity()
    return policy


def shuffled_scaler():
    scaler = make_scaler()
    return Scaler(scaler.names[::-1], scaler.centre, scaler.scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda: {"scaler": shuffled_scaler()}, "scaler.names: expected"),
        (lambda: {"policy": wider_policy()}, r"policy.action_space: expected Discrete\(7\)"),
        (lambda: {"policy": other_extractor()}, "features_extractor: expected FlattenExtractor, was Identity"),
        (lambda: {"fields": FIELDS[::-1]}, "fields: expected"),
        (lambda: {"fields": FIELDS[:-1]}, "fields: expected"),
        (lambda: {"states": np.zeros((3, 4), np.float32)}, r"states: expected \[N, 14\], was \[3, 4\]"),
        (lambda: {"drift": dataclasses.replace(make_drift(), names=tuple("abcd"))}, r"drift\.names: expected .*'a'"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ExportError, match=message):
        bundle_parts.write(tmp_path / "bundle", **changes())
    assert os.listdir(tmp_path) == []


def parts(change, dynamics=None):
    """Parts of a bundle with a planner, one of which the planner has otherwise."""
    dynamics = dynamics or make_dynamics()
    policy, model, scaler = make_policy(dynamics), make_market_model(), make_scaler()
    given = {"dynamics": dynamics, "policy": policy, "market_model": model, "scaler": scaler}
    if change == "rules":
        dynamics = make_dynamics(max_position_change=0.5)
    if change == "ladder":
        account_rules = dataclasses.replace(dynamics.account_rules, ladder=DrawdownLadder(kill=0.2))
        dynamics = dataclasses.replace(dynamics, account_rules=account_rules)
    if change == "costs":
        account_rules = dataclasses.replace(dynamics.account_rules, cost_rate=0.5)
        dynamics = dataclasses.replace(dynamics, account_rules=account_rules)
    if change == "columns":
        given["dynamics"] = dataclasses.replace(dynamics, feature_names=(*dynamics.feature_names[:3], "trend"))
        given["fields"] = (*FIELDS[:3], dataclasses.replace(FIELDS[3], name="trend"))
        given["market_model"] = SimpleNamespace(fields=given["fields"])
        given["scaler"] = Scaler(given["dynamics"].obs_names, scaler.centre, scaler.scale)
    if change == "market model":
        model = make_market_model()
    if change == "policy":
        policy = make_policy(dynamics)
    if change == "scaler":
        scaler = Scaler(scaler.names, scaler.centre, scaler.scale * np.float32(2.0))
    value = TorchPolicy("value", policy, scaler)
    config = PlannerConfig(horizon=2, scenarios=4)
    planner = PlannerPolicy(dynamics, model, config, seed=0, gamma=0.97, value=value)
    return {**given, "planner": planner}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rules", r"planner\.dynamics\.rule_set: expected .*'limit': 0\.6.*, was .*'limit': 0\.5"),
        ("ladder", r"planner\.dynamics\.account_rules: expected .*kill=0\.15.*, was .*kill=0\.2"),
        ("costs", r"planner\.dynamics\.account_rules: expected .*, was .*cost_rate=0\.5"),
        ("columns", r"planner\.dynamics\.state_names: expected .*'trend'.*, was .*'momentum'"),
        ("market model", r"planner\.model: expected the market_model given, was another object"),
        ("policy", r"planner\.value\.network: expected the policy given, was another object"),
        ("scaler", r"planner\.value\.scaler: expected .*, was "),
    ],
)
def test_a_planner_of_other_parts_is_refused_before_anything_is_exported(tmp_path, monkeypatch, change, message):
    def export(*args, **kwargs):
        raise AssertionError("exported")

    monkeypatch.setattr(bundle_writer, "onnx_bytes", export)
    with pytest.raises(ExportError, match=message):
        bundle_parts.write(tmp_path / "bundle", **parts(change))
    assert os.listdir(tmp_path) == []


def test_a_planner_under_a_rule_that_looks_along_an_axis_is_refused(tmp_path):
    with (
        sideways_dynamics() as sideways,
        pytest.raises(ExportError, match="same masks with actions first"),
    ):
        bundle_parts.write(tmp_path / "bundle", **parts("nothing", sideways))
    assert os.listdir(tmp_path) == []


def test_a_planner_may_have_a_reward_of_its_own(tmp_path, monkeypatch):
    class Exported(Exception):
        pass

    def export(*args, **kwargs):
        raise Exported

    monkeypatch.setattr(bundle_writer, "onnx_bytes", export)
    given = parts("nothing")
    given["dynamics"] = dataclasses.replace(given["dynamics"], reward=RewardConfig(risk_aversion=3.0))
    with pytest.raises(Exported):
        bundle_parts.write(tmp_path / "bundle", **given)


@pytest.fixture(scope="module")
def reference():
    dynamics = make_dynamics()
    return Reference(dynamics, make_scaler(), make_policy(dynamics), make_market_model())


def test_parity_also_covers_the_given_states(bundle, reference):
    real = np.zeros((5, 14), dtype=np.float32)
    report = check_parity(bundle, reference, count=1000, tolerance=1e-5, seed=1, states=real)
    assert report.states == 1005


def test_parity_on_too_few_states_proves_nothing(bundle, reference):
    with pytest.raises(ValueError, match="at least 1000 parity states, was 999"):
        check_parity(bundle, reference, count=999, tolerance=1e-5, seed=0)


def test_parity_refuses_the_bundle_of_another_policy(bundle):
    dynamics = make_dynamics()
    other = Reference(dynamics, make_scaler(), make_policy(dynamics, seed=2), make_market_model())
    with pytest.raises(ParityError, match=r"policy graph \(batch\): "):
        check_parity(bundle, other, count=1000, tolerance=1e-5, seed=0)


class Shifted:
    """A policy session whose numbers are a little off, in batches only or in single rows only."""

    def __init__(self, session, name, amount, *, alone):
        self.session, self.name, self.amount, self.alone = session, name, amount, alone

    def run(self, names, inputs):
        outputs = PolicyOutputs(*self.session.run(names, inputs))
        if (len(outputs.action) == 1) == self.alone:
            numbers = getattr(outputs, self.name)
            numbers += np.where(numbers == 0.0, 0.0, self.amount).astype(np.float32)
        return list(outputs)


@pytest.mark.parametrize(("alone", "how"), [(False, "batch"), (True, "single rows")])
@pytest.mark.parametrize("name", ["probabilities", "value"])
def test_parity_refuses_numbers_a_little_off(bundle, reference, name, alone, how):
    session = Shifted(bundle.policy_session, name, 1e-3, alone=alone)
    broken = dataclasses.replace(bundle, policy_session=session)
    with pytest.raises(ParityError, match=rf"policy graph \({how}\): {name}: row"):
        check_parity(broken, reference, count=1000, tolerance=1e-5, seed=0)


def test_parity_refuses_the_bundle_of_other_limits(bundle):
    dynamics = make_dynamics(max_position_change=0.5)
    other = Reference(dynamics, make_scaler(), make_policy(dynamics), make_market_model())
    with pytest.raises(ParityError, match="action_masks: row"):
        check_parity(bundle, other, count=1000, tolerance=1e-5, seed=0)


def test_parity_refuses_the_bundle_of_another_market_model(bundle):
    dynamics, model = make_dynamics(), make_market_model()
    with torch.no_grad():
        model.network.weights[0].mul_(1.05)
    other = Reference(dynamics, make_scaler(), make_policy(dynamics), model)
    with pytest.raises(ParityError, match="uncertainty graph: row"):
        check_parity(bundle, other, count=1000, tolerance=1e-5, seed=0)


def test_parity_refuses_the_likelihood_of_another_market_model(bundle):
    dynamics, model = make_dynamics(), make_market_model()
    # The members are as far apart as before.
    model.variance_scale.mul_(1.01)
    other = Reference(dynamics, make_scaler(), make_policy(dynamics), model)
    with pytest.raises(ParityError, match="likelihood graph: row"):
        check_parity(bundle, other, count=1000, tolerance=1e-5, seed=0)


def session_of(bundle_path, name, change):
    model = onnx.load(bundle_path / name)
    change(model.graph)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_parity_refuses_a_policy_graph_without_the_way_out_to_hold(bundle, bundle_path, reference):
    def forget_hold(graph):
        # The rules force Hold with the same constant; only the way out, `~some & hold`, is to forget it.
        (way_out,) = [node for node in graph.node if node.op_type == "And" and "hold" in node.input]
        way_out.input[list(way_out.input).index("hold")] = "nothing"
        graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1, 7), dtype=bool), "nothing"))

    broken = dataclasses.replace(bundle, policy_session=session_of(bundle_path, "policy.onnx", forget_hold))
    with pytest.raises(ParityError, match="where nothing is allowed"):
        check_parity(broken, reference, count=1000, tolerance=1e-5, seed=0)


def test_parity_refuses_a_mask_graph_whose_rules_do_not_bind(bundle, bundle_path, reference):
    def loosen(graph):
        for node in graph.node:
            node.op_type = {"And": "Or"}.get(node.op_type, node.op_type)

    broken = dataclasses.replace(bundle, mask_session=session_of(bundle_path, "mask.onnx", loosen))
    with pytest.raises(ParityError, match="mask graph"):
        check_parity(broken, reference, count=1000, tolerance=1e-5, seed=0)


def test_parity_refuses_a_bundle_whose_last_check_has_something_to_do(bundle, reference):
    stricter = dataclasses.replace(bundle, rule_set=make_dynamics(max_position_change=0.5).rule_set)
    with pytest.raises(ParityError, match="last check: expected no overridden action, was"):
        check_parity(stricter, reference, count=1000, tolerance=1e-5, seed=0)


def test_parity_leaves_policy_and_global_generator_alone(bundle):
    policy = make_policy(make_dynamics())
    policy.set_training_mode(True)
    state = {name: value.clone() for name, value in policy.state_dict().items()}
    generator = torch.get_rng_state()
    reference = Reference(make_dynamics(), make_scaler(), policy, make_market_model())
    check_parity(bundle, reference, count=1000, tolerance=1e-5, seed=0)
    assert policy.training
    assert all(torch.equal(value, state[name]) for name, value in policy.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
