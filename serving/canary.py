"""A bundle on trial with real money: a service and an account of its own, little capital, and an end by itself."""

from __future__ import annotations

from dataclasses import dataclass

from serving.records import RiskState


@dataclass(frozen=True, kw_only=True)
class Canary:
    """How much a bundle on trial may move, and when its trial is over. Raises: ValueError naming the field."""

    capital_fraction: float
    """Largest position, as a share of the capital of all accounts together."""
    max_drawdown: float = 0.02
    """Drawdown of the canary's own equity at which the kill switch is pulled."""
    max_failures: int = 5
    """Decisions that may fail before the kill switch is pulled."""

    def __post_init__(self) -> None:
        for name in ("capital_fraction", "max_drawdown"):
            value = getattr(self, name)
            if not 0.0 < value < 1.0:
                raise ValueError(f"canary: {name}: expected more than 0 and less than 1, was {value:g}")
        if self.max_failures < 1:
            raise ValueError(f"canary: max_failures: expected at least 1, was {self.max_failures}")

    def max_position(self, equity: float, capital: float) -> float:
        """Largest |position|, multiples of the canary's equity. Args: both in money."""
        return self.capital_fraction * max(0.0, capital) / equity if equity > 0.0 else 0.0

    def verdict(self, risk: RiskState) -> str:
        """Why the trial is over, in words; empty while it is not."""
        if risk.drawdown >= self.max_drawdown:
            return f"drawdown {risk.drawdown:.2%} reached {self.max_drawdown:.2%}"
        if risk.failures >= self.max_failures:
            return f"{risk.failures} decisions failed, at most {self.max_failures - 1} may"
        return ""
