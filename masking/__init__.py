"""The safety kernel: action tables, rules over named state, rule sets and strict mask validation.

Pure functions against the array API; nothing here imports another package of the project. What needs torch
(`masking.strict_policy`) is imported by training code only.
"""

from masking.actions import HOLD, ActionTable
from masking.adapters import MaskAdapter
from masking.audit import ActionAudit
from masking.errors import InvalidActionError, InvalidMaskError, MaskingError, MissingMaskError, RuleError
from masking.joint import JointLimits, JointWalk, TradeTable
from masking.ladder import DrawdownLadder, LadderState, TradingState
from masking.parameters import check_parameters, parameter
from masking.projection import nearest_valid
from masking.row_rules import RowRules
from masking.rules import (
    RULES,
    TOLERANCE,
    DrawdownRule,
    Rule,
    State,
    is_exempt,
    is_reduction,
    register_rule,
    shared,
    trading_rules,
)
from masking.ruleset import Denial, RuleSet
from masking.validation import check_actions, refuse_broken_rows, valid_actions, validate_action_masks
from masking.values import masked_argmax, masked_max

__all__ = [
    "HOLD",
    "RULES",
    "TOLERANCE",
    "ActionAudit",
    "ActionTable",
    "Denial",
    "DrawdownLadder",
    "DrawdownRule",
    "InvalidActionError",
    "InvalidMaskError",
    "JointLimits",
    "JointWalk",
    "LadderState",
    "MaskAdapter",
    "MaskingError",
    "MissingMaskError",
    "RowRules",
    "Rule",
    "RuleError",
    "RuleSet",
    "State",
    "TradeTable",
    "TradingState",
    "check_actions",
    "check_parameters",
    "is_exempt",
    "is_reduction",
    "masked_argmax",
    "masked_max",
    "nearest_valid",
    "parameter",
    "refuse_broken_rows",
    "register_rule",
    "shared",
    "trading_rules",
    "valid_actions",
    "validate_action_masks",
]
