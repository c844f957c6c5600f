import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn import functional

import world_model.networks as networks_module
from world_model import EnsembleMLP

GENERATOR_SEED = 1


def plain_loop(network, inputs, members):
    """One member after the other with ordinary matrix products."""
    means, logvars = [], []
    for slot, member in enumerate(members):
        hidden = inputs[slot] if inputs.ndim == 3 else inputs
        for layer, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
            hidden = hidden @ weight[member] + bias[member]
            if layer < len(network.weights) - 1:
                hidden = functional.silu(hidden)
        mean, raw = hidden.split(network.num_outputs, dim=1)
        means.append(mean)
        logvars.append(-3.0 + 7.0 * torch.tanh(raw))  # bounds (-10, 4)
    return torch.stack(means), torch.stack(logvars)


@pytest.mark.parametrize("members", [None, (2,), (3, 0), (1, 1, 2)])
@pytest.mark.parametrize("shared", [True, False])
def test_batched_ensemble_equals_a_plain_loop_over_members(make_network, members, shared):
    network = make_network()
    asked = range(4) if members is None else members
    shape = (5, 3) if shared else (len(asked), 5, 3)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(GENERATOR_SEED))
    mean, logvar = network(inputs, members)
    wanted_mean, wanted_logvar = plain_loop(network, inputs, asked)
    torch.testing.assert_close(mean, wanted_mean)
    torch.testing.assert_close(logvar, wanted_logvar)


def test_members_start_different_and_are_reproducible(make_network):
    first, again = make_network(seed=3), make_network(seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.weights[0][0], first.weights[0][1])


def test_weights_are_cut_at_two_standard_deviations(make_network):
    network = make_network(size=16, hidden=(256,))
    std = 1.0 / (2.0 * 16**0.5)
    assert network.weights[0].abs().max().item() <= 2.0 * std
    # a normal cut at two std keeps 0.8796 of its spread
    assert network.weights[0].std().item() == pytest.approx(0.8796 * std, rel=0.03)


def test_fresh_members_start_near_the_constant_gaussian(make_network):
    _, logvar = make_network()(torch.zeros(1, 3))
    assert logvar.abs().max().item() < 1.0


@pytest.mark.parametrize("bounds", [(-10.0, 4.0), (-6.0, -5.0), (1.0, 2.0)])
def test_log_variance_never_leaves_its_bounds(make_network, bounds):
    network = make_network(bounds=bounds)
    _, logvar = network(1e4 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0)))
    assert bounds[0] <= logvar.min().item()
    assert logvar.max().item() <= bounds[1]


@pytest.mark.parametrize("shape", [(5, 2), (3,), (3, 5, 3), (4, 5, 2), (1, 1, 1, 3)])
def test_wrong_input_shape_is_refused(make_network, shape):
    with pytest.raises(ValueError, match="inputs: expected"):
        make_network()(torch.zeros(shape))


@pytest.mark.parametrize("members", [(), (4,), (-1,)])
def test_unknown_member_is_refused(make_network, members):
    with pytest.raises(ValueError, match=r"0\.\.3"):
        make_network()(torch.zeros(1, 3), members)


def test_crossed_bounds_are_refused():
    with pytest.raises(ValueError, match="low < high"):
        EnsembleMLP(2, 3, 3, hidden=(4,), logvar_bounds=(1.0, 1.0), generator=torch.Generator())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_network_exports_to_onnx_with_a_free_batch(make_network, tmp_path):
    # The warnings filtered above come from inside the exporter, not from our code.
    network = make_network().eval()
    program = torch.onnx.export(
        network,
        (torch.zeros(2, 3),),
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=["inputs"],
        output_names=["mean", "logvar"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    path = tmp_path / "network.onnx"
    program.save(path)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    for rows in (1, 7):
        inputs = torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows))
        with torch.no_grad():
            wanted = network(inputs)
        given = session.run(None, {"inputs": inputs.numpy()})
        for ours, theirs in zip(wanted, given, strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5)


@pytest.mark.parametrize("members", [None, (2,), (3, 0)])
@pytest.mark.parametrize("shared", [True, False])
def test_pieces_without_gradients_equal_the_whole_with_them(make_network, monkeypatch, members, shared):
    monkeypatch.setattr(networks_module, "PIECE_ROWS", 4)  # 10 rows: two whole pieces and a part
    network = make_network()
    count = 4 if members is None else len(members)
    inputs = torch.randn((10, 3) if shared else (count, 10, 3), generator=torch.Generator().manual_seed(0))
    wanted_mean, wanted_logvar = network(inputs, members)
    assert wanted_mean.requires_grad
    with torch.no_grad():
        mean, logvar = network(inputs, members)
        torch.testing.assert_close(mean, wanted_mean)
        torch.testing.assert_close(logvar, wanted_logvar)
        torch.testing.assert_close(network.mean(inputs, members), wanted_mean)
    torch.testing.assert_close(network.mean(inputs, members), wanted_mean)


def test_rowwise_gives_each_row_its_own_member(make_network, monkeypatch):
    monkeypatch.setattr(networks_module, "PIECE_ROWS", 2)
    network = make_network()
    inputs = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    member = torch.tensor([3, 0, 3, 1, 0, 3, 3, 3, 1])  # nobody asks member 2
    mean, logvar = network.rowwise(inputs, member)
    every_mean, every_logvar = network(inputs)
    rows = torch.arange(9)
    torch.testing.assert_close(mean, every_mean[member, rows].detach())
    torch.testing.assert_close(logvar, every_logvar[member, rows].detach())


def test_rowwise_refuses_other_shapes_and_members(make_network):
    network = make_network()
    with pytest.raises(ValueError, match=r"expected \[B, 3\] and \[B\], was \[5, 3\] and \[4\]"):
        network.rowwise(torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"0\.\.3, was 4"):
        network.rowwise(torch.zeros(1, 3), torch.tensor([4]))
