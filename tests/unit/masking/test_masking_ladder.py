"""The drawdown ladder: transitions, what sticks, what is released and what never is."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest
import torch

from masking import DrawdownLadder, LadderState, RuleError, TradingState

LADDER = DrawdownLadder(cooldown_bars=3)
ACTIVE, REDUCE_ONLY, HALTED = map(int, TradingState)


def ladder_state(code: float = 0.0, killed: float = 0.0, flat_bars: float = 0.0) -> LadderState:
    return LadderState(*(np.array([value], dtype=float) for value in (code, killed, flat_bars)))


def advance(before: LadderState, drawdown: float, position: float = 0.5) -> tuple[tuple[float, ...], bool]:
    """(trading state, killed, flat bars) and released after one bar."""
    after, released = LADDER.step(before, np.array([drawdown]), np.array([position]))
    return tuple(float(column[0]) for column in after), bool(released[0])


@pytest.mark.parametrize(
    ("drawdown", "code", "killed"),
    [
        (0.0, ACTIVE, 0),
        (np.nextafter(0.08, 0), ACTIVE, 0),
        (0.08, REDUCE_ONLY, 0),
        (np.nextafter(0.12, 0), REDUCE_ONLY, 0),
        (0.12, HALTED, 0),
        (np.nextafter(0.15, 0), HALTED, 0),
        (0.15, HALTED, 1),
        (1.5, HALTED, 1),
        (np.nan, HALTED, 1),
        (np.inf, HALTED, 1),
    ],
)
def test_rungs_are_reached_at_exactly_8_12_and_15_percent(drawdown: float, code: int, killed: int) -> None:
    assert advance(ladder_state(), drawdown) == ((code, killed, 0.0), False)


def test_reduce_only_ends_when_the_drawdown_recovers() -> None:
    assert advance(ladder_state(REDUCE_ONLY), 0.0799)[0] == (ACTIVE, 0, 0)


def test_halted_sticks_although_the_drawdown_recovers() -> None:
    assert advance(ladder_state(HALTED), 0.0)[0] == (HALTED, 0, 0)


def test_killed_sticks_although_everything_recovers() -> None:
    assert advance(ladder_state(HALTED, killed=1), 0.0) == ((HALTED, 1, 0), False)
    assert advance(ladder_state(ACTIVE, killed=1), 0.0) == ((HALTED, 1, 0), False)


@pytest.mark.parametrize("code", [REDUCE_ONLY, HALTED])
def test_three_flat_bars_release_and_ask_for_a_new_peak(code: int) -> None:
    drawdown = 0.1 if code == REDUCE_ONLY else 0.13
    assert advance(ladder_state(code, flat_bars=1), drawdown, position=0.0) == ((code, 0, 2), False)
    assert advance(ladder_state(code, flat_bars=2), drawdown, position=0.0) == ((ACTIVE, 0, 0), True)


def test_an_open_position_starts_the_cooldown_over() -> None:
    assert advance(ladder_state(REDUCE_ONLY, flat_bars=2), 0.1, position=0.25) == ((REDUCE_ONLY, 0, 0), False)


def test_flat_bars_are_not_counted_while_active() -> None:
    assert advance(ladder_state(), 0.0, position=0.0) == ((ACTIVE, 0, 0), False)


def test_the_kill_switch_is_never_released() -> None:
    state = ladder_state()
    state, _ = LADDER.step(state, np.array([0.2]), np.array([0.5]))
    for _ in range(200):
        state, released = LADDER.step(state, np.array([0.0]), np.array([0.0]))
        assert state.trading_state[0] == HALTED
        assert state.killed[0] == 1
        assert not released[0]


def test_a_kill_in_the_bar_that_would_release_wins() -> None:
    assert advance(ladder_state(HALTED, flat_bars=2), 0.16, position=0.0) == ((HALTED, 1, 3), False)


def test_rows_are_independent_and_inputs_stay_as_they_were() -> None:
    before = LadderState(np.array([0.0, 2.0, 2.0]), np.array([0.0, 0.0, 1.0]), np.array([0.0, 2.0, 2.0]))
    kept = [column.copy() for column in before]
    after, released = LADDER.step(before, np.array([0.09, 0.13, 0.0]), np.zeros(3))
    np.testing.assert_array_equal(after.trading_state, [REDUCE_ONLY, ACTIVE, HALTED])
    np.testing.assert_array_equal(released, [False, True, False])
    for column, original in zip(before, kept, strict=True):
        np.testing.assert_array_equal(column, original)


def test_every_namespace_takes_the_same_steps() -> None:
    grid = np.array(np.meshgrid([0, 1, 2], [0, 1], [0, 2], [0.0, 0.08, 0.12, 0.15, np.nan], [0.0, 0.5]))
    columns = grid.reshape(5, -1)
    expected, expected_released = LADDER.step(LadderState(*columns[:3]), columns[3], columns[4])
    for xp in (torch, array_api_strict):
        code, killed, flat, drawdown, position = (xp.asarray(column) for column in columns)
        after, released = LADDER.step(LadderState(code, killed, flat), drawdown, position)
        for ours, theirs in zip((*after, released), (*expected, expected_released), strict=True):
            assert np.asarray(ours).tolist() == theirs.tolist()


@pytest.mark.parametrize(
    "limits",
    [
        {"soft": 0.0},
        {"soft": 0.12},
        {"hard": 0.15},
        {"kill": 1.0},
        {"soft": float("nan")},
        {"kill": float("nan")},
        {"soft": 0.2},
    ],
)
def test_rungs_must_ascend_between_0_and_1(limits: dict[str, float]) -> None:
    with pytest.raises(RuleError, match="0 < soft < hard < kill < 1"):
        DrawdownLadder(**limits)


def test_a_cooldown_lasts_at_least_one_bar() -> None:
    with pytest.raises(RuleError, match="cooldown_bars >= 1, was 0"):
        DrawdownLadder(cooldown_bars=0)
