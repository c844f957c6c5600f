"""What must not get worse: drawdown, the kill switch, the slowest decisions.

Letters: S training seeds, P independent test paths. Seeds on one path saw the same market, so the unit of every count
here is the path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from evaluation.statistics.crossed import crossed_mean, finite, seed_margin
from evaluation.statistics.interval import Interval, NotDecidable, t_interval

FEW_PATHS = 30
"""Below this, drawdowns that all differ by the same may be chance, and are no certainty."""

MOST_PATHS = 1_000_000
"""More than anybody will walk: a sample that does not decide at this size never does."""


@dataclass(frozen=True)
class NonInferiority:
    """Whether a loss of `a` exceeds that of `b` by less than a margin fixed beforehand, or is shown to be larger."""

    interval: Interval
    """Of `a - b`."""
    margin: float
    paths: int
    paths_needed: int | None
    """Paths in all at which the margin would be kept if the observed difference stays; None if no number is enough."""

    @property
    def holds(self) -> bool:
        """The upper end of the interval is below the margin; False for NaN."""
        return self.interval.high < self.margin

    @property
    def violated(self) -> bool:
        """The estimate exceeds the margin, and that `a` is worse is established: the lower end is above 0.

        True for NaN. Neither this nor `holds`: undecided.
        """
        ends = (self.interval.low, self.interval.estimate, self.interval.high)
        return any(map(math.isnan, ends)) or (self.interval.estimate > self.margin and self.interval.low > 0.0)


def drawdown_non_inferiority(a: ArrayLike, b: ArrayLike, *, margin: float, level: float) -> NonInferiority:
    """Compare mean maximum drawdowns, paired by seed and path.

    Args: a, b: maximum drawdown [S, P], fractions; either may have S = 1 and is paired with every seed of the other;
        margin: largest excess that still counts as not worse; level: two-sided.
    Raises: ValueError on shape, NaN or a negative margin; NotDecidable on one path, and where fewer than 30 all differ
        by the same, which says nothing of how they scatter.
    """
    margin = _margin(margin)
    first, second = _paired(_drawdowns("a", a), _drawdowns("b", b))
    difference = first - second
    paths = difference.shape[1]
    if np.ptp(difference) == 0.0 and 1 < paths < FEW_PATHS:
        raise NotDecidable(FEW_PATHS - paths, "paths", f"the drawdowns of all {paths} paths differ by the same")
    interval = crossed_mean(difference, level=level, resamples=1, seed=0).interval
    of_path = float(difference.mean(axis=0).var(ddof=1))
    of_seeds = seed_margin(difference.mean(axis=1))

    def high(walked: int) -> float:
        # The spread between seeds stays as it is however many paths there are.
        margins = ((of_path / walked, walked - 1), *of_seeds)
        return t_interval(interval.estimate, *margins, level=level, method="").high

    return NonInferiority(interval, margin, paths, _paths_needed(high, margin))


@dataclass(frozen=True)
class KillSwitchTest:
    """How often the kill switch latched under two policies on the same paths."""

    difference: NonInferiority
    """Of the rates, `a - b`, averaged over seeds."""
    rate_a: float
    rate_b: float
    rate_a_bound: float
    """Exact one-sided upper bound on `rate_a` at `level`: without an event about 3 / P at 95 %."""
    paths_with_events: tuple[int, int]
    """Paths on which any seed of `a`, and of `b`, was killed."""
    p_value: float
    """Exact and one-sided: small where some run of `a` is killed more often than its pair of `b`."""
    seeds: int

    @property
    def holds(self) -> bool:
        """The rate of `a` exceeds that of `b` by less than the margin, at the level of the interval."""
        return self.difference.holds


def kill_switch_difference(killed_a: ArrayLike, killed_b: ArrayLike, *, margin: float, level: float) -> KillSwitchTest:
    """Compare kill-switch rates of paired runs; exact in small samples, for rare events.

    Per path, x is the share of seeds on which only `a` was killed, y that on which only `b` was: `a - b = E x - E y`.
    The interval subtracts an exact bound of one from an exact bound of the other, each at half the error (Bonferroni).
    With one seed x is 0 or 1 and the bounds are Clopper and Pearson's (1934). With several it lies between, seeds on a
    path are dependent, and the bounds are Hoeffding's (1963, theorem 1), which ask for independent paths only and equal
    Clopper and Pearson's where there is no event. They speak of these S trained policies on new paths.

    The p-value is McNemar's exact test, run by run on paths that only one of the two survives: the smallest of the S,
    times S (Bonferroni), because runs share their paths. Shares per path have no such test: one policy may be killed
    seldom in all its runs and the other often in one, at equal rates.

    Args: killed_a, killed_b: bool [S, P]; either may have S = 1; margin: largest excess of the rate that still counts
        as not higher; level: two-sided.
    Raises: ValueError on shape, dtype, margin or level.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a number between 0 and 1, was {level}")
    margin = _margin(margin)
    a, b = _paired(_events("killed_a", killed_a), _events("killed_b", killed_b))
    S, P = a.shape
    only_a, only_b = (a & ~b).mean(axis=0), (b & ~a).mean(axis=0)
    above = _bound_with_one_seed if S == 1 else _bound_with_seeds
    tail = (1.0 - level) / 4.0
    x, y = float(only_a.mean()), float(only_b.mean())

    def high(paths: int) -> float:
        return above(x, paths, tail) - _lower(above, y, paths, tail)

    interval = Interval(
        estimate=x - y,
        low=_lower(above, x, P, tail) - above(y, P, tail),
        high=high(P),
        level=level,
        method=f"exact {'Clopper-Pearson' if S == 1 else 'Hoeffding'} bounds of discordant runs, {P} paths x {S} runs",
    )
    smallest = min(map(_mcnemar, (a & ~b).sum(axis=1), (b & ~a).sum(axis=1)))
    return KillSwitchTest(
        difference=NonInferiority(interval, margin, P, _paths_needed(high, margin)),
        rate_a=float(a.mean()),
        rate_b=float(b.mean()),
        rate_a_bound=above(float(a.mean()), P, 1.0 - level),
        paths_with_events=(int(a.any(axis=0).sum()), int(b.any(axis=0).sum())),
        p_value=min(1.0, S * smallest),
        seeds=S,
    )


def quantile_upper_bound(samples: ArrayLike, q: float = 0.99, *, level: float) -> float:
    """Distribution-free upper bound on the q-quantile: the smallest order statistic that exceeds it at `level`.

    Of independent samples of one distribution; `level` is one-sided.

    Args: samples [n], e.g. milliseconds.
    Raises: ValueError on NaN or an empty sample; NotDecidable where even the largest sample is no bound: the 99th
        percentile takes 299 samples at 95 % and 459 at 99 %.
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or np.isnan(values).any():
        raise ValueError(f"samples: expected numbers [n >= 1], was shape {list(values.shape)} or holds NaN")
    for name, share in (("q", q), ("level", level)):
        if not 0.0 < share < 1.0:
            raise ValueError(f"{name}: expected a number between 0 and 1, was {share}")
    n = len(values)
    # Samples below the quantile are binomial (n, q); the bound fails when there are `rank` of them or more.
    rank = int(stats.binom.ppf(level, n, q)) + 1
    if rank > n:
        enough = math.ceil(math.log(1.0 - level) / math.log(q))
        raise NotDecidable(enough - n, "samples", f"a bound on quantile {q:g} at {level:g} takes {enough}, was {n}")
    return float(np.partition(values, rank - 1)[rank - 1])


def _mcnemar(only_a: int, only_b: int) -> float:
    events = int(only_a + only_b)
    return float(stats.binomtest(int(only_a), events, alternative="greater").pvalue) if events else 1.0


# Upper bound of a rate at one-sided error `tail`, from its estimate over so many paths.
def _bound_with_one_seed(rate: float, paths: int, tail: float) -> float:
    events = rate * paths
    return 1.0 if events >= paths else float(special.betaincinv(events + 1.0, paths - events, 1.0 - tail))


def _bound_with_seeds(rate: float, paths: int, tail: float) -> float:
    if rate >= 1.0:
        return 1.0
    enough = -math.log(tail) / paths

    def surprise(mean: float) -> float:
        happens = rate * math.log(rate / mean) if rate > 0.0 else 0.0
        return happens + (1.0 - rate) * math.log((1.0 - rate) / (1.0 - mean)) - enough

    nearly_one = 1.0 - 1e-12
    return 1.0 if surprise(nearly_one) < 0.0 else float(optimize.brentq(surprise, max(rate, 1e-300), nearly_one))


def _lower(above: Callable[[float, int, float], float], rate: float, paths: int, tail: float) -> float:
    return 1.0 - above(1.0 - rate, paths, tail)


# Smallest number of paths at which the upper end is below the margin; it falls with the paths.
def _paths_needed(high: Callable[[int], float], margin: float) -> int | None:
    too_few, enough = 1, 2
    while not high(enough) < margin:
        too_few, enough = enough, 2 * enough
        if enough > MOST_PATHS:
            return None
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if high(middle) < margin else (middle, enough)
    return enough


def _paired(a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a, b: expected the same paths, was {a.shape[1]} and {b.shape[1]}; compare on identical bars")
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise ValueError(f"a, b: expected the same seeds, or one seed on a side, was {len(a)} and {len(b)}")
    paired_a, paired_b = np.broadcast_arrays(a, b)
    return paired_a, paired_b


def _drawdowns(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = finite(name, values, "[S, P]")
    if not ((array >= 0.0) & (array <= 1.0)).all():
        raise ValueError(f"{name}: expected drawdowns as fractions from 0 to 1, was {array.min():g} to {array.max():g}")
    return array


def _events(name: str, values: ArrayLike) -> NDArray[np.bool_]:
    array = np.asarray(values)
    if array.ndim != 2 or 0 in array.shape or array.dtype != np.bool_:
        raise ValueError(f"{name}: expected bool [S, P], was {array.dtype} {list(array.shape)}")
    return array


def _margin(margin: float) -> float:
    if not 0.0 <= margin < 1.0:
        raise ValueError(f"margin: expected a fraction from 0 to 1, was {margin}")
    return margin
