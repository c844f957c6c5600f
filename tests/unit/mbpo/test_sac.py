"""Soft actor-critic on the wanted position: projection obeys the masks. What it learns is in `test_off_policy`."""

from __future__ import annotations

import numpy as np
from mbpo_worlds import make_dynamics, make_features, make_scaler

from envs.vec_env import HistoryVecEnv
from mbpo.sac import ProjectedVecEnv

DYNAMICS = make_dynamics(min_holding_bars=0)
ROWS = 300
HOLD, HALF, THREE_QUARTERS, ALL = 0, 3, 4, 5


def history(features: np.ndarray) -> HistoryVecEnv:
    return HistoryVecEnv(DYNAMICS, make_scaler(features), features, num_envs=16, episode_bars=50, seed=0)


def test_the_wish_is_mapped_to_flat_up_to_fully_invested_and_projected_onto_the_masks() -> None:
    env = ProjectedVecEnv(history(make_features(ROWS, move=0.002)))
    env.reset()
    assert env.action_space.shape == (1,)
    executed: list[np.ndarray] = []
    step = env.venv.step_async
    env.venv.step_async = lambda actions: (executed.append(actions), step(actions))  # type: ignore[method-assign]
    wishes = np.linspace(-1, 1, 16, dtype=np.float32)[:, None]
    env.step(wishes)
    # From flat, one decision may reach 0.5 at most; wishes below an eighth hold, below three eighths take a quarter.
    wanted = (wishes[:, 0] + 1) / 2
    assert executed[0].tolist() == np.where(wanted < 0.125, HOLD, np.where(wanted < 0.375, 2, HALF)).tolist()
    env.step(np.ones((16, 1), np.float32))
    # 0.6 further on leads from half to everything, from a quarter to three quarters.
    assert executed[1].tolist() == [{HOLD: HALF, 2: THREE_QUARTERS, HALF: ALL}[first] for first in executed[0].tolist()]


def test_every_wish_executes_a_valid_action() -> None:
    env = ProjectedVecEnv(history(make_features(ROWS, move=0.02)))
    env.reset()
    rng = np.random.default_rng(0)
    for _ in range(200):
        env.step(rng.uniform(-1, 1, (16, 1)).astype(np.float32))
    assert env.venv.audit.executed == 3200
    assert env.venv.audit.invalid == 0


def test_a_truncated_episode_hands_its_last_observation_to_the_replay_buffer() -> None:
    env = ProjectedVecEnv(history(make_features(ROWS, move=0.002)))
    env.reset()
    ended = 0
    for _ in range(50):
        obs, _, dones, infos = env.step(np.zeros((16, 1), np.float32))
        for row in np.flatnonzero(dones):
            assert infos[row]["TimeLimit.truncated"]
            assert infos[row]["terminal_observation"].shape == obs[row].shape
            assert not np.array_equal(infos[row]["terminal_observation"], obs[row])
        ended += int(dones.sum())
    assert ended >= 16
