"""Masked double DQN on trading rows: markets with an obvious answer are learned, the best snapshot is kept."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from mbpo_worlds import NAMES, make_dynamics, make_features, make_scaler

from configs.evaluation import DQNConfig
from envs.vec_env import HistoryVecEnv
from evaluation import backtest, evaluate
from masking import InvalidMaskError, MaskingError
from mbpo.dqn import QPolicy, train_dqn
from mbpo.snapshots import TrainedPolicy, Validate

DYNAMICS = make_dynamics(min_holding_bars=0)
ROWS = 300
TIMES = np.arange("2020-01-01", "2020-10-27", dtype="datetime64[D]")
SMALL = DQNConfig(
    total_steps=2400, num_envs=16, gradient_steps=2, batch_size=64, learning_rate=3e-3, gamma=0.5, net_arch=(16,),
    validations=2,
)  # fmt: skip
TINY = SMALL.model_copy(update={"total_steps": 640, "validations": 4})


def drifting(drift: float) -> np.ndarray:
    features = make_features(ROWS, move=0.002)
    features[:, 1] += drift
    return features


def history(features: np.ndarray, seed: int = 0) -> HistoryVecEnv:
    return HistoryVecEnv(DYNAMICS, make_scaler(features), features, num_envs=16, episode_bars=50, seed=seed)


def scripted(scores: list[float]) -> Validate[QPolicy]:
    remaining = iter(scores)
    return lambda _: {"score": next(remaining)}


def train(features: np.ndarray, seed: int = 0, scores: list[float] | None = None) -> TrainedPolicy[QPolicy]:
    return train_dqn(history(features), TINY, seed=seed, validate=scripted(scores or [1.0] * 9))


def weights(policy: QPolicy) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in policy.network.state_dict().items()}


@pytest.mark.parametrize(("drift", "position"), [(0.005, 1.0), (-0.005, 0.0)])
def test_it_learns_to_be_invested_in_a_rising_market_and_out_of_a_falling_one(drift: float, position: float) -> None:
    features, env = drifting(drift), history(drifting(drift))

    def score(policy: QPolicy) -> Mapping[str, float]:
        return {"score": evaluate(backtest(DYNAMICS, features, TIMES, policy), 252).reward_per_bar}

    trained = train_dqn(env, SMALL, seed=0, validate=score)
    result = backtest(DYNAMICS, features, TIMES, trained.policy)  # raises on a forbidden action
    assert abs(float(np.mean(result.position)) - position) < 0.1
    assert env.audit.executed == SMALL.total_steps
    assert env.audit.invalid == 0


def test_the_best_snapshot_is_kept_not_the_last() -> None:
    seen: list[dict[str, torch.Tensor]] = []
    scores = iter([0.0, 3.0, 1.0, 0.5])

    def validate(policy: QPolicy) -> Mapping[str, float]:
        seen.append(weights(policy))
        return {"score": next(scores)}

    trained = train_dqn(history(drifting(0.0)), TINY, seed=0, validate=validate)
    assert (trained.best_score, trained.best_step, trained.steps) == (3.0, 320, 640)
    assert len(trained.history) == len(seen) == TINY.validations
    for key, value in weights(trained.policy).items():
        assert torch.equal(value, seen[1][key])
    assert any(not torch.equal(seen[1][key], seen[-1][key]) for key in seen[1])


def test_weights_follow_from_the_seed_alone() -> None:
    np.random.seed(1)  # noqa: NPY002 - the generator that sb3's replay buffer draws from
    first = weights(train(drifting(0.0)).policy)
    np.random.seed(2)  # noqa: NPY002
    again, other = weights(train(drifting(0.0)).policy), weights(train(drifting(0.0), seed=1).policy)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_metrics_and_losses_of_every_snapshot_are_logged() -> None:
    logged: list[tuple[Mapping[str, float], int]] = []
    progress: list[tuple[int, int]] = []
    train_dqn(
        history(drifting(0.0)),
        TINY,
        seed=0,
        validate=scripted([1.0] * 9),
        log=lambda metrics, step: logged.append((metrics, step)),
        progress=lambda done, total: progress.append((done, total)),
    )
    assert [step for _, step in logged] == [160, 320, 480, 640]
    assert {"score", "executed_actions", "invalid_actions", "loss"} <= set(logged[-1][0])
    assert progress[-1] == (640, 640)


def test_only_valid_actions_are_chosen() -> None:
    policy, rng = train(drifting(0.0)).policy, np.random.default_rng(0)
    state = rng.normal(0, 0.1, (500, len(DYNAMICS.state_names))).astype(np.float32)
    masks = rng.random((500, 7)) < 0.4
    masks[:, 0] = True
    actions = policy.act(state, masks)
    assert masks[np.arange(500), actions].all()
    # Best of the valid: no valid action has a higher value than the chosen one.
    values = policy.network(torch.as_tensor(np.asarray(policy.scaler(state[:, :-1])))).detach().numpy()
    np.testing.assert_array_equal(actions, np.where(masks, values, -np.inf).argmax(axis=1))


def test_nan_in_a_state_and_missing_hold_are_refused() -> None:
    policy = train(drifting(0.0)).policy
    state = np.zeros((2, len(DYNAMICS.state_names)), np.float32)
    state[:, NAMES.index("volatility_20")] = 0.16
    masks = DYNAMICS.action_masks(state)
    with pytest.raises(InvalidMaskError, match="Hold"):
        policy.act(state, np.zeros_like(masks))
    state[1, NAMES.index("signal")] = np.nan
    with pytest.raises(
        MaskingError, match="masked_dqn: expected numbers as action values, was NaN in 1 of 2 rows, first row 1"
    ):
        policy.act(state, masks)
