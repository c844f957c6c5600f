"""MPC: who decides when there is no plan or no time, and how evaluation tools run it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from planner_worlds import ParticleWorld, TableWorld, bandit, random_world, table_world

from masking import InvalidMaskError, MaskingError
from planner import CEM, MPC, Exhaustive, Objective

SEARCH = Exhaustive(horizon=2, objective=Objective(discount=1.0))
CHAIN = table_world([[0, 1, 2], [1, 1, 1], [2, 2, 2]], [[0.0, -1.0, 1.0], [3.0, 3.0, 3.0], [0.5, 0.5, 0.5]])
BROKEN = bandit([math.nan, math.nan, math.nan])


class Rooted(ParticleWorld):
    """Masks of the caller at the first step, those of the world afterwards; a row is its state and number."""

    def __init__(self, world: TableWorld, root: torch.Tensor) -> None:
        super().__init__([world])
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
    # 15 ms a look at the clock: the first depth ends after 45, and the second is not begun. One step ahead 1 beats -1.
    hurried = made(fallback=Always(0), budget_ms=20.0, clock=Ticking(0.015))
    for _ in range(5):
        assert hurried.act(STATE, FREE).tolist() == [2]
    assert hurried.decided == {"plan": 5}


def test_warm_up_refuses_a_search_that_never_fits() -> None:
    assert made(budget_ms=200.0, clock=Ticking(0.01)).warm_up(STATE, FREE) == pytest.approx(30.0)
    with pytest.raises(ValueError, match="budget_ms: expected at least the 30 of one depth or iteration, was 20"):
        made(budget_ms=20.0, clock=Ticking(0.01)).warm_up(STATE, FREE)


def test_whatever_model_or_policy_say_a_forbidden_action_is_never_returned() -> None:
    only_one = np.array([[True, True, False]])
    broken = made(BROKEN, fallback=Always(2))
    assert broken.act(STATE, only_one).tolist() == [0]
    assert (broken.decided, broken.overridden) == ({"hold": 1}, 1)

    def deaf(state: np.ndarray, action_masks: np.ndarray) -> Any:
        return imagine()(state, np.ones_like(action_masks))

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


def test_a_warm_start_passes_the_rest_of_the_last_plan_on_until_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    search = CEM(horizon=2, candidates=16, elites=2, objective=Objective(discount=1.0))
    original = CEM.plan

    def spy(self: CEM, model: Any, state: Any, **options: Any) -> Any:
        plan = original(self, model, state, **options)
        seen.append((options["previous"], plan.sequence[0].tolist()))
        return plan

    monkeypatch.setattr(CEM, "plan", spy)
    controller = made(search=search, warm_start=True)
    controller.act(STATE, FREE)
    controller.act(STATE, FREE)
    controller.predict(STATE, episode_start=np.array([True]), action_masks=FREE)
    (nothing, first), (rest, _), (forgotten, _) = seen
    assert nothing is None
    assert rest.tolist() == [[first[1], 0]]
    assert forgotten is None


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
