"""The account step against an independent ledger, across namespaces, and as an identity."""

from __future__ import annotations

import math
from itertools import pairwise

import array_api_strict
import numpy as np
import torch
from envs_worlds import fresh
from hypothesis import example, given
from hypothesis import strategies as st

from envs import Account, AccountRules, account_step
from masking import DrawdownLadder

RULES = AccountRules(cost_rate=0.002, ladder=DrawdownLadder(cooldown_bars=2))
FACTORS = (None, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25)

bars = st.lists(st.tuples(st.integers(0, 6), st.floats(-0.12, 0.12), st.floats(-0.12, 0.12)), min_size=1, max_size=25)


class Ledger:
    """The same account in cash and shares, one Python float at a time; shares no code with `envs`."""

    def __init__(self) -> None:
        self.cash, self.shares, self.price = 1.0, 0.0, 100.0
        self.peak, self.state, self.killed, self.flat = 1.0, 0, False, 0

    @property
    def equity(self) -> float:
        return self.cash + self.shares * self.price

    def bar(self, action: int, gap: float, intraday: float) -> None:
        close = self.shares * self.price / self.equity
        self.price *= math.exp(gap)
        factor = 0.0 if self.state == 2 else FACTORS[action]
        if factor is not None and self.shares * self.price / self.equity < factor <= close + 1e-6:
            factor = None
        if factor is not None:
            equity = self.equity
            equity -= 0.002 * abs(factor * equity - self.shares * self.price)
            self.shares = factor * equity / self.price
            self.cash = equity - self.shares * self.price
        self.price *= math.exp(intraday)
        self.peak = max(self.peak, self.equity)
        drawdown = 1 - self.equity / self.peak
        self.killed = self.killed or drawdown >= 0.15
        if self.killed or drawdown >= 0.12 or self.state == 2:
            self.state = 2
        else:
            self.state = int(drawdown >= 0.08)
        self.flat = self.flat + 1 if self.state and self.shares == 0 else 0
        if self.flat >= 2 and not self.killed:
            self.state, self.flat, self.peak = 0, 0, self.equity


def steps(account: Account, path: list[tuple[int, float, float]], xp=np) -> list:
    """Accounts and outcomes of one row along a path."""
    history = []
    for action, gap, intraday in path:
        account, outcome = account_step(
            account,
            xp.asarray([action]),
            xp.asarray([gap], dtype=xp.float64),
            xp.asarray([intraday], dtype=xp.float64),
            RULES,
        )
        history.append((account, outcome))
    return history


@given(path=bars)
def test_equity_position_and_state_equal_a_ledger_of_cash_and_shares(path) -> None:
    ledger = Ledger()
    for bar, (account, _) in zip(path, steps(fresh(), path), strict=True):
        ledger.bar(*bar)
        np.testing.assert_allclose(account.equity[0], ledger.equity, rtol=1e-10)
        np.testing.assert_allclose(
            account.position[0], ledger.shares * ledger.price / ledger.equity, rtol=1e-9, atol=1e-12
        )
        np.testing.assert_allclose(account.peak[0], ledger.peak, rtol=1e-10)
        assert (account.trading_state[0], account.killed[0], account.flat_bars[0]) == (
            ledger.state, ledger.killed, ledger.flat
        )  # fmt: skip


@given(path=bars)
@example(path=[(3, 0.0, 0.0), (3, -0.1, 0.0)])
def test_a_decision_that_reduces_at_the_close_never_buys_at_the_open(path) -> None:
    # Without a move after the open, the position at the close is the one the trade left.
    before = fresh()
    for (action, gap, _), (account, _) in zip(path, steps(fresh(), [(a, g, 0.0) for a, g, _ in path]), strict=True):
        held = before.position[0] * math.exp(gap) / (1 + before.position[0] * math.expm1(gap))
        if action and FACTORS[action] <= before.position[0]:
            assert account.position[0] <= held + 1e-12
        before = account


def test_a_trade_that_the_gap_turned_into_an_enlargement_is_dropped() -> None:
    # Half invested and REDUCE_ONLY after a fall; the gap down leaves less than the target of 0.5.
    account = fresh()._replace(
        equity=np.array([0.9]), position=np.array([0.5]), trading_state=np.array([1.0]), holding_time=np.array([9.0])
    )
    for target, traded in ((3, 0.0), (2, 0.5 * 0.98 / 0.99 - 0.25)):
        after, outcome = account_step(account, np.array([target]), np.log([0.98]), np.zeros(1), RULES)
        np.testing.assert_allclose(outcome.turnover, traded, atol=1e-12)
        assert after.holding_time[0] == (10 if traded == 0 else 1)


@given(path=bars)
def test_log_returns_sum_to_log_equity(path) -> None:
    history = steps(fresh(), path)
    total = sum(float(outcome.log_return[0]) for _, outcome in history)
    np.testing.assert_allclose(total, math.log(history[-1][0].equity[0]), rtol=1e-9, atol=1e-12)


@given(path=bars)
def test_torch_and_the_strict_array_api_agree_with_numpy(path) -> None:
    expected = steps(fresh(), path)
    for xp in (torch, array_api_strict):
        for ours, theirs in zip(steps(fresh(xp=xp), path, xp), expected, strict=True):
            for column, reference in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
                np.testing.assert_allclose(np.asarray(column), reference, rtol=1e-12, atol=1e-12)


@given(paths=st.lists(bars.filter(lambda path: len(path) >= 3), min_size=2, max_size=6))
def test_a_batch_equals_its_rows_one_by_one(paths) -> None:
    account, length = fresh(len(paths)), min(map(len, paths))
    alone = [steps(fresh(), path) for path in paths]
    for bar in range(length):
        action, gap, intraday = (np.array(column) for column in zip(*(path[bar] for path in paths), strict=True))
        account, outcome = account_step(account, action, gap, intraday, RULES)
        for row, history in enumerate(alone):
            for batch, single in zip((*account, *outcome), (*history[bar][0], *history[bar][1]), strict=True):
                np.testing.assert_allclose(batch[row], single[0], rtol=1e-12, atol=1e-12)


@given(path=bars)
def test_the_step_leaves_its_inputs_alone_and_shares_no_column_with_them(path) -> None:
    account = fresh()
    for action, gap, intraday in path:
        kept = [column.copy() for column in account]
        for column in account:
            column.flags.writeable = False
        after, _ = account_step(account, np.array([action]), np.array([gap]), np.array([intraday]), RULES)
        for column, original in zip(account, kept, strict=True):
            np.testing.assert_array_equal(column, original)
        for column in after:
            assert not any(np.shares_memory(column, other) for other in account)
        account = after


@given(path=bars)
def test_a_halted_account_is_flat_one_bar_later_and_stays_flat(path) -> None:
    history = steps(fresh(), path)
    for (before, _), (after, outcome) in pairwise(history):
        if before.trading_state[0] == 2:
            assert after.position[0] == 0
            assert bool(outcome.flattened[0]) == (before.position[0] != 0)


@given(path=bars, leverage=st.floats(-0.999, 3.0))
def test_equity_stays_positive_and_finite_through_any_crash(path, leverage) -> None:
    crash = (6, math.log1p(leverage), -5.0)
    for account, outcome in steps(fresh(), [*path, (6, 0.0, 0.0), crash, (0, -8.0, -8.0), (1, 3.0, 3.0)]):
        assert account.equity[0] > 0
        assert all(np.isfinite(column).all() for column in (*account, *outcome))


def test_float32_accounts_survive_ruin_too() -> None:
    account = Account(*(column.astype(np.float32) for column in fresh()))
    for action, gap, intraday in ((6, 0.0, 0.0), (1, -3.0, -3.0), (0, 0.0, 0.0)):
        account, outcome = account_step(
            account, np.array([action]), np.float32([gap]), np.float32([intraday]), AccountRules(cost_rate=2.0)
        )
        assert account.equity.dtype == np.float32
        assert account.equity[0] > 0
        assert np.isfinite(outcome.log_return[0])
