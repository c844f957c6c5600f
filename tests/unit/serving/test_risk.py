"""The risk manager steps the ladder as the account step of training does, and only ever tightens within a bar."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from bundle_parts import make_dynamics
from hypothesis import given
from hypothesis import strategies as st

from envs.account import account_step, initial_account
from masking import TradingState
from serving.errors import ControlError
from serving.records import RiskState
from serving.risk import RiskManager, check_command, is_finite, kill, reduce_only, reset

MANAGER = RiskManager(make_dynamics().rule_set)


def observe(state: RiskState, equity: float, bar: float, position: float = 0.5) -> RiskState:
    return MANAGER.observe(state, equity=equity, position=position, bar_time=bar)


@given(st.lists(st.tuples(st.floats(-0.05, 0.05), st.integers(0, 5)), min_size=1, max_size=60))
def test_bar_by_bar_it_is_the_account_step_of_training(bars: list[tuple[float, int]]) -> None:
    rules = make_dynamics().account_rules
    account = initial_account(1, np, dtype=np.float64)
    state = RiskState(peak=1.0, equity=1.0)
    for time, (move, action) in enumerate(bars, start=1):
        account, _ = account_step(account, np.array([action]), np.array([0.0]), np.array([move]), rules)
        state = observe(state, float(account.equity[0]), float(time), float(account.position[0]))
        assert state.ladder_state == account.trading_state[0]
        assert state.killed == bool(account.killed[0])
        assert state.flat_bars == account.flat_bars[0]
        assert state.last_risk_event == account.last_risk_event[0]
        assert state.peak == account.peak[0]
        assert state.drawdown == account.drawdown[0]


@pytest.mark.parametrize(
    ("equity", "name", "killed"),
    [(920.1, "ACTIVE", False), (919.9, "REDUCE_ONLY", False), (879.9, "HALTED", False), (849.9, "HALTED", True)],
)
def test_rungs_by_hand(equity: float, name: str, killed: bool) -> None:
    state = observe(observe(RiskState(), 1000.0, 1.0), equity, 2.0)
    assert (state.name, state.killed) == (name, killed)


def test_within_a_bar_it_tightens_and_counts_no_flat_bar() -> None:
    state = observe(observe(RiskState(), 1000.0, 1.0), 900.0, 2.0, 0.0)
    assert (state.name, state.flat_bars) == ("REDUCE_ONLY", 1.0)
    deeper = observe(state, 870.0, 2.0, 0.0)
    assert (deeper.name, deeper.flat_bars) == ("HALTED", 1.0)
    better = observe(deeper, 1000.0, 2.0, 0.0)
    assert better.name == "HALTED"
    reduced = observe(state, 1000.0, 2.0, 0.0)
    assert reduced.name == "REDUCE_ONLY"
    assert observe(reduced, 1000.0, 3.0, 0.0).name == "ACTIVE"


def test_the_cool_down_releases_at_a_new_peak_and_never_within_a_bar() -> None:
    state = observe(observe(RiskState(), 1000.0, 0.0), 870.0, 1.0, 0.0)
    for bar in range(2, MANAGER.ladder.cooldown_bars):
        state = observe(state, 870.0, float(bar), 0.0)
    assert state.name == "HALTED"
    assert observe(state, 870.0, state.bar_time, 0.0).name == "HALTED"
    released = observe(state, 870.0, state.bar_time + 1.0, 0.0)
    assert (released.name, released.peak, released.last_risk_event) == ("ACTIVE", 870.0, 0)


def test_a_kill_switch_stays_until_a_reset() -> None:
    state = kill(observe(RiskState(), 1000.0, 1.0))
    for bar in range(2, 60):
        state = observe(state, 1000.0, float(bar), 0.0)
        assert (state.name, state.killed) == ("HALTED", True)
    fresh = reset(observe(state, 700.0, 60.0, 0.0), 1e9)
    assert (fresh.name, fresh.killed, fresh.peak, fresh.drawdown) == ("ACTIVE", False, 700.0, 0.0)


def test_a_reset_forgets_what_a_clock_that_was_ahead_said() -> None:
    ahead = msgspec.structs.replace(observe(RiskState(), 1000.0, 500.0), decided_at=600.0)
    assert (reset(ahead, 100.0).bar_time, reset(ahead, 100.0).decided_at) == (100.0, 100.0)
    assert (reset(ahead, 700.0).bar_time, reset(ahead, 700.0).decided_at) == (500.0, 600.0)


def test_a_persons_reduce_only_outlives_the_ladder() -> None:
    state = observe(reduce_only(observe(RiskState(), 1000.0, 1.0)), 1000.0, 2.0)
    assert state.name == "REDUCE_ONLY"
    assert reduce_only(kill(state)).name == "HALTED"
    assert observe(state, 870.0, 3.0).name == "HALTED"


def test_no_money_is_as_deep_as_it_gets() -> None:
    assert observe(RiskState(), 0.0, 1.0).killed
    assert observe(observe(RiskState(), 1000.0, 1.0), -5.0, 2.0).killed


@pytest.mark.parametrize(("person", "reason"), [("", "why"), ("  ", "why"), ("who", ""), ("who", "\n")])
def test_commands_need_a_person_and_a_reason(person: str, reason: str) -> None:
    with pytest.raises(ControlError, match="expected a text that is not empty"):
        check_command(person, reason)
    check_command("who", "why")


def test_numbers_that_are_none() -> None:
    assert [is_finite(value) for value in (0.0, None, float("nan"), float("inf"))] == [True, False, False, False]


def test_states_survive_their_json() -> None:
    state = observe(RiskState(), 1000.1, 1.1)
    assert msgspec.json.decode(msgspec.json.encode(state), type=RiskState) == state
    assert TradingState(state.trading_state).name == state.name
