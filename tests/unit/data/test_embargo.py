"""The embargo widens the gap behind what was learned or chosen on; windows of a user are refused unless in order."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import SplitConfig
from data.errors import DataError, HistoryError
from data.splits import Split, check_split, walk_forward_splits

YEARS = st.integers(1, 30).map(lambda tenths: tenths / 10)


def test_two_folds_with_an_embargo_worked_by_hand() -> None:
    config = SplitConfig(train_years=2, validation_years=1, test_years=0.5, step_years=0.5)
    # 10 bars a year: 20 + (3 + 2) + 10 + (3 + 2) + 5 = 45 rows a fold, 5 rows a step
    assert walk_forward_splits(50, config, bars_per_year=10, purge=3, embargo=2) == [
        Split(slice(0, 20), slice(25, 35), slice(40, 45)),
        Split(slice(5, 25), slice(30, 40), slice(45, 50)),
    ]


def test_an_expanding_window_pays_for_the_embargo_with_its_newest_rows() -> None:
    config = SplitConfig(train_years=None, validation_years=1, test_years=1, step_years=1)
    (plain,) = walk_forward_splits(40, config, bars_per_year=10, purge=2)[-1:]
    (held_back,) = walk_forward_splits(40, config, bars_per_year=10, purge=2, embargo=3)[-1:]
    assert plain == Split(slice(0, 16), slice(18, 28), slice(30, 40))
    assert held_back == Split(slice(0, 10), slice(15, 25), slice(30, 40))


@given(
    num_rows=st.integers(0, 2000),
    train=st.none() | YEARS,
    windows=st.tuples(YEARS, YEARS, YEARS),
    bars_per_year=st.integers(10, 300),
    purge=st.integers(0, 80),
    embargo=st.integers(0, 80),
)
def test_every_fold_keeps_purge_and_embargo_between_its_windows(
    num_rows: int,
    train: float | None,
    windows: tuple[float, float, float],
    bars_per_year: int,
    purge: int,
    embargo: int,
) -> None:
    validation, test, step = windows
    config = SplitConfig(train_years=train, validation_years=validation, test_years=test, step_years=step)
    try:
        folds = walk_forward_splits(num_rows, config, bars_per_year, purge, embargo=embargo)
    except HistoryError:
        with pytest.raises(HistoryError):  # an embargo never makes a history long enough
            walk_forward_splits(num_rows, config, bars_per_year, purge, embargo=embargo + 1)
        return
    for fold in folds:
        check_split(fold, num_rows=num_rows, gap=purge + embargo)
        rows = [set(range(window.start, window.stop)) for window in (fold.train, fold.validation, fold.test)]
        assert sum(map(len, rows)) == len(set.union(*rows)), "a row is in two windows"
        assert all(min(later) - max(earlier) == purge + embargo + 1 for earlier, later in pairwise(rows))
    if embargo == 0:
        assert folds == walk_forward_splits(num_rows, config, bars_per_year, purge)


def test_one_row_too_few_counts_the_embargo() -> None:
    config = SplitConfig(train_years=2, validation_years=1, test_years=0.5, step_years=0.5)
    assert len(walk_forward_splits(45, config, bars_per_year=10, purge=3, embargo=2)) == 1
    with pytest.raises(HistoryError, match=r"needs 45 bars, 44 available .* purge 2 x 3, embargo 2 x 2"):
        walk_forward_splits(44, config, bars_per_year=10, purge=3, embargo=2)


def test_negative_embargo_is_refused() -> None:
    with pytest.raises(ValueError, match="embargo: expected at least 0 rows, was -1"):
        walk_forward_splits(1000, SplitConfig(), bars_per_year=10, purge=0, embargo=-1)


def test_windows_in_order_pass_up_to_the_last_row_and_the_exact_gap() -> None:
    check_split(Split(slice(0, 10), slice(10, 15), slice(15, 20)))
    check_split(Split(slice(0, 10), slice(13, 15), slice(18, 20)), num_rows=20, gap=3)
    check_split(Split(slice(*np.array([0, 10])), slice(13, 15), slice(18, 20, 1)), num_rows=20, gap=3)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            Split(slice(0, 10), slice(9, 15), slice(18, 20)),
            r"validation: expected .* row 10 .* train \[0:10\], was \[9:15",
        ),
        (
            Split(slice(0, 10), slice(10, 16), slice(15, 20)),
            r"test: expected .* row 16 .* validation \[10:16\], was \[15:",
        ),
        (
            Split(slice(15, 20), slice(0, 5), slice(5, 10)),
            r"validation: expected .* row 20 .* train \[15:20\], was \[0:5",
        ),
        (
            Split(slice(0, 20), slice(20, 25), slice(5, 10)),
            r"test: expected .* row 25 .* validation \[20:25\], was \[5:10",
        ),
    ],
    ids=["train in validation", "validation in test", "train after test", "test inside train"],
)
def test_overlapping_or_misplaced_windows_are_refused_with_both(split: Split, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_split(split)


def test_a_gap_one_row_short_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"validation: expected to start at row 13 or later, 3 rows after train \[0:10\]"
    ):
        check_split(Split(slice(0, 10), slice(12, 15), slice(18, 20)), gap=3)


@pytest.mark.parametrize(
    "window", [slice(7, 7), slice(9, 7), slice(-3, 8), slice(None, 8), slice(2, None), slice(2, 8, 2)]
)
def test_a_window_without_plain_rows_is_refused_by_name(window: slice) -> None:
    with pytest.raises(DataError, match=r"data.split.validation: expected 0 <= first row < end, was"):
        check_split(Split(slice(0, 1), window, slice(18, 20)))


def test_a_window_beyond_the_table_is_refused() -> None:
    with pytest.raises(DataError, match=r"data.split.test: expected to end by row 20, was \[18:21\]"):
        check_split(Split(slice(0, 10), slice(10, 15), slice(18, 21)), num_rows=20)
