"""Walk-forward windows: disjoint, in order, purged, and ending at the last row."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import SplitConfig
from data.errors import HistoryError
from data.splits import Split, walk_forward_splits

YEARS = st.integers(1, 40).map(lambda tenths: tenths / 10)


def test_two_folds_worked_by_hand() -> None:
    config = SplitConfig(train_years=2, validation_years=1, test_years=0.5, step_years=0.5)
    # 10 bars a year: 20 + 3 + 10 + 3 + 5 = 41 rows a fold, 5 rows a step
    assert walk_forward_splits(50, config, bars_per_year=10, purge=3) == [
        Split(slice(4, 24), slice(27, 37), slice(40, 45)),
        Split(slice(9, 29), slice(32, 42), slice(45, 50)),
    ]


def test_open_ended_training_window_takes_everything_before() -> None:
    config = SplitConfig(train_years=None, validation_years=1, test_years=1, step_years=1)
    assert walk_forward_splits(45, config, bars_per_year=10, purge=2) == [
        Split(slice(0, 11), slice(13, 23), slice(25, 35)),
        Split(slice(0, 21), slice(23, 33), slice(35, 45)),
    ]


@st.composite
def settings_of_any_kind(draw: st.DrawFn) -> SplitConfig:
    return SplitConfig(
        train_years=draw(st.none() | YEARS),
        validation_years=draw(YEARS),
        test_years=draw(YEARS),
        step_years=draw(YEARS),
    )


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    num_rows=st.integers(0, 2000),
    config=settings_of_any_kind(),
    bars_per_year=st.integers(1, 300),
    purge=st.integers(0, 150),
)
def test_folds_are_disjoint_ordered_purged_and_of_the_asked_length(
    num_rows: int, config: SplitConfig, bars_per_year: int, purge: int
) -> None:
    def bars(years: float) -> int:
        return round(years * bars_per_year)

    open_ended = config.train_years is None
    train = bars(config.validation_years if config.train_years is None else config.train_years)
    validation, test, step = bars(config.validation_years), bars(config.test_years), bars(config.step_years)
    if min(train, validation, test, step) < 1 or train + validation + test + 2 * purge > num_rows:
        with pytest.raises(HistoryError):
            walk_forward_splits(num_rows, config, bars_per_year, purge)
        return

    folds = walk_forward_splits(num_rows, config, bars_per_year, purge)
    assert folds[-1].test.stop == num_rows
    for fold in folds:
        windows = (fold.train, fold.validation, fold.test)
        lengths = [window.stop - window.start for window in windows]
        assert all(later.start - earlier.stop == purge for earlier, later in pairwise(windows))
        assert lengths[1:] == [validation, test]
        assert lengths[0] >= train if open_ended else lengths[0] == train
        assert fold.train.start == 0 if open_ended else fold.train.start >= 0
    assert all(later.test.stop - earlier.test.stop == step for earlier, later in pairwise(folds))
    first = folds[0].train
    assert (first.stop - train if open_ended else first.start) < step, "an earlier fold would have fitted"


def test_one_row_too_few_says_needed_and_available() -> None:
    config = SplitConfig(train_years=2, validation_years=1, test_years=0.5, step_years=0.5)
    assert len(walk_forward_splits(41, config, bars_per_year=10, purge=3)) == 1
    with pytest.raises(HistoryError, match="window needs 41 bars, 40 available"):
        walk_forward_splits(40, config, bars_per_year=10, purge=3)


@pytest.mark.parametrize("name", ["train_years", "validation_years", "test_years", "step_years"])
def test_window_that_rounds_to_no_bar_is_refused_by_name(name: str) -> None:
    config = SplitConfig(**{name: 0.04})
    with pytest.raises(HistoryError, match=rf"data.split.{name}: expected at least one bar, was 0.04 years of 10"):
        walk_forward_splits(1000, config, bars_per_year=10, purge=0)


def test_negative_purge_is_refused() -> None:
    with pytest.raises(ValueError, match="purge: expected at least 0 rows, was -1"):
        walk_forward_splits(1000, SplitConfig(), bars_per_year=10, purge=-1)
