"""A number that moves in a straight line while training goes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ramp:
    """From `first` until `begin` on a line to `last` at `end`: MBPO's schedule of H (arXiv:1906.08253, appendix C).

    Args: first, last: its ends; begin, end: real steps, or shares of training, 0 <= begin < end.
    """

    first: float
    last: float
    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.begin < self.end:
            raise ValueError(f"ramp: expected 0 <= begin < end, was {self.begin} and {self.end}")

    def __call__(self, done: float) -> float:
        """The number when `done` steps, or that share of training, are over."""
        share = min(max((done - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.first + share * (self.last - self.first)
