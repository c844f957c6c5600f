"""The audit counts executed actions and those their mask forbade, whatever the check before it let through."""

from __future__ import annotations

import numpy as np
import pytest

from masking import ActionAudit, valid_actions

MASKS = np.array([[True, False, True], [True, True, False]])


def test_counted_by_hand() -> None:
    audit = ActionAudit()
    audit.record(np.array([0, 1]), MASKS)
    audit.record(np.array([2, 0]), MASKS)
    assert audit == ActionAudit(executed=4, invalid=0)
    audit.record(np.array([1, 2]), MASKS)
    audit.record(np.array([0, 2]), MASKS)
    assert audit == ActionAudit(executed=8, invalid=3)
    assert audit.as_metrics() == {"executed_actions": 8.0, "invalid_actions": 3.0}


@pytest.mark.parametrize("action", [-1, 3, 99])
def test_an_action_that_does_not_exist_is_invalid_even_where_everything_is_allowed(action: int) -> None:
    audit = ActionAudit()
    audit.record(np.array([action, 0]), np.ones((2, 3), dtype=bool))
    assert audit == ActionAudit(executed=2, invalid=1)


def test_a_row_counts_once_however_many_dimensions_are_wrong() -> None:
    audit = ActionAudit()
    # Dimensions of 2 and 3 actions: row 0 is right, row 1 wrong in one, row 2 in both.
    masks = np.array([[True, False, False, True, False]] * 3)
    audit.record(np.array([[0, 1], [0, 2], [1, 0]]), masks, (2, 3))
    assert audit == ActionAudit(executed=3, invalid=2)


def test_an_action_of_one_dimension_is_not_looked_up_in_the_next() -> None:
    # Flat column 2 is action 0 of the second dimension; as action 2 of the first it does not exist.
    audit = ActionAudit()
    audit.record(np.array([[2, 0]]), np.ones((1, 5), dtype=bool), (2, 3))
    assert audit.invalid == 1


def test_it_agrees_with_the_check_it_audits() -> None:
    rng, sizes = np.random.default_rng(0), (3, 2, 5)
    masks, actions = rng.random((5000, 10)) < 0.6, rng.integers(-1, 6, (5000, 3))
    actions %= np.array([4, 3, 6])
    audit = ActionAudit()
    audit.record(actions, masks, sizes)
    valid = valid_actions(actions, masks, sizes)
    assert 0 < valid.sum() < 5000
    assert audit == ActionAudit(executed=5000, invalid=int((~valid).sum()))


def test_a_wrong_number_of_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match="argument"):
        ActionAudit().record(np.zeros((2, 3), dtype=int), np.ones((2, 4), dtype=bool), (2, 2))
