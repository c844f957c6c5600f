"""States that visit a rule from both sides: on, beside and around every number among its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from masking.errors import RuleError
from masking.rules import TOLERANCE
from masking.ruleset import RuleSet, rule_parameters

Columns = dict[str, NDArray[Any]]
"""Name of a field -> [N]."""


def probe_states(rule_set: RuleSet, given: Mapping[str, Any], samples: int, rng: np.random.Generator) -> Columns:
    """Columns [N] float32 of every field: those given, and the others on, beside and around the rules' own numbers.

    Args: given: finite columns [N]; without any, N is `samples`.
    Raises: RuleError for a column that no rule reads, a wrong shape, non-finite values or N < 3.
    """
    columns = {name: np.asarray(column, dtype=np.float32) for name, column in given.items()}
    unknown = sorted(set(columns) - set(rule_set.fields))
    if unknown:
        raise RuleError(f"states: expected columns {list(rule_set.fields)}, was {unknown}")
    count = len(next(iter(columns.values()))) if columns else samples
    if count < 3:
        raise RuleError(f"states: expected at least 3 rows, was {count}; one or two cannot tell rows from a batch")
    for name, column in columns.items():
        if column.shape != (count,) or not np.isfinite(column).all():
            raise RuleError(
                f"states[{name!r}]: expected finite [{count}], was {list(column.shape)} or not finite; "
                "broken values are added by the check"
            )
    factors = np.asarray(rule_set.actions.factors)
    numbers = np.unique([0.0, 1.0, *(number for rule in rule_set.rules for number in _numbers(rule_parameters(rule)))])
    for name in rule_set.fields:
        # A limit on the trade binds where position and target are that far apart.
        exact = np.concatenate([factors, *(factors + sign * numbers[:, None] for sign in (-1, 1))], axis=None)
        exact = exact if name == "position" else numbers
        shifted = np.concatenate([exact, exact - TOLERANCE, exact + TOLERANCE]).astype(np.float32)
        beside = [np.nextafter(shifted, np.float32(bound)) for bound in (-np.inf, np.inf)]
        limits = np.concatenate([shifted, *beside])
        # Scaled by one of the numbers each: a drawdown of 0.08 and a holding time of 20 are both visited.
        spread = rng.choice(factors if name == "position" else numbers, count) * rng.uniform(-0.5, 2.0, count)
        drawn = np.where(rng.random(count) < 0.5, rng.choice(limits, count), spread)
        columns.setdefault(name, drawn.astype(np.float32))
    return columns


def broken_rows(rule_set: RuleSet, states: Columns) -> Columns:
    """One row per field and non-finite value, healthy but for that cell."""
    cells = [(name, value) for name in rule_set.fields for value in (np.nan, np.inf, -np.inf)]
    rows = take_rows(states, np.arange(len(cells)) % len(states["position"]))
    for row, (name, value) in enumerate(cells):
        rows[name][row] = value
    return rows


def take_rows(states: Columns, rows: Any) -> Columns:
    """The same rows of every column; `rows` is anything that indexes [N]."""
    return {name: column[rows] for name, column in states.items()}


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)
