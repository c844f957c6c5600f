"""Bars, features, scaling, splits and replay: everything between a market feed and the learners.

Names that need pandas or pyarrow are loaded on first use, so that serving, which needs only `Field`, `Scaler`
and the file helpers, starts without them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from data.errors import BarsError, DataError, HistoryError, ReplayError
from data.fields import Field, Group
from data.files import (
    TEMP_PREFIX,
    atomic_directory,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    canonical_json,
    sha256_bytes,
    sha256_file,
)
from data.scaler import Scaler
from data.splits import Split, check_split, walk_forward_splits
from data.transitions import ReplaySchema, Transitions

if TYPE_CHECKING:
    from data.bars import BarSource, BundledBars, FileBars, hash_bars, open_source, validate_bars
    from data.features import FEATURE_FIELDS, LOOKBACK, FeatureTable, compute_features, latest_features
    from data.replay import ReplayStore

_LAZY = {
    "BarSource": "data.bars",
    "BundledBars": "data.bars",
    "FEATURE_FIELDS": "data.features",
    "FeatureTable": "data.features",
    "FileBars": "data.bars",
    "LOOKBACK": "data.features",
    "ReplayStore": "data.replay",
    "compute_features": "data.features",
    "hash_bars": "data.bars",
    "latest_features": "data.features",
    "open_source": "data.bars",
    "validate_bars": "data.bars",
}

__all__ = [
    "FEATURE_FIELDS",
    "LOOKBACK",
    "TEMP_PREFIX",
    "BarSource",
    "BarsError",
    "BundledBars",
    "DataError",
    "FeatureTable",
    "Field",
    "FileBars",
    "Group",
    "HistoryError",
    "ReplayError",
    "ReplaySchema",
    "ReplayStore",
    "Scaler",
    "Split",
    "Transitions",
    "atomic_directory",
    "atomic_write_bytes",
    "atomic_write_json",
    "atomic_write_text",
    "canonical_json",
    "check_split",
    "compute_features",
    "hash_bars",
    "latest_features",
    "open_source",
    "sha256_bytes",
    "sha256_file",
    "validate_bars",
    "walk_forward_splits",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
