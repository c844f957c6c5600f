"""Planning over scenarios: worked by hand, against brute force over every sequence, and never outside the masks."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from mbpo_worlds import FIELDS, NAMES, make_dynamics, make_features, make_scaler, make_table

from benchmarks import contenders
from configs import DetentConfig
from configs.schema import PlannerConfig, WorldModelConfig
from envs import Account, TradingDynamics
from envs.vec_env import HistoryVecEnv
from evaluation import backtest
from masking import DrawdownLadder, InvalidMaskError, MaskingError
from masking.strict_policy import StrictMaskablePolicy
from mbpo import TorchPolicy, historical_forecast, planning
from mbpo.control_variate import unforeseen_reward
from mbpo.planning import PlannerPolicy
from mbpo.recipe import aversion_for
from pipeline import bundling
from planner import CEM, Exhaustive
from world_model import MarketModel
from world_model.networks import EnsembleMLP
from world_model.normaliser import Normaliser

HOLD, ZERO, QUARTER, HALF, ALL = 0, 1, 2, 3, 5
LOOSE = {"min_holding_bars": 0, "max_position_change": 2.0}
SIGNAL, POSITION = NAMES.index("signal"), len(NAMES)
DOUBT = make_dynamics().state_names.index("model_uncertainty")


class Drift:
    """A market that moves by its signal each bar, tilted by `tilt` per member, and by noise of size `volatility`."""

    fields = FIELDS
    elites = (0, 2)

    def __init__(self, volatility: float = 0.0, tilt: float = 0.0) -> None:
        self.volatility, self.tilt = volatility, tilt

    def draw(
        self, features: torch.Tensor, member: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean = features.clone()
        mean[:, 0] = 0.0
        mean[:, 1] = features[:, SIGNAL] + self.tilt * member
        spread = self.volatility * torch.tensor([0.3, 1.0, 10.0, 0.0])
        return mean + spread * noise, mean, (spread * spread).expand_as(mean)

    def disagreement(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, 1].abs()


class Wish:
    """A value function of position, last move and doubt, and a preferred action, in place of a trained policy."""

    def __init__(self, worth: float, action: int) -> None:
        self.worth, self.action = worth, action

    def values(self, state: torch.Tensor) -> torch.Tensor:
        return self.worth * state[:, POSITION] * (1 + 10 * state[:, 1] + 10 * state[:, DOUBT])

    def act(self, state: np.ndarray, action_masks: np.ndarray) -> np.ndarray:
        return np.full(len(state), self.action)


def planned_dynamics(cost_rate: float = 3e-4, **rules: object) -> TradingDynamics:
    dynamics = make_dynamics(cost_rate=cost_rate, **rules)
    return dynamics.with_rule_set(dynamics.rule_set)  # the account follows the ladder of the rules


def planner(dynamics: TradingDynamics, market: object = None, **options: object) -> PlannerPolicy:
    named = {"horizon": 3, "scenarios": 4, "control_variate": 0.0}
    own = {name: options.pop(name) for name in [*options] if name in PlannerConfig.model_fields}
    config = PlannerConfig(**{**named, **own})
    settings = {"seed": 0, "gamma": 1.0, **options}
    return PlannerPolicy(dynamics, market or Drift(), config, **settings)  # type: ignore[arg-type]


def states(dynamics: TradingDynamics, signals: list[float], **columns: float) -> np.ndarray:
    rows = np.zeros((len(signals), len(dynamics.state_names)), np.float32)
    rows[:, NAMES.index("volatility_20")], rows[:, SIGNAL] = 0.16, signals
    for name, value in columns.items():
        rows[:, dynamics.state_names.index(name)] = value
    return rows


def chosen(policy: PlannerPolicy, rows: np.ndarray) -> list[int]:
    return policy.act(rows, policy.dynamics.action_masks(rows)).tolist()


def test_it_buys_where_three_bars_of_the_move_exceed_the_cost_and_holds_where_they_do_not() -> None:
    # Entering costs 1 %: three bars of 0.4 % repay it, three of 0.3 % do not.
    dynamics = planned_dynamics(cost_rate=0.01, **LOOSE)
    assert chosen(planner(dynamics), states(dynamics, [0.004, 0.003, -0.004])) == [ALL, HOLD, HOLD]


def test_it_sells_before_a_fall_that_exceeds_the_cost() -> None:
    dynamics = planned_dynamics(cost_rate=0.01, **LOOSE)
    rows = states(dynamics, [0.004, -0.003, -0.004], position=1.0, holding_time=9)
    assert chosen(planner(dynamics), rows) == [HOLD, HOLD, ZERO]


def test_a_bar_beyond_the_horizon_counts_only_with_a_value_function() -> None:
    dynamics = planned_dynamics(**LOOSE)
    rows = states(dynamics, [0.0])
    assert chosen(planner(dynamics, horizon=1), rows) == [HOLD]
    assert chosen(planner(dynamics, horizon=1, value=Wish(10.0, HOLD)), rows) == [ALL]
    # At a discount of 0.002 the value counts 0.02, less than the cost of 0.03 reward units.
    assert chosen(planner(dynamics, horizon=1, value=Wish(10.0, HOLD), gamma=0.002), rows) == [HOLD]


def test_the_policy_decides_between_equal_sequences_and_between_no_others() -> None:
    # For a flat account Hold and the target 0 are the same.
    dynamics = planned_dynamics(**LOOSE)
    rows = states(dynamics, [-0.01])
    assert chosen(planner(dynamics), rows) == [HOLD]
    assert chosen(planner(dynamics, value=Wish(0.0, ZERO)), rows) == [ZERO]
    assert chosen(planner(dynamics, value=Wish(0.0, ALL)), rows) == [HOLD]


def brute_force(policy: PlannerPolicy, row: np.ndarray, masks: np.ndarray) -> dict[tuple[int, ...], float]:
    # Every sequence through every scenario on its own, in NumPy and float64: value of each that is valid throughout.
    dynamics, config = policy.dynamics, policy.config
    imagined = policy.imagine(torch.as_tensor(row[None, : len(NAMES)]))
    bars, doubts, means, variances = (part[:, 0].double().numpy() for part in imagined)
    values = {}
    for sequence in itertools.product(range(dynamics.num_actions), repeat=config.horizon):
        totals, valid, last = np.zeros(config.scenarios), bool(masks[sequence[0]]), []
        for scenario in range(config.scenarios):
            account = dynamics.account_from_state(row[None], np.float64)
            for t, action in enumerate(sequence):
                if t:
                    state = dynamics.state_row(bars[t - 1, scenario][None], account, doubts[t][None])
                    valid &= bool(dynamics.action_masks(state)[0, action])
                held, bar = account.position[0], bars[t, scenario]
                account, outcome, reward = dynamics.step(account, np.array([action]), bar[None])
                luck = unforeseen_reward(
                    dynamics.reward,
                    (held, outcome.target[0]),
                    tuple(bar[:2]),
                    means[t, scenario],
                    variances[t, scenario],
                )
                charge = config.uncertainty_penalty * doubts[t] * abs(account.position[0])
                totals[scenario] += policy.gamma**t * (reward[0] - config.control_variate * luck - charge)
                if account.killed[0]:
                    break
            else:
                last.append((scenario, bars[-1, scenario], *(column[0] for column in account)))
        if policy.value is not None and last:
            # What is left of the scenarios is judged at their mean.
            left, *rest = zip(*last, strict=True)
            mean, *columns = (np.mean(part, axis=0) for part in rest)
            state = dynamics.state_row(mean[None], Account(*(np.array([part]) for part in columns)), doubts[-1][None])
            worth = float(policy.value.values(torch.as_tensor(state))[0])
            totals[list(left)] += policy.gamma**config.horizon * worth
        if valid:
            worst = max(1, math.ceil(config.tail * config.scenarios))
            values[sequence] = float(np.sort(totals)[:worst].mean())
    return values


LADDER = DrawdownLadder(soft=0.02, hard=0.04, kill=0.06, cooldown_bars=2)


@pytest.mark.parametrize(
    ("limits", "columns"),
    [
        (LOOSE, {}),
        ({"min_holding_bars": 2, "max_position_change": 0.6}, {"position": 0.5, "holding_time": 1}),
        ({**LOOSE, "max_volatility": 0.3}, {"position": 0.25, "holding_time": 9}),
        # Some scenarios reach REDUCE_ONLY, HALTED or the kill switch on the way.
        ({**LOOSE, "ladder": LADDER}, {"position": 0.75, "drawdown": 0.015, "holding_time": 9}),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"value": Wish(0.7, HOLD)},
        {"control_variate": 1.0},
        {"control_variate": 0.5, "uncertainty_penalty": 4.0, "value": Wish(0.7, HOLD)},
        {"tail": 0.4, "value": Wish(0.7, HOLD)},
    ],
)
def test_the_plan_is_the_best_of_all_sequences_by_brute_force(limits, columns, options) -> None:
    dynamics = planned_dynamics(cost_rate=2e-3, **limits)
    policy = planner(dynamics, Drift(volatility=0.03, tilt=0.002), scenarios=5, gamma=0.9, **options)
    row = states(dynamics, [0.004], **columns)
    masks = dynamics.action_masks(row)
    plan = policy.plan(row, masks)
    values = brute_force(policy, row[0], masks[0])
    for action in range(dynamics.num_actions):
        expected = max((v for sequence, v in values.items() if sequence[0] == action), default=-np.inf)
        assert float(plan.action_values[0, action]) == pytest.approx(expected, abs=1e-4)
    sequence = tuple(plan.sequence[0].tolist())
    assert values[sequence] == pytest.approx(max(values.values()), abs=1e-4)


@pytest.mark.parametrize("search", ["cem", "random_shooting"])
def test_sampled_plans_are_valid_and_come_close_to_the_exact_one(search: str) -> None:
    dynamics = planned_dynamics(cost_rate=2e-3)
    market, rows = Drift(volatility=0.02), states(dynamics, list(np.linspace(-0.01, 0.01, 12)))
    masks = dynamics.action_masks(rows)
    exact = planner(dynamics, market).plan(rows, masks)
    sampled = planner(dynamics, market, search=search, candidates=256, elites=16)
    found = sampled.plan(rows, masks)
    assert (found.value <= exact.value + 1e-9).all()
    assert (exact.value - found.value < 0.02).all()
    np.testing.assert_array_equal(sampled.act(rows[:1], masks[:1]), sampled.act(rows, masks)[:1])
    assert masks[np.arange(len(rows)), sampled.act(rows, masks)].all()


def test_auto_is_exact_while_the_tree_fits() -> None:
    dynamics = planned_dynamics()
    assert isinstance(planner(dynamics, search="auto", max_nodes=399).search, Exhaustive)
    assert isinstance(planner(dynamics, search="auto", max_nodes=398).search, CEM)


def test_scenarios_in_which_everything_is_killed_end_the_plan_and_pay_nothing_more() -> None:
    dynamics = planned_dynamics(**LOOSE, ladder=LADDER, max_volatility=1e-6)
    row = states(dynamics, [-0.2], position=1.0, holding_time=9)
    plan = planner(dynamics, gamma=0.5, value=Wish(100.0, HOLD)).plan(row, np.eye(1, 7, dtype=bool))
    assert plan.length.tolist() == [1]
    assert plan.sequence.tolist() == [[HOLD, HOLD, HOLD]]
    # Log return -0.2 is -20, the drawdown 1 - e^-0.2 costs 0.005 / 0.15 of itself, the breach 1.
    assert float(plan.value) == pytest.approx(-20 - (1 - np.exp(-0.2)) / 30 - 1, abs=1e-4)


def test_a_killed_scenario_has_no_value_after_it() -> None:
    # One of two scenarios is killed in the only bar; the other keeps its position, drifted by the move.
    dynamics = planned_dynamics(ladder=DrawdownLadder(soft=0.005, hard=0.01, kill=0.02))
    policies = [planner(dynamics, Drift(0.05), scenarios=2, horizon=1, value=Wish(w, HOLD)) for w in (0.0, 100.0)]
    row, only_hold = states(dynamics, [0.0], position=1.0, holding_time=9), np.eye(1, 7, dtype=bool)
    bare, valued = (float(policy.plan(row, only_hold).value) for policy in policies)
    move = float(policies[0].imagine(torch.as_tensor(row[:, : len(NAMES)])).features[0, 0, :, 1].max())
    assert valued - bare == pytest.approx(0.5 * 100.0 * 1.0 * (1 + 10 * move), rel=1e-5)


def test_a_limit_reached_in_one_scenario_binds_the_sequence_and_a_kill_in_one_does_not() -> None:
    # Two scenarios, up and down by 5 %: the second loses between 2 and 5 % of equity at once. Where that is REDUCE_ONLY
    # nobody may buy more in the first scenario either; where it is the kill switch its episode is over.
    for ladder, may_buy in (
        (DrawdownLadder(soft=0.02, hard=0.5, kill=0.6), False),
        (DrawdownLadder(soft=0.005, hard=0.01, kill=0.02), True),
    ):
        dynamics = planned_dynamics(cost_rate=0.0, **LOOSE, ladder=ladder, max_volatility=9.0)
        policy = planner(dynamics, Drift(volatility=0.05), scenarios=2, value=Wish(100.0, HOLD))
        policy.noise[1:] = 0.0  # then the market stands still
        row = states(dynamics, [0.0], position=0.75, holding_time=9)
        plan = policy.plan(row, np.eye(1, 7, dtype=bool))
        assert (ALL in plan.sequence[0].tolist()) == may_buy, ladder


def test_same_input_same_plan_in_any_company() -> None:
    dynamics = planned_dynamics(**LOOSE)
    policy = planner(dynamics, Drift(volatility=0.02))
    rows = states(dynamics, list(np.linspace(-0.01, 0.01, 30)))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = chosen(policy, rows)
    assert torch.equal(torch.get_rng_state(), before)
    assert chosen(policy, rows) == first == chosen(planner(dynamics, Drift(volatility=0.02)), rows)
    assert [chosen(policy, row[None])[0] for row in rows] == first
    assert chosen(policy, rows[::-1]) == first[::-1]
    assert len(set(first)) > 1


def test_many_rows_are_planned_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    dynamics = planned_dynamics(**LOOSE)
    policy = planner(dynamics, Drift(volatility=0.02))
    rows = states(dynamics, list(np.linspace(-0.01, 0.01, 10)))
    whole, sizes, plan = chosen(policy, rows), [], policy.plan

    def counted(state: np.ndarray, action_masks: np.ndarray) -> object:
        sizes.append(len(state))
        return plan(state, action_masks)

    monkeypatch.setattr(planning, "CHUNK_PATHS", 3 * 7**3 * 4)
    monkeypatch.setattr(policy, "plan", counted)
    assert chosen(policy, rows) == whole
    assert sizes == [3, 3, 3, 1]


@pytest.mark.parametrize("scenarios", [1, 2, 5, 16])
def test_noise_is_antithetic_and_elites_are_dealt_evenly(scenarios: int) -> None:
    policy = planner(planned_dynamics(), scenarios=scenarios)
    noise, members = policy.noise, policy.members
    assert noise.shape == (3, scenarios, len(NAMES))
    assert members.shape == (3, scenarios)
    torch.testing.assert_close(noise.mean(dim=1), torch.zeros(3, len(NAMES)), atol=1e-6, rtol=0)
    expected = torch.full((3, len(NAMES)), float(scenarios > 1))
    torch.testing.assert_close(noise.square().mean(dim=1), expected)
    pairs = (scenarios + 1) // 2
    for depth in range(3):
        for first in range(scenarios - pairs):
            torch.testing.assert_close(noise[depth, first], -noise[depth, pairs + first])
            assert members[depth, first] == members[depth, pairs + first]
        counts = [int((members[depth, :pairs] == elite).sum()) for elite in Drift.elites]
        assert sum(counts) == pairs
        assert max(counts) - min(counts) <= 1
    if scenarios > 1:
        assert not torch.equal(noise, planner(planned_dynamics(), scenarios=scenarios, seed=1).noise)


def test_the_given_masks_hold_at_the_first_bar_whatever_the_state_row_says() -> None:
    dynamics = planned_dynamics(**LOOSE)
    policy = planner(dynamics, Drift(volatility=0.02))
    rng = np.random.default_rng(0)
    rows = states(dynamics, list(rng.normal(0, 0.01, 200)))
    masks = dynamics.action_masks(rows) & (rng.random((200, 7)) < 0.5)
    masks[:, HOLD] = True
    actions = policy.act(rows, masks)
    assert masks[np.arange(200), actions].all()
    assert len(set(actions.tolist())) > 3


def market_model(features: np.ndarray) -> MarketModel:
    rows = torch.tensor(features, dtype=torch.float32)
    config = WorldModelConfig(hidden=(8,))
    network = EnsembleMLP(
        5, 4, 4, hidden=config.hidden, logvar_bounds=config.logvar_bounds, generator=torch.Generator().manual_seed(0)
    )
    normalisers = (Normaliser(part.mean(0), part.std(0) + 1e-3) for part in (rows, rows.diff(dim=0)))
    support = (rows.amin(0), rows.amax(0))
    model = MarketModel(FIELDS, config, *normalisers, network, elites=(0, 1, 3), support=support)
    # A drift worth its cost: with nothing to gain every plan holds.
    model.line[1, 0] = 1.0
    return model


def value_policy(dynamics: TradingDynamics, features: np.ndarray) -> TorchPolicy:
    torch.manual_seed(0)
    network = StrictMaskablePolicy(
        spaces.Box(-1.0, 1.0, (len(dynamics.obs_names),), np.float32),
        spaces.Discrete(dynamics.num_actions),
        lr_schedule=lambda _: 0.0,
        net_arch=[8],
    )
    return TorchPolicy("value", network, make_scaler(features))


def test_a_backtest_with_a_market_model_and_a_value_network_executes_valid_actions_only() -> None:
    features, dynamics = make_features(80), planned_dynamics(ladder=LADDER)
    policy = planner(dynamics, market_model(features), value=value_policy(dynamics, features), name="mbpo_planner")
    times = np.arange("2020-01-01", "2020-03-21", dtype="datetime64[D]")
    result = backtest(dynamics, features, times, policy)  # raises on a forbidden action
    assert len({*np.asarray(result.actions).ravel().tolist()}) > 1


def test_values_of_a_policy_are_those_of_its_network() -> None:
    features, dynamics = make_features(80), planned_dynamics()
    policy = value_policy(dynamics, features)
    env = HistoryVecEnv(dynamics, policy.scaler, features, num_envs=9, episode_bars=50, seed=3)
    obs = env.reset()
    expected = policy.network.predict_values(torch.as_tensor(obs))[:, 0].detach()
    torch.testing.assert_close(policy.values(torch.as_tensor(env.walks.state)), expected)


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, 1.0), ({"risk_aversion": 9.0}, 9.0), ({"usual_position": 0.1}, None)]
)
def test_the_planner_of_a_bundle_is_judged_by_the_reward_its_value_function_was_trained_on(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, float], expected: float | None
) -> None:
    written: dict[str, Any] = {}
    monkeypatch.setattr(bundling, "write_bundle", lambda destination, **parts: written.update(parts))
    config = DetentConfig.model_validate(
        {"reward": {"risk_aversion": 1.0}, "mbpo": settings, "export": {"planner": True}, "planner": {"scenarios": 4}}
    )
    dynamics, table = TradingDynamics.from_config(NAMES, config), make_table(80)
    model, policy = market_model(table.values), value_policy(dynamics, table.values)
    inputs = SimpleNamespace(config=config, dynamics=dynamics, train=table, table=table, data_hash="0")
    bundling.bundle_run(inputs, policy, model, Path("nowhere"))  # type: ignore[arg-type]
    planned, wanted = written["planner"], expected or aversion_for(historical_forecast(model, table.values), 0.1)
    assert planned.dynamics == dynamics.with_risk_aversion(wanted)
    assert (planned.value, planned.gamma, planned.seed) == (policy, config.mbpo.ppo.gamma, config.seed)
    assert written["dynamics"].reward.risk_aversion == 1.0  # the bundle's own is that of the suite


def test_planners_of_the_suite_are_judged_by_the_reward_that_mbpo_has_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    features, dynamics = make_features(80), planned_dynamics()
    model, policy = market_model(features), value_policy(dynamics, features)
    monkeypatch.setattr(contenders, "fit_world_model", lambda lesson, progress: model)
    monkeypatch.setattr(contenders, "train_mbpo", lambda *arguments: (policy, {"risk_aversion": 9.0}))
    monkeypatch.setattr(contenders, "calibration", lambda lesson, model: {})
    lesson = SimpleNamespace(config=DetentConfig(), dynamics=dynamics)
    fitted = contenders.fit_model_based(lesson, contenders.silent)  # type: ignore[arg-type]
    for name in ("planner", "mbpo_planner"):
        assert fitted[name].policy.dynamics.reward.risk_aversion == 9.0  # type: ignore[attr-defined]
    assert dynamics.reward.risk_aversion == 0.0


def test_risk_aversion_shrinks_the_planned_position() -> None:
    # A sure move of 1 % is worth p/100 - aversion/2 * (p/100)^2: all of it at no aversion, about half at 200.
    dynamics = planned_dynamics(cost_rate=0.0, **LOOSE, max_volatility=9.0)
    rows = states(dynamics, [0.01])
    found = [chosen(planner(dynamics.with_risk_aversion(aversion), horizon=1), rows) for aversion in (0.0, 200.0)]
    assert found == [[ALL], [HALF]]


def test_nan_in_a_state_and_malformed_masks_are_refused() -> None:
    dynamics = planned_dynamics()
    rows, policy = states(dynamics, [0.01, np.nan]), planner(dynamics)
    masks = np.eye(1, 7, dtype=bool).repeat(2, axis=0)
    with pytest.raises(
        MaskingError, match=r"planner: expected a sequence of finite value, was none in 1 of 2 .* row 1"
    ):
        policy.act(rows, masks)
    with pytest.raises(InvalidMaskError, match=r"expected shape \[2, 7\]"):
        policy.act(rows, masks[:1])
    with pytest.raises(InvalidMaskError, match="Hold"):
        policy.act(rows, np.zeros((2, 7), dtype=bool))


def test_a_model_of_other_columns_is_refused() -> None:
    market = Drift()
    market.fields = FIELDS[::-1]  # type: ignore[assignment]
    with pytest.raises(ValueError, match="model: expected the columns of the dynamics"):
        planner(planned_dynamics(), market)
