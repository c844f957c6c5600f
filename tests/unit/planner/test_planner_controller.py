"""MPC: who decides when there is no plan or no time, and how evaluation tools run it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from planner_worlds import JointWorld, ParticleWorld, TableWorld, TimedWorld, Watch, bandit, random_world, table_world

from masking import InvalidMaskError, MaskingError
from planner import CEM, MPC, Exhaustive, Objective

SEARCH = Exhaustive(horizon=2, objective=Objective(discount=1.0))
CHAIN = table_world([[0, 1, 2], [1, 1, 1], [2, 2, 2]], [[0.0, -1.0, 1.0], [3.0, 3.0, 3.0], [0.5, 0.5, 0.5]])
BROKEN = bandit([math.nan, math.nan, math.nan])


class Rooted(ParticleWorld):
    """Masks of the caller at the first step, those of the world afterwards; a row is its state and number."""

    def __init__(self, world: TableWorld, root: torch.Tensor) -> None:
        super().__init__([world], safe_action=world.safe_action)
        self.root = root

    def action_masks(self, state: Any) -> torch.Tensor:
        now, row, depth = state
        return super().action_masks(now) if depth else self.root[row][:, None]

    def step(self, state: Any, action: torch.Tensor) -> Any:
        now, row, depth = state
        made = super().step(now, action)
        return made._replace(state=(made.state, row, depth + 1))

    def value(self, state: Any) -> torch.Tensor:
        return super().value(state[0])

    def take(self, state: Any, index: torch.Tensor) -> Any:
        now, row, depth = state
        return now[index], row[index], depth


def imagine(world: TableWorld = CHAIN) -> Any:
    def rooted(state: np.ndarray, action_masks: np.ndarray) -> tuple[Rooted, torch.Tensor]:
        root = torch.from_numpy(np.nan_to_num(state)).long(), torch.arange(len(state)), 0
        return Rooted(world, torch.from_numpy(action_masks)), root

    return rooted


class Always:
    def __init__(self, action: int) -> None:
        self.action = action

    def act(self, state: np.ndarray, action_masks: np.ndarray) -> np.ndarray:
        if np.isnan(state).any():
            raise MaskingError("nan")
        return np.full(len(state), self.action, dtype=np.int64)


def made(world: TableWorld = CHAIN, search: Any = SEARCH, **options: Any) -> MPC:
    """With time enough, whatever else the machine does."""
    return MPC(imagine(world), search, **{"budget_ms": 1e9, **options})


STATE, FREE = np.zeros((1, 1)), np.ones((1, 3), dtype=np.bool_)


def test_the_first_action_of_the_plan_is_taken_under_the_callers_masks() -> None:
    controller = made()
    assert controller.act(STATE, FREE).tolist() == [1]  # -1 + 3
    assert controller.act(STATE, np.array([[True, False, True]])).tolist() == [2]
    assert controller.decided == {"plan": 2}


def test_rows_without_a_plan_go_to_the_policy_and_then_to_hold() -> None:
    state, free = np.array([[0.0], [0.0]]), np.ones((2, 3), dtype=np.bool_)
    assert made(BROKEN).act(state, free).tolist() == [0, 0]
    controller = made(BROKEN, fallback=Always(2))
    assert controller.act(state, free).tolist() == [2, 2]
    assert controller.decided == {"policy": 2}
    mixed = made(BROKEN, fallback=Always(1))
    assert mixed.act(np.array([[0.0], [math.nan]]), free).tolist() == [1, 0]
    assert mixed.decided == {"policy": 1, "hold": 1}


class Ticking:
    """A clock that moves on by so many seconds each time it is read."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


def test_a_late_start_leaves_it_to_the_policy_and_a_late_search_is_still_a_plan() -> None:
    late = made(fallback=Always(2), budget_ms=20.0, clock=Ticking(0.03))
    assert late.act(STATE, FREE).tolist() == [2]
    assert late.decided == {"policy": 1}
    # 15 ms a look at the clock: the first depth begins after 60, and the second does not. One step ahead 1 beats -1.
    hurried = made(fallback=Always(0), budget_ms=40.0, clock=Ticking(0.015))
    for _ in range(5):
        assert hurried.act(STATE, FREE).tolist() == [2]
    assert hurried.decided == {"plan": 5}


def test_warm_up_refuses_a_search_that_never_fits() -> None:
    assert made(budget_ms=200.0, clock=Ticking(0.01)).warm_up(STATE, FREE) == pytest.approx(40.0)
    with pytest.raises(ValueError, match="budget_ms: expected at least the 40 of one depth or iteration, was 20"):
        made(budget_ms=20.0, clock=Ticking(0.01)).warm_up(STATE, FREE)


def test_what_warm_up_says_fits_the_budget_of_a_slow_value_function() -> None:
    # A millisecond a step and ten a value: one depth of seven actions is 77, two are 616.
    world = TimedWorld(bandit([0.0] * 6 + [1.0]), step=1e-3, value=1e-2)

    def start(state: np.ndarray, action_masks: np.ndarray) -> Any:
        return world, torch.zeros(len(state), 1, dtype=torch.int64)

    controller = MPC(start, Exhaustive(horizon=3), budget_ms=100.0, clock=world.watch)
    seven = np.ones((1, 7), dtype=np.bool_)
    assert controller.warm_up(STATE, seven) == pytest.approx(77.0)
    begun = world.watch.now
    assert controller.act(STATE, seven).tolist() == [6]
    assert world.watch.now - begun == pytest.approx(0.077)
    assert controller.decided == {"plan": 1}


class Late:
    """Imagines a world, from `late` on in five seconds of its own clock."""

    def __init__(self, world: TableWorld) -> None:
        self.world, self.watch, self.late = world, Watch(), False
        self.models: list[Rooted] = []

    def __call__(self, state: np.ndarray, action_masks: np.ndarray) -> Any:
        self.watch.spend(5.0 * self.late)
        model, root = imagine(self.world)(state, action_masks)
        self.models.append(model)
        return model, root


@pytest.mark.parametrize("search", [SEARCH, CEM(horizon=2, candidates=8, elites=2)])
def test_where_imagining_took_all_the_time_nothing_is_searched(search: Any) -> None:
    late = Late(CHAIN)
    controller = MPC(late, search, fallback=Always(2), budget_ms=100.0, clock=late.watch)
    late.late = True
    assert controller.act(STATE, FREE).tolist() == [2]
    assert controller.decided == {"policy": 1}
    assert late.models[0].executed == []


# --- safe actions, and models that break their protocol ---------------------------------------------------------------


def holdless(reward: list[float], safe_action: int | None) -> TableWorld:
    """A bandit whose first arm is never valid."""
    world = bandit(reward, [False, *[True] * (len(reward) - 1)])
    world.safe_action = safe_action
    return world


HOLDLESS = np.array([[False, True, True]])
SAMPLING = CEM(horizon=2, candidates=16, elites=2, objective=Objective(discount=1.0))


@pytest.mark.parametrize("search", [SEARCH, SAMPLING])
@pytest.mark.parametrize("safe_action", [None, 1, 2])
def test_worlds_without_hold_are_planned_in(search: Any, safe_action: int | None) -> None:
    controller = made(holdless([9.0, 1.0, 2.0], safe_action), search)
    assert controller.act(STATE, HOLDLESS).tolist() == [2]
    assert controller.decided == {"plan": 1}


@pytest.mark.parametrize("search", [SEARCH, SAMPLING])
@pytest.mark.parametrize(("safe_action", "action"), [(None, 1), (1, 1), (2, 2)])
def test_a_row_without_plan_and_policy_takes_the_safe_action_or_the_lowest_valid_one(
    search: Any, safe_action: int | None, action: int
) -> None:
    broken = holdless([math.nan] * 3, safe_action)
    alone = made(broken, search)
    assert alone.act(STATE, HOLDLESS).tolist() == [action]
    refusing = made(broken, search, fallback=Always(0))  # which is forbidden
    assert refusing.act(STATE, HOLDLESS).tolist() == [action]
    assert (alone.decided, refusing.decided, refusing.overridden) == ({"hold": 1}, {"hold": 1}, 1)
    led = made(broken, search, fallback=Always(2))
    assert led.act(STATE, HOLDLESS).tolist() == [2]
    assert led.decided == {"policy": 1}


def test_a_safe_action_is_known_from_the_first_model_on() -> None:
    late = Late(holdless([0.0, 2.0, 1.0], safe_action=2))
    controller = MPC(late, SEARCH, budget_ms=100.0, clock=late.watch)
    ticking = MPC(late, SEARCH, budget_ms=20.0, clock=Ticking(0.03))
    assert ticking.act(STATE, HOLDLESS).tolist() == [1]
    assert controller.act(STATE, HOLDLESS).tolist() == [1]
    late.late = True
    assert controller.act(STATE, HOLDLESS).tolist() == [2]
    assert controller.decided == {"plan": 1, "hold": 1}


def deaf(state: np.ndarray, action_masks: np.ndarray) -> Any:
    return imagine()(state, np.ones_like(action_masks))


@pytest.mark.parametrize("start", [imagine(), deaf])
def test_a_caller_who_masks_the_safe_action_is_told_so(start: Any) -> None:
    controller = MPC(start, SEARCH, fallback=Always(2), budget_ms=1e9)
    for _ in range(2):
        with pytest.raises(InvalidMaskError, match="safe action 0"):
            controller.act(STATE, HOLDLESS)
    assert (controller.decided, controller.refused) == ({}, 0)
    with pytest.raises(InvalidMaskError, match="at least one valid action"):
        made(holdless([0.0] * 3, None)).act(STATE, np.zeros((1, 3), dtype=np.bool_))


@pytest.mark.parametrize("search", [SEARCH, SAMPLING])
def test_where_the_model_imagines_wrong_masks_the_policy_decides(search: Any) -> None:
    # Hold is missing from the second state on.
    wrong = table_world([[1, 1, 1], [1, 1, 1]], [[0.0, 1.0, 2.0]] * 2, [[True] * 3, [False, True, True]])
    controller = made(wrong, search, fallback=Always(1))
    two = np.zeros((2, 1)), np.ones((2, 3), dtype=np.bool_)
    assert controller.act(*two).tolist() == [1, 1]
    assert (controller.decided, controller.refused) == ({"policy": 2}, 2)
    alone = made(wrong, search)
    assert alone.act(STATE, FREE).tolist() == [0]
    assert (alone.decided, alone.refused) == ({"hold": 1}, 1)
    with pytest.raises(InvalidMaskError, match="safe action 0"):
        controller.warm_up(STATE, FREE)


def test_where_imagining_is_refused_the_policy_decides() -> None:
    def refuse(state: np.ndarray, action_masks: np.ndarray) -> Any:
        raise MaskingError("no such state")

    controller = MPC(refuse, SEARCH, fallback=Always(1), budget_ms=1e9)
    assert controller.act(STATE, FREE).tolist() == [1]
    assert (controller.decided, controller.refused) == ({"policy": 1}, 1)


@pytest.mark.parametrize("search", [SEARCH, SAMPLING])
def test_joint_models_are_refused_by_name(search: Any) -> None:
    world = JointWorld()
    controller = MPC(lambda state, action_masks: (world, world.start(1, 0)), search, budget_ms=1e9)
    for call in (controller.act, controller.warm_up):
        with pytest.raises(ValueError, match="imagine: expected a model of one action dimension, was a joint model"):
            call(STATE, np.ones((1, 33), dtype=np.bool_))


# --- who decides ------------------------------------------------------------------------------------------------------


def test_whatever_model_or_policy_say_a_forbidden_action_is_never_returned() -> None:
    only_one = np.array([[True, True, False]])
    broken = made(BROKEN, fallback=Always(2))
    assert broken.act(STATE, only_one).tolist() == [0]
    assert (broken.decided, broken.overridden) == ({"hold": 1}, 1)

    controller = MPC(deaf, SEARCH, fallback=Always(2), budget_ms=1e9)
    assert controller.act(STATE, np.array([[True, False, True]])).tolist() == [2]  # the plan was 1
    assert (controller.decided, controller.overridden) == ({"policy": 1}, 1)


def test_decisions_do_not_depend_on_their_neighbours() -> None:
    world = random_world(5, 6, 5)
    search = CEM(horizon=3, candidates=8, elites=2, objective=Objective(discount=0.9))
    controller = made(world, search)
    state, free = np.arange(6.0)[:, None], np.ones((6, 5), dtype=np.bool_)
    free &= world.masks.numpy()
    batch = controller.act(state, free).tolist()
    assert batch == [int(controller.act(state[row : row + 1], free[row : row + 1])[0]) for row in range(6)]
    assert any(made(world, search, seed=seed).act(state, free).tolist() != batch for seed in range(1, 9))


def test_equal_arguments_give_equal_actions_with_a_sampling_search() -> None:
    search = CEM(horizon=2, candidates=16, elites=2, objective=Objective(discount=1.0))
    controller = made(search=search, seed=3)
    state, free = np.zeros((5, 1)), np.ones((5, 3), dtype=np.bool_)
    assert controller.act(state, free).tolist() == controller.act(state, free).tolist() == [1] * 5


@pytest.fixture
def previous(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]] | None]:
    """The earlier plan that each search of CEM was given."""
    seen: list[list[list[int]] | None] = []
    original = CEM.plan

    def spy(self: CEM, model: Any, state: Any, **options: Any) -> Any:
        seen.append(None if options["previous"] is None else options["previous"].tolist())
        return original(self, model, state, **options)

    monkeypatch.setattr(CEM, "plan", spy)
    return seen


# Wherever one starts, 2, 1 and 2 are best.
STEPS = table_world([[1] * 3, [2] * 3, [3] * 3, [3] * 3], [[0, 0, 1.0], [0, 1.0, 0], [0, 0, 1.0], [0, 0, 0]])
LONGER = CEM(horizon=3, candidates=64, elites=4, objective=Objective(discount=1.0))


def test_a_warm_start_passes_the_rest_of_the_last_plan_on_until_reset(previous: list[Any]) -> None:
    controller = made(STEPS, LONGER, warm_start=True)
    controller.act(STATE, FREE)
    controller.act(STATE, FREE)
    controller.predict(STATE, episode_start=np.array([True]), action_masks=FREE)
    assert previous == [None, [[1, 2, 0]], None]


def test_a_warm_start_is_forgotten_where_another_number_of_rows_is_decided(previous: list[Any]) -> None:
    controller = made(STEPS, LONGER, warm_start=True)
    two = np.zeros((2, 1)), np.ones((2, 3), dtype=np.bool_)
    assert controller.act(STATE, FREE).tolist() == [2]
    assert controller.act(*two).tolist() == [2, 2]
    assert controller.act(*two).tolist() == [2, 2]
    assert controller.act(STATE, FREE).tolist() == [2]
    assert previous == [None, None, [[1, 2, 0]] * 2, None]


@pytest.mark.parametrize("safe_action", [0, 2])
def test_a_late_decision_moves_the_last_plan_on(previous: list[Any], safe_action: int) -> None:
    late = Late(replace(STEPS, safe_action=safe_action))
    controller = MPC(late, LONGER, warm_start=True, budget_ms=100.0, clock=late.watch)
    for now in (False, True, False):
        late.late = now
        controller.act(STATE, FREE)
    assert previous == [None, [[2, safe_action, safe_action]]]
    assert controller.decided == {"plan": 2, "hold": 1}


def test_predict_is_the_interface_of_evaluation_tools() -> None:
    controller = made(rows_of=lambda obs: np.asarray(obs) * 0.0)
    action, state = controller.predict(np.array([[7.0]]), action_masks=FREE)
    assert (action.tolist(), state) == ([1], None)
    single, _ = made().predict(np.array([0.0]), action_masks=FREE[0])
    assert single == 1
    with pytest.raises(MaskingError, match=r"action_masks: expected bool \[B, A\], was None"):
        controller.predict(STATE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_ms": 0.0}, "budget_ms: expected > 0, was 0.0"),
        ({"warm_start": True}, "warm_start: expected a sampling search, was Exhaustive"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MPC(imagine(), SEARCH, **options)


def test_wrong_masks_are_refused() -> None:
    with pytest.raises(InvalidMaskError, match="dtype bool"):
        made().act(STATE, FREE.astype(np.float32))
