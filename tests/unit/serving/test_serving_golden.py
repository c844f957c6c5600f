import json

import numpy as np
import pytest

from serving import BundleFormatError, Golden, PolicyOutputs
from serving.golden import difference


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
        ("action_masks", [[1, 1, 0], [1, 0, 0]], "action_masks: expected bool"),
        ("extra", [], "golden: expected"),
    ],
)
def test_malformed_golden_is_refused(name, value, message):
    golden = Golden(np.zeros((2, 2), np.float32), np.ones((2, 3), bool), outputs(), np.zeros(2, np.float32))
    with pytest.raises(BundleFormatError, match=message):
        Golden.from_dict({**golden.to_dict(), name: value}, 2, 3)
