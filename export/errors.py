"""Errors of the export package.

::

    ValueError
    └── ExportError        something that cannot be exported as it is
        └── ParityError    the written files do not decide as the trained policy does
"""

from __future__ import annotations


class ExportError(ValueError):
    """Something cannot be exported as it is."""


class ParityError(ExportError):
    """The written files do not decide as the trained policy does."""
