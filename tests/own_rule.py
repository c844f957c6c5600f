"""The source of a rule of a user's own, as the README shows it."""

from __future__ import annotations

CALM_ENTRIES = """
from dataclasses import dataclass
from typing import ClassVar

from masking import is_reduction, register_rule


@register_rule("calm_entries")
@dataclass(frozen=True, kw_only=True)
class CalmEntries:
    fields: ClassVar[tuple[str, ...]] = ("volatility_5", "position")
    limit: float = 0.4

    def __call__(self, state):
        return (state["volatility_5"] < self.limit) | is_reduction(state)
"""
