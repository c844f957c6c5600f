import dataclasses
import json

import numpy as np
import pytest

from benchmarks.learned_masks import (
    SMOKE,
    calibration_error,
    collect_episodes,
    masked_cartpole_world,
    measure_learned_masks,
    trading_world,
)
from masking import HOLD
from world_model.mask_bound import MaskBoundError

CONFIG = SMOKE["config"]


@pytest.fixture(scope="module")
def trading():
    return trading_world()


def test_episodes_are_recorded_from_their_start_to_their_end_once():
    world = masked_cartpole_world(num_actions=4)
    rows = collect_episodes(world.build(50, 3), 500, np.random.default_rng(0))
    assert rows.obs.shape == (len(rows.groups), 6)
    assert rows.action_masks.shape == (len(rows.groups), 4)
    assert (rows.action_masks.sum(axis=1) == 2).all()
    assert set(rows.groups) == set(range(50))
    for episode in range(50):
        obs = rows.obs[rows.groups == episode]
        assert np.abs(obs[0, :4]).max() <= 0.05  # a start
        assert np.ptp(obs[:, 4:], axis=0).tolist() == [0, 0]  # no other episode's buttons
        assert 5 < len(obs) < 200  # a random policy drops the pole


def test_at_most_so_many_states_are_recorded():
    rows = collect_episodes(masked_cartpole_world(4).build(20, 0), 5, np.random.default_rng(0))
    assert np.bincount(rows.groups).tolist() == [5] * 20


def test_masked_cartpole_has_no_safe_action_and_keeps_its_promise():
    learned, measured = measure_learned_masks(
        masked_cartpole_world(num_actions=3), episodes=500, fresh_episodes=300, max_steps=6, config=CONFIG, seed=1
    )
    assert measured.kept_promise
    assert measured.safe_action is learned.safe_action is None
    assert measured.drifted is None
    assert (measured.fresh.groups, measured.fresh.rows) == (300, 1800)
    assert measured.fresh.false_invalid < 0.2
    assert measured.calibration_error < 0.05


def test_trading_rules_are_learned_with_hold_safe(trading):
    learned, measured = measure_learned_masks(
        trading, episodes=500, fresh_episodes=300, max_steps=8, config=CONFIG, seed=1
    )
    raw = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    assert learned.safe_action == HOLD
    assert measured.fresh.false_valid <= 0.02
    assert measured.fresh.refused == 0.0
    assert measured.fresh.false_invalid < 0.2
    assert measured.drifted.groups == 300
    assert set(raw["versions"]) == {"python", "numpy", "scipy", "torch"}
    assert (raw["kept_promise"], raw["seed"], raw["config"]["target"]) == (True, 1, 0.02)


def test_fresh_episodes_are_not_those_that_were_learned(trading):
    same = {"episodes": 500, "fresh_episodes": 500, "max_steps": 1, "config": CONFIG, "seed": 0}
    seen = []

    def build(num_envs, seed):
        seen.append(seed)
        return trading.build(num_envs, seed)

    measure_learned_masks(dataclasses.replace(trading, build=build, build_drifted=build), **same)
    assert len(seen) == len(set(seen)) == 3


def test_a_promise_that_cannot_be_made_is_refused():
    with pytest.raises(MaskBoundError, match=r"need 2,995 groups"):
        measure_learned_masks(masked_cartpole_world(3), episodes=100, fresh_episodes=1, max_steps=2)


@pytest.mark.parametrize("name", ["episodes", "fresh_episodes", "max_steps"])
def test_counts_must_be_positive(name):
    with pytest.raises(ValueError, match=name):
        measure_learned_masks(masked_cartpole_world(3), **{name: 0})


def test_calibration_error_by_hand():
    # bin 0.2: mean 0.25, none valid; bin 0.7: mean 0.75, all valid; both miss by 0.25
    probabilities, valid = np.array([[0.25, 0.75], [0.25, 0.75]]), np.array([[False, True], [False, True]])
    assert calibration_error(probabilities, valid) == pytest.approx(0.25)
    # 1.0 belongs to the last bin: mean 0.95, half of them valid
    assert calibration_error(np.array([1.0, 0.9]), np.array([False, True])) == pytest.approx(0.45)
    assert calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0.0
    assert np.isnan(calibration_error(np.array([np.nan]), np.array([True])))
