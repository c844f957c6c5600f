"""The comparison itself: who is called when, what counts as missed or changed, and how plans are scored."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from planner_reports import GOOD, entry, speed_report

from benchmarks import peer_planning, peer_speed, planner_plans, planner_speed, planner_tasks
from benchmarks.planner_plans import RANDOM, PlanQuality, WorldPlanners, compare_plans
from benchmarks.planner_speed import (
    BLOCKS,
    PeerSettings,
    Series,
    compare_planner_speed,
    measure_planner_speed,
    timed_block,
)
from benchmarks.planner_tasks import (
    DEEP,
    POLICY,
    PREDICT,
    SAMPLED,
    SAMPLED_FLOOR,
    SCENARIOS,
    SMOKE,
    TREE,
    TREE_FLOOR,
    PlannerSizes,
    products_call,
)
from benchmarks.world_model_speed import Peer
from data import atomic_write_json
from mbpo.planning_world import WorldPlanning
from planner.dense import DenseExhaustive

SIZES = PlannerSizes(
    obs=4, actions=3, members=2, hidden=(6, 5), horizon=2, deep_horizon=2, candidates=8, elites=2, iterations=1
)


class Eager(WorldPlanners):
    """Searches without a graph, and contenders that only say when they are called."""

    def __init__(self, sizes: PlannerSizes) -> None:
        super().__init__(SIZES)
        self.log: list[str] = []

    def calls(self) -> dict[str, Any]:
        return {name: lambda index, name=name: self.log.append(name) for name in GOOD}

    def plans(self, name: str, rows: Sequence[int]) -> Any:
        search = self.searches[TREE]
        assert isinstance(search, DenseExhaustive)
        planning = WorldPlanning(self.world)
        masks = torch.ones(len(rows), self.sizes.actions, dtype=torch.bool)
        return search.plan(planning, planning.roots(torch.from_numpy(self.starts[[*rows]]), masks)).sequence.numpy()


@pytest.fixture(scope="module")
def planners() -> Eager:
    return Eager(SIZES)


@pytest.fixture
def toy_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer beside the real ones, which always plans the same and prints as peers do."""
    script = tmp_path / "peer_planning.py"
    body = Path(peer_planning.__file__).read_text(encoding="utf-8")
    toy = (
        'PEERS["toy"] = (lambda settings: _tasks({"1 plan": lambda row: '
        '[print("noise") or 2] * settings["horizon"]}, len(_problem(settings)[2])), ())'
    )
    main = 'if __name__ == "__main__":'
    script.write_text(body.replace(main, f"{toy}\n{main}"), encoding="utf-8")
    (tmp_path / "peer_speed.py").write_text(Path(peer_speed.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(peer_planning, "__file__", str(script))
    monkeypatch.setitem(peer_planning.PEERS, "toy", (lambda settings: {}, ()))


def isolated_python(folder: Path) -> Path:
    """This interpreter, deaf to PYTHONPATH, which may hold a checkout of a peer."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I "$@"\n')
    python.chmod(0o755)
    return python


def test_series_know_their_blocks_by_hand() -> None:
    series = Series.of([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    assert series.block_p50_ms == (2.0, 5.0)
    assert series.block_p99_ms == pytest.approx((2.98, 5.0))
    assert (series.whole.count, series.whole.p50_ms, series.whole.max_ms) == (6, 4.0, 5.0)
    with pytest.raises(ValueError, match="samples_ms"):
        Series.of([[1.0], []])


def test_a_block_takes_its_own_rows_after_a_warm_up_and_sleeps_where_it_is_paced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[Any] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: log.append(f"sleep {seconds:g}"))
    assert len(timed_block(log.append, 2, 3)) == 3
    assert log == [0, 6, 7, 8]
    log.clear()
    timed_block(log.append, 1, 2, pause=0.5)
    assert log == [0, "sleep 0.5", 2, "sleep 0.5", 3]


def test_contenders_take_turns_and_peers_plans_are_counted_by_the_same_model(
    planners: Eager, toy_peer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, told = torch.get_num_threads(), []
    torch.set_num_threads(2)
    market = {"market": lambda index: planners.log.append("market")}
    monkeypatch.setattr(planner_speed, "WorldPlanners", lambda sizes: planners)
    monkeypatch.setattr(planner_speed, "trading_calls", lambda sizes: market)
    planners.log.clear()
    report = measure_planner_speed(
        SIZES,
        calls=15,
        paced_calls=1,
        calls_per_second=1e4,
        peers=("toy",),
        peer_calls=20,
        progress=lambda done, total, note: told.append((done, total)),
    )
    left = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert left == 2
    assert told == [(done, BLOCKS + 2) for done in range(BLOCKS + 2)]
    # Two hot calls and one paced one in every block, each kind after a call that warms up.
    block = [name for name in [*GOOD, "market"] for _ in range(1 + 2 + 1 + 1)]
    assert planners.log == block * BLOCKS
    assert {(one.hot.whole.count, one.paced.whole.count) for one in report.entries.values()} == {(20, 10)}
    assert report.absent == {}
    assert "python" in report.peer_versions["toy"]
    assert report.peers["toy, 1 plan"].count == 20
    plan = report.plans["toy, 1 plan"]
    rows = range(20)
    assert plan.rows == 20
    assert plan.value == pytest.approx(planners.values(rows, np.full((20, 2), 2)).mean())
    assert plan.best_value == pytest.approx(planners.values(rows, planners.plans(TREE, rows)).mean())
    assert plan.value < plan.best_value


def test_a_peer_that_is_not_installed_is_absent_with_the_reason(tmp_path: Path, planners: Eager) -> None:
    planners.write_problem(tmp_path / "problem.npz", 2)
    settings = PeerSettings(problem=str(tmp_path / "problem.npz"), horizon=2)
    with Peer("mbrl-lib", settings, isolated_python(tmp_path), peer_planning.__file__) as peer:
        assert peer.absent.startswith("ModuleNotFoundError: No module named")
        assert peer.tasks == []


def test_peers_plan_from_one_row_after_the_other_with_the_weights_of_the_world(tmp_path: Path, planners: Eager) -> None:
    planners.write_problem(tmp_path / "problem.npz", 3)
    weights, biases, starts = peer_planning._problem({"problem": tmp_path / "problem.npz"})
    np.testing.assert_array_equal(starts, planners.starts[:3])
    assert [weight.shape for weight in weights] == [(2, 7, 6), (2, 6, 5), (2, 5, 5)]
    plans = np.array([[0, 1], [2, 0], [1, 2]])
    expected = planners.values(range(3), plans)
    for row, plan in enumerate(plans):
        obs, earned = np.repeat(starts[row][None], 2, axis=0).astype(np.float64), 0.0
        for action in plan:
            hidden = np.concatenate((obs, np.eye(3)[[action, action]]), axis=1)[:, None]
            for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                hidden = hidden @ weight + bias
                hidden = hidden / (1.0 + np.exp(-hidden)) if layer < 2 else hidden
            obs, earned = obs + hidden[:, 0, :-1], earned + hidden[:, 0, -1].mean()
        assert earned == pytest.approx(expected[row], rel=1e-4)
    task = peer_planning._tasks({"task": lambda row: [10 * row]}, 2)["task"]
    assert [task() for _ in range(3)] == [[0, 0], [1, 10], [0, 0]]


def test_the_trees_plans_are_the_best_of_all_and_others_are_held_against_them(planners: Eager) -> None:
    rows = range(8)
    every = {plan: planners.values(rows, np.tile(plan, (8, 1))) for plan in itertools.product(range(3), repeat=2)}
    best = np.max([*every.values()], axis=0)
    np.testing.assert_allclose(planners.values(rows, planners.plans(TREE, rows)), best, rtol=1e-5, atol=1e-7)
    known = planners.plans(TREE, range(3))
    other = [(known[2][0] + 1) % 3, known[2][1]]
    found = compare_plans(planners, {"peer": {0: known[0], 2: other}, "equal": {1: known[1]}})
    assert set(found) == {TREE, SAMPLED, RANDOM, "peer", "equal"}
    assert found[RANDOM].value < found[TREE].value
    assert found[RANDOM].rows == len(planners.starts)
    assert found["peer"].rows == 2
    assert found["peer"].best_actions == 0.5
    assert found["peer"].value == pytest.approx(planners.values([0, 2], np.array([known[0], other])).mean())
    assert found["peer"].value < found["peer"].best_value
    assert found["equal"].value == found["equal"].best_value


def test_products_are_those_of_the_search_and_of_every_member(planners: Eager, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Session:
        runs = 0

        def run(self, wanted: None, feed: dict[str, Any]) -> None:
            self.runs += 1
            opened[0][1].append(sorted({part.shape for part in feed.values()}))

    session = Session()
    monkeypatch.setattr(planner_tasks, "open_graph", lambda data: opened.append((data, [])) or session)
    call = products_call(planners.world, SIZES.widths(2), times=3)
    call(0)
    assert session.runs == 3
    assert opened[0][1][0] == [(3, 7), (9, 7)]
    graph = onnx.load_from_string(opened[0][0]).graph
    # Two depths of two members of three layers, and no copy of it all for the caller.
    assert [node.op_type for node in graph.node].count("MatMul") == 12
    assert {tuple(dim.dim_value for dim in out.type.tensor_type.shape.dim) for out in graph.output} == {(1, 5)}


def test_products_run_as_one_graph(planners: Eager) -> None:
    assert products_call(planners.world, SIZES.widths(2))(0) is None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({POLICY: entry(0.021)}, "policy: p50, ms: expected at most 0.02, was 0.021"),
        ({POLICY: entry(0.01, spread=0.05)}, "policy: p99, ms: expected at most 0.05, was 0.06"),
        ({PREDICT: entry(0.14)}, "policy, sb3-contrib: times the policy's graph: expected at least 15, was 14"),
        ({TREE: entry(0.81)}, "tree: p50, ms: expected at most 0.8, was 0.81"),
        ({TREE: entry(0.7, spread=0.6)}, "tree: p99, ms: expected at most 1.2, was 1.3"),
        ({TREE_FLOOR: entry(0.35)}, "tree: times the products alone: expected at most 1.8, was 2"),
        ({DEEP: entry(5.0, spread=2.0)}, "deep tree: p99, ms: expected at most 6, was 7"),
        ({SAMPLED: entry(9.5)}, "cem: p50, ms: expected at most 9, was 9.5"),
        ({SAMPLED: entry(8.0, spread=5.0)}, "cem: p99, ms: expected at most 12.5, was 13"),
        ({SAMPLED_FLOOR: entry(4.0)}, "cem: times the products alone: expected at most 1.6, was 2"),
        ({SCENARIOS: entry(1.3)}, "scenarios: p50, ms: expected at most 1.2, was 1.3"),
        ({SCENARIOS: entry(1.1, spread=1.0)}, "scenarios: p99, ms: expected at most 2, was 2.1"),
    ],
)
def test_every_goal_can_be_missed_alone(entries: dict[str, Any], message: str) -> None:
    assert speed_report(entries=entries).missed == (message,)


def test_every_goal_can_be_met() -> None:
    assert speed_report().missed == ()


@pytest.mark.parametrize(("peer", "goal"), planner_speed.PEER_GOALS.items())
def test_every_peer_is_to_be_beaten_by_so_much(peer: str, goal: float) -> None:
    assert speed_report(peers={peer: 0.7 * goal + 0.01}).missed == ()
    missed = f"{peer}: times the tree: expected at least {goal:g}, was {goal / 2:.3g}"
    assert speed_report(peers={peer: 0.35 * goal}).missed == (missed,)


def test_a_peer_with_better_plans_is_a_missed_goal_and_rounding_is_none() -> None:
    better = PlanQuality(rows=4, value=1.1, best_value=1.0, best_actions=0.0)
    assert speed_report(plans={"mctx": better}).missed == ("mctx: plans worth 1.1, the tree's 1",)
    assert speed_report(plans={"mctx": dataclasses.replace(better, value=1.0 + 1e-8)}).missed == ()


def test_ratios_by_hand_and_all_of_it_is_json() -> None:
    report = speed_report(peers={"mctx, 50 simulations": 7.0})
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert written["to_floor"] == pytest.approx({"policy": 2.0, "tree": 1.4, "deep tree": 1.25, "cem": 8 / 6})
    assert written["times_slower"]["mctx, 50 simulations"] == pytest.approx({"tree": 10.0, "cem": 7 / 8})
    assert report.to_floor("scenarios") is None
    assert written["entries"][TREE]["hot"]["whole"]["p50_ms"] == 0.7
    assert written["missed"] == []


def test_a_change_counts_where_it_is_larger_than_the_blocks_spread(tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    atomic_write_json(path, speed_report(entries={TREE: entry(1.0, spread=0.3)}).to_dict())
    found = compare_planner_speed(speed_report(entries={TREE: entry(1.2), TREE_FLOOR: entry(0.6)}), path)
    assert (found["same_machine"], found["same_sizes"]) == (True, True)
    change = found["series"][f"{TREE}, hot, p50_ms"]
    assert change == {"now": 1.2, "before": 1.0, "ratio": 1.2, "beyond_noise": False}
    assert found["series"][f"{TREE_FLOOR}, paced, p99_ms"]["beyond_noise"]
    assert found["series"][f"{SAMPLED}, hot, p50_ms"]["ratio"] == 1.0
    assert compare_planner_speed(speed_report(entries={TREE: entry(1.4)}), path)["series"][f"{TREE}, hot, p50_ms"][
        "beyond_noise"
    ]
    elsewhere = compare_planner_speed(speed_report(machine={"cpu": "other"}, sizes=SMOKE), path)
    assert (elsewhere["same_machine"], elsewhere["same_sizes"]) == (False, False)


def test_a_contender_of_one_report_alone_is_not_compared(tmp_path: Path) -> None:
    before = speed_report().to_dict()
    del before["entries"][TREE]
    atomic_write_json(tmp_path / "before.json", before)
    series = compare_planner_speed(speed_report(), tmp_path / "before.json")["series"]
    assert f"{SAMPLED}, hot, p50_ms" in series
    assert not any(name.startswith(f"{TREE}, hot") for name in series)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"entries": {"tree": 1}, "machine": 1, "sizes": 1}'])
def test_comparison_with_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "before.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected the JSON of a report of planners"):
        compare_planner_speed(speed_report(), path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calls": 0}, "calls: expected > 0, was 0"),
        ({"paced_calls": -1}, "paced_calls: expected > 0, was -1"),
        ({"calls_per_second": float("nan")}, "calls_per_second: expected > 0, was nan"),
        ({"peer_calls": 0}, "peer_calls: expected > 0, was 0"),
        ({"peers": ("dreamer",)}, r"was \['dreamer'\]"),
    ],
)
def test_counts_must_be_positive_and_peers_known(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_planner_speed(**arguments)


def test_worlds_of_the_benchmark_react_and_do_not_end(planners: Eager) -> None:
    world = planner_plans.make_world(PlannerSizes())
    obs = torch.randn(5, 16, 64, generator=torch.Generator().manual_seed(0))
    steps = [world.step_each(obs, torch.full((5, 16, 1), action), world.elites) for action in range(2)]
    assert not any(ended.any() for _, _, ended in steps)
    assert (steps[0][1] - steps[1][1]).abs().mean() > 0.003
