"""Planning in worlds learned whole: steps are those of the model, masks are kept, and plans reach what they should."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mbpo.planning_world import JointWorldPlanning, WorldPlanning
from planner import CEM, MPC, Exhaustive, Objective
from planner.dense import DenseExhaustive
from world_model.experience import Experience
from world_model.known import KnownParts
from world_model.world import WorldModel
from world_model.world_fit import WorldFitConfig, fit_world_model

LEFT, RIGHT, BROKEN = 0, 1, 2
FIT = WorldFitConfig(num_members=3, num_elites=2, hidden=(32,), batch_size=64, max_epochs=40, learning_rate=1e-2)
KNOWN = KnownParts(
    reward=lambda obs, action, next_obs: -(next_obs[:, 0] - 0.5).abs(),
    terminated=lambda next_obs: next_obs[:, 0].abs() > 1.0,
)


def line(rows: int = 600, num_actions: tuple[int, ...] = (3,)) -> Experience:
    """A point on a line that moves by 0.1 (each dimension once); rewards fall with its distance from 0.5."""
    rng = np.random.default_rng(0)
    obs = np.stack((rng.uniform(-1.0, 1.0, rows), np.full(rows, 0.25)), axis=1)
    action = rng.integers(0, 2, (rows, len(num_actions)))
    following = obs + np.stack(((0.1 * (2 * action - 1)).sum(axis=1), np.zeros(rows)), axis=1)
    masks = np.tile([True, True, False], (rows, len(num_actions)))
    return Experience(
        obs=obs.astype(np.float32),
        action=action,
        reward=-np.abs(following[:, 0] - 0.5).astype(np.float32),
        next_obs=following.astype(np.float32),
        terminated=np.abs(following[:, 0]) > 1.0,
        action_masks=masks,
        episode=np.arange(rows) // 5,
        num_actions=num_actions,
    )


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return fit_world_model(line(), FIT, seed=0, known=KNOWN)[0]


def rows(*positions: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([[x, 0.25] for x in positions]), torch.tensor([[True, True, False]] * len(positions))


def test_particles_step_as_their_members_do(world: WorldModel) -> None:
    planning = WorldPlanning(world, noise=torch.zeros(1, 4, 3))
    assert planning.members == world.elites * 2
    obs, masks = rows(0.0, 0.4)
    action = torch.tensor([[RIGHT] * 4, [LEFT] * 4])
    step = planning.step(planning.roots(obs, masks), action)
    mean, _ = world.predict(obs, action[:, :1])
    for particle, member in enumerate(planning.members):
        wanted = mean[world.elites.index(member)]
        torch.testing.assert_close(step.state.obs[particle], obs + wanted[:, :-1])
        torch.testing.assert_close(step.reward[:, particle], -(step.state.obs[particle, :, 0] - 0.5).abs())
    assert step.state.depth == 1
    assert not step.terminated.any()
    assert (step.uncertainty >= 0).all()
    assert (step.uncertainty == step.uncertainty[:, :1]).all()


def test_noise_is_that_of_the_depth_and_the_particle_for_every_row(world: WorldModel) -> None:
    noise = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    planning = WorldPlanning(world, noise=noise)
    obs, masks = rows(0.0, 0.0)
    state = planning.roots(obs, masks)
    for depth in range(2):
        step = planning.step(state, torch.full((2, 2), RIGHT))
        torch.testing.assert_close(step.state.obs[:, 0], step.state.obs[:, 1])
        mean, _, _ = world.step_each(state.obs, torch.full((2, 2, 1), RIGHT), planning.members)
        gap = (step.state.obs - mean)[:, 0, 0]
        assert torch.equal(gap.sign(), noise[depth, :, 0].sign())
        state = step.state


def test_a_step_beyond_the_edge_ends_the_particle(world: WorldModel) -> None:
    planning = WorldPlanning(world)
    obs, masks = rows(0.98, 0.0)
    step = planning.step(planning.roots(obs, masks), torch.full((2, 2), RIGHT))
    assert step.terminated.tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("search", [Exhaustive(horizon=4), CEM(horizon=4, candidates=64, elites=8)])
def test_a_plan_walks_to_where_it_pays_and_never_uses_the_broken_action(world: WorldModel, search: Any) -> None:
    planning = WorldPlanning(world)
    obs, masks = rows(0.1, 0.85)
    options = {} if isinstance(search, Exhaustive) else {
        "noise": search.noise(2, 1, torch.Generator().manual_seed(0))
    }  # fmt: skip
    plan = search.plan(planning, planning.roots(obs, masks), **options)
    assert plan.sequence.tolist() == [[RIGHT] * 4, [LEFT] * 4]
    assert plan.action_values is not None
    assert torch.isneginf(plan.action_values[:, BROKEN]).all()


@pytest.mark.parametrize("noisy", [False, True])
def test_branching_is_stepping_under_every_action(world: WorldModel, noisy: bool) -> None:
    noise = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0)) if noisy else None
    planning = WorldPlanning(world, noise=noise)
    obs, masks = rows(0.0, 0.95, math.nan)
    root = planning.roots(obs, masks)
    branched = planning.branch(root)
    for action in range(3):
        step = planning.step(root, torch.full((3, 2), action))
        own = torch.arange(action, 9, 3)
        taken = planning.take(branched.state, own)
        torch.testing.assert_close(taken.obs, step.state.obs, equal_nan=True)
        assert torch.equal(taken.action_masks, step.state.action_masks)
        assert torch.equal(taken.alive, step.state.alive)
        assert taken.depth == step.state.depth == 1
        torch.testing.assert_close(branched.reward[own], step.reward)
        assert torch.equal(branched.terminated[own], step.terminated)
        torch.testing.assert_close(branched.uncertainty[own], step.uncertainty, equal_nan=True)


def test_searches_that_branch_plan_as_those_that_step(world: WorldModel) -> None:
    planning = WorldPlanning(world)
    stepping = SimpleNamespace(
        safe_action=None,
        **{name: getattr(planning, name) for name in ("action_masks", "step", "value", "take")},
    )
    obs, masks = rows(-0.6, 0.0, 0.95, math.nan)
    root = planning.roots(obs, masks)
    dense = DenseExhaustive(horizon=3)
    cem = CEM(horizon=3, candidates=16, elites=4, iterations=2)
    noise = cem.noise(4, 1, torch.Generator().manual_seed(0))
    for found, expected in (
        (dense.plan(planning, root), dense.plan(stepping, root)),
        (dense.plan(planning, root), Exhaustive(horizon=3).plan(planning, root)),
        (cem.plan(planning, root, noise=noise), cem.plan(stepping, root, noise=noise)),
    ):
        assert torch.equal(found.sequence, expected.sequence)
        assert torch.equal(found.fallback, expected.fallback)
        torch.testing.assert_close(found.value, expected.value, rtol=1e-5, atol=1e-5)
    joint, _ = fit_world_model(line(num_actions=(3, 3)), replace(FIT, max_epochs=1), seed=0, known=KNOWN)
    with pytest.raises(ValueError, match="one action dimension"):
        joint.branch_each(torch.zeros(2, 1, 2), joint.elites)


def test_reward_and_end_may_be_learned() -> None:
    model, _ = fit_world_model(line(), FIT, seed=0)
    obs = torch.tensor([[[-0.5, 0.25]], [[0.4, 0.25]]])
    action = torch.tensor([[[RIGHT]], [[LEFT]]])
    following, reward, ended = model.step_each(obs, action, model.elites)
    for place, elite in enumerate(model.elites):
        mean, _ = model.predict(obs[place], action[place], (elite,))
        torch.testing.assert_close(reward[place], mean[0, :, -1])
        expected = model.termination_probability(obs[place], action[place], following[place]) > 0.5
        assert torch.equal(ended[place], expected)


def test_the_value_after_the_last_step_and_doubt_count(world: WorldModel) -> None:
    obs, masks = rows(0.5)
    away = WorldPlanning(world, value=lambda reached: 100.0 * reached[:, 0].abs())
    plan = Exhaustive(horizon=1).plan(away, away.roots(obs, masks))
    assert plan.action.tolist() == [RIGHT]
    doubting = Exhaustive(horizon=1, objective=Objective(uncertainty_penalty=1000.0))
    plain = WorldPlanning(world)
    assert (
        doubting.plan(plain, plain.roots(obs, masks)).value
        < Exhaustive(horizon=1).plan(plain, plain.roots(obs, masks)).value
    )


def test_dead_particles_are_not_heard_and_broken_ones_are_never_worth_anything(world: WorldModel) -> None:
    planning = WorldPlanning(world)
    obs, masks = rows(0.2)
    alone = planning.step(planning.roots(obs, masks), torch.tensor([[RIGHT, RIGHT]])).uncertainty
    state = planning.roots(obs, masks)
    strange = state._replace(obs=torch.tensor([[[0.2, 0.25]], [[50.0, math.nan]]]), alive=torch.tensor([[True, False]]))
    step = planning.step(strange, torch.tensor([[RIGHT, RIGHT]]))
    assert step.uncertainty.tolist() == [[0.0, 0.0]]  # one alone is never at odds with itself
    assert (alone > 0).all()
    broken = planning.step(state._replace(obs=torch.full((2, 1, 2), math.nan)), torch.tensor([[RIGHT, RIGHT]]))
    assert torch.isneginf(broken.reward).all()
    plan = Exhaustive(horizon=2).plan(planning, planning.roots(torch.full((1, 2), math.nan), masks))
    assert plan.fallback.tolist() == [True]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_an_obs_that_is_not_finite_is_worth_nothing_whatever_reward_end_and_masks_say(number: float) -> None:
    known = KnownParts(
        reward=lambda obs, action, next_obs: torch.ones(len(obs)),
        terminated=lambda next_obs: torch.zeros(len(next_obs), dtype=torch.bool),
        action_masks=lambda obs: torch.ones(len(obs), 3, dtype=torch.bool),
    )
    model, _ = fit_world_model(line(), replace(FIT, max_epochs=1), seed=0, known=known)
    planning = WorldPlanning(model)
    obs, masks = rows(0.0, 0.0)
    obs[1, 1] = number
    step = planning.step(planning.roots(obs, masks), torch.full((2, 2), RIGHT))
    assert step.reward.tolist() == [[1.0, 1.0], [-math.inf, -math.inf]]
    assert Exhaustive(horizon=2).plan(planning, planning.roots(obs, masks)).fallback.tolist() == [False, True]


@pytest.mark.parametrize("search", [Exhaustive(horizon=3), CEM(horizon=3, candidates=32, elites=4)])
def test_a_world_without_hold_is_decided_in(world: WorldModel, search: Any) -> None:
    planning = WorldPlanning(world)

    def imagine(state: np.ndarray, action_masks: np.ndarray) -> Any:
        return planning, planning.roots(torch.from_numpy(state), torch.from_numpy(action_masks))

    controller = MPC(imagine, search, budget_ms=1e9)
    obs = np.array([[0.85, 0.25], [0.1, 0.25], [math.nan, 0.25]], dtype=np.float32)
    masks = np.array([[True, True, False], [False, True, True], [False, True, False]])
    action = controller.act(obs, masks)
    assert action[[0, 2]].tolist() == [LEFT, RIGHT]
    assert masks[1, action[1]]
    assert controller.decided == {"plan": 2, "hold": 1}


def test_states_without_a_valid_action_are_no_way_out() -> None:
    # Every step costs; beyond 0.05 nothing is valid. Ending there would save the rest of the cost.
    known = KnownParts(
        reward=lambda obs, action, next_obs: -torch.ones(len(obs)),
        terminated=lambda next_obs: next_obs[:, 0] > 99.0,
        action_masks=lambda obs: torch.stack([obs[:, 0] < 0.05, obs[:, 0] < 0.05, obs[:, 0] > 99.0], dim=1),
    )
    model, _ = fit_world_model(line(), FIT, seed=0, known=known)
    planning = WorldPlanning(model)
    obs, masks = rows(0.0)
    plan = Exhaustive(horizon=3).plan(planning, planning.roots(obs, masks))
    assert plan.sequence[0, 0] == LEFT
    assert plan.length.tolist() == [3]


def test_joint_actions_are_planned_dimension_by_dimension() -> None:
    model, _ = fit_world_model(line(num_actions=(3, 3)), FIT, seed=0, known=KNOWN)
    planning = JointWorldPlanning(model, hold=(LEFT, LEFT))
    obs, masks = torch.tensor([[0.0, 0.25]]), torch.tensor([[True, True, False] * 2])
    search = CEM(horizon=2, candidates=64, elites=8)
    noise = search.noise(1, 2, torch.Generator().manual_seed(0))
    plan = search.plan(planning, planning.roots(obs, masks), noise=noise)
    assert plan.sequence.tolist() == [[[RIGHT, RIGHT], [RIGHT, RIGHT]]]


def test_wrong_models_and_noise_are_refused(world: WorldModel) -> None:
    with pytest.raises(ValueError, match="model: expected several action dimensions"):
        JointWorldPlanning(world, hold=(0,))
    with pytest.raises(ValueError, match=r"noise: expected \[H, a multiple of 2, 3\], was \[1, 3, 3\]"):
        WorldPlanning(world, noise=torch.zeros(1, 3, 3))
