"""What training saw, as limits for live bars; `serving.drift.monitor` watches them.

Three statistics of the newest `window` bars are judged: of every feature the population stability index (PSI) and the
Kolmogorov-Smirnov distance (KS) from the training rows, and the mean negative log likelihood (NLL) of the world model's
one-step forecast.

Features of daily bars are autocorrelated, many over more bars than a window holds, so textbook limits alarm all the
time. Limits are calibrated instead: every window of the training rows is compared with the rows outside it. The largest
standardised statistic among the features has a distribution of its own over those windows, which settles both how many
features there are and what they have in common (the maxT procedure of Westfall and Young 1993, "Resampling-Based
Multiple Testing", section 2.3).

Letters: T rows of training, K windows, W bars of a window, M features, Q = 12 bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, StrictFloat, StrictInt, StrictStr, ValidationError, model_validator
from pydantic import Field as Bounds

from data import DataError
from serving.drift.statistics import (
    GUMBEL_SKEW,
    Floats,
    Tail,
    kolmogorov_distance,
    possible_bins,
    stability_index,
)
from serving.errors import BundleFormatError

DRIFT_FILE = "drift.json"
FORMAT_VERSION = 1
QUANTILES = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
"""Edges of the bins: deciles, the outer ones split, because a slow feature often spends a window in one decile."""
NUM_BINS = len(QUANTILES) + 1
WINDOW = 60
"""Bars of a window, unless told otherwise."""
MIN_WINDOWS = 4
"""Windows that fit side by side into the training rows."""
MIN_NLL_WINDOWS = 3
"""The same for the rows with an NLL."""
MAX_SHARE = 0.98
"""A column with more of its rows in one bin, such as a constant, is not watched."""
_PERCENT = np.linspace(0.0, 1.0, 101)
_KOLMOGOROV_95 = 1.3581


@dataclass(frozen=True, eq=False)
class Baseline:
    """How one statistic, transformed to be nearly normal, was distributed over training windows."""

    centre: Floats
    """[M]."""
    spread: Floats
    """[M]."""
    tail: Tail
    """Of the largest standardised value among the watched features."""

    @classmethod
    def fit(cls, values: Floats, window: int, watched: npt.NDArray[np.bool_], least_spread: float) -> Self:
        """Of transformed statistics [K, M] of windows that begin one bar apart."""
        worst = _scores_by_others(values[:, watched], window, least_spread).max(axis=1, initial=0.0)
        spread = np.maximum(values.std(axis=0), least_spread)
        return cls(values.mean(axis=0), spread, Tail.fit(worst, (len(values) - 1) / window + 1.0))

    def scores(self, values: Floats) -> Floats:
        """Standardised values [M]."""
        standardised: Floats = (values - self.centre) / self.spread
        return standardised


@dataclass(frozen=True, eq=False)
class NllBaseline:
    """How the world model's forecast did on rows it was not fitted to, nats per feature.

    A window is judged by the mean rank of its bars among those rows, 0 the best and 1 the worst: under a Gaussian, one
    jump would outweigh years in a mean of nats. Its logit has no upper end that a limit could lie beyond.
    """

    mean: float
    quantiles: Floats
    """[101], ascending: 0 %, 1 %, up to 100 %."""
    tail: Tail
    """Of the logit of a window's mean rank less that of the rows outside it."""

    @classmethod
    def fit(cls, nll: npt.NDArray[Any], window: int) -> Self:
        """Of the series [N] in time order. Raises: ValueError on shape; DataError on NaN, infinity, too few rows."""
        if nll.ndim != 1:
            raise ValueError(f"drift: nll: expected [N], was {list(nll.shape)}")
        series = _checked("nll", nll, MIN_NLL_WINDOWS * window).astype(np.float64)
        quantiles = np.quantile(series, _PERCENT)
        running = np.concatenate(([0.0], np.cumsum(np.interp(series, quantiles, _PERCENT))))
        inside = running[window:] - running[:-window]
        others = (running[-1] - inside) / (len(series) - window)
        scores = _logit(inside / window, window) - _logit(others, len(series) - window)
        return cls(float(series.mean()), quantiles, Tail.fit(scores, len(series) / window))

    def score(self, nll: Floats) -> float:
        """Logit of the mean rank of bars [N]: 0 where they are like the reference rows, larger where worse."""
        rank = np.interp(nll, self.quantiles, _PERCENT).mean()
        return float(_logit(np.asarray(rank), len(nll)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dictionary."""
        return {"mean": self.mean, "quantiles": self.quantiles.tolist(), "tail": asdict(self.tail)}


@dataclass(frozen=True, eq=False)
class DriftReference:
    """Bins, counts and limits of the training rows, small enough to travel in a bundle as `DRIFT_FILE`."""

    names: tuple[str, ...]
    """The M features, in order."""
    window: int
    """W: bars of a window; the limits hold for no other length."""
    edges: npt.NDArray[np.float32]
    """[M, Q - 1], raw units; bin k holds edges[k - 1] < x <= edges[k]."""
    counts: npt.NDArray[np.int64]
    """[M, Q], training rows by bin."""
    psi_expected: Floats
    """[M], mean PSI of training windows."""
    psi: Baseline
    """Of the cube root of PSI."""
    ks: Baseline
    """Of the square root of the distance."""
    nll: NllBaseline | None = None
    """None where no validation rows were given."""

    @classmethod
    def fit(
        cls,
        names: Sequence[str],
        values: npt.NDArray[Any],
        nll: npt.NDArray[Any] | None = None,
        *,
        window: int = WINDOW,
    ) -> Self:
        """Calibrate on rows in time order. Deterministic.

        Args:
            names: of the M features.
            values: [T, M], raw units: the training rows, at least 4 windows of them.
            nll: [N], nats, of one-step forecasts on rows the world model was not fitted to, at least 3 windows.
            window: W, at least 12 bars.

        Raises: ValueError on shape or window; DataError on NaN, infinity or too few rows.
        """
        if window < NUM_BINS:
            raise ValueError(f"drift: window: expected at least {NUM_BINS} bars, was {window}")
        if values.ndim != 2 or values.shape[1] != len(names) or not names:
            raise ValueError(f"drift: values: expected [T, {len(names)}], was {list(values.shape)}")
        rows = _checked("values", values, MIN_WINDOWS * window)
        edges = _edges(rows)
        possible = possible_bins(edges)
        counts = np.empty((len(names), NUM_BINS), dtype=np.int64)
        psi, distance = (np.empty((len(rows) - window + 1, len(names))) for _ in range(2))
        # Column by column, so that a year of minutes stays below a hundred megabytes.
        for column, cuts in enumerate(edges):
            running = np.zeros((len(rows) + 1, NUM_BINS), dtype=np.int64)
            np.cumsum(np.searchsorted(cuts, rows[:, column])[:, None] == np.arange(NUM_BINS), axis=0, out=running[1:])
            inside, counts[column] = running[window:] - running[:-window], running[-1]
            psi[:, column] = stability_index(inside, running[-1] - inside, possible[column])
            distance[:, column] = kolmogorov_distance(inside, running[-1] - inside)
        watched = _watched(counts)
        # Half the spread of independent rows: where training windows hardly differ, one odd bar is no drift.
        least = 0.5 * math.sqrt(2.0 / (9.0 * (NUM_BINS - 1))) * math.cbrt((NUM_BINS - 1) / window)
        return cls(
            tuple(names),
            window,
            edges,
            counts,
            psi.mean(axis=0),
            Baseline.fit(np.cbrt(psi), window, watched, least),
            Baseline.fit(np.sqrt(distance), window, watched, 0.5 * least),
            None if nll is None else NllBaseline.fit(nll, window),
        )

    @property
    def watched(self) -> npt.NDArray[np.bool_]:
        """[M]: all columns but those that stood (nearly) still in training."""
        return _watched(self.counts)

    @property
    def independent_bars(self) -> Floats:
        """[M]: how many independent bars a window is worth: as many as have this 95 % quantile of the KS distance."""
        high = np.square(self.ks.centre + NormalDist().inv_cdf(0.95) * self.ks.spread)
        bars: Floats = np.minimum(np.square(_KOLMOGOROV_95 / high), self.window)
        return bars

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dictionary; numbers survive the round trip exactly."""
        arrays = {name: getattr(self, name).tolist() for name in ("edges", "counts", "psi_expected")}
        baselines = {
            name: {"centre": part.centre.tolist(), "spread": part.spread.tolist(), "tail": asdict(part.tail)}
            for name, part in (("psi", self.psi), ("ks", self.ks))
        }
        return {
            "format_version": FORMAT_VERSION,
            "names": list(self.names),
            "window": self.window,
            **arrays,
            **baselines,
            "nll": None if self.nll is None else self.nll.to_dict(),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`. Raises: BundleFormatError naming the entry on anything else."""
        try:
            file = _File.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}." for part in first["loc"])[:-1]
            found = str(first["input"])[:200]
            raise BundleFormatError(f"{DRIFT_FILE}: {where or 'content'}: {first['msg']}, was {found}") from error
        return cls(
            file.names,
            file.window,
            np.array(file.edges, dtype=np.float32),
            np.array(file.counts, dtype=np.int64),
            np.array(file.psi_expected),
            file.psi.baseline(),
            file.ks.baseline(),
            None if file.nll is None else file.nll.baseline(),
        )


def _edges(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    edges = np.quantile(rows, QUANTILES, axis=0, method="inverted_cdf").T.astype(np.float32)
    # Where many rows have the lowest value, what falls below it belongs into a bin of its own.
    lowest = rows.min(axis=0)
    edges[:, 0] = np.where(edges[:, 0] == lowest, np.nextafter(lowest, np.float32(-np.inf)), edges[:, 0])
    return edges


def _watched(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    watched: npt.NDArray[np.bool_] = counts.max(axis=1) <= MAX_SHARE * counts.sum(axis=1)
    return watched


# Each window [K, M] in units of those that share no bar with it: like a fresh one, it is no part of its yardstick.
def _scores_by_others(values: Floats, window: int, least_spread: float) -> Floats:
    mean, variance = (_mean_of_others(part, window) for part in (values, np.square(values)))
    spread = np.sqrt(np.maximum(variance - np.square(mean), least_spread**2))
    scores: Floats = (values - mean) / spread
    return scores


def _mean_of_others(values: Floats, window: int) -> Floats:
    running = np.concatenate((np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)))
    index = np.arange(len(values))
    low, high = np.maximum(index - window + 1, 0), np.minimum(index + window, len(values))
    rest = running[-1] - (running[high] - running[low])
    mean: Floats = rest / (len(values) - (high - low))[:, None]
    return mean


# Of the mean of N ranks, kept off 0 and 1 by half a rank.
def _logit(rank: Floats, count: int) -> Floats:
    kept = np.clip(rank, 0.5 / count, 1.0 - 0.5 / count)
    logit: Floats = np.log(kept / (1.0 - kept))
    return logit


# In single precision, as live rows arrive: equal values stay equal.
def _checked(name: str, values: npt.NDArray[Any], least: int) -> npt.NDArray[np.float32]:
    if len(values) < least:
        raise DataError(f"drift: {name}: expected at least {least} rows, was {len(values)}")
    with np.errstate(over="ignore"):
        rows = values.astype(np.float32)
    if not np.isfinite(rows).all():
        raise DataError(f"drift: {name}: expected finite numbers, {int((~np.isfinite(rows)).sum())} are not")
    return rows


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Counts = Annotated[tuple[Annotated[StrictInt, Bounds(ge=0)], ...], Bounds(min_length=NUM_BINS, max_length=NUM_BINS)]
Edges = Annotated[tuple[StrictFloat, ...], Bounds(min_length=NUM_BINS - 1, max_length=NUM_BINS - 1)]
Positive = Annotated[StrictFloat, Bounds(gt=0.0)]


class _Tail(_Part):
    mean: StrictFloat
    std: Positive
    skew: Annotated[StrictFloat, Bounds(ge=0.0, le=GUMBEL_SKEW)]
    windows: Annotated[StrictFloat, Bounds(ge=1.0)]


class _Baseline(_Part):
    centre: tuple[StrictFloat, ...]
    spread: tuple[Positive, ...]
    tail: _Tail

    def baseline(self) -> Baseline:
        return Baseline(np.array(self.centre), np.array(self.spread), Tail(**self.tail.model_dump()))


class _NllBaseline(_Part):
    mean: StrictFloat
    quantiles: Annotated[tuple[StrictFloat, ...], Bounds(min_length=len(_PERCENT), max_length=len(_PERCENT))]
    tail: _Tail

    def baseline(self) -> NllBaseline:
        return NllBaseline(self.mean, np.array(self.quantiles), Tail(**self.tail.model_dump()))


class _File(_Part):
    format_version: Literal[1]
    names: Annotated[tuple[StrictStr, ...], Bounds(min_length=1)]
    window: Annotated[StrictInt, Bounds(ge=NUM_BINS)]
    edges: tuple[Edges, ...]
    counts: tuple[Counts, ...]
    psi_expected: tuple[StrictFloat, ...]
    psi: _Baseline
    ks: _Baseline
    nll: _NllBaseline | None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names: expected each once, was {list(self.names)}")
        per_name = {
            "edges": self.edges,
            "counts": self.counts,
            "psi_expected": self.psi_expected,
            **{f"{name}.centre": getattr(self, name).centre for name in ("psi", "ks")},
            **{f"{name}.spread": getattr(self, name).spread for name in ("psi", "ks")},
        }
        for name, values in per_name.items():
            if len(values) != len(self.names):
                raise ValueError(f"{name}: expected {len(self.names)} entries, one per name, was {len(values)}")
        if any(list(cuts) != sorted(cuts) for cuts in self.edges):
            raise ValueError("edges: expected ascending numbers for every name")
        if self.nll is not None and list(self.nll.quantiles) != sorted(self.nll.quantiles):
            raise ValueError("nll.quantiles: expected ascending numbers")
        rows = {sum(counts) for counts in self.counts}
        if len(rows) != 1 or rows == {0}:
            raise ValueError(f"counts: expected the same number of rows for every name, was {sorted(rows)}")
        return self
