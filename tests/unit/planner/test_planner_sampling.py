"""CEM and random shooting: never outside a mask, exact where worlds are tiny, better with more iterations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planner_worlds import DEAD, JointWorld, ParticleWorld, TableWorld, bandit, random_world, table_world

from masking import InvalidMaskError
from planner import CEM, Exhaustive, Objective, Plan, RandomShooting, auto_search, shifted
from planner.dense import DenseExhaustive
from planner.paths import Imagination
from planner.sampling import _Best, _Candidates, _Sampler

NAN = math.nan
HALF = Objective(discount=0.5)


def one(*worlds: TableWorld) -> ParticleWorld:
    return ParticleWorld(list(worlds))


def run(search: Any, world: Any, state: torch.Tensor, seed: int = 0, **options: Any) -> Plan:
    dimensions = len(getattr(world, "nvec", (1,)))
    noise = search.noise(len(state), dimensions, torch.Generator().manual_seed(seed))
    return search.plan(world, state, noise=noise, **options)


def starts(world: ParticleWorld) -> torch.Tensor:
    states = torch.arange(len(world.worlds[0].values))
    return states[:, None].expand(-1, len(world.worlds)).contiguous()


def assert_masks_were_kept(world: ParticleWorld) -> None:
    assert world.executed
    for state, action in world.executed:
        for particle, table in enumerate(world.worlds):
            living = state[:, particle] != DEAD
            assert table.masks[state[living, particle], action[living, particle]].all()


@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from(["all", "each"]), st.integers(1, 3))
def test_no_particle_ever_leaves_its_mask(seed: int, horizon: int, particles: Any, count: int) -> None:
    world = one(*(random_world(seed + index) for index in range(count)))
    for search in (
        CEM(horizon=horizon, candidates=24, elites=4, iterations=2, objective=HALF, particles=particles),
        RandomShooting(horizon=horizon, candidates=24, objective=HALF, particles=particles),
    ):
        plan = run(search, world, starts(world), seed)
        assert not plan.fallback.any()
    assert_masks_were_kept(world)


@pytest.mark.parametrize("particles", ["all", "each"])
def test_the_exact_search_keeps_the_masks_of_every_particle_too(particles: Any) -> None:
    for seed in range(40):
        world = one(random_world(seed), random_world(seed + 1), random_world(seed + 2))
        Exhaustive(horizon=3, objective=HALF, particles=particles).plan(world, starts(world))
        assert_masks_were_kept(world)


def test_cem_finds_the_optimum_of_300_tiny_worlds() -> None:
    search = CEM(horizon=3, candidates=128, elites=16, iterations=4, objective=HALF)
    gaps = []
    for seed in range(75):
        world = one(random_world(seed, num_states=4, num_actions=4))
        exact = Exhaustive(horizon=3, objective=HALF).plan(world, starts(world))
        gaps.append(exact.value - run(search, world, starts(world), seed).value)
    gap = torch.cat(gaps)
    assert len(gap) == 300
    assert gap.min() >= -1e-12  # nothing is better than exact
    assert (gap < 1e-6).float().mean() >= 0.99


def test_more_iterations_find_what_shooting_misses() -> None:
    # One of 5^6 sequences is best, and its beginnings are already better than others.
    world = one(bandit([0.0, 1.0, 2.0, 3.0, 4.0]))
    state = torch.zeros(20, 1, dtype=torch.int64)
    objective = Objective(discount=1.0)
    shot = run(RandomShooting(horizon=6, candidates=60, objective=objective), world, state)
    refined = run(CEM(horizon=6, candidates=60, elites=10, iterations=6, objective=objective), world, state)
    assert refined.value.mean() > 23.5
    assert shot.value.mean() < 22.0


def test_the_first_dimension_values_are_the_best_seen_for_each_action() -> None:
    plan = run(
        CEM(horizon=2, candidates=64, elites=4, objective=HALF),
        one(bandit([0.0, 1.0, 3.0], [True, False, True])),
        torch.tensor([[0]]),
    )
    assert plan.action_values is not None
    assert plan.action_values.tolist() == [[1.5, -math.inf, 4.5]]
    assert plan.sequence.tolist() == [[2, 2]]
    assert plan.nodes == 3 * 64 * 2


def test_ties_hold() -> None:
    plan = run(CEM(candidates=32, elites=4), one(bandit([2.0, 2.0, 2.0])), torch.tensor([[0]]))
    assert plan.sequence.tolist() == [[0, 0, 0]]


def test_equal_noise_gives_equal_plans_and_a_batch_equals_its_rows() -> None:
    world, search = one(random_world(3, 5, 4)), CEM(horizon=3, candidates=40, elites=5, objective=HALF)
    state = starts(world)
    noise = search.noise(len(state), 1, torch.Generator().manual_seed(0))
    batch, again = (search.plan(world, state, noise=noise) for _ in range(2))
    rows = [search.plan(world, state[row : row + 1], noise=noise[:, row : row + 1]) for row in range(len(state))]
    assert torch.equal(batch.sequence, again.sequence)
    assert torch.equal(batch.sequence, torch.cat([row.sequence for row in rows]))
    torch.testing.assert_close(batch.value, torch.cat([row.value for row in rows]), rtol=0, atol=0)
    other = search.noise(len(state), 1, torch.Generator().manual_seed(1))
    assert not torch.equal(noise, other)


def test_an_earlier_plan_is_a_candidate_as_far_as_it_is_valid() -> None:
    # Only one of 4^5 sequences earns anything; two candidates will not find it by chance.
    key = [3, 1, 2, 3, 1]
    following = [[step + 1 if action == key[step] else 6 for action in range(4)] for step in range(5)]
    world = one(table_world([*following, [5] * 4, [6] * 4], [[0.0] * 4] * 7, values=[0, 0, 0, 0, 0, 9.0, 0]))
    search = CEM(horizon=5, candidates=2, elites=1, iterations=1, objective=Objective(discount=1.0))
    state = torch.tensor([[0]])
    assert run(search, world, state).value.tolist() == [0.0]
    previous = torch.tensor([key])
    assert run(search, world, state, previous=previous).sequence.tolist() == [key]
    world.worlds[0].masks[0, 3] = False
    assert run(search, world, state, previous=previous).sequence[0, 0] != 3


def test_a_plan_is_shifted_with_hold_at_its_end() -> None:
    plan = run(CEM(candidates=32, elites=4, objective=HALF), one(bandit([0.0, 1.0])), torch.tensor([[0]]))
    assert shifted(plan.sequence, 0).tolist() == [[1, 1, 0]]
    assert shifted(torch.zeros(1, 2, 2, dtype=torch.int64), torch.tensor([5, 4])).tolist() == [[[0, 0], [5, 4]]]


def test_terminated_particles_earn_nothing_more_and_forbid_nothing() -> None:
    # The first particle ends with action 1; the second goes on and must be allowed to take it again.
    ends = table_world([[0, DEAD]], [[0.0, 5.0]], values=[-100.0])
    lasts = table_world([[0, 0]], [[0.0, 1.0]])
    for plan in (
        run(CEM(horizon=3, candidates=64, elites=4, objective=HALF), one(ends, lasts), torch.tensor([[0, 0]])),
        Exhaustive(horizon=3, objective=HALF).plan(one(ends, lasts), torch.tensor([[0, 0]])),
    ):
        assert plan.sequence.tolist() == [[1, 1, 1]]
        assert plan.value.tolist() == [(5.0 + 1.75) / 2]
        assert plan.length.tolist() == [3]


def test_a_sequence_ends_where_its_last_particle_does() -> None:
    world = one(table_world([[0, DEAD]], [[-1.0, 5.0]], values=[0.0]))
    plan = run(CEM(horizon=3, candidates=64, elites=4, objective=HALF), world, torch.tensor([[0]]))
    assert plan.sequence.tolist() == [[1, 0, 0]]
    assert plan.length.tolist() == [1]


@pytest.mark.parametrize("broken", [NAN, math.inf, -math.inf])
def test_a_broken_number_never_outranks_a_loss_and_is_counted(broken: float) -> None:
    search = CEM(horizon=1, candidates=16, elites=4, iterations=1)
    plan = run(search, one(bandit([broken, -7.0]), bandit([0.0, -7.0])), torch.tensor([[0, 0]]))
    assert plan.action.tolist() == [1]
    assert 0 < plan.non_finite.item() < 16
    lost = run(search, one(bandit([broken, broken])), torch.tensor([[0]]))
    assert lost.fallback.tolist() == [True]
    assert (lost.action.tolist(), lost.length.tolist()) == ([0], [0])
    assert lost.non_finite.tolist() == [16]


def test_no_iteration_begins_that_would_end_late_but_the_first_always_runs() -> None:
    world, search = one(bandit([0.0, 1.0])), CEM(horizon=2, candidates=8, elites=2, iterations=5, objective=HALF)
    for deadline, iterations in ((0.5, 1), (2.5, 2), (3.5, 3)):
        times = iter(range(20))  # one second each
        plan = run(search, world, torch.tensor([[0]]), deadline=deadline, clock=lambda: next(times))  # noqa: B023
        assert plan.nodes == iterations * 8 * 2
        assert not plan.complete
    assert run(search, world, torch.tensor([[0]])).complete


def test_the_best_of_earlier_iterations_stays_an_elite_and_is_counted_once() -> None:
    search = CEM(horizon=1, candidates=2, elites=1, iterations=2, smoothing=0.0, objective=HALF)
    world, state = one(bandit([0.0, 1.0, 2.0])), torch.tensor([[0]])
    found = _Candidates(
        torch.tensor([[[[0]], [[1]]]]),
        torch.ones(1, 2),
        torch.tensor([[0.0, 1.0]]),
        torch.zeros(1, 2, dtype=torch.bool),
    )
    sampler = _Sampler(Imagination(world, HALF), state, torch.ones(1, 1, 3, dtype=torch.bool), 1, 2)
    best = _Best(torch.tensor([[[2]]]), torch.ones(1), torch.tensor([2.0]), torch.zeros(1, 3), torch.zeros(1))
    assert search._frequencies(found, best, sampler).tolist() == [[[[0.0, 0.0, 1.0]]]]
    assert search._frequencies(found, None, sampler).tolist() == [[[[0.0, 1.0, 0.0]]]]
    two = replace(search, elites=2)
    assert two._frequencies(found, None, sampler).tolist() == [[[[0.5, 0.5, 0.0]]]]


def test_the_safe_action_wins_ties_wherever_it_stands() -> None:
    world, state = ParticleWorld([bandit([2.0, 2.0, 2.0, 2.0])], safe_action=2), torch.tensor([[0]])
    for plan in (Exhaustive().plan(world, state), DenseExhaustive().plan(world, state), run(CEM(), world, state)):
        assert plan.sequence.tolist() == [[2, 2, 2]]
    ends = ParticleWorld([table_world([[0, DEAD, 0]], [[-1.0, 5.0, -1.0]])], safe_action=2)
    for plan in (Exhaustive().plan(ends, state), DenseExhaustive().plan(ends, state), run(CEM(), ends, state)):
        assert plan.sequence.tolist() == [[1, 2, 2]]
        assert plan.length.tolist() == [1]
        assert plan.action_values is not None
        assert plan.action_values.argmax().item() == 1


def test_a_joint_tie_trades_nothing() -> None:
    world = JointWorld()
    still = world.start(3, 0)
    world.GROWTH = (1.0, 1.0, 1.0)  # then every trade only costs
    plan = run(CEM(horizon=2, candidates=64, elites=8, objective=HALF), world, still)
    assert plan.sequence.tolist() == [[[5, 5, 5]] * 2] * 3


# --- worlds without a safe action -------------------------------------------------------------------------------------


def fenced(masks: list[list[bool]], rewards: list[list[float]], following: list[list[int]]) -> TableWorld:
    return table_world(following, rewards, masks)


def test_without_a_safe_action_only_common_actions_are_planned_and_dead_ends_avoided() -> None:
    # Both particles allow 1 and 2 at first. After 1, which pays more, they have no action in common.
    following, rewards = [[0, 1, 2], [1, 1, 1], [2, 2, 2]], [[0.0, 5.0, 1.0], [9.0, 9.0, 9.0], [1.0, 1.0, 1.0]]
    first = fenced([[False, True, True], [True, False, False], [True, True, False]], rewards, following)
    second = fenced([[False, True, True], [False, True, True], [False, True, False]], rewards, following)
    objective = Objective(discount=1.0)
    for search in (Exhaustive(horizon=2, objective=objective), CEM(horizon=2, candidates=64, objective=objective)):
        world = ParticleWorld([first, second], safe_action=None)
        state = torch.tensor([[0, 0]])
        plan = search.plan(world, state) if isinstance(search, Exhaustive) else run(search, world, state)
        assert plan.sequence.tolist() == [[2, 1]]
        assert plan.value.tolist() == [2.0]
        assert plan.non_finite.tolist() == [0]
        assert_masks_were_kept(world)


def test_where_nothing_is_common_any_more_there_is_no_plan() -> None:
    first, second = bandit([1.0, 1.0], [True, False]), bandit([1.0, 1.0], [False, True])
    world, state = ParticleWorld([first, second], safe_action=None), torch.tensor([[0, 0]])
    for plan in (
        Exhaustive().plan(world, state), DenseExhaustive().plan(world, state), run(CEM(), world, state)
    ):  # fmt: skip
        assert plan.fallback.tolist() == [True]
        assert plan.non_finite.tolist() == [0]
    assert_masks_were_kept(world)


def test_a_row_without_a_plan_takes_the_lowest_action_that_is_valid_everywhere() -> None:
    world = ParticleWorld([bandit([NAN] * 3, [False, True, True])], safe_action=None)
    state = torch.tensor([[0]])
    for plan in (Exhaustive(horizon=1).plan(world, state), run(CEM(horizon=1), world, state)):
        assert plan.fallback.tolist() == [True]
        assert plan.action.tolist() == [1]


def test_particles_each_need_a_safe_action() -> None:
    world = ParticleWorld([bandit([0.0])], safe_action=None)
    with pytest.raises(ValueError, match="particles: expected 'all' for a model without a safe action"):
        Exhaustive(particles="each").plan(world, torch.tensor([[0]]))


# --- joint limits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_joint_actions_keep_the_budget_at_every_imagined_step(seed: int) -> None:
    world = JointWorld()
    state = world.start(6, seed)
    plan = run(CEM(horizon=3, candidates=64, elites=8, objective=HALF), world, state, seed)
    assert len(world.executed) == 9
    for rows, action in world.executed:
        assert world.limits.check(rows, action).all()
    # Candidates can spend the budget together only, so separate masks would have broken it.
    assert not world.limits.check(state, torch.full((6, 3), 10)).any()
    assert plan.action.shape == (6, 3)
    assert plan.action_values is None
    assert world.limits.check(state, plan.action).all()
    assert (plan.value >= world.hold_value(state, 3, 0.5) - 1e-9).all()


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon: expected >= 1, was 0"),
        ({"iterations": 0}, "iterations: expected >= 1, was 0"),
        ({"candidates": 8, "elites": 9}, "candidates: expected at least elites=9 and at least 2, was 8"),
        ({"candidates": 1, "elites": 1}, "candidates: expected at least elites=1 and at least 2, was 1"),
        ({"smoothing": 1.0}, r"smoothing: expected a number in \[0, 1\), was 1.0"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CEM(**options)


def test_too_few_candidates_for_shooting_are_refused() -> None:
    with pytest.raises(ValueError, match="candidates: expected"):
        RandomShooting(candidates=1)


def test_wrong_arguments_of_a_call_are_named() -> None:
    world, search, state = one(bandit([0.0, 1.0])), CEM(horizon=2, candidates=4, elites=2), torch.tensor([[0]])
    with pytest.raises(ValueError, match=r"noise: expected \[3, 1, 4, 2, 1\], was \[1\]"):
        search.plan(world, state, noise=torch.zeros(1))
    with pytest.raises(ValueError, match=r"previous: expected int64 \[1, 2\], was torch.int64 \[1, 3\]"):
        run(search, world, state, previous=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="previous: expected actions from 0 to 1, was"):
        run(search, world, state, previous=torch.tensor([[0, -3]]))
    with pytest.raises(ValueError, match="state: expected at least one row, was 0"):
        run(search, world, state[:0])
    with pytest.raises(ValueError, match=r"particles: expected one of \['all', 'each'\], was 'some'"):
        run(CEM(particles="some"), world, state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="particles: expected 'all' for joint actions"):
        run(CEM(particles="each"), JointWorld(), JointWorld().start(1, 0))
    with pytest.raises(ValueError, match="model: expected one action dimension"):
        Exhaustive().plan(JointWorld(), JointWorld().start(1, 0))
    world.worlds[0].masks[0, 0] = False
    with pytest.raises(InvalidMaskError, match="safe action 0"):
        run(search, world, state)


def test_auto_search_is_exact_while_it_fits() -> None:
    assert auto_search(7, 3, max_nodes=399) == Exhaustive(horizon=3, max_nodes=399)
    sampling = auto_search(7, 4, max_nodes=399, objective=HALF)
    assert isinstance(sampling, CEM)
    assert (sampling.candidates, sampling.elites, sampling.objective) == (33, 2, HALF)  # 3 * 33 * 4 = 396 steps
    with pytest.raises(ValueError, match="max_nodes: expected >= 24 for 3 iterations of two candidates over 4 steps"):
        auto_search(7, 4, max_nodes=23)
