"""Errors of the mask kernel.

::

    MaskingError (ValueError)
    ├── InvalidActionError    an action that its mask forbids, or that is none
    ├── InvalidMaskError      an action mask with the wrong dtype, shape or content
    ├── MissingMaskError      a policy was asked for an action without a mask
    └── RuleError             a rule or rule set that cannot be built or evaluated
"""

from __future__ import annotations


class MaskingError(ValueError):
    """Base of all errors raised by `masking`."""


class InvalidActionError(MaskingError):
    """An action that its mask forbids, or that names no action, was about to be executed."""


class InvalidMaskError(MaskingError):
    """An action mask has the wrong dtype, shape or content."""


class MissingMaskError(MaskingError):
    """A policy was asked for an action without an action mask."""


class RuleError(MaskingError):
    """A rule or rule set cannot be built or evaluated."""
