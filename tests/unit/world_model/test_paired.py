"""States beside actions give what the network gives for both together, scaled on either side."""

from __future__ import annotations

import torch

from world_model.networks import EnsembleMLP
from world_model.paired import PairedEnsemble

MEMBERS, STATES, ACTIONS, OUTPUTS = (2, 0, 2), 3, 4, 2


def network() -> EnsembleMLP:
    made = EnsembleMLP(
        3,
        STATES + ACTIONS,
        OUTPUTS,
        hidden=(5, 6),
        logvar_bounds=(-4.0, 2.0),
        generator=torch.Generator().manual_seed(0),
    )
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return made.requires_grad_(False)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def test_each_state_has_its_action_and_scales_are_folded_in() -> None:
    ensemble, scale = network(), torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 1.5, 3.0])
    spread, shift = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 10.0])
    paired = PairedEnsemble(ensemble, MEMBERS, input_scale=scale, output_scale=spread, output_shift=shift)
    states, actions = drawn(3, 7, STATES), drawn(3, 7, ACTIONS)
    expected = ensemble.mean(torch.cat((states, actions), dim=2) * scale, MEMBERS) * spread + shift
    torch.testing.assert_close(paired.each(states, actions), expected, rtol=1e-5, atol=1e-5)


def test_pairs_are_all_actions_of_a_state_side_by_side() -> None:
    ones = torch.ones(STATES + ACTIONS)
    paired = PairedEnsemble(
        network(), MEMBERS, input_scale=ones, output_scale=torch.ones(OUTPUTS), output_shift=torch.zeros(OUTPUTS)
    )
    states = drawn(3, 5, STATES)
    actions = torch.eye(ACTIONS).repeat(5, 1).expand(3, -1, -1)
    expected = paired.each(states.repeat_interleave(ACTIONS, dim=1), actions)
    torch.testing.assert_close(paired.pairs(states), expected)


def test_as_many_outputs_are_computed_as_have_a_scale() -> None:
    ensemble, width = network(), 2 * OUTPUTS
    paired = PairedEnsemble(
        ensemble,
        MEMBERS,
        input_scale=torch.ones(STATES + ACTIONS),
        output_scale=torch.ones(width),
        output_shift=torch.zeros(width),
    )
    states, actions = drawn(3, 5, STATES), drawn(3, 5, ACTIONS)
    mean, raw = ensemble.unbounded(torch.cat((states, actions), dim=2), MEMBERS)
    torch.testing.assert_close(paired.each(states, actions), torch.cat((mean, raw), dim=2))
