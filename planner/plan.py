"""What a search returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Best sequence of each row. Letters: N rows, A actions, K dimensions, H horizon; values are float64.

    Actions of one dimension are [N], sequences [N, H]; joint ones [N, K] and [N, H, K].
    """

    action: torch.Tensor
    """Best first action, int64 [N] or [N, K]."""
    value: torch.Tensor
    """Value of the best sequence by the objective, [N]; -inf in a fallback row."""
    sequence: torch.Tensor
    """Best sequence, int64 [N, H] or [N, H, K]; the safe action, or 0, from column `length` on."""
    length: torch.Tensor
    """Planned steps, int64 [N]: H, fewer where the best sequence terminates or time ran out, 0 in a fallback row."""
    action_values: torch.Tensor | None
    """Value of the best sequence found that begins with each action, [N, A]; -inf where masked, never finite or never
    tried; None for joint actions."""
    fallback: torch.Tensor
    """bool [N]: no sequence has a finite value; the action is the safe one, or the lowest valid one where none is."""
    non_finite: torch.Tensor
    """Valid sequences, or their common beginnings, that a NaN or infinite number made worth -inf, int64 [N]."""
    nodes: int
    """Imagined steps evaluated, all rows together, particles not counted."""
    complete: bool
    """Whether the whole horizon, or every iteration, was searched before the deadline."""
