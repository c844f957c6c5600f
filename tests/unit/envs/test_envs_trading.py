"""The single environment: Gymnasium's contract, masks that cannot be opened, seeded starts."""

from __future__ import annotations

import numpy as np
import pytest
from envs_worlds import LOOSE, dynamics, market, moves, random_valid, scaler_of
from gymnasium.utils.env_checker import check_env
from sb3_contrib import MaskablePPO
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from configs import load_config
from data import BarsError
from envs.trading import TradingEnv, bundled_trading_env
from masking import ActionAudit, InvalidActionError
from masking.strict_policy import StrictMaskablePolicy
from pipeline.inputs import load_inputs


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


def test_the_audit_counts_executed_actions_and_none_that_was_refused() -> None:
    env, rng = trading_env(episode_bars=5), np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(40):
        *_, terminated, truncated, info = env.step(random_valid(env.action_masks()[None], rng)[0])
        if terminated or truncated:
            env.reset()
    with pytest.raises(InvalidActionError):
        env.step(7)
    assert env.audit == ActionAudit(executed=40, invalid=0)
    assert set(info) == {"action_mask", "state", "equity", "position", "drawdown", "cost", "time"}


def test_the_audit_counts_what_an_open_gate_lets_through(monkeypatch) -> None:
    monkeypatch.setattr("envs.history.check_actions", lambda *_: None)
    env = trading_env()
    env.reset(seed=0)
    env.step(6)  # the full position is forbidden at the start, and held afterwards
    env.step(0)
    assert env.audit == ActionAudit(executed=2, invalid=1)


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


# --- the bundled market ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", ["train", "validation", "test"])
def test_a_window_of_the_bundled_market_is_that_of_a_nightly_run(window) -> None:
    env, inputs = bundled_trading_env("sp500", window), load_inputs(load_config("default"))
    np.testing.assert_array_equal(env.walk.features[0], getattr(inputs, window).values)
    assert env.scaler.to_dict() == inputs.scaler.to_dict()
    for part in ("feature_names", "account_rules", "reward"):
        assert getattr(env.dynamics, part) == getattr(inputs.dynamics, part)
    assert env.dynamics.rule_set.hash == inputs.dynamics.rule_set.hash


def test_the_scaler_of_every_window_is_fitted_on_the_training_window_alone() -> None:
    train, test = bundled_trading_env(window="train"), bundled_trading_env(window="test")
    low, high = np.quantile(train.walk.features[0], [0.01, 0.99], axis=0)
    for env in (train, test):
        np.testing.assert_allclose(env.scaler.centre[: len(low)], (low + high) / 2, rtol=1e-6)
        np.testing.assert_allclose(env.scaler.scale[: len(low)], (high - low) / 2, rtol=1e-6)
    own_low, own_high = np.quantile(test.walk.features[0], [0.01, 0.99], axis=0)
    assert (np.abs(own_high - own_low) / (high - low) < 0.9).any()


def test_the_bundled_market_has_two_symbols_and_episodes_of_any_length() -> None:
    nasdaq = bundled_trading_env("nasdaq", "test", episode_bars=None)
    nasdaq.reset(options={"time": 0})
    assert nasdaq.walk.last_row == 377  # 1.5 years of 252 bars
    for bar in range(1, 378):
        truncated = nasdaq.step(0)[3]
        assert truncated == (bar == 377)
    assert not np.array_equal(nasdaq.walk.features, bundled_trading_env("sp500", "test").walk.features)


def test_unknown_windows_and_symbols_are_refused() -> None:
    with pytest.raises(ValueError, match=r"window: expected one of \('train', 'validation', 'test'\), was 'holdout'"):
        bundled_trading_env(window="holdout")
    with pytest.raises(BarsError, match=r"symbol: expected one of .*, was 'sp5000'; did you mean 'sp500'"):
        bundled_trading_env("sp5000")
