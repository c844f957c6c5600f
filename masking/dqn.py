"""Masked double DQN on stable-baselines3's DQN: explores, bootstraps and acts among valid actions only.

A small value-based baseline next to MaskablePPO. The target is r + gamma * Q'(s', argmax over valid a of Q(s', a)),
Q' the target network (double DQN, arXiv:1509.06461); without the mask it bootstraps from values of actions that are
never taken and so never corrected.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.dqn.policies import DQNPolicy
from torch.nn.functional import smooth_l1_loss

from masking.actions import HOLD
from masking.adapters import BoolArray, MaskAdapter
from masking.errors import MissingMaskError
from masking.validation import refuse_broken_rows, validate_action_masks
from masking.values import masked_argmax


class MaskedSamples(NamedTuple):
    """A minibatch [B, ...] of transitions; `dones` is 1 where the episode terminated, 0 where it was truncated."""

    observations: torch.Tensor
    actions: torch.Tensor
    next_observations: torch.Tensor
    next_action_masks: torch.Tensor
    dones: torch.Tensor
    rewards: torch.Tensor


class MaskedReplayBuffer(ReplayBuffer):
    """Transitions with the mask of their next state, taken from `info["next_action_mask"]`."""

    def __init__(self, *args: Any, rng: np.random.Generator, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rng = rng
        num_actions = int(cast(spaces.Discrete, self.action_space).n)
        self.next_action_masks = np.zeros((self.buffer_size, self.n_envs, num_actions), dtype=np.bool_)

    def add(self, obs: Any, next_obs: Any, action: Any, reward: Any, done: Any, infos: list[dict[str, Any]]) -> None:
        """Store one transition per environment."""
        self.next_action_masks[self.pos] = [info["next_action_mask"] for info in infos]
        super().add(obs, next_obs, action, reward, done, infos)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> MaskedSamples:  # type: ignore[override]
        """Uniform minibatch, with replacement."""
        at = self.rng.integers(self.size(), size=batch_size), self.rng.integers(self.n_envs, size=batch_size)
        arrays = (
            self._normalize_obs(self.observations[at], env),
            self.actions[at],
            self._normalize_obs(self.next_observations[at], env),
            self.next_action_masks[at],
            (self.dones[at] * (1 - self.timeouts[at]))[:, None],
            self._normalize_reward(self.rewards[at], env)[:, None],
        )
        return MaskedSamples(*(self.to_torch(cast(npt.NDArray[Any], array)) for array in arrays))


class MaskedDQNPolicy(DQNPolicy):
    """Q-networks only: choosing needs a mask, and only `MaskedDQN.predict` takes one."""

    def _predict(self, obs: Any, deterministic: bool = True) -> torch.Tensor:  # noqa: ARG002 - DQNPolicy's signature
        raise MissingMaskError(
            "policy: expected a call of MaskedDQN.predict(obs, action_masks=...), was one without masks"
        )


class MaskedDQN(DQN):
    """Double DQN over a VecEnv whose `action_masks()` tells the valid actions, batched or row by row.

    Needs the mask of the final state of a *truncated* episode, since its value is bootstrapped and the VecEnv already
    answers for the next episode: `info["terminal_action_mask"]` (bool [A], our batched environments give it) or
    `info["action_mask"]` (Gymnasium's int8 [A] of the last step; `masking.wrappers.MaskToInfo` adds it).

    Args: as `DQN`, with one-step returns and an own replay buffer, without `optimize_memory_usage`;
        `safe_action` must be valid in every row, None asks only for one valid action.
    Raises: MissingMaskError without masks, by the plain EvalCallback too, or without that final mask; InvalidMaskError
        for wrong ones.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MaskedDQNPolicy}

    def __init__(self, *args: Any, safe_action: int | None = HOLD, **kwargs: Any) -> None:
        self.safe_action = safe_action
        super().__init__(*args, **kwargs)

    def predict(
        self,
        observation: npt.NDArray[Any] | dict[str, npt.NDArray[Any]],
        state: tuple[npt.NDArray[Any], ...] | None = None,
        episode_start: npt.NDArray[Any] | None = None,  # noqa: ARG002 - SB3's signature
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[npt.NDArray[Any], tuple[npt.NDArray[Any], ...] | None]:
        """Best valid action of each row; unless `deterministic`, a uniform valid one with rate `exploration_rate`.

        Args: observation [D] or [B, D]; action_masks bool [A] or [B, A]; the [1, B, A] that sb3-contrib stacks from a
            batched environment is taken too.
        Raises: MissingMaskError, InvalidMaskError; MaskingError where a valid action has the value NaN.
        """
        if action_masks is None:
            raise MissingMaskError(
                "action_masks: expected bool [B, A], was None; pass action_masks= to predict(), "
                "and do not use stable-baselines3's EvalCallback or evaluate_policy"
            )
        obs, vectorized = self.policy.obs_to_tensor(observation)
        batch = len(obs)
        masks = np.asarray(action_masks)
        if masks.ndim == 3 and len(masks) == 1:
            masks = masks[0]
        elif masks.ndim == 1 and not vectorized:
            masks = masks[None]
        validate_action_masks(masks, num_actions=self._adapter.width, batch=batch, safe_action=self.safe_action)
        self.policy.set_training_mode(False)
        with torch.no_grad():
            values = self.q_net(obs).cpu().numpy()
        refuse_broken_rows(
            (np.isnan(values) & masks).any(axis=1),
            "action values: expected numbers on valid actions, was NaN",
            look_for="NaN in the observation or for diverged weights",
        )
        actions = masked_argmax(values, masks)
        if not deterministic:
            # One coin per row, where SB3 tosses one for the whole batch.
            explore = self._rng.random(batch) < self.exploration_rate
            actions = np.where(explore, self._random_actions(masks), actions)
        return (actions if vectorized else actions.squeeze(0)), state

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Masked double-DQN updates; all but the target is SB3's."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        buffer = cast(MaskedReplayBuffer, self.replay_buffer)
        losses = []
        for _ in range(gradient_steps):
            batch = buffer.sample(batch_size, env=self._vec_normalize_env)
            with torch.no_grad():
                best = masked_argmax(self.q_net(batch.next_observations), batch.next_action_masks)
                next_values = self.q_net_target(batch.next_observations).gather(1, best[:, None])
                targets = batch.rewards + (1 - batch.dones) * self.gamma * next_values
            values = self.q_net(batch.observations).gather(1, batch.actions.long())
            loss = smooth_l1_loss(values, targets)
            losses.append(loss.item())
            self.policy.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()
        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/loss", np.mean(losses))

    def _setup_model(self) -> None:
        if self.n_steps != 1 or self.replay_buffer_class not in (None, MaskedReplayBuffer):
            was = f"n_steps={self.n_steps}, replay_buffer_class={self.replay_buffer_class}"
            raise ValueError(f"MaskedDQN: expected n_steps=1 and its own replay buffer, which keeps masks, was {was}")
        if self.optimize_memory_usage:
            raise ValueError("MaskedDQN: expected optimize_memory_usage=False, was True; its buffer keeps next states")
        if not issubclass(self.policy_class, MaskedDQNPolicy):
            raise ValueError(f"policy: expected 'MlpPolicy' or a MaskedDQNPolicy, was {self.policy_class}")
        self._adapter = MaskAdapter.of(self.action_space, self.safe_action)
        self._rng = np.random.default_rng(self.seed)
        self.replay_buffer_class = MaskedReplayBuffer
        self.replay_buffer_kwargs = {**self.replay_buffer_kwargs, "rng": self._rng}
        super()._setup_model()

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._setup_learn(*args, **kwargs)
        self._last_masks = self._adapter.from_env(self.env)
        return result

    def _sample_action(
        self,
        learning_starts: int,
        action_noise: Any = None,  # noqa: ARG002 - SB3's signature
        n_envs: int = 1,  # noqa: ARG002
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        if self.num_timesteps < learning_starts:
            actions = self._random_actions(self._last_masks)
        else:
            actions, _ = self.predict(cast(Any, self._last_obs), action_masks=self._last_masks)
        return actions, actions

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: npt.NDArray[Any],
        new_obs: npt.NDArray[Any] | dict[str, npt.NDArray[Any]],
        reward: npt.NDArray[Any],
        dones: npt.NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        self._last_masks = self._adapter.from_env(self.env)
        next_masks = self._last_masks.copy()
        for row in np.flatnonzero(dones):
            # Where the episode terminated the next value counts 0: any mask with a valid action will do.
            if infos[row].get("TimeLimit.truncated", False):
                next_masks[row] = self._final_mask(infos[row], int(row))
        infos = [{**info, "next_action_mask": mask} for info, mask in zip(infos, next_masks, strict=True)]
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _final_mask(self, info: dict[str, Any], row: int) -> BoolArray:
        key = "terminal_action_mask" if "terminal_action_mask" in info else "action_mask"
        if key not in info:
            raise MissingMaskError(
                f"infos[{row}]: expected 'terminal_action_mask' or 'action_mask', the mask of the final state of a "
                f"truncated episode, was {sorted(info)}; wrap the environment in masking.wrappers.MaskToInfo"
            )
        mask: BoolArray = self._adapter.from_binary(info[key])[0]
        return mask

    def _random_actions(self, masks: BoolArray) -> npt.NDArray[Any]:
        # The argmax of independent uniform numbers is uniform over the valid actions.
        actions: npt.NDArray[Any] = masked_argmax(self._rng.random(masks.shape), masks)
        return actions
