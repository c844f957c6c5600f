"""Training masked double DQN (`masking.dqn.MaskedDQN`) on batched trading rows: a value-based model-free baseline."""

from __future__ import annotations

import numpy as np
import torch
from stable_baselines3.dqn.policies import QNetwork

from configs.evaluation import DQNConfig
from data import Scaler
from envs.vec_env import TradingVecEnv
from masking import masked_argmax, refuse_broken_rows, validate_action_masks
from masking.dqn import MaskedDQN
from mbpo.snapshots import Log, Progress, SnapshotCallback, TrainedPolicy, Validate

WARM_UP = 0.02
"""Share of training spent on random valid actions before the first update."""

TARGET_TAU = 0.01
"""Polyak weight of the target network, which follows after every batched step."""


class QPolicy:
    """Greedy masked decisions of an action-value network.

    Args: name for reports; network; scaler from state columns to observations.
    """

    def __init__(self, name: str, network: QNetwork, scaler: Scaler) -> None:
        self.name = name
        self.network = network
        self.scaler = scaler

    def act(self, state: np.ndarray, action_masks: np.ndarray) -> np.ndarray:
        """Valid action of highest value, Hold on ties.

        Args: state [B, S] float32; action_masks [B, A] bool.
        Returns: [B] int64.
        Raises: MaskingError where a value is NaN; InvalidMaskError.
        """
        obs = torch.as_tensor(np.asarray(self.scaler(state[:, :-1])))
        validate_action_masks(action_masks, num_actions=int(self.network.action_space.n), batch=len(obs))
        with torch.no_grad():
            values = self.network(obs).numpy()
        refuse_broken_rows(
            np.isnan(values).any(axis=1),
            f"{self.name}: expected numbers as action values, was NaN",
            look_for="NaN in the state or for diverged weights",
        )
        return np.asarray(masked_argmax(values, action_masks), dtype=np.int64)


def train_dqn(
    env: TradingVecEnv,
    config: DQNConfig,
    *,
    seed: int,
    name: str = "masked_dqn",
    validate: Validate[QPolicy],
    log: Log | None = None,
    progress: Progress | None = None,
) -> TrainedPolicy[QPolicy]:
    """Train action values and keep the snapshot with the best validation score.

    Args:
        env: real rows; every transition of the run stays in the replay buffer.
        seed: of weights, exploration and minibatches.

    Raises: FloatingPointError if a weight becomes NaN or infinite; RuntimeError if the audit of executed actions, which
        is logged with each snapshot, finds a forbidden one.
    """
    model = MaskedDQN(
        "MlpPolicy",
        env,
        learning_rate=config.learning_rate,
        buffer_size=config.total_steps,
        learning_starts=round(WARM_UP * config.total_steps),
        batch_size=config.batch_size,
        gamma=config.gamma,
        train_freq=1,
        gradient_steps=config.gradient_steps,
        tau=TARGET_TAU,
        target_update_interval=env.num_envs,
        exploration_fraction=config.exploration_fraction,
        policy_kwargs={"net_arch": list(config.net_arch)},
        seed=seed,
        device="cpu",
        verbose=0,
    )
    callback = SnapshotCallback(
        QPolicy(name, model.q_net, env.scaler),
        name=name,
        total_steps=config.total_steps,
        validations=config.validations,
        validate=validate,
        log=log,
        progress=progress,
    )
    return callback.train(model)
