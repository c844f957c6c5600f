from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mbpo_worlds import SteppingMarket, make_dynamics, make_features, make_scaler, no_forecast
from sb3_contrib import MaskablePPO

from configs.schema import PPOConfig
from envs.vec_env import HistoryVecEnv
from evaluation import backtest, evaluate
from mbpo import (
    MixedVecEnv,
    RolloutStatistics,
    StartBuffer,
    TorchPolicy,
    TrainedPolicy,
    imagine_market,
    train_policy,
    training,
)
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


def rollouts_of(
    env: MixedVecEnv | HistoryVecEnv, monkeypatch: pytest.MonkeyPatch, **options: object
) -> list[dict[str, np.ndarray]]:
    """What the learner was given before each update."""
    seen: list[dict[str, np.ndarray]] = []
    update = MaskablePPO.train
    names = ("observations", "actions", "rewards", "values", "returns", "episode_starts")

    def record(model: MaskablePPO) -> None:
        seen.append({name: getattr(model.rollout_buffer, name).copy() for name in names})
        update(model)

    monkeypatch.setattr(MaskablePPO, "train", record)
    train(env, scripted([1.0] * 9), **options)
    return seen


@pytest.mark.parametrize("n_steps", [3, 7])
def test_truncated_rows_are_worth_what_sb3_makes_of_them_one_by_one(
    n_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = []
    for batched in (True, False):
        with monkeypatch.context() as patch:
            if not batched:
                patch.setattr(training._PPOCallback, "_bootstrap_truncated", lambda self: None)
            env = mixed()
            env.branches.supported[::4] = False
            first.append(rollouts_of(env, patch, n_steps=n_steps)[0])
    ours, theirs = first
    assert ours["episode_starts"][1:].any()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_truncated_row_is_bootstrapped_and_a_terminated_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    env = mixed()
    env.num_real, env.num_imagined, env.walks = 0, 64, None
    env.branches.features[::2, :, 0, :2] = (0.0, -0.5)  # from an even row on, half of everything is lost
    env.branches.supported[1::2, :, 0] = False  # from an odd one, the first bar is out of range
    env.starts.states[:, DYNAMICS.state_names.index("position")] = 1.0
    monkeypatch.setattr(
        DYNAMICS.__class__, "action_masks", lambda self, state: np.eye(7, dtype=bool)[np.zeros(len(state), int)]
    )
    rollout = rollouts_of(env, monkeypatch)[0]
    lost = rollout["rewards"] < -10
    assert 0 < lost.sum() < lost.size
    # Nothing is earned after the end of a branch, whatever the next branch in that row brings.
    np.testing.assert_allclose(rollout["returns"][lost], rollout["rewards"][lost], rtol=1e-5)
    assert rollout["episode_starts"][1:].all()


def test_the_same_branches_serve_every_update(monkeypatch: pytest.MonkeyPatch) -> None:
    env = mixed()
    branches, before = env.branches, env.branches.features.copy()
    monkeypatch.setattr(training.MixedVecEnv, "rebranch", counted := Counted(training.MixedVecEnv.rebranch))
    train(env, scripted([1.0] * 9))
    assert counted.calls == SMALL.total_steps // (64 * 3)
    assert env.branches is branches
    np.testing.assert_array_equal(env.branches.features, before)


def test_every_rollout_is_half_real_and_half_imagined_to_the_row_and_its_actions_are_sampled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env, counted = mixed(), []

    def count(coef: float, done: float, rollout: RolloutStatistics) -> float:
        counted.append((rollout.real_steps, rollout.imagined_steps))
        return coef

    env._penalty = count
    rollouts = rollouts_of(env, monkeypatch)
    assert counted == [(96, 96)] * (SMALL.total_steps // 192)
    # Rows of imagination start afresh with every rollout; those of history go on.
    assert all(rollout["episode_starts"][0, 32:].all() for rollout in rollouts)
    assert not rollouts[1]["episode_starts"][0, :32].all()
    # The first policy is close to uniform over six valid actions; its most probable ones alone would be few.
    frequency = np.bincount(rollouts[0]["actions"].astype(int).ravel(), minlength=7) / 192
    assert (frequency[:6] > 0.05).all()


class Counted:
    """A method that counts its calls."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method, self.calls = method, 0

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls += 1
            return self.method(instance, *args)

        return call


def test_early_stopping_counts_validations_without_a_better_score() -> None:
    scores = [0.0, 3.0, 1.0, 2.0, 9.0]
    patient = SMALL.model_copy(update={"early_stopping": 2, "validations": 5})
    trained = train_policy(mixed(), patient, n_steps=3, seed=0, name="test", validate=scripted(scores))
    assert [entry["score"] for entry in trained.history] == scores[:4]
    assert trained.best_score == 3.0
    assert trained.steps == trained.history[-1]["step"] < SMALL.total_steps
    off = patient.model_copy(update={"early_stopping": 0})
    assert train_policy(mixed(), off, n_steps=3, seed=0, name="test", validate=scripted(scores)).best_score == 9.0
