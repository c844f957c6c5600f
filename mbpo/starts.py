"""Where imagined branches start: states that were really visited."""

from __future__ import annotations

from typing import Any

import numpy as np


class StartBuffer:
    """States of the replay store, which stay, and a ring of states visited since.

    Args: rows [N] feature row of each replayed state; states [N, S], none terminal; capacity of the ring. With a
        capacity of N, half of the starts come from either once the ring is full.
    """

    def __init__(self, rows: np.ndarray, states: np.ndarray, *, capacity: int) -> None:
        if len(rows) < 1 or len(rows) != len(states) or capacity < 1:
            raise ValueError(
                f"start buffer: expected N >= 1 rows and states and capacity >= 1, "
                f"was {len(rows)}, {len(states)} and {capacity}"
            )
        self._replayed, self._capacity = len(rows), capacity
        self.rows = np.concatenate((rows, np.zeros(capacity, dtype=np.int64)))
        self.states = np.concatenate((states, np.zeros((capacity, states.shape[1]), np.float32)))
        self._next = 0
        self._recent = 0

    def __len__(self) -> int:
        return self._replayed + self._recent

    def add(self, rows: np.ndarray, states: np.ndarray) -> None:
        """Store states [N, S] visited at feature rows [N]; the oldest of the ring are overwritten."""
        rows, states = rows[-self._capacity :], states[-self._capacity :]
        where = self._replayed + (self._next + np.arange(len(rows))) % self._capacity
        self.rows[where] = rows
        self.states[where] = states
        self._next = int((self._next + len(rows)) % self._capacity)
        self._recent = min(self._recent + len(rows), self._capacity)

    def sample(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw rows [count] and states [count, S] uniformly with replacement."""
        index = rng.integers(0, len(self), count)
        return self.rows[index], self.states[index]

    def state_dict(self) -> dict[str, Any]:
        """The ring; what was replayed belongs to whoever builds the buffer."""
        ring = slice(self._replayed, len(self))
        return {"next": self._next, "rows": self.rows[ring].copy(), "states": self.states[ring].copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave, in a buffer built from the same replayed states."""
        self._next, self._recent = state["next"], len(state["rows"])
        self.rows[self._replayed : len(self)] = state["rows"]
        self.states[self._replayed : len(self)] = state["states"]
