"""A planner graph is proved only if it plans as Python does: alone, in batches, with every table of noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bundle_parts import make_dynamics, make_market_model, make_policy, make_scaler

from configs.schema import PlannerConfig
from export import ParityError, check_parity, plan_parity
from export.plan_parity import check_plans, rows_at_once
from export.planner_graph import PlannerGraph
from export.reference import Reference
from export.search_graph import PlannerModule, planner_graph
from export.states import probe_masks, probe_states
from mbpo import TorchPolicy
from mbpo.planning import PlannerPolicy
from serving import Bundle, PlannerOutputs
from serving.manifest import PlannerEntry

COUNT, TABLES, HORIZON, SCENARIOS = 200, 3, 2, 4
PATHS = 7**HORIZON * SCENARIOS

Change = Callable[[PlannerOutputs, dict[str, Any]], PlannerOutputs]


class Session:
    """The planner graph in torch where onnxruntime's session would be, with a fault if one is given."""

    def __init__(self, graph: PlannerModule, change: Change | None = None) -> None:
        self.graph, self.change = graph, change
        self.batches: list[int] = []
        self.seeds: set[int] = set()

    def run(self, _: None, inputs: dict[str, Any]) -> list[Any]:
        self.batches.append(len(inputs["state"]))
        self.seeds |= set(inputs["seed"].tolist())
        with torch.no_grad():
            outputs = self.graph(*(torch.from_numpy(inputs[name]) for name in ("state", "caller_masks", "seed")))
        found = PlannerOutputs(*(part.numpy().copy() for part in outputs))
        return list(found if self.change is None else self.change(found, inputs))


def planner_of(**options: Any) -> PlannerPolicy:
    dynamics = options.pop("dynamics", None) or make_dynamics(min_holding_bars=0)
    network = options.pop("network", None) or make_policy(dynamics)
    model = options.pop("model", None) or make_market_model()
    config = PlannerConfig(**{"horizon": HORIZON, "scenarios": SCENARIOS, **options})
    value = TorchPolicy("value", network, make_scaler())
    return PlannerPolicy(dynamics, model, config, seed=0, gamma=0.97, value=value)


@pytest.fixture(scope="module")
def planner() -> PlannerPolicy:
    return planner_of()


@pytest.fixture(scope="module")
def graph(planner: PlannerPolicy) -> PlannerModule:
    return planner_graph(planner, noise_tables=TABLES)


@pytest.fixture(scope="module")
def reference() -> Reference:
    dynamics = make_dynamics(min_holding_bars=0)
    return Reference(dynamics, make_scaler(), make_policy(dynamics), make_market_model())


Check = Callable[..., dict[str, Any]]


@pytest.fixture
def check(bundle: Bundle, reference: Reference, planner: PlannerPolicy) -> Check:
    def run(session: Session, planner: PlannerPolicy = planner, count: int = COUNT) -> dict[str, Any]:
        rng = np.random.default_rng(1)
        state = probe_states(reference.dynamics, reference.scaler, count, rng)
        callers = probe_masks(reference.dynamics.num_actions, count, rng)
        return check_plans(with_planner(bundle, session), reference, planner, state, callers, count=count, rng=rng)

    return run


def with_planner(bundle: Bundle, session: Session) -> Bundle:
    entry = PlannerEntry(horizon=HORIZON, noise_tables=TABLES)
    return dataclasses.replace(
        bundle, manifest=bundle.manifest.model_copy(update={"planner": entry}), planner_session=session
    )


def test_as_many_rows_as_asked_for_are_planned_with_every_table(graph: PlannerModule, check: Check) -> None:
    session = Session(graph)
    report = check(session)
    assert report["plans"] == COUNT
    assert report["max_plan_error"] < 1e-4
    assert {seed % TABLES for seed in session.seeds} == {0, 1, 2}
    assert max(session.seeds) >= TABLES
    assert session.batches.count(1) == 100


def test_the_report_of_a_bundle_tells_of_plans(bundle: Bundle) -> None:
    dynamics = make_dynamics()
    reference = Reference(dynamics, make_scaler(), make_policy(dynamics), make_market_model())
    planner = planner_of(dynamics=dynamics)
    planned = with_planner(bundle, Session(planner_graph(planner, noise_tables=TABLES)))
    real = np.zeros((5, 14), dtype=np.float32)
    report = check_parity(planned, reference, planner, count=1000, tolerance=1e-5, seed=0, states=real)
    assert report.plans == 1005
    with pytest.raises(ValueError, match="planner: expected that of the bundle, was None"):
        check_parity(planned, reference, count=1000, tolerance=1e-5, seed=0)
    with pytest.raises(ValueError, match="planner: expected None for a bundle without one, was 'planner'"):
        check_parity(bundle, reference, planner, count=1000, tolerance=1e-5, seed=0)


@pytest.mark.parametrize(
    "options",
    [{"search": "cem", "candidates": 12, "elites": 3, "iterations": 2}, {"tail": 0.5, "control_variate": 0.0}],
)
def test_other_searches_are_proved_with_every_table_too(check: Check, options: dict[str, Any]) -> None:
    planner = planner_of(**options)
    assert check(Session(planner_graph(planner, noise_tables=TABLES)), planner)["plans"] == COUNT


class Counting(PlannerPolicy):
    batches: tuple[int, ...] = ()

    def plan(self, state: np.ndarray, action_masks: np.ndarray) -> Any:
        Counting.batches = (*Counting.batches, len(state))
        return super().plan(state, action_masks)


def test_graph_and_python_share_one_budget_of_memory(
    graph: PlannerModule, check: Check, planner: PlannerPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_parity, "PATHS_AT_ONCE", 30 * PATHS)
    assert rows_at_once(planner) == 30
    session = Session(graph)
    counting = Counting(planner.dynamics, planner.model, planner.config, seed=0, gamma=0.97, value=planner.value)
    check(session, counting)
    assert max(session.batches) == 30
    assert max(Counting.batches) == 30


def test_a_row_alone_is_the_least_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    many = {"horizon": 4, "scenarios": 320}
    assert rows_at_once(planner_of(**many)) == 1
    assert rows_at_once(planner_of(**many, search="cem", candidates=100, elites=3)) == 15


def dearer(outputs: PlannerOutputs, rows: np.ndarray) -> PlannerOutputs:
    shift = np.where(rows, np.float32(0.01), np.float32(0.0))
    return outputs._replace(value=outputs.value + shift, action_values=outputs.action_values + shift[:, None])


def usual(inputs: dict[str, Any]) -> np.ndarray:
    return np.asarray((np.abs(inputs["state"]) < 1e6).all(axis=1) & inputs["caller_masks"].any(axis=1))


def dearer_in_batches(outputs: PlannerOutputs, inputs: dict[str, Any]) -> PlannerOutputs:
    return dearer(outputs, usual(inputs)) if len(outputs.action) > 1 else outputs


def dearer_alone(outputs: PlannerOutputs, inputs: dict[str, Any]) -> PlannerOutputs:
    return dearer(outputs, usual(inputs)) if len(outputs.action) == 1 else outputs


def other_steps_later(outputs: PlannerOutputs, inputs: dict[str, Any]) -> PlannerOutputs:
    sequence = outputs.sequence.copy()
    sequence[:, 1:] = np.where((usual(inputs) & ~outputs.fallback)[:, None], 6 - sequence[:, 1:], sequence[:, 1:])
    return outputs._replace(sequence=sequence)


def holds_later(outputs: PlannerOutputs, inputs: dict[str, Any]) -> PlannerOutputs:
    sequence = outputs.sequence.copy()
    sequence[:, 1:] = 0
    return outputs._replace(sequence=sequence)


def looser_masks(outputs: PlannerOutputs, inputs: dict[str, Any]) -> PlannerOutputs:
    return outputs._replace(action_masks=outputs.action_masks | usual(inputs)[:, None])


def plans_on_nan(outputs: PlannerOutputs, inputs: dict[str, Any]) -> PlannerOutputs:
    return outputs._replace(fallback=outputs.fallback & ~np.isnan(inputs["state"]).any(axis=1))


def plans_where_nothing_is_allowed(outputs: PlannerOutputs, inputs: dict[str, Any]) -> PlannerOutputs:
    return outputs._replace(fallback=outputs.fallback & inputs["caller_masks"].any(axis=1))


def trades_on_enormous_numbers(outputs: PlannerOutputs, inputs: dict[str, Any]) -> PlannerOutputs:
    finite = np.isfinite(inputs["state"]).all(axis=1)
    enormous = finite & ~(np.abs(inputs["state"]) < 1e6).all(axis=1)
    forbidden = (~outputs.action_masks).argmax(axis=1)
    action = np.where(enormous & ~outputs.action_masks.all(axis=1), forbidden, outputs.action)
    sequence = np.concatenate([action[:, None], outputs.sequence[:, 1:]], axis=1)
    return outputs._replace(action=action, sequence=sequence)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dearer_in_batches, r"planner graph \(batch\): plan value: row 0"),
        (dearer_alone, r"planner graph \(single rows\): plan value: row 0"),
        (other_steps_later, r"planner graph \(sequences\): row \d+: expected a valid one worth"),
        (holds_later, r"planner graph \(sequences\): row \d+: expected a valid one worth"),
        (looser_masks, r"planner graph \(batch\): plan action_masks: row"),
        (plans_on_nan, r"planner graph \(rows without a plan\): plan fallback: row"),
        (plans_where_nothing_is_allowed, r"planner graph \(rows without a plan\): plan fallback: row"),
        (trades_on_enormous_numbers, r"planner graph \(rows without a plan\): plan action: row"),
    ],
)
def test_each_fault_of_a_graph_is_found_and_named(
    graph: PlannerModule, check: Check, change: Change, message: str
) -> None:
    with pytest.raises(ParityError, match=message):
        check(Session(graph, change))


@pytest.mark.parametrize("tables", [1, TABLES - 1, TABLES + 1])
def test_another_number_of_noise_tables_is_found(planner: PlannerPolicy, check: Check, tables: int) -> None:
    with pytest.raises(ParityError, match=r"planner graph \(batch\): plan value"):
        check(Session(planner_graph(planner, noise_tables=tables)))


class Reckless(PlannerGraph):
    """Forgets the masks of imagined bars."""

    def masks(self, account: Any, alive: torch.Tensor, bar: Any) -> torch.Tensor:
        return super().masks(account, alive, bar) | True


def test_a_graph_without_the_masks_of_imagined_bars_is_refused(planner: PlannerPolicy, check: Check) -> None:
    with pytest.raises(ParityError, match=r"planner graph \(batch\): plan value"):
        check(Session(Reckless(planner, noise_tables=TABLES)))


def stricter() -> PlannerPolicy:
    return planner_of(dynamics=make_dynamics(min_holding_bars=0, max_position_change=0.5))


def slower() -> PlannerPolicy:
    return planner_of(dynamics=make_dynamics(min_holding_bars=1))


def over_another_market() -> PlannerPolicy:
    model = make_market_model()
    with torch.no_grad():
        model.network.weights[0].mul_(1.5)
    return planner_of(model=model)


def over_another_policy() -> PlannerPolicy:
    dynamics = make_dynamics(min_holding_bars=0)
    return planner_of(dynamics=dynamics, network=make_policy(dynamics, seed=2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (stricter, "plan action_masks"),
        (slower, "plan (action_masks|value)"),
        (over_another_market, "plan value"),
        (over_another_policy, "plan value"),
    ],
)
def test_a_planner_of_other_parts_is_refused(check: Check, other: Callable[[], PlannerPolicy], message: str) -> None:
    planner = other()
    with pytest.raises(ParityError, match=message):
        check(Session(planner_graph(planner, noise_tables=TABLES)), planner)


def test_too_few_usual_rows_prove_nothing(graph: PlannerModule, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_parity, "MAX_PLANNED", 0.0)
    with pytest.raises(ParityError, match="probe states: expected 200 of numbers below 0, was 0"):
        check(Session(graph))


def test_the_planners_policy_stays_in_its_mode(check: Check) -> None:
    planner = planner_of()
    assert planner.value is not None
    planner.value.network.set_training_mode(True)
    noise = planner.noise.clone()
    check(Session(planner_graph(planner, noise_tables=TABLES)), planner)
    assert planner.value.network.training
    assert torch.equal(planner.noise, noise)
    assert planner.seed == 0
