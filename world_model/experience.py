"""Real transitions of an environment as arrays, checked once.

Letters: N rows, D obs, K action dimensions, A mask width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from masking import validate_action_masks


@dataclass(frozen=True, kw_only=True)
class Experience:
    """N transitions in the order they were seen.

    Raises: ValueError on shapes or dtypes; DataError on numbers that are not finite or actions out of range;
        masking.InvalidMaskError on masks.
    """

    obs: NDArray[np.float32]
    """[N, D]; never a terminal state."""
    action: NDArray[np.int64]
    """[N, K]; K = 1 for Discrete."""
    reward: NDArray[np.float32]
    """[N]."""
    next_obs: NDArray[np.float32]
    """[N, D], before any restart."""
    terminated: NDArray[np.bool_]
    """[N]; an episode that was cut is not terminated."""
    action_masks: NDArray[np.bool_]
    """[N, A], what the environment said at `obs`, flat."""
    episode: NDArray[np.int64]
    """[N], one number per episode."""
    num_actions: tuple[int, ...]
    """Actions of each of the K dimensions; A is their sum."""

    def __post_init__(self) -> None:
        rows, width = len(self.obs), sum(self.num_actions)
        if self.obs.ndim != 2 or not rows:
            raise ValueError(f"obs: expected [N >= 1, D], was {[*self.obs.shape]}")
        shapes = {
            "action": (rows, len(self.num_actions)),
            "reward": (rows,),
            "next_obs": self.obs.shape,
            "terminated": (rows,),
            "action_masks": (rows, width),
            "episode": (rows,),
        }
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name}: expected {[*shape]}, was {[*getattr(self, name).shape]}")
        for name, kind in {"action": np.integer, "terminated": np.bool_, "episode": np.integer}.items():
            if not np.issubdtype(getattr(self, name).dtype, kind):
                raise ValueError(f"{name}: expected {kind.__name__}, was {getattr(self, name).dtype}")
        for name in ("obs", "reward", "next_obs"):
            finite = np.isfinite(getattr(self, name))
            if not finite.all():
                where = tuple(np.argwhere(~finite)[0].tolist())
                raise DataError(f"{name}: expected finite numbers, was {getattr(self, name)[where]} at {[*where]}")
        wrong = (self.action < 0) | (self.action >= np.array(self.num_actions))
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise DataError(
                f"action: expected 0..{self.num_actions[column] - 1}, was {self.action[row, column]} in row {row}"
            )
        sizes = self.num_actions[0] if len(self.num_actions) == 1 else self.num_actions
        validate_action_masks(self.action_masks, num_actions=sizes, batch=rows, safe_action=None)

    def __len__(self) -> int:
        return len(self.obs)
