"""What is left of a Sharpe ratio once all the tries behind it are counted.

Letters: S training seeds, P independent test paths, n bars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from arch.bootstrap import StepM
from numpy.typing import ArrayLike
from scipy import stats

from evaluation.metrics import sharpe_ratio
from evaluation.statistics.crossed import Floats, finite
from evaluation.statistics.influence import block_length, hac_variance, influence
from evaluation.statistics.interval import NotDecidable
from evaluation.statistics.sharpe import MIN_BARS, SAME, sharpe_by_path

MOST_BARS = 5_000
"""Longer series are averaged over neighbouring bars first: arch's StepM takes time of the square of their number."""


@dataclass(frozen=True)
class DeflatedSharpe:
    """A Sharpe ratio set against the best that luck alone would show among all trials; ratios are annualised."""

    probability: float
    """That the true ratio exceeds 0 although the best of all trials was picked: the deflated Sharpe ratio."""
    undeflated: float
    """The same as if this had been the only trial: the probabilistic Sharpe ratio against 0."""
    sharpe: float
    expected_max_sharpe: float
    """Of `trials` policies without any skill."""
    trials: int


@dataclass(frozen=True)
class SuperiorPolicies:
    """Which candidates have a higher Sharpe ratio than the benchmark, all candidates tested at once."""

    p_value: float
    """Hansen's consistent p-value of "no candidate is better"."""
    superior: tuple[str, ...]
    """Candidates that StepM keeps, in the given order; the chance of any wrong one is at most `1 - level`."""
    tested: tuple[str, ...]
    """All candidates, in the given order."""
    level: float
    block: float
    """Mean block length of the bootstrap, bars; NaN where every candidate is the benchmark itself."""
    resamples: int
    """A p-value of 0 means below one in so many."""


def expected_max_sharpe(trials: int, trial_sharpe_std: float) -> float:
    """Expected highest Sharpe ratio of independent trials whose true ratio is 0 (Bailey and Lopez de Prado 2014).

    Args: trials: at least 1, everything that was tried, discarded or not; trial_sharpe_std: spread of the trials'
        Sharpe ratios, in the unit that is returned.
    """
    if trials < 1:
        raise ValueError(f"trials: expected at least 1, was {trials}; count everything that was tried")
    if not 0.0 <= trial_sharpe_std < math.inf:
        raise ValueError(f"trial_sharpe_std: expected a finite number of at least 0, was {trial_sharpe_std}")
    if trials == 1:
        return 0.0
    quantiles = stats.norm.ppf([1.0 - 1.0 / trials, 1.0 - 1.0 / (trials * math.e)])
    return float(trial_sharpe_std * ((1.0 - np.euler_gamma) * quantiles[0] + np.euler_gamma * quantiles[1]))


def probabilistic_sharpe(sharpe: float, threshold: float, bars: int, skewness: float, kurtosis: float) -> float:
    """Probability that the true Sharpe ratio exceeds `threshold` (Bailey and Lopez de Prado 2012).

    Both ratios are per bar. Skewness and kurtosis (3 is normal) are those of the returns, which are taken as serially
    independent.
    """
    if bars < 2:
        raise ValueError(f"bars: expected at least 2, was {bars}")
    spread = 1.0 - skewness * sharpe + (kurtosis - 1.0) / 4.0 * sharpe**2
    if spread <= 0.0:
        raise ValueError(
            f"kurtosis: expected at least 1 + skewness^2 = {1.0 + skewness**2:.4g}, as every distribution has, "
            f"was {kurtosis:.4g}"
        )
    return float(stats.norm.cdf((sharpe - threshold) * math.sqrt((bars - 1.0) / spread)))


def deflated_sharpe(returns: ArrayLike, trials: int, trial_sharpe_std: float, bars_per_year: float) -> DeflatedSharpe:
    """Deflated Sharpe ratio of the policy that was picked out of `trials` (Bailey and Lopez de Prado 2014).

    Args: returns [n >= 30], simple return per bar of the pick; trials: everything that was tried, discarded or not;
        trial_sharpe_std: spread of the trials' *annualised* Sharpe ratios.
    Raises: ValueError on NaN and on returns that never vary; NotDecidable on fewer than 30 bars.
    """
    values = finite("returns", returns, "[n]")
    n = len(values)
    if n < MIN_BARS:
        raise NotDecidable(MIN_BARS - n, "bars", f"expected at least {MIN_BARS} bars, was {n}")
    annual = sharpe_ratio(values, bars_per_year)
    if math.isnan(annual) or not values.any():
        raise ValueError(f"returns: expected returns that vary, was {values[0]:g} on every bar; nothing to deflate")
    year = math.sqrt(bars_per_year)
    highest = expected_max_sharpe(trials, trial_sharpe_std)
    skewness, kurtosis = float(stats.skew(values)), float(stats.kurtosis(values, fisher=False))
    return DeflatedSharpe(
        probability=probabilistic_sharpe(annual / year, highest / year, n, skewness, kurtosis),
        undeflated=probabilistic_sharpe(annual / year, 0.0, n, skewness, kurtosis),
        sharpe=annual,
        expected_max_sharpe=highest,
        trials=trials,
    )


def superior_policies(
    benchmark: ArrayLike,
    candidates: Mapping[str, ArrayLike],
    *,
    level: float,
    resamples: int,
    seed: int,
    block: float | None = None,
) -> SuperiorPolicies:
    """SPA (Hansen 2005) and StepM (Romano and Wolf 2005) of the candidates' Sharpe ratios against the benchmark's.

    Compared are Sharpe ratios, not mean returns, which leverage would raise: the gain of a bar is its contribution to
    the difference of the ratios to first order, and ratios are averaged over seeds and paths. Averaged returns would
    be those of an ensemble, which is better than its members wherever they differ. Gains are divided by their HAC
    error, since arch 8 takes `studentize` but does not divide: a noisy candidate would hide the others.

    Bars are resampled, seeds are not: the answer is about these training runs.

    Args: benchmark [S, P, n >= 30] and candidates, name -> [S, P, n]: simple returns on the same paths and bars, of any
        number of seeds; block: mean block length in bars, None takes the longest of Politis and White's; arch needs
        whole bars and gets it rounded.
    Raises: ValueError on shapes, NaN, and returns without a Sharpe ratio; NotDecidable on fewer than 30 bars, or fewer
        than two blocks.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a number between 0 and 1, was {level}")
    if not candidates:
        raise ValueError("candidates: expected at least one policy, was none")
    base = _returns("benchmark", benchmark)
    group = math.ceil(base.shape[-1] / MOST_BARS)
    of_base = _contributions("benchmark", base, group)
    n = len(of_base)
    gains = {}
    for name, returns in candidates.items():
        what = f"candidates[{name!r}]"
        one = _returns(what, returns)
        if one.shape[1:] != base.shape[1:]:
            raise ValueError(
                f"{what}: expected the [P, n] = {list(base.shape[1:])} of the benchmark, was {list(one.shape[1:])}; "
                "policies are compared on identical bars"
            )
        gain = _contributions(what, one, group) - of_base
        if np.abs(gain).max() > SAME * np.abs(of_base).max():  # else the benchmark itself, at whatever leverage
            gains[name] = gain
    answer = partial(SuperiorPolicies, tested=tuple(candidates), level=level, resamples=resamples)
    if not gains:
        return answer(p_value=1.0, superior=(), block=math.nan)
    blocks = None if block is None else max(1.0, block / group)
    length = max(block_length(gain - gain.mean(), blocks) for gain in gains.values())
    losses = [-gain / math.sqrt(hac_variance(gain - gain.mean()) * n) for gain in gains.values()]
    step = StepM(
        np.zeros(n),  # losses of the benchmark, from which the gains are counted
        np.stack(losses, axis=1),
        size=1.0 - level,
        block_size=max(1, round(length)),
        reps=resamples,
        seed=seed,
    )
    step.compute()
    step.spa.compute()  # over all candidates again, from the resamples it already has
    names = tuple(gains)
    return answer(
        p_value=float(step.spa.pvalues["consistent"]),
        superior=tuple(names[index] for index in sorted(step.superior_models)),
        block=length * group,
    )


def _returns(name: str, returns: ArrayLike) -> Floats:
    values = finite(name, returns, "[S, P, n]")
    n = values.shape[-1]
    if n < MIN_BARS:
        raise NotDecidable(MIN_BARS - n, "bars", f"{name}: expected at least {MIN_BARS} bars, was {n}")
    return values


# What each bar adds to the Sharpe ratio per bar, averaged over seeds and paths, and over `group` neighbouring bars:
# [n // group], whose mean is the ratio. Up to group - 1 of the oldest bars are left out.
def _contributions(name: str, returns: Floats, group: int) -> Floats:
    ratios = sharpe_by_path(returns, 1.0)
    if np.isnan(ratios).any():
        raise ValueError(f"{name}: expected returns that vary, was the same nonzero return on every bar")
    contributions: Floats = (ratios[..., None] + influence(returns)).mean(axis=(0, 1))
    coarse: Floats = contributions[len(contributions) % group :].reshape(-1, group).mean(axis=1)
    return coarse
