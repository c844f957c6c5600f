"""Masked CartPole: Gymnasium's physics, two wired buttons, and no way to press another one."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from envs_worlds import random_valid
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from envs.masked_cartpole import ANGLE_LIMIT, X_LIMIT, MaskedCartPoleEnv, MaskedCartPoleVecEnv, cart_pole_step
from masking import ActionAudit, InvalidActionError, validate_action_masks

MIDDLE = [0.0, 0.0, 0.0, 0.0]


def wired(obs: np.ndarray, num_actions: int = 10) -> tuple[int, int]:
    """Left and right button as the observation tells them."""
    left, right = np.rint(obs[4:] * (num_actions - 1)).astype(int).tolist()
    return left, right


def balance(obs: np.ndarray, num_actions: int = 10) -> int:
    """A button that keeps the pole up for as long as one likes."""
    leaning = obs[2] + 0.3 * obs[3] + 0.05 * obs[0] + 0.1 * obs[1]
    return wired(obs, num_actions)[int(leaning > 0)]


# --- physics -----------------------------------------------------------------------------------------------


def test_a_push_from_rest_worked_by_hand() -> None:
    # Pull 10 / 1.1; angular acceleration -(10 / 1.1) / (.5 * (4/3 - .1 / 1.1)) = -600 / 41;
    # acceleration 10 / 1.1 + .05 * (600 / 41) / 1.1 = 400 / 41. Positions follow one step later.
    after = cart_pole_step(np.zeros((2, 4)), np.array([10.0, -10.0]))
    np.testing.assert_allclose(after, [[0, 8 / 41, 0, -12 / 41], [0, -8 / 41, 0, 12 / 41]], rtol=1e-14)
    later = cart_pole_step(after, np.array([10.0, -10.0]))
    np.testing.assert_allclose(later[:, [0, 2]], [[0.16 / 41, -0.24 / 41], [-0.16 / 41, 0.24 / 41]], rtol=1e-14)


def test_one_batched_step_equals_gymnasium_row_by_row() -> None:
    rng = np.random.default_rng(0)
    state = rng.normal(0.0, [1.0, 1.5, 0.1, 1.5], (300, 4))
    pushes = rng.integers(0, 2, 300)
    ours = cart_pole_step(state, np.where(pushes == 1, 10.0, -10.0))
    theirs = CartPoleEnv()
    theirs.reset(seed=0)
    for row, push in enumerate(pushes):
        theirs.state, theirs.steps_beyond_terminated = state[row], None
        theirs.step(push)
        np.testing.assert_allclose(ours[row], theirs.state, rtol=1e-12)


def test_episodes_equal_those_of_cartpole_v1_given_the_same_pushes() -> None:
    rng, lengths = np.random.default_rng(1), []
    ours, theirs = MaskedCartPoleEnv(), gymnasium.make("CartPole-v1")
    for seed in range(30):
        (obs, _), (expected, _) = ours.reset(seed=seed), theirs.reset(seed=seed)
        np.testing.assert_array_equal(obs[:4], expected)
        ended, length = False, 0
        while not ended:
            push = int(rng.integers(2))
            obs, *end, _ = ours.step(wired(obs)[push])
            expected, *expected_end, _ = theirs.step(push)
            np.testing.assert_allclose(obs[:4], expected, rtol=1e-6, atol=1e-6)
            assert end == expected_end
            ended, length = any(end[1:]), length + 1
        lengths.append(length)
    assert min(lengths) < 15
    assert max(lengths) > 40


@pytest.mark.parametrize("side", [[1, 0, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, -1, 0]])
def test_an_episode_terminates_beyond_the_track_or_twelve_degrees(side: list[int]) -> None:
    env = MaskedCartPoleEnv(max_episode_steps=1)
    just_inside = np.array(side) * [2.39, 0, 0.209, 0]
    obs, _ = env.reset(options={"state": just_inside})
    assert env.step(wired(obs)[0])[2:4] == (False, True)
    # At 1 m/s, or 1 rad/s, outwards the limit is passed within one step: terminated, and therefore not truncated.
    outwards = [0, side[0], 0, side[2]]
    obs, _ = env.reset(options={"state": just_inside + outwards})
    after, *_, terminated, truncated, _ = env.step(wired(obs)[0])
    assert (terminated, truncated) == (True, False)
    assert env.observation_space.contains(after)


def test_a_balanced_pole_earns_one_per_step_and_is_truncated_after_500() -> None:
    env = MaskedCartPoleEnv()
    obs, _ = env.reset(seed=5)
    total = 0.0
    for step in range(1, 501):
        obs, reward, terminated, truncated, _ = env.step(balance(obs))
        total += reward
        assert (type(reward), terminated, truncated) == (float, False, step == 500)
    assert total == 500


# --- Gymnasium's and sb3's contract ----------------------------------------------------------------------------


class PressesAWiredButton(MaskedCartPoleEnv):
    """The checkers choose actions without masks; here each of them is turned into one of the two valid ones."""

    def step(self, action: Any) -> Any:
        return super().step(np.flatnonzero(self.action_masks())[action % 2])


@pytest.mark.parametrize("env", [MaskedCartPoleEnv(num_actions=2), PressesAWiredButton()], ids=["two", "ten"])
def test_gymnasium_and_sb3_accept_the_environment(env: MaskedCartPoleEnv) -> None:
    # With two buttons every action is valid.
    check_env(env, skip_render_check=True)
    check_env_sb3(env)


def test_a_hundred_thousand_random_valid_steps_stay_valid() -> None:
    env, rng = MaskedCartPoleEnv(), np.random.default_rng(2)
    choices, episodes = rng.integers(0, 2, 100_000), 0
    obs, info = env.reset(seed=2)
    for choice in choices:
        buttons = np.flatnonzero(info["action_mask"])
        assert sorted(wired(obs)) == buttons.tolist()
        obs, reward, terminated, truncated, info = env.step(buttons[choice])
        assert reward == 1.0
        if terminated or truncated:
            episodes += 1
            assert env.observation_space.contains(obs)
            obs, info = env.reset()
    assert env.audit == ActionAudit(executed=100_000, invalid=0)
    assert episodes > 3000


def test_the_mask_is_a_function_of_the_observation() -> None:
    batch = MaskedCartPoleVecEnv(500, num_actions=7, seed=3)
    obs = batch.reset()
    masks = validate_action_masks(batch.action_masks(), num_actions=7, batch=500, safe_action=None)
    expected = np.zeros((500, 7), dtype=bool)
    for row in range(500):
        expected[row, list(wired(obs[row], 7))] = True
    np.testing.assert_array_equal(masks, expected)
    assert masks.sum(axis=1).tolist() == [2] * 500


def test_the_same_seed_gives_the_same_episodes_and_another_seed_others() -> None:
    def episodes(seed: int) -> list[list[float]]:
        env = MaskedCartPoleEnv()
        seen = [env.reset(seed=seed)[0], env.step(np.flatnonzero(env.action_masks())[0])[0], env.reset()[0]]
        return [obs.tolist() for obs in seen]

    def batches(seed: int) -> list[list[float]]:
        batch = MaskedCartPoleVecEnv(3, seed=seed)
        return [*batch.reset().tolist(), *batch.reset().tolist()]

    for run in (episodes, batches):
        assert run(3) == run(3)
        assert run(3) != run(4)
        assert len({tuple(obs) for obs in run(3)}) == len(run(3))


def test_reset_starts_from_a_given_state_with_given_buttons() -> None:
    env = MaskedCartPoleEnv()
    obs, info = env.reset(options={"state": [0.9, -0.5, 0.125, 0.25], "buttons": (9, 3)})
    np.testing.assert_allclose(obs, [0.9, -0.5, 0.125, 0.25, 1.0, 1 / 3], rtol=1e-6)
    assert np.flatnonzero(info["action_mask"]).tolist() == [3, 9]
    env.reset(options={"state": MIDDLE, "buttons": (9, 3)})
    assert env.step(9)[0][1] < 0
    assert env.step(3)[0][1] == pytest.approx(0.0, abs=1e-2)
    assert env.step(3)[0][1] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state": [0.0, 0.0, 0.0]}, r"options\['state'\]: expected 4 finite numbers"),
        ({"state": [2.5, 0.0, 0.0, 0.0]}, r"\|position\| <= 2.4 .* was \[2.5"),
        ({"state": [0.0, 0.0, np.nan, 0.0]}, r"\|angle\| <= 0.209"),
        ({"state": [0.0, np.nan, 0.0, 0.0]}, r"options\['state'\]"),
        ({"buttons": (3, 3)}, r"options\['buttons'\]: expected two different ones in 0..9, was \(3, 3\)"),
        ({"buttons": (0, 10)}, r"options\['buttons'\]"),
        ({"buttons": (-1, 2)}, r"options\['buttons'\]"),
        ({"buttons": (1, 2, 3)}, r"options\['buttons'\]"),
    ],
)
def test_reset_refuses_starts_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedCartPoleEnv().reset(options=options)


def test_impossible_settings_are_refused() -> None:
    for build in (MaskedCartPoleEnv, lambda **kwargs: MaskedCartPoleVecEnv(2, seed=0, **kwargs)):
        with pytest.raises(ValueError, match="num_actions: expected >= 2, one button each way, was 1"):
            build(num_actions=1)
        with pytest.raises(ValueError, match="max_episode_steps: expected >= 1 or None, was 0"):
            build(max_episode_steps=0)


# --- nothing moves without a valid action ------------------------------------------------------------------------


@pytest.mark.parametrize("action", [5, -1, 10, 1.0, True, np.array([1])])
def test_a_wrong_action_raises_and_nothing_has_moved(action: Any) -> None:
    options = {"state": [0.1, 0.2, 0.03, -0.4], "buttons": (0, 1)}
    env, twin = MaskedCartPoleEnv(max_episode_steps=1), MaskedCartPoleEnv(max_episode_steps=1)
    env.reset(options=options)
    twin.reset(options=options)
    with pytest.raises(InvalidActionError, match="actions: expected"):
        env.step(action)
    assert env.audit.executed == 0
    for ours, theirs in zip(env.step(1), twin.step(1), strict=True):
        np.testing.assert_equal(ours, theirs)


def test_a_wrong_action_in_one_row_moves_no_row() -> None:
    batch, twin = (MaskedCartPoleVecEnv(50, seed=4) for _ in range(2))
    batch.reset()
    twin.reset()
    actions = random_valid(batch.action_masks(), np.random.default_rng(0))
    wrong = actions.copy()
    wrong[37] = np.flatnonzero(~batch.action_masks()[37])[0]
    with pytest.raises(InvalidActionError, match=f"row 37 chose {wrong[37]}"):
        batch.step(wrong)
    assert batch.audit.executed == 0
    for ours, theirs in zip(batch.step(actions), twin.step(actions), strict=True):
        np.testing.assert_equal(ours, theirs)


def test_a_caller_who_writes_into_what_he_was_given_wires_no_button() -> None:
    env = MaskedCartPoleEnv()
    obs, info = env.reset(options={"buttons": (2, 4)})
    for given in (env.action_masks(), info["action_mask"], obs):
        given[:] = 1
    with pytest.raises(InvalidActionError):
        env.step(3)
    obs, _, _, _, info = env.step(2)
    assert np.flatnonzero(info["action_mask"]).tolist() == [2, 4]
    assert wired(obs) == (2, 4)

    batch = MaskedCartPoleVecEnv(3, seed=0)
    batch.reset()[:] = 1
    masks = batch.action_masks()
    masks[:] = True
    np.testing.assert_array_equal(batch.action_masks().sum(axis=1), [2, 2, 2])


def test_without_a_reset_no_button_is_wired_and_no_step_is_taken() -> None:
    env = MaskedCartPoleEnv(max_episode_steps=2)
    assert not env.action_masks().any()
    with pytest.raises(ValueError, match=r"carts \[0\]: expected a reset before the first step of an episode"):
        env.step(0)
    env.reset(options={"buttons": (0, 1)})
    assert [env.step(0)[3], env.step(1)[3]] == [False, True]
    with pytest.raises(ValueError, match="expected a reset"):
        env.step(0)
    env.reset(options={"buttons": (0, 1)})
    assert [env.step(0)[3], env.step(1)[3]] == [False, True]


def test_the_audit_counts_what_an_open_gate_lets_through(monkeypatch) -> None:
    monkeypatch.setattr("envs.masked_cartpole.check_actions", lambda *_: None)
    env = MaskedCartPoleEnv()
    env.reset(options={"state": MIDDLE, "buttons": (0, 1)})
    for action in (0, 7, 1):
        env.step(action)
    assert env.audit == ActionAudit(executed=3, invalid=1)

    batch = MaskedCartPoleVecEnv(4, max_episode_steps=1, seed=0)
    batch.reset()
    actions = random_valid(batch.action_masks(), np.random.default_rng(0))
    actions[2] = np.flatnonzero(~batch.action_masks()[2])[0]
    batch.step(actions)  # every row restarts with other buttons, and is judged by the old ones
    assert batch.audit == ActionAudit(executed=4, invalid=1)


# --- the batch -------------------------------------------------------------------------------------------------


def test_rows_equal_single_environments_step_by_step() -> None:
    batch = MaskedCartPoleVecEnv(8, num_actions=6, max_episode_steps=25, seed=6)
    singles = [MaskedCartPoleEnv(num_actions=6, max_episode_steps=25) for _ in range(8)]
    rng = np.random.default_rng(7)

    def begin(row: int) -> np.ndarray:
        options = {"state": batch._carts.state[row], "buttons": batch._carts.buttons[row]}
        return singles[row].reset(options=options)[0]

    obs, ends = batch.reset(), {"terminated": 0, "truncated": 0}
    for row in range(8):
        np.testing.assert_array_equal(obs[row], begin(row))
    for _ in range(300):
        masks = batch.action_masks()
        actions = random_valid(masks, rng)
        obs, rewards, dones, infos = batch.step(actions)
        assert (obs.dtype, rewards.dtype, dones.dtype) == (np.float32, np.float32, np.bool_)
        for row, env in enumerate(singles):
            np.testing.assert_array_equal(env.action_masks(), masks[row])
            expected, reward, terminated, truncated, info = env.step(actions[row])
            assert (rewards[row], dones[row]) == (reward, terminated or truncated)
            if dones[row]:
                np.testing.assert_allclose(infos[row]["terminal_observation"], expected, rtol=1e-6, atol=1e-7)
                np.testing.assert_array_equal(infos[row]["terminal_action_mask"], info["action_mask"])
                assert infos[row]["TimeLimit.truncated"] == truncated
                ends["terminated" if terminated else "truncated"] += 1
                expected = begin(row)
            np.testing.assert_allclose(obs[row], expected, rtol=1e-6, atol=1e-7)
    assert min(ends.values()) > 15
    assert batch.audit == ActionAudit(executed=2400, invalid=0)


def test_buttons_are_uniform_over_ordered_pairs_and_starts_over_their_range() -> None:
    batch = MaskedCartPoleVecEnv(24_000, num_actions=4, seed=8)
    obs = batch.reset()
    pairs = np.rint(obs[:, 4:] * 3).astype(int)
    counts = np.bincount(pairs @ [4, 1], minlength=16).reshape(4, 4)
    assert np.diag(counts).tolist() == [0] * 4
    expected = 24_000 / 12
    chi_square = (((counts - expected) ** 2) / expected)[~np.eye(4, dtype=bool)].sum()
    assert chi_square < 31.3  # 99.9 % quantile of 11 degrees of freedom
    starts = obs[:, :4]
    assert np.abs(starts).max() <= 0.05
    # A uniform number in [-.05, .05] has standard deviation .1 / sqrt(12).
    np.testing.assert_allclose(starts.std(axis=0), 0.1 / np.sqrt(12), rtol=0.02)
    np.testing.assert_allclose(starts.mean(axis=0), 0.0, atol=1e-3)


def test_the_single_environment_draws_ordered_pairs_too() -> None:
    env = MaskedCartPoleEnv(num_actions=3)
    env.reset(seed=9)
    pairs = [wired(env.reset()[0], 3) for _ in range(1200)]
    counts = [pairs.count((left, right)) for left in range(3) for right in range(3) if left != right]
    assert sum(counts) == 1200
    assert sum((count - 200) ** 2 / 200 for count in counts) < 20.6  # 99.9 % quantile of 5 degrees of freedom


def test_finished_rows_are_rewired_and_the_others_keep_their_buttons() -> None:
    batch = MaskedCartPoleVecEnv(200, seed=10)
    before = batch.reset()
    rng, rewired, rows = np.random.default_rng(0), 0, 0
    for _ in range(40):
        obs, _, dones, _ = batch.step(random_valid(batch.action_masks(), rng))
        np.testing.assert_array_equal(obs[~dones, 4:], before[~dones, 4:])
        rewired += int((obs[dones, 4:] != before[dones, 4:]).any(axis=1).sum())
        rows, before = rows + int(dones.sum()), obs
    assert rows > 200
    assert rewired / rows == pytest.approx(89 / 90, abs=0.02)


def test_the_limits_are_those_of_the_observation_table() -> None:
    space, huge = MaskedCartPoleEnv().observation_space, np.finfo(np.float32).max
    np.testing.assert_allclose(space.high, [4.8, huge, 0.419, huge, 1, 1], rtol=1e-3)
    np.testing.assert_allclose(space.low, [-4.8, -huge, -0.419, -huge, 0, 0], rtol=1e-3)
    np.testing.assert_array_equal(space.high[[0, 2]], CartPoleEnv().observation_space.high[[0, 2]])
    np.testing.assert_allclose([2 * X_LIMIT, 2 * ANGLE_LIMIT], space.high[[0, 2]], rtol=1e-7)
