"""Export: from trained policy and market model to a proven bundle.

Writes the format that `serving` defines and proves each bundle through serving's own reader before it appears under
its name. Names are loaded on first use, because they need torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from export.errors import ExportError, ParityError

if TYPE_CHECKING:
    from export.bundle_writer import BundleInfo, write_bundle
    from export.parity import ParityReport, check_parity
    from export.reference import Reference

_LAZY = {
    "BundleInfo": "export.bundle_writer",
    "ParityReport": "export.parity",
    "Reference": "export.reference",
    "check_parity": "export.parity",
    "write_bundle": "export.bundle_writer",
}

__all__ = [
    "BundleInfo",
    "ExportError",
    "ParityError",
    "ParityReport",
    "Reference",
    "check_parity",
    "write_bundle",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
