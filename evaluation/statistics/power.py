"""How large a sample would have to be to show a true gain in Sharpe ratio.

Letters: S training seeds, P independent test paths. The spread within and between them is what was observed; the gain
is supposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from evaluation.statistics.sharpe import SharpeDifference

MOST = 1_000_000
"""Samples beyond this size are as good as impossible."""

GRID = (np.arange(32) + 0.5) / 32
"""Quantile levels over which an estimated variance is averaged."""


@dataclass(frozen=True)
class PowerRow:
    """What it takes to show one true gain."""

    gain: float
    """Supposed true difference of annualised Sharpe ratios."""
    threshold: float
    """What the lower bound must exceed."""
    chance: float
    """Probability that a sample of the present size shows it; with one seed the spread between seeds is left out."""
    paths: int | None
    """Paths of the present length needed with the present seeds; None if no number is enough, because the spread
    between seeds alone is too large or the gain does not exceed the threshold."""
    years: float | None
    """The same paths in years of market, all together; for a single series the length it would need."""
    seeds: int | None
    """Seeds needed with the present paths; None if no number is enough, or with one seed, whose spread is unknown."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def chance_of_showing(
    difference: SharpeDifference, gain: float, threshold: float = 0.0, *, seeds: int, paths: int
) -> float:
    """Probability that the lower bound of a new sample exceeds `threshold`, were `gain` the truth.

    The observed variance components are taken for the true ones. The estimate is then normal around the gain, and the
    variances that make its interval are chi-square around the truth; the chance is averaged over a grid of both. With
    many seeds and paths this is the familiar `Phi((gain - threshold) / error - z)`; with three seeds that formula would
    promise far too much.

    Args: paths of the length of the observed ones; of a single series, multiples of its length.
    """
    parts = difference.components
    of_seed = 0.0 if math.isnan(parts.seed) else parts.seed
    # A lone series lends its blocks of bars as degrees of freedom, several paths lend themselves.
    pieces = 1.0 if difference.paths > 1 else difference.bars / difference.block
    if pieces * paths <= 1.0:
        return 0.0
    # As in `crossed_mean` each margin counts the residual whole: the interval is wider than the estimate is uncertain.
    level = difference.interval.level
    reach = _squared_reach((parts.path + parts.residual / seeds) / paths, pieces * paths - 1.0, level)[:, None]
    if seeds > 1:
        reach = reach + _squared_reach((of_seed + parts.residual / paths) / seeds, seeds - 1.0, level)
    error = math.sqrt(of_seed / seeds + parts.path / paths + parts.residual / (seeds * paths))
    if error == 0.0:
        return float(gain > threshold)
    return float(special.ndtr((gain - threshold - np.sqrt(reach)) / error).mean())


# Squares [G] of how far the interval reaches for one source of variance, over what its estimate may be.
def _squared_reach(variance: float, freedom: float, level: float) -> NDArray[np.float64]:
    quantile = float(special.stdtrit(freedom, 0.5 + level / 2.0))
    squares: NDArray[np.float64] = quantile**2 * variance * special.chdtri(freedom, 1.0 - GRID) / freedom
    return squares


def paths_needed(difference: SharpeDifference, gain: float, threshold: float = 0.0, *, power: float) -> int | None:
    """Fewest paths, with the present seeds, that show `gain` with probability `power`; see `PowerRow.paths`."""
    return _smallest(
        lambda paths: chance_of_showing(difference, gain, threshold, seeds=difference.seeds, paths=paths), power, 1
    )


def seeds_needed(difference: SharpeDifference, gain: float, threshold: float = 0.0, *, power: float) -> int | None:
    """Fewest seeds, on the present paths, that show `gain` with probability `power`; see `PowerRow.seeds`."""
    if difference.seeds == 1:
        return None
    return _smallest(
        lambda seeds: chance_of_showing(difference, gain, threshold, seeds=seeds, paths=difference.paths), power, 2
    )


def power_table(
    difference: SharpeDifference,
    bars_per_year: float,
    gains: Sequence[float] = (0.05, 0.1, 0.2, 0.3),
    *,
    min_gain: float,
    power: float,
) -> list[PowerRow]:
    """Sample sizes for every gain: first for a lower bound above 0, then for one above `min_gain`.

    The level is that of the difference's interval.

    Raises: ValueError on a `power` outside (0, 1).
    """
    rows = []
    for threshold in (0.0, min_gain):
        for gain in gains:
            paths = paths_needed(difference, gain, threshold, power=power)
            rows.append(
                PowerRow(
                    gain=gain,
                    threshold=threshold,
                    chance=chance_of_showing(
                        difference, gain, threshold, seeds=difference.seeds, paths=difference.paths
                    ),
                    paths=paths,
                    years=None if paths is None else paths * difference.bars / bars_per_year,
                    seeds=seeds_needed(difference, gain, threshold, power=power),
                )
            )
    return rows


def _smallest(chance: Callable[[int], float], power: float, least: int) -> int | None:
    if not 0.0 < power < 1.0:
        raise ValueError(f"power: expected a number between 0 and 1, was {power}")
    too_few, enough = least - 1, least
    while chance(enough) < power:
        too_few, enough = enough, 2 * enough
        if enough > MOST:
            return None
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if chance(middle) >= power else (middle, enough)
    return enough
