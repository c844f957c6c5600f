import pytest
import torch

import world_model.backprop as backprop_module
from world_model import EnsembleMLP, member_nll
from world_model.backprop import MemberGradients

INPUTS, OUTPUTS, MEMBERS = 3, 2, 3


def make_network(seed=0, bounds=(-10.0, 4.0)):
    generator = torch.Generator().manual_seed(seed)
    network = EnsembleMLP(MEMBERS, INPUTS, OUTPUTS, hidden=(8, 6), logvar_bounds=bounds, generator=generator)
    with torch.no_grad():
        for bias in network.biases:
            bias.add_(0.1 * torch.randn(bias.shape, generator=generator))
    return network


@pytest.fixture
def table():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(50, INPUTS, generator=generator), torch.randn(50, OUTPUTS, generator=generator)


def plain_step(network, table, rows):
    inputs, targets = table
    mean, logvar = network(inputs[rows])
    losses = member_nll(mean, logvar, targets[rows])
    for parameter in network.parameters():
        parameter.grad = None
    losses.sum().backward()
    return losses.detach()


@pytest.mark.parametrize("piece_rows", [512, 4, 1])
@pytest.mark.parametrize("bounds", [(-10.0, 4.0), (-1.0, 5.0)])
def test_losses_and_gradients_are_those_of_autograd(table, monkeypatch, piece_rows, bounds):
    monkeypatch.setattr(backprop_module, "PIECE_ROWS", piece_rows)
    plain, fast = make_network(bounds=bounds), make_network(bounds=bounds)
    gradients = MemberGradients(fast, *table)
    for count in (9, 10):  # a batch of another size is cut into other pieces; gradients start from 0 again
        rows = torch.randint(50, (MEMBERS, count), generator=torch.Generator().manual_seed(count))
        torch.testing.assert_close(gradients(rows), plain_step(plain, table, rows))
        for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_training_follows_a_plain_loop_member_by_member(table):
    plain, fast = make_network(), make_network()
    optimisers = [torch.optim.AdamW(network.parameters(), lr=1e-2) for network in (plain, fast)]
    gradients = MemberGradients(fast, *table)
    generator = torch.Generator().manual_seed(3)
    before = [parameter.detach().clone() for parameter in fast.parameters()]
    for _ in range(20):
        rows = torch.randint(50, (MEMBERS, 16), generator=generator)
        plain_step(plain, table, rows)
        gradients(rows)
        for optimiser in optimisers:
            optimiser.step()
    for ours, theirs, start in zip(fast.parameters(), plain.parameters(), before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
        assert not torch.allclose(ours, start, atol=1e-2)


def test_one_members_rows_do_not_reach_the_others(table):
    network = make_network()
    gradients = MemberGradients(network, *table)
    rows = torch.arange(10).repeat(MEMBERS, 1)
    losses = gradients(rows)
    kept = [parameter.grad[0].clone() for parameter in network.parameters()]
    rows[1:] += 20
    assert torch.equal(gradients(rows)[0], losses[0])
    for parameter, gradient in zip(network.parameters(), kept, strict=True):
        assert torch.equal(parameter.grad[0], gradient)


def test_weights_that_are_loaded_later_are_the_ones_used(table):
    network, other = make_network(seed=0), make_network(seed=5)
    gradients = MemberGradients(network, *table)
    network.load_state_dict(other.state_dict())
    rows = torch.arange(10).repeat(MEMBERS, 1)
    torch.testing.assert_close(gradients(rows), plain_step(other, table, rows))


def test_a_number_that_is_none_is_seen_in_the_loss_of_its_member(table):
    inputs, targets = table
    targets = targets.clone()
    targets[7, 1] = torch.nan
    rows = torch.arange(5).repeat(MEMBERS, 1)
    rows[1, 0] = 7
    losses = MemberGradients(make_network(), inputs, targets)(rows)
    assert losses.isnan().tolist() == [False, True, False]


def test_tables_of_other_shapes_are_refused(table):
    inputs, targets = table
    for wrong in ((inputs[:, :2], targets), (inputs, targets[:, :1]), (inputs, targets[:-1])):
        with pytest.raises(ValueError, match=r"inputs, targets: expected \[50, 3\] and \[50, 2\]"):
            MemberGradients(make_network(), *wrong)
