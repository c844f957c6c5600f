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

from masking import (
    ActionTable,
    DrawdownLadder,
    InvalidActionError,
    RuleError,
    RuleSet,
    is_reduction,
    register_rule,
    trading_rules,
)
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
    masks = RuleSet([MaxExposure(limit=0.5)], ActionTable((2.0, 3.0)))(column_state([CALM]))
    assert masks.tolist() == [[True, False, False]]


def test_extra_columns_are_ignored() -> None:
    state = {**column_state([CALM]), "nonsense": np.array([np.nan])}
    np.testing.assert_array_equal(ruleset()(state), ruleset()(column_state([CALM])))


def test_a_missing_column_is_named() -> None:
    state = column_state([CALM])
    del state["drawdown"]
    with pytest.raises(RuleError, match=r"missing \['drawdown'\]"):
        ruleset()(state)


@pytest.mark.parametrize("shape", [(), (2, 2), (1, 2), (0,)])
def test_a_position_of_the_wrong_rank_is_refused(shape: tuple[int, ...]) -> None:
    state = {**column_state([CALM, CALM]), "position": np.zeros(shape)}
    with pytest.raises(RuleError, match=r"expected shape (\[B\] or \[B, 1\]|\[0\])"):
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
    assert denials[0].observed == {"drawdown": 0.09, "trading_state": 1.0, "position": 0.5}
    assert denials[0].parameters == {"soft": 0.08, "hard": 0.12, "kill": 0.15, "cooldown_bars": 20}
    assert (denials[0].target_position, denials[0].trading_state) == (0.75, "REDUCE_ONLY")


def test_explain_of_one_action_is_its_share_of_all_denials() -> None:
    state = column_state([CALM, {**CALM, **TROUBLED}])
    everything = ruleset().explain(state, row=1)
    for action in range(7):
        assert ruleset().explain(state, action, row=1) == [denial for denial in everything if denial.action == action]
    assert ruleset().explain(state, action=0, row=1) == []


@pytest.mark.parametrize("action", [-1, 7])
def test_an_action_that_does_not_exist_is_not_explained(action: int) -> None:
    with pytest.raises(InvalidActionError, match=f"expected 0 to 6, was {action}"):
        ruleset().explain(column_state([CALM]), action)


@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_outside_the_batch_is_not_explained(row: int) -> None:
    with pytest.raises(RuleError, match=f"row: expected 0 to 1, was {row}"):
        ruleset().explain(column_state([CALM, CALM]), row=row)


@pytest.mark.parametrize(
    ("rule", "action", "state", "words"),
    [
        ("max_exposure", 5, {}, "|position after the trade| 1 would exceed the limit 0.9"),
        ("paper_only_leverage", 6, {}, "|position after the trade| 1.25 would exceed the limit 1 outside paper mode"),
        ("max_position_change", 4, {}, "the change of +0.75 would exceed the limit 0.6 of one decision"),
        ("max_position_change", 1, {"position": 1.0}, "the change of -1 would exceed the limit 0.6 of one decision"),
        (
            "min_holding",
            1,
            {"position": 0.5, "holding_time": 1.0},
            "the position 0.5 was held for 1 of at least 3 bars",
        ),
        (
            "volatility_breaker",
            4,
            {"position": 0.5, "volatility_20": 0.7},
            "annualised volatility 0.7 reached the limit 0.6, the position 0.5 may only shrink",
        ),
        (
            "drawdown_ladder",
            4,
            {"position": 0.5, "drawdown": 0.09},
            "drawdown 9 % reached the soft limit 8 %, the position 0.5 may only shrink",
        ),
        (
            "drawdown_ladder",
            1,
            {"drawdown": 0.125},
            "drawdown 12.5 % reached the hard limit 12 %, only Hold is allowed",
        ),
        (
            "drawdown_ladder",
            3,
            {"trading_state": 1.0},
            "trading is REDUCE_ONLY, the position 0 may only shrink",
        ),
        ("drawdown_ladder", 1, {"trading_state": 2.0}, "trading is HALTED, only Hold is allowed"),
        ("stale_data", 1, {"data_age": 2.5}, "the newest bar is 2.5 bars old, at most 1 allowed"),
        ("stale_data", 1, {"data_age": -2.0}, "the newest bar lies 2 bars in the future"),
        ("non_finite", 1, {"drawdown": np.nan, "data_age": np.inf}, "data_age inf, drawdown nan cannot be judged"),
    ],
)
def test_a_denial_reads_as_a_trader_would_say_it(rule: str, action: int, state: dict[str, float], words: str) -> None:
    row = {**CALM, **state}
    said = [str(denial) for denial in ruleset(max_exposure=0.9).explain(column_state([row]), action)]
    name = ("ACTIVE", "REDUCE_ONLY", "HALTED")[int(row["trading_state"])]
    factor = ("", "0", "0.25", "0.5", "0.75", "1", "1.25")[action]
    assert f"target {factor} is denied: {words} [{rule}; {name}]" in said


def test_every_shipped_rule_has_words_of_its_own() -> None:
    assert all(callable(getattr(rule, "reason", None)) for rule in trading_rules())


@pytest.mark.parametrize("code", [np.nan, 0.5, 3.0, -1.0])
def test_a_trading_state_that_is_none_is_not_named(code: float) -> None:
    denials = ruleset().explain(column_state([{**CALM, "trading_state": code}]), 6)
    assert denials
    assert all(denial.trading_state is None for denial in denials)


def test_explain_of_a_broken_row_shows_the_broken_value() -> None:
    denials = ruleset().explain(column_state([{**CALM, "drawdown": np.nan}]))
    broken = [denial for denial in denials if denial.rule == "non_finite"]
    assert [denial.action for denial in broken] == [1, 2, 3, 4, 5, 6]
    assert np.isnan(broken[0].observed["drawdown"])
    assert str(broken[0]) == "target 0 is denied: drawdown nan cannot be judged [non_finite; ACTIVE]"
    # A rule that could not compare does not pretend that it did.
    [ladder] = [denial for denial in denials if denial.rule == "drawdown_ladder" and denial.action == 1]
    assert ladder.reason == "drawdown nan cannot be judged"


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


def test_the_hash_does_not_depend_on_how_a_number_is_spelled() -> None:
    spelled = RuleSet([MaxExposure(limit=1), StaleData(max_age_bars=-0.0)], ActionTable((-0.0, 1)))
    assert spelled.hash == RuleSet([MaxExposure(limit=1.0), StaleData(max_age_bars=0)], ActionTable((0, 1.0))).hash


@pytest.mark.parametrize("limit", [float("nan"), "0.5", True, None])
def test_a_parameter_of_ones_own_rule_is_checked_by_its_annotation(limit: object) -> None:
    with unregistering():

        @register_rule("unchecked")
        @dataclass(frozen=True)
        class Unchecked:
            fields: ClassVar[tuple[str, ...]] = ("position",)
            limit: float = 1.0

        with pytest.raises(RuleError, match="rule 'unchecked': limit: expected a finite number, was"):
            RuleSet([Unchecked(limit)], ActionTable())
        assert RuleSet([Unchecked(2)], ActionTable()).hash == RuleSet([Unchecked(2.0)], ActionTable()).hash


def test_a_factor_too_small_to_be_told_from_flat_is_refused() -> None:
    with pytest.raises(RuleError, match=r"factors: expected 0 or more than the tolerance 1e-06 from it, was \[1e-07\]"):
        RuleSet([], ActionTable((0.0, 1e-7, 1.0)))


def test_the_name_of_broken_rows_is_taken() -> None:
    with unregistering():

        @register_rule("non_finite")
        @dataclass(frozen=True)
        class Mistaken:
            fields: ClassVar[tuple[str, ...]] = ("position",)

        with pytest.raises(RuleError, match="another name than 'non_finite'"):
            RuleSet([Mistaken()], ActionTable())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "max_expsure"}, "expected a registered one, was 'max_expsure'; did you mean 'max_exposure'"),
        (
            {"parameters": {"limt": 1.0}},
            "rule 'max_exposure': limt: expected a known parameter, was unknown; did you mean 'limit'",
        ),
    ],
)
def test_an_unknown_rule_or_parameter_is_refused(change: dict[str, Any], message: str) -> None:
    entry = {"name": "max_exposure", "parameters": {"limit": 1.0}, **change}
    with pytest.raises(RuleError, match=message):
        RuleSet.from_dict({"factors": [0.0, 1.0], "rules": [entry]})


def test_an_unknown_ladder_parameter_is_refused() -> None:
    description = RuleSet([DrawdownRule()], ActionTable()).to_dict()
    description["rules"][0]["parameters"]["sft"] = 0.1
    with pytest.raises(RuleError, match=r"rule 'drawdown_ladder': .*sft"):
        RuleSet.from_dict(description)


@pytest.mark.parametrize("key", ["factors", "rules"])
def test_a_description_without_a_part_is_refused(key: str) -> None:
    description = ruleset().to_dict()
    del description[key]
    with pytest.raises(RuleError, match=f"missing \\['{key}'\\]"):
        RuleSet.from_dict(description)


@pytest.mark.parametrize(
    ("column", "was"),
    [([0.0, 0.1], "list, no array"), (0.1, "float, no array"), (np.float64(0.1), r"\[\]"), (np.zeros(3), r"\[3\]")],
)
@pytest.mark.parametrize("name", ["position", "drawdown"])
def test_columns_that_are_no_arrays_of_one_shape_are_named(name: str, column: Any, was: str) -> None:
    state = {**column_state([CALM, CALM]), name: column}
    if name == "position" and was == r"\[3\]":
        name, was = "data_age", r"\[2\]"  # the position sets the shape
    for judge in (ruleset(), ruleset().blocked, ruleset().explain):
        with pytest.raises(RuleError, match=rf"state\['{name}'\]: expected shape .*, was {was}"):
            judge(state)


def test_a_trading_state_that_no_rule_reads_must_be_a_column_all_the_same() -> None:
    rules = RuleSet([StaleData()], ActionTable())
    state = {"position": np.zeros(2), "data_age": np.zeros(2), "trading_state": [0.0, 0.0]}
    with pytest.raises(RuleError, match=r"state\['trading_state'\]: expected shape \[2\], was list, no array"):
        rules.explain(state)


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
        "target 1.25 is denied: forbidden at weekday=2, position=1 under last_day=2 [no_friday_entries]"
    ]
    assert RuleSet.from_dict(rules.to_dict()).rules == rules.rules


def test_a_reason_that_fails_does_not_take_the_explanation_with_it() -> None:
    with unregistering():

        @register_rule("tongue_tied")
        @dataclass(frozen=True)
        class TongueTied:
            fields: ClassVar[tuple[str, ...]] = ("position",)

            def __call__(self, state):
                return state["target_position"] < 1

            def reason(self, observed):
                return f"{observed['weekday']} is a Friday"

        denials = RuleSet([TongueTied()], ActionTable((0.0, 1.0))).explain({"position": np.array([0.5])})
        assert [denial.reason for denial in denials] == ["forbidden at position=0.5"]


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
        (lambda state: state["position"][:1] < 1, r"was bool \[1, 1\]"),
        (lambda state: state["target_position"][:, 1:] < 1, r"was bool \[7, 6\]"),
    ],
    ids=["0/1", "float", "flat", "one row for all", "an action short"],
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
        for judge in (rules, rules.blocked):
            with pytest.raises(RuleError, match=f"rule 'mistaken': expected bool .*{message}"):
                judge(state)
        if message != r"was bool \[1, 1\]":  # which is right for the one row that is explained
            with pytest.raises(RuleError, match="rule 'mistaken': expected bool"):
                rules.explain(state)
