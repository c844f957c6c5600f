"""Drift: whether the newest bars are of the kind training saw, and whether the world model still foresees them.

`DriftReference` (`serving.drift.reference`) says what training saw and how far its own windows stray; `DriftMonitor`
keeps the newest window of live bars and says how far it is from that. A level is reached where a statistic is beyond
what windows of the training rows reach at the given rate, and the change is large enough to matter.

What it cannot see: a change of level in a feature whose memory is as long as the window, because such a feature spends
most windows far from its mean anyway; and columns that stood still in training, which are not watched.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from serving.drift.reference import DRIFT_FILE, NUM_BINS, DriftReference
from serving.drift.statistics import Floats, kolmogorov_distance, kolmogorov_p, possible_bins, stability_index

__all__ = ["DRIFT_FILE", "DriftLevel", "DriftMonitor", "DriftReference", "DriftSettings", "DriftStatus"]

_FAMILIES = 3
"""PSI, KS and NLL share the rate of false alarms."""


class DriftLevel(StrEnum):
    """How far the newest bars are from training."""

    OK = "ok"
    WARNING = "warning"
    ALARM = "alarm"


@dataclass(frozen=True, kw_only=True)
class DriftSettings:
    """When to warn. Raises: ValueError naming the field."""

    psi_warning: float = 0.1
    """Least excess of PSI over its expectation that may count; 0.1 and 0.25 are the usual convention."""
    psi_alarm: float = 0.25
    warning_rate: float = 0.01
    """Share of windows without drift that reach the level, all features and statistics together."""
    alarm_rate: float = 0.001

    def __post_init__(self) -> None:
        if not 0.0 <= self.psi_warning <= self.psi_alarm < math.inf:
            raise ValueError(
                f"drift: expected 0 <= psi_warning <= psi_alarm, was {self.psi_warning} and {self.psi_alarm}"
            )
        if not 0.0 < self.alarm_rate <= self.warning_rate < 0.5:
            raise ValueError(
                f"drift: expected 0 < alarm_rate <= warning_rate < 0.5, was {self.alarm_rate} and {self.warning_rate}"
            )


@dataclass(frozen=True, kw_only=True)
class DriftStatus:
    """What the newest window looks like."""

    bars: int
    """Bars seen so far, at most the window; there is no verdict before it is full."""
    psi: dict[str, float]
    """Excess of PSI over its expectation without drift, by watched feature; empty before the window is full."""
    ks: dict[str, float]
    """Asymptotic p-value of the KS distance by watched feature, corrected for autocorrelation, not for their number."""
    nll_mean: float | None
    """Over the bars of the window that have one; None where fewer than half do, or the reference has none."""
    nll_z: float | None
    """How far their mean rank among validation rows is above the usual, in standard deviations of windows."""
    level: DriftLevel
    worst: str | None
    """Feature furthest from training, None before the window is full or where none is watched."""
    words: str
    """One sentence for a log or a page."""


class DriftMonitor:
    """The newest window of live bars against a reference. Safe to call from several threads.

    After a restart, feed it the newest `reference.window` recorded bars again, oldest first.
    """

    def __init__(self, reference: DriftReference, settings: DriftSettings | None = None) -> None:
        self.reference = reference
        self.settings = DriftSettings() if settings is None else settings
        self._columns = np.arange(len(reference.names))
        self._watched: list[int] = np.flatnonzero(reference.watched).tolist()
        self._names = [reference.names[column] for column in self._watched]
        self._possible = possible_bins(reference.edges)
        self._independent = reference.independent_bars
        rates = (self.settings.warning_rate / _FAMILIES, self.settings.alarm_rate / _FAMILIES)
        tails = {
            "psi": reference.psi.tail,
            "ks": reference.ks.tail,
            "nll": None if reference.nll is None else reference.nll.tail,
        }
        self._limits = {name: tuple(map(tail.limit, rates)) for name, tail in tails.items() if tail is not None}
        self._bins = np.zeros((reference.window, len(reference.names)), dtype=np.int64)
        self._nll = np.full(reference.window, np.nan)
        self._counts = np.zeros((len(reference.names), NUM_BINS), dtype=np.int64)
        self._seen = 0
        self._newest = -math.inf
        self._status: DriftStatus | None = None
        self._lock = threading.Lock()

    def observe(self, features: npt.NDArray[np.floating], nll: float | None = None, *, bar_time: float) -> bool:
        """Take in a bar; each counts once.

        Args:
            features: [M], raw units, as in `reference.names`.
            nll: of this bar under the world model's forecast from the bar before, nats per feature; None, NaN and
                infinity count as unknown.
            bar_time: seconds since 1970 UTC.

        Returns: False for a bar that is not newer than the newest, or has NaN or infinity: it is left out.
        Raises: ValueError on shape.
        """
        if features.shape != self._columns.shape:
            raise ValueError(f"drift: features: expected [{len(self._columns)}], was {list(features.shape)}")
        with np.errstate(over="ignore"):
            row = features.astype(np.float32)
        if not np.isfinite(row).all():
            return False
        bins = (self.reference.edges < row[:, None]).sum(axis=1)
        with self._lock:
            if not bar_time > self._newest:
                return False
            slot = self._seen % self.reference.window
            if self._seen >= self.reference.window:
                self._counts[self._columns, self._bins[slot]] -= 1
            self._counts[self._columns, bins] += 1
            self._bins[slot] = bins
            self._nll[slot] = math.nan if nll is None or not math.isfinite(nll) else nll
            self._seen += 1
            self._newest = bar_time
            self._status = None
        return True

    def status(self) -> DriftStatus:
        """The verdict on the newest window; computed once per bar."""
        with self._lock:
            if self._status is None:
                self._status = self._judge()
            return self._status

    def _judge(self) -> DriftStatus:
        reference, window = self.reference, self.reference.window
        if self._seen < window:
            words = f"{self._seen} of {window} bars seen, no verdict yet"
            return DriftStatus(
                bars=self._seen, psi={}, ks={}, nll_mean=None, nll_z=None, level=DriftLevel.OK, worst=None, words=words
            )
        index = stability_index(self._counts, reference.counts, self._possible)
        distance = kolmogorov_distance(self._counts, reference.counts)
        excess = index - reference.psi_expected
        p = kolmogorov_p(distance * np.sqrt(self._independent))
        scores = {"psi": reference.psi.scores(np.cbrt(index)), "ks": reference.ks.scores(np.sqrt(distance))}
        found: list[tuple[DriftLevel, str]] = []
        for family, values in scores.items():
            for column in self._watched:
                material = excess[column] if family == "psi" else math.inf
                level = self._level(family, float(values[column]), float(material))
                if level is not DriftLevel.OK:
                    found.append((level, self._describe(family, column, excess, distance)))
        nll_mean, nll_z, nll_level = self._judge_nll()
        if reference.nll is not None and nll_level is not DriftLevel.OK:
            found.append((nll_level, f"mean NLL is {nll_mean:.3f}, {reference.nll.mean:.3f} on validation rows"))
        level = max((one for one, _ in found), key=list(DriftLevel).index, default=DriftLevel.OK)
        return DriftStatus(
            bars=window,
            psi=dict(zip(self._names, excess[self._watched].tolist(), strict=True)),
            ks=dict(zip(self._names, p[self._watched].tolist(), strict=True)),
            nll_mean=nll_mean,
            nll_z=nll_z,
            level=level,
            worst=self._worst(scores),
            words=self._words(level, found),
        )

    def _level(self, family: str, score: float, material: float) -> DriftLevel:
        warning, alarm = self._limits[family]
        floors = {name: getattr(self.settings, f"{family}_{name}", 0.0) for name in ("warning", "alarm")}
        if score > alarm and material >= floors["alarm"]:
            return DriftLevel.ALARM
        return DriftLevel.WARNING if score > warning and material >= floors["warning"] else DriftLevel.OK

    def _judge_nll(self) -> tuple[float | None, float | None, DriftLevel]:
        baseline = self.reference.nll
        # Oldest first, so that sums do not depend on when the window was begun.
        series = np.roll(self._nll, -self._seen)
        known = series[np.isfinite(series)]
        if baseline is None or 2 * len(known) < len(self._nll):
            return None, None, DriftLevel.OK
        # Fewer bars, a wider distribution of their mean.
        score = baseline.score(known) * math.sqrt(len(known) / len(self._nll))
        z = (score - baseline.tail.mean) / baseline.tail.std
        return float(known.mean()), z, self._level("nll", score, math.inf)

    def _describe(self, family: str, column: int, excess: Floats, distance: Floats) -> str:
        name = self.reference.names[column]
        if family == "psi":
            return f"{name}: PSI is {excess[column]:.2f} above its expectation"
        return f"{name}: KS distance is {distance[column]:.2f}"

    def _worst(self, scores: dict[str, Floats]) -> str | None:
        if not self._names:
            return None
        largest = np.maximum(scores["psi"], scores["ks"])[self._watched]
        return self._names[int(largest.argmax())]

    def _words(self, level: DriftLevel, found: list[tuple[DriftLevel, str]]) -> str:
        if level is DriftLevel.OK:
            return f"the newest {self.reference.window} bars are of the kind training saw"
        reasons = [text for one, text in found if one is level]
        more = f", and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        return f"{level} in the newest {self.reference.window} bars: {'; '.join(reasons[:3])}{more}"
