"""Training soft actor-critic on the continuous position: a model-free baseline whose limits hold by projection.

stable-baselines3's SAC (arXiv:1801.01290) is used unmodified. It wishes for a position; the environment executes the
valid action nearest to it, so it is bound by the same masks as any policy. Its replay buffer keeps the wish: projection
is part of the dynamics it learns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.vec_env import VecEnvWrapper
from stable_baselines3.sac.policies import Actor

from configs.evaluation import SACConfig
from data import Scaler
from envs import TradingDynamics
from envs.vec_env import TradingVecEnv
from masking import nearest_valid, refuse_broken_rows
from mbpo.snapshots import Log, Progress, SnapshotCallback, TrainedPolicy, Validate

FULL_POSITION = 1.0
"""The whole equity: the largest wish. What lies above it needs paper mode."""

WARM_UP = 0.02
"""Share of training spent on uniform wishes before the first update."""

ENTROPY = "auto_0.1"
"""First temperature of sb3's automatic tuning. Its default of 1 drowns rewards of a few hundredths per bar for long."""


def _project(dynamics: TradingDynamics, wish: np.ndarray, state: np.ndarray, action_masks: np.ndarray) -> np.ndarray:
    # From [-1, 1], the range that SAC squashes to, onto flat .. fully invested, onto the nearest valid action.
    target = FULL_POSITION * (wish.astype(np.float64) + 1) / 2
    positions = state[:, dynamics.state_names.index("position")]
    return nearest_valid(target, positions, action_masks, dynamics.rule_set.actions)


class ProjectedVecEnv(VecEnvWrapper):
    """Trading rows steered by a wanted position in [-1, 1], flat to fully invested; the nearest valid action executes.

    Args: venv, whose masks and audit of executed actions stay in force.
    """

    venv: TradingVecEnv

    def __init__(self, venv: TradingVecEnv) -> None:
        super().__init__(venv, action_space=spaces.Box(-1.0, 1.0, (1,), np.float32))

    def reset(self) -> Any:
        """Restart every row."""
        return self.venv.reset()

    def step_async(self, actions: np.ndarray) -> None:
        """Project the wishes [B, 1] and remember the actions."""
        venv = self.venv
        self.venv.step_async(_project(venv.dynamics, actions[:, 0], venv.state, venv.action_masks()))

    def step_wait(self) -> Any:
        """Step the rows."""
        return self.venv.step_wait()


class ProjectedPolicy:
    """Deterministic wish of an actor network, projected onto the valid actions.

    Args: name for reports; network; dynamics, for position and action table; scaler from state columns to observations.
    """

    def __init__(self, name: str, network: Actor, dynamics: TradingDynamics, scaler: Scaler) -> None:
        self.name = name
        self.network = network
        self.dynamics = dynamics
        self.scaler = scaler

    def act(self, state: np.ndarray, action_masks: np.ndarray) -> np.ndarray:
        """Valid action nearest to the wanted position.

        Args: state [B, S] float32; action_masks [B, A] bool.
        Returns: [B] int64.
        Raises: MaskingError where the wish is NaN; InvalidMaskError.
        """
        obs = torch.as_tensor(np.asarray(self.scaler(state[:, :-1])))
        with torch.no_grad():
            # Not the network's own call: its distribution would refuse NaN with less said.
            mean, _, _ = self.network.get_action_dist_params(obs)
            wish = torch.tanh(mean[:, 0]).numpy()
        refuse_broken_rows(
            np.isnan(wish),
            f"{self.name}: expected numbers as wanted positions, was NaN",
            look_for="NaN in the state or for diverged weights",
        )
        return _project(self.dynamics, wish, state, action_masks)


def train_sac(
    env: TradingVecEnv,
    config: SACConfig,
    *,
    seed: int,
    name: str = "sac",
    validate: Validate[ProjectedPolicy],
    log: Log | None = None,
    progress: Progress | None = None,
) -> TrainedPolicy[ProjectedPolicy]:
    """Train an actor and keep the snapshot with the best validation score.

    Args:
        env: real rows; every transition of the run stays in the replay buffer.
        seed: of weights, exploration and minibatches; sb3's replay buffer draws from NumPy's global generator, which
            it seeds.

    Raises: FloatingPointError if a weight becomes NaN or infinite; RuntimeError if the audit of executed actions, which
        is logged with each snapshot, finds a forbidden one.
    """
    model = SAC(
        "MlpPolicy",
        ProjectedVecEnv(env),
        learning_rate=config.learning_rate,
        buffer_size=config.total_steps,
        learning_starts=round(WARM_UP * config.total_steps),
        batch_size=config.batch_size,
        gamma=config.gamma,
        train_freq=1,
        gradient_steps=config.gradient_steps,
        ent_coef=ENTROPY,
        policy_kwargs={"net_arch": list(config.net_arch)},
        seed=seed,
        device="cpu",
        verbose=0,
    )
    callback = SnapshotCallback(
        ProjectedPolicy(name, model.actor, env.dynamics, env.scaler),
        name=name,
        total_steps=config.total_steps,
        validations=config.validations,
        validate=validate,
        log=log,
        progress=progress,
    )
    return callback.train(model)
