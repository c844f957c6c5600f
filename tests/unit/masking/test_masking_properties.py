"""Properties of the masks over the whole class of states, boundaries and broken values included."""

from __future__ import annotations

import math
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from masking_worlds import BOUNDARIES, CALM, FIELDS, batches, column_state, limits, near, row_states, ruleset

from masking import TOLERANCE, ActionTable, RowRules, RuleSet, trading_rules

Row = dict[str, float]


def oracle(row: Row, limit: dict[str, Any]) -> list[bool]:
    """The rules again, as one plain decision per action in Python floats; shares no code with `masking`."""
    position, size = row["position"], abs(row["position"])
    allowed = [True]
    for target in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25):
        if not all(math.isfinite(value) for value in row.values()):
            allowed.append(False)
            continue
        smaller = target <= size + 1e-6 and not (target > 0 and position < 0)
        halted = row["trading_state"] == 2 or row["drawdown"] >= 0.12
        reducing = row["trading_state"] == 1 or row["drawdown"] >= 0.08
        denied = (
            halted
            or (reducing and not smaller)
            or (row["volatility_20"] >= limit["max_volatility"] and not smaller)
            or target > limit["max_exposure"] + 1e-6
            or (target > 1.0 + 1e-6 and not limit["paper"])
            or (
                not position - (limit["max_position_change"] + 1e-6)
                <= target
                <= position + (limit["max_position_change"] + 1e-6)
                and not (row["trading_state"] >= 1 and smaller)
            )
            or not 0 <= row["data_age"] <= limit["max_data_age_bars"]
            or (
                row["holding_time"] < limit["min_holding_bars"]
                and position != 0
                and not (row["trading_state"] >= 1 and smaller)
            )
        )
        allowed.append(not denied)
    return allowed


@given(rows=batches(), limit=limits())
def test_masks_equal_a_plain_decision_per_action(rows: list[Row], limit: dict[str, Any]) -> None:
    assert ruleset(**limit)(column_state(rows)).tolist() == [oracle(row, limit) for row in rows]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(rows=batches(), limit=limits())
def test_every_namespace_gives_the_same_masks(rows: list[Row], limit: dict[str, Any], dtype: Any) -> None:
    rules = ruleset(**limit)
    state = column_state(rows, dtype)
    expected = rules(state)
    assert expected.dtype == np.bool_
    for xp in (torch, array_api_strict):
        masks = rules({name: xp.asarray(column) for name, column in state.items()})
        assert masks.dtype == xp.bool
        np.testing.assert_array_equal(np.asarray(masks), expected)


@given(rows=batches())
def test_a_column_may_be_flat_or_a_slice_of_a_matrix(rows: list[Row]) -> None:
    rules, state = ruleset(), column_state(rows)
    matrix = np.stack([state[name] for name in FIELDS], axis=1)
    slices = {name: matrix[:, index : index + 1] for index, name in enumerate(FIELDS)}
    np.testing.assert_array_equal(rules(slices), rules(state))
    assert str(rules.explain(slices, row=len(rows) - 1)) == str(rules.explain(state, row=len(rows) - 1))


@given(rows=batches())
def test_a_batch_equals_its_rows_one_by_one(rows: list[Row]) -> None:
    rules = ruleset()
    together = rules(column_state(rows))
    alone = np.concatenate([rules(column_state([row])) for row in rows])
    np.testing.assert_array_equal(together, alone)


@given(rows=batches(), limit=limits())
def test_hold_is_always_valid_and_the_only_choice_in_a_broken_row(rows: list[Row], limit: dict[str, Any]) -> None:
    masks = ruleset(**limit)(column_state(rows))
    assert masks.shape == (len(rows), 7)
    assert masks[:, 0].all()
    for mask, row in zip(masks, rows, strict=True):
        if not all(math.isfinite(value) for value in row.values()):
            assert mask.tolist() == [True] + [False] * 6


@given(rows=batches(), limit=limits(), keep=st.sets(st.integers(0, 6)))
def test_another_rule_never_allows_more(rows: list[Row], limit: dict[str, Any], keep: set[int]) -> None:
    rules = trading_rules(**limit)
    some = RuleSet([rules[index] for index in sorted(keep)], ActionTable())
    state = column_state(rows)
    finite = np.isfinite(np.stack([state[name] for name in FIELDS])).all(axis=0)
    everything = RuleSet(rules, ActionTable())(state)
    # A smaller rule set may not even read the broken column; where all can be read, it allows at least as much.
    assert (everything <= some(state)).all()
    for index in keep:
        fewer = RuleSet([rules[other] for other in sorted(keep - {index})], ActionTable())
        assert (some(state)[finite] <= fewer(state)[finite]).all()


@given(rows=batches(), order=st.permutations(range(7)))
def test_the_order_of_rules_does_not_matter(rows: list[Row], order: list[int]) -> None:
    rules = trading_rules()
    shuffled = RuleSet([rules[index] for index in order], ActionTable())
    state = column_state(rows)
    np.testing.assert_array_equal(shuffled(state), ruleset()(state))


@given(rows=batches())
def test_judging_changes_neither_the_state_nor_the_next_judgement(rows: list[Row]) -> None:
    rules = ruleset()
    state, kept = column_state(rows), column_state(rows)
    for column in state.values():
        column.flags.writeable = False
    first = rules(state)
    rules.blocked(state)
    rules.explain(state)
    np.testing.assert_array_equal(rules(state), first)
    for name in FIELDS:
        np.testing.assert_array_equal(state[name], kept[name])


@given(row=row_states(finite=True), limit=limits())
def test_allowed_targets_stay_within_the_limits(row: Row, limit: dict[str, Any]) -> None:
    state = column_state([row])
    targets = np.array(ActionTable().factors)[ruleset(**limit)(state)[0, 1:]]
    ceiling = limit["max_exposure"] if limit["paper"] else min(limit["max_exposure"], 1.0)
    assert (np.abs(targets) <= ceiling + TOLERANCE).all()
    near = np.abs(targets - row["position"]) <= limit["max_position_change"] + 2 * TOLERANCE
    smaller = np.abs(targets) <= abs(row["position"]) + TOLERANCE
    assert (near | (smaller & (row["trading_state"] >= 1))).all()
    if row["trading_state"] == 2 or row["drawdown"] >= 0.12:
        assert targets.size == 0
    elif row["trading_state"] == 1 or row["drawdown"] >= 0.08 or row["volatility_20"] >= limit["max_volatility"]:
        assert (np.abs(targets) <= abs(row["position"]) + TOLERANCE).all()


@given(rows=batches(), limit=limits())
def test_blocked_and_explain_say_exactly_what_the_masks_say(rows: list[Row], limit: dict[str, Any]) -> None:
    rules, state = ruleset(**limit), column_state(rows)
    masks, blocked = rules(state), rules.blocked(state)
    np.testing.assert_array_equal(~masks, np.any(list(blocked.values()), axis=0))
    for row in range(len(rows)):
        one_by_one = [denial for action in range(7) for denial in rules.explain(state, action, row=row)]
        assert str(one_by_one) == str(rules.explain(state, row=row))  # as text: a broken row holds NaN
        explained = {(denial.action, denial.rule) for denial in rules.explain(state, row=row)}
        assert explained == {
            (int(action), name) for name, verdict in blocked.items() for action in np.flatnonzero(verdict[row])
        }


@given(rows=batches(), limit=limits(), dtype=st.sampled_from([np.float32, np.float64]))
def test_a_row_by_itself_is_denied_what_the_batch_says(rows: list[Row], limit: dict[str, Any], dtype: Any) -> None:
    rules, state = ruleset(**limit), {name: column.astype(dtype) for name, column in column_state(rows).items()}
    blocked, by_row = rules.blocked(state), RowRules(rules)
    assert not by_row.objection
    for row in range(len(rows)):
        assert by_row.denied({name: column[row] for name, column in state.items()}) == {
            name: tuple(np.flatnonzero(verdict[row])) for name, verdict in blocked.items() if verdict[row].any()
        }


@given(limit=limits(), rows=batches())
def test_a_rebuilt_rule_set_has_the_same_hash_and_the_same_masks(limit: dict[str, Any], rows: list[Row]) -> None:
    original = ruleset(**limit)
    copy = RuleSet.from_dict(original.to_dict())
    assert copy.hash == original.hash
    np.testing.assert_array_equal(copy(column_state(rows)), original(column_state(rows)))


def test_float32_neighbours_of_every_boundary_agree_in_numpy_and_torch() -> None:
    rows = [
        {**CALM, "position": position, field: value}
        for field, values in BOUNDARIES.items()
        for boundary in values
        for value in near(boundary)
        for position in (0.0, 0.5, 1.0)
    ]
    state = column_state(rows, np.float32)
    masks = ruleset(paper=True)(state)
    same = ruleset(paper=True)({name: torch.asarray(column) for name, column in state.items()})
    np.testing.assert_array_equal(same.numpy(), masks)
    assert 0.1 < masks[:, 1:].mean() < 0.9
