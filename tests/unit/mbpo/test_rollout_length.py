from __future__ import annotations

import pytest

from mbpo.rollout_length import RolloutLength


def test_a_ramp_is_flat_linear_and_flat_again() -> None:
    lengths = RolloutLength(1, 5, 0.2, 0.6)
    assert [lengths(done) for done in (0.0, 0.2, 0.299, 0.301, 0.5, 0.599, 0.6, 1.0)] == [1, 1, 1, 2, 4, 4, 5, 5]


def test_equal_ends_are_constant() -> None:
    assert {RolloutLength(3, 3)(done) for done in (0.0, 0.5, 1.0)} == {3}


@pytest.mark.parametrize("settings", [(0, 3), (4, 3), (1, 3, 0.5, 0.5), (1, 3, -0.1, 0.5), (1, 3, 0.5, 1.1)])
def test_ramps_that_do_not_ascend_are_refused(settings: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rollout length: expected"):
        RolloutLength(*settings)  # type: ignore[arg-type]
