"""Errors of the serving package.

::

    ValueError
    └── ServingError
        ├── BundleError                  a bundle cannot be used; nothing of it was put to use
        │   ├── BundleIntegrityError     a file is missing, foreign, or not the bytes the manifest names
        │   ├── BundleFormatError        a file is intact but not what this version reads
        │   ├── BundleMismatchError      files are readable but do not belong together
        │   └── GoldenMismatchError      this machine does not reproduce the golden decisions
        ├── DecisionInputError           a state or mask has the wrong type, dtype or shape
        ├── LedgerError                  a ledger cannot be opened, read or written
        ├── StreamError                  a decision stream is not a copy of its ledger
        └── ControlError                 a command lacks a person or a reason, or cannot be obeyed now
"""

from __future__ import annotations


class ServingError(ValueError):
    """Base of all errors raised by `serving`."""


class BundleError(ServingError):
    """A bundle cannot be used."""


class BundleIntegrityError(BundleError):
    """A file is missing, foreign, or not the bytes the manifest names."""


class BundleFormatError(BundleError):
    """A file is intact but not what this version reads."""


class BundleMismatchError(BundleError):
    """The files of a bundle are readable but do not belong together."""


class GoldenMismatchError(BundleError):
    """The golden inputs do not lead to the golden decisions on this machine."""


class DecisionInputError(ServingError):
    """A state or mask has the wrong type, dtype or shape."""


class LedgerError(ServingError):
    """A ledger cannot be opened, read or written."""


class StreamError(ServingError):
    """A decision stream is not a copy of its ledger."""


class ControlError(ServingError):
    """A command lacks a person or a reason, or cannot be obeyed now."""
