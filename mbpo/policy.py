"""A trained torch policy as a decision function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces
from safetensors.torch import load_file, save

from data import Scaler
from data.files import atomic_write_bytes
from envs import TradingDynamics
from masking.strict_policy import StrictMaskablePolicy


class TorchPolicy:
    """Greedy masked decisions of a policy network.

    Args: name for reports; network; scaler from state columns to observations.
    """

    def __init__(self, name: str, network: StrictMaskablePolicy, scaler: Scaler) -> None:
        self.name = name
        self.network = network
        self.scaler = scaler

    def act(self, state: np.ndarray, action_masks: np.ndarray) -> np.ndarray:
        """Most probable valid action.

        Args: state [B, S] float32; action_masks [B, A] bool.
        Returns: [B] int64.
        """
        obs = torch.as_tensor(np.asarray(self.scaler(state[:, :-1])))
        # Rollouts and updates toggle this mode themselves; nothing in the network depends on it between calls.
        self.network.set_training_mode(False)
        with torch.no_grad():
            distribution = self.network.get_distribution(obs, action_masks)
            return np.asarray(distribution.get_actions(deterministic=True).numpy(), dtype=np.int64)

    def values(self, state: torch.Tensor) -> torch.Tensor:
        """Discounted reward that the value network expects from states [B, S] float32 on: [B]; NaN where a state is."""
        self.network.set_training_mode(False)
        with torch.no_grad():
            values: torch.Tensor = self.network.predict_values(self.scaler(state[:, :-1]))
        return values.squeeze(1)

    def save(self, path: Path) -> None:
        """Write the weights as safetensors, atomically."""
        atomic_write_bytes(path, save(dict(self.network.state_dict())))

    @classmethod
    def load(
        cls, path: Path, name: str, dynamics: TradingDynamics, scaler: Scaler, net_arch: Sequence[int]
    ) -> TorchPolicy:
        """Rebuild a policy from weights written by `save`; the network is built here, nothing is unpickled."""
        network = StrictMaskablePolicy(
            spaces.Box(-1.0, 1.0, (len(dynamics.obs_names),), np.float32),
            spaces.Discrete(dynamics.num_actions),
            lr_schedule=lambda _: 0.0,
            net_arch=list(net_arch),
        )
        network.load_state_dict(load_file(path))
        return cls(name, network, scaler)
