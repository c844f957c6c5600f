import numpy as np
import pytest
from scipy.stats import binom

from world_model.mask_bound import (
    MaskBoundError,
    bound_threshold,
    false_valid_upper_bound,
    mask_errors,
    one_invalid_pair_per_group,
    trials_needed,
)


def test_bound_without_errors_is_solved_by_hand():
    # (1 - p)**n = 0.05
    assert false_valid_upper_bound(0, 10, 0.95) == pytest.approx(1.0 - 0.05**0.1)
    assert false_valid_upper_bound(0, 1, 0.95) == pytest.approx(0.95)
    assert false_valid_upper_bound(0, 0, 0.95) == 1.0
    assert false_valid_upper_bound(7, 7, 0.95) == 1.0


@pytest.mark.parametrize(("errors", "trials"), [(0, 50), (1, 50), (7, 50), (49, 50), (3, 7752)])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_at_the_bound_so_few_errors_are_exactly_as_unlikely_as_claimed(errors, trials, confidence):
    bound = false_valid_upper_bound(errors, trials, confidence)
    assert binom.cdf(errors, trials, bound) == pytest.approx(1.0 - confidence)


def test_a_rate_of_one_in_a_thousand_needs_2995_groups_without_an_error():
    assert [trials_needed(1e-3, 0.95, errors) for errors in range(4)] == [2995, 4742, 6294, 7752]
    assert 0.999**2995 <= 0.05 < 0.999**2994


@pytest.mark.parametrize("target", [0.03, 0.1, 0.6])
def test_needed_trials_equal_those_found_by_counting_up(target):
    for errors in range(5):
        counted = next(n for n in range(errors, 1000) if false_valid_upper_bound(errors, n, 0.9) <= target)
        assert trials_needed(target, 0.9, errors) == counted


@pytest.mark.parametrize(
    "call",
    [
        lambda: false_valid_upper_bound(3, 2, 0.95),
        lambda: false_valid_upper_bound(-1, 2, 0.95),
        lambda: false_valid_upper_bound(0, 2, 1.0),
        lambda: trials_needed(0.0, 0.95),
        lambda: trials_needed(float("nan"), 0.95),
        lambda: trials_needed(0.1, 0.0),
        lambda: trials_needed(0.1, 0.95, -1),
    ],
)
def test_counts_and_fractions_that_mean_nothing_are_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call()


def test_each_group_gives_one_of_its_own_invalid_pairs():
    rng = np.random.default_rng(0)
    masks = rng.random((400, 5)) < 0.6
    groups = rng.permutation(np.repeat(rng.integers(-9_000, 9_000, 40), 10))  # interleaved, any ids
    masks[groups == groups[0]] = True
    rows, actions = one_invalid_pair_per_group(masks, groups, rng)
    assert not masks[rows, actions].any()
    with_invalid = {group for group in groups if not masks[groups == group].all()}
    assert len(rows) == len(with_invalid) < len(set(groups))
    assert set(groups[rows]) == with_invalid


def test_pairs_of_a_group_are_drawn_uniformly():
    masks = np.array([[True, False, False], [False, True, True], [False, True, False], [True, True, False]])
    groups = np.array([4, 4, 4, -1])
    rng, draws = np.random.default_rng(0), 5000
    seen = np.zeros((4, 3))
    for _ in range(draws):
        rows, actions = one_invalid_pair_per_group(masks, groups, rng)
        np.add.at(seen, (rows, actions), 1)
    assert seen[3].tolist() == [0, 0, draws]
    # five invalid pairs; four standard errors of a share of 1/5
    shares = seen[:3][~masks[:3]] / draws
    assert shares == pytest.approx(np.full(5, 0.2), abs=4.0 * (0.2 * 0.8 / draws) ** 0.5)


def scores_of(*high, trials):
    return np.array([*high, *[-5.0] * (trials - len(high))])


def test_the_loosest_threshold_before_the_first_failure_is_taken():
    # 10 % at 95 %: 0 errors need 29 trials, 1 error 46, 2 errors 61
    thresholds = np.array([3.0, 2.0, 1.5, 1.0, 0.0])
    bound = bound_threshold(scores_of(2.0, 1.0, trials=46), thresholds, target=0.1, confidence=0.95)
    assert (bound.threshold, bound.errors, bound.trials) == (1.5, 1, 46)
    assert (bound.passed, bound.candidates) == (3, 5)
    assert bound.upper_bound == false_valid_upper_bound(1, 46, 0.95) <= 0.1
    assert bound.probability == pytest.approx(1.0 / (1.0 + np.exp(-1.5)))


def test_a_score_at_the_threshold_counts_as_an_error():
    bound = bound_threshold(scores_of(1.0, 1.0, trials=46), np.array([2.0, 1.0]), target=0.1, confidence=0.95)
    assert (bound.threshold, bound.errors) == (2.0, 0)


def test_refusal_says_what_was_seen_and_what_is_needed():
    with pytest.raises(
        MaskBoundError, match=r"at most 0\.1 at 95% confidence, best bound was 0\.139: 0 errors in 20 "
    ) as e:
        bound_threshold(scores_of(trials=20), np.array([1.0, 0.0]), target=0.1, confidence=0.95)
    assert "0 errors need 29 groups" in str(e.value)
    assert (e.value.trials, e.value.errors, e.value.needed) == (20, 0, 29)
    assert e.value.upper_bound == pytest.approx(1.0 - 0.05 ** (1 / 20))
    with pytest.raises(MaskBoundError) as e:
        bound_threshold(scores_of(9.0, 9.0, trials=46), np.array([1.0, 0.0]), target=0.1, confidence=0.95)
    assert (e.value.errors, e.value.needed) == (2, 61)


@pytest.mark.parametrize("thresholds", [[], [1.0, 1.0], [0.0, 1.0], [np.inf, 0.0], [1.0, np.nan], [[1.0]]])
def test_thresholds_that_are_no_sequence_are_refused(thresholds):
    with pytest.raises(ValueError, match="thresholds: expected"):
        bound_threshold(scores_of(trials=99), np.array(thresholds), target=0.1, confidence=0.95)


def test_scores_without_a_number_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        bound_threshold(scores_of(np.nan, trials=99), np.array([1.0]), target=0.1, confidence=0.95)


# 93 groups of six rows, one invalid pair each. At threshold 1 a tenth of the groups call half of their pairs valid:
# a false-valid rate of 0.0505, just above the target 0.05. Stricter thresholds are fine.
GROUPS, SIZE, TARGET = 93, 6, 0.05
THRESHOLDS = np.array([4.0, 3.0, 2.0, 1.0])


def share_of_broken_promises(repetitions, trial_of_row):
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(GROUPS), SIZE)
    masks = np.tile([True, False], (GROUPS * SIZE, 1))
    broken = 0
    for _ in range(repetitions):
        level = rng.choice([0.0, 1.0, 2.0, 3.0], GROUPS, p=[0.899, 0.093, 0.006, 0.002])
        second_half = np.arange(SIZE) >= SIZE // 2
        scores = (level[:, None] * second_half).ravel()
        rows, _ = one_invalid_pair_per_group(masks, trial_of_row(groups), rng)
        try:
            bound = bound_threshold(scores[rows], THRESHOLDS, target=TARGET, confidence=0.95)
        except MaskBoundError:
            continue
        broken += bound.threshold == 1.0
    return broken / repetitions


def test_the_promise_is_broken_in_at_most_five_percent_of_repetitions():
    repetitions = 2000
    share = share_of_broken_promises(repetitions, lambda groups: groups)
    # Three standard errors above 5 %; the chance is 4.8 % at this rate, so a bound that is too wide would show as well.
    slack = 3.0 * (0.05 * 0.95 / repetitions) ** 0.5
    assert 0.048 - slack < share < 0.05 + slack


def test_rows_of_one_episode_as_trials_would_break_it():
    assert share_of_broken_promises(500, lambda groups: np.arange(len(groups))) > 0.1


def test_errors_counted_by_hand():
    predicted = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=bool)
    actual = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]], dtype=bool)
    errors = mask_errors(predicted, actual, np.array([7, 7, 8, 9]), safe_action=0)
    assert (errors.rows, errors.groups) == (4, 3)
    # group 7 has invalid pairs (0,2) (1,1) (1,2) (1,3), two called valid; group 9 has two, none; group 8 has none
    assert errors.false_valid == pytest.approx((2 / 4 + 0 / 2) / 2)
    assert errors.false_valid_pairs == pytest.approx(2 / 6)
    assert errors.false_valid_by_action == pytest.approx((0.0, 1 / 1, 1 / 3, 0.0))
    # valid beside action 0: (0,1) kept, (0,3) (2,1) (2,2) (2,3) (3,1) lost
    assert errors.false_invalid == pytest.approx(5 / 6)
    assert errors.refused == 1 / 4
    assert errors.invalid_choices == pytest.approx((0 / 2 + 2 / 3 + 0 / 1) / 3)


def test_without_a_safe_action_every_column_counts():
    predicted, actual = np.array([[True, False]]), np.array([[False, True]])
    errors = mask_errors(predicted, actual, np.array([0]), safe_action=None)
    assert (errors.false_valid, errors.false_invalid, errors.invalid_choices) == (1.0, 1.0, 1.0)


def test_errors_of_perfect_masks_are_zero():
    actual = np.random.default_rng(0).random((50, 4)) < 0.5
    actual[:, 1] = True
    errors = mask_errors(actual, actual, np.arange(50), safe_action=1)
    assert (errors.false_valid, errors.false_valid_pairs, errors.false_invalid, errors.refused) == (0, 0, 0, 0)
