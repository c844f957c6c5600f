"""State columns, rule sets and an independent oracle for the mask tests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from hypothesis import strategies as st

from masking import RULES, ActionTable, Rule, RuleSet, trading_rules

CALM = {
    "position": 0.0,
    "drawdown": 0.0,
    "trading_state": 0.0,
    "holding_time": 10.0,
    "volatility_20": 0.15,
    "data_age": 0.0,
}
"""A flat, healthy account on a quiet market."""

FIELDS = tuple(sorted(CALM))

BOUNDARIES = {
    "position": (0.0, 0.15, 0.25, 0.4, 0.5, 0.65, 0.75, 0.9, 1.0, 1.1, 1.25),
    "drawdown": (0.0, 0.08, 0.12, 0.15),
    "trading_state": (0.0, 1.0, 2.0),
    "holding_time": (0.0, 1.0, 2.0, 3.0, 4.0),
    "volatility_20": (0.15, 0.6),
    "data_age": (0.0, 1.0),
}
RANGES = {
    "position": (0.0, 1.5),
    "drawdown": (0.0, 0.3),
    "trading_state": (0.0, 2.0),
    "holding_time": (0.0, 30.0),
    "volatility_20": (0.0, 2.0),
    "data_age": (0.0, 5.0),
}


def ruleset(**limits: Any) -> RuleSet:
    return RuleSet(trading_rules(**limits), ActionTable())


def column_state(rows: list[Mapping[str, float]], dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """One array [B] per field."""
    return {name: np.array([row[name] for row in rows], dtype=dtype) for name in FIELDS}


def allowed(rules: RuleSet | Rule, **state: float) -> set[int]:
    """Allowed actions of a calm state with some columns changed."""
    rule_set = rules if isinstance(rules, RuleSet) else RuleSet([rules], ActionTable())
    masks = rule_set(column_state([{**CALM, **state}]))
    return set(np.flatnonzero(masks[0]).tolist())


def near(value: float) -> list[float]:
    """A boundary, its float32 neighbours, and points well on either side."""
    single = np.float32(value)
    neighbours = (np.nextafter(single, np.float32(-9)), single, np.nextafter(single, np.float32(9)))
    return [*map(float, neighbours), value - 1e-3, value + 1e-3]


def row_states(*, finite: bool = False) -> st.SearchStrategy[dict[str, float]]:
    """Rows over the whole state class: ranges, exact boundaries and their neighbours, NaN and infinities."""
    columns = {}
    for name, (low, high) in RANGES.items():
        around = [max(candidate, 0.0) for value in BOUNDARIES[name] for candidate in near(value)]
        values = st.sampled_from(around) | st.floats(low, float(np.float32(high)), width=32)
        if name == "trading_state":
            values = st.sampled_from(BOUNDARIES[name])
        broken = st.sampled_from([math.nan, math.inf, -math.inf])
        # One value in sixteen is broken, so that most rows with six columns are not.
        columns[name] = values if finite else st.one_of(*[values] * 15, broken)
    return st.fixed_dictionaries(columns)


def batches(*, finite: bool = False) -> st.SearchStrategy[list[dict[str, float]]]:
    return st.lists(row_states(finite=finite), min_size=1, max_size=8)


def limits() -> st.SearchStrategy[dict[str, Any]]:
    """Keyword arguments of `trading_rules`."""
    return st.fixed_dictionaries(
        {
            "max_exposure": st.sampled_from([0.5, 1.0, 1.25]),
            "paper": st.booleans(),
            "min_holding_bars": st.integers(0, 5),
            "max_position_change": st.sampled_from([0.25, 0.6, 2.0]),
            "max_volatility": st.floats(0.05, 1.5),
            "max_data_age_bars": st.floats(0.0, 3.0),
        }
    )


@contextmanager
def unregistering() -> Iterator[None]:
    """Take back every rule that is registered inside."""
    before = dict(RULES)
    try:
        yield
    finally:
        RULES.clear()
        RULES.update(before)
