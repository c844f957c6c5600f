"""The best weights of each member, kept separately."""

from __future__ import annotations

import torch
from torch import Tensor

from world_model.networks import EnsembleMLP


class MemberSnapshots:
    """Remembers, for every member on its own, the weights with the lowest score so far.

    mbrl-lib snapshots all members when one improves, which hands a member weights from an epoch at which it had
    already begun to overfit; here a member's snapshot moves only when that member improves.
    """

    def __init__(self, network: EnsembleMLP) -> None:
        self._network = network
        self._best = [parameter.detach().clone() for parameter in network.parameters()]
        self.scores = torch.full((network.num_members,), torch.inf)
        self.epochs = [0] * network.num_members

    @torch.no_grad()
    def update(self, epoch: int, scores: Tensor) -> bool:
        """Keep the current weights of the members whose score [E] fell; return whether any did.

        Raises: ValueError on a wrong shape or a NaN score.
        """
        if scores.shape != self.scores.shape or torch.isnan(scores).any():
            raise ValueError(f"scores: expected {len(self.epochs)} numbers, was {scores.tolist()}")
        improved = torch.nonzero(scores < self.scores).squeeze(1).tolist()
        for member in improved:
            self.scores[member] = scores[member]
            self.epochs[member] = epoch
            for best, parameter in zip(self._best, self._network.parameters(), strict=True):
                best[member] = parameter[member]
        return bool(improved)

    @torch.no_grad()
    def restore(self) -> None:
        """Put every member's best weights back into the network."""
        for best, parameter in zip(self._best, self._network.parameters(), strict=True):
            parameter.copy_(best)
