"""Rule sets: combination, explanation, serialisation, and rules of a user's own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import array_api_strict
import numpy as np
import pytest
import torch
from masking_worlds import CALM, FIELDS, allowed, column_state, ruleset, unregistering

from masking import ActionTable, DrawdownLadder, RuleError, RuleSet, is_reduction, register_rule, trading_rules
from masking.rules import DrawdownRule, MaxExposure, StaleData

TROUBLED = {"position": 0.5, "drawdown": 0.09, "trading_state": 1.0, "volatility_20": 0.7}


# --- the call ----------------------------------------------------------------------------------------------


def test_masks_are_bool_rows_of_all_actions() -> None:
    masks = ruleset()(column_state([CALM, {**CALM, "data_age": 2.0}]))
    assert masks.dtype == np.bool_
    assert masks.tolist() == [
        [True, True, True, True, False, False, False],
        [True, False, False, False, False, False, False],
    ]


def test_fields_are_what_the_rules_read() -> None:
    assert ruleset().fields == FIELDS
    assert RuleSet([StaleData()], ActionTable()).fields == ("data_age", "position")


def test_a_rule_set_without_rules_allows_every_action_of_a_finite_state() -> None:
    empty = RuleSet([], ActionTable())
    assert allowed(empty) == set(range(7))
    assert allowed(empty, position=np.nan) == {0}


def test_hold_survives_an_action_table_in_which_everything_is_forbidden() -> None:
    masks = RuleSet([MaxExposure(limit=0.0)], ActionTable((2.0, 3.0)))(column_state([CALM]))
    assert masks.tolist() == [[True, False, False]]


def test_extra_columns_are_ignored() -> None:
    state = {**column_state([CALM]), "nonsense": np.array([np.nan])}
    np.testing.assert_array_equal(ruleset()(state), ruleset()(column_state([CALM])))


def test_a_missing_column_is_named() -> None:
    state = column_state([CALM])
    del state["drawdown"]
    with pytest.raises(RuleError, match=r"missing \['drawdown'\]"):
        ruleset()(state)


@pytest.mark.parametrize("shape", [(), (2, 1), (1, 2)])
def test_a_position_of_the_wrong_rank_is_refused(shape: tuple[int, ...]) -> None:
    state = {**column_state([CALM, CALM]), "position": np.zeros(shape)}
    with pytest.raises(RuleError, match=r"state\['position'\]: expected shape \[B\]"):
        ruleset()(state)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
def test_a_column_of_another_shape_is_refused_before_it_broadcasts(shape: tuple[int, ...]) -> None:
    state = {**column_state([CALM, CALM]), "drawdown": np.zeros(shape)}
    with pytest.raises(RuleError, match=r"state\['drawdown'\]: expected shape \[2\]"):
        ruleset()(state)


def test_the_same_rule_twice_is_refused() -> None:
    with pytest.raises(RuleError, match="each rule once"):
        RuleSet([MaxExposure(limit=1.0), MaxExposure(limit=0.5)], ActionTable())


# --- blocked and explain -------------------------------------------------------------------------------------


def test_blocked_names_the_rule_behind_each_denial() -> None:
    blocked = ruleset().blocked(column_state([{**CALM, **TROUBLED}]))
    forbidden = {name: set(np.flatnonzero(rows[0]).tolist()) for name, rows in blocked.items()}
    assert forbidden == {
        "stale_data": set(),
        "drawdown_ladder": {4, 5, 6},
        "volatility_breaker": {4, 5, 6},
        "max_exposure": set(),
        "paper_only_leverage": {6},
        "max_position_change": {6},
        "min_holding": set(),
        "non_finite": set(),
    }


def test_blocked_reports_a_broken_row_as_non_finite() -> None:
    blocked = ruleset().blocked(column_state([{**CALM, "volatility_20": np.inf}, CALM]))
    assert blocked["non_finite"].tolist() == [[False] + [True] * 6, [False] * 7]


def test_explain_lists_every_denial_with_what_the_rule_saw() -> None:
    denials = ruleset().explain(column_state([CALM, {**CALM, **TROUBLED}]), row=1)
    assert [(denial.action, denial.rule) for denial in denials] == [
        (4, "drawdown_ladder"),
        (4, "volatility_breaker"),
        (5, "drawdown_ladder"),
        (5, "volatility_breaker"),
        (6, "drawdown_ladder"),
        (6, "volatility_breaker"),
        (6, "paper_only_leverage"),
        (6, "max_position_change"),
    ]
    assert str(denials[1]) == ("target 0.75 denied by volatility_breaker(limit=0.6): volatility_20=0.7, position=0.5")
    assert denials[0].observed == {"drawdown": 0.09, "trading_state": 1.0, "position": 0.5}
    assert denials[0].parameters == {"ladder": {"soft": 0.08, "hard": 0.12, "kill": 0.15, "cooldown_bars": 20}}


def test_explain_of_a_broken_row_shows_the_broken_value() -> None:
    denials = ruleset().explain(column_state([{**CALM, "drawdown": np.nan}]))
    broken = [denial for denial in denials if denial.rule == "non_finite"]
    assert [denial.action for denial in broken] == [1, 2, 3, 4, 5, 6]
    assert np.isnan(broken[0].observed["drawdown"])
    assert "drawdown=nan" in str(broken[0])


def test_nothing_to_explain_when_everything_is_allowed() -> None:
    assert ruleset(paper=True, max_position_change=2.0).explain(column_state([CALM])) == []


# --- to_dict, from_dict, hash --------------------------------------------------------------------------------


def test_a_description_through_json_rebuilds_an_equal_rule_set() -> None:
    original = ruleset(ladder=DrawdownLadder(soft=0.01, hard=0.02, kill=0.5, cooldown_bars=4), paper=True)
    copy = RuleSet.from_dict(json.loads(json.dumps(original.to_dict())))
    assert copy.rules == original.rules
    assert copy.actions == original.actions
    assert copy.hash == original.hash


def test_the_hash_moves_with_every_parameter_rule_and_factor() -> None:
    rules = trading_rules()
    hashes = {
        RuleSet(rules, ActionTable()).hash,
        RuleSet(rules[:-1], ActionTable()).hash,
        RuleSet(rules, ActionTable((0.0, 1.0))).hash,
        ruleset(paper=True).hash,
        ruleset(max_exposure=1.2).hash,
        ruleset(max_volatility=0.5).hash,
        ruleset(max_position_change=0.5).hash,
        ruleset(min_holding_bars=2).hash,
        ruleset(max_data_age_bars=2.0).hash,
        ruleset(ladder=DrawdownLadder(cooldown_bars=21)).hash,
    }
    assert len(hashes) == 10
    assert ruleset().hash == RuleSet(rules, ActionTable()).hash
    assert len(ruleset().hash) == 64


def test_a_hash_of_a_parameter_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        _ = RuleSet([MaxExposure(limit=float("nan"))], ActionTable()).hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "max_expsure"}, "expected one of .*'max_exposure'.*, was 'max_expsure'"),
        ({"parameters": {"limt": 1.0}}, "rule 'max_exposure': .*limt"),
    ],
)
def test_an_unknown_rule_or_parameter_is_refused(change: dict[str, Any], message: str) -> None:
    entry = {"name": "max_exposure", "parameters": {"limit": 1.0}, **change}
    with pytest.raises(RuleError, match=message):
        RuleSet.from_dict({"factors": [0.0, 1.0], "rules": [entry]})


def test_an_unknown_ladder_parameter_is_refused() -> None:
    description = RuleSet([DrawdownRule()], ActionTable()).to_dict()
    description["rules"][0]["parameters"]["ladder"]["sft"] = 0.1
    with pytest.raises(RuleError, match=r"rule 'drawdown_ladder': .*sft"):
        RuleSet.from_dict(description)


@pytest.mark.parametrize("key", ["factors", "rules"])
def test_a_description_without_a_part_is_refused(key: str) -> None:
    description = ruleset().to_dict()
    del description[key]
    with pytest.raises(RuleError, match=f"missing \\['{key}'\\]"):
        RuleSet.from_dict(description)


# --- a user's own rule ---------------------------------------------------------------------------------------


@pytest.fixture
def no_friday_entries():
    """The example of the module docstring of `masking.rules`."""
    with unregistering():

        @register_rule("no_friday_entries")
        @dataclass(frozen=True, kw_only=True)
        class NoFridayEntries:
            fields: ClassVar[tuple[str, ...]] = ("weekday", "position")
            last_day: float = 4.0

            def __call__(self, state):
                return (state["weekday"] < self.last_day) | is_reduction(state)

        yield NoFridayEntries


def test_a_rule_of_ones_own_works_in_every_namespace(no_friday_entries) -> None:
    rules = RuleSet([*trading_rules(), no_friday_entries()], ActionTable())
    state = column_state([{**CALM, "position": 0.5}] * 3)
    state["weekday"] = np.array([3.0, 4.0, np.nan])
    expected = [
        [True, True, True, True, True, True, False],
        [True, True, True, True, False, False, False],
        [True, False, False, False, False, False, False],
    ]
    for xp in (np, torch, array_api_strict):
        masks = rules({name: xp.asarray(column) for name, column in state.items()})
        assert np.asarray(masks).tolist() == expected


def test_a_rule_of_ones_own_is_explained_and_rebuilt_by_name(no_friday_entries) -> None:
    rules = RuleSet([no_friday_entries(last_day=2.0)], ActionTable())
    state = {"weekday": np.array([2.0]), "position": np.array([1.0])}
    assert [str(denial) for denial in rules.explain(state)] == [
        "target 1.25 denied by no_friday_entries(last_day=2.0): weekday=2, position=1"
    ]
    assert RuleSet.from_dict(rules.to_dict()).rules == rules.rules


def test_an_unregistered_rule_is_unknown_again() -> None:
    with pytest.raises(RuleError, match="was 'no_friday_entries'"):
        RuleSet.from_dict({"factors": [0.0], "rules": [{"name": "no_friday_entries", "parameters": {}}]})


def test_a_rule_that_was_never_registered_is_refused() -> None:
    class Unregistered:
        fields: ClassVar[tuple[str, ...]] = ("position",)

    with pytest.raises(RuleError, match="Unregistered: expected a rule registered with @register_rule"):
        RuleSet([Unregistered()], ActionTable())


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        (lambda state: (state["position"] < 1).astype(int), r"was int64 \[7, 1\]"),
        (lambda state: (state["position"] < 1).astype(float), r"was float64 \[7, 1\]"),
        (lambda state: state["position"][:, 0] < 1, r"was bool \[7\]"),
    ],
    ids=["0/1", "float", "flat"],
)
def test_a_verdict_that_is_not_bool_per_row_is_refused_by_name(verdict, message: str) -> None:
    # Seven rows and seven actions: a flat verdict would broadcast silently, as one verdict per action.
    state = {"position": np.linspace(0.0, 1.0, 7)}
    with unregistering():

        @register_rule("mistaken")
        @dataclass(frozen=True)
        class Mistaken:
            fields: ClassVar[tuple[str, ...]] = ("position",)

            def __call__(self, state):
                return verdict(state)

        rules = RuleSet([Mistaken()], ActionTable())
        for judge in (rules, rules.blocked, rules.explain):
            with pytest.raises(RuleError, match=f"rule 'mistaken': expected bool .*{message}"):
                judge(state)
