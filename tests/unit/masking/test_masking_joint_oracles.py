"""Joint limits against exact fractions, all 1331 combinations, plain loops and other backends."""

from __future__ import annotations

import functools
import itertools
import math
from fractions import Fraction
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from joint_worlds import HALF_INVESTED, HOLD, LIMITS, TABLE, states

from masking import JointLimits, JointWalk, TradeTable

COMBINATIONS = np.array(list(itertools.product(range(11), repeat=3)))
ORDERS = list(itertools.permutations(range(3)))
NAN = math.nan


@functools.cache
def enumeration(limits: JointLimits, batch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """States [B, 7] and which of all combinations `check` lets through, [B, 11, 11, 11]."""
    state = states(batch, seed)
    checked = [limits.check(state, np.broadcast_to(combination, (batch, 3))) for combination in COMBINATIONS]
    return state, np.stack(checked, axis=1).reshape(batch, 11, 11, 11)


def reachable(limits: JointLimits, state: np.ndarray, order: tuple[int, ...], masks: Any = None) -> np.ndarray:
    """Which combinations a walk in this order can end in, [B, 11, 11, 11] by asset."""
    batch = len(state)
    found = np.zeros((batch, 11, 11, 11), dtype=bool)
    for first, second in itertools.product(range(11), repeat=2):
        walk, open_ = JointWalk(limits, state, masks, validate=False), np.ones(batch, dtype=bool)
        for asset, action in zip(order, (first, second), strict=False):
            open_ &= walk.action_masks(asset)[:, action]
            walk.take(asset, np.full(batch, action))
        found[:, first, second] = walk.action_masks(order[2]) & open_[:, None]
    return np.moveaxis(found, (1, 2, 3), [1 + asset for asset in order])


def fraction_check(limits: JointLimits, state: np.ndarray, actions: np.ndarray) -> bool:
    """The limits as they are written, in exact arithmetic."""
    table, (cash, *rest) = limits.table, [Fraction(float(number)) for number in state]
    units, prices = rest[:3], rest[3:]
    lots = [Fraction(table.lots[action]) for action in actions]
    after, bought = [held + lot for held, lot in zip(units, lots, strict=True)], [lot > 0 for lot in lots]
    for asset, lot in enumerate(lots):
        cost = Fraction((table.buy_cost if lot > 0 else table.sell_cost)[asset])
        cash -= lot * prices[asset] + abs(lot) * cost
        if lot and (after[asset] < 0 or prices[asset] <= Fraction(table.sell_cost[asset])):
            return False
    held = [units * price for units, price in zip(after, prices, strict=True)]
    value = cash + sum(held)
    shares = [Fraction(share) for share in limits.max_share]
    return not any(bought) or (
        cash >= Fraction(limits.min_cash)
        and sum(held) <= Fraction(limits.max_gross) * value
        and all(part <= share * value for part, share, buys in zip(held, shares, bought, strict=True) if buys)
    )


# --- against oracles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [LIMITS, HALF_INVESTED], ids=["cash", "gross"])
def test_check_and_explain_equal_exact_fractions(limits: JointLimits) -> None:
    state, rng = states(4000, seed=1), np.random.default_rng(2)
    # Small trades half the time, else hardly anything would be valid.
    actions = np.where(rng.random((4000, 1)) < 0.5, rng.integers(3, 8, (4000, 3)), rng.integers(0, 11, (4000, 3)))
    valid = limits.check(state, actions)
    assert 0.1 < valid.mean() < 0.9
    assert valid.tolist() == [fraction_check(limits, *pair) for pair in zip(state, actions, strict=True)]
    assert valid.tolist() == [not limits.explain(state, actions, index) for index in range(4000)]


def test_actions_that_do_not_exist_are_invalid_and_explained() -> None:
    state = np.array([[1000.0, 0, 0, 0, 40, 35, 50]])
    for action in (-1, 11, 2**40):
        actions = np.array([[HOLD, action, HOLD]])
        assert not LIMITS.check(state, actions)
        assert LIMITS.explain(state, actions) == [f"expected 3 actions from 0 to 10, was [5, {action}, 5]"]


@pytest.mark.parametrize("limits", [LIMITS, HALF_INVESTED], ids=["cash", "gross"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_walk_is_sound_and_misses_next_to_nothing(limits: JointLimits, order: tuple[int, ...]) -> None:
    state, valid = enumeration(limits, 400, 3)
    found = reachable(limits, state, order)
    assert not (found & ~valid).any()
    assert valid.sum() > 30_000
    # Missed are combinations that only an intermediate sale makes possible: about one in 60,000.
    assert (valid & ~found).sum() <= 1e-4 * valid.sum()


def test_masks_per_asset_are_what_the_enumeration_says() -> None:
    state, valid = enumeration(LIMITS, 400, 3)
    occurs = np.stack([valid.any(axis=tuple({1, 2, 3} - {1 + asset})) for asset in range(3)], axis=1)
    marginal = LIMITS.marginal_masks(state).reshape(-1, 3, 11)
    assert not (occurs & ~marginal).any()
    assert (marginal & ~occurs).sum() <= 1e-3 * occurs.sum()
    alone = np.stack((valid[:, :, HOLD, HOLD], valid[:, HOLD, :, HOLD], valid[:, HOLD, HOLD, :]), axis=1)
    assert (LIMITS.separate_masks(state).reshape(-1, 3, 11) == alone).all()
    assert (alone & ~marginal).sum() == 0


def test_masks_of_the_caller_forbid_and_what_is_left_is_still_sound() -> None:
    state, valid = enumeration(LIMITS, 400, 3)
    masks = np.random.default_rng(4).random((400, 3, 11)) < 0.5
    masks[:, :, HOLD] = True
    allowed = valid & masks[:, 0, :, None, None] & masks[:, 1, None, :, None] & masks[:, 2, None, None, :]
    found = reachable(LIMITS, state, (2, 0, 1), masks.reshape(400, 33))
    assert not (found & ~allowed).any()
    assert (allowed & ~found).sum() <= 3e-4 * allowed.sum()


def test_rows_in_orders_of_their_own_equal_a_loop_over_rows() -> None:
    state, rng = states(60, seed=5), np.random.default_rng(6)
    orders = rng.permuted(np.tile(np.arange(3), (60, 1)), axis=1)
    batched = JointWalk(LIMITS, state)
    single = [JointWalk(LIMITS, state[index : index + 1]) for index in range(60)]
    for assets in orders.T:
        masks = batched.action_masks(assets)
        assert (
            masks == np.concatenate([walk.action_masks(int(a)) for walk, a in zip(single, assets, strict=True)])
        ).all()
        actions = np.where(masks, rng.random(masks.shape), -1).argmax(axis=1)
        batched.take(assets, actions)
        for walk, asset, action in zip(single, assets, actions, strict=True):
            walk.take(int(asset), np.array([action]))
    for name in ("invested", "pending"):
        assert (getattr(batched, name) == np.concatenate([getattr(walk, name) for walk in single])).all()
    for place, part in enumerate(batched.budget):
        assert (part == np.concatenate([walk.budget[place] for walk in single])).all()
    assert (batched.pending == 0).all()


def test_the_running_budget_is_the_portfolio_after_the_trades() -> None:
    state, rng = states(500, seed=7), np.random.default_rng(8)
    actions = LIMITS.sample(state, rng)
    walk = JointWalk(LIMITS, state)
    for asset in (1, 0, 2):
        walk.take(asset, actions[:, asset])
    lots, prices = np.array(TABLE.lots)[actions], state[:, 4:].astype(np.float64)
    cost = np.where(lots > 0, TABLE.buy_cost, TABLE.sell_cost)
    np.testing.assert_allclose(
        walk.budget.cash, state[:, 0] - (lots * prices + abs(lots) * cost).sum(axis=1), atol=1e-9
    )
    np.testing.assert_allclose(walk.invested, (state[:, 1:4] + lots) * prices, atol=1e-9)
    np.testing.assert_allclose(walk.budget.invested, walk.invested.sum(axis=1), atol=1e-9)
    assert (walk.budget.buys == (lots > 0).any(axis=1)).all()


# --- properties --------------------------------------------------------------------------------------------------


@st.composite
def portfolios(draw: st.DrawFn) -> np.ndarray:
    """States [B, 7], among them such that a combination leaves exactly the least cash, give or take the last bits."""
    batch = draw(st.integers(1, 6))

    def numbers(columns: int, elements: st.SearchStrategy[float]) -> np.ndarray:
        return draw(hnp.arrays(np.float64, (batch, columns), elements=elements))

    cash = numbers(1, st.one_of(st.sampled_from([0.0, 1.0, 1000.0]), st.floats(-1e4, 1e6)))
    units = numbers(3, st.one_of(st.sampled_from([0.0, 10.0, 20.0, 50.0]), st.floats(-100, 1e4)))
    prices = numbers(3, st.one_of(st.sampled_from([0.0, 0.03, 40.0]), st.floats(-1, 1e4), st.just(NAN)))
    if draw(st.booleans()):
        lots = np.array(TABLE.lots)[draw(hnp.arrays(np.int64, (batch, 3), elements=st.integers(0, 10)))]
        cost = np.where(lots > 0, TABLE.buy_cost, TABLE.sell_cost)
        nudge = numbers(1, st.sampled_from([0.0, 1e-12, -1e-12, 1e-9, 1e-6]))
        cash = 1.0 + (lots * prices + abs(lots) * cost).sum(axis=1, keepdims=True) * (1 + nudge)
    return np.concatenate((cash, units, prices), axis=1)


@settings(max_examples=400, deadline=None)
@given(portfolios(), st.integers(0, 2**32 - 1), st.sampled_from([LIMITS, HALF_INVESTED]))
def test_no_walk_gets_stuck_and_every_end_passes_the_check(state: np.ndarray, seed: int, limits: JointLimits) -> None:
    rng, batch = np.random.default_rng(seed), len(state)
    masks = rng.random((batch, 3, 11)) < rng.random()
    masks[:, :, HOLD] = True
    orders, actions = rng.permuted(np.tile(np.arange(3), (batch, 1)), axis=1), np.zeros((batch, 3), dtype=np.int64)
    walk = JointWalk(limits, state, masks.reshape(batch, 33))
    for assets in orders.T:
        allowed = walk.action_masks(assets)
        assert allowed.any(axis=1).all()
        assert (allowed <= masks[np.arange(batch), assets]).all()
        # The largest purchase that is allowed walks along the limits.
        wish = np.where(rng.random((batch, 1)) < 0.5, np.arange(11), rng.random((batch, 11)))
        action = np.where(allowed, wish, -1).argmax(axis=1)
        walk.take(assets, action)
        actions[np.arange(batch), assets] = action
    valid = limits.check(state, actions)
    assert valid.all()
    assert valid.tolist() == [not limits.explain(state, actions, index) for index in range(batch)]


@given(portfolios(), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_explain_and_check_agree_at_the_limits_too_and_holding_is_always_valid(state: np.ndarray, seed: int) -> None:
    batch = len(state)
    actions = np.random.default_rng(seed).integers(0, 11, (batch, 3))
    assert LIMITS.check(state, actions).tolist() == [
        not LIMITS.explain(state, actions, index) for index in range(batch)
    ]
    assert LIMITS.check(state, np.full((batch, 3), HOLD)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_torch_and_the_strict_standard_agree_bit_for_bit(dtype: type) -> None:
    state, rng = states(300, seed=9).astype(dtype), np.random.default_rng(10)
    state[::50, 3] = NAN
    actions = np.where(rng.random((300, 1)) < 0.5, LIMITS.sample(state, rng), rng.integers(0, 11, (300, 3)))
    masks = rng.random((300, 33)) < 0.8
    chosen = LIMITS.sample(state, rng, masks)
    reference: list[np.ndarray] | None = None
    for asarray in (np.asarray, torch.as_tensor, array_api_strict.asarray):
        walk = JointWalk(HALF_INVESTED, asarray(state), asarray(masks), validate=False)
        results = [LIMITS.check(asarray(state), asarray(actions)), LIMITS.marginal_masks(asarray(state))]
        for asset in (1, 2, 0):
            after, _ = walk.options(asset)
            results += [walk.action_masks(asset), *after]
            walk.take(asset, asarray(chosen[:, asset]))
        found = [np.asarray(result) for result in (*results, *walk.budget, walk.invested)]
        assert {part.dtype for part in found} == {np.dtype(bool), np.dtype(np.float64)}
        reference = reference or found
        for ours, theirs in zip(found, reference, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_backends_agree_on_sums_that_they_would_order_differently() -> None:
    # From 8 columns on, NumPy adds in pairs.
    assets, rng = 17, np.random.default_rng(16)
    table = TradeTable(lots=(-10.0, 0.0, 10.0), buy_cost=(0.03,) * assets, sell_cost=(0.025,) * assets)
    limits = JointLimits(table=table, max_share=(0.2,) * assets, max_gross=0.8)
    units, prices = rng.integers(0, 3, (200, assets)) * 10.0, rng.normal(40, 4, (200, assets))
    state = np.concatenate((rng.random((200, 1)) * 5000, units, prices), axis=1)
    ours, theirs = JointWalk(limits, state), JointWalk(limits, torch.as_tensor(state))
    chosen = limits.sample(state, rng)
    assert (ours.budget.invested == theirs.budget.invested.numpy()).all()
    assert (ours.budget.invested == functools.reduce(np.add, (units * prices).T)).all()
    for asset in range(assets):
        assert (ours.action_masks(asset) == theirs.action_masks(asset).numpy()).all()
        ours.take(asset, chosen[:, asset])
        theirs.take(asset, torch.as_tensor(chosen[:, asset]))
    assert limits.check(state, chosen).all()


def test_numpy_and_torch_agree_in_orders_of_their_own() -> None:
    state, rng = states(300, seed=11), np.random.default_rng(12)
    orders = rng.permuted(np.tile(np.arange(3), (300, 1)), axis=1)
    chosen = LIMITS.sample(state, rng)
    ours, theirs = JointWalk(LIMITS, state), JointWalk(LIMITS, torch.as_tensor(state))
    for assets in orders.T:
        assert (ours.action_masks(assets) == theirs.action_masks(torch.as_tensor(assets)).numpy()).all()
        action = chosen[np.arange(300), assets]
        ours.take(assets, action)
        theirs.take(torch.as_tensor(assets), torch.as_tensor(action))
    assert (ours.invested == theirs.invested.numpy()).all()


# --- samples -----------------------------------------------------------------------------------------------------


def test_samples_are_valid_and_reach_every_valid_combination() -> None:
    table = TradeTable(lots=(-10.0, 0.0, 10.0), buy_cost=(0.03, 0.045), sell_cost=(0.025, 0.035))
    limits = JointLimits(table=table, max_share=(1.0, 2 / 3))
    state = np.array([[390.0, 10.0, 10.0, 40.0, 35.0]])
    combinations = [pair for pair in itertools.product(range(3), repeat=2) if limits.check(state, np.array([pair]))]
    assert len(combinations) == 7  # neither both purchases nor asset 0, $400.30, unless asset 1 is sold
    drawn = limits.sample(np.repeat(state, 3000, axis=0), np.random.default_rng(0))
    assert {tuple(pair) for pair in drawn.tolist()} == set(combinations)


def test_samples_are_reproducible_and_stay_inside_the_masks_of_the_caller() -> None:
    state = states(20_000, seed=13)
    masks = np.random.default_rng(14).random((20_000, 3, 11)) < 0.5
    masks[:, :, HOLD] = True
    first, again = (LIMITS.sample(state, np.random.default_rng(15), masks.reshape(-1, 33)) for _ in range(2))
    assert (first == again).all()
    assert np.take_along_axis(masks, first[:, :, None], axis=2).all()
    assert LIMITS.check(state, first).all()
    assert (first != HOLD).any(axis=0).all()
