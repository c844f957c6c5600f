"""Exhaustive search against worked numbers, dynamic programming and brute force."""

from __future__ import annotations

import copy
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planner_worlds import (
    DEAD,
    LineState,
    LineWorld,
    PositionWorld,
    TableWorld,
    TimedWorld,
    bandit,
    brute_force,
    dynamic_programming,
    table_world,
)

from masking import ActionTable, InvalidMaskError, RuleSet
from masking.rules import MaxPositionChange
from planner import Exhaustive, Objective, Plan, Transition


def search(
    world: Any, state: Any, horizon: int, discount: float, *, deadline: Any = None, clock: Any = None, **options: Any
) -> Plan:
    made = Exhaustive(horizon=horizon, objective=Objective(discount=discount), **options)
    return made.plan(world, state, deadline=deadline, clock=clock)


INF = math.inf
NAN = math.nan
ONE_ROW = torch.tensor([0])

# Multiples of 1/4 at discounts 0, 1/2 and 1: every sum is exact in any order, so ties are ties for both sides.
FINITE = [step / 4 for step in range(-8, 9)]


@st.composite
def worlds(draw: st.DrawFn, numbers: list[float]) -> TableWorld:
    num_states, num_actions = draw(st.integers(1, 4)), draw(st.integers(1, 3))

    def table(elements: st.SearchStrategy[Any]) -> list[list[Any]]:
        row = st.lists(elements, min_size=num_actions, max_size=num_actions)
        return draw(st.lists(row, min_size=num_states, max_size=num_states))

    masks = table(st.booleans())
    return table_world(
        table(st.integers(DEAD, num_states - 1)),
        table(st.sampled_from(numbers)),
        [[True, *row[1:]] for row in masks],
        draw(st.lists(st.sampled_from(numbers), min_size=num_states, max_size=num_states)),
    )


def every_state(world: TableWorld) -> torch.Tensor:
    return torch.arange(len(world.values))


horizons = st.integers(1, 4)
discounts = st.sampled_from([0.0, 0.5, 1.0])
# At discount 0 later steps do not change the value of a sequence, and brute force cannot tell them apart.
positive_discounts = st.sampled_from([0.5, 1.0])


# --- worked by hand ---------------------------------------------------------------------------------------------------


def test_bandit_takes_the_best_arm_and_sums_it_over_the_horizon() -> None:
    plan = search(bandit([0.0, 1.0, 3.0]), ONE_ROW, horizon=2, discount=0.5)
    assert plan.action.tolist() == [2]
    assert plan.value.tolist() == [4.5]  # 3 + 3/2
    assert plan.sequence.tolist() == [[2, 2]]
    assert plan.action_values.tolist() == [[1.5, 2.5, 4.5]]  # first arm, then the best arm at half
    assert plan.length.tolist() == [2]
    assert not plan.fallback.any()


def test_masked_arm_is_minus_inf_and_never_pulled() -> None:
    plan = search(bandit([0.0, 1.0, 3.0], masks=[True, True, False]), ONE_ROW, horizon=1, discount=1.0)
    assert plan.action.tolist() == [1]
    assert plan.action_values.tolist() == [[0.0, 1.0, -INF]]


def test_the_value_after_the_last_step_is_discounted_by_the_whole_horizon() -> None:
    plan = search(bandit([0.0, 3.0], value=8.0), ONE_ROW, horizon=2, discount=0.5)
    assert plan.value.tolist() == [6.5]  # 3 + 3/2 + 8/4


# Hold pays 1 in state 0; advancing pays nothing but opens the cashing in (10) two states on.
CHAIN = {
    "next_state": [[0, 1, 0], [1, 2, 1], [2, 2, 2]],
    "reward": [[1.0, 0.0, 99.0], [0.0, 0.0, 99.0], [0.0, 0.0, 10.0]],
    "masks": [[True, True, False], [True, True, False], [True, False, True]],
}


def test_chain_holds_while_the_prize_is_beyond_the_horizon() -> None:
    plan = search(table_world(**CHAIN), ONE_ROW, horizon=2, discount=0.5)
    assert plan.sequence.tolist() == [[0, 0]]
    assert plan.action_values.tolist() == [[1.5, 0.0, -INF]]


def test_chain_goes_for_the_prize_once_it_is_in_reach_and_waits_for_its_mask() -> None:
    plan = search(table_world(**CHAIN), ONE_ROW, horizon=3, discount=0.5)
    assert plan.sequence.tolist() == [[1, 1, 2]]
    assert plan.action_values.tolist() == [[1.75, 2.5, -INF]]  # 1 + 1/2 + 1/4 against 10/4
    # Depth 1: hold, advance. Depth 2: two each. Depth 3: two in each of 4 nodes.
    assert plan.nodes == 2 + 4 + 8


def test_point_on_a_line_walks_to_its_target_and_stays_inside_the_walls() -> None:
    state = LineState(torch.tensor([0.0, 4.0, 3.0], dtype=torch.float64), torch.zeros(3, 2))
    plan = search(LineWorld(target=3.0), state, horizon=4, discount=1.0)
    assert plan.sequence.tolist() == [[2, 2, 2, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert plan.value.tolist() == [-3.0, 0.0, 0.0]  # -2 - 1 - 0 - 0
    assert plan.action_values[0, 1] == -INF
    assert plan.action_values[1, 2] == -INF
    beyond = search(LineWorld(target=9.0), state, horizon=2, discount=1.0)
    assert beyond.sequence.tolist() == [[2, 2], [0, 0], [2, 0]]


def test_masks_are_those_of_the_imagined_position_not_of_the_first_one() -> None:
    rules = RuleSet([MaxPositionChange(limit=0.25)], ActionTable())
    position = torch.tensor([0.0, 1.0], dtype=torch.float64)
    state = {"position": position, "trading_state": torch.zeros_like(position)}
    plan = search(PositionWorld(rules), state, horizon=3, discount=1.0)
    assert plan.sequence.tolist() == [[2, 3, 4], [6, 0, 0]]  # 0.25, 0.5, 0.75 and 1.25, held
    assert plan.value.tolist() == [1.5, 3.75]


# --- oracles ----------------------------------------------------------------------------------------------------------


@given(worlds(FINITE), horizons, positive_discounts)
def test_equals_brute_force_with_every_tie(world: TableWorld, horizon: int, discount: float) -> None:
    _assert_equals_brute_force(world, horizon, discount)


@given(worlds([*FINITE[::4], NAN, INF, -INF]), horizons, positive_discounts)
def test_equals_brute_force_where_numbers_are_broken(world: TableWorld, horizon: int, discount: float) -> None:
    _assert_equals_brute_force(world, horizon, discount)


def _assert_equals_brute_force(world: TableWorld, horizon: int, discount: float) -> None:
    plan = search(world, every_state(world), horizon, discount)
    wanted = [brute_force(world, start, horizon, discount) for start in range(len(world.values))]
    assert plan.action_values.tolist() == [outcome.action_values for outcome in wanted]
    assert plan.value.tolist() == [outcome.value for outcome in wanted]
    assert plan.sequence.tolist() == [outcome.sequence for outcome in wanted]
    assert plan.action.tolist() == [outcome.sequence[0] for outcome in wanted]
    assert plan.length.tolist() == [outcome.length for outcome in wanted]
    assert plan.non_finite.tolist() == [outcome.non_finite for outcome in wanted]
    assert plan.fallback.tolist() == [outcome.value == -INF for outcome in wanted]
    # Each distinct valid prefix is one node, and each node is one row of one step.
    assert plan.nodes == sum(outcome.prefixes for outcome in wanted) == sum(world.steps)


@given(worlds(FINITE), horizons, discounts)
def test_value_equals_dynamic_programming(world: TableWorld, horizon: int, discount: float) -> None:
    plan = search(world, every_state(world), horizon, discount)
    assert plan.value.tolist() == dynamic_programming(world, horizon, discount)


@given(worlds([*FINITE, NAN, INF]), horizons, discounts)
def test_no_returned_sequence_ever_leaves_a_mask(world: TableWorld, horizon: int, discount: float) -> None:
    plan = search(world, every_state(world), horizon, discount)
    for start, (sequence, length) in enumerate(zip(plan.sequence.tolist(), plan.length.tolist(), strict=True)):
        state = start
        for action in sequence[:length]:
            assert world.masks[state, action]
            state = int(world.next_state[state, action])
        assert sequence[length:] == [0] * (horizon - length)
        assert length == horizon or state == DEAD or plan.fallback[start]


@given(worlds([*FINITE, NAN, -INF]), horizons, discounts, st.data())
def test_a_batch_equals_its_rows_one_by_one(world: TableWorld, horizon: int, discount: float, data: Any) -> None:
    starts = data.draw(st.lists(st.integers(0, len(world.values) - 1), min_size=1, max_size=6))
    batch = search(world, torch.tensor(starts), horizon, discount)
    rows = [search(world, torch.tensor([start]), horizon, discount) for start in starts]
    for name in (spec.name for spec in fields(Plan) if spec.name not in {"nodes", "complete"}):
        torch.testing.assert_close(
            getattr(batch, name), torch.cat([getattr(row, name) for row in rows]), rtol=0, atol=0
        )
    assert batch.nodes == sum(row.nodes for row in rows)


# --- nodes and budget -------------------------------------------------------------------------------------------------


def test_node_count_is_the_formula_when_everything_is_valid() -> None:
    world = bandit([0.0] * 7)
    plan = search(world, torch.zeros(2, dtype=torch.int64), horizon=3, discount=1.0)
    assert plan.nodes == 2 * (7 + 49 + 343)
    assert world.steps == [14, 98, 686]  # one batched call per depth


def test_the_budget_may_be_used_up_but_not_exceeded() -> None:
    assert search(bandit([0.0, 1.0]), ONE_ROW, 3, 1.0, max_nodes=14).nodes == 14
    with pytest.raises(ValueError, match="max_nodes: expected >= 14 for 2 actions and 3 of 3 steps, was 13"):
        search(bandit([0.0, 1.0]), ONE_ROW, 3, 1.0, max_nodes=13)


def test_the_budget_is_that_of_one_row_and_does_not_depend_on_the_masks() -> None:
    world = bandit([0.0, 1.0], masks=[True, False])
    with pytest.raises(ValueError, match="max_nodes: expected >= 6 for 2 actions and 2 of 2 steps, was 5"):
        search(world, torch.zeros(3, dtype=torch.int64), 2, 1.0, max_nodes=5)
    assert world.steps == []
    assert search(world, torch.zeros(3, dtype=torch.int64), 2, 1.0, max_nodes=6).nodes == 3 * 2


def test_an_astronomic_tree_is_refused_at_once() -> None:
    # 7 + ... + 7^7 = 960799 would fit.
    with pytest.raises(ValueError, match=r"max_nodes: expected >= 6725600 for 7 actions and 8 of 1000000000 steps"):
        search(bandit([0.0] * 7), ONE_ROW, 10**9, 1.0, max_nodes=10**6 - 1)


# --- deadlines --------------------------------------------------------------------------------------------------------


# Seven valid actions: 7, 49 and 343 nodes. One depth with its values is 7 * (1 + 10) = 77, two are 7 * 11 + 49 * 11
# where the first depth was valued, three 7 * 11 + 49 + 343 * 11 where the second was not.
@pytest.mark.parametrize(
    ("deadline", "depth", "spent"), [(100, 1, 77), (615, 1, 77), (616, 2, 616), (3898, 2, 616), (3899, 3, 3899)]
)
def test_a_depth_begins_only_if_its_steps_and_values_fit(deadline: float, depth: int, spent: float) -> None:
    world = TimedWorld(bandit([0.0] * 6 + [1.0], value=3.0), step=1.0, value=10.0)
    plan = search(world, ONE_ROW[:, None], 3, 1.0, deadline=deadline, clock=world.watch)
    assert (plan.length.item(), plan.complete, world.watch.now) == (depth, depth == 3, spent)
    assert plan.nodes == [7, 56, 399][depth - 1]
    assert plan.value.item() == depth + 3.0


# The first depth is 2 + 7 * (1 + 2 + 10) with the masks of the row and of what it reaches; the second 49 * 13 more.
@pytest.mark.parametrize(("deadline", "depth", "spent"), [(729, 1, 93), (730, 2, 730)])
def test_masks_of_the_next_depth_take_their_time_too(deadline: float, depth: int, spent: float) -> None:
    world = TimedWorld(bandit([0.0] * 7), step=1.0, mask=2.0, value=10.0)
    plan = search(world, ONE_ROW[:, None], 3, 1.0, deadline=deadline, clock=world.watch)
    assert (plan.nodes, world.watch.now) == ([7, 56][depth - 1], spent)


def test_only_what_masks_leave_counts_as_growth() -> None:
    # Two of seven actions: 2, 4 and 8 nodes of 1 each. With the tree of all seven the second depth would be 14.
    world = TimedWorld(bandit([0.0] * 7, masks=[True, True, *[False] * 5]))
    plan = search(world, ONE_ROW[:, None], 3, 1.0, deadline=14, clock=world.watch)
    assert (plan.complete, world.watch.now) == (True, 14)


def test_values_are_timed_again_before_a_depth_is_given_up() -> None:
    # A call takes 70 for any number of rows: 10 each at first, 10/7 at the second depth, where 196 + 343 * 17/7 = 1029.
    world = TimedWorld(bandit([0.0] * 6 + [1.0]), value_call=70.0)
    plan = search(world, ONE_ROW[:, None], 3, 1.0, deadline=1030, clock=world.watch)
    assert (plan.complete, world.watch.now) == (True, 7 + 70 + 49 + 70 + 343 + 70)
    assert plan.sequence.tolist() == [[6, 6, 6]]
    assert plan.value.tolist() == [3.0]


# --- ties -------------------------------------------------------------------------------------------------------------


def test_equal_values_hold_at_every_step() -> None:
    plan = search(bandit([2.0, 2.0, 2.0]), ONE_ROW, horizon=3, discount=0.5)
    assert plan.sequence.tolist() == [[0, 0, 0]]


def test_a_tie_without_hold_goes_to_the_lowest_action() -> None:
    plan = search(bandit([0.0, 2.0, 2.0]), ONE_ROW, horizon=2, discount=1.0)
    assert plan.sequence.tolist() == [[1, 1]]


@pytest.mark.parametrize("rewards", [(0.1, 0.3, 1.7), (1.7, 0.3, 0.1)])
def test_equal_float32_rewards_in_another_order_still_tie(rewards: tuple[float, float, float]) -> None:
    # In float32 0.1 + (0.3 + 1.7) < 1.7 + (0.3 + 0.1) by one unit in the last place.
    first, second, third = rewards
    world = table_world(
        [[1, 3], [2, 2], [2, 2], [4, 4], [4, 4]],
        [[first, third], [second, 0.0], [third, 0.0], [second, 0.0], [first, 0.0]],
        [[True, True], *[[True, False]] * 4],
        dtype=torch.float32,
    )
    plan = search(world, ONE_ROW, horizon=3, discount=1.0)
    assert plan.action_values[0, 0] == plan.action_values[0, 1]
    assert plan.action.tolist() == [0]


def test_steps_that_count_for_nothing_hold() -> None:
    plan = search(bandit([0.0, 2.0]), ONE_ROW, horizon=3, discount=0.0)
    assert plan.value.tolist() == [2.0]
    assert plan.sequence.tolist() == [[1, 0, 0]]


# --- termination ------------------------------------------------------------------------------------------------------


def test_nothing_follows_a_terminated_step() -> None:
    # Action 1 pays 5 and ends the episode; holding pays 1 a bar and the state after the plan is worth -100.
    world = table_world([[0, DEAD]], [[1.0, 5.0]], values=[-100.0])
    plan = search(world, ONE_ROW, horizon=3, discount=1.0)
    assert plan.action_values.tolist() == [[7.0, 5.0]]
    assert plan.sequence.tolist() == [[0, 0, 1]]  # 1 + 1 + 5
    assert plan.nodes == 2 + 2 + 2


def test_a_sequence_that_ends_early_is_padded_with_hold() -> None:
    world = table_world([[0, DEAD]], [[-1.0, 5.0]], values=[0.0])
    plan = search(world, ONE_ROW, horizon=3, discount=1.0)
    assert plan.sequence.tolist() == [[1, 0, 0]]
    assert plan.length.tolist() == [1]


def test_no_terminal_value_is_added_to_a_terminated_leaf() -> None:
    world = table_world([[0, DEAD]], [[0.0, 5.0]], values=[8.0])
    plan = search(world, ONE_ROW, horizon=1, discount=0.5)
    assert plan.action_values.tolist() == [[4.0, 5.0]]


def test_search_stops_when_every_sequence_has_terminated() -> None:
    world = table_world([[DEAD, DEAD]], [[-3.0, -2.0]], values=[NAN])
    plan = search(world, torch.tensor([0, 0]), horizon=5, discount=1.0)
    assert plan.value.tolist() == [-2.0, -2.0]
    assert plan.length.tolist() == [1, 1]
    assert world.steps == [4]
    assert plan.non_finite.tolist() == [0, 0]


# --- broken numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_a_broken_reward_never_outranks_a_loss(broken: float) -> None:
    plan = search(bandit([broken, -7.0]), ONE_ROW, horizon=2, discount=1.0)
    assert plan.action_values.tolist() == [[-INF, -14.0]]
    assert plan.sequence.tolist() == [[1, 1]]
    assert plan.non_finite.tolist() == [2]  # at depth 1 and below the other action; its own subtree is not walked
    assert plan.nodes == 4


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_a_broken_terminal_value_makes_its_sequences_minus_inf(broken: float) -> None:
    world = table_world([[0, 1], [1, 1]], [[-1.0, 3.0], [0.0, 0.0]], values=[0.0, broken])
    plan = search(world, torch.tensor([0, 1]), horizon=2, discount=1.0)
    assert plan.action_values.tolist() == [[-2.0, -INF], [-INF, -INF]]
    assert plan.sequence.tolist() == [[0, 0], [0, 0]]
    assert plan.length.tolist() == [2, 0]
    assert plan.fallback.tolist() == [False, True]
    assert plan.non_finite.tolist() == [3, 4]  # leaves 0-1, 1-0, 1-1 of the first row, all four of the second


def test_a_broken_row_holds_and_leaves_its_neighbours_alone() -> None:
    world = table_world([[0, 0], [1, 1]], [[NAN, INF], [0.0, 2.0]])
    plan = search(world, torch.tensor([1, 0, 1]), horizon=1, discount=1.0)
    assert plan.action.tolist() == [1, 0, 1]
    assert plan.fallback.tolist() == [False, True, False]
    assert plan.value.tolist() == [2.0, -INF, 2.0]
    assert plan.non_finite.tolist() == [0, 2, 0]


def test_a_broken_second_step_counts_even_at_discount_zero() -> None:
    world = table_world([[0, 1], [1, 1]], [[1.0, 2.0], [NAN, NAN]])
    plan = search(world, ONE_ROW, horizon=2, discount=0.0)
    assert plan.action_values.tolist() == [[1.0, -INF]]


def test_a_sum_that_overflows_counts_as_broken() -> None:
    plan = search(bandit([1.0, 1e308]), ONE_ROW, horizon=2, discount=1.0)
    assert plan.action_values.tolist() == [[1e308, 1e308]]  # 1e308 + 1e308 overflows, 1e308 + 1 does not
    assert plan.non_finite.tolist() == [1]


# --- arguments and a model that breaks its protocol -------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [0, -1])
def test_a_horizon_below_one_is_refused(horizon: int) -> None:
    with pytest.raises(ValueError, match=f"horizon: expected >= 1, was {horizon}"):
        search(bandit([0.0]), ONE_ROW, horizon, 1.0)


@pytest.mark.parametrize("discount", [-0.1, 1.01, NAN, INF])
def test_a_discount_outside_zero_and_one_is_refused(discount: float) -> None:
    with pytest.raises(ValueError, match=rf"discount: expected a number in \[0, 1\], was {discount}"):
        search(bandit([0.0]), ONE_ROW, 1, discount)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="state: expected at least one row, was 0"):
        search(bandit([0.0]), ONE_ROW[:0], 1, 1.0)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.ones(1, 1, 2), "expected dtype bool"),
        (torch.tensor([[[False, True]]]), "expected the safe action 0"),
        (torch.tensor([[True, True]]), r"expected bool \[N, P, A\], was torch.bool \[1, 2\]"),
        (torch.ones(1, 1, 0, dtype=torch.bool), r"expected shape \[B, 1\], was \[0, 0\]"),
    ],
)
def test_masks_of_the_first_state_are_validated(masks: torch.Tensor, message: str) -> None:
    world = bandit([0.0, 1.0])
    world.action_masks = lambda state: masks
    with pytest.raises(InvalidMaskError, match=message):
        search(world, ONE_ROW, 1, 1.0)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (torch.tensor([[[True, True]], [[False, True]]]), "expected the safe action 0"),
        (torch.ones(2, 1, 3, dtype=torch.bool), r"expected shape \[B, 2\], was \[0, 3\]"),
        (torch.ones(1, 1, 2, dtype=torch.bool), r"expected \[2, 1, 2\], was \[1, 1, 2\]"),
        (torch.ones(2, 1, 2), "expected dtype bool"),
    ],
)
def test_masks_of_imagined_states_are_validated(later: torch.Tensor, message: str) -> None:
    world = bandit([0.0, 1.0])
    world.action_masks = lambda state: later if world.steps else torch.ones(1, 1, 2, dtype=torch.bool)
    with pytest.raises(InvalidMaskError, match=message):
        search(world, ONE_ROW, 2, 1.0)


@pytest.mark.parametrize(
    ("output", "wrong", "message"),
    [
        ("reward", torch.zeros(2), r"reward: expected shape \[2, 1\], was \[2\]"),
        ("reward", torch.zeros(2, 1, dtype=torch.int64), "reward: expected dtype floating, was torch.int64"),
        ("terminated", torch.zeros(1, 1, dtype=torch.bool), r"terminated: expected shape \[2, 1\], was \[1, 1\]"),
        ("terminated", torch.zeros(2, 1), "terminated: expected dtype bool, was torch.float32"),
        ("uncertainty", torch.zeros(2), r"uncertainty: expected shape \[2, 1\], was \[2\]"),
        ("value", torch.zeros(2), r"value: expected shape \[2, 1\], was \[2\]"),
        ("value", torch.zeros(2, 1, dtype=torch.int64), "value: expected dtype floating, was torch.int64"),
    ],
)
def test_outputs_of_wrong_shape_or_dtype_are_named(output: str, wrong: torch.Tensor, message: str) -> None:
    world, zero = bandit([0.0, 1.0]), torch.zeros(2, 1)
    outputs = {"reward": zero, "terminated": torch.zeros(2, 1, dtype=torch.bool), "uncertainty": zero, "value": zero}
    outputs[output] = wrong
    world.step = lambda state, action: Transition(
        state, *(outputs[name] for name in ("reward", "terminated", "uncertainty"))
    )
    world.value = lambda state: outputs["value"]
    with pytest.raises(ValueError, match=message):
        search(world, ONE_ROW, 1, 1.0)


def test_search_writes_to_nothing_and_keeps_no_graph() -> None:
    world = bandit([0.0, 1.0], value=1.0)
    world.reward.requires_grad_()
    world.values.requires_grad_()
    before = copy.deepcopy((world.next_state, world.reward, world.masks, world.values))
    state = torch.tensor([0, 0])
    plan = search(world, state, 2, 0.5)
    assert not plan.value.requires_grad
    assert state.tolist() == [0, 0]
    for kept, table in zip(before, (world.next_state, world.reward, world.masks, world.values), strict=True):
        assert torch.equal(kept, table)
