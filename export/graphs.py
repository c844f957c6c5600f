"""The modules that become ONNX files: each takes raw rows and holds everything between them and the answer.

The masks are not written again here: the graphs trace `TradingDynamics.action_masks`, the function that the
environment calls. Letters: B batch, S state columns, M features, D obs columns, A actions.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import Tensor, nn

from data import Scaler
from envs import TradingDynamics
from export.errors import ExportError
from masking import HOLD
from masking.strict_policy import MAX_LOGIT
from world_model.density import density_nll, student_constant
from world_model.losses import mixture_nll

FORBIDDEN_LOGIT = -3e38
"""Logit of a forbidden action: finite, so that no softmax meets -inf - -inf."""


class MaskGraph(nn.Module):
    """`state` [B, S] -> `action_masks` bool [B, A] of the rules alone."""

    def __init__(self, dynamics: TradingDynamics) -> None:
        super().__init__()
        self.dynamics = dynamics

    def forward(self, state: Tensor) -> Tensor:
        """Action masks [B, A] of raw state rows [B, S]."""
        masks: Tensor = self.dynamics.action_masks(state)
        return masks


class PolicyGraph(nn.Module):
    """Scaler, masks and network of a policy in one graph.

    `state` float32 [B, S] raw, `caller_masks` bool [B, A] -> action int64 [B], probabilities [B, A],
    action_masks bool [B, A] (rules AND caller), value [B], fallback bool [B].

    `fallback` marks rows with a non-finite state or network output and rows where no action is left; they get Hold
    with probability 1, and value 0 where there is no finite value. Ties go to the lowest index, Hold first.
    """

    hold: Tensor
    hold_row: Tensor

    def __init__(self, dynamics: TradingDynamics, scaler: Scaler, policy: MaskableActorCriticPolicy) -> None:
        """Copy what decides from the policy; the policy itself stays as it is.

        Raises: ExportError if the policy does not fit the dynamics or keeps layers that are not copied here.
        """
        super().__init__()
        check_policy(dynamics, scaler, policy)
        self.dynamics, self.scaler = dynamics, scaler
        self.mlp_extractor = copy.deepcopy(policy.mlp_extractor).cpu()
        self.action_net = copy.deepcopy(policy.action_net).cpu()
        self.value_net = copy.deepcopy(policy.value_net).cpu()
        one_hot = torch.zeros(1, dynamics.num_actions, dtype=torch.bool)
        one_hot[0, HOLD] = True
        self.register_buffer("hold", one_hot)
        self.register_buffer("hold_row", one_hot.to(torch.float32))

    def forward(self, state: Tensor, caller_masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        allowed = self.dynamics.action_masks(state) & caller_masks
        some = allowed.any(dim=1, keepdim=True)
        # onnxruntime has no `Where` for bool.
        masks = allowed | (~some & self.hold)

        actor, critic = self.mlp_extractor(self.scaler(state[:, :-1]))
        logits, value = self.action_net(actor), self.value_net(critic)
        # |x| < inf is False for NaN as well, with fewer nodes than isfinite.
        finite = (torch.cat((state, logits, value), dim=1).abs() < torch.inf).all(dim=1, keepdim=True)

        limited = torch.clamp(logits, -MAX_LOGIT, MAX_LOGIT)
        masked = torch.where(masks, limited, FORBIDDEN_LOGIT)
        soft = torch.softmax(masked, dim=1)
        decided = some & finite
        probabilities = torch.where(decided, torch.where(masks, soft, 0.0), self.hold_row)
        action = torch.argmax(probabilities, dim=1)
        sure_value = torch.where(finite, value, 0.0)
        return action, probabilities, masks, sure_value[:, 0], ~decided[:, 0]

    def values(self, state: Tensor) -> Tensor:
        """What the value network expects of state rows [B, S]: [B]."""
        _, critic = self.mlp_extractor(self.scaler(state[:, :-1]))
        value: Tensor = self.value_net(critic)
        return value[:, 0]


class UncertaintyGraph(nn.Module):
    """`features` [B, M] raw -> `model_uncertainty` [B], the disagreement of the ensemble; NaN in, NaN out."""

    def __init__(self, market_model: Any) -> None:
        super().__init__()
        self.market_model = copy.deepcopy(market_model).cpu()

    def forward(self, features: Tensor) -> Tensor:
        """Disagreement [B]."""
        uncertainty: Tensor = self.market_model.disagreement(features)
        return uncertainty


class LikelihoodGraph(nn.Module):
    """`features` [B, M] of a bar and `next_features` [B, M] of the next -> `nll` [B], nats per feature.

    Mean over features of `world_model.marginals.next_row_nll`; NaN in, NaN out.
    """

    inverse_dof: Tensor
    constant: Tensor

    def __init__(self, market_model: Any) -> None:
        super().__init__()
        self.market_model = copy.deepcopy(market_model).cpu()
        tails = self.market_model.inverse_dof.double()
        self.register_buffer("inverse_dof", tails)
        self.register_buffer("constant", student_constant(tails))

    def forward(self, features: Tensor, next_features: Tensor) -> Tensor:
        """Negative log likelihood [B] of what came next."""
        model = self.market_model
        mean, var = (part.double() for part in model.predict(features, model.elites))
        nll = density_nll(mean, var, next_features.double(), self.inverse_dof, self.constant)
        return mixture_nll(nll).mean(dim=1).to(torch.float32)


def check_policy(dynamics: TradingDynamics, scaler: Scaler, policy: MaskableActorCriticPolicy) -> None:
    """Raise ExportError unless scaler and policy belong to these dynamics and the policy is an MLP on flat obs."""
    if scaler.names != dynamics.obs_names:
        raise ExportError(f"scaler.names: expected {list(dynamics.obs_names)}, was {list(scaler.names)}")
    width = (len(dynamics.obs_names),)
    if policy.observation_space.shape != width:
        raise ExportError(f"policy.observation_space: expected {list(width)}, was {policy.observation_space.shape}")
    num_actions = getattr(policy.action_space, "n", None)
    if num_actions != dynamics.num_actions:
        raise ExportError(f"policy.action_space: expected Discrete({dynamics.num_actions}), was {policy.action_space}")
    if type(policy.features_extractor) is not FlattenExtractor:
        raise ExportError(
            f"policy.features_extractor: expected FlattenExtractor, was {type(policy.features_extractor).__name__}"
        )
