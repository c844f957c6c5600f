"""What a bundle decides on a state row, and the rules once more, in NumPy: shared by decisions, shadows and replays."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from masking import HOLD
from masking.row_rules import left_by
from serving.bundle import Bundle
from serving.golden import PlannerOutputs, PolicyOutputs
from serving.manifest import UNCERTAINTY_COLUMN
from serving.records import DecisionRecord, Reason, Source

Row = npt.NDArray[np.float32]
"""One state row, [1, S]."""
Masks = npt.NDArray[np.bool_]
"""Of one row, [1, A]."""


class Proposal(NamedTuple):
    """What a graph wants to do; nothing of it is checked yet."""

    action: int
    value: float
    """Expected discounted reward."""
    probabilities: tuple[float, ...]
    """[A]; a planner is sure. Empty where a number of the answer is not finite."""
    fallback: bool
    """The graph could not decide; `action` is Hold."""


class Verdict(NamedTuple):
    """What the rules and the caller leave."""

    action_masks: tuple[bool, ...]
    """[A]; Hold always is valid."""
    blocked: dict[str, tuple[int, ...]]
    """Rule -> actions it forbids; rules that forbid none are left out."""

    def allows(self, action: int) -> bool:
        """Whether an action may be taken; no graph is trusted to give one that exists."""
        return 0 <= action < len(self.action_masks) and self.action_masks[action]


class Deciders:
    """A bundle, ready to decide on one row at a time."""

    def __init__(self, bundle: Bundle, *, planner: bool, seed: int) -> None:
        """Args: planner: use it where the bundle has one; seed: its noise table."""
        manifest = bundle.manifest
        self.bundle = bundle
        self.has_planner = planner and bundle.planner_session is not None
        self.feature_names = manifest.feature_names
        self.num_actions = bundle.rule_set.actions.num_actions
        self._seed = np.array([seed], dtype=np.int64)
        self._uncertainty = manifest.state_names.index(UNCERTAINTY_COLUMN)
        self._rule_columns, self._row_rules = tuple(bundle.rule_columns.items()), bundle.row_rules
        self._free = np.ones((1, self.num_actions), dtype=np.bool_)
        self._free.flags.writeable = False

    def fill_uncertainty(self, row: Row) -> float:
        """Write the disagreement of the ensemble into its column, and return it."""
        uncertainty = float(self.bundle.run_uncertainty(row[:, : len(self.feature_names)])[0])
        row[0, self._uncertainty] = uncertainty
        return uncertainty

    def by_policy(self, row: Row, callers: Masks | None) -> Proposal:
        """What the policy's graph wants on a row that is filled."""
        outputs = self.bundle.run_policy(row, self._free if callers is None else callers)
        return _proposal(outputs, tuple(outputs.probabilities[0].tolist()))

    def by_planner(self, row: Row, callers: Masks | None) -> Proposal:
        """What the planner's graph wants on a row that is filled."""
        outputs = self.bundle.run_planner(row, self._free if callers is None else callers, self._seed)
        action = int(outputs.action[0])
        return _proposal(outputs, tuple(float(one == action) for one in range(self.num_actions)))

    def judge(self, row: Row, callers: Masks | None, trading_state: int) -> Verdict:
        """The rules in NumPy and the caller's masks, under another trading state than the row's."""
        numbers = {name: row[0, index] for name, index in self._rule_columns}
        if "trading_state" in numbers:
            numbers["trading_state"] = np.float32(trading_state)
        blocked = self._row_rules.denied(numbers)
        masks = left_by(blocked, (self._free if callers is None else callers)[0].tolist())
        masks[HOLD] = True
        return Verdict(tuple(masks), blocked)


class Redecision(NamedTuple):
    """What a recorded decision comes to when it is made again."""

    proposed: int
    executed: int
    target_position: float | None
    action_masks: tuple[bool, ...]
    value: float | None
    probabilities: tuple[float, ...]


def redecide(bundle: Bundle, record: DecisionRecord) -> Redecision:
    """Make a recorded decision again, from its state row.

    Which of policy and planner decided, and whether there was time for it, is part of the record; all else is computed.
    Raises: ValueError for a record without a state row, or of another bundle.
    """
    if record.bundle_hash != bundle.hash:
        raise ValueError(f"bundle: expected {record.bundle_hash}, was {bundle.hash}")
    if not record.state:
        raise ValueError(f"record {record.event_id!r}: expected a state row, was none")
    row = np.frombuffer(record.state, dtype="<f4").astype(np.float32)[None, :]
    callers = None if record.caller_masks is None else np.array([record.caller_masks], dtype=np.bool_)
    deciders = Deciders(bundle, planner=True, seed=record.seed)
    verdict = deciders.judge(row, callers, record.trading_state)
    if not record.probabilities:
        return Redecision(HOLD, HOLD, target_position(bundle, HOLD, record.flatten), verdict.action_masks, None, ())
    decide = deciders.by_planner if record.source is Source.PLANNER else deciders.by_policy
    action, value, probabilities, _ = decide(row, callers)
    executed = action if record.reason is Reason.OK and verdict.allows(action) else HOLD
    target = target_position(bundle, executed, record.flatten)
    return Redecision(action, executed, target, verdict.action_masks, value, probabilities)


def rule_columns(bundle: Bundle, row: Row) -> dict[str, npt.NDArray[np.float32]]:
    """The columns that the rules read, each [1]."""
    return {name: row[:, index] for name, index in bundle.rule_columns.items()}


def target_position(bundle: Bundle, executed: int, flatten: bool) -> float | None:
    """Position to trade to, multiples of equity; None leaves it as it is."""
    if flatten:
        return 0.0
    return None if executed == HOLD else bundle.rule_set.actions.factors[executed - 1]


def only_hold(num_actions: int) -> tuple[bool, ...]:
    """Masks of length A that leave Hold alone."""
    return tuple(action == HOLD for action in range(num_actions))


def _proposal(outputs: PolicyOutputs | PlannerOutputs, probabilities: tuple[float, ...]) -> Proposal:
    value = float(outputs.value[0])
    if not all(map(math.isfinite, (value, *probabilities))):
        # Against the graph's contract, and JSON has no word for it: a record must come back as it was written.
        return Proposal(HOLD, 0.0, (), True)
    return Proposal(int(outputs.action[0]), value, probabilities, bool(outputs.fallback[0]))
