"""Serving: the bundle format, its verified reader, and decisions with a last check before the order.

Needs NumPy, pydantic and onnxruntime (loaded on the first bundle), never torch. `export` writes bundles in the format
defined here and proves them through the reader defined here.
"""

from serving.bundle import Bundle, open_bundle
from serving.decide import Decision, Decisions, OnnxPlanner, OnnxPolicy
from serving.errors import (
    BundleError,
    BundleFormatError,
    BundleIntegrityError,
    BundleMismatchError,
    DecisionInputError,
    GoldenMismatchError,
    ServingError,
)
from serving.golden import Golden, PlannerOutputs, PolicyOutputs
from serving.manifest import FORMAT_VERSION, Manifest, Provenance

__all__ = [
    "FORMAT_VERSION",
    "Bundle",
    "BundleError",
    "BundleFormatError",
    "BundleIntegrityError",
    "BundleMismatchError",
    "Decision",
    "DecisionInputError",
    "Decisions",
    "Golden",
    "GoldenMismatchError",
    "Manifest",
    "OnnxPlanner",
    "OnnxPolicy",
    "PlannerOutputs",
    "PolicyOutputs",
    "Provenance",
    "ServingError",
    "open_bundle",
]
