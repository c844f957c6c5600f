"""A MaskablePPO policy that cannot act without a valid mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.distributions import MaskableDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor

from masking.actions import HOLD
from masking.errors import InvalidMaskError, MaskingError, MissingMaskError
from masking.validation import check_safe_action, validate_action_masks

Obs = torch.Tensor | dict[str, torch.Tensor]

MAX_LOGIT = 1e6
"""Bound of |logit|: sb3-contrib masks with -1e8, so a logit below that would make forbidden actions the likely ones."""


class StrictMaskablePolicy(MaskableActorCriticPolicy):  # type: ignore[misc]
    """`MaskableActorCriticPolicy` whose every action path validates its mask first.

    sb3-contrib accepts a missing mask (samples forbidden actions), an all-False row (uniform over forbidden
    actions), a float additive mask (inverted) and a wrong shape (reshaped). All four raise here.

    Args: as the parent, for Discrete and MultiDiscrete actions; `safe_action` must be valid in every row, one for all
        dimensions or one each, default Hold; None asks only for one valid action per row and dimension.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *args: Any,
        safe_action: int | Sequence[int] | None = HOLD,
        **kwargs: Any,
    ) -> None:
        self.safe_action = safe_action
        if isinstance(action_space, spaces.MultiDiscrete):
            self.num_actions: int | tuple[int, ...] = tuple(action_space.nvec.tolist())
        elif isinstance(action_space, spaces.Discrete):
            if action_space.start != 0:
                raise MaskingError(f"action_space: expected actions from 0, was {action_space}")
            self.num_actions = int(action_space.n)
        else:
            raise MaskingError(f"action_space: expected Discrete or MultiDiscrete, was {action_space}")
        check_safe_action(self.num_actions, safe_action)
        if isinstance(observation_space, spaces.Dict):
            kwargs.setdefault("features_extractor_class", CombinedExtractor)
        super().__init__(observation_space, action_space, *args, **kwargs)

    def forward(
        self, obs: Obs, deterministic: bool = False, action_masks: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Actions [B], values [B, 1], log-probabilities [B] under bool masks [B, A]."""
        masks = self._checked(action_masks, obs)
        result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = super().forward(obs, deterministic, masks)
        return result

    def get_distribution(self, obs: Obs, action_masks: Any = None) -> MaskableDistribution:
        """Masked distribution; `predict` comes through here."""
        return super().get_distribution(obs, self._checked(action_masks, obs))

    def evaluate_actions(
        self, obs: Obs, actions: torch.Tensor, action_masks: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Values, log-probabilities and entropy of a minibatch from the rollout buffer."""
        masks = self._checked(self._from_buffer(action_masks), obs)
        result: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] = super().evaluate_actions(obs, actions, masks)
        return result

    def _get_action_dist_from_latent(self, latent_pi: torch.Tensor) -> MaskableDistribution:
        logits = self.action_net(latent_pi)
        if bool(logits.isnan().any()):
            raise MaskingError("logits: expected numbers, was NaN; look for NaN in the observation or diverged weights")
        logits = logits.clamp(-MAX_LOGIT, MAX_LOGIT)
        return self.action_dist.proba_distribution(action_logits=logits)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "safe_action": self.safe_action}

    def _checked(self, action_masks: Any, obs: Obs) -> Any:
        if action_masks is None:
            raise MissingMaskError(
                "action_masks: expected bool [B, A], was None; pass action_masks= to predict(), "
                "and do not use use_masking=False or stable-baselines3's EvalCallback"
            )
        batch = len(next(iter(obs.values()))) if isinstance(obs, dict) else len(obs)
        # A batched VecEnv answers env_method("action_masks") with a one-element list, stacked to [1, B, A].
        if isinstance(action_masks, np.ndarray) and action_masks.ndim == 3 and action_masks.shape[0] == 1:
            action_masks = action_masks[0]
        # predict() on a single observation receives a single mask row.
        elif isinstance(action_masks, np.ndarray) and action_masks.ndim == 1 and batch == 1:
            action_masks = action_masks[None, :]
        return validate_action_masks(
            action_masks, num_actions=self.num_actions, batch=batch, safe_action=self.safe_action
        )

    @staticmethod
    def _from_buffer(action_masks: Any) -> Any:
        # MaskableRolloutBuffer stores masks as float32 0/1; anything else in there is a corrupted mask.
        if isinstance(action_masks, torch.Tensor) and action_masks.is_floating_point():
            if not bool(((action_masks == 0) | (action_masks == 1)).all()):
                raise InvalidMaskError("action_masks: expected only 0 and 1 in the rollout buffer")
            return action_masks > 0.5
        return action_masks
