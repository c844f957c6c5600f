"""The batched environment equals single environments step by step and keeps sb3's protocol."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from envs_worlds import LOOSE, dynamics, market, moves, random_valid, scaler_of
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.callbacks import BaseCallback

from envs.trading import TradingEnv
from envs.vec_env import HistoryVecEnv
from masking import InvalidActionError
from masking.strict_policy import StrictMaskablePolicy

WILD = market(80, seed=3, swing=0.05)


def vec_env(
    features: np.ndarray = WILD, *, num_envs: int = 6, episode_bars: int = 12, seed: int = 1, **limits
) -> HistoryVecEnv:
    return HistoryVecEnv(
        dynamics(**limits),
        scaler_of(features),
        features,
        num_envs=num_envs,
        episode_bars=episode_bars,
        seed=seed,
    )


@pytest.mark.parametrize("limits", [{"cooldown_bars": 2}, {**LOOSE, "cooldown_bars": 2}])
def test_rows_equal_single_environments_step_by_step(limits) -> None:
    batch = vec_env(**limits)
    singles = [
        TradingEnv(batch.dynamics, batch.scaler, WILD, episode_bars=12) for _ in range(batch.num_envs)
    ]  # fmt: skip
    rng = np.random.default_rng(9)
    obs = batch.reset()
    for row, env in enumerate(singles):
        single_obs, _ = env.reset(options={"time": int(batch.walks.time[row])})
        np.testing.assert_array_equal(obs[row], single_obs)
    ends = {"terminated": 0, "truncated": 0}
    for _ in range(120):
        masks = batch.action_masks()
        actions = random_valid(masks, rng)
        obs, rewards, dones, infos = batch.step(actions)
        assert (obs.dtype, rewards.dtype, dones.dtype) == (np.float32, np.float32, np.bool_)
        for row, env in enumerate(singles):
            np.testing.assert_array_equal(env.action_masks(), masks[row])
            single_obs, reward, terminated, truncated, _ = env.step(actions[row])
            np.testing.assert_allclose(rewards[row], reward, rtol=1e-5, atol=1e-6)
            assert dones[row] == (terminated or truncated)
            if dones[row]:
                np.testing.assert_allclose(infos[row]["terminal_observation"], single_obs, rtol=1e-5, atol=1e-6)
                assert infos[row]["TimeLimit.truncated"] == truncated
                ends["terminated" if terminated else "truncated"] += 1
                single_obs, _ = env.reset(options={"time": int(batch.walks.time[row])})
            else:
                assert infos[row] == {}
            np.testing.assert_allclose(obs[row], single_obs, rtol=1e-5, atol=1e-6)
    assert min(ends.values()) > 3


def test_a_terminal_observation_is_the_last_state_and_not_the_new_start() -> None:
    batch = vec_env(moves((0, 0), (0, -0.2), (0.07, 0.03)), num_envs=2, episode_bars=2, **LOOSE)
    batch.reset()
    batch.walks.restart(np.arange(2), np.zeros(2, dtype=np.int64))
    obs, _, dones, infos = batch.step(np.array([5, 0]))
    assert dones.tolist() == [True, False]
    assert infos[0]["TimeLimit.truncated"] is False
    drawdown = batch.dynamics.obs_names.index("drawdown")
    assert infos[0]["terminal_observation"][drawdown] == 1.0  # 20 % is the end of its range
    assert obs[0, drawdown] == -1.0
    assert infos[0]["terminal_action_mask"].tolist() == [True] + [False] * 6
    assert infos[1] == {}


def test_infos_of_unfinished_rows_stay_empty_after_a_row_has_finished() -> None:
    batch = vec_env(episode_bars=1)
    batch.reset()
    _, _, dones, infos = batch.step(np.zeros(6, dtype=np.int64))
    assert dones.all()
    assert all(info["TimeLimit.truncated"] is True for info in infos)
    batch.walks.episode_bars = None
    assert batch.step(np.zeros(6, dtype=np.int64))[3] == [{}] * 6


def test_the_same_seed_gives_the_same_starts() -> None:
    def starts(seed: int) -> list[int]:
        batch = vec_env(seed=seed, episode_bars=1)
        batch.reset()
        seen = batch.walks.time.tolist()
        batch.step(np.zeros(6, dtype=np.int64))
        return seen + batch.walks.time.tolist()

    assert starts(1) == starts(1)
    assert starts(1) != starts(2)


def test_a_forbidden_action_in_one_row_raises() -> None:
    batch = vec_env()
    batch.reset()
    with pytest.raises(InvalidActionError, match="row 4 chose 6"):
        batch.step(np.array([0, 0, 0, 0, 6, 0]))


def test_a_caller_who_writes_into_the_masks_opens_nothing() -> None:
    batch = vec_env()
    batch.reset()
    batch.action_masks()[:] = True
    with pytest.raises(InvalidActionError):
        batch.step(np.full(6, 6))


def test_sb3_contrib_finds_all_masks_in_one_call() -> None:
    batch = vec_env()
    batch.reset()
    assert is_masking_supported(batch)
    masks = get_action_masks(batch)
    assert masks.shape == (1, 6, 7)
    assert masks.dtype == np.bool_
    np.testing.assert_array_equal(masks[0], batch.walks.action_masks)


def test_rows_share_their_attributes() -> None:
    batch = vec_env()
    assert batch.get_attr("num_envs") == [6] * 6
    assert batch.get_attr("num_envs", indices=[0, 1]) == [6, 6]
    assert batch.get_attr("num_envs", indices=3) == [6]
    batch.set_attr("label", "a")
    assert batch.label == "a"
    assert not batch.has_attr("unknown")
    assert batch.env_is_wrapped(object) == [False] * 6
    assert batch.env_is_wrapped(object, indices=[2]) == [False]
    with pytest.raises(ValueError, match="label: rows of a batched environment share attributes"):
        batch.set_attr("label", "b", indices=[0])
    with pytest.raises(ValueError, match="action_masks: a batched environment answers for all rows"):
        batch.env_method("action_masks", indices=[0])


@pytest.mark.parametrize("num_envs", [1, 6])
def test_masked_ppo_learns_a_rollout_with_the_strict_policy(num_envs: int) -> None:
    model = MaskablePPO(
        StrictMaskablePolicy,
        vec_env(num_envs=num_envs),
        n_steps=24,
        batch_size=24,
        n_epochs=1,
        seed=0,
        device="cpu",
    )
    before = model.policy.action_net.weight.detach().clone()
    model.learn(24 * num_envs)
    assert model.num_timesteps == 24 * num_envs
    assert not np.array_equal(before.numpy(), model.policy.action_net.weight.detach().numpy())
    # The masks the buffer trained on are those of the environment: Hold everywhere, not everything everywhere.
    masks = model.rollout_buffer.action_masks
    assert masks[..., 0].all()
    assert 0 < masks.mean() < 1


class Bootstraps(BaseCallback):
    """What each step of a rollout paid, and the value of its last observation where it was cut."""

    def __init__(self) -> None:
        super().__init__()
        self.rewards: list[np.ndarray] = []
        self.values: list[np.ndarray] = []
        self.terminations = 0

    def _on_step(self) -> bool:
        values = np.zeros(self.training_env.num_envs)
        for row, info in enumerate(self.locals["infos"]):
            if info.get("TimeLimit.truncated"):
                obs = torch.as_tensor(info["terminal_observation"][None])
                values[row] = float(self.model.policy.predict_values(obs).detach())
        self.terminations += int((self.locals["dones"] & (values == 0)).sum())
        self.rewards.append(self.locals["rewards"].copy())
        self.values.append(values)
        return True


def test_a_truncated_row_is_bootstrapped_and_a_terminated_one_is_not() -> None:
    model = MaskablePPO(
        StrictMaskablePolicy,
        vec_env(moves(*[(0, 0), (0, -0.2)] * 8), num_envs=4, episode_bars=3, **LOOSE),
        n_steps=32,
        batch_size=128,
        n_epochs=1,
        gamma=0.5,
        seed=0,
        device="cpu",
    )
    seen = Bootstraps()
    model.learn(128, callback=seen)
    expected = np.array(seen.rewards) + 0.5 * np.array(seen.values)
    np.testing.assert_allclose(model.rollout_buffer.rewards, expected, rtol=1e-5, atol=1e-5)
    assert seen.terminations > 3
    assert np.count_nonzero(seen.values) > 3
