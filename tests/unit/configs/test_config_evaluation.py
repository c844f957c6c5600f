"""Settings of the evaluation: what contradicts itself is refused, and the shipped suites mean what they say."""

from __future__ import annotations

import pytest

from configs import ConfigError, load_config, schema
from masking import ActionTable

BOUNDS = {
    "evaluation.market.bars_per_day": ("1", "0"),
    "evaluation.market.drift": ("[0.1, 0, -0.1]", "[0.1, 0]"),
    "evaluation.market.volatility": ("[0.1, 0.1, 0.2]", "[0.1, 0.1, 0]"),
    "evaluation.market.signal_noise": ("0", "-0.1"),
    "evaluation.market.gap_share": ("0.5", "1"),
    "evaluation.garch.degrees_of_freedom": ("2.1", "2"),
    "evaluation.garch.alpha": ("0.09", "0.1"),
    "evaluation.ridge.horizons": ("[1]", "[0]"),
    "evaluation.ridge.penalties": ("[0.1]", "[0]"),
    "evaluation.sac.gamma": ("1", "1.1"),
    "evaluation.dqn.exploration_fraction": ("0", "-0.1"),
    "planner.horizon": ("5", "6"),
    "evaluation.suite.train_bars": ("[250, 1250]", "[249, 1250]"),
    "evaluation.suite.num_seeds": ("1000", "1001"),
    "evaluation.suite.test_bars": ("60", "59"),
    "evaluation.suite.stress_paths": ("0", "-1"),
    "evaluation.suite.timed_decisions": ("20", "19"),
    "evaluation.suite.trials": ("{mbpo: 1}", "{mbpo: 0}"),
    "evaluation.walk_forward.max_folds": ("1", "0"),
    "evaluation.walk_forward.embargo_bars": ("0", "-1"),
    "evaluation.verdict.confidence": ("0.99", "1"),
    "evaluation.verdict.resamples": ("200", "199"),
    "evaluation.verdict.min_sharpe_gain": ("0", "-0.1"),
    "evaluation.verdict.latency_budget_ms": ("1", "0"),
    "evaluation.verdict.power": ("0.9", "0.5"),
}
"""Setting -> a value at its bound, and one beyond."""


@pytest.mark.parametrize("setting", BOUNDS)
def test_the_bound_itself_is_allowed_and_what_is_beyond_is_refused_by_name(setting: str) -> None:
    inside, beyond = BOUNDS[setting]
    load_config("suite", [f"{setting}={inside}"])
    with pytest.raises(ConfigError, match=r"\.".join(setting.split(".")[:2])):
        load_config("suite", [f"{setting}={beyond}"])


def test_garch_that_explodes_is_refused_with_the_sum() -> None:
    with pytest.raises(ConfigError, match=r"expected alpha \+ beta < 1, was 1\b"):
        load_config("default", ["evaluation.garch.alpha=0.1", "evaluation.garch.beta=0.9"])


def test_a_verdict_is_given_for_a_length_that_is_compared() -> None:
    with pytest.raises(ConfigError, match=r"primary_train_bars: expected one of \[500, 1250, 5000\], was 1000"):
        load_config("suite", ["evaluation.suite.primary_train_bars=1000"])


def test_a_bar_of_a_year_follows_from_the_bars_of_a_day() -> None:
    market = load_config("default", ["evaluation.market.bars_per_day=390"]).evaluation.market
    assert market.bars_per_year == 98_280


@pytest.mark.parametrize("profile", ["suite", "suite-smoke"])
def test_both_suites_trade_at_the_same_costs(profile: str) -> None:
    account = load_config(profile).account
    assert (account.commission_bps, account.slippage_bps, account.spread_share) == (1.0, 0.5, 0.5)


def test_the_frozen_suite_is_large_enough_for_its_own_margins() -> None:
    evaluation = load_config("suite").evaluation
    # Without one event among n paths a rate is shown to be below m where (1 - m)^n <= 2.5 %, two intervals of them.
    assert (1.0 - evaluation.verdict.kill_switch_margin) ** evaluation.suite.test_paths <= 0.025 / 2
    # One order statistic above the 99th percentile with 95 % confidence takes 299 decisions.
    assert evaluation.suite.timed_decisions >= 299
    assert evaluation.suite.num_seeds >= 2


def test_the_model_free_side_is_tuned_at_least_as_much_as_ours() -> None:
    trials = load_config("suite").evaluation.suite.trials
    assert trials["model_free"] >= trials["mbpo"] >= 1


def test_the_registered_thresholds_are_those_of_the_claim() -> None:
    for profile in ("default", "suite", "suite-smoke"):
        verdict = load_config(profile).evaluation.verdict
        assert (verdict.challenger, verdict.confidence, verdict.min_sharpe_gain) == ("mbpo", 0.95, 0.10)
        assert (verdict.drawdown_margin, verdict.kill_switch_margin, verdict.latency_budget_ms) == (0.02, 0.02, 50.0)


def test_rollouts_of_the_smoke_suite_divide_into_whole_minibatches() -> None:
    config = load_config("suite-smoke")
    rows = config.mbpo.ppo.num_envs * config.mbpo.rollout_length
    assert rows % config.mbpo.ppo.batch_size == config.mbpo.ppo.total_steps % rows == 0
    rows = config.model_free.num_envs * config.model_free.n_steps
    assert rows % config.model_free.batch_size == config.model_free.total_steps % rows == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["planner.tail=0.01", "planner.control_variate=0"], r"tail: expected at least 1 of 16 scenarios, was 0\.01"),
        (["planner.tail=0.5"], r"control_variate: expected 0 with tail=0\.5, was 1"),
        (["planner.search=cem", "planner.elites=600"], "elites: expected at most candidates=512, was 600"),
        (["planner.max_nodes=10"], "max_nodes: expected at least 18 for cem over 3 bars, was 10"),
    ],
)
def test_a_planner_that_contradicts_itself_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("default", settings)
    load_config("default", ["planner.tail=0.5", "planner.control_variate=0", "planner.elites=600"])
    # The tree of one bar has seven nodes, so auto never asks CEM.
    load_config("default", ["planner.horizon=1", "planner.max_nodes=7", "planner.iterations=2000"])


def test_trees_are_counted_with_the_actions_of_the_trading_environment() -> None:
    assert ActionTable().num_actions == schema.TRADING_ACTIONS
