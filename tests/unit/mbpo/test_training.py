from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from mbpo_worlds import SteppingMarket, make_dynamics, make_features, make_scaler, no_forecast
from sb3_contrib import MaskablePPO

from configs.schema import PPOConfig
from envs.vec_env import HistoryVecEnv
from evaluation import backtest, evaluate
from mbpo import MixedVecEnv, StartBuffer, TorchPolicy, TrainedPolicy, imagine_market, train_policy
from mbpo.training import Validate

FEATURES = make_features(400)
DYNAMICS = make_dynamics(min_holding_bars=0, max_position_change=2.0)
SCALER = make_scaler(FEATURES)
SMALL = PPOConfig(total_steps=3072, num_envs=64, n_steps=3, batch_size=192, n_epochs=2, net_arch=(16,), validations=4)


def mixed(seed: int = 0) -> MixedVecEnv:
    branches = imagine_market(
        SteppingMarket(),  # type: ignore[arg-type]
        FEATURES,
        horizon=3,
        branches_per_row=2,
        generator=torch.Generator().manual_seed(seed),
    )
    walk = HistoryVecEnv(DYNAMICS, SCALER, FEATURES, num_envs=50, episode_bars=50, seed=seed)
    walk.reset()
    starts = StartBuffer(walk.walks.time, walk.walks.state, capacity=1000)
    return MixedVecEnv(
        DYNAMICS,
        SCALER,
        FEATURES,
        np.zeros(len(FEATURES)),
        no_forecast(len(FEATURES)),
        branches,
        starts,
        num_envs=64,
        real_ratio=0.5,
        penalty_coef=0.1,
        control_variate=0.0,
        episode_bars=50,
        seed=seed,
    )


def scripted(scores: list[float]) -> Validate:
    remaining = iter(scores)
    return lambda _: {"score": next(remaining)}


def train(env: MixedVecEnv | HistoryVecEnv, validate: Validate, **options: object) -> TrainedPolicy:
    settings = {"n_steps": 3, "seed": 0, "name": "test", **options}
    return train_policy(env, SMALL, validate=validate, **settings)  # type: ignore[arg-type]


def test_the_best_snapshot_is_kept_not_the_last() -> None:
    weights: list[dict[str, torch.Tensor]] = []
    scores = iter([0.0, 3.0, 1.0, 2.0, 0.5])

    def validate(policy: TorchPolicy) -> Mapping[str, float]:
        weights.append({key: value.clone() for key, value in policy.network.state_dict().items()})
        return {"score": next(scores)}

    trained = train(mixed(), validate)
    assert trained.best_score == 3.0
    for key, value in trained.policy.network.state_dict().items():
        assert torch.equal(value, weights[1][key])
    assert any(not torch.equal(weights[1][key], weights[-1][key]) for key in weights[1])


def test_a_snapshot_without_a_score_does_not_beat_those_that_have_one() -> None:
    trained = train(mixed(), scripted([float("nan"), -1.0, float("nan"), -2.0]))
    assert trained.best_score == -1.0
    assert trained.best_step == trained.history[1]["step"]


def test_same_seed_gives_bit_identical_weights() -> None:
    first, again = (train(mixed(), scripted([1.0] * 9)) for _ in range(2))
    for key, value in first.policy.network.state_dict().items():
        assert torch.equal(value, again.policy.network.state_dict()[key])


def test_another_seed_gives_other_weights() -> None:
    first, other = (train(mixed(), scripted([1.0] * 9), seed=seed) for seed in (0, 1))
    name = "action_net.weight"
    assert not torch.equal(first.policy.network.state_dict()[name], other.policy.network.state_dict()[name])


def test_history_reports_real_and_imagined_rewards() -> None:
    seen: list[tuple[Mapping[str, float], int]] = []
    train(mixed(), scripted([1.0] * 9), log=lambda metrics, step: seen.append((metrics, step)))
    assert len(seen) == SMALL.validations
    assert {"real_reward", "imagined_raw_reward", "imagined_penalised_reward", "entropy_loss"} <= set(seen[-1][0])
    assert [step for _, step in seen] == sorted({step for _, step in seen})


def test_n_steps_beyond_the_rollout_length_are_refused() -> None:
    with pytest.raises(ValueError, match="at most the rollout length 3, was 4"):
        train(mixed(), scripted([1.0]), n_steps=4)


def test_weights_that_are_not_finite_stop_training() -> None:
    def spoil(policy: TorchPolicy) -> Mapping[str, float]:
        with torch.no_grad():
            policy.network.action_net.bias.fill_(torch.inf)
        return {"score": 1.0}

    with pytest.raises((FloatingPointError, ValueError), match=r"finite|invalid values"):
        train(mixed(), spoil)


def test_ppo_gets_every_setting_and_learns_from_the_branches_it_was_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    env, shown, buffers = mixed(), [], []
    rebranch, update = env.rebranch, MaskablePPO.train

    def recorded_rebranch() -> np.ndarray:
        shown.append(rebranch())
        return shown[-1]

    def recorded_update(model: MaskablePPO) -> None:
        buffers.append(model.rollout_buffer.observations[0].copy())
        settings.update({name: getattr(model, name) for name in names})
        update(model)

    names = ("gamma", "gae_lambda", "ent_coef", "n_epochs", "batch_size", "learning_rate", "n_steps")
    settings: dict[str, object] = {}
    monkeypatch.setattr(env, "rebranch", recorded_rebranch)
    monkeypatch.setattr(MaskablePPO, "train", recorded_update)
    config = SMALL.model_copy(update={"gamma": 0.91, "gae_lambda": 0.83, "ent_coef": 0.07, "total_steps": 600})
    train_policy(env, config, n_steps=3, seed=0, name="test", validate=scripted([1.0] * 9))
    for name in names[:-1]:
        assert settings[name] == getattr(config, name), name
    assert settings["n_steps"] == 3
    assert len(buffers) == len(shown) >= 3
    for observed, expected in zip(buffers, shown, strict=True):
        np.testing.assert_array_equal(observed, expected)


def test_saved_weights_decide_the_same(tmp_path: Path) -> None:
    policy = train(mixed(), scripted([1.0] * 9)).policy
    policy.save(tmp_path / "policy.safetensors")
    loaded = TorchPolicy.load(tmp_path / "policy.safetensors", "test", DYNAMICS, SCALER, SMALL.net_arch)
    env = HistoryVecEnv(DYNAMICS, SCALER, FEATURES, num_envs=100, episode_bars=50, seed=3)
    env.reset()
    state, masks = env.walks.state, env.action_masks()
    np.testing.assert_array_equal(loaded.act(state, masks), policy.act(state, masks))


def test_mixed_training_learns_to_follow_a_signal_that_tells_the_next_move() -> None:
    # Where the sign of the next move is known, a policy worth its name is invested before rises only. The branches
    # are the true continuations, so that real and imagined rows teach the same thing.
    env = mixed()
    for depth in range(3):
        rows = np.minimum(np.arange(len(FEATURES)) + depth + 1, len(FEATURES) - 1)
        env.branches.features[:, :, depth] = FEATURES[rows][:, None]
    env.branches.uncertainty[:] = 0.0
    config = SMALL.model_copy(update={"total_steps": 40_000, "learning_rate": 3e-3, "validations": 5})
    times = np.arange("2020-01-01", "2021-02-04", dtype="datetime64[D]")

    def score(policy: TorchPolicy) -> Mapping[str, float]:
        return {"score": evaluate(backtest(DYNAMICS, FEATURES, times, policy), 252).reward_per_bar}

    trained = train_policy(env, config, n_steps=3, seed=0, name="test", validate=score)
    # A rise every second bar is worth 0.5 reward units; a coin flip is worth 0.
    assert trained.best_score > 0.3


def test_training_stops_when_the_audit_finds_a_forbidden_action() -> None:
    env = mixed()
    env.audit.invalid = 1
    with pytest.raises(RuntimeError, match="expected 0 executed actions that their mask forbids"):
        train(env, scripted([1.0] * 9))


def test_executed_actions_are_counted_and_logged() -> None:
    logged: list[Mapping[str, float]] = []
    train(mixed(), scripted([1.0] * 9), log=lambda metrics, _: logged.append(dict(metrics)))
    assert logged[-1]["executed_actions"] == SMALL.total_steps
    assert logged[-1]["invalid_actions"] == 0.0
