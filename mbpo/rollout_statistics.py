"""What happened on real and imagined rows, summed."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass
class RolloutStatistics:
    """Sums over steps of all rows; add two to join them."""

    real_steps: int = 0
    real_reward: float = 0.0
    real_terminations: int = 0
    model_error: float = 0.0
    """Of the world model at the real rows visited, see `mbpo.prediction_error`."""
    imagined_steps: int = 0
    raw_reward: float = 0.0
    """Imagined, before the penalty."""
    absolute_reward: float = 0.0
    """Sum of the sizes of the raw rewards."""
    penalised_reward: float = 0.0
    uncertainty: float = 0.0
    imagined_terminations: int = 0
    out_of_range: int = 0
    """Imagined steps that ended a branch because the draw lay outside the support of the data."""

    def __add__(self, other: RolloutStatistics) -> RolloutStatistics:
        return RolloutStatistics(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def means(self) -> dict[str, float]:
        """Per-step means, for logging. `penalty_share` is the mean penalty over the mean size of a raw reward."""
        real, imagined = max(self.real_steps, 1), max(self.imagined_steps, 1)
        penalty = self.raw_reward - self.penalised_reward
        return {
            "real_reward": self.real_reward / real,
            "real_termination_rate": self.real_terminations / real,
            "imagined_raw_reward": self.raw_reward / imagined,
            "imagined_penalised_reward": self.penalised_reward / imagined,
            "penalty_share": penalty / self.absolute_reward if self.absolute_reward else 0.0,
            "imagined_uncertainty": self.uncertainty / imagined,
            "imagined_termination_rate": self.imagined_terminations / imagined,
            "imagined_truncation_rate": self.out_of_range / imagined,
        }
