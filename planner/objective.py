"""What a sequence of actions is worth, given what it earns in each particle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from planner.protocol import Transition


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Discounted rewards minus a charge for uncertainty, plus the value after the last step, over P particles.

    Each particle earns `sum_t discount^t * (reward_t - uncertainty_penalty * uncertainty_t) + discount^H * value`
    (MOPO, arXiv:2005.13239, eq. 4, with a terminal value). A sequence is worth the mean of the worst `tail` of them: 1
    is the plain mean, less is conditional value at risk (Rockafellar and Uryasev 2000, doi:10.21314/JOR.2000.038) of
    the worst `ceil(tail * P)` particles with equal weights.
    """

    discount: float = 0.99
    uncertainty_penalty: float = 0.0
    """Charged per unit of uncertainty and step."""
    tail: float = 1.0
    """Share of the particles that count, worst first."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.discount <= 1.0:
            raise ValueError(f"discount: expected a number in [0, 1], was {self.discount}")
        if not 0.0 <= self.uncertainty_penalty < math.inf:
            raise ValueError(f"uncertainty_penalty: expected a finite number >= 0, was {self.uncertainty_penalty}")
        if not 0.0 < self.tail <= 1.0:
            raise ValueError(f"tail: expected a share in (0, 1], was {self.tail}")

    def earned(self, step: Transition[Any]) -> torch.Tensor:
        """Reward less the charge, float64 [N, P]; sums of float32 numbers of like size are exact there."""
        reward = step.reward.to(torch.float64)
        if self.uncertainty_penalty == 0.0:
            return reward
        return reward - self.uncertainty_penalty * step.uncertainty.to(torch.float64)

    def score(self, totals: torch.Tensor) -> torch.Tensor:
        """Worth of sequences from what each particle earned: [N, P] to [N]."""
        particles = totals.shape[1]
        worst = max(1, math.ceil(self.tail * particles - 1e-9))
        if worst >= particles:
            return totals.mean(dim=1)
        return torch.topk(totals, worst, dim=1, largest=False).values.mean(dim=1)
