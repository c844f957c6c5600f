"""How long imagined branches are while training goes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RolloutLength:
    """MBPO's thresholded linear schedule (arXiv:1906.08253, appendix C), over the share of training that is done.

    `min(max(x + (t - a) / (b - a) * (y - x), x), y)`, rounded down. There t counts epochs; here a and b are shares of
    all environment steps, so that a longer training stretches the ramp.

    Args: initial (x) and final (y) bars; begin (a) and end (b) of the ramp, 0 <= a < b <= 1.
    """

    initial: int
    final: int
    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.initial <= self.final:
            raise ValueError(f"rollout length: expected 1 <= initial <= final, was {self.initial} and {self.final}")
        if not 0.0 <= self.begin < self.end <= 1.0:
            raise ValueError(f"rollout length: expected 0 <= begin < end <= 1, was {self.begin} and {self.end}")

    def __call__(self, done: float) -> int:
        """H when a share `done` of training is over."""
        ramp = self.initial + (done - self.begin) / (self.end - self.begin) * (self.final - self.initial)
        return int(min(max(ramp, self.initial), self.final))
