"""Probe states: rows that visit every rule from both sides, the scaler's clip, and what must never be decided on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from data import Scaler
from envs import DATA_AGE, TradingDynamics
from masking import HOLD, TOLERANCE

EXTREMES = (np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40)
"""Values that stand in for broken columns: not finite, near overflow, subnormal."""
CODES = {"trading_state": (0, 0, 0, 0, 0, 1, 1, 2), "last_risk_event": (0, 1, 2, 3), DATA_AGE: (0, 0, 0, 1)}
"""Columns that hold codes, with the frequencies in which they are drawn."""


def probe_states(
    dynamics: TradingDynamics, scaler: Scaler, count: int, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Draw state rows.

    Half of the rows are ordinary: spread over 1.2 times each column's range, so that some are clipped. Four in ten
    have one column of a rule set to one of the rules' own limits, exactly, one float beside it, or a tolerance
    beside it. One in ten has a broken cell.

    Returns: [count, S].
    """
    names = dynamics.state_names
    centre = np.append(scaler.centre, np.float32(0.0))
    scale = np.append(scaler.scale, np.float32(0.0))
    state = (centre + 1.2 * scale * rng.uniform(-1.0, 1.0, (count, len(names)))).astype(np.float32)
    for name, codes in CODES.items():
        state[:, names.index(name)] = rng.choice(codes, count)
    for name in ("drawdown", "holding_time", "flat_bars"):
        state[:, names.index(name)] = np.abs(state[:, names.index(name)])
    # Squared: most accounts are far from their limits, or the masks would all be Hold.
    drawdown = names.index("drawdown")
    state[:, drawdown] = state[:, drawdown] ** 2 / 0.24
    for name in ("holding_time", "flat_bars"):
        state[:, names.index(name)] = np.rint(state[:, names.index(name)] * rng.choice((0.1, 1.0), count))
    position = names.index("position")
    at_factor = rng.random(count) < 0.6
    state[at_factor, position] = rng.choice(np.asarray(dynamics.rule_set.actions.factors), int(at_factor.sum()))

    limits = boundary_values(dynamics)
    rule_columns = [names.index(name) for name in dynamics.rule_set.fields]
    kind = rng.random(count)
    for row in np.flatnonzero((kind >= 0.5) & (kind < 0.9)):
        state[row, rng.choice(rule_columns)] = rng.choice(limits)
    for row in np.flatnonzero(kind >= 0.9):
        state[row, rng.integers(len(names))] = rng.choice(np.asarray(EXTREMES, dtype=np.float32))
    return state


def probe_masks(num_actions: int, count: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Caller masks [count, A]: half forbid nothing, half forbid at random; Hold stays valid."""
    masks = rng.random((count, num_actions)) < 0.6
    masks[rng.random(count) < 0.5] = True
    masks[:, HOLD] = True
    return masks


def boundary_values(dynamics: TradingDynamics) -> npt.NDArray[np.float32]:
    """Every number of the rule set, its neighbours in float32, and the values a tolerance beside it; ascending."""
    exact = np.array(sorted(set(_numbers(dynamics.rule_set.to_dict()))), dtype=np.float64)
    shifted = np.concatenate([exact, exact - TOLERANCE, exact + TOLERANCE]).astype(np.float32)
    beside = [np.nextafter(shifted, np.float32(bound)) for bound in (-np.inf, np.inf)]
    return np.unique(np.concatenate([shifted, *beside]))


def _numbers(description: Any) -> Iterator[float]:
    if isinstance(description, dict):
        for value in description.values():
            yield from _numbers(value)
    elif isinstance(description, list | tuple):
        for value in description:
            yield from _numbers(value)
    elif isinstance(description, int | float) and not isinstance(description, bool):
        yield float(description)
