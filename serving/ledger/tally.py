"""Counts and moments of a stream of numbers, in memory that does not grow with it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

LEVEL = 0.95
"""Two-sided coverage of intervals."""
RESOLUTION = 1.01
"""Ratio of neighbouring latencies that are told apart: quantiles are right within half a percent."""


@dataclass(frozen=True)
class Agreement:
    """How often two executed actions are equal."""

    equal: int
    compared: int

    @property
    def share(self) -> float | None:
        """From 0 to 1; None where nothing was compared."""
        return self.equal / self.compared if self.compared else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's interval of the share at `LEVEL`; None where nothing was compared.

        Wilson (1927), "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22(158).
        """
        if self.share is None:
            return None
        z = NormalDist().inv_cdf(0.5 + LEVEL / 2.0)
        wide = z * z / self.compared
        centre = self.share + wide / 2.0
        reach = math.sqrt(wide * (self.share * (1.0 - self.share) + wide / 4.0))
        return max(0.0, (centre - reach) / (1.0 + wide)), min(1.0, (centre + reach) / (1.0 + wide))


class Pnl(NamedTuple):
    """Sum and mean over bars, fractions of equity, not compounded."""

    bars: int
    total: float
    mean: float | None
    """None without a bar."""
    standard_error: float | None
    """Of the mean; None with fewer than two bars."""


class Latency(NamedTuple):
    """Microseconds; None where no record tells."""

    p50: float | None
    p99: float | None


class Moments:
    """Mean and squared deviations in one pass.

    Welford (1962), "Note on a Method for Calculating Corrected Sums of Squares and Products", Technometrics 4(3).
    """

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        """Take in the P&L of one bar."""
        self._count += 1
        apart = value - self._mean
        self._mean += apart / self._count
        self._squares += apart * (value - self._mean)

    def result(self) -> Pnl:
        """So far."""
        count = self._count
        error = math.sqrt(self._squares / (count - 1) / count) if count > 1 else None
        return Pnl(count, self._mean * count, self._mean if count else None, error)


class Quantiles:
    """Counts on a logarithmic scale."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, microseconds: float) -> None:
        """Take in one latency."""
        self._counts[math.floor(math.log(max(microseconds, 1e-3), RESOLUTION))] += 1

    def result(self) -> Latency:
        """So far."""
        return Latency(self._at(0.5), self._at(0.99))

    # Nearest rank: the smallest value that so many are no larger than.
    def _at(self, share: float) -> float | None:
        rank = math.ceil(share * self._counts.total())
        for step in sorted(self._counts):
            rank -= self._counts[step]
            if rank <= 0:
                return float(RESOLUTION ** (step + 0.5))
        return None
