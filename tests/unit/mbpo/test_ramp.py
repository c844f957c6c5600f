from __future__ import annotations

import pytest

from mbpo.ramp import Ramp


def test_a_ramp_is_flat_linear_and_flat_again() -> None:
    ramp = Ramp(1.0, 5.0, 0.25, 0.75)
    assert [ramp(done) for done in (0.0, 0.25, 0.375, 0.5, 0.75, 1.0)] == [1.0, 1.0, 2.0, 3.0, 5.0, 5.0]
    assert [Ramp(5, 1, 100, 200)(step) for step in (0, 150, 900)] == [5, 3, 1]


def test_equal_ends_are_constant() -> None:
    assert {Ramp(3, 3)(done) for done in (0.0, 0.3, 1.0)} == {3}


@pytest.mark.parametrize("ends", [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5)])
def test_ramps_without_a_length_are_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="ramp: expected 0 <= begin < end"):
        Ramp(1.0, 3.0, *ends)
