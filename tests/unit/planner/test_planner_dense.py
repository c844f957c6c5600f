"""The dense tree gives the plans of the sparse one, whatever is masked, ended or broken."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planner_worlds import DEAD, JointWorld, ParticleWorld, TableWorld, bandit, random_world

from planner import Exhaustive, Objective
from planner.dense import DenseExhaustive

BROKEN = [math.nan, math.inf, -math.inf]


@st.composite
def worlds(draw: st.DrawFn) -> ParticleWorld:
    seed, count = draw(st.integers(0, 10**6)), draw(st.integers(1, 3))
    made = []
    for index in range(count):
        world = random_world(seed + index)
        ends = torch.rand(world.reward.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
        world.next_state[ends] = DEAD
        if draw(st.booleans()):
            world.reward[draw(st.integers(0, 2)), draw(st.integers(0, 2))] = draw(st.sampled_from(BROKEN))
        made.append(world)
    safe = draw(st.sampled_from([0, None]))
    return ParticleWorld(made, safe_action=safe)


@given(worlds(), st.integers(1, 3), st.sampled_from(["all", "each"]), st.sampled_from([1.0, 0.5]))
def test_it_plans_as_the_sparse_tree_does(world: ParticleWorld, horizon: int, particles: Any, tail: float) -> None:
    if world.safe_action is None:
        particles = "all"
    options = {"horizon": horizon, "objective": Objective(discount=0.5, tail=tail), "particles": particles}
    states = torch.arange(3)[:, None].expand(-1, len(world.worlds)).contiguous()
    sparse, dense = Exhaustive(**options).plan(world, states), DenseExhaustive(**options).plan(world, states)
    for name in ("action", "value", "sequence", "length", "action_values", "fallback"):
        torch.testing.assert_close(getattr(dense, name), getattr(sparse, name), rtol=0, atol=0, msg=name)
    assert dense.nodes == 3 * sum(3**depth for depth in range(1, horizon + 1))
    assert ((dense.non_finite > 0) == (sparse.non_finite > 0)).all()


def test_it_can_be_exported_for_any_batch() -> None:
    class Planned(torch.nn.Module):
        def __init__(self, world: TableWorld) -> None:
            super().__init__()
            self.world = world

        def forward(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            plan = DenseExhaustive(horizon=2, objective=Objective(discount=0.5)).plan(self.world, state)
            return plan.action, plan.value

    world = Exported(random_world(1, 5, 3))
    exported = torch.export.export(
        Planned(world),  # type: ignore[arg-type]
        (torch.zeros(3, dtype=torch.int64),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    ).module()
    for batch in (1, 2, 5):
        states = torch.arange(batch)
        wanted = Exhaustive(horizon=2, objective=Objective(discount=0.5)).plan(world, states)
        action, value = exported(states)
        assert torch.equal(action, wanted.action)
        torch.testing.assert_close(value, wanted.value)


class Exported(ParticleWorld):
    """One particle without the asserts that look at values."""

    def __init__(self, world: TableWorld) -> None:
        super().__init__([world])

    def action_masks(self, state: torch.Tensor) -> torch.Tensor:
        return self.worlds[0].masks[state][:, None]

    def step(self, state: torch.Tensor, action: torch.Tensor) -> Any:
        from planner import Transition

        world, chosen = self.worlds[0], action[:, 0]
        reward = world.reward[state, chosen][:, None]
        return Transition(world.next_state[state, chosen], reward, reward > torch.inf, torch.zeros_like(reward))

    def value(self, state: torch.Tensor) -> torch.Tensor:
        return self.worlds[0].values[state][:, None]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="horizon: expected >= 1, was 0"):
        DenseExhaustive(horizon=0)
    with pytest.raises(ValueError, match="model: expected one action dimension"):
        DenseExhaustive().plan(JointWorld(), JointWorld().start(1, 0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="safe action 0"):
        DenseExhaustive().plan(ParticleWorld([bandit([0.0, 1.0], [False, True])]), torch.tensor([[0]]))
