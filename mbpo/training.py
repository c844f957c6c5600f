"""Training a masked PPO policy: the same loop for MBPO and for the model-free baseline.

Both come through `train_policy`, so masks, costs, validation and the choice of the best snapshot are equal by
construction; environment and PPO settings are each one's own. sb3-contrib's MaskablePPO is used unmodified.
"""

from __future__ import annotations

from sb3_contrib import MaskablePPO

from configs.section import PPOConfig
from envs.vec_env import TradingVecEnv
from masking.strict_policy import StrictMaskablePolicy
from mbpo.policy import TorchPolicy
from mbpo.snapshots import Log, Progress, SnapshotCallback, TrainedPolicy, Validate
from mbpo.vec_env import MixedVecEnv


def train_policy(
    env: TradingVecEnv,
    config: PPOConfig,
    *,
    n_steps: int,
    seed: int,
    name: str,
    validate: Validate[TorchPolicy],
    log: Log | None = None,
    progress: Progress | None = None,
) -> TrainedPolicy[TorchPolicy]:
    """Train a policy and keep the snapshot with the best validation score.

    Args:
        env: real rows, or real and imagined ones (`MixedVecEnv`, which is re-branched before each rollout).
        n_steps: steps per row between updates; the rollout length H for `MixedVecEnv`.
        seed: of weights, action sampling and minibatch order.

    Raises: FloatingPointError if a weight becomes NaN or infinite; ValueError if `n_steps` exceeds H; RuntimeError if
        the audit of executed actions, which is logged with each snapshot, finds a forbidden one.
    """
    if isinstance(env, MixedVecEnv) and n_steps > env.branches.horizon:
        raise ValueError(f"n_steps: expected at most the rollout length {env.branches.horizon}, was {n_steps}")
    model = MaskablePPO(
        StrictMaskablePolicy,
        env,
        learning_rate=config.learning_rate,
        n_steps=n_steps,
        batch_size=min(config.batch_size, n_steps * env.num_envs),
        n_epochs=config.n_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        ent_coef=config.ent_coef,
        clip_range=config.clip_range,
        policy_kwargs={"net_arch": list(config.net_arch)},
        seed=seed,
        device="cpu",
        verbose=0,
    )
    callback = _RebranchingCallback(
        TorchPolicy(name, model.policy, env.scaler),
        name=name,
        total_steps=config.total_steps,
        validations=config.validations,
        validate=validate,
        log=log,
        progress=progress,
    )
    return callback.train(model)


class _RebranchingCallback(SnapshotCallback[TorchPolicy]):
    # Starts imagined rows on fresh branches before each rollout, so that the last-value bootstrap cuts them at H.

    def _on_rollout_start(self) -> None:
        super()._on_rollout_start()
        env = self.training_env
        if isinstance(env, MixedVecEnv):
            self.model._last_obs = env.rebranch()
            starts = self.model._last_episode_starts
            if starts is not None:
                starts[env.num_real :] = True

    def _rollout_metrics(self) -> dict[str, float]:
        env = self.training_env
        return env.take_statistics() if isinstance(env, MixedVecEnv) else {}
