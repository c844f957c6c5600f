"""The bundle manifest: what a bundle holds, where it comes from, and the hash that names it.

The format belongs to the reader. `export` writes manifests through this module, serving refuses any other form.
A manifest holds no time and no path: equal inputs give equal bytes.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    ConfigDict,
    StrictBool,
    StrictInt,
    StrictStr,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic import Field as Bounds

from data import DataError, Field, canonical_json, sha256_bytes
from serving.drift.reference import DRIFT_FILE
from serving.errors import BundleFormatError, BundleIntegrityError

FORMAT_VERSION = 3
MANIFEST_FILE = "manifest.json"
POLICY_FILE = "policy.onnx"
MASK_FILE = "mask.onnx"
UNCERTAINTY_FILE = "uncertainty.onnx"
PLANNER_FILE = "planner.onnx"
LIKELIHOOD_FILE = "likelihood.onnx"
RULES_FILE = "rules.json"
SCALER_FILE = "scaler.json"
GOLDEN_FILE = "golden.json"
BUNDLE_FILES = (GOLDEN_FILE, MASK_FILE, POLICY_FILE, RULES_FILE, SCALER_FILE, UNCERTAINTY_FILE)
"""Files beside the manifest that every bundle has; one with a planner has `PLANNER_FILE` as well, one whose drift can
be watched `DRIFT_FILES`."""
DRIFT_FILES = (DRIFT_FILE, LIKELIHOOD_FILE)

AGE_COLUMN = "data_age"
"""Last column of the state row: masks see it, the observation does not."""
UNCERTAINTY_COLUMN = "model_uncertainty"
"""State column that the caller fills with the output of the uncertainty graph."""

METADATA_PREFIX = "detent."
"""Prefix of the metadata keys inside the ONNX files."""

Digest = Annotated[str, StringConstraints(strict=True, pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(strict=True, min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FileEntry(_Part):
    """Size and hash of one file."""

    sha256: Digest
    size: Annotated[StrictInt, Bounds(ge=0)]


class Actions(_Part):
    """The action table."""

    factors: Annotated[tuple[float, ...], Bounds(min_length=1)]
    names: Annotated[tuple[Name, ...], Bounds(min_length=2)]


class PlannerEntry(_Part):
    """What a caller must know of the planner graph."""

    horizon: Annotated[StrictInt, Bounds(ge=1)]
    """H: bars planned ahead."""
    noise_tables: Annotated[StrictInt, Bounds(ge=1)]
    """Tables that `seed` picks from, modulo their number; the graph's metadata must say the same."""


class Provenance(_Part):
    """What a bundle was made from."""

    data_hash: Name
    config_hash: Name
    git_commit: Name
    seeds: dict[Name, StrictInt]
    versions: dict[Name, StrictStr]
    """Library versions at export."""


class Manifest(_Part):
    """Everything a reader must know before it opens another file."""

    format_version: StrictInt
    state_names: Annotated[tuple[Name, ...], Bounds(min_length=2)]
    """Names of the S columns of a raw state row."""
    feature_fields: Annotated[tuple[dict[str, Any], ...], Bounds(min_length=1)]
    """`data.Field` descriptions of the first M state columns."""
    actions: Actions
    rule_set_hash: Digest
    limits: dict[Name, dict[str, Any]]
    """Rule name -> its parameters."""
    planner: PlannerEntry | None
    """None where the bundle has no planner."""
    drift: StrictBool
    """Whether it says what training saw and how well the next bar was foreseen."""
    provenance: Provenance
    files: dict[Name, FileEntry]
    bundle_hash: Digest
    """SHA-256 over the canonical JSON of all other entries; it names the bundle."""

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the first M state columns."""
        return tuple(str(field["name"]) for field in self.feature_fields)

    @property
    def layout_hash(self) -> str:
        """SHA-256 of the column and action layout; every ONNX file carries it."""
        return layout_hash(self.state_names, self.feature_names, self.actions.factors)

    @classmethod
    def create(cls, **entries: Any) -> Self:
        """Build a manifest of the current format and compute its hash."""
        raw = {"format_version": FORMAT_VERSION, "bundle_hash": "0" * 64, **entries}
        draft = cls._validated(raw).model_dump(mode="json")
        draft["bundle_hash"] = _hash_of(draft)
        return cls._validated(draft)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parse the manifest file.

        Raises: BundleFormatError for another format version or an entry that is not as declared;
            BundleIntegrityError if a single byte differs from what `to_bytes` writes for the named hash.
        """
        try:
            raw = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise BundleIntegrityError(f"{MANIFEST_FILE}: expected UTF-8 JSON: {error}") from error
        if not isinstance(raw, dict):
            raise BundleIntegrityError(f"{MANIFEST_FILE}: expected a JSON object, was {type(raw).__name__}")
        try:
            intact = raw.get("bundle_hash") == _hash_of(raw) and _render(raw) == data
        except ValueError as error:
            raise BundleIntegrityError(f"{MANIFEST_FILE}: expected finite numbers and text: {error}") from error
        if not intact:
            raise BundleIntegrityError(f"{MANIFEST_FILE}: expected the content its bundle_hash names, was another")
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise BundleFormatError(f"{MANIFEST_FILE}: format_version: expected {FORMAT_VERSION}, was {version!r}")
        return cls._validated(raw)

    def to_bytes(self) -> bytes:
        """Return the one text of this manifest: indented JSON, sorted keys, UTF-8."""
        return _render(self.model_dump(mode="json"))

    @classmethod
    def _validated(cls, raw: dict[str, Any]) -> Self:
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}." for part in first["loc"])[:-1]
            raise BundleFormatError(
                f"{MANIFEST_FILE}: {where + ': ' if where else ''}{first['msg']}, was {str(first['input'])[:200]}"
            ) from error

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        planner, drift = () if self.planner is None else (PLANNER_FILE,), DRIFT_FILES if self.drift else ()
        wanted = sorted((*BUNDLE_FILES, *planner, *drift))
        if sorted(self.files) != wanted:
            raise ValueError(f"files: expected {wanted}, was {sorted(self.files)}")
        if len(set(self.state_names)) != len(self.state_names):
            raise ValueError(f"state_names: expected each name once, was {list(self.state_names)}")
        try:
            fields = tuple(Field.from_dict(raw) for raw in self.feature_fields)
        except DataError as error:
            raise ValueError(f"feature_fields: {error}") from error
        names = tuple(field.name for field in fields)
        if self.state_names[: len(names)] != names:
            raise ValueError(f"state_names: expected to start with {list(names)}, was {list(self.state_names)}")
        if self.state_names[-1] != AGE_COLUMN or UNCERTAINTY_COLUMN not in self.state_names:
            raise ValueError(
                f"state_names: expected {UNCERTAINTY_COLUMN!r} and, last, {AGE_COLUMN!r}, was {list(self.state_names)}"
            )
        return self


def layout_hash(state_names: tuple[str, ...], feature_names: tuple[str, ...], factors: tuple[float, ...]) -> str:
    """Return the SHA-256 of what the columns and actions of a graph mean."""
    layout = {"state": list(state_names), "features": list(feature_names), "factors": [*map(float, factors)]}
    return sha256_bytes(canonical_json(layout).encode("utf-8"))


def graph_metadata(
    role: str,
    *,
    layout: str,
    rule_set_hash: str,
    scaler: npt.NDArray[np.float32],
    noise_tables: int | None = None,
) -> dict[str, str]:
    """Metadata that ties an ONNX file to its bundle, so that swapped or foreign graphs are recognised.

    Args: role: file name in the bundle; layout: `layout_hash`; scaler: [2, D] centre and scale; noise_tables: of a
        planner, None for other graphs.
    """
    entries = {
        "format_version": str(FORMAT_VERSION),
        "role": role,
        "layout_hash": layout,
        "rule_set_hash": rule_set_hash,
        "scaler_hash": sha256_bytes(np.ascontiguousarray(scaler, dtype="<f4").tobytes()),
    }
    if noise_tables is not None:
        entries["noise_tables"] = str(noise_tables)
    return {METADATA_PREFIX + key: value for key, value in entries.items()}


def _hash_of(raw: dict[str, Any]) -> str:
    rest = {key: value for key, value in raw.items() if key != "bundle_hash"}
    return sha256_bytes(canonical_json(rest).encode("utf-8"))


def _render(raw: dict[str, Any]) -> bytes:
    return (json.dumps(raw, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
