"""What an environment declares as known: exact functions that replace the learned heads.

Letters: B batch, D obs, K action dimensions, A mask width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

Reward = Callable[[Tensor, Tensor, Tensor], Tensor]
Terminated = Callable[[Tensor], Tensor]
Masks = Callable[[Tensor], Tensor]
Transition = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class KnownParts:
    """Pure batched functions of torch tensors; None is learned. Nothing declared: the environment is learned whole.

    obs and next_obs are float32 [B, D] in raw units, action int64 [B, K].
    """

    reward: Reward | None = None
    """`reward(obs, action, next_obs)` to float [B]."""
    terminated: Terminated | None = None
    """`terminated(next_obs)` to bool [B]."""
    action_masks: Masks | None = None
    """`action_masks(obs)` to bool [B, A], True = valid."""
    transition: Transition | None = None
    """`transition(obs, action, next_obs)` to next_obs [B, D] as it should be, such as an account step on imagined
    prices; the argument `next_obs` comes from the ensemble."""
    exact: tuple[int, ...] = ()
    """Columns that `transition` computes whatever the ensemble says: it is not fitted to them, and they have no support
    to leave."""
    exogenous: bool = False
    """Whether what is learned depends on neither the exact columns nor the action, like a market that does not react.
    A network that sees the account takes it for a clock, and is wrong once another policy grows it faster."""

    def __post_init__(self) -> None:
        if self.exact and self.transition is None:
            raise ValueError(f"exact: expected none without a declared transition, was {self.exact}")
        if self.exogenous and not self.exact:
            raise ValueError("exogenous: expected exact columns that do not matter for the others, was none")
        if len({*self.exact}) != len(self.exact) or any(column < 0 for column in self.exact):
            raise ValueError(f"exact: expected distinct columns from 0, was {self.exact}")

    def visible(self, num_obs: int, width: int) -> Tensor:
        """Which of the inputs [D + A], obs and one-hot action, the networks see: float32, 1 or 0."""
        seen = torch.ones(num_obs + width)
        if self.exogenous:
            seen[[*self.exact]] = 0.0
            seen[num_obs:] = 0.0
        return seen

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the declared parts, sorted; a saved model remembers them."""
        return tuple(sorted(part.name for part in fields(self) if part.name != "exact" and getattr(self, part.name)))
