"""One state at a time: numbers where the rules take them, arrays where they do not, and the same verdicts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from masking_worlds import CALM, ruleset, unregistering

from masking import ActionTable, RowRules, RuleError, RuleSet, register_rule, trading_rules
from masking.actions import namespace


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    with unregistering():
        yield


def numbers(**changes: float) -> dict[str, Any]:
    return {name: np.float32(value) for name, value in {**CALM, **changes}.items()}


def own(judge: Any, fields: tuple[str, ...] = ("position",)) -> RuleSet:
    """The trading rules and one of somebody's own."""

    @register_rule("own")
    @dataclass(frozen=True, kw_only=True)
    class Own:
        def __call__(self, state: Any) -> Any:
            return judge(state)

    Own.fields = fields  # type: ignore[attr-defined]
    return RuleSet([*trading_rules(), Own()], ActionTable())


def by_arrays(rules: RuleSet, row: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    blocked = rules.blocked({name: np.array([value]) for name, value in row.items()})
    return {name: tuple(np.flatnonzero(one[0]).tolist()) for name, one in blocked.items() if one.any()}


@pytest.mark.parametrize(
    "judge",
    [
        lambda state: (
            namespace(state["position"]).any(state["target_position"] > 0.1, axis=1, keepdims=True)
            & (state["target_position"] < 0.6)
        ),
        lambda state: state["target_position"][:, ::-1] < 0.6,
        lambda state: (state["position"] * np.ones((1, 1), np.float32)) < 0.6,
    ],
    ids=["names an axis", "indexes rows", "makes rows of its own"],
)
def test_a_rule_that_needs_arrays_gets_arrays(judge: Any) -> None:
    rules = own(judge)
    row_rules = RowRules(rules)
    assert re.search("AxisError|IndexError|expected bool|TypeError", row_rules.objection)
    for row in (numbers(), numbers(position=1.0), numbers(drawdown=np.nan), numbers(trading_state=1.0, position=0.5)):
        assert row_rules.denied(row) == by_arrays(rules, row)


def test_a_rule_that_tells_numbers_from_arrays_gets_arrays() -> None:
    rules = own(lambda state: (state["target_position"] < 0.6) & (state["position"].ndim == 2))
    row_rules = RowRules(rules)
    assert row_rules.objection.startswith("expected {")
    assert row_rules.denied(numbers()) == by_arrays(rules, numbers())
    assert "own" in row_rules.denied(numbers())


def test_a_verdict_for_all_actions_leaves_hold_alone() -> None:
    rules = own(lambda state: state["position"] < 0.6)
    row_rules = RowRules(rules)
    assert not row_rules.objection
    assert row_rules.denied(numbers(position=1.0))["own"] == (1, 2, 3, 4, 5, 6)
    assert "own" not in row_rules.denied(numbers())


def test_only_hold_is_no_denial() -> None:
    row_rules = RowRules(own(lambda state: state["target_position"] != state["position"]))
    assert not row_rules.objection
    assert "own" not in row_rules.denied(numbers(position=0.3))
    assert row_rules.denied(numbers(position=0.5))["own"] == (3,)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ruleset().fields)
def test_a_state_that_cannot_be_judged_leaves_hold_alone(field: str, value: float) -> None:
    denied = RowRules(ruleset()).denied(numbers(**{field: value}))
    assert denied["non_finite"] == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("by_numbers", [True, False])
def test_what_is_missing_is_named(by_numbers: bool) -> None:
    row_rules = RowRules(ruleset())
    row_rules.objection = "" if by_numbers else "a test"
    row = numbers()
    del row["drawdown"]
    with pytest.raises(RuleError, match=r"missing.*drawdown"):
        row_rules.denied(row)


def test_a_verdict_that_is_no_bool_is_an_error() -> None:
    loud = {"on": False}
    row_rules = RowRules(own(lambda state: (state["position"] < 9.0) if not loud["on"] else state["position"]))
    assert not row_rules.objection
    loud["on"] = True
    with pytest.raises(RuleError, match=r"rule 'own': expected bool \[\] or \[A\], was float32 \[\]"):
        row_rules.denied(numbers())
