"""The model-free learners with a replay buffer: obvious markets are learned, the best snapshot is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from mbpo_worlds import NAMES, make_dynamics, make_features, make_scaler

from configs.evaluation import DQNConfig, SACConfig
from envs.vec_env import HistoryVecEnv
from evaluation import backtest, evaluate
from masking import InvalidMaskError, MaskingError
from mbpo.dqn import QPolicy, train_dqn
from mbpo.sac import ProjectedPolicy, train_sac
from mbpo.snapshots import TrainedPolicy

DYNAMICS = make_dynamics(min_holding_bars=0)
ROWS = 300
TIMES = np.arange("2020-01-01", "2020-10-27", dtype="datetime64[D]")
SMALL: dict[str, Any] = {
    "total_steps": 2400,
    "num_envs": 16,
    "gradient_steps": 2,
    "batch_size": 64,
    "learning_rate": 3e-3,
    "gamma": 0.5,
    "net_arch": (16,),
    "validations": 2,
}
TINY = {**SMALL, "total_steps": 640, "validations": 4}
LEARNERS: dict[str, tuple[Callable[..., TrainedPolicy[Any]], type[DQNConfig | SACConfig]]] = {
    "masked_dqn": (train_dqn, DQNConfig),
    "sac": (train_sac, SACConfig),
}
Policy = QPolicy | ProjectedPolicy
each_learner = pytest.mark.parametrize("learner", LEARNERS)


def drifting(drift: float) -> np.ndarray:
    features = make_features(ROWS, move=0.002)
    features[:, 1] += drift
    return features


def history(features: np.ndarray) -> HistoryVecEnv:
    return HistoryVecEnv(DYNAMICS, make_scaler(features), features, num_envs=16, episode_bars=50, seed=0)


def train(learner: str, sizes: Mapping[str, Any] = TINY, env: HistoryVecEnv | None = None, **options: Any) -> Any:
    function, config = LEARNERS[learner]
    options = {"seed": 0, "validate": lambda _: {"score": 1.0}, **options}
    return function(env or history(drifting(0.0)), config(**sizes), **options)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in policy.network.state_dict().items()}


@each_learner
@pytest.mark.parametrize(("drift", "position"), [(0.005, 1.0), (-0.005, 0.0)])
def test_it_learns_to_be_invested_in_a_rising_market_and_out_of_a_falling_one(
    learner: str, drift: float, position: float
) -> None:
    features, env = drifting(drift), history(drifting(drift))

    def score(policy: Policy) -> Mapping[str, float]:
        return {"score": evaluate(backtest(DYNAMICS, features, TIMES, policy), 252).reward_per_bar}

    trained = train(learner, SMALL, env, validate=score)
    result = backtest(DYNAMICS, features, TIMES, trained.policy)  # raises on a forbidden action
    assert abs(float(np.mean(result.position)) - position) < 0.1
    assert env.audit.executed == SMALL["total_steps"]
    assert env.audit.invalid == 0


@each_learner
def test_the_best_snapshot_is_kept_not_the_last(learner: str) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    scores = iter([0.0, 3.0, 1.0, 0.5])

    def validate(policy: Policy) -> Mapping[str, float]:
        seen.append(weights(policy))
        return {"score": next(scores)}

    trained = train(learner, validate=validate)
    assert (trained.best_score, trained.best_step, trained.steps) == (3.0, 320, 640)
    assert len(trained.history) == len(seen) == TINY["validations"]
    for key, value in weights(trained.policy).items():
        assert torch.equal(value, seen[1][key])
    assert any(not torch.equal(seen[1][key], seen[-1][key]) for key in seen[1])


@each_learner
def test_weights_follow_from_the_seed_alone(learner: str) -> None:
    np.random.seed(1)  # noqa: NPY002 - the generator that sb3's replay buffer draws from
    first = weights(train(learner).policy)
    np.random.seed(2)  # noqa: NPY002
    again, other = weights(train(learner).policy), weights(train(learner, seed=1).policy)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(("learner", "losses"), [("masked_dqn", {"loss"}), ("sac", {"critic_loss", "ent_coef"})])
def test_metrics_and_losses_of_every_snapshot_are_logged(learner: str, losses: set[str]) -> None:
    logged: list[tuple[Mapping[str, float], int]] = []
    progress: list[tuple[int, int]] = []
    train(
        learner,
        log=lambda metrics, step: logged.append((metrics, step)),
        progress=lambda done, total: progress.append((done, total)),
    )
    assert [step for _, step in logged] == [160, 320, 480, 640]
    assert {"score", "executed_actions", "invalid_actions"} | losses <= set(logged[-1][0])
    assert progress[-1] == (640, 640)


@pytest.mark.parametrize(("learner", "numbers"), [("masked_dqn", "action values"), ("sac", "wanted positions")])
def test_nan_in_a_state_and_missing_hold_are_refused(learner: str, numbers: str) -> None:
    policy = train(learner).policy
    state = np.zeros((2, len(DYNAMICS.state_names)), np.float32)
    state[:, NAMES.index("volatility_20")] = 0.16
    masks = DYNAMICS.action_masks(state)
    with pytest.raises(InvalidMaskError, match="Hold"):
        policy.act(state, np.zeros_like(masks))
    state[1, NAMES.index("signal")] = np.nan
    with pytest.raises(
        MaskingError, match=f"{learner}: expected numbers as {numbers}, was NaN in 1 of 2 rows, first row 1"
    ):
        policy.act(state, masks)


def test_dqn_takes_the_best_of_the_valid_actions() -> None:
    policy, rng = train("masked_dqn").policy, np.random.default_rng(0)
    state = rng.normal(0, 0.1, (500, len(DYNAMICS.state_names))).astype(np.float32)
    masks = rng.random((500, 7)) < 0.4
    masks[:, 0] = True
    actions = policy.act(state, masks)
    assert masks[np.arange(500), actions].all()
    values = policy.network(torch.as_tensor(np.asarray(policy.scaler(state[:, :-1])))).detach().numpy()
    np.testing.assert_array_equal(actions, np.where(masks, values, -np.inf).argmax(axis=1))
