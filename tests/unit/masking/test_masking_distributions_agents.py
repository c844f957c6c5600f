"""One action per present agent: a plain loop as oracle, numbers by hand, and absent agents that hold anything."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masking.distributions import AgentCategorical, MaskedCategorical


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(0, 2**32), st.floats(0, 1))
def test_agents_equal_a_plain_loop_over_present_ones(seed: int, share: float) -> None:
    noise = generator(seed)
    logits = torch.randn(5, 4, 3, generator=noise, dtype=torch.float64)
    masks = torch.rand(5, 4, 3, generator=noise) < 0.5
    present = torch.rand(5, 4, generator=noise) < share
    masks[..., 1] |= present & ~masks.any(dim=-1)
    ours = AgentCategorical(logits, masks, present, absent_action=2)
    other = AgentCategorical(-logits, masks, present, absent_action=2)
    actions, entropy, divergence, mode = ours.sample(noise), ours.entropy(), ours.kl(other), ours.mode
    for b in range(5):
        log_probs, entropies, divergences = [], [], []
        for n in range(4):
            if not present[b, n]:
                assert actions[b, n] == mode[b, n] == 2
                continue
            one = MaskedCategorical(logits[b, n][None], masks[b, n][None])
            log_probs.append(one.log_prob(actions[b, n][None]).item())
            entropies.append(one.entropy().item())
            divergences.append(one.kl(MaskedCategorical(-logits[b, n][None], masks[b, n][None])).item())
            assert mode[b, n] == one.mode[0]
        assert ours.log_prob(actions)[b].item() == pytest.approx(sum(log_probs), abs=1e-12)
        assert entropy[b].item() == pytest.approx(np.mean(entropies) if entropies else 0.0, abs=1e-12)
        assert divergence[b].item() == pytest.approx(sum(divergences), abs=1e-12)


def test_agents_worked_by_hand() -> None:
    # Two present agents with 2 and 4 equally likely actions, one absent: log-probability -ln 8, mean entropy ln 8 / 2.
    masks = torch.stack([(torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]) == 1)])
    ours = AgentCategorical(torch.zeros(1, 3, 4), masks, torch.tensor([[True, True, False]]))
    assert ours.log_prob(torch.tensor([[1, 3, 0]])).item() == pytest.approx(-math.log(8))
    assert ours.entropy().item() == pytest.approx(math.log(8) / 2)
    np.testing.assert_allclose(ours.probs[0], [[0.5, 0.5, 0, 0], [0.25] * 4, [1, 0, 0, 0]])


def test_absent_agents_change_no_bit_whatever_they_hold() -> None:
    noise = generator()
    present = torch.rand(16, 5, generator=noise) < 0.5
    present[0] = False
    masks = torch.ones(16, 5, 3, dtype=torch.bool)
    logits = torch.randn(16, 5, 3, generator=noise)
    reference = AgentCategorical(logits, masks, present)
    actions = reference.sample(generator(1))
    for junk in (math.nan, math.inf, 1e9):
        here = present[..., None]
        dirty = torch.where(here, logits, junk).requires_grad_()
        ours = AgentCategorical(dirty, masks & here, present)
        strange = torch.where(present, actions, 77)
        assert torch.equal(ours.sample(generator(1)), actions)
        assert torch.equal(ours.mode, reference.mode)
        assert torch.equal(ours.log_prob(strange), reference.log_prob(actions))
        assert torch.equal(ours.entropy(), reference.entropy())
        assert torch.equal(ours.probs, reference.probs)
        assert torch.equal(ours.kl(reference), torch.zeros(16))
        (ours.log_prob(strange) + ours.entropy() + ours.kl(reference)).sum().backward()
        assert dirty.grad.isfinite().all()
        assert (dirty.grad[~present] == 0).all()
        assert (dirty.grad[present] != 0).any()
    assert reference.entropy()[0] == reference.log_prob(actions)[0] == 0
