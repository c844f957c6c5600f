"""Errors of the data package.

::

    ValueError
    └── DataError              bad input data; the command line exits with 65
        ├── BarsError          bars that are missing, unreadable or inconsistent
        ├── HistoryError       history too short for a feature window or a walk-forward split
        └── ReplayError        transitions or replay files that break their schema

Every message names the field, what was expected and what was found. Mistakes of the calling code (a wrong
shape or dtype where no data was read) are plain ``ValueError``.
"""


class DataError(ValueError):
    """Input data cannot be used."""


class BarsError(DataError):
    """Bars are missing, unreadable or inconsistent."""


class HistoryError(DataError):
    """History is too short for what was asked."""


class ReplayError(DataError):
    """Transitions or replay files break their schema."""
