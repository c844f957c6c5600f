"""Distances between a window of rows and the rows of training, and what is usual for them.

Letters: K windows, M features, Q = 12 bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

GUMBEL_SKEW = 1.14


def stability_index(counts: npt.NDArray[Any], others: npt.NDArray[Any], possible: npt.NDArray[np.bool_]) -> Floats:
    """PSI between two samples, given as counts [..., Q] of n and m rows in bins of which some are `possible` [..., Q].

    sum (p - q) log(p / q), half a row added to every bin so that an empty one is finite. Of independent rows it is
    (1/n + 1/m) times a chi-square with bins - 1 degrees of freedom (Yurdakul and Naranjo 2020, "Statistical properties
    of the population stability index", Journal of Risk Model Validation 14): with 60 bars and 12 bins 0.18 is expected
    without any drift, more than the usual 0.1 for "some drift", and of autocorrelated rows far more. What is reported
    and held against 0.1 and 0.25 is the excess over `DriftReference.psi_expected`.
    """
    bins = possible.sum(axis=-1, keepdims=True)
    p, q = ((part + 0.5) / (part.sum(axis=-1, keepdims=True) + 0.5 * bins) for part in (counts, others))
    index: Floats = ((p - q) * np.log(p / q)).sum(axis=-1, where=possible)
    return index


def kolmogorov_distance(counts: npt.NDArray[Any], others: npt.NDArray[Any]) -> Floats:
    """Largest difference of the two distribution functions at the edges of the bins [..., Q].

    That is the two-sample statistic, if every value that occurs is an edge, and a little less with the bins used here.
    """
    ours, theirs = (part.cumsum(axis=-1) / part.sum(axis=-1, keepdims=True) for part in (counts, others))
    distance: Floats = np.abs(ours - theirs).max(axis=-1)
    return distance


def kolmogorov_p(scaled: npt.NDArray[Any]) -> Floats:
    """Asymptotic p-value of a KS distance times the root of the number of independent rows (Kolmogorov 1933)."""
    terms = np.arange(1, 101)
    x = np.maximum(np.asarray(scaled, dtype=np.float64), 0.2)[..., None]
    signs = np.where(terms % 2, 2.0, -2.0)
    p: Floats = np.clip((signs * np.exp(-2.0 * np.square(terms * x))).sum(axis=-1), 0.0, 1.0)
    return p


def student_quantile(level: float, degrees: float) -> float:
    """Quantile of Student's t with at least 3 degrees of freedom, within 3 % up to 99.97 %.

    Abramowitz and Stegun (1964), 26.7.5.
    """
    x = NormalDist().inv_cdf(level)
    terms = (
        (x**3 + x) / 4.0,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96.0,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384.0,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160.0,
    )
    return x + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def possible_bins(edges: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """[M, Q]: between two equal edges of [M, Q - 1], as columns with many equal values have, there is no bin."""
    outer = np.ones((len(edges), 1), dtype=np.bool_)
    return np.concatenate((outer, edges[:, 1:] > edges[:, :-1], outer), axis=1)


@dataclass(frozen=True, kw_only=True)
class Tail:
    """Moments of a statistic over training windows."""

    mean: float
    std: float
    skew: float
    """Between 0 and that of the Gumbel distribution."""
    windows: float
    """Windows side by side: what the moments are worth."""

    @classmethod
    def fit(cls, values: Floats, windows: float) -> Self:
        """Of a statistic [K] of overlapping windows."""
        mean, std = float(values.mean()), max(float(values.std()), 1e-12)
        skew = float((((values - mean) / std) ** 3).mean())
        return cls(mean=mean, std=std, skew=min(max(skew, 0.0), GUMBEL_SKEW), windows=float(windows))

    def limit(self, rate: float) -> float:
        """What fresh windows exceed at this rate.

        No sample of a few dozen windows shows its 99.9 % quantile. It is taken from the Pearson III distribution with
        these moments, which lies between the normal and the Gumbel (that of a maximum of many), by Wilson and Hilferty
        (1931). Student's t in place of the normal pays for estimated moments; overlapping windows give them 1.5
        times the degrees of freedom (Meketon and Schmeiser 1984, "Overlapping batch means: something for nothing?").
        """
        degrees = max(1.5 * self.windows - 1.0, 3.0)
        score = student_quantile(1.0 - rate, degrees) * math.sqrt(1.0 + 1.0 / self.windows)
        if self.skew > 1e-6:
            cubed = (1.0 + self.skew * score / 6.0 - self.skew**2 / 36.0) ** 3
            score = 2.0 / self.skew * (cubed - 1.0)
        return self.mean + self.std * score
