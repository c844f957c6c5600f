import pytest
import torch

from world_model.snapshots import MemberSnapshots


def set_all(network, value):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(value)


def member_values(network):
    return [{float(p[member].detach().unique()) for p in network.parameters()} for member in range(network.num_members)]


def test_one_members_improvement_does_not_snapshot_the_others(make_network):
    network = make_network(members=3)
    snapshots = MemberSnapshots(network)
    set_all(network, 1.0)
    assert snapshots.update(1, torch.tensor([5.0, 5.0, 5.0]))
    set_all(network, 2.0)
    assert snapshots.update(2, torch.tensor([6.0, 4.0, 5.0]))
    set_all(network, 3.0)
    assert not snapshots.update(3, torch.tensor([7.0, 4.5, 5.0]))
    snapshots.restore()
    assert member_values(network) == [{1.0}, {2.0}, {1.0}]
    assert snapshots.scores.tolist() == [5.0, 4.0, 5.0]
    assert snapshots.epochs == [1, 2, 1]


def test_snapshot_is_a_copy_not_a_view(make_network):
    network = make_network(members=2)
    snapshots = MemberSnapshots(network)
    set_all(network, 1.0)
    snapshots.update(1, torch.zeros(2))
    set_all(network, 9.0)
    snapshots.restore()
    assert member_values(network) == [{1.0}, {1.0}]


@pytest.mark.parametrize("scores", [torch.zeros(3), torch.tensor([0.0, torch.nan])])
def test_nan_or_misshapen_scores_are_refused(make_network, scores):
    with pytest.raises(ValueError, match="expected 2 numbers"):
        MemberSnapshots(make_network(members=2)).update(1, scores)
