"""A bundle with a planner: it decides as in training, is proved when opened, and gives way to the policy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_parts import make_dynamics, make_planner, make_scaler, write_planned
from repack import repack

from benchmarks import measure_latency
from configs.schema import PlannerConfig
from export import BundleInfo
from export.states import probe_masks, probe_states
from mbpo.planning import PlannerPolicy
from serving import (
    Bundle,
    BundleMismatchError,
    GoldenMismatchError,
    OnnxPlanner,
    OnnxPolicy,
    PlannerOutputs,
    open_bundle,
)


@pytest.fixture(scope="module")
def planner() -> PlannerPolicy:
    # Without a holding time the masks of imagined bars leave a choice.
    return make_planner(PlannerConfig(horizon=2, scenarios=4), min_holding_bars=0)


@pytest.fixture(scope="module")
def written(planner: PlannerPolicy, tmp_path_factory: pytest.TempPathFactory) -> BundleInfo:
    return write_planned(tmp_path_factory.mktemp("planner") / "bundle", planner)


@pytest.fixture(scope="module")
def bundle(written: BundleInfo) -> Bundle:
    return open_bundle(written.path)


def states(planner: PlannerPolicy) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    state = probe_states(planner.dynamics, make_scaler(), 400, rng)
    usual = (np.abs(state) < 1e6).all(axis=1)
    return state[usual], probe_masks(planner.dynamics.num_actions, int(usual.sum()), rng)


def test_parity_was_proved_and_is_told(written: BundleInfo) -> None:
    assert written.parity.plans == 1000
    assert written.parity.max_plan_error < 1e-4


def test_decisions_are_those_of_the_planner_and_valid(planner: PlannerPolicy, bundle: Bundle) -> None:
    state, callers = states(planner)
    masks = np.asarray(planner.dynamics.action_masks(state)) & callers
    served = OnnxPlanner(bundle)
    decisions = served.decide(state, callers)
    assert decisions.planned.all()
    assert served.overridden_total == 0
    assert masks[np.arange(len(state)), decisions.actions].all()
    assert (decisions.actions == planner.act(state, masks)).mean() > 0.97  # the others tie
    np.testing.assert_array_equal(decisions.probabilities.argmax(axis=1), decisions.actions)
    one = served.decide(state[3], callers[3]).row()
    assert (one.action, one.planned) == (int(decisions.actions[3]), True)
    assert (OnnxPolicy(bundle).decide(state, callers).actions != decisions.actions).any()


def test_rows_without_a_plan_go_to_the_policy_and_then_to_hold(planner: PlannerPolicy, bundle: Bundle) -> None:
    state, callers = states(planner)
    state, callers = state[:4].copy(), callers[:4].copy()
    state[1, 0], callers[2] = np.nan, False
    decisions = OnnxPlanner(bundle).decide(state, callers)
    policy = OnnxPolicy(bundle).decide(state, callers)
    assert decisions.planned.tolist() == [True, False, False, True]
    for name in ("actions", "value", "fallback", "action_masks"):
        np.testing.assert_array_equal(getattr(decisions, name)[1:3], getattr(policy, name)[1:3])
    assert decisions.actions[1:3].tolist() == [0, 0]
    assert decisions.fallback.tolist() == [False, True, True, False]


def test_the_seed_picks_the_noise(planner: PlannerPolicy, bundle: Bundle) -> None:
    state, callers = states(planner)
    values = [OnnxPlanner(bundle, seed=seed).decide(state, callers).value for seed in (0, 1, 2)]
    np.testing.assert_array_equal(values[0], values[2])
    assert not np.array_equal(values[0], values[1])


def test_a_planner_that_decides_otherwise_is_refused(written: BundleInfo, tmp_path: Path) -> None:
    golden = json.loads((written.path / "golden.json").read_text())
    golden["plan_value"][0] += 1.0
    changed = repack(written.path, tmp_path / "other", {"golden.json": json.dumps(golden).encode()})
    with pytest.raises(GoldenMismatchError, match=r"planner\.onnx: golden plan value: row 0"):
        open_bundle(changed)


class Sessions:
    """Another session, seen from outside: how many rows it was given, and answers changed by hand."""

    def __init__(self, session: Any, **changes: Any) -> None:
        self.session, self.changes = session, changes
        self.batches: list[int] = []

    def run(self, names: None, inputs: dict[str, Any]) -> list[Any]:
        self.batches.append(len(inputs["state"]))
        outputs = PlannerOutputs(*self.session.run(names, inputs))
        for name, (rows, number) in self.changes.items():
            getattr(outputs, name)[rows] = number
        return list(outputs)


def test_a_plan_that_the_rules_forbid_goes_to_the_policy_and_is_counted(planner: PlannerPolicy, bundle: Bundle) -> None:
    state, callers = states(planner)
    masks = np.asarray(planner.dynamics.action_masks(state)) & callers
    (wrong,) = np.nonzero(~masks[:, 6])
    wrong, state, callers = wrong[:3], state[: wrong[2] + 1], callers[: wrong[2] + 1]
    faulty = dataclasses.replace(bundle, planner_session=Sessions(bundle.planner_session, action=(wrong, 6)))
    served = OnnxPlanner(faulty)
    decisions, policy = served.decide(state, callers), OnnxPolicy(bundle).decide(state, callers)
    assert np.flatnonzero(decisions.overridden).tolist() == wrong.tolist()
    assert np.flatnonzero(~decisions.planned).tolist() == wrong.tolist()
    assert served.overridden_total == 3
    for name in ("actions", "probabilities", "value", "fallback", "action_masks"):
        np.testing.assert_array_equal(getattr(decisions, name)[wrong], getattr(policy, name)[wrong])
    right = OnnxPlanner(bundle).decide(state, callers)
    for name in ("actions", "probabilities", "value", "fallback", "action_masks"):
        np.testing.assert_array_equal(
            np.delete(getattr(decisions, name), wrong, axis=0), np.delete(getattr(right, name), wrong, axis=0)
        )
    assert (policy.actions[wrong] != 6).all()


def test_an_action_that_does_not_exist_goes_to_the_policy_too(planner: PlannerPolicy, bundle: Bundle) -> None:
    state, callers = states(planner)
    faulty = dataclasses.replace(bundle, planner_session=Sessions(bundle.planner_session, action=(0, 99)))
    decisions = OnnxPlanner(faulty).decide(state, callers)
    assert decisions.overridden.nonzero()[0].tolist() == [0]
    assert decisions.actions[0] == OnnxPolicy(bundle).decide(state, callers).actions[0]


def test_where_plan_and_policy_are_forbidden_it_holds_and_counts_once(planner: PlannerPolicy, bundle: Bundle) -> None:
    state, callers = states(planner)
    stricter = dataclasses.replace(bundle, rule_set=make_dynamics(min_holding_bars=0, max_position_change=0.1).rule_set)
    served, policy = OnnxPlanner(stricter), OnnxPolicy(stricter)
    decisions, theirs = served.decide(state, callers), policy.decide(state, callers)
    planned = OnnxPlanner(bundle).decide(state, callers)
    wrong = ~decisions.action_masks[np.arange(len(state)), planned.actions]
    both = wrong & theirs.overridden
    assert both.sum() > 20
    np.testing.assert_array_equal(decisions.overridden, wrong)
    np.testing.assert_array_equal(decisions.planned, ~wrong)
    assert not decisions.actions[both].any()
    np.testing.assert_array_equal(decisions.actions[wrong], theirs.actions[wrong])
    assert served.overridden_total == wrong.sum()


def test_rows_go_through_the_graph_in_pieces(planner: PlannerPolicy, bundle: Bundle) -> None:
    state, callers = states(planner)
    state, callers, seeds = state[:10], callers[:10], np.arange(10)
    session = Sessions(bundle.planner_session)
    pieces = dataclasses.replace(bundle, planner_session=session).run_planner(state, callers, seeds, at_once=4)
    assert session.batches == [4, 4, 2]
    for ours, theirs in zip(pieces, bundle.run_planner(state, callers, seeds), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_graph_with_other_noise_tables_than_the_manifest_says_is_refused(written: BundleInfo, tmp_path: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["planner"]["noise_tables"] = 3

    with pytest.raises(BundleMismatchError, match=r"planner\.onnx: detent\.noise_tables: expected 3, was 2"):
        open_bundle(repack(written.path, tmp_path / "other", change=change))


def test_a_bundle_without_one_says_so(bundle_path: Path) -> None:
    plain = open_bundle(bundle_path)
    with pytest.raises(BundleMismatchError, match="expected a bundle with a planner"):
        OnnxPlanner(plain)
    with pytest.raises(BundleMismatchError, match="expected a bundle with a planner"):
        plain.run_planner(np.zeros((1, 14), np.float32), np.ones((1, 7), np.bool_), np.zeros(1, np.int64))


def test_planned_decisions_are_timed_where_there_is_a_planner(written: BundleInfo) -> None:
    measured = measure_latency(written.path, 100, warmup=1, paced_calls=2, calls_per_second=500.0)
    assert measured.planner_hot is not None
    assert measured.planner_paced is not None
    assert (measured.planner_hot.count, measured.planner_paced.count) == (100, 2)
