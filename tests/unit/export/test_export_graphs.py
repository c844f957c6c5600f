import dataclasses
import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bundle_parts import FIELDS, make_dynamics, make_market_model, make_policy, make_scaler, usual_rows

from export.graphs import LikelihoodGraph, MaskGraph, PolicyGraph
from export.onnx_files import EXAMPLE_BATCH, OPSET, onnx_bytes, strip_metadata
from export.states import probe_states
from world_model.marginals import next_row_nll


@pytest.fixture
def graph():
    dynamics = make_dynamics()
    return PolicyGraph(dynamics, make_scaler(), make_policy(dynamics)).eval()


def run(graph, state, callers=None):
    callers = torch.ones(len(state), 7, dtype=torch.bool) if callers is None else callers
    with torch.no_grad():
        return graph(state, callers)


@pytest.fixture
def flat():
    state = torch.zeros(2, 14)
    state[:, 2] = 0.2
    return state


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("head", ["action_net", "value_net"])
def test_network_that_is_not_finite_holds_with_fallback(graph, flat, head, broken):
    with torch.no_grad():
        getattr(graph, head).bias[0] = broken
    action, probabilities, masks, value, fallback = run(graph, flat)
    assert fallback.all()
    assert not action.any()
    assert probabilities.tolist() == [[1.0, 0, 0, 0, 0, 0, 0]] * 2
    assert value.tolist() == [0.0, 0.0]
    assert masks[:, 1:4].all()


def test_ties_go_to_the_lowest_index(graph, flat):
    with torch.no_grad():
        graph.action_net.weight.zero_()
        graph.action_net.bias.zero_()
    action, probabilities, *_ = run(graph, flat)
    assert action.tolist() == [0, 0]
    assert probabilities[0].tolist() == [0.25, 0.25, 0.25, 0.25, 0.0, 0.0, 0.0]
    no_hold = torch.tensor([[False] + [True] * 6] * 2)
    assert run(graph, flat, no_hold)[0].tolist() == [1, 1]


def test_enormous_logits_stay_finite_and_forbidden_actions_stay_at_zero(graph, flat):
    with torch.no_grad():
        graph.action_net.weight.zero_()
        graph.action_net.bias.copy_(torch.tensor([-3e38, -3e38, -3e38, -3e38, 3e38, 3e38, 3e38]))
    action, probabilities, _, _, fallback = run(graph, flat)
    assert not fallback.any()
    assert probabilities[0].tolist() == [0.25, 0.25, 0.25, 0.25, 0.0, 0.0, 0.0]
    assert action.tolist() == [0, 0]


def test_probabilities_are_the_masked_softmax_by_hand(graph, flat):
    with torch.no_grad():
        graph.action_net.weight.zero_()
        graph.action_net.bias.copy_(torch.log(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0, 100.0, 100.0])))
    action, probabilities, *_ = run(graph, flat)
    # Only the first four are valid for a flat account: 1 + 2 + 3 + 4 = 10.
    np.testing.assert_allclose(probabilities[0], [0.1, 0.2, 0.3, 0.4, 0, 0, 0], atol=1e-6)
    assert action.tolist() == [3, 3]


def test_mask_graph_is_the_rule_set():
    dynamics = make_dynamics()
    state = probe_states(dynamics, make_scaler(), 300, np.random.default_rng(0))
    expected = dynamics.action_masks(state)
    np.testing.assert_array_equal(MaskGraph(dynamics)(torch.from_numpy(state)).numpy(), expected)


def test_policy_graph_copies_the_policy():
    dynamics = make_dynamics()
    policy = make_policy(dynamics)
    graph = PolicyGraph(dynamics, make_scaler(), policy)
    with torch.no_grad():
        graph.action_net.bias.add_(1.0)
    assert not torch.equal(graph.action_net.bias, policy.action_net.bias)


def test_likelihood_graph_is_the_models_with_heavy_tails_and_columns_that_follow_the_baseline():
    volatility = dataclasses.replace(FIELDS[2], unit="per sqrt(year)", low=0.0, high=math.inf)
    model = make_market_model((*FIELDS[:2], volatility, *FIELDS[3:]))
    model.inverse_dof.copy_(torch.tensor([0.0, 0.2, 0.4, 0.0]))
    model.follows_baseline.copy_(torch.tensor([False, False, False, True]))
    model.variance_scale.copy_(torch.tensor([1.0, 2.0, 0.5, 1.0]))
    rows = torch.from_numpy(usual_rows(200)).abs()
    model.volatility.fit(rows.double().numpy()[:-1], (rows[1:] - rows[:-1]).double() / 0.01, model.varying)
    assert model.volatility.active
    example = torch.zeros(EXAMPLE_BATCH, 4)
    data = onnx_bytes(LikelihoodGraph(model), {"features": example, "next_features": example.clone()}, ("nll",), {})
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    # Jumps far out as well, where Gaussian and heavy tails differ most.
    following = rows[1:] * torch.logspace(0, 2, 199)[:, None]
    (found,) = session.run(None, {"features": rows[:-1].numpy(), "next_features": following.numpy()})
    expected = next_row_nll(model, rows[:-1], following).mean(dim=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert found[-1] > 10.0 * abs(found[0])


def test_written_graphs_carry_only_our_metadata(bundle_path, bundle):
    for name in ("policy.onnx", "mask.onnx", "uncertainty.onnx", "likelihood.onnx"):
        model = onnx.load(bundle_path / name)
        assert [opset.version for opset in model.opset_import if opset.domain == ""] == [OPSET]
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert metadata["detent.role"] == name
        assert metadata["detent.rule_set_hash"] == bundle.rule_set.hash
        assert metadata["detent.layout_hash"] == bundle.manifest.layout_hash
        assert len(metadata) == 5
        parts = (model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer)
        assert not any(part.doc_string or len(part.metadata_props) for part in parts)


def test_strip_reaches_inner_graphs():
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"], doc_string="secret")],
        "inner",
        [],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    outer = onnx.helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    graph = onnx.helper.make_graph([outer], "outer", [], [], doc_string="secret")
    model = onnx.helper.make_model(graph, doc_string="secret")
    onnx.helper.set_model_props(model, {"path": "secret"})
    strip_metadata(model)
    assert b"secret" not in model.SerializeToString()
