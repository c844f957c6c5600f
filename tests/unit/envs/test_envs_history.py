"""A batch of walks through history: refused actions, restarts, ends, and nothing shared by accident."""

from __future__ import annotations

import numpy as np
import pytest
from envs_worlds import LOOSE, dynamics, market, moves, random_valid

from envs import HistoryBatch
from masking import InvalidActionError, check_actions


def hold(walk: HistoryBatch) -> np.ndarray:
    return np.zeros(walk.batch, dtype=np.int64)


def snapshot(walk: HistoryBatch) -> list[np.ndarray]:
    return [np.array(value) for value in (walk.time, walk.age, walk.state, walk.action_masks, *walk.account)]


def same(before: list[np.ndarray], after: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


# --- refused actions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([1, 4, 0], r"row 1 chose 4 but its mask is \[True, True, True, True, False, False, False\]"),
        ([0, 0, 7], "row 2 chose 7"),
        ([-1, 0, 0], "row 0 chose -1"),
        ([0, 0], r"expected integers \[3\], was int64 \[2\]"),
        ([[0, 0, 0]], r"expected integers \[3\], was int64 \[1, 3\]"),
        ([0.0, 1.0, 0.0], r"expected integers \[3\], was float64 \[3\]"),
        ([True, False, True], r"expected integers \[3\], was bool \[3\]"),
    ],
)
def test_an_invalid_action_raises_and_nothing_has_moved(actions, message: str) -> None:
    walk = HistoryBatch(dynamics(), market(10), batch=3)
    walk.step(np.array([3, 0, 1]))
    walk.restart(np.array([1]), np.array([0]))
    walk.step(hold(walk))
    walk.restart(np.arange(3), np.arange(3))
    before = snapshot(walk)
    with pytest.raises(InvalidActionError, match=message):
        walk.step(np.array(actions))
    assert same(before, snapshot(walk))
    walk.step(np.array([1, 3, 0]))


def test_a_walk_at_the_end_of_history_refuses_a_step_and_nothing_has_moved() -> None:
    walk = HistoryBatch(dynamics(), market(5), batch=2)
    walk.restart(np.array([1]), np.array([3]))
    assert walk.step(hold(walk)).truncated.tolist() == [False, True]
    before = snapshot(walk)
    with pytest.raises(ValueError, match=r"walks \[1\]: expected a restart at the end of history"):
        walk.step(hold(walk))
    assert same(before, snapshot(walk))


def test_a_reward_that_fails_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    walk = HistoryBatch(dynamics(), market(5), batch=2)
    before = snapshot(walk)

    def broken(outcome, config):
        raise FloatingPointError("reward")

    monkeypatch.setitem(__import__("envs").REWARDS, "n1", broken)
    with pytest.raises(FloatingPointError, match="reward"):
        walk.step(hold(walk))
    assert same(before, snapshot(walk))


@pytest.mark.parametrize("action", [-1, -7, 7])
def test_an_action_outside_the_table_is_refused_even_where_every_action_is_valid(action: int) -> None:
    # A negative index would quietly read the mask of another action.
    with pytest.raises(InvalidActionError, match=f"row 0 chose {action}"):
        check_actions(np.array([action]), np.ones((1, 7), dtype=bool))


def test_check_actions_accepts_every_integer_type() -> None:
    masks = np.array([[True, False, True]])
    for dtype in (np.int8, np.int32, np.int64, np.uint8):
        check_actions(np.array([2], dtype=dtype), masks)
        with pytest.raises(InvalidActionError):
            check_actions(np.array([1], dtype=dtype), masks)


# --- walking -----------------------------------------------------------------------------------------------


def test_a_decision_executes_at_the_open_of_the_next_row() -> None:
    walk = HistoryBatch(dynamics(cost_bps=0.0, **LOOSE), moves((0.5, 0.5), (0.2, 0.1), (0.3, 0.2)), batch=1)
    walk.step(np.array([5]))
    # Neither the moves of the row it was decided on nor the gap before the execution are earned.
    np.testing.assert_allclose(walk.account.equity, [1.1], rtol=1e-12)
    walk.step(np.array([1]))
    np.testing.assert_allclose(walk.account.equity, [1.1 * 1.3], rtol=1e-12)


def test_the_state_row_is_that_of_the_present_bar() -> None:
    features, uncertainty = market(6), np.linspace(0.0, 0.5, 6)
    walk = HistoryBatch(dynamics(), features, uncertainty, batch=2)
    walk.restart(np.array([1]), np.array([2]))
    walk.step(hold(walk))
    np.testing.assert_allclose(walk.state[:, :3], features[[1, 3]].astype(np.float32))
    np.testing.assert_allclose(walk.state[:, -2], [0.1, 0.3], rtol=1e-6)
    np.testing.assert_array_equal(walk.state[:, -1], 0.0)
    np.testing.assert_array_equal(walk.action_masks, walk.dynamics.action_masks(walk.state))


def test_a_batch_of_walks_equals_each_walk_alone() -> None:
    features, rng = market(40, swing=0.04), np.random.default_rng(2)
    together = HistoryBatch(dynamics(cooldown_bars=2), features, batch=5)
    alone = [HistoryBatch(dynamics(cooldown_bars=2), features, batch=1) for _ in range(5)]
    together.restart(np.arange(5), np.arange(5))
    for row, walk in enumerate(alone):
        walk.restart(np.array([0]), np.array([row]))
    for _ in range(34):
        actions = random_valid(together.action_masks, rng)
        step = together.step(actions)
        for row, walk in enumerate(alone):
            single = walk.step(actions[row : row + 1])
            np.testing.assert_allclose(step.reward[row], single.reward[0], rtol=1e-9, atol=1e-9)
            assert (step.terminated[row], step.truncated[row]) == (single.terminated[0], single.truncated[0])
            np.testing.assert_allclose(together.state[row], walk.state[0], rtol=1e-6, atol=1e-7)
            np.testing.assert_array_equal(together.action_masks[row], walk.action_masks[0])


# --- restart -----------------------------------------------------------------------------------------------


def test_restarting_one_walk_leaves_the_others_alone() -> None:
    features = market(20, swing=0.03)
    walk = HistoryBatch(dynamics(), features, batch=3)
    untouched = HistoryBatch(dynamics(), features, batch=3)
    for batch in (walk, untouched):
        batch.step(np.array([3, 2, 1]))
        batch.step(hold(batch))
    walk.restart(np.array([1]), np.array([7]))
    for mine, other in zip(snapshot(walk), snapshot(untouched), strict=True):
        np.testing.assert_array_equal(mine[[0, 2]], other[[0, 2]])
    assert (walk.time[1], walk.age[1]) == (7, 0)
    account = {name: float(column[1]) for name, column in walk.account._asdict().items()}
    assert account == {name: float(name in ("equity", "peak")) for name in account}
    step, other = walk.step(hold(walk)), untouched.step(hold(untouched))
    np.testing.assert_array_equal(step.reward[[0, 2]], other.reward[[0, 2]])


def test_what_a_caller_keeps_does_not_change_under_him() -> None:
    walk = HistoryBatch(dynamics(), market(20, swing=0.03), batch=3)
    walk.step(np.array([3, 2, 1]))
    kept = (walk.time, walk.age, walk.state, walk.action_masks, *walk.account)
    before = [np.array(value) for value in kept]
    walk.restart(np.array([0, 2]), np.array([5, 6]))
    walk.step(np.array([0, 0, 3]))
    walk.restart(np.arange(3), np.arange(3))
    assert same(before, list(kept))


def test_a_caller_who_writes_into_a_kept_account_of_before_a_restart_reaches_nothing() -> None:
    walk = HistoryBatch(dynamics(), market(20), batch=2)
    kept = walk.account
    walk.restart(np.array([0]), np.array([3]))
    kept.equity[:] = 99.0
    assert walk.account.equity.tolist() == [1.0, 1.0]


def test_a_fresh_batch_has_no_columns_in_common_after_a_restart() -> None:
    walk = HistoryBatch(dynamics(), market(20), batch=2)
    walk.restart(np.array([0]), np.array([3]))
    columns = list(walk.account)
    for index, column in enumerate(columns):
        assert not any(np.shares_memory(column, other) for other in columns[index + 1 :])


@pytest.mark.parametrize("time", [-1, 19, 20])
def test_a_walk_starts_inside_history_before_its_last_row(time: int) -> None:
    walk = HistoryBatch(dynamics(), market(20), batch=2)
    before = snapshot(walk)
    with pytest.raises(ValueError, match=rf"time: expected 0 <= time < 19, was \[0, {time}\]"):
        walk.restart(np.arange(2), np.array([0, time]))
    assert same(before, snapshot(walk))


# --- ends --------------------------------------------------------------------------------------------------


def test_the_kill_switch_terminates_and_is_never_called_a_truncation() -> None:
    walk = HistoryBatch(dynamics(**LOOSE), moves((0, 0), (0, -0.2), (0, 0), (0, 0)), batch=2, episode_bars=1)
    step = walk.step(np.array([5, 0]))
    assert step.terminated.tolist() == [True, False]
    assert step.truncated.tolist() == [False, True]


def test_the_hard_limit_does_not_terminate() -> None:
    walk = HistoryBatch(dynamics(**LOOSE), moves((0, 0), (0, -0.13), (0, 0)), batch=1)
    step = walk.step(np.array([5]))
    assert not step.terminated[0]
    assert walk.action_masks.tolist() == [[True] + [False] * 6]


def test_a_walk_is_truncated_after_its_bars_counted_from_the_restart() -> None:
    walk = HistoryBatch(dynamics(), market(20), batch=2, episode_bars=3)
    truncated = [walk.step(hold(walk)).truncated.tolist() for _ in range(2)]
    walk.restart(np.array([1]), np.array([0]))
    truncated += [walk.step(hold(walk)).truncated.tolist() for _ in range(3)]
    assert truncated == [[False, False], [False, False], [True, False], [True, False], [True, True]]


def test_without_episodes_a_walk_is_truncated_at_the_last_row_only() -> None:
    walk = HistoryBatch(dynamics(), market(6), batch=1)
    assert walk.last_row == 5
    assert [bool(walk.step(hold(walk)).truncated[0]) for _ in range(5)] == [False] * 4 + [True]
    assert walk.time.tolist() == [5]


def test_a_halted_walk_is_flattened_by_the_risk_manager_on_hold() -> None:
    walk = HistoryBatch(dynamics(**LOOSE), moves((0, 0), (0, -0.13), (0, 0), (0, 0)), batch=1)
    walk.step(np.array([5]))
    step = walk.step(hold(walk))
    assert step.outcome.flattened.tolist() == [True]
    assert walk.account.position.tolist() == [0.0]


# --- what it refuses to walk on --------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_broken_rows_are_refused(broken: float) -> None:
    features = market(5)
    features[3, 1] = broken
    with pytest.raises(ValueError, match="features: expected finite values"):
        HistoryBatch(dynamics(), features, batch=1)
    with pytest.raises(ValueError, match="uncertainty: expected finite values"):
        HistoryBatch(dynamics(), market(5), np.array([0, 0, broken, 0, 0]), batch=1)


@pytest.mark.parametrize("shape", [(1, 3), (5, 2), (5, 4), (5,)])
def test_rows_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"features: expected \[T >= 2, 3\]"):
        HistoryBatch(dynamics(), np.zeros(shape), batch=1)


def test_uncertainty_has_one_value_per_row() -> None:
    with pytest.raises(ValueError, match=r"uncertainty: expected \[5\], was \[4\]"):
        HistoryBatch(dynamics(), market(5), np.zeros(4), batch=1)
