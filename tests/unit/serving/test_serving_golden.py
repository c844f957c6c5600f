import json
import re

import numpy as np
import pytest

from serving import BundleFormatError, Golden, PlannerOutputs, PolicyOutputs
from serving.golden import GoldenPlan, difference, following_rows, number_apart, plan_difference, spared


def outputs(**changes):
    base = {
        "action": np.array([1, 0]),
        "probabilities": np.array([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]], dtype=np.float32),
        "action_masks": np.array([[True, True, False], [True, False, False]]),
        "value": np.array([2.0, 0.0], dtype=np.float32),
        "fallback": np.array([False, True]),
    }
    return PolicyOutputs(**{**base, **changes})


def test_equal_outputs_do_not_differ():
    assert difference(outputs(), outputs(), 0.0) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": np.array([0, 0])}, "action: row 0"),
        ({"action": np.array([7, 0])}, "action: expected 0 to 2"),
        ({"action": np.array([1, -1])}, "action: expected 0 to 2"),
        ({"action": np.array([1, 0], dtype=np.int32)}, "action: expected int64"),
        ({"probabilities": np.array([[0.26, 0.74, 0], [1, 0, 0]], dtype=np.float32)}, "probabilities: row 0"),
        ({"probabilities": np.array([[np.nan, 0.75, 0], [1, 0, 0]], dtype=np.float32)}, "probabilities: row 0"),
        ({"probabilities": np.array([[0.25, 0.75, 1e-9], [1, 0, 0]], dtype=np.float32)}, "probabilities of masked"),
        ({"action_masks": np.ones((2, 3), dtype=bool)}, "action_masks: row 0"),
        ({"value": np.array([2.1, 0], dtype=np.float32)}, "value: row 0"),
        ({"value": np.array([2, np.nan], dtype=np.float32)}, "value: row 1"),
        ({"fallback": np.array([False, False])}, "fallback: row 1"),
        ({"fallback": np.array([False])}, "fallback: expected bool"),
    ],
)
def test_each_difference_is_found_and_named(change, message):
    assert difference(outputs(), outputs(**change), 1e-3).startswith(message)


def test_actions_of_equal_probability_are_interchangeable_unless_masked():
    tied = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=np.float32)
    want = outputs(probabilities=tied)
    assert difference(want, outputs(probabilities=tied, action=np.array([0, 0])), 1e-5) is None
    untied = tied + np.array([[2e-6, -2e-6, 0], [0, 0, 0]], dtype=np.float32)
    want = outputs(probabilities=untied, action=np.array([0, 0]))
    assert difference(want, outputs(probabilities=untied), 1e-5).startswith("action: row 0")


def test_golden_survives_json_bit_for_bit():
    state = np.array([[0.1, np.nan], [1e-40, -3.4e38]], dtype=np.float32)
    golden = Golden(state, np.ones((2, 3), dtype=bool), outputs(), np.array([np.nan, 0.3], dtype=np.float32))
    again = Golden.from_dict(json.loads(json.dumps(golden.to_dict(), allow_nan=False)), 2, 3)
    np.testing.assert_array_equal(again.state, state)
    np.testing.assert_array_equal(again.uncertainty, golden.uncertainty)
    assert again.state.dtype == np.float32
    assert difference(golden.expected, again.expected, 0.0) is None


def test_infinity_cannot_become_golden():
    golden = Golden(np.array([[np.inf]], np.float32), np.ones((1, 3), bool), outputs(), np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="infinity"):
        golden.to_dict()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("state", [], "state: expected at least one row"),
        ("state", [[1.0], [1.0]], "state: expected float32"),
        ("state", [["x", 1.0], [1.0, 1.0]], "state: expected numbers"),
        ("action", [0.5, 1.0], "action: expected int64"),
        ("action", [1, 3], "golden: action: expected 0 to 2, was 3"),
        ("action", [-1, 0], "golden: action: expected 0 to 2, was -1"),
        ("action_masks", [[1, 1, 0], [1, 0, 0]], "action_masks: expected bool"),
        ("extra", [], "golden: expected"),
    ],
)
def test_malformed_golden_is_refused(name, value, message):
    golden = Golden(np.zeros((2, 2), np.float32), np.ones((2, 3), bool), outputs(), np.zeros(2, np.float32))
    with pytest.raises(BundleFormatError, match=message):
        Golden.from_dict({**golden.to_dict(), name: value}, 2, 3)


MASKS = np.array([[True, True, False], [True, True, True], [True, False, False]])
"""Three rows: a plan under a mask, a free plan, and one without a plan."""
PLAN = GoldenPlan(np.array([1, 2, 0]), np.array([2.0, 3.0, 0.0], dtype=np.float32), np.array([False, False, True]))


def plans(**changes):
    base = {
        "action": PLAN.action,
        "value": PLAN.value,
        "action_values": np.array([[1, 2, -np.inf], [3, 2, 3], [-np.inf] * 3], dtype=np.float32),
        "sequence": np.array([[1, 0], [2, 2], [0, 0]]),
        "action_masks": MASKS,
        "fallback": PLAN.fallback,
    }
    return PlannerOutputs(**{**base, **changes})


def compared(expected=PLAN, spare=0, **changes):
    return plan_difference(expected, plans(**changes), action_masks=MASKS, horizon=2, tolerance=1e-4, spare=spare)


def with_numbers(name, *changes):
    array = np.array(getattr(plans(), name))
    for place, number in changes:
        array[place] = number
    return {name: array}


def apart(*values, action=1):
    expected = np.array([*values, 0.0], dtype=np.float32)
    return PLAN._replace(value=expected, action=np.array([action, 2, 0]))


def test_a_row_at_a_threshold_may_lie_a_little_apart_and_no_more_rows_than_that():
    assert compared(apart(2.1, 3.0), spare=1) is None
    assert compared(apart(2.1, 3.0, action=0), spare=1) is None
    assert "plan value: row 0" in compared(apart(2.1, 3.0))
    assert "plan value: row 0" in compared(apart(2.1, 3.1), spare=1)
    assert "plan value: row 0" in compared(apart(2.5, 3.0), spare=1)
    assert "plan value: row 0" in compared(apart(np.nan, 3.0), spare=1)
    assert "plan action: row 0" in compared(apart(2.1, 3.0), spare=1, action=np.array([2, 2, 0]))
    assert (spared(1), spared(199), spared(1500)) == (1, 1, 8)


def test_equal_plans_do_not_differ():
    assert compared() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": np.array([1, 2], dtype=np.int64)}, r"plan action: expected int64 [3], was int64 [2]"),
        ({"action": PLAN.action.astype(np.int32)}, "plan action: expected int64 [3], was int32 [3]"),
        ({"value": PLAN.value.astype(np.float64)}, "plan value: expected float32 [3], was float64 [3]"),
        ({"action_values": np.zeros((3, 2), np.float32)}, "plan action_values: expected float32 [3, 3]"),
        ({"sequence": np.zeros((3, 3), np.int64)}, "plan sequence: expected int64 [3, 2], was int64 [3, 3]"),
        ({"action_masks": MASKS.astype(np.int8)}, "plan action_masks: expected bool [3, 3], was int8"),
        ({"fallback": PLAN.fallback[:, None]}, "plan fallback: expected bool [3], was bool [3, 1]"),
        (with_numbers("action", (0, 3)), "plan action: expected 0 to 2, was 3"),
        (with_numbers("action", (0, -1)), "plan action: expected 0 to 2, was -1"),
        (with_numbers("sequence", ((1, 1), 9)), "plan sequence: expected 0 to 2, was 9"),
        (with_numbers("sequence", ((1, 1), -2)), "plan sequence: expected 0 to 2, was -2"),
        (with_numbers("action_masks", ((0, 2), True)), "plan action_masks: row 0: expected [True, True, False]"),
        (with_numbers("fallback", (2, False)), "plan fallback: row 2: expected True, was False"),
        (with_numbers("fallback", (1, True)), "plan fallback: row 1: expected False, was True"),
        (with_numbers("value", (0, 2.001)), "plan value: row 0: expected 2.0"),
        (with_numbers("value", (1, np.nan)), "plan value: row 1: expected 3.0, was nan"),
        (with_numbers("value", (2, 1.0)), "plan value: row 2"),
        # Worth less than the action expected.
        (with_numbers("action", (1, 1)), "plan action: row 1: expected 2, was 1 (1 of 3 rows differ)"),
        # Worth more than the action expected.
        (
            with_numbers("action", (1, 0)) | with_numbers("action_values", ((1, 2), 2.5)),
            "plan action: row 1: expected 2, was 0",
        ),
        # Without a plan it holds.
        (with_numbers("action", (2, 1)), "plan action: row 2: expected 0, was 1"),
        (with_numbers("action_values", ((1, 2), 2.5)), "plan action_values: row 1: expected -inf where masked"),
        (with_numbers("action_values", ((0, 1), np.nan)), "plan action_values: row 0"),
        (with_numbers("action_values", ((0, 2), -9.0)), "plan action_values: row 0"),
        (with_numbers("sequence", ((1, 0), 0)), "plan sequence: row 1: expected one that begins with the action"),
        (with_numbers("sequence", ((2, 1), 1)), "plan sequence: row 2"),
    ],
)
def test_each_difference_of_a_plan_is_found_and_named(change, message):
    assert compared(**change).startswith(message)


def test_first_actions_of_equal_value_are_interchangeable():
    assert compared(action=np.array([1, 0, 0]), sequence=np.array([[1, 0], [0, 0], [0, 0]])) is None


def test_a_forbidden_action_is_never_interchangeable():
    # The graph is wrong about everything alike: it says that the action expected is forbidden too.
    wished = PLAN._replace(action=np.array([2, 2, 0]))
    values = np.array([[1, 2, 2], [3, 2, 3], [-np.inf] * 3], dtype=np.float32)
    found = {"action": np.array([2, 2, 0]), "sequence": np.array([[2, 0], [2, 2], [0, 0]]), "action_values": values}
    assert compared(wished, **found).startswith("plan action: row 0: expected 2, was 2")


def test_an_expected_action_that_does_not_exist_is_a_difference():
    assert compared(PLAN._replace(action=np.array([1, 7, 0]))) == "plan action: expected 0 to 2, was 7"


def test_golden_plans_survive_json_and_name_actions_that_exist():
    state = np.zeros((2, 2), np.float32)
    plan = GoldenPlan(np.array([2, 0]), np.array([0.5, 0.0], np.float32), np.array([False, True]))
    golden = Golden(state, np.ones((2, 3), bool), outputs(), np.zeros(2, np.float32), plan)
    raw = json.loads(json.dumps(golden.to_dict()))
    again = Golden.from_dict(raw, 2, 3, planner=True).plan
    for name, array in plan._asdict().items():
        np.testing.assert_array_equal(getattr(again, name), array)
    with pytest.raises(BundleFormatError, match="golden: plan_action: expected 0 to 2, was 3"):
        Golden.from_dict({**raw, "plan_action": [3, 0]}, 2, 3, planner=True)


def test_golden_likelihoods_survive_json_and_are_there_where_they_are_expected():
    state, nll = np.zeros((2, 2), np.float32), np.array([-1.25, np.nan], np.float32)
    golden = Golden(state, np.ones((2, 3), bool), outputs(), np.zeros(2, np.float32), nll=nll)
    raw = json.loads(json.dumps(golden.to_dict(), allow_nan=False))
    np.testing.assert_array_equal(Golden.from_dict(raw, 2, 3, drift=True).nll, nll)
    with pytest.raises(BundleFormatError, match="golden: expected"):
        Golden.from_dict(raw, 2, 3)
    with pytest.raises(BundleFormatError, match="golden: nll: expected float32"):
        Golden.from_dict({**raw, "nll": [0.0]}, 2, 3, drift=True)
    del raw["nll"]
    assert Golden.from_dict(raw, 2, 3).nll is None
    with pytest.raises(BundleFormatError, match=r"golden: expected .*'nll'"):
        Golden.from_dict(raw, 2, 3, drift=True)


def test_each_row_is_followed_by_the_next_and_the_last_by_the_first():
    state = np.arange(12, dtype=np.float32).reshape(3, 4)
    features, following = following_rows(state, 2)
    assert features.tolist() == [[0, 1], [4, 5], [8, 9]]
    assert following.tolist() == [[4, 5], [8, 9], [0, 1]]


@pytest.mark.parametrize(
    ("actual", "words"),
    [
        ([1.0, -100.0, np.nan, np.inf], None),
        ([1.0 + 1.9e-4, -100.0, np.nan, np.inf], None),
        ([1.0, -100.01, np.nan, np.inf], None),
        ([1.001, -100.0, np.nan, np.inf], "row 0: expected 1.0, was 1.00"),
        ([1.0, -100.1, 0.0, np.inf], r"row 1: expected -100.0, was -100.0999\d* \(2 of 4 rows differ\)"),
        ([1.0, -100.0, np.nan, -np.inf], "row 3: expected inf, was -inf"),
        ([1.0, np.nan, np.nan, np.inf], "row 1: expected -100.0, was nan"),
    ],
)
def test_a_number_that_is_apart_is_named(actual, words):
    expected = np.array([1.0, -100.0, np.nan, np.inf], dtype=np.float32)
    found = number_apart(expected, np.array(actual, dtype=np.float32), tolerance=1e-4)
    assert found is None if words is None else re.search(words, found)
