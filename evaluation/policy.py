"""What a backtest asks of a policy, and the baselines every trained policy is compared with.

Letters: B paths, A actions, S state columns.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from envs import TradingDynamics
from masking import nearest_valid, validate_action_masks


class Policy(Protocol):
    """Chooses one valid action per path."""

    @property
    def name(self) -> str:
        """Label in tables and figures."""
        ...

    def act(self, state: NDArray[np.float32], action_masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Choose actions.

        Args: state [B, S] raw units; action_masks [B, A], True = valid.
        Returns: [B] int64, each valid under its mask row.
        """
        ...


class Flat:
    """Stays out of the market: the zero that a policy must beat after costs."""

    name = "flat"

    def __init__(self, dynamics: TradingDynamics) -> None:
        self._actions = dynamics.rule_set.actions
        self._position = dynamics.state_names.index("position")

    def act(self, state: NDArray[np.float32], action_masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Hold, or the trade nearest to no position."""
        return nearest_valid(0.0, state[:, self._position], action_masks, self._actions)


class BuyAndHold:
    """Fully invested as soon as and whenever the masks allow it.

    The same limits bind it as any policy: it may take several bars to get in, and is flattened with the ladder.
    """

    name = "buy_and_hold"

    def __init__(self, dynamics: TradingDynamics) -> None:
        self._actions = dynamics.rule_set.actions
        self._position = dynamics.state_names.index("position")

    def act(self, state: NDArray[np.float32], action_masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Hold, or the trade nearest to the whole equity."""
        return nearest_valid(1.0, state[:, self._position], action_masks, self._actions)


class RandomValid:
    """Uniform over the valid actions of each row: what the masks alone are worth, and a fuzzer of them.

    The generator lives in the instance: build a new one with the same seed to repeat a run.
    """

    name = "random_valid"

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def act(self, state: NDArray[np.float32], action_masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Draw one valid action per row."""
        validate_action_masks(action_masks, num_actions=action_masks.shape[-1], batch=len(state))
        # Draws lie in [0, 1), so a forbidden action at -1 never wins.
        draws = np.where(action_masks, self._rng.random(action_masks.shape), -1.0)
        drawn: NDArray[np.int64] = np.argmax(draws, axis=1)
        return drawn
