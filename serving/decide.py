"""One decision: NumPy in, NumPy out, with the rules applied once more after the graph.

Letters: B batch, S state columns, A actions.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from masking import HOLD, valid_actions
from masking.row_rules import left_by
from serving.bundle import Bundle
from serving.errors import BundleMismatchError, DecisionInputError
from serving.golden import PolicyOutputs


@dataclass(frozen=True, slots=True)
class Decision:
    """One row of `Decisions` as plain Python values."""

    action: int
    probabilities: tuple[float, ...]
    action_masks: tuple[bool, ...]
    value: float
    fallback: bool
    overridden: bool
    planned: bool


@dataclass(frozen=True, slots=True, eq=False)
class Decisions:
    """Decisions of a batch; arrays."""

    actions: npt.NDArray[np.int64]
    """[B]."""
    probabilities: npt.NDArray[np.float32]
    """[B, A], exactly 0 where masked."""
    action_masks: npt.NDArray[np.bool_]
    """[B, A], rules (recomputed in NumPy) and caller masks combined; Hold alone where nothing is left."""
    value: npt.NDArray[np.float32]
    """[B], expected discounted reward; 0 where there is no finite estimate."""
    fallback: npt.NDArray[np.bool_]
    """[B], True where the graph could not decide: state or network not finite, or no action left. Hold then."""
    overridden: npt.NDArray[np.bool_]
    """[B], True where a graph's action failed the last check: the policy's was replaced by Hold, a planned one by the
    policy's."""
    planned: npt.NDArray[np.bool_]
    """[B], True where the planner decided; its action has probability 1 then, and `value` is that of the plan."""

    def __len__(self) -> int:
        return len(self.actions)

    def row(self, index: int = 0) -> Decision:
        """One decision as plain Python values, ready for a log."""
        return Decision(
            int(self.actions[index]),
            tuple(self.probabilities[index].tolist()),
            tuple(self.action_masks[index].tolist()),
            float(self.value[index]),
            bool(self.fallback[index]),
            bool(self.overridden[index]),
            bool(self.planned[index]),
        )


class OnnxPolicy:
    """The exported policy behind the last check before an order.

    Deterministic: equal bundle and equal input give an equal decision. Safe to call from several threads.
    It also fits the evaluation protocol (`name`, `act`), so a backtest runs on exactly what will be served.
    """

    def __init__(self, bundle: Bundle, name: str = "onnx") -> None:
        self.bundle = bundle
        self.name = name
        self.overridden_total = 0
        """Overridden rows since construction; anything but 0 needs a person."""
        self._lock = threading.Lock()
        self._rules = bundle.rule_set
        self._rule_columns, self._row_rules = tuple(bundle.rule_columns.items()), bundle.row_rules
        self._num_columns = len(bundle.manifest.state_names)
        self._num_features = len(bundle.manifest.feature_fields)
        self._num_actions = bundle.rule_set.actions.num_actions
        self._free = np.ones((1, self._num_actions), dtype=np.bool_)
        self._free.flags.writeable = False

    def decide(self, state: npt.NDArray[np.float32], caller_masks: npt.NDArray[np.bool_] | None = None) -> Decisions:
        """Choose actions.

        Args:
            state: float32 [B, S], or [S] for a batch of one; raw units, columns as in `manifest.state_names`.
                NaN and infinity are allowed and lead to Hold with `fallback`.
            caller_masks: bool [B, A] or [A]; AND-ed with the rules, None forbids nothing. Forbidding every valid
                action, Hold included, leads to Hold with `fallback`.

        Raises: DecisionInputError on type, dtype or shape.
        """
        rows = self._checked_state(state)
        callers = self._checked_masks(caller_masks, len(rows))
        outputs = self.bundle.run_policy(rows, callers)
        nothing = np.zeros(len(rows), dtype=np.bool_)
        return self._last_check(self._masks(rows, callers), outputs, nothing, nothing)

    # Rules in NumPy and caller's masks combined, Hold where nothing is left.
    def _masks(self, rows: npt.NDArray[np.float32], callers: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        if len(rows) == 1:
            return self._row_masks(rows[0], callers[0])
        masks: npt.NDArray[np.bool_] = self._rules({name: rows[:, index] for name, index in self._rule_columns})
        masks &= callers
        masks[:, HOLD] |= ~masks.any(axis=1)
        return masks

    def _row_masks(self, row: npt.NDArray[np.float32], asked: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        denied = self._row_rules.denied({name: row[index] for name, index in self._rule_columns})
        masks = left_by(denied, asked.tolist())
        masks[HOLD] |= not any(masks)
        return np.array([masks])

    # Args: planned: rows that the planner decided; refused: rows whose plan was refused, which count as overridden.
    def _last_check(
        self,
        masks: npt.NDArray[np.bool_],
        outputs: PolicyOutputs,
        planned: npt.NDArray[np.bool_],
        refused: npt.NDArray[np.bool_],
    ) -> Decisions:
        actions, probabilities = outputs.action, outputs.probabilities
        forbidden = ~masks[np.arange(len(masks)), actions] & ~((actions == HOLD) & outputs.fallback)
        if forbidden.any():
            actions[forbidden] = HOLD
            probabilities[forbidden] = 0.0
            probabilities[forbidden, HOLD] = 1.0
        overridden = forbidden | refused
        if overridden.any():
            with self._lock:
                self.overridden_total += int(overridden.sum())
        return Decisions(actions, probabilities, masks, outputs.value, outputs.fallback, overridden, planned)

    def act(self, state: npt.NDArray[np.float32], action_masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Actions [B] for states [B, S] under the environment's masks [B, A]."""
        return self.decide(state, action_masks).actions

    def uncertainty(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """`model_uncertainty` [B] for features [B, M] or [M], raw units; NaN in, NaN out.

        Raises: DecisionInputError on type, dtype or shape.
        """
        return self.bundle.run_uncertainty(self._checked(features, "features", self._num_features, np.float32))

    def _checked_state(self, state: Any) -> npt.NDArray[np.float32]:
        return self._checked(state, "state", self._num_columns, np.float32)

    def _checked_masks(self, caller_masks: Any, batch: int) -> npt.NDArray[np.bool_]:
        if caller_masks is None:
            return self._free if batch == 1 else np.ones((batch, self._num_actions), dtype=np.bool_)
        masks = self._checked(caller_masks, "caller_masks", self._num_actions, np.bool_)
        if len(masks) != batch:
            raise DecisionInputError(
                f"caller_masks: expected bool [{batch}, {self._num_actions}], was {list(masks.shape)}"
            )
        return masks

    @staticmethod
    def _checked(array: Any, name: str, width: int, dtype: type[Any]) -> npt.NDArray[Any]:
        if not isinstance(array, np.ndarray) or array.dtype != dtype:
            kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise DecisionInputError(f"{name}: expected a NumPy array of {np.dtype(dtype)}, was {kind}")
        if array.ndim not in (1, 2) or array.shape[-1] != width or array.size == 0:
            raise DecisionInputError(f"{name}: expected [B >= 1, {width}] or [{width}], was {list(array.shape)}")
        return np.ascontiguousarray(array if array.ndim == 2 else array[None, :])


class OnnxPlanner(OnnxPolicy):
    """The exported planner behind the same last check.

    Where it has no plan, or its action fails the check, the policy decides, and then Hold.
    """

    def __init__(self, bundle: Bundle, name: str = "onnx_planner", *, seed: int = 0) -> None:
        """Open for decisions.

        Args: seed: picks the noise table of every decision.
        Raises: BundleMismatchError where the bundle has no planner.
        """
        super().__init__(bundle, name)
        if bundle.planner_session is None:
            raise BundleMismatchError(f"{bundle.path}: expected a bundle with a planner, was one without")
        self.seed = seed

    def decide(self, state: npt.NDArray[np.float32], caller_masks: npt.NDArray[np.bool_] | None = None) -> Decisions:
        """Choose the first actions of plans; arguments and errors as `OnnxPolicy.decide`."""
        rows = self._checked_state(state)
        callers = self._checked_masks(caller_masks, len(rows))
        masks = self._masks(rows, callers)
        plans = self.bundle.run_planner(rows, callers, np.full(len(rows), self.seed, dtype=np.int64))
        valid = valid_actions(plans.action, masks)
        planned = valid & ~plans.fallback
        refused = ~valid & ~plans.fallback
        sure = np.zeros((len(rows), self._num_actions), dtype=np.float32)
        sure[planned, plans.action[planned]] = 1.0
        chosen = PolicyOutputs(plans.action, sure, plans.action_masks, plans.value, plans.fallback)
        if not planned.all():
            policy = self.bundle.run_policy(rows[~planned], callers[~planned])
            parts: tuple[npt.NDArray[Any], ...] = chosen
            for ours, theirs in zip(parts, policy, strict=True):
                ours[~planned] = theirs
        return self._last_check(masks, chosen, planned, refused)
