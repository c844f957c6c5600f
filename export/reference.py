"""What the trained policy itself decides: the yardstick for the exported files.

Goes through sb3's own action path, the NumPy scaler and the NumPy rules, and shares no line with `export.graphs`.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy

from data import Scaler
from envs import TradingDynamics
from masking import HOLD
from serving import PolicyOutputs
from serving.golden import following_rows
from world_model.marginals import next_row_nll


class Reference:
    """Decisions of a policy and of a market model in training code, on copies of both."""

    def __init__(
        self, dynamics: TradingDynamics, scaler: Scaler, policy: MaskableActorCriticPolicy, market_model: Any
    ) -> None:
        self.dynamics, self.scaler = dynamics, scaler
        self.policy = copy.deepcopy(policy).cpu()
        self.policy.set_training_mode(False)
        self.market_model = copy.deepcopy(market_model).cpu().eval()

    def rules(self, state: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Masks [B, A] of the NumPy rule set."""
        return np.asarray(self.dynamics.action_masks(state))

    @torch.no_grad()
    def decide(self, state: npt.NDArray[np.float32], caller_masks: npt.NDArray[np.bool_]) -> PolicyOutputs:
        """Expected outputs of the policy graph; a row that is not finite expects Hold with `fallback`.

        Args: state [B, S]; caller_masks [B, A], Hold valid in every row.
        """
        masks = self.rules(state) & caller_masks
        finite = np.asarray(np.isfinite(state).all(axis=1))
        rows = len(state)
        probabilities = np.zeros((rows, self.dynamics.num_actions), dtype=np.float32)
        probabilities[:, HOLD] = 1.0
        action = np.full(rows, HOLD, dtype=np.int64)
        value = np.zeros(rows, dtype=np.float32)
        if finite.any():
            with np.errstate(over="ignore"):
                obs = torch.from_numpy(np.asarray(self.scaler(state[finite, :-1])))
            distribution = self.policy.get_distribution(obs, action_masks=masks[finite])
            probabilities[finite] = distribution.distribution.probs.numpy()
            action[finite] = distribution.get_actions(deterministic=True).numpy()
            value[finite] = self.policy.predict_values(obs).numpy()[:, 0]
        return PolicyOutputs(action, probabilities, masks, value, np.logical_not(finite))

    @torch.no_grad()
    def uncertainty(self, state: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Ensemble disagreement [B] of the feature columns of state rows [B, S]; NaN in, NaN out."""
        features = np.ascontiguousarray(state[:, : len(self.dynamics.feature_names)])
        return np.asarray(self.market_model.disagreement(torch.from_numpy(features)).numpy())

    def nll(self, state: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """NLL [B], nats per feature, of each row's `following_rows` of state rows [B, S]; NaN in, NaN out."""
        current, following = map(torch.from_numpy, following_rows(state, len(self.dynamics.feature_names)))
        nll = next_row_nll(self.market_model, current, following).mean(dim=1)
        return np.asarray(nll.to(torch.float32).numpy())
