"""The risk aversion MBPO learns under: shared, its own, or by the usual size of a forecast."""

from __future__ import annotations

import numpy as np
import pytest
from mbpo_worlds import FIELDS, make_scaler, make_table
from pydantic import ValidationError

from configs import DetentConfig
from envs import TradingDynamics
from mbpo import Forecast, Visited, collect_transitions, mixed_env
from mbpo.imagination import MarketBranches
from mbpo.recipe import aversion_for

TABLE = make_table(60)
NAMES = tuple(field.name for field in FIELDS)
# Half of the bars are expected to move by twice their variance, up or down; so a forecast is usually worth sqrt(2).
WORTH = np.where(np.arange(60) % 2, 2.0, 0.0) * np.where(np.arange(60) % 4 == 1, 1.0, -1.0)
FORECAST = Forecast(np.stack((0.25 * WORTH, 0.75 * WORTH), axis=1) * 1e-4, np.full((60, 2), 0.5e-4))


def test_a_usual_forecast_is_worth_the_usual_position() -> None:
    aversion = aversion_for(FORECAST, 0.5)
    assert aversion == pytest.approx(np.sqrt(2.0) / 0.5, rel=1e-3)
    # Where `p * mean - aversion / 2 * p^2 * second moment` is largest, root mean square over the bars.
    best = WORTH / aversion
    assert np.sqrt(np.mean(best**2)) == pytest.approx(0.5, rel=1e-3)


def test_a_sure_move_is_no_reason_to_stay_flat() -> None:
    # A move of one per cent that is known: utility of the usual position is half its growth.
    sure = Forecast(np.tile([0.0, 0.01], (60, 1)), np.full((60, 2), 1e-12))
    assert aversion_for(sure, 1.0) == pytest.approx(1 / 0.01)


@pytest.mark.parametrize(
    ("settings", "first", "last"),
    [
        ({}, 1.0, 1.0),
        ({"risk_aversion": 9.0}, 1.0, 9.0),
        ({"risk_aversion": 9.0, "risk_aversion_ramp": 0.0}, 9.0, 9.0),
        ({"risk_aversion": 0.5}, 0.5, 0.5),
        ({"usual_position": 0.1}, 1.0, np.sqrt(2.0) / 0.1),
        ({"usual_position": 0.1, "risk_aversion_ramp": 0.0}, np.sqrt(2.0) / 0.1, np.sqrt(2.0) / 0.1),
    ],
)
def test_risk_aversion_rises_to_its_own_from_the_shared_one(
    settings: dict[str, float], first: float, last: float
) -> None:
    mbpo = {"rollout_length": 2, "ppo": {"num_envs": 8, "n_steps": 2}, **settings}
    config = DetentConfig.model_validate({"reward": {"risk_aversion": 1.0}, "mbpo": mbpo})
    dynamics = TradingDynamics.from_config(NAMES, config)
    scaler = make_scaler(TABLE.values)
    transitions = collect_transitions(dynamics, scaler, TABLE, seed=0, episode_bars=30)
    visited = Visited.of(transitions, len(NAMES))
    rows = len(visited.features)
    parts = np.zeros((rows, 2, 2, len(NAMES))), np.zeros((rows, 2, 2)), np.ones((rows, 2, 2), dtype=bool)
    branches = MarketBranches(*parts, Forecast(np.zeros((rows, 2, 2, 2)), np.ones((rows, 2, 2, 2))))
    forecast = Forecast(*(part[:rows] for part in FORECAST))
    env = mixed_env(config, dynamics, scaler, visited, np.zeros(rows), forecast, branches)
    for done, expected in ((0.0, first), (1.0, last)):
        env.start_rollout(done, 2)
        assert env.take_statistics()["risk_aversion"] == pytest.approx(expected, rel=0.02)


def test_two_ways_of_saying_it_contradict_each_other() -> None:
    with pytest.raises(ValidationError, match=r"usual_position: expected null beside risk_aversion=20\.0, was 0\.7"):
        DetentConfig.model_validate({"mbpo": {"risk_aversion": 20, "usual_position": 0.7}})
