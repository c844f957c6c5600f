"""Ridge forecast of the next returns, and the position that pays best for it after costs.

A model-based baseline that needs no learner: linear in the features, exact in the costs. Letters: B paths, A actions,
S state columns, M features, n training rows, P markets, h horizon.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from configs.evaluation import RidgeConfig
from envs import TradingDynamics
from evaluation.rules import Validate, best_of, state_column
from masking import HOLD, TOLERANCE, validate_action_masks

TIE = 1e-12
"""Growth by which a trade must beat Hold: rounding alone must not cause one."""

CONSTANT = 1e-9
"""A column whose standard deviation is below this share of its size is constant up to rounding."""


@dataclass(frozen=True, eq=False)
class RidgeForecast:
    """Mean log return per bar over the next `horizon` bars, linear in the features of one row.

    Ridge regression (Hoerl and Kennard 1970) on features standardised over the training rows, with a free intercept.
    """

    names: tuple[str, ...]
    """The M features."""
    horizon: int
    """h, bars."""
    penalty: float
    """Added to the diagonal of the Gram matrix of the standardised features."""
    coefficients: NDArray[np.float64]
    """[M] log return per bar and raw unit of the feature."""
    intercept: float
    """Log return per bar."""

    @classmethod
    def fit(cls, train: NDArray[np.floating], names: Sequence[str], horizon: int, penalty: float) -> RidgeForecast:
        """Fit one forecast; see `fit_each`."""
        return cls.fit_each(train, names, horizon, [penalty])[0]

    @classmethod
    def fit_each(
        cls, train: NDArray[np.floating], names: Sequence[str], horizon: int, penalties: Sequence[float]
    ) -> list[RidgeForecast]:
        """Fit one forecast per penalty, all from one Gram matrix.

        The target of row t is the mean of gap plus intraday return over rows t+1 .. t+h of the same market; the last
        h rows of each market have none.

        Args: train [n, M] or [P, n, M] raw features; names of the M columns; horizon >= 1; penalties > 0.
        Raises: ValueError on shape, non-finite rows, missing return columns, or fewer than h + 2 rows.
        """
        rows = _training_rows(train, names, horizon)
        for penalty in penalties:
            if not 0.0 < penalty < math.inf:
                raise ValueError(f"penalty: expected a positive finite number, was {penalty}")
        bar_return = rows[:, :, names.index("gap_return")] + rows[:, :, names.index("intraday_return")]
        target = sliding_window_view(bar_return[:, 1:], horizon, axis=1).mean(axis=-1).reshape(-1)
        scale = rows.std(axis=(0, 1))
        # A constant column tells nothing; divided by its rounding noise it would seem to.
        scale = np.where(scale > CONSTANT * np.abs(rows).max(axis=(0, 1)), scale, np.inf)
        features = rows[:, :-horizon].reshape(-1, len(names))
        centre, mean = features.mean(axis=0), float(target.mean())
        standard = (features - centre) / scale
        gram, moment = standard.T @ standard, standard.T @ (target - mean)
        forecasts = []
        for penalty in penalties:
            coefficients = np.linalg.solve(gram + penalty * np.eye(len(names)), moment) / scale
            intercept = mean - float(centre @ coefficients)
            forecasts.append(cls(tuple(names), horizon, penalty, coefficients, intercept))
        return forecasts

    def __call__(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """Log return per bar. Args: features [..., M] raw units. Returns: [...]."""
        forecast: NDArray[np.float64] = self.intercept + features.astype(np.float64) @ self.coefficients
        return forecast


class RidgePolicy:
    """The valid action of highest expected growth over the forecast's horizon, after the cost of getting there.

    Growth of target p from position q: `h * (p * mean - risk_aversion / 2 * p^2 * variance) - |p - q| * cost`, with
    the forecast mean and the variance of `volatility_20`, both per bar, and the cost rate plus the share of the spread
    quoted now; so a position is kept while what a trade would gain is less than what it costs. Ties go to the lowest
    index, Hold. Where a column it reads is not finite it holds. Log returns stand in for simple ones: they differ by
    half a variance.

    Args: risk_aversion >= 0; bars_per_year turns the annualised volatility into a variance per bar.
    Raises: ValueError for a state row without a feature of the forecast or volatility_20, or an argument out of range.
    """

    name = "ridge"

    def __init__(
        self, dynamics: TradingDynamics, forecast: RidgeForecast, *, risk_aversion: float, bars_per_year: float
    ) -> None:
        if not 0.0 <= risk_aversion < math.inf:
            raise ValueError(f"risk_aversion: expected a finite number >= 0, was {risk_aversion}")
        if not 0.0 < bars_per_year < math.inf:
            raise ValueError(f"bars_per_year: expected a positive finite number, was {bars_per_year}")
        self.forecast = forecast
        self.risk_aversion = risk_aversion
        self._bars_per_year = bars_per_year
        self._actions = dynamics.rule_set.actions
        self._cost_rate = dynamics.account_rules.cost_rate
        self._spread_share = dynamics.account_rules.spread_share
        columns = [*forecast.names, "volatility_20", "position", *(["spread"] if self._spread_share else [])]
        self._columns = [state_column(dynamics, column) for column in columns]

    def act(self, state: NDArray[np.float32], action_masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Hold, or the trade that pays best."""
        validate_action_masks(action_masks, num_actions=self._actions.num_actions, batch=len(state))
        read = state[:, self._columns].astype(np.float64)
        known = np.isfinite(read).all(axis=1)
        read[~known] = 0.0
        width = len(self.forecast.names)
        mean = self.forecast(read[:, :width])[:, None]
        variance = read[:, width, None] ** 2 / self._bars_per_year
        position = read[:, width + 1, None]
        cost = self._cost_rate + (self._spread_share * np.maximum(read[:, -1:], 0.0) if self._spread_share else 0.0)

        target = self._actions.target_positions(position[:, 0])
        # The rounding of a float32 position is no reason to trade.
        target = np.where(np.abs(target - position) <= TOLERANCE, position, target)
        growth = self.forecast.horizon * (target * mean - 0.5 * self.risk_aversion * target**2 * variance)
        value = np.where(action_masks, growth - np.abs(target - position) * cost, -np.inf)
        best = np.argmax(value >= value.max(axis=1, keepdims=True) - TIE, axis=1)
        chosen: NDArray[np.int64] = np.where(known, best, HOLD)
        return chosen


def fit_ridge(
    dynamics: TradingDynamics,
    train: NDArray[np.floating],
    names: Sequence[str],
    config: RidgeConfig,
    validate: Validate,
    *,
    bars_per_year: float,
) -> RidgePolicy:
    """The ridge policy with the best horizon, penalty and risk aversion on validation; the first of equals.

    Args: train [n, M] or [P, n, M] raw features with the M given names, all of them columns of the dynamics.
    Raises: ValueError as `RidgeForecast.fit_each` and `RidgePolicy`, or for scores that are all NaN.
    """

    def candidates() -> Iterator[RidgePolicy]:
        for horizon in config.horizons:
            for forecast in RidgeForecast.fit_each(train, names, horizon, config.penalties):
                for risk_aversion in config.risk_aversions:
                    yield RidgePolicy(dynamics, forecast, risk_aversion=risk_aversion, bars_per_year=bars_per_year)

    return best_of(candidates(), validate)


def _training_rows(train: NDArray[np.floating], names: Sequence[str], horizon: int) -> NDArray[np.float64]:
    """Training rows as [P, n, M] after all checks."""
    if horizon < 1:
        raise ValueError(f"horizon: expected at least 1 bar, was {horizon}")
    if train.ndim not in (2, 3) or train.shape[-1] != len(names) or not train.size:
        raise ValueError(f"train: expected [n, {len(names)}] or [P, n, {len(names)}], was {list(train.shape)}")
    missing = [name for name in ("gap_return", "intraday_return") if name not in names]
    if missing:
        raise ValueError(f"names: expected gap_return and intraday_return, missing {missing} among {', '.join(names)}")
    rows = np.asarray(train, dtype=np.float64).reshape(-1, *train.shape[-2:])
    if rows.shape[1] < horizon + 2:
        raise ValueError(f"train: expected at least horizon + 2 = {horizon + 2} rows, was {rows.shape[1]}")
    finite = np.isfinite(rows).all(axis=(0, 1))
    if not finite.all():
        raise ValueError(f"train: expected finite values, column {names[int(finite.argmin())]!r} has others")
    return rows
