import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from bundle_parts import make_dynamics, make_scaler
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from export.states import probe_masks, probe_states
from serving import DecisionInputError, OnnxPolicy, open_bundle

FLAT = np.array([0, 0, 0.2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], dtype=np.float32)
"""A flat, healthy account: columns are four features, eight account columns, uncertainty and age."""


@pytest.fixture(scope="module")
def policy(bundle):
    return OnnxPolicy(bundle)


@pytest.fixture(scope="module")
def states():
    return probe_states(make_dynamics(), make_scaler(), 512, np.random.default_rng(5))


def test_flat_account_may_open_up_to_the_largest_change(policy):
    decision = policy.decide(FLAT).row()
    assert decision.action_masks == (True, True, True, True, False, False, False)
    assert decision.action_masks[decision.action]
    assert sum(decision.probabilities) == pytest.approx(1.0)
    assert decision.probabilities[4:] == (0.0, 0.0, 0.0)
    assert (decision.fallback, decision.overridden) == (False, False)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_batch_decides_as_its_rows_do(policy, states, batch):
    together = policy.decide(states[:batch])
    assert len(together) == batch
    for index in range(batch):
        alone, row = policy.decide(states[index]).row(), together.row(index)
        assert (row.action, row.action_masks, row.fallback) == (alone.action, alone.action_masks, alone.fallback)
        assert row.probabilities == pytest.approx(alone.probabilities, abs=1e-6)


def test_graph_masks_are_the_numpy_rules_on_every_probe(policy, bundle, states):
    rules = make_dynamics().action_masks(states)
    np.testing.assert_array_equal(bundle.run_masks(states), rules)
    free = np.ones_like(rules)
    np.testing.assert_array_equal(bundle.run_policy(states, free).action_masks, rules)
    np.testing.assert_array_equal(policy.decide(states).action_masks, rules)
    assert policy.overridden_total == 0


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", range(14))
def test_state_that_is_not_finite_holds_with_fallback(policy, column, broken):
    state = np.stack([FLAT, FLAT])
    state[0, column] = broken
    decisions = policy.decide(state)
    assert decisions.row(0).action == 0
    assert decisions.row(0).probabilities == (1.0, 0, 0, 0, 0, 0, 0)
    assert decisions.row(0).value == 0.0
    assert decisions.fallback.tolist() == [True, False]
    assert decisions.row(1) == policy.decide(np.stack([FLAT, FLAT])).row(1)


def test_caller_that_forbids_everything_gets_hold_with_fallback(policy):
    decision = policy.decide(FLAT, np.zeros(7, dtype=bool)).row()
    assert (decision.action, decision.fallback, decision.overridden) == (0, True, False)
    assert decision.action_masks == (True, False, False, False, False, False, False)
    assert decision.probabilities == (1.0, 0, 0, 0, 0, 0, 0)
    assert np.isfinite(decision.value)


def test_caller_that_forbids_all_the_rules_allow_gets_hold_with_fallback(policy):
    only_large = np.array([False, False, False, False, True, True, True])
    decision = policy.decide(FLAT, only_large).row()
    assert (decision.action, decision.fallback) == (0, True)


def test_caller_may_forbid_hold_and_narrow_the_choice(policy):
    only = np.array([False, False, True, False, False, False, False])
    decision = policy.decide(FLAT, only).row()
    assert (decision.action, decision.fallback, decision.overridden) == (2, False, False)
    assert decision.probabilities[2] == 1.0


def test_fallback_to_a_hold_the_caller_forbade_is_no_disagreement(policy):
    # No rule reads the fourth feature: the rules still allow action 2, but the network cannot be trusted.
    state = FLAT.copy()
    state[3] = np.nan
    only = np.array([False, False, True, False, False, False, False])
    decision = policy.decide(state, only).row()
    assert (decision.action, decision.fallback, decision.overridden) == (0, True, False)


def test_caller_cannot_allow_what_the_rules_forbid(policy):
    halted = FLAT.copy()
    halted[9] = 2.0
    decision = policy.decide(halted, np.ones(7, dtype=bool)).row()
    assert (decision.action, decision.fallback) == (0, False)
    assert decision.action_masks == (True, False, False, False, False, False, False)


def test_last_check_replaces_an_action_that_the_rules_forbid_by_hold(bundle, states):
    stricter = dataclasses.replace(bundle, rule_set=make_dynamics(max_position_change=0.1).rule_set)
    policy = OnnxPolicy(stricter)
    decisions = policy.decide(states)
    graph = bundle.run_policy(states, np.ones((len(states), 7), dtype=bool))
    rows = np.arange(len(states))
    wrong = ~decisions.action_masks[rows, graph.action]
    assert wrong.sum() > 20
    np.testing.assert_array_equal(decisions.overridden, wrong)
    assert not decisions.actions[wrong].any()
    np.testing.assert_array_equal(decisions.actions[~wrong], graph.action[~wrong])
    np.testing.assert_array_equal(decisions.probabilities[wrong], np.eye(7)[[0] * int(wrong.sum())])
    assert policy.overridden_total == wrong.sum()
    policy.decide(states)
    assert policy.overridden_total == 2 * wrong.sum()


@given(
    state=hnp.arrays(np.float32, (3, 14), elements=st.floats(width=32) | st.sampled_from([0.0, 0.25, 1.0, 2.0])),
    callers=hnp.arrays(np.bool_, (3, 7)),
)
def test_no_input_leads_to_a_forbidden_action(policy, state, callers):
    decisions = policy.decide(state, callers)
    rows = np.arange(3)
    held = (decisions.actions == 0) & decisions.fallback
    assert (decisions.action_masks[rows, decisions.actions] | held).all()
    assert (callers[rows, decisions.actions] | held).all()
    assert np.isfinite(decisions.probabilities).all()
    np.testing.assert_allclose(decisions.probabilities.sum(axis=1), 1.0, atol=1e-5)
    assert np.isfinite(decisions.value).all()
    assert not decisions.overridden.any()


def test_equal_input_gives_equal_bits_in_another_session_and_from_threads(bundle_path, policy, states):
    callers = probe_masks(7, len(states), np.random.default_rng(6))
    first = policy.decide(states, callers)
    with ThreadPoolExecutor(4) as pool:
        others = list(pool.map(lambda _: policy.decide(states, callers), range(8)))
    for other in (*others, OnnxPolicy(open_bundle(bundle_path)).decide(states, callers)):
        assert other.probabilities.tobytes() == first.probabilities.tobytes()
        assert other.value.tobytes() == first.value.tobytes()
        np.testing.assert_array_equal(other.actions, first.actions)


def test_memory_layout_does_not_matter_and_inputs_stay_unchanged(policy, states):
    before = states.copy()
    expected = policy.decide(states[:8])
    wide = np.zeros((8, 28), dtype=np.float32)
    wide[:, ::2] = states[:8]
    for layout in (np.asfortranarray(states[:8]), wide[:, ::2]):
        assert policy.decide(layout).probabilities.tobytes() == expected.probabilities.tobytes()
    callers = np.ones((8, 7), dtype=bool)
    callers.flags.writeable = False
    policy.decide(states[:8], callers)
    np.testing.assert_array_equal(states, before)


def test_acts_in_the_evaluation_protocol(policy, states):
    masks = probe_masks(7, len(states), np.random.default_rng(8))
    actions = policy.act(states, masks)
    assert policy.name == "onnx"
    assert (actions.dtype, actions.shape) == (np.int64, (512,))
    assert masks[np.arange(512), actions].all()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (FLAT.tolist(), "state: expected a NumPy array of float32, was list"),
        (FLAT.astype(np.float64), "state: expected a NumPy array of float32, was float64"),
        (FLAT[:-1], r"state: expected \[B >= 1, 14\] or \[14\], was \[13\]"),
        (FLAT[None, None], r"was \[1, 1, 14\]"),
        (np.zeros((0, 14), np.float32), r"was \[0, 14\]"),
        (np.zeros((), np.float32), r"was \[\]"),
    ],
)
def test_wrong_state_is_refused_by_name(policy, state, message):
    with pytest.raises(DecisionInputError, match=message):
        policy.decide(state)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.ones(7, dtype=np.int8), "caller_masks: expected a NumPy array of bool, was int8"),
        (np.zeros(7, dtype=np.float32), "was float32"),
        ([True] * 7, "was list"),
        (np.ones((7, 1), dtype=bool), r"was \[7, 1\]"),
        (np.ones((2, 7), dtype=bool), r"caller_masks: expected bool \[1, 7\], was \[2, 7\]"),
    ],
)
def test_wrong_caller_masks_are_refused_by_name(policy, masks, message):
    with pytest.raises(DecisionInputError, match=message):
        policy.decide(FLAT, masks)


def test_uncertainty_of_features(policy):
    features = np.array([[0, 0, 0.2, 0], [0.01, -0.02, 0.3, 0.1], [0, np.nan, 0.2, 0]], dtype=np.float32)
    uncertainty = policy.uncertainty(features)
    assert (uncertainty[:2] > 0).all()
    assert np.isnan(uncertainty[2])
    assert policy.uncertainty(features[1]) == pytest.approx(uncertainty[1:2])
    with pytest.raises(DecisionInputError, match=r"features: expected \[B >= 1, 4\]"):
        policy.uncertainty(FLAT)
