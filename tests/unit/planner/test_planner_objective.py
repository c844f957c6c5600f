"""What a sequence is worth: discount, charge for uncertainty, and the tail of the particles."""

from __future__ import annotations

import math

import pytest
import torch
from planner_worlds import ParticleWorld, bandit

from planner import Exhaustive, Objective

START = torch.tensor([[0, 0, 0, 0]])


def value(objective: Objective, *, uncertainty: list[float] | None = None, horizon: int = 2) -> list[list[float]]:
    # Hold pays 1 in all four particles; action 1 pays 3 in three of them and loses 4 in the last.
    worlds = [bandit([1.0, 3.0], value=8.0), *(bandit([1.0, pays], value=8.0) for pays in (3.0, 3.0, -4.0))]
    world = ParticleWorld(worlds, uncertainty)
    plan = Exhaustive(horizon=horizon, objective=objective).plan(world, START)
    assert plan.action_values is not None
    return plan.action_values.tolist()


def test_the_mean_is_taken_over_particles_and_the_value_discounted_by_the_horizon() -> None:
    assert value(Objective(discount=0.5)) == [[1 + 1.25 / 2 + 2, 1.25 + 1.25 / 2 + 2]]


@pytest.mark.parametrize(("tail", "worst"), [(0.25, [-4.0]), (0.3, [-4.0, 3.0]), (0.5, [-4.0, 3.0])])
def test_a_tail_looks_at_the_worst_particles_of_the_whole_sequence(tail: float, worst: list[float]) -> None:
    risky = sum(worst) / len(worst)
    assert value(Objective(discount=1.0, tail=tail), horizon=1) == [[9.0, 8.0 + risky]]


def test_the_tail_is_that_of_sums_not_of_steps() -> None:
    # Each particle loses at one of two steps: step by step the worst is -1 twice, as a sum it is 0.
    first = ParticleWorld([_pays_once(0), _pays_once(1)])
    plan = Exhaustive(horizon=2, objective=Objective(discount=1.0, tail=0.5)).plan(first, torch.tensor([[0, 0]]))
    assert plan.value.tolist() == [0.0]


def _pays_once(loss_at: int):  # type: ignore[no-untyped-def]
    from planner_worlds import table_world

    rewards = [[1.0], [1.0]]
    rewards[loss_at] = [-1.0]
    return table_world([[1], [1]], rewards)


def test_uncertainty_is_charged_per_step_and_never_heard_when_it_costs_nothing() -> None:
    doubt = [0.5, 0.5, 0.5, 0.5]
    assert value(Objective(discount=1.0, uncertainty_penalty=2.0), uncertainty=doubt) == [[8.25, 8.5]]  # 2 * 1 less
    assert value(Objective(discount=1.0), uncertainty=[math.nan] * 4) == [[10.25, 10.5]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discount": 1.1}, r"discount: expected a number in \[0, 1\], was 1.1"),
        ({"uncertainty_penalty": -1.0}, "uncertainty_penalty: expected a finite number >= 0, was -1.0"),
        ({"tail": 0.0}, r"tail: expected a share in \(0, 1\], was 0.0"),
    ],
)
def test_impossible_objectives_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**options)
