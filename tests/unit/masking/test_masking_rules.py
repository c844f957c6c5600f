"""Each rule by scenario, with the exact values at which it turns.

Actions: 0 Hold, 1..6 target 0, .25, .5, .75, 1, 1.25.
"""

from __future__ import annotations

import numpy as np
import pytest
from masking_worlds import CALM, FIELDS, allowed, column_state, ruleset

from configs.schema import LimitsConfig
from masking import ActionTable, DrawdownLadder, RuleError, RuleSet, is_reduction, trading_rules
from masking.rules import (
    DrawdownRule,
    MaxExposure,
    MaxPositionChange,
    MinHolding,
    PaperOnlyLeverage,
    StaleData,
    StateView,
    VolatilityBreaker,
    shared,
)

ALL = {0, 1, 2, 3, 4, 5, 6}
BROKEN = [np.nan, np.inf, -np.inf]


def test_a_flat_healthy_account_may_enter_up_to_the_largest_change() -> None:
    assert allowed(ruleset()) == {0, 1, 2, 3}  # .75 is a change of more than 0.6


# --- drawdown ladder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drawdown", "expected"),
    [
        (0.0, ALL),
        (np.nextafter(0.08, 0.0), ALL),
        (0.08, {0, 1, 2, 3}),  # position 0.5: only smaller ones
        (np.nextafter(0.12, 0.0), {0, 1, 2, 3}),
        (0.12, {0}),
        (0.15, {0}),
        (0.99, {0}),
    ],
)
def test_drawdown_turns_at_exactly_8_and_12_percent(drawdown: float, expected: set[int]) -> None:
    assert allowed(DrawdownRule(), drawdown=drawdown, position=0.5) == expected


@pytest.mark.parametrize(("code", "expected"), [(0.0, ALL), (1.0, {0, 1, 2, 3}), (2.0, {0})])
def test_trading_state_alone_restricts_even_without_drawdown(code: float, expected: set[int]) -> None:
    assert allowed(DrawdownRule(), trading_state=code, position=0.5) == expected


def test_a_stale_active_state_cannot_open_the_gate() -> None:
    assert allowed(DrawdownRule(), trading_state=0.0, drawdown=0.13, position=0.5) == {0}


def test_a_flat_account_in_reduce_only_may_only_stay_flat() -> None:
    assert allowed(DrawdownRule(), trading_state=1.0, position=0.0) == {0, 1}


def test_reduce_only_allows_the_present_size_but_no_larger_one() -> None:
    assert allowed(DrawdownRule(), trading_state=1.0, position=0.75) == {0, 1, 2, 3, 4}
    assert allowed(DrawdownRule(), trading_state=1.0, position=0.749) == {0, 1, 2, 3}


def test_reduce_only_never_crosses_to_the_other_side_of_a_short_position() -> None:
    assert allowed(DrawdownRule(), trading_state=1.0, position=-1.0) == {0, 1}


def test_the_ladder_of_the_rule_is_configurable() -> None:
    rule = DrawdownRule(soft=0.02, hard=0.04, kill=0.06)
    assert rule.ladder == DrawdownLadder(soft=0.02, hard=0.04, kill=0.06)
    assert allowed(rule, drawdown=0.02, position=0.5) == {0, 1, 2, 3}
    assert allowed(rule, drawdown=0.04, position=0.5) == {0}


# --- size --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "largest"), [(0.1, 1), (0.5, 3), (0.74, 3), (0.75, 4), (1.25, 6)])
def test_exposure_may_reach_its_limit_exactly(limit: float, largest: int) -> None:
    assert allowed(MaxExposure(limit=limit)) == set(range(largest + 1))


def test_leverage_needs_paper_mode() -> None:
    assert allowed(PaperOnlyLeverage(paper=False)) == {0, 1, 2, 3, 4, 5}
    assert allowed(PaperOnlyLeverage(paper=True)) == ALL
    state = {"position": 1.0}
    assert 6 not in allowed(ruleset(), **state)
    assert 6 in allowed(ruleset(paper=True), **state)


def test_paper_mode_does_not_lift_the_exposure_limit() -> None:
    assert 6 not in allowed(ruleset(paper=True, max_exposure=1.0), position=1.0)


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (0.0, {0, 1, 2, 3}),
        (0.4, {0, 1, 2, 3, 4, 5}),  # up to a change of 0.6 exactly
        (0.399, {0, 1, 2, 3, 4}),
        (0.6, {0, 1, 2, 3, 4, 5}),
        (0.601, {0, 2, 3, 4, 5}),  # and down
        (1.25, {0, 4, 5, 6}),
    ],
)
def test_one_decision_changes_the_position_by_at_most_0_6(position: float, expected: set[int]) -> None:
    assert allowed(MaxPositionChange(), position=position) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0.0, {0, 4, 5, 6}),
        (1.0, {0, 1, 2, 3, 4, 5, 6}),  # from 1.25 every target is a reduction
        (2.0, {0, 1, 2, 3, 4, 5, 6}),
    ],
)
def test_the_change_limit_never_traps_risk_once_trading_is_not_active(code: float, expected: set[int]) -> None:
    assert allowed(MaxPositionChange(), position=1.25, trading_state=code) == expected


def test_only_reductions_are_exempt_from_the_change_limit() -> None:
    assert allowed(MaxPositionChange(limit=0.2), position=0.5, trading_state=1.0) == {0, 1, 2, 3}
    assert allowed(MaxPositionChange(limit=0.2), position=-0.5, trading_state=1.0) == {0, 1}


def test_a_large_position_can_be_closed_at_once_by_the_whole_rule_set_in_reduce_only() -> None:
    assert allowed(ruleset(paper=True), position=1.25, drawdown=0.09) == {0, 4, 5, 6}
    assert allowed(ruleset(paper=True), position=1.25, drawdown=0.09, trading_state=1.0) == ALL


# --- holding time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bars", "expected"), [(0.0, {0}), (2.0, {0}), (3.0, ALL), (4.0, ALL)])
def test_an_open_position_is_kept_for_three_bars(bars: float, expected: set[int]) -> None:
    assert allowed(MinHolding(), holding_time=bars, position=0.5) == expected


def test_a_flat_account_may_enter_at_once() -> None:
    assert allowed(MinHolding(), holding_time=1.0, position=0.0) == ALL


@pytest.mark.parametrize("code", [1.0, 2.0])
def test_reducing_in_reduce_only_is_exempt_from_holding(code: float) -> None:
    assert allowed(MinHolding(), holding_time=1.0, position=0.5, trading_state=code) == {0, 1, 2, 3}


def test_a_young_position_can_be_reduced_by_the_whole_rule_set_in_reduce_only() -> None:
    assert allowed(ruleset(), holding_time=1.0, position=0.5, trading_state=1.0, drawdown=0.09) == {0, 1, 2, 3}
    assert allowed(ruleset(), holding_time=1.0, position=0.5, trading_state=2.0, drawdown=0.13) == {0}


def test_zero_bars_of_holding_forbid_nothing() -> None:
    assert allowed(MinHolding(bars=0), holding_time=0.0, position=0.5) == ALL


# --- market ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("volatility", "expected"),
    [(np.nextafter(0.6, 0.0), ALL), (0.6, {0, 1, 2, 3}), (3.0, {0, 1, 2, 3})],
)
def test_the_volatility_breaker_leaves_only_smaller_positions(volatility: float, expected: set[int]) -> None:
    assert allowed(VolatilityBreaker(), volatility_20=volatility, position=0.5) == expected


@pytest.mark.parametrize(
    ("age", "expected"), [(0.0, ALL), (1.0, ALL), (np.nextafter(1.0, 2.0), {0}), (-1e-9, {0}), (50.0, {0})]
)
def test_stale_data_leaves_only_hold(age: float, expected: set[int]) -> None:
    assert allowed(StaleData(), data_age=age) == expected


# --- what cannot be judged -----------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("field", FIELDS)
def test_a_broken_value_in_any_field_leaves_only_hold(field: str, broken: float) -> None:
    assert allowed(ruleset(), **{field: broken}) == {0}
    # A rule set must look at every field it reads, not only where the comparison happens to fail.
    assert allowed(ruleset(), position=0.5) > {0}


@pytest.mark.parametrize("rule", trading_rules(), ids=lambda rule: rule.name)
def test_each_rule_forbids_what_it_cannot_compare(rule) -> None:
    # A young position in REDUCE_ONLY on a wild market: what is asked is whether the trade is a reduction.
    stressed = {**CALM, "trading_state": 1.0, "drawdown": 0.09, "holding_time": 1.0, "volatility_20": 0.7}
    # And a calm market where a young position is asked to grow: nothing is excused as a reduction.
    growing = {**CALM, "position": 0.1, "holding_time": 1.0}
    for field in rule.fields:
        row = {**(stressed if field == "position" else growing), field: np.nan}
        state = {name: value[:, None] for name, value in column_state([row]).items()}
        state["target_position"] = np.full((1, 7), np.nan if field == "position" else 0.9)
        assert not np.any(rule(state)), field


# --- parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "parameters", "message"),
    [
        (MaxExposure, {"limit": 0.0}, "rule 'max_exposure': limit: expected > 0, was 0"),
        (MaxExposure, {"limit": np.nan}, "limit: expected a finite number, was nan"),
        (MaxExposure, {"limit": "1"}, "limit: expected a finite number, was '1' \\(str\\)"),
        (MaxExposure, {"limit": True}, "limit: expected a finite number, was True \\(bool\\)"),
        (MaxExposure, {"limit": 10**400}, "limit: expected a finite number"),
        (PaperOnlyLeverage, {"paper": 1}, "paper: expected true or false, was 1 \\(int\\)"),
        (PaperOnlyLeverage, {"above": -1.0}, "above: expected > 0, was -1"),
        (MaxPositionChange, {"limit": 0}, "limit: expected > 0, was 0"),
        (VolatilityBreaker, {"limit": np.inf}, "limit: expected a finite number, was inf"),
        (VolatilityBreaker, {"limit": 0.0}, "limit: expected > 0, was 0"),
        (StaleData, {"max_age_bars": -0.5}, "max_age_bars: expected >= 0, was -0.5"),
        (MinHolding, {"bars": -1}, "bars: expected >= 0, was -1"),
        (MinHolding, {"bars": 1.5}, "bars: expected an integer, was 1.5 \\(float\\)"),
        (DrawdownRule, {"soft": 0.12}, "0 < soft < hard < kill < 1"),
        (DrawdownRule, {"cooldown_bars": 0}, "cooldown_bars >= 1, was 0"),
    ],
)
def test_limits_that_mean_nothing_are_refused(rule, parameters: dict[str, object], message: str) -> None:
    with pytest.raises(RuleError, match=message):
        rule(**parameters)


def test_the_lowest_limits_the_configuration_allows_are_legal() -> None:
    rules = trading_rules(
        max_exposure=5e-324,
        min_holding_bars=0,
        max_position_change=0.25,
        max_volatility=5e-324,
        max_data_age_bars=0.0,
        ladder=DrawdownLadder(soft=0.001, hard=0.002, kill=0.003, cooldown_bars=1),
    )
    assert allowed(RuleSet(rules, ActionTable()), volatility_20=0.0) == {0, 1}


def test_defaults_are_those_of_the_configuration() -> None:
    limits = LimitsConfig()
    assert trading_rules() == trading_rules(
        max_exposure=limits.max_exposure,
        paper=limits.paper,
        ladder=DrawdownLadder(
            soft=limits.soft_drawdown,
            hard=limits.hard_drawdown,
            kill=limits.kill_drawdown,
            cooldown_bars=limits.cooldown_bars,
        ),
        min_holding_bars=limits.min_holding_bars,
        max_position_change=limits.max_position_change,
        max_volatility=limits.max_volatility,
        max_data_age_bars=limits.max_data_age_bars,
    )


def test_numbers_have_one_spelling() -> None:
    rule = MaxExposure(limit=1)
    assert isinstance(rule.limit, float)
    assert isinstance(MinHolding(bars=3.0).bars, int)
    assert isinstance(MaxExposure(limit=np.float32(1.0)).limit, float)
    assert str(StaleData(max_age_bars=-0.0).max_age_bars) == "0.0"


# --- what rules share ----------------------------------------------------------------------------------------


def test_what_several_rules_derive_is_computed_once_per_batch() -> None:
    calls = []

    @shared
    def doubled(state):
        calls.append(1)
        return state["position"] * 2

    columns = {"position": np.array([[0.5]])}
    view = StateView(columns)
    assert doubled(view) is doubled(view)
    assert len(calls) == 1
    assert doubled(StateView(columns)) is not doubled(view)
    assert doubled(columns).tolist() == [[1.0]]  # a plain mapping is not remembered
    assert len(calls) == 3


def test_rules_cannot_write_into_the_state_they_share() -> None:
    view = StateView({"position": np.zeros((1, 1))})
    with pytest.raises(TypeError, match="item assignment"):
        view["position"] = np.ones((1, 1))
    assert dict(view) == {"position": np.zeros((1, 1))}
    assert len(view) == 1


@pytest.mark.parametrize(
    ("position", "reductions"),
    [
        (0.5, [-1e-7, 0.0, 0.25, 0.5, 0.5 + 1e-7]),
        (-0.5, [-0.5, -0.25, -2e-6, -1e-7, 0.0]),
        (0.0, [-1e-7, 0.0]),
        (-0.0, [-1e-7, 0.0]),
        (np.nan, []),
    ],
)
def test_a_reduction_lies_between_zero_and_the_position_within_the_tolerance(
    position: float, reductions: list[float]
) -> None:
    targets = np.array([-0.75, -0.5, -0.25, -2e-6, -1e-7, 0.0, 0.25, 0.5, 0.5 + 1e-7, 0.5 + 2e-6, 0.75])
    found = is_reduction({"position": np.array([[position]]), "target_position": targets[None, :]})
    assert targets[found[0]].tolist() == reductions


# --- the set of them ---------------------------------------------------------------------------------------


def test_trading_rules_hand_every_limit_to_its_rule() -> None:
    ladder = DrawdownLadder(soft=0.01, hard=0.02, kill=0.03)
    rules = trading_rules(
        max_exposure=1.1,
        paper=True,
        ladder=ladder,
        min_holding_bars=7,
        max_position_change=0.3,
        max_volatility=0.4,
        max_data_age_bars=2.5,
    )
    assert rules == (
        StaleData(max_age_bars=2.5),
        DrawdownRule.of(ladder),
        VolatilityBreaker(limit=0.4),
        MaxExposure(limit=1.1),
        PaperOnlyLeverage(paper=True),
        MaxPositionChange(limit=0.3),
        MinHolding(bars=7),
    )
