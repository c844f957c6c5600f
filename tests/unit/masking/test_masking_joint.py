"""Joint limits worked by hand, and what they refuse."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
from joint_worlds import HALF_INVESTED, HOLD, LIMITS, TABLE, states

from masking import InvalidActionError, InvalidMaskError, JointLimits, JointWalk, RuleError, TradeTable

COMBINATIONS = np.array(list(itertools.product(range(11), repeat=3)))
NAN, INF = math.nan, math.inf


def act(*lots: float) -> np.ndarray:
    """Actions [1, K] that trade these units."""
    return np.array([[TABLE.lots.index(lot) for lot in lots]])


def row(cash: float, units: tuple[float, ...], prices: tuple[float, ...]) -> np.ndarray:
    return np.array([[cash, *units, *prices]], dtype=np.float64)


# --- worked by hand ----------------------------------------------------------------------------------------------


def test_two_purchases_that_are_affordable_alone_are_not_so_together() -> None:
    # 20 * 40.03 = 800.60 and 10 * 35.045 = 350.45: each leaves more than $1 of $1000, both need 1151.05.
    state = row(1000, (0, 0, 0), (40, 35, 50))
    assert LIMITS.check(state, act(20, 0, 0))
    assert LIMITS.check(state, act(0, 10, 0))
    assert not LIMITS.check(state, act(20, 10, 0))
    assert LIMITS.explain(state, act(20, 10, 0))[0] == "cash after the trade -151.05 is below 1"
    masks = LIMITS.marginal_masks(state).reshape(3, 11)
    assert masks[0, TABLE.lots.index(20)]
    assert masks[1, TABLE.lots.index(10)]
    walk = JointWalk(LIMITS, state)
    walk.take(0, act(20, 0, 0)[:, 0])
    assert not walk.action_masks(1)[0, TABLE.lots.index(10)]


def test_a_sale_funds_a_purchase_whichever_comes_first() -> None:
    # $1 in cash. Selling 20 at 40 brings 20 * 39.975 = 799.50, buying 10 at 35 costs 350.45: $450.05 is left.
    state = row(1, (20, 0, 0), (40, 35, 50))
    assert not LIMITS.check(state, act(0, 10, 0))
    assert LIMITS.check(state, act(-20, 10, 0))
    walk = JointWalk(LIMITS, state)
    np.testing.assert_allclose(
        walk.options(0)[0].cash[0, :6], [2000 - 0.25, 1600.0, 1200.25, 800.5, 400.75, 1.0], atol=1
    )
    assert walk.action_masks(1)[0, TABLE.lots.index(10)]
    walk.take(1, act(0, 10, 0)[:, 1])
    # Now 10 units must be sold at the least; 10 bring 399.75, which leaves $50.30, but 350 of 399.30 is over 2/3.
    allowed = [TABLE.lots[action] for action in np.flatnonzero(walk.action_masks(0)[0])]
    assert allowed == [-20.0, -10.0]
    assert LIMITS.check(state, act(-10, 10, 0))


def test_a_share_is_judged_after_the_costs() -> None:
    # Buying 10 of asset 3 costs 0.35: of 999.65 a third is 333.2167, of 1000 it would be 333.3333.
    assert LIMITS.check(row(1000, (0, 0, 0), (40, 35, 33.32)), act(0, 0, 10))
    state = row(1000, (0, 0, 0), (40, 35, 33.33))
    assert not LIMITS.check(state, act(0, 0, 10))
    assert LIMITS.explain(state, act(0, 0, 10)) == ["asset 2: 333.30 after the trade exceeds 0.3333 of 999.65"]


def test_a_sale_elsewhere_costs_value_and_so_breaks_a_share() -> None:
    # 333.2 of 999.65 keeps a third, of 999.40, after selling 10 of asset 1 for 0.25, it does not.
    state = row(600, (10, 0, 0), (40, 35, 33.32))
    assert LIMITS.check(state, act(0, 0, 10))
    assert not LIMITS.check(state, act(-10, 0, 10))


def test_nothing_is_sold_that_is_not_owned() -> None:
    state = row(1000, (10, 0, 0), (40, 35, 50))
    assert LIMITS.check(state, act(-10, 0, 0))
    assert not LIMITS.check(state, act(-20, 0, 0))
    assert not LIMITS.check(state, act(0, -10, 0))
    assert LIMITS.explain(state, act(-20, -10, 0)) == [
        "asset 0: selling 20 of 10 units owned",
        "asset 1: selling 10 of 0 units owned",
    ]


def test_prices_may_carry_a_portfolio_beyond_its_limits_then_it_may_hold_and_sell() -> None:
    # 9/10 in asset 3 and no cash: nothing can be bought, everything can be held or sold.
    state = row(0, (20, 0, 30), (10, 35, 60))
    masks = LIMITS.marginal_masks(state).reshape(3, 11)
    assert [np.flatnonzero(mask).tolist() for mask in masks[:, : HOLD + 1]] == [[3, 4, 5], [5], [2, 3, 4, 5]]
    assert LIMITS.check(state, act(0, 0, 0))
    assert LIMITS.check(state, act(-10, 0, -10))
    assert not LIMITS.check(state, act(0, 0, 10))


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
@pytest.mark.parametrize("column", range(7))
def test_a_row_with_a_number_that_is_none_may_only_hold(broken: float, column: int) -> None:
    state = np.repeat(row(1000, (20, 20, 20), (40, 35, 50)), 2, axis=0)
    state[1, column] = broken
    masks = LIMITS.marginal_masks(state).reshape(2, 3, 11)
    assert masks[0].sum() > 3
    assert (masks[1] == (np.arange(11) == HOLD)).all()
    valid = np.array([LIMITS.check(state, np.tile(combination, (2, 1)))[1] for combination in COMBINATIONS])
    assert COMBINATIONS[valid].tolist() == [[HOLD] * 3]
    name = LIMITS.table.state_names[column]
    assert LIMITS.explain(state, np.repeat(act(-10, 0, 0), 2, axis=0), row=1) == [
        f"unknown state allows only holding: {name} is {broken}"
    ]


@pytest.mark.parametrize("price", [0.0, -5.0, 0.025])
def test_a_price_that_does_not_cover_the_cost_of_selling_is_not_traded(price: float) -> None:
    state = row(1000, (20, 20, 0), (price, 35, 50))
    masks = LIMITS.marginal_masks(state).reshape(3, 11)
    assert np.flatnonzero(masks[0]).tolist() == [HOLD]
    assert masks[1:].sum() > 2
    for lot in (-10, 10):
        assert not LIMITS.check(state, act(lot, 0, 0))
        assert f"asset 0: price {price:g} does not cover the cost of selling" in LIMITS.explain(state, act(lot, 0, 0))


def test_the_gross_limit_holds_after_costs_and_leaves_sales_alone() -> None:
    # 490 of 999.70 is below a half, 499.90 of 999.70 above it.
    assert HALF_INVESTED.check(row(1000, (0, 0, 0), (49, 35, 50)), act(10, 0, 0))
    state = row(1000, (0, 0, 0), (49.99, 35, 50))
    assert not HALF_INVESTED.check(state, act(10, 0, 0))
    assert HALF_INVESTED.explain(state, act(10, 0, 0)) == ["499.90 invested after the trade exceeds 0.5 of 999.70"]
    assert LIMITS.check(state, act(10, 0, 0))
    full = row(10, (50, 0, 0), (40, 35, 50))
    assert HALF_INVESTED.check(full, act(-10, 0, 0))
    assert not HALF_INVESTED.check(full, act(-20, 10, 0))  # 1550 of 2008.05
    assert HALF_INVESTED.check(full, act(-40, 10, 0))  # 750 of 2008.55


def test_at_the_limit_itself_the_check_says_yes_and_the_walk_keeps_a_margin() -> None:
    # 10 * (9.875 + 0.125) = 100 leaves exactly $1 of 101, in numbers that float64 holds exactly.
    limits = JointLimits(table=TradeTable(buy_cost=(0.125,), sell_cost=(0.125,)), max_share=(1.0,))
    buy = np.array([[limits.table.lots.index(10)]])
    for cash, checked, walked in ((101.0, True, False), (101.0 + 1e-6, True, True), (101.0 - 1e-12, False, False)):
        state = np.array([[cash, 0.0, 9.875]])
        assert bool(limits.check(state, buy)) == checked
        assert bool(JointWalk(limits, state).action_masks(0)[0, buy[0, 0]]) == walked
        assert limits.marginal_masks(state)[0, buy[0, 0]]  # shows whatever the check might allow
        assert (limits.explain(state, buy) == []) == checked


def test_the_combinations_a_walk_misses_need_an_intermediate_sale() -> None:
    # $12 and 20 units of asset 1, worth 10 each, of which selling costs 1 a unit. Buying 10 of asset 0 for 100 needs
    # $89 more. Selling 10 units leaves $2 of 202, and 100 of 202 is under a half; selling all 20 leaves 192, and it is
    # not. Asked about asset 0 first, the walk tries only holding and selling all.
    table = TradeTable(lots=(-20.0, -10.0, 0.0, 10.0), buy_cost=(0.0, 0.0), sell_cost=(1.0, 1.0))
    limits = JointLimits(table=table, max_share=(0.5, 1.0))
    state, sell_10, buy_10 = np.array([[12.0, 0.0, 20.0, 10.0, 10.0]]), np.array([1]), np.array([3])
    assert limits.check(state, np.array([[3, 1]]))
    assert not limits.check(state, np.array([[3, 0]]))
    assert not limits.check(state, np.array([[3, 2]]))
    assert not JointWalk(limits, state).action_masks(0)[0, buy_10]
    walk = JointWalk(limits, state)
    assert walk.action_masks(1)[0, sell_10]
    walk.take(1, sell_10)
    assert walk.action_masks(0)[0, buy_10]


def test_a_later_purchase_costs_value_that_an_earlier_one_needs() -> None:
    # Trading costs 1 a unit. Of $415, 100 of asset 1 are less than a quarter of 405; after 10 of asset 0, too, they are
    # more than a quarter of 395, although asset 0 itself may be bought.
    table = TradeTable(lots=(0.0, 10.0), buy_cost=(1.0, 1.0), sell_cost=(1.0, 1.0))
    limits, state = JointLimits(table=table, max_share=(1.0, 0.25)), np.array([[415.0, 0.0, 0.0, 10.0, 10.0]])
    assert limits.check(state, np.array([[0, 1]]))
    assert limits.check(state, np.array([[1, 0]]))
    assert limits.explain(state, np.array([[1, 1]])) == ["asset 1: 100.00 after the trade exceeds 0.25 of 395.00"]
    for order in ((0, 1), (1, 0)):
        walk = JointWalk(limits, state)
        walk.take(order[0], np.array([1]))
        assert walk.action_masks(order[1]).tolist() == [[True, False]]


def test_explain_has_words_for_a_portfolio_without_value() -> None:
    limits = JointLimits(table=TradeTable(buy_cost=(0.0,), sell_cost=(0.0,)), max_share=(1.0,))
    reasons = limits.explain(np.array([[0.0, 0.0, 40.0]]), np.array([[limits.table.lots.index(10)]]))
    assert reasons == [
        "cash after the trade -400.00 is below 1",
        "400.00 invested after the trade exceeds 1 of 0.00",
        "asset 0: 400.00 after the trade exceeds 1 of 0.00",
    ]


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"lots": (0.0, 10.0, 10.0)}, "lots"),
        ({"lots": (10.0, 0.0)}, "lots"),
        ({"lots": (-10.0, 10.0)}, "lots"),
        ({"lots": (0.0, INF)}, "lots"),
        ({"lots": (0.0, NAN)}, "lots"),
        ({"buy_cost": ()}, "buy_cost"),
        ({"buy_cost": (-0.1, 0.0, 0.0)}, "buy_cost"),
        ({"sell_cost": (NAN, 0.0, 0.0)}, "sell_cost"),
        ({"sell_cost": (0.1, 0.1)}, "sell_cost"),
    ],
)
def test_trade_tables_that_mean_nothing_are_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RuleError, match=f"^{field}: expected"):
        replace(TABLE, **changes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"min_cash": -1.0}, "min_cash"),
        ({"min_cash": NAN}, "min_cash"),
        ({"max_gross": 0.0}, "max_gross"),
        ({"max_gross": 1.1}, "max_gross"),
        ({"max_gross": NAN}, "max_gross"),
        ({"max_share": (1.0, 1.0)}, "max_share"),
        ({"max_share": (1.0, 1.0, 0.0)}, "max_share"),
        ({"max_share": (1.0, 1.0, NAN)}, "max_share"),
    ],
)
def test_limits_that_mean_nothing_are_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RuleError, match=f"^{field}: expected"):
        replace(LIMITS, **changes)


@pytest.mark.parametrize("state", [np.zeros(7), np.zeros((2, 6)), np.zeros((7, 2))])
def test_states_of_another_shape_are_refused(state: np.ndarray) -> None:
    for call in (lambda: JointWalk(LIMITS, state), lambda: LIMITS.check(state, np.full((2, 3), HOLD))):
        with pytest.raises(RuleError, match=r"state: expected \[B, 7\]"):
            call()


@pytest.mark.parametrize(
    "actions", [np.full((2, 2), HOLD), np.full(6, HOLD), np.full((2, 3), 5.0), np.ones((2, 3), bool)]
)
def test_actions_of_another_shape_or_kind_are_refused(actions: np.ndarray) -> None:
    for given_actions in (actions, torch.as_tensor(actions)):
        state = states(2, seed=0) if isinstance(given_actions, np.ndarray) else torch.as_tensor(states(2, seed=0))
        with pytest.raises(InvalidActionError, match=r"actions: expected integers \[2, 3\]"):
            LIMITS.check(state, given_actions)


@pytest.mark.parametrize(
    "masks", [np.ones((2, 33)), np.ones((2, 33), np.int8), np.ones((33, 2), bool), np.ones((2, 3, 11), bool)]
)
def test_masks_of_another_shape_or_kind_are_refused(masks: np.ndarray) -> None:
    with pytest.raises(InvalidMaskError, match=r"action_masks: expected bool \[2, 33\], True = valid, was"):
        JointWalk(LIMITS, states(2, seed=0), masks)


@pytest.mark.parametrize("asarray", [np.asarray, torch.as_tensor, array_api_strict.asarray])
@pytest.mark.parametrize(
    ("asset", "action", "message"),
    [
        (0, [5, 11], "action: expected 0 to 10, was 11 in row 1"),
        (0, [-1, 5], "action: expected 0 to 10, was -1 in row 0"),
        (0, [5, 10], "action: expected one that its mask allows, was 10 in row 1"),
        (0, [5, 0], "action: expected one that its mask allows, was 0 in row 1"),  # sells 50 of no units
        (3, [5, 5], "asset: expected 0 to 2, was 3 in row 0"),
        (-1, [5, 5], "asset: expected 0 to 2, was -1 in row 0"),
        ([0, 3], [5, 5], "asset: expected 0 to 2, was 3 in row 1"),
        (1, [5, 5], "asset: expected one that is still to be decided, was 1 in row 0"),
        ([0, 1], [5, 5], "asset: expected one that is still to be decided, was 1 in row 1"),
        (0, [5.0, 5.0], r"action: expected integers \[2\], was .*float64 \[2\]"),
        (0, [5], r"action: expected integers \[2\], was .*int64 \[1\]"),
        ([0], [5, 5], r"asset: expected integers \[2\], was .*int64 \[1\]"),
    ],
)
def test_a_walk_refuses_what_its_masks_do_not_allow(asarray: Any, asset: Any, action: Any, message: str) -> None:
    # 50 * 40.03 is over the $1,000 of the second row, not over the $9,000 of the first.
    state = np.concatenate([row(9000, (0, 0, 0), (40, 35, 50)), row(1000, (0, 0, 0), (40, 35, 50))])
    walk, asset = JointWalk(LIMITS, asarray(state)), asset if isinstance(asset, int) else asarray(np.array(asset))
    walk.take(1, asarray(np.array([HOLD, HOLD])))
    before = [np.asarray(part).copy() for part in (*walk.budget, walk.pending, walk.invested)]
    with pytest.raises(InvalidActionError, match=f"^{message}"):
        walk.take(asset, asarray(np.array(action)))
    if message.startswith("asset"):
        with pytest.raises(InvalidActionError, match=f"^{message}"):
            walk.action_masks(asset)
    for was, now in zip(before, (*walk.budget, walk.pending, walk.invested), strict=True):
        np.testing.assert_array_equal(was, np.asarray(now))
    walk.take(0, asarray(np.array([10, HOLD])))
    walk.take(np.int64(2), asarray(np.array([HOLD, HOLD])))


def test_a_walk_refuses_what_is_no_array() -> None:
    with pytest.raises(InvalidActionError, match=r"action: expected integers \[2\], was list \[\]"):
        JointWalk(LIMITS, states(2, seed=0)).take(0, [5, 5])


def test_a_walk_can_be_traced_without_its_checks() -> None:
    class Walk(torch.nn.Module):
        def forward(self, state: torch.Tensor, asset: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
            walk = JointWalk(LIMITS, state, validate=False)
            walk.take(asset, action)
            return torch.cat([walk.action_masks(0), walk.action_masks(2)], dim=1)

    def inputs(batch: int, seed: int) -> tuple[torch.Tensor, ...]:
        state = states(batch, seed)
        return torch.as_tensor(state), torch.ones(batch, dtype=torch.int64), torch.full((batch,), HOLD)

    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Walk(), inputs(3, 0), dynamic_shapes=({0: batch},) * 3)
    for size in (2, 40):
        walk, (state, asset, action) = Walk(), inputs(size, 1)
        assert torch.equal(program.module()(state, asset, action), walk(state, asset, action))


def test_the_table_names_its_columns() -> None:
    assert (TABLE.num_assets, TABLE.num_actions, TABLE.nvec, TABLE.hold) == (3, 11, (11, 11, 11), 5)
    assert TABLE.state_names == ("cash", "units_0", "units_1", "units_2", "price_0", "price_1", "price_2")
