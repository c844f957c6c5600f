"""The planner's graph plans as the planner does: under masks, limits, penalties, noise and broken numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from bundle_parts import make_dynamics, make_market_model, make_policy, make_scaler, sideways_dynamics

from configs.schema import PlannerConfig
from envs import Account, TradingDynamics
from export.errors import ExportError
from export.onnx_files import onnx_bytes
from export.planner_graph import PlannerGraph, PlannerOutputs
from export.scenario_graph import Bar
from export.search_graph import PlannerModule, SearchGraph, planner_graph
from export.states import probe_masks, probe_states
from masking import DrawdownLadder, RuleSet, trading_rules
from mbpo import TorchPolicy
from mbpo.planning import PlannerPolicy

ROWS = 60


def planner(dynamics: TradingDynamics, *, valued: bool = True, **options: Any) -> PlannerPolicy:
    config = PlannerConfig(**{"scenarios": 6, "horizon": 2, **options})
    value = TorchPolicy("value", make_policy(dynamics), make_scaler()) if valued else None
    return PlannerPolicy(dynamics, make_market_model(), config, seed=0, gamma=0.97, value=value)


def rows(dynamics: TradingDynamics, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    state = probe_states(dynamics, make_scaler(), 4 * ROWS, rng)
    # Enormous cells overflow in one order of operations and not in another.
    state = state[(np.abs(state) < 1e6).all(axis=1)][:ROWS]
    return state, probe_masks(dynamics.num_actions, len(state), rng)


def decided(graph: PlannerModule, state: np.ndarray, masks: np.ndarray, seed: int = 0) -> PlannerOutputs:
    with torch.no_grad():
        outputs = graph(torch.from_numpy(state), torch.from_numpy(masks), torch.full((len(state),), seed))
    return PlannerOutputs(*(part.numpy() for part in outputs))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"valued": False},
        {"scenarios": 1},
        {"horizon": 3, "scenarios": 5},
        {"horizon": 1},
        {"uncertainty_penalty": 3.0},
        {"control_variate": 0.0},
    ],
)
@pytest.mark.parametrize("limits", [{}, {"min_holding_bars": 0, "max_position_change": 2.0, "max_volatility": 0.3}])
def test_actions_values_and_sequences_are_those_of_the_planner(limits: dict[str, Any], options: dict[str, Any]) -> None:
    dynamics = make_dynamics(**limits)
    policy = planner(dynamics, **options)
    state, callers = rows(dynamics)
    masks = np.asarray(dynamics.action_masks(state)) & callers
    plan, found = policy.plan(state, masks), decided(PlannerGraph(policy), state, callers)
    np.testing.assert_array_equal(found.action_masks, masks)
    np.testing.assert_array_equal(found.fallback, plan.fallback.numpy())
    assert plan.action_values is not None
    np.testing.assert_allclose(found.action_values, plan.action_values.numpy(), rtol=1e-4, atol=1e-4)
    # Where values tie up to rounding, either action will do.
    chosen, wanted = np.arange(len(state)), policy.act(state, masks)
    same = (found.action == wanted) | np.isclose(
        found.action_values[chosen, found.action], plan.action_values.numpy()[chosen, wanted], atol=1e-5
    )
    assert same.all()
    assert (found.action == wanted).mean() > 0.9
    assert masks[np.arange(len(state)), found.action].all()
    assert len(set(found.action.tolist())) > 2


class Haunted(PlannerGraph):
    """Lets the dead forbid what the living may do."""

    def masks(self, account: Account, alive: torch.Tensor, bar: Bar) -> torch.Tensor:
        return super().masks(account, alive | True, bar)


def test_scenarios_that_were_killed_forbid_the_others_nothing() -> None:
    dynamics = make_dynamics()
    # So tight that a bar kills some scenarios, and leaves others with every choice.
    ladder = DrawdownLadder(soft=0.010, hard=0.011, kill=0.012)
    rules = trading_rules(ladder=ladder, paper=True, min_holding_bars=0, max_position_change=2.0)
    dynamics = dynamics.with_rule_set(RuleSet(rules, dynamics.rule_set.actions))
    policy = planner(dynamics, valued=False)
    state, _ = rows(dynamics)
    for name, number in (("drawdown", 0.0), ("position", 1.0), ("exposure", 1.0), ("trading_state", 0.0)):
        state[:, dynamics.state_names.index(name)] = number
    masks = np.asarray(dynamics.action_masks(state))
    plan, found = policy.plan(state, masks), decided(PlannerGraph(policy), state, masks)
    assert plan.action_values is not None
    np.testing.assert_allclose(found.action_values, plan.action_values.numpy(), rtol=1e-4, atol=1e-4)
    haunted = decided(Haunted(policy), state, masks)
    assert (haunted.action_values < found.action_values - 1e-3).any()


def test_a_bar_that_is_no_number_is_worth_nothing_where_somebody_lives_who_sees_it() -> None:
    dynamics = make_dynamics()
    graph = PlannerGraph(planner(dynamics))
    assert graph.value is not None
    state, _ = rows(dynamics)
    account = dynamics.account_from_state(torch.from_numpy(state[:1]), torch.float32)
    spread_out = Account(*(column[:, None, None].expand(1, 1, 2) for column in account))
    features = torch.from_numpy(state[:1, :4, None]).expand(1, 4, 2).clone()
    bar = Bar(features, torch.full((1,), 0.1), features[:, :2], features[:, :2])
    alive = torch.tensor([[[True, False]]])
    known = graph.future(graph.value, spread_out, alive, bar)
    assert torch.isfinite(known).all()
    for scenario, blind in ((1, False), (0, True)):
        broken = features.clone()
        broken[0, 3, scenario] = torch.nan
        future = graph.future(graph.value, spread_out, alive, bar._replace(features=broken))
        assert torch.isposinf(future).all() if blind else torch.equal(future, known)


SEARCHES: list[dict[str, Any]] = [
    {"search": "cem", "candidates": 24, "elites": 4, "iterations": 2},
    {"search": "random_shooting", "candidates": 24},
    {"tail": 0.5, "control_variate": 0.0},
    {"particles": "each"},
]


@pytest.mark.parametrize("options", SEARCHES)
def test_every_other_search_plans_as_in_python(options: dict[str, Any]) -> None:
    dynamics = make_dynamics()
    policy = planner(dynamics, **options)
    graph = planner_graph(policy)
    assert isinstance(graph, SearchGraph)
    state, callers = rows(dynamics)
    masks = np.asarray(dynamics.action_masks(state)) & callers
    plan, found = policy.plan(state, masks), decided(graph, state, callers)
    np.testing.assert_array_equal(found.action_masks, masks)
    np.testing.assert_array_equal(found.fallback, plan.fallback.numpy())
    np.testing.assert_allclose(found.value, plan.value.numpy(), rtol=1e-4, atol=1e-4)
    chosen, first = np.arange(len(state)), plan.action.numpy()
    assert plan.action_values is not None
    same = (found.action == first) | np.isclose(
        found.action_values[chosen, found.action], plan.action_values.numpy()[chosen, first], atol=1e-5
    )
    assert same.all()
    assert masks[chosen, found.action].all()
    assert len(set(found.action.tolist())) > 2
    assert isinstance(planner_graph(planner(dynamics)), PlannerGraph)


def test_a_sampling_search_draws_by_the_seed() -> None:
    policy = planner(make_dynamics(), valued=False, control_variate=0.0, **SEARCHES[1])
    graph = SearchGraph(policy, noise_tables=2)
    assert graph.draws.shape[0] == 2
    assert not torch.equal(graph.draws[0], graph.draws[1])
    assert torch.equal(graph.draws[0], policy.search_noise()[:, 0])
    with pytest.raises(TypeError, match="one that samples"):
        planner(make_dynamics()).search_noise()


def test_noise_tables_are_picked_by_the_seed_and_the_first_is_the_planners() -> None:
    dynamics = make_dynamics()
    policy = planner(dynamics, control_variate=0.0)
    graph = PlannerGraph(policy, noise_tables=3)
    state, callers = rows(dynamics)
    values = [decided(graph, state, callers, seed).value for seed in range(4)]
    np.testing.assert_array_equal(values[0], values[3])
    assert not np.array_equal(values[0], values[1])
    assert not np.array_equal(values[1], values[2])
    np.testing.assert_array_equal(values[0], decided(PlannerGraph(policy), state, callers).value)


def test_what_cannot_be_decided_holds_and_says_so() -> None:
    dynamics = make_dynamics()
    graph = PlannerGraph(planner(dynamics))
    state, callers = rows(dynamics)
    state, callers = state[:4].copy(), np.ones_like(callers[:4])
    state[1, 0], state[2, dynamics.state_names.index("open_pnl")], callers[3] = np.nan, np.nan, False
    found = decided(graph, state, callers)
    assert found.fallback.tolist() == [False, True, True, True]
    assert found.action[1:].tolist() == [0, 0, 0]
    assert found.value[1:].tolist() == [0.0, 0.0, 0.0]
    assert np.isfinite(found.value).all()


@pytest.mark.parametrize(
    "options",
    [{}, {"search": "cem", "candidates": 8, "elites": 2, "iterations": 2}, {"tail": 0.5, "control_variate": 0.0}],
)
def test_one_file_decides_alike_for_any_batch(options: dict[str, Any]) -> None:
    import onnxruntime

    dynamics = make_dynamics()
    policy = planner(dynamics, valued=False, **{"scenarios": 4, **options})
    graph = planner_graph(policy, noise_tables=2)
    example = {
        "state": torch.zeros(3, len(dynamics.state_names)),
        "caller_masks": torch.ones(3, dynamics.num_actions, dtype=torch.bool),
        "seed": torch.zeros(3, dtype=torch.int64),
    }
    session = onnxruntime.InferenceSession(onnx_bytes(graph, example, PlannerOutputs._fields, {}))
    state, callers = rows(dynamics)
    expected = decided(graph, state, callers, seed=1)
    for batch in (1, 2, len(state)):
        parts = [
            session.run(
                None,
                {
                    "state": state[first : first + batch],
                    "caller_masks": callers[first : first + batch],
                    "seed": np.ones(min(batch, len(state) - first), dtype=np.int64),
                },
            )
            for first in range(0, len(state), batch)
        ]
        found = PlannerOutputs(*(np.concatenate(part) for part in zip(*parts, strict=True)))
        np.testing.assert_array_equal(found.action, expected.action)
        np.testing.assert_array_equal(found.action_masks, expected.action_masks)
        np.testing.assert_allclose(found.value, expected.value, rtol=1e-4, atol=1e-5)


def test_searches_and_rules_that_have_no_such_graph_are_refused() -> None:
    dynamics = make_dynamics()
    with pytest.raises(ExportError, match="search: expected an exhaustive one"):
        PlannerGraph(planner(dynamics, search="cem"))
    with pytest.raises(ExportError, match="search: expected an exhaustive one"):
        PlannerGraph(planner(dynamics, tail=0.5, control_variate=0.0))
    with sideways_dynamics() as sideways, pytest.raises(ExportError, match="rule set: expected"):
        PlannerGraph(planner(sideways, valued=False))
