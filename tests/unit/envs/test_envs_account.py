"""The account step, worked by hand over several bars.

Actions: 0 Hold, 1..6 target 0, .25, .5, .75, 1, 1.25. Notional in comments is in multiples of the initial equity.
"""

from __future__ import annotations

import numpy as np
import pytest
from envs_worlds import fresh

from envs import Account, AccountRules, StepOutcome, account_step, initial_account
from masking import DrawdownLadder

RULES = AccountRules(cost_rate=0.001, ladder=DrawdownLadder(cooldown_bars=3))
FREE = AccountRules(cost_rate=0.0, ladder=DrawdownLadder(cooldown_bars=3))

Bar = tuple[int, float, float]
"""Action, simple gap return, simple intraday return."""


def walk(*bars: Bar, rules: AccountRules = RULES, account: Account | None = None) -> list[tuple[Account, StepOutcome]]:
    """Accounts and outcomes after each bar of one row."""
    account, history = account or fresh(), []
    for action, gap, intraday in bars:
        account, outcome = account_step(
            account, np.array([action]), np.log1p(np.array([gap])), np.log1p(np.array([intraday])), rules
        )
        history.append((account, outcome))
    return history


def check(actual: Account | StepOutcome, **expected: float) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(actual, name), [value], rtol=1e-12, atol=1e-15, err_msg=name)


# --- buy, hold, sell ---------------------------------------------------------------------------------------

ROUND_TRIP = (
    (3, 0.02, 0.10),  # buy .5 after a gap that concerns no one
    (0, -0.04, 0.05),  # hold
    (1, -0.10, 0.30),  # sell everything after a gap down; the rally comes too late
)


def test_buying_pays_the_cost_and_earns_the_move_after_the_open() -> None:
    account, outcome = walk(*ROUND_TRIP)[0]
    # Cost .5 * .001; equity .9995; notional .49975 gains 10 %: .0499750.
    check(
        account,
        equity=1.049475,
        peak=1.049475,
        position=0.549725 / 1.049475,
        open_pnl=0.049475,
        holding_time=1,
        trading_state=0,
        killed=0,
        flat_bars=0,
        last_risk_event=0,
        drawdown=0,
    )
    check(outcome, log_return=np.log(1.049475), cost=0.0005, turnover=0.5, drawdown=0)
    assert not outcome.flattened[0]
    assert not outcome.breached[0]


def test_holding_earns_gap_and_move_without_cost_and_the_position_drifts() -> None:
    account, outcome = walk(*ROUND_TRIP)[1]
    # Notional .549725 loses 4 %: equity 1.027486; .527736 gains 5 %: equity 1.0538728, notional .5541228.
    check(
        account,
        equity=1.0538728,
        peak=1.0538728,
        position=0.5541228 / 1.0538728,
        open_pnl=0.0538728,
        holding_time=2,
    )
    check(outcome, log_return=np.log(1.0538728 / 1.049475), cost=0, turnover=0)


def test_selling_everything_takes_the_gap_pays_the_cost_and_misses_the_rally() -> None:
    account, outcome = walk(*ROUND_TRIP)[2]
    # Notional .5541228 loses 10 %: equity .99846052; selling .49871052 costs .00049871052.
    equity = 0.99846052 - 0.00049871052
    turnover = 0.49871052 / 0.99846052
    check(
        account,
        equity=equity,
        peak=1.0538728,
        position=0,
        open_pnl=0,
        holding_time=1,
        trading_state=0,
        drawdown=1 - equity / 1.0538728,
    )
    check(outcome, log_return=np.log(equity / 1.0538728), cost=turnover * 0.001, turnover=turnover)
    assert not outcome.flattened[0]  # the agent sold, not the risk manager


def test_a_partial_sale_costs_what_is_traded_after_the_gap() -> None:
    (_, _), (account, outcome) = walk((5, 0, 0), (3, 0.25, 0), rules=FREE)
    # Position 1 stays 1 through any gap; selling half of it.
    check(account, equity=1.25, position=0.5, holding_time=1)
    check(outcome, turnover=0.5)


def test_trading_to_the_target_one_already_holds_is_a_trade_of_the_drift_only() -> None:
    (_, _), (account, outcome) = walk((3, 0, 0), (3, 0.10, 0))
    # Equity .9995, notional .49975 * 1.1 = .549725 of 1.049475: back to one half.
    drift = 0.549725 / 1.049475 - 0.5
    check(outcome, turnover=drift, cost=drift * 0.001)
    check(account, position=0.5, holding_time=1)


@pytest.mark.parametrize("action", [0, 1])
def test_hold_or_staying_flat_without_a_position_costs_nothing(action: int) -> None:
    for bar, (account, outcome) in enumerate(walk(*[(action, -0.3, 0.5)] * 4)):
        check(account, equity=1, peak=1, position=0, open_pnl=0, holding_time=bar + 1, trading_state=0)
        check(outcome, log_return=0, cost=0, turnover=0, drawdown=0)


def test_open_pnl_starts_anew_after_the_account_was_flat() -> None:
    history = walk((5, 0, 0.10), (1, 0, 0), (5, 0, 0.05), rules=FREE)
    assert [round(float(account.open_pnl[0]), 12) for account, _ in history] == [0.1, 0.0, 0.05]


def test_holding_time_counts_from_the_trade_through_holds() -> None:
    history = walk((3, 0, 0.01), (0, 0, 0.01), (0, 0.01, 0), (5, 0, 0), (0, 0, 0), rules=FREE)
    assert [float(account.holding_time[0]) for account, _ in history] == [1, 2, 3, 1, 2]


# --- the ladder --------------------------------------------------------------------------------------------

FALL = ((5, 0, -0.10), (0, 0, -0.03), (0, -0.01, 0.50))


def test_the_soft_limit_allows_to_keep_the_position() -> None:
    account, outcome = walk(*FALL, rules=FREE)[0]
    check(account, equity=0.9, position=1, trading_state=1, last_risk_event=1, flat_bars=0, drawdown=0.1)
    assert not outcome.breached[0]


def test_the_hard_limit_halts_at_the_close_with_the_position_still_open() -> None:
    account, outcome = walk(*FALL)[1]
    # .999 * .9 = .8991 of a peak of 1; * .97 = .872127.
    check(account, equity=0.872127, peak=1, position=1, trading_state=2, killed=0, last_risk_event=2)
    check(outcome, drawdown=0.127873, cost=0)
    assert outcome.breached[0]
    assert not outcome.flattened[0]


@pytest.mark.parametrize("action", [0, 5, 6])
def test_the_risk_manager_flattens_at_the_next_open_whatever_is_asked(action: int) -> None:
    account, outcome = walk(*FALL[:2], (action, -0.01, 0.50))[2]
    # .872127 * .99 = .86340573 after the gap, minus the cost of selling all of it; the rally is missed.
    equity = 0.86340573 * 0.999
    check(
        account,
        equity=equity,
        peak=1,
        position=0,
        open_pnl=0,
        holding_time=1,
        trading_state=2,
        flat_bars=1,
        last_risk_event=2,
        killed=0,
    )
    check(outcome, turnover=1, cost=0.001, drawdown=1 - equity)
    assert outcome.flattened[0]
    assert not outcome.breached[0]  # reported once, on the bar that breached


def test_the_cooldown_releases_with_a_new_peak() -> None:
    history = walk(*FALL, (0, 0, 0), (0, 0, 0), (3, 0, 0.10), rules=FREE)
    equity = 0.873 * 0.99
    check(history[3][0], trading_state=2, flat_bars=2, peak=1, last_risk_event=2)
    assert not history[3][1].flattened[0]  # nothing left to close
    check(history[4][0], trading_state=0, flat_bars=0, peak=equity, drawdown=0, last_risk_event=0, equity=equity)
    check(history[4][1], drawdown=1 - equity)  # the outcome keeps the drawdown before the release
    check(history[5][0], equity=equity * 1.05, trading_state=0, peak=equity * 1.05)


def test_flat_in_reduce_only_is_released_too() -> None:
    history = walk((5, 0, -0.10), (1, 0, 0), (0, 0, 0), (0, 0, 0), rules=FREE)
    assert [float(account.trading_state[0]) for account, _ in history] == [1, 1, 1, 0]
    check(history[3][0], peak=0.9, drawdown=0)


def test_recovery_in_reduce_only_returns_to_active_but_remembers_the_event() -> None:
    account, _ = walk((5, 0, -0.10), (0, 0, 0.10), rules=FREE)[1]
    check(account, equity=0.99, trading_state=0, last_risk_event=1, peak=1)


def test_the_kill_level_latches_flattens_and_never_releases() -> None:
    history = walk((5, 0, -0.16), *[(0, 0, 0)] * 30, rules=FREE)
    check(history[0][0], equity=0.84, position=1, trading_state=2, killed=1, last_risk_event=3)
    assert history[0][1].breached[0]
    check(history[1][0], position=0, killed=1, flat_bars=1)
    assert history[1][1].flattened[0]
    check(history[-1][0], trading_state=2, killed=1, flat_bars=30, peak=1, last_risk_event=3)


def test_a_gap_into_the_kill_level_while_halted_is_a_breach_of_its_own() -> None:
    account, outcome = walk(*FALL[:2], (0, -0.05, 0), rules=FREE)[2]
    check(account, equity=0.873 * 0.95, killed=1, last_risk_event=3)
    assert outcome.flattened[0]
    assert outcome.breached[0]


# --- ruin and broken prices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bar", [(0, -0.9, 0.0), (1, -0.9, 0.0), (6, -0.9, 0.5), (0, 0.0, -0.9), (0, -0.81, 0.0)])
def test_leverage_can_neither_take_equity_to_zero_nor_leave_a_position(bar: Bar) -> None:
    (_, _), (account, outcome) = walk((6, 0, 0), bar)
    assert 0 < account.equity[0] < 1e-8
    check(account, killed=1, trading_state=2)
    assert np.isfinite(outcome.log_return[0])
    assert np.abs(account.position[0]) <= 1.25 * 1.5


def test_a_near_ruin_that_leaves_a_vast_position_cannot_sell_it_for_less_than_nothing() -> None:
    # 1 - 1.25 * .79999999 leaves 1.25e-8 of equity under a position of 2e7 times that; selling costs 2e4 times it.
    (_, _), (account, outcome) = walk((6, 0, 0), (1, -0.79999999, 0))
    assert account.equity[0] > 0
    assert np.isfinite(outcome.log_return[0])
    check(account, position=0, killed=1)


def test_a_cost_rate_of_more_than_everything_leaves_positive_equity() -> None:
    account, outcome = walk((5, 0, 0), rules=AccountRules(cost_rate=2.0))[0]
    assert account.equity[0] > 0
    assert np.isfinite(outcome.log_return[0])
    check(account, killed=1)


@pytest.mark.parametrize("broken", ["gap", "intraday"])
@pytest.mark.parametrize("action", [0, 3])
def test_a_nan_return_latches_the_kill_switch_even_when_flat(action: int, broken: str) -> None:
    gap, intraday = (np.nan, 0.0) if broken == "gap" else (0.0, np.nan)
    account, outcome = walk((action, gap, intraday))[0]
    check(account, killed=1, trading_state=2)
    assert outcome.breached[0]
    later = walk((0, 0, 0), account=account)[0][0]
    check(later, killed=1, trading_state=2)


# --- construction ------------------------------------------------------------------------------------------


def test_an_account_begins_flat_with_equity_one() -> None:
    account = initial_account(3, np, dtype=np.float64)
    for name, column in account._asdict().items():
        assert column.tolist() == [1.0 if name in ("equity", "peak") else 0.0] * 3


def test_an_account_has_at_least_one_row() -> None:
    with pytest.raises(ValueError, match="batch: expected >= 1, was 0"):
        initial_account(0, np, dtype=np.float64)
