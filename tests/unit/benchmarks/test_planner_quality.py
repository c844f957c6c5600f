"""Planners against the policy they end with: what a gain is, and that both play in every world."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from benchmarks import planner_quality as benchmark
from benchmarks.planner_quality import SEARCHES, QualityReport, QualityRun, measure_planner_quality, planning_decider
from benchmarks.sample_efficiency_worlds import WORLDS, smoke_world
from mbpo.online import OnlineResult, train_online


def report(*scores: tuple[float, float]) -> QualityReport:
    """Args: scores of policy and planner, run by run."""
    runs = tuple(
        QualityRun(
            seed=seed,
            real_steps=1,
            scores={"policy": policy, "tree": tree},
            seconds_per_decision={"policy": 0, "tree": 0},
        )
        for seed, (policy, tree) in enumerate(scores)
    )
    return QualityReport(world="masked-cartpole", episodes=2, runs=runs, machine={}, versions={})


def test_a_gain_is_that_over_the_policy_of_the_same_run() -> None:
    estimate, low, high = report((10.0, 11.0), (0.0, 3.0)).gain("tree")
    # Gains of 1 and 3: their mean has a standard error of 1, and t of one degree of freedom is 12.706.
    assert estimate == 2.0
    assert (low, high) == pytest.approx((2.0 - 12.7062, 2.0 + 12.7062), abs=1e-3)
    assert report((10.0, 9.0)).gain("tree") == (-1.0, None, None)
    written = json.loads(json.dumps(report((10.0, 9.0)).to_dict()))
    assert written["gains"] == {"tree": [-1.0, None, None]}


@pytest.mark.parametrize("world", sorted(SEARCHES))
def test_policy_and_planner_play_in_every_world_in_smoke(world: str) -> None:
    done = []
    found = measure_planner_quality(world, seeds=1, smoke=True, progress=lambda *given: done.append(given[:2]))
    assert done == [(1, 1)]
    (run,) = found.runs
    planner = next(iter(SEARCHES[world]))
    assert list(run.scores) == ["policy", planner]
    assert np.isfinite([*run.scores.values()]).all()
    assert all(seconds > 0 for seconds in run.seconds_per_decision.values())
    assert (found.world, found.episodes, run.real_steps) == (world, 2, 160)
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.fixture(scope="module", params=sorted(SEARCHES))
def trained(request: pytest.FixtureRequest) -> tuple[str, OnlineResult, Any]:
    world = smoke_world(WORLDS[request.param])
    result = train_online(world.build, world.mbpo, seed=0, evaluate=lambda policy, steps: {"score": 0.0})
    return request.param, result, world.build(5, 0)


def test_a_decision_does_not_depend_on_who_is_decided_with_it(
    trained: tuple[str, OnlineResult, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, result, env = trained
    obs, masks = env.reset(), env.action_masks()
    for search in SEARCHES[name].values():
        if search.horizon > 3:
            continue
        decide = planning_decider(result.model, result.policy, search, gamma=0.9)
        together = decide(obs, masks)
        with monkeypatch.context() as patch:
            patch.setattr(benchmark, "MAX_ROWS", 2)
            np.testing.assert_array_equal(decide(obs, masks), together)
        np.testing.assert_array_equal(decide(obs[3:4], masks[3:4])[0], together[3])
        flat = together.reshape(len(obs), -1)
        parts = masks.reshape(len(obs), flat.shape[1], -1)
        assert np.take_along_axis(parts, flat[:, :, None], axis=2).all()


def test_what_comes_after_the_plan_is_what_the_policys_value_network_says(
    trained: tuple[str, OnlineResult, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, result, env = trained
    obs, masks = env.reset(), env.action_masks()
    search = next(iter(SEARCHES[name].values()))
    asked = []
    predict = result.policy.predict_values
    monkeypatch.setattr(result.policy, "predict_values", lambda rows: asked.append(len(rows)) or predict(rows))
    planning_decider(result.model, result.policy, search, gamma=0.9)(obs, masks)
    assert sum(asked) > len(obs)


def test_unknown_worlds_and_no_run_are_refused() -> None:
    with pytest.raises(ValueError, match=r"world: expected one of .*, was 'acrobot'"):
        measure_planner_quality("acrobot")
    with pytest.raises(ValueError, match="seeds: expected at least 1, was 0"):
        measure_planner_quality("portfolio", seeds=0)
    with pytest.raises(ValueError, match="jobs: expected at least 1, was 0"):
        measure_planner_quality("portfolio", jobs=0)
