"""The single environment: Gymnasium's contract, masks that cannot be opened, seeded starts."""

from __future__ import annotations

import numpy as np
import pytest
from envs_worlds import LOOSE, dynamics, market, moves, random_valid, scaler_of
from gymnasium.utils.env_checker import check_env
from sb3_contrib import MaskablePPO
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from envs import InvalidActionError
from envs.trading import TradingEnv
from masking.strict_policy import StrictMaskablePolicy


def trading_env(features: np.ndarray | None = None, *, episode_bars: int = 10, **limits) -> TradingEnv:
    features = market(60) if features is None else features
    return TradingEnv(dynamics(**limits), scaler_of(features), features, episode_bars=episode_bars)


def test_gymnasium_and_sb3_accept_the_environment() -> None:
    # The checkers draw actions without masks, so under these limits every action of a young account is valid.
    check_env(trading_env(**LOOSE), skip_render_check=True)
    check_env_sb3(trading_env(**LOOSE))


def test_observations_are_float32_within_the_space_even_in_a_crash() -> None:
    env = trading_env(market(200, swing=0.3), episode_bars=1000, **LOOSE)
    rng = np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    for _ in range(150):
        assert env.observation_space.contains(obs)
        obs, _, terminated, truncated, _ = env.step(random_valid(env.action_masks()[None], rng)[0])
        if terminated or truncated:
            obs, _ = env.reset()


def test_the_observation_is_the_scaled_state_without_its_age() -> None:
    env = trading_env()
    obs, info = env.reset(options={"time": 4})
    assert obs.shape == (12,)
    np.testing.assert_array_equal(obs, env.scaler(info["state"][None, :-1])[0])


def test_a_forbidden_action_raises() -> None:
    env = trading_env()
    env.reset(seed=0)
    assert env.action_masks().tolist() == [True, True, True, True, False, False, False]
    with pytest.raises(InvalidActionError, match="row 0 chose 6"):
        env.step(6)
    env.step(np.int64(3))


def test_a_caller_who_writes_into_what_he_was_given_opens_nothing() -> None:
    env = trading_env()
    _, info = env.reset(seed=0)
    state = info["state"].copy()
    env.action_masks()[:] = True
    info["action_mask"][:] = True
    info["state"][:] = 99.0
    np.testing.assert_array_equal(env.walk.state[0], state)
    with pytest.raises(InvalidActionError):
        env.step(6)
    assert env.action_masks().sum() == 4


def test_the_same_seed_gives_the_same_episode_and_another_seed_another_start() -> None:
    def starts(seed: int) -> list[int]:
        env = trading_env()
        return [env.reset(seed=seed)[1]["time"], *(env.reset()[1]["time"] for _ in range(5))]

    assert starts(3) == starts(3)
    assert starts(3) != starts(4)
    assert all(0 <= time < 59 for time in starts(5))


def test_reset_starts_at_a_given_row_with_a_fresh_account() -> None:
    env = trading_env(**LOOSE)
    env.reset(options={"time": 7})
    env.step(5)
    _, info = env.reset(options={"time": 9})
    assert {name: info[name] for name in ("time", "equity", "position", "drawdown", "cost")} == {
        "time": 9,
        "equity": 1.0,
        "position": 0.0,
        "drawdown": 0.0,
        "cost": 0.0,
    }


@pytest.mark.parametrize("time", [-1, 59, 60])
def test_reset_refuses_a_start_outside_history(time: int) -> None:
    with pytest.raises(ValueError, match=r"options\['time'\]: expected 0 <= time < 59, was"):
        trading_env().reset(options={"time": time})


def test_info_reports_the_account_after_the_step() -> None:
    env = trading_env(moves((0, 0), (0, 0.1), (0, 0)), **LOOSE)
    env.reset(options={"time": 0})
    _, reward, terminated, truncated, info = env.step(5)
    assert (info["time"], info["cost"]) == (1, pytest.approx(0.001))
    assert info["equity"] == pytest.approx(0.999 * 1.1)
    assert info["position"] == pytest.approx(1.0)
    assert reward == pytest.approx(np.log(0.999 * 1.1) / 0.01)
    assert (type(reward), terminated, truncated) == (float, False, False)
    np.testing.assert_array_equal(info["action_mask"], env.action_masks())


def test_termination_and_truncation_stay_apart() -> None:
    env = trading_env(moves((0, 0), (0, -0.2), (0, 0)), episode_bars=1, **LOOSE)
    env.reset(options={"time": 0})
    assert env.step(5)[2:4] == (True, False)
    env.reset(options={"time": 0})
    assert env.step(0)[2:4] == (False, True)


def test_masked_ppo_learns_on_it() -> None:
    model = MaskablePPO(
        StrictMaskablePolicy, trading_env(), n_steps=32, batch_size=16, n_epochs=1, seed=0, device="cpu"
    )
    before = model.policy.action_net.weight.detach().clone()
    model.learn(64)
    assert not np.array_equal(before.numpy(), model.policy.action_net.weight.detach().numpy())
