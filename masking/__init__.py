"""The safety kernel: action tables, rules over named state, rule sets and strict mask validation.

Pure functions against the array API; nothing here imports another package of the project. What needs torch
(`masking.strict_policy`) is imported by training code only.
"""

from masking.actions import HOLD, ActionTable
from masking.errors import InvalidMaskError, MaskingError, MissingMaskError, RuleError
from masking.ladder import DrawdownLadder, LadderState, TradingState
from masking.rules import RULES, TOLERANCE, DrawdownRule, Rule, State, is_reduction, register_rule, trading_rules
from masking.ruleset import Denial, RuleSet
from masking.validation import validate_action_masks

__all__ = [
    "HOLD",
    "RULES",
    "TOLERANCE",
    "ActionTable",
    "Denial",
    "DrawdownLadder",
    "DrawdownRule",
    "InvalidMaskError",
    "LadderState",
    "MaskingError",
    "MissingMaskError",
    "Rule",
    "RuleError",
    "RuleSet",
    "State",
    "TradingState",
    "is_reduction",
    "register_rule",
    "trading_rules",
    "validate_action_masks",
]
