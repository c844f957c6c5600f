from __future__ import annotations

import numpy as np
import pytest

from mbpo import StartBuffer


def filled(count: int, capacity: int = 4) -> StartBuffer:
    """Replayed rows 100 and 101, then `count` visits 0, 1, ..."""
    buffer = StartBuffer(np.array([100, 101]), np.full((2, 2), [[100], [101]], np.float32), capacity=capacity)
    for index in range(count):
        buffer.add(np.array([index]), np.full((1, 2), index, np.float32))
    return buffer


def drawn(buffer: StartBuffer, count: int = 400) -> set[int]:
    return set(buffer.sample(count, np.random.default_rng(0))[0].tolist())


def test_the_oldest_visits_are_overwritten_and_replayed_states_never() -> None:
    buffer = filled(6)
    assert len(buffer) == 6
    assert drawn(buffer) == {100, 101, 2, 3, 4, 5}


def test_rows_and_states_stay_together() -> None:
    rows, states = filled(6).sample(100, np.random.default_rng(0))
    np.testing.assert_array_equal(states[:, 0], rows)


def test_more_visits_than_capacity_keep_the_newest() -> None:
    buffer = filled(0, capacity=3)
    buffer.add(np.arange(10), np.arange(20, dtype=np.float32).reshape(10, 2))
    assert drawn(buffer) == {100, 101, 7, 8, 9}


def test_only_filled_places_are_drawn() -> None:
    assert drawn(filled(0)) == {100, 101}
    assert drawn(filled(1)) == {100, 101, 0}


def test_nothing_replayed_is_an_error() -> None:
    with pytest.raises(ValueError, match="N >= 1 rows"):
        StartBuffer(np.zeros(0, np.int64), np.zeros((0, 2), np.float32), capacity=2)
