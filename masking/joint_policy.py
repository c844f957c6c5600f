"""An autoregressive MaskablePPO policy whose every combination of actions keeps joint limits.

Assets are decided one after another; the mask of each comes from the budget that the decisions before it leave, and
the logits see that budget, too. The log-probability of a combination is the sum of its conditionals (the chain rule),
so PPO needs no change. Constraint-aware autoregressive policies: Winkel et al., PASPO (arXiv:2409.18735), there for
continuous allocations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from masking.distributions import MaskedCategorical
from masking.errors import InvalidActionError, MaskingError
from masking.joint import JointLimits, JointWalk
from masking.strict_policy import Obs, StrictMaskablePolicy


class ObservationsExtractor(BaseFeaturesExtractor):
    """Passes on the part `observations` of a Dict observation; raw state and order are for the masks alone."""

    def __init__(self, observation_space: spaces.Dict) -> None:
        super().__init__(observation_space, spaces.flatdim(observation_space["observations"]))

    def forward(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Features [B, D]."""
        return obs["observations"].flatten(1)


class JointMaskablePolicy(StrictMaskablePolicy):
    """Chooses K actions per row, each under the budget that the ones before it leave.

    Observations are a Dict of `observations` [D] for the networks, `state` [1 + 2 K], the raw row that `JointLimits`
    judges, and `asset_order` [K], the order in which the assets are decided: best drawn at random in training, so that
    no asset is always first at the till, and fixed in use. Masks of the environment can only forbid more.

    Args: as `StrictMaskablePolicy`, and `limits`. `safe_action` is Hold of the trade table.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *args: Any,
        limits: JointLimits,
        **kwargs: Any,
    ) -> None:
        if "safe_action" in kwargs:
            raise MaskingError("safe_action: expected none, Hold of the trade table is the safe action")
        nvec = list(limits.table.nvec)
        if not isinstance(action_space, spaces.MultiDiscrete) or action_space.nvec.tolist() != nvec:
            raise MaskingError(
                f"action_space: expected MultiDiscrete({nvec}) as in the trade table, was {action_space}"
            )
        parts = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {}
        missing = {"observations", "state", "asset_order"} - set(parts)
        if missing:
            raise MaskingError(
                f"observation_space: expected a Dict of observations, state and asset_order, missing {sorted(missing)}"
            )
        self.limits = limits
        kwargs.setdefault("features_extractor_class", ObservationsExtractor)
        super().__init__(observation_space, action_space, *args, safe_action=limits.table.hold, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        table = self.limits.table
        # Before the parent builds the optimiser. Starts at zero: at first nobody reacts to the budget.
        self.budget_net = nn.Linear(3 + 2 * table.num_assets, sum(table.nvec))
        super()._build(lr_schedule)
        nn.init.zeros_(self.budget_net.weight)
        nn.init.zeros_(self.budget_net.bias)

    def forward(
        self, obs: Obs, deterministic: bool = False, action_masks: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Actions [B, K], values [B, 1], log-probabilities [B]."""
        latent_pi, latent_vf = self._latents(obs)
        distribution = self._joint_distribution(latent_pi, obs, action_masks)
        actions, log_prob = distribution.choose(deterministic)
        return actions, self.value_net(latent_vf), log_prob

    def evaluate_actions(
        self, obs: Obs, actions: torch.Tensor, action_masks: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Values [B, 1], log-probabilities [B] and entropy [B] of a minibatch from the rollout buffer.

        The entropy is the sum of the conditional entropies along the chosen actions: an unbiased estimate of the
        joint entropy when they were drawn from the policy.
        """
        latent_pi, latent_vf = self._latents(obs)
        distribution = self._joint_distribution(latent_pi, obs, self._from_buffer(action_masks))
        log_prob, entropy = distribution.evaluate(actions.long().reshape(-1, self.limits.table.num_assets))
        return self.value_net(latent_vf), log_prob, entropy

    def get_distribution(self, obs: Obs, action_masks: Any = None) -> JointDistribution:
        """Distribution over combinations; `predict` comes through here."""
        latent_pi, _ = self._latents(obs)
        return self._joint_distribution(latent_pi, obs, action_masks)

    def _latents(self, obs: Obs) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.extract_features(obs)
        if self.share_features_extractor:
            latents: tuple[torch.Tensor, torch.Tensor] = self.mlp_extractor(features)
            return latents
        actor, critic = features
        return self.mlp_extractor.forward_actor(actor), self.mlp_extractor.forward_critic(critic)

    def _joint_distribution(self, latent_pi: torch.Tensor, obs: Obs, action_masks: Any) -> JointDistribution:
        masks = torch.as_tensor(self._checked(action_masks, obs), device=latent_pi.device)
        if not isinstance(obs, dict):
            raise MaskingError(f"obs: expected a dict with state and asset_order, was {type(obs)}")
        return JointDistribution(
            self.limits, self.action_net(latent_pi), self.budget_net, obs["state"], obs["asset_order"].long(), masks
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = {**super()._get_constructor_parameters(), "limits": self.limits}
        del parameters["safe_action"]
        return parameters


class JointDistribution:
    """Distribution over combinations of actions, [B, K].

    Args: limits; logits [B, K * A] before the budget is seen; budget_net from budget features [B, 3 + 2 K] to
        additions [B, K * A]; state [B, 1 + 2 K]; order integer [B, K]; action_masks bool [B, K * A].
    """

    def __init__(
        self,
        limits: JointLimits,
        logits: torch.Tensor,
        budget_net: nn.Module,
        state: torch.Tensor,
        order: torch.Tensor,
        action_masks: torch.Tensor,
    ) -> None:
        expected = torch.arange(limits.table.num_assets, device=order.device).expand_as(order)
        if not torch.equal(order.sort(dim=1).values, expected):
            raise MaskingError(
                "asset_order: expected a permutation of the assets in every row; VecNormalize must leave it and the "
                "state alone: norm_obs_keys=['observations']"
            )
        self.limits, self.logits, self.budget_net = limits, logits, budget_net
        self.state, self.order, self.action_masks = state, order, action_masks

    def get_actions(self, deterministic: bool = False) -> torch.Tensor:
        """Draw a combination [B, K], or take the likeliest action of each asset in turn."""
        return self.choose(deterministic)[0]

    def choose(self, deterministic: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions [B, K] as `get_actions`, and their log-probability [B].

        Raises: InvalidActionError if the exact check of a whole combination disagrees with the walk.
        """
        actions, log_prob, _ = self._walk(
            lambda conditional, _: conditional.mode if deterministic else conditional.sample(None)
        )
        self._check(actions)
        return actions, log_prob

    def evaluate(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability [B] and entropy along the actions [B] of combinations [B, K].

        The log-probability is -inf where the order of a row cannot reach the combination.
        Raises: InvalidActionError for a combination outside the limits.
        """
        self._check(actions)
        _, log_prob, entropy = self._walk(lambda _, asset: actions.gather(1, asset[:, None])[:, 0])
        return log_prob, entropy

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Log-probability [B] of combinations [B, K]."""
        return self.evaluate(actions)[0]

    def _walk(
        self, decide: Callable[[MaskedCategorical, torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Actions, log-probability and entropy of one pass over the assets in each row's own order.
        actions = torch.zeros_like(self.order)
        log_prob = torch.zeros_like(self.logits[:, 0])
        entropy = torch.zeros_like(log_prob)
        walk = JointWalk(self.limits, self.state, self.action_masks, validate=False)  # `_check` judges the whole
        for asset in self.order.T:
            conditional = self._conditional(walk, asset)
            action = decide(conditional, asset)
            walk.take(asset, action)
            actions = actions.scatter(1, asset[:, None], action[:, None])
            log_prob = log_prob + conditional.log_prob(action)
            entropy = entropy + conditional.entropy()
        return actions, log_prob, entropy

    def _conditional(self, walk: JointWalk, asset: torch.Tensor) -> MaskedCategorical:
        rows = torch.arange(len(asset), device=asset.device)
        logits = self.logits + self.budget_net(self._budget_features(walk))
        logits = logits.reshape(len(asset), -1, self.limits.table.num_actions)[rows, asset]
        return MaskedCategorical(logits, walk.action_masks(asset))

    def _budget_features(self, walk: JointWalk) -> torch.Tensor:
        # Fractions of the portfolio's value after the decisions so far, and which assets are still open.
        budget = walk.budget
        value = (budget.cash + budget.invested).clamp(min=1e-6)
        shares = torch.stack((budget.cash, budget.invested, budget.needed), dim=1) / value[:, None]
        return torch.cat((shares, walk.invested / value[:, None], walk.pending), dim=1).to(self.logits.dtype)

    def _check(self, actions: torch.Tensor) -> None:
        valid = self.limits.check(self.state, actions)
        if not bool(valid.all()):
            row = int(torch.nonzero(~valid)[0])
            reasons = "; ".join(self.limits.explain(self.state, actions, row))
            raise InvalidActionError(f"actions: row {row} chose {actions[row].tolist()}: {reasons}")
