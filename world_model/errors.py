"""Errors of the world model.

```
Exception
└── WorldModelError
    ├── TrainingError    (RuntimeError)  a fit diverged; nothing outside the fit was changed
    ├── MaskBoundError   (ValueError)    a learned mask misses its false-valid target (in `mask_bound`)
    └── ModelFileError   (ValueError)    a saved model is missing, damaged, or made for other features
```

Bad input data (NaN, too few rows) is `data.errors.DataError`; a wrong shape or dtype is a plain `ValueError`.
"""

from __future__ import annotations


class WorldModelError(Exception):
    """Base of all errors of this package."""


class TrainingError(WorldModelError, RuntimeError):
    """A fit diverged. `epoch` counts from 1, `members` are the networks whose loss is not finite."""

    def __init__(self, message: str, *, epoch: int, members: tuple[int, ...]) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.members = members


class ModelFileError(WorldModelError, ValueError):
    """A saved model cannot be used as it lies on disk."""
