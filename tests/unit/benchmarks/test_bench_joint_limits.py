"""The benchmark of joint limits: its counts, its rules, and a small run of everything."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.joint_limits import (
    SMOKE,
    BreachRate,
    greedy_actions,
    measure_breaches,
    measure_cost,
    measure_joint_limits,
    random_actions,
    rule_values,
    train,
)
from benchmarks.machine import machine
from envs.portfolio import LIMITS, PERIODS, TABLE, PortfolioVecEnv, observation_space
from masking.joint_policy import JointMaskablePolicy
from masking.strict_policy import StrictMaskablePolicy


def shown(cash: float, units: tuple[float, ...], prices: tuple[float, ...], period: int = 0) -> dict[str, np.ndarray]:
    """Observations [1, ...] of one portfolio, as far as rules read them."""
    obs = {name: np.zeros((1, *space.shape)) for name, space in observation_space().spaces.items()}
    obs["state"][0], obs["observations"][0, -1] = (cash, *units, *prices), period / (PERIODS - 1)
    return obs


def lots(actions: np.ndarray) -> list[float]:
    return [TABLE.lots[action] for action in actions[0]]


ALL = np.ones((1, 33), dtype=bool)


def test_the_joint_policy_breaches_nothing_and_factored_ones_do() -> None:
    rates = {rate.chooser: rate for rate in measure_breaches(20_000)}
    assert rates["joint policy"].breaches == rates["joint policy"].first_breaches == 0
    assert all(rate.actions >= 20_000 and rate.first_actions * 19 == rate.actions for rate in rates.values())
    for name in ("factored policy, published masks", "random, published masks"):
        assert rates[name].share > 0.9
        assert rates[name].beyond_cash <= rates[name].breaches
    # The best that masks per asset can do still lets combinations through.
    for name in ("factored policy, separate masks", "random, separate masks", "random, marginal masks"):
        assert 0.01 < rates[name].share < 0.5


def test_at_the_first_state_random_play_breaches_as_often_as_counted_by_hand() -> None:
    # Nothing can be sold: 6 actions per asset, hold to 50. At the mean prices 44, 35, 48 and $999 to spend, the lots of
    # ten that fit are at most two (two of any, 48 + 48 included), or none: 1 + 3 + 6 = 10 of 216 combinations.
    state = np.tile([1000.0, 0, 0, 0, 44, 35, 48], (216, 1))
    combinations = np.stack(np.meshgrid(*[np.arange(5, 11)] * 3), axis=-1).reshape(-1, 3)
    cash_only = replace(LIMITS, max_share=(1.0, 1.0, 1.0))
    assert cash_only.check(state, combinations).sum() == 10
    rates = {rate.chooser: rate for rate in measure_breaches(40_000, seed=1)}
    rate = rates["random, published masks"]
    assert rate.first_beyond_cash / rate.first_actions == pytest.approx(1 - 10 / 216, abs=0.03)


def test_share_is_breaches_per_action() -> None:
    counts = {"first_actions": 10, "first_beyond_cash": 1, "first_breaches": 2, "beyond_cash": 3}
    assert BreachRate(chooser="x", actions=200, breaches=50, **counts).share == 0.25


def test_the_greedy_rule_sells_what_falls_and_buys_the_largest_gain_first() -> None:
    # Means of the next period (t = 1): 44.0955, 35.1, 43.6090. Asset 3 falls from 60, asset 2 gains from 30 (17 %)
    # more than asset 1 from 40 (10 %). Cash 1000 + 20 * 59.97 buys 50 of asset 2: 1500 of a value of 2197 is over
    # two thirds, 40 are 1200; then 20 of asset 1 for 800.60, and no more than $197 is left.
    obs = shown(1000, (0, 0, 20), (40, 30, 60))
    assert lots(greedy_actions(LIMITS, obs, ALL)) == [20.0, 40.0, -20.0]
    # Nothing to gain: hold. Within the cost of trading, 0.055 a unit: hold, too.
    assert lots(greedy_actions(LIMITS, shown(1000, (10, 10, 10), (44.09, 35.09, 43.6)), ALL)) == [0.0, 0.0, 0.0]


def test_the_greedy_rule_obeys_masks_and_the_time() -> None:
    masks = ALL.copy().reshape(1, 3, 11)
    masks[0, 1, TABLE.hold + 1 :] = False
    obs = shown(1000, (0, 0, 20), (40, 30, 60))
    assert lots(greedy_actions(LIMITS, obs, masks.reshape(1, 33))) == [50.0, 0.0, -20.0]
    # At t = 8 asset 1 has its lowest mean, 39.2: at 40 it is bought before t = 1 but not before t = 8.
    assert lots(greedy_actions(LIMITS, shown(900, (0, 0, 0), (40, 90, 90), period=0), ALL))[0] == 20.0
    assert lots(greedy_actions(LIMITS, shown(900, (0, 0, 0), (40, 90, 90), period=7), ALL))[0] == 0.0


def test_random_actions_are_uniform_among_the_valid() -> None:
    masks = np.zeros((30_000, 3, 11), dtype=bool)
    masks[:, :, [1, 5, 9]] = True
    drawn = random_actions(masks.reshape(-1, 33), np.random.default_rng(0))
    assert set(np.unique(drawn)) == {1, 5, 9}
    np.testing.assert_allclose([(drawn == action).mean(axis=0) for action in (1, 5, 9)], 1 / 3, atol=0.015)


def test_rules_rank_as_they_should() -> None:
    values = {(value.method, value.variant): value for value in rule_values(500)}
    assert values["flat", "strict"].mean == pytest.approx(1000)
    assert values["flat", "strict"].standard_error == 0
    for variant in ("strict", "published"):
        random, greedy = values["random", variant], values["greedy", variant]
        assert 1000 < random.mean < 1500
        assert greedy.mean > 2 * random.mean
    # A sale costs cash, of which the greedy rule leaves none: `published` then cuts the sale down.
    assert 0 < values["greedy", "published"].overridden < 0.5
    assert values["random", "published"].overridden > 0.9
    assert values["random", "strict"].overridden == 0


def test_costs_are_medians_of_what_was_timed() -> None:
    for cost in measure_cost(batch=32, repetitions=3):
        assert cost.factored_ms > 0
        assert cost.joint_ms > 0
        assert cost.ratio > 0
        assert (cost.batch, cost.repetitions) == (32, 3)


@pytest.mark.parametrize(("policy", "variant"), [(JointMaskablePolicy, "strict"), (StrictMaskablePolicy, "published")])
def test_training_improves_on_random_play(policy: Any, variant: Any) -> None:
    model = train(policy, variant, steps=25 * 32 * 19, num_envs=32, seed=0)
    env = PortfolioVecEnv(1000, variant, seed=99)
    obs, total = env.reset(), np.zeros(1000)
    for _ in range(PERIODS - 1):
        actions, _ = model.predict(obs, action_masks=env.action_masks(), deterministic=True)
        obs, reward, _, _ = env.step(actions)
        total += reward
    final = 1000 * (1 + total) if variant == "strict" else total
    # Random play is worth about 1180 and 1250.
    assert final.mean() > 1300
    assert env.audit.invalid == 0


def test_a_small_run_of_everything_is_reported() -> None:
    raw = json.loads(json.dumps(measure_joint_limits(**SMOKE).to_dict(), allow_nan=False))
    assert raw["machine"] == machine()
    assert {"python", "numpy", "torch", "sb3-contrib"} <= set(raw["versions"])
    assert {cost["task"] for cost in raw["costs"]} == {"forward", "evaluate_actions and backward"}
    assert [value["seed"] for value in raw["values"] if value["steps"]] == [0, 0]
    assert raw["breaches"][0]["share"] == 0.0
    assert raw["ppo"]["n_steps"] == 19


@pytest.mark.parametrize("name", ["actions", "batch", "repetitions", "steps", "num_envs", "episodes"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected >= 1, was 0"):
        measure_joint_limits(**{**SMOKE, name: 0})
