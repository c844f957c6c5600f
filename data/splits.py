"""Walk-forward windows: train on the past, choose on the next stretch, report on the one after.

::

    fold 0   |--- train ---|purge|- validation -|purge|- test -|
    fold 1             |--- train ---|purge|- validation -|purge|- test -|
                       <- step ->                                        ^ last row

Rows in `purge` belong to no window: features look back over many bars and imagined branches look ahead, so
without the gap a training row would share bars with a validation row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from data.errors import HistoryError


class SplitSettings(Protocol):
    """Window lengths in years; `configs.schema.SplitConfig` is one (see `data.bars.SourceSettings`)."""

    @property
    def train_years(self) -> float | None:
        """Length of the training window; None takes every row before the validation window."""
        ...

    @property
    def validation_years(self) -> float:
        """Length of the validation window."""
        ...

    @property
    def test_years(self) -> float:
        """Length of the test window."""
        ...

    @property
    def step_years(self) -> float:
        """Distance between consecutive folds."""
        ...


@dataclass(frozen=True)
class Split:
    """One fold as row ranges of a feature table; each slice has plain start and stop."""

    train: slice
    validation: slice
    test: slice


def walk_forward_splits(num_rows: int, config: SplitSettings, bars_per_year: int, purge: int) -> list[Split]:
    """Return every fold that fits, oldest first; the last one ends at the last row.

    Args:
        num_rows: rows of the feature table.
        config: window lengths in years. With `train_years` None the training window takes all earlier rows
            and must be at least as long as the validation window.
        bars_per_year: rows per year.
        purge: rows dropped between two windows; the caller passes feature lookback plus rollout length.

    Raises: HistoryError if not even one fold fits or a window rounds to no bars; ValueError if purge < 0.
    """
    if purge < 0:
        raise ValueError(f"purge: expected at least 0 rows, was {purge}")
    validation = _bars("validation_years", config.validation_years, bars_per_year)
    test = _bars("test_years", config.test_years, bars_per_year)
    step = _bars("step_years", config.step_years, bars_per_year)
    fixed = None if config.train_years is None else _bars("train_years", config.train_years, bars_per_year)
    needed = (validation if fixed is None else fixed) + validation + test + 2 * purge
    if needed > num_rows:
        raise HistoryError(
            f"data.split: window needs {needed} bars, {num_rows} available "
            f"(train {validation if fixed is None else fixed}, validation {validation}, test {test}, "
            f"purge 2 x {purge}); shorten the windows or supply more history"
        )
    folds = []
    for end in range(num_rows, needed - 1, -step):
        test_start = end - test
        validation_start = test_start - purge - validation
        train_stop = validation_start - purge
        folds.append(
            Split(
                train=slice(0 if fixed is None else train_stop - fixed, train_stop),
                validation=slice(validation_start, validation_start + validation),
                test=slice(test_start, end),
            )
        )
    return folds[::-1]


def _bars(name: str, years: float, bars_per_year: int) -> int:
    bars = round(years * bars_per_year)
    if bars < 1:
        raise HistoryError(f"data.split.{name}: expected at least one bar, was {years:g} years of {bars_per_year} bars")
    return bars
