"""Rules without a model: follow one signal, or hold the volatility steady.

Both name a wanted position and take the valid action nearest to it. Letters: B paths, A actions, S state columns,
M features, n training rows, P markets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from envs import TradingDynamics
from evaluation.policy import Policy
from masking import TOLERANCE, nearest_valid
from masking.parameters import likeliest

SIGNALS = ("signal_5", "ma_distance_120")
"""Columns a linear rule follows, the preferred one first: the signal of a synthetic market, the trend of real bars."""

THRESHOLDS = (0.0, -0.5, 0.5, -1.0)
"""Searched by `fit_linear_signal`, in standard deviations of the signal; a tie goes to the first."""

BAND = 0.125
"""Half a step of the action table: `VolatilityTarget` does not trade for less, in multiples of equity."""

Validate = Callable[[Policy], float]
"""Scores a policy on validation rows; higher is better, NaN never wins."""

PolicyT = TypeVar("PolicyT", bound=Policy)


class LinearSignal:
    """Fully invested where a signal exceeds a threshold, out of the market elsewhere; Hold where it is not finite.

    Args: column of the state row; threshold in its unit.
    Raises: ValueError for an unknown column or a threshold that is not finite.
    """

    name = "linear_signal"

    def __init__(self, dynamics: TradingDynamics, column: str, threshold: float = 0.0) -> None:
        if not math.isfinite(threshold):
            raise ValueError(f"threshold: expected a finite number, was {threshold}")
        self.column = column
        self.threshold = threshold
        self._actions = dynamics.rule_set.actions
        self._signal = state_column(dynamics, column)
        self._position = state_column(dynamics, "position")

    def act(self, state: NDArray[np.float32], action_masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Hold, or the trade nearest to all or nothing."""
        signal = state[:, self._signal].astype(np.float64)
        wanted = np.where(np.isfinite(signal), signal > self.threshold, np.nan)
        return nearest_valid(wanted, state[:, self._position], action_masks, self._actions)


class VolatilityTarget:
    """Position = target / volatility_20, at most 1; Hold where the volatility is not finite.

    Moreira and Muir (2017), "Volatility-Managed Portfolios", scale by the variance; practitioners and we by the
    standard deviation, which trades less. Positions within `BAND` of the wanted one are left alone.

    Args: target per square root of a year.
    Raises: ValueError for a target that is not positive and finite, or a state row without volatility_20.
    """

    name = "vol_target"

    def __init__(self, dynamics: TradingDynamics, target: float = 0.10) -> None:
        if not 0.0 < target < math.inf:
            raise ValueError(f"target: expected a positive finite number, was {target}")
        self.target = target
        self._actions = dynamics.rule_set.actions
        self._volatility = state_column(dynamics, "volatility_20")
        self._position = state_column(dynamics, "position")

    def act(self, state: NDArray[np.float32], action_masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Hold, or the trade nearest to the wanted position."""
        volatility = state[:, self._volatility].astype(np.float64)
        position = state[:, self._position].astype(np.float64)
        # At or below the target the cap binds: no division by a volatility of zero.
        wanted = np.where(np.isfinite(volatility), self.target / np.maximum(volatility, self.target), np.nan)
        wanted = np.where(np.abs(wanted - position) <= BAND + TOLERANCE, position, wanted)
        return nearest_valid(wanted, position, action_masks, self._actions)


def signal_column(names: Sequence[str]) -> str:
    """The column a linear rule follows among these names. Raises: ValueError if there is none."""
    for column in SIGNALS:
        if column in names:
            return column
    raise ValueError(f"names: expected {' or '.join(SIGNALS)}, was {', '.join(names)}")


def fit_linear_signal(dynamics: TradingDynamics, train: NDArray[np.floating], validate: Validate) -> LinearSignal:
    """The linear rule with the best of `THRESHOLDS` on validation.

    Args: train [n, M] or [P, n, M] raw features in the order of the dynamics; they set the unit of the thresholds.
    Raises: ValueError on shape, non-finite training rows, no signal column, or scores that are all NaN.
    """
    width = len(dynamics.feature_names)
    if train.ndim not in (2, 3) or train.shape[-1] != width or not train.size:
        raise ValueError(f"train: expected [n, {width}] or [P, n, {width}], was {list(train.shape)}")
    column = signal_column(dynamics.feature_names)
    spread = float(np.std(train[..., dynamics.feature_names.index(column)], dtype=np.float64))
    if not math.isfinite(spread):
        raise ValueError(f"train: expected finite values, column {column!r} has others")
    return best_of((LinearSignal(dynamics, column, factor * spread) for factor in THRESHOLDS), validate)


def best_of(candidates: Iterable[PolicyT], validate: Validate) -> PolicyT:
    """The candidate with the highest score; the first of equals.

    Raises: ValueError if no score is a number above -inf.
    """
    best, highest, tried = None, -math.inf, 0
    for candidate in candidates:
        score = validate(candidate)
        tried += 1
        if score > highest:
            best, highest = candidate, score
    if best is None:
        raise ValueError(f"validate: expected a number for at least one of {tried} candidates, all were NaN or -inf")
    return best


def state_column(dynamics: TradingDynamics, column: str) -> int:
    """Index of a column of the state row. Raises: ValueError naming it and the nearest match."""
    names = dynamics.state_names
    if column not in names:
        raise ValueError(f"column: expected one of the state row, was {column!r}; {likeliest(column, names)}")
    return names.index(column)
