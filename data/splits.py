"""Walk-forward windows: train on the past, choose on the next stretch, report on the one after.

::

    fold 0   |--- train ---|purge|- validation -|purge|- test -|
    fold 1             |--- train ---|purge|- validation -|purge|- test -|
                       <- step ->                                        ^ last row

Rows in `purge` belong to no window: features look back over many bars and imagined branches look ahead, so
without the gap a training row would share bars with a validation row. An *embargo* (Lopez de Prado, Advances in
Financial Machine Learning, 2018, section 7.4.2) drops further rows after each window that something was learned or
chosen on, because returns and volatility stay correlated beyond the shared bars. There it follows test windows, since
training resumes after them; here training always comes first, so it follows training and validation and widens the gap.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Protocol

from data.errors import DataError, HistoryError


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


def walk_forward_splits(
    num_rows: int, config: SplitSettings, bars_per_year: int, purge: int, *, embargo: int = 0
) -> list[Split]:
    """Return every fold that fits, oldest first; the last one ends at the last row.

    Args:
        num_rows: rows of the feature table.
        config: window lengths in years. With `train_years` None the training window takes all earlier rows
            and must be at least as long as the validation window.
        bars_per_year: rows per year.
        purge: rows dropped between two windows; the caller passes feature lookback plus rollout length.
        embargo: further rows dropped after the training and after the validation window.

    Raises: HistoryError if not even one fold fits or a window rounds to no bars; ValueError if purge or embargo < 0.
    """
    for name, rows in (("purge", purge), ("embargo", embargo)):
        if rows < 0:
            raise ValueError(f"{name}: expected at least 0 rows, was {rows}")
    gap = purge + embargo
    validation = _bars("validation_years", config.validation_years, bars_per_year)
    test = _bars("test_years", config.test_years, bars_per_year)
    step = _bars("step_years", config.step_years, bars_per_year)
    fixed = None if config.train_years is None else _bars("train_years", config.train_years, bars_per_year)
    needed = (validation if fixed is None else fixed) + validation + test + 2 * gap
    if needed > num_rows:
        gaps = f"purge 2 x {purge}" + (f", embargo 2 x {embargo}" if embargo else "")
        raise HistoryError(
            f"data.split: window needs {needed} bars, {num_rows} available "
            f"(train {validation if fixed is None else fixed}, validation {validation}, test {test}, "
            f"{gaps}); shorten the windows or supply more history"
        )
    folds = []
    for end in range(num_rows, needed - 1, -step):
        test_start = end - test
        validation_start = test_start - gap - validation
        train_stop = validation_start - gap
        folds.append(
            Split(
                train=slice(0 if fixed is None else train_stop - fixed, train_stop),
                validation=slice(validation_start, validation_start + validation),
                test=slice(test_start, end),
            )
        )
    for fold in folds:
        check_split(fold, num_rows=num_rows, gap=gap)
    return folds[::-1]


def check_split(split: Split, *, num_rows: int | None = None, gap: int = 0) -> None:
    """Refuse windows of a user that are empty, overlap, stand in the wrong order or too close, or leave the table.

    Args:
        split: the windows.
        num_rows: rows of the feature table; None where it is not known yet.
        gap: rows that must lie between two windows, purge plus embargo.

    Raises: DataError naming the windows and their rows.
    """
    windows = {"train": split.train, "validation": split.validation, "test": split.test}
    for name, window in windows.items():
        # None and negative ends, which a slice may have, would make the comparisons below meaningless.
        plain = isinstance(window.start, Integral) and isinstance(window.stop, Integral) and window.step in (None, 1)
        if not (plain and 0 <= window.start < window.stop):
            raise DataError(f"data.split.{name}: expected 0 <= first row < end, was {_rows(window)}")
        if num_rows is not None and window.stop > num_rows:
            raise DataError(f"data.split.{name}: expected to end by row {num_rows}, was {_rows(window)}")
    for (name, window), (later, after) in pairwise(windows.items()):
        if after.start < window.stop + gap:
            raise DataError(
                f"data.split.{later}: expected to start at row {window.stop + gap} or later, {gap} rows after {name} "
                f"{_rows(window)}, was {_rows(after)}; move or shorten one of the two"
            )


def _rows(window: slice) -> str:
    step = "" if window.step in (None, 1) else f":{window.step}"
    return f"[{window.start}:{window.stop}{step}]"


def _bars(name: str, years: float, bars_per_year: int) -> int:
    bars = round(years * bars_per_year)
    if bars < 1:
        raise HistoryError(f"data.split.{name}: expected at least one bar, was {years:g} years of {bars_per_year} bars")
    return bars
