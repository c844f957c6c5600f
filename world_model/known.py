"""What an environment declares as known: exact functions that replace the learned heads.

Letters: B batch, D obs, K action dimensions, A mask width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

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
    """`transition(obs, action, next_obs)` to next_obs [B, D] with the columns `exact` replaced, such as an account step
    on imagined prices; the other columns of `next_obs` come from the ensemble."""
    exact: tuple[int, ...] = ()
    """Columns that `transition` computes; the ensemble is not fitted to them."""

    def __post_init__(self) -> None:
        if bool(self.exact) != (self.transition is not None):
            raise ValueError(
                f"exact: expected columns exactly where a transition is declared, was {self.exact} "
                f"with transition {'declared' if self.transition else 'None'}"
            )
        if len({*self.exact}) != len(self.exact) or any(column < 0 for column in self.exact):
            raise ValueError(f"exact: expected distinct columns from 0, was {self.exact}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the declared parts, sorted; a saved model remembers them."""
        return tuple(sorted(part.name for part in fields(self) if part.name != "exact" and getattr(self, part.name)))
