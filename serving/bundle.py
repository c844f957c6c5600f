"""Opening a bundle: verify every byte, then parse, then prove that it decides as it did in training.

onnxruntime loads most corrupted files without complaint, so it is given only bytes whose SHA-256 was checked.
Each file is read once; what was hashed is what is parsed.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data import DataError, Scaler, canonical_json, sha256_bytes
from masking import MaskingError, RowRules, RuleSet
from masking.ruleset import rule_name, rule_parameters
from serving.drift.reference import DRIFT_FILE, DriftReference
from serving.errors import BundleFormatError, BundleIntegrityError, BundleMismatchError, GoldenMismatchError
from serving.golden import (
    GOLDEN_TOLERANCE,
    NLL_TOLERANCE,
    PLAN_TOLERANCE,
    Golden,
    PlannerOutputs,
    PolicyOutputs,
    difference,
    following_rows,
    number_apart,
    plan_difference,
    spared,
)
from serving.graphs import load_graph, signatures
from serving.manifest import (
    GOLDEN_FILE,
    LIKELIHOOD_FILE,
    MANIFEST_FILE,
    MASK_FILE,
    PLANNER_FILE,
    POLICY_FILE,
    RULES_FILE,
    SCALER_FILE,
    UNCERTAINTY_FILE,
    Manifest,
)

log = logging.getLogger(__name__)

MAX_MANIFEST_BYTES = 1 << 20
"""A manifest is read before anything about it is known; beyond this size it is none."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """A verified bundle, ready to run; made by `open_bundle` only."""

    path: Path
    manifest: Manifest
    rule_set: RuleSet
    scaler: Scaler
    golden: Golden
    policy_session: Any
    mask_session: Any
    uncertainty_session: Any
    planner_session: Any = None
    """None where the bundle has no planner."""
    likelihood_session: Any = None
    """None where `drift` is."""
    drift: DriftReference | None = None
    """What training saw; None where the bundle does not say."""

    @property
    def hash(self) -> str:
        """Name of the content: SHA-256 over the manifest, which holds the hash of every file."""
        return self.manifest.bundle_hash

    @property
    def rule_columns(self) -> dict[str, int]:
        """Index in the state row of each column the rules read."""
        return {name: self.manifest.state_names.index(name) for name in self.rule_set.fields}

    @cached_property
    def row_rules(self) -> RowRules:
        """The rules on one state row at a time."""
        row_rules = RowRules(self.rule_set)
        if row_rules.objection:
            log.info("bundle %s: rules are asked with arrays: %s", self.hash[:12], row_rules.objection)
        return row_rules

    def run_policy(self, state: npt.NDArray[np.float32], caller_masks: npt.NDArray[np.bool_]) -> PolicyOutputs:
        """Policy graph as exported. state [B, S]; caller_masks [B, A]."""
        return PolicyOutputs(*self.policy_session.run(None, {"state": state, "caller_masks": caller_masks}))

    def run_masks(self, state: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Mask graph: state [B, S] -> action masks [B, A] of the rules alone."""
        masks: npt.NDArray[np.bool_] = self.mask_session.run(None, {"state": state})[0]
        return masks

    def run_uncertainty(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Uncertainty graph: features [B, M] -> model_uncertainty [B]; NaN in, NaN out."""
        uncertainty: npt.NDArray[np.float32] = self.uncertainty_session.run(None, {"features": features})[0]
        return uncertainty

    def run_likelihood(
        self, features: npt.NDArray[np.float32], next_features: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Likelihood graph: features of a bar and of the next, each [B, M] -> nll [B], nats per feature.

        NaN in, NaN out. Raises: BundleMismatchError where the bundle has none.
        """
        if self.likelihood_session is None:
            raise BundleMismatchError(f"{self.path}: expected a bundle with {LIKELIHOOD_FILE}, was one without")
        inputs = {"features": features, "next_features": next_features}
        nll: npt.NDArray[np.float32] = self.likelihood_session.run(None, inputs)[0]
        return nll

    def run_planner(
        self,
        state: npt.NDArray[np.float32],
        caller_masks: npt.NDArray[np.bool_],
        seed: npt.NDArray[np.int64],
        *,
        at_once: int | None = None,
    ) -> PlannerOutputs:
        """Planner graph as exported. state [B, S]; caller_masks [B, A]; seed [B].

        Args: at_once: most rows the graph is given in one piece, which bounds memory; None gives it all of them.
        Raises: BundleMismatchError where the bundle has no planner.
        """
        if self.planner_session is None:
            raise BundleMismatchError(f"{self.path}: expected a bundle with a planner, was one without")
        inputs = {"state": state, "caller_masks": caller_masks, "seed": seed}
        if at_once is None or len(state) <= at_once:
            return PlannerOutputs(*self.planner_session.run(None, inputs))
        pieces = [
            self.planner_session.run(None, {name: part[first : first + at_once] for name, part in inputs.items()})
            for first in range(0, len(state), at_once)
        ]
        return PlannerOutputs(*(np.concatenate(piece) for piece in zip(*pieces, strict=True)))


def open_bundle(path: str | os.PathLike[str], expected_hash: str | None = None) -> Bundle:
    """Read, verify and load a bundle.

    Args: path: the bundle's directory; expected_hash: refuse any bundle but this one, e.g. as the registry named it.
    Raises: BundleIntegrityError for a missing, foreign, truncated or altered file; BundleFormatError for another
        format version or malformed content; BundleMismatchError where files do not belong together;
        GoldenMismatchError if this machine decides otherwise than training did.
    """
    directory = Path(path)
    manifest, contents = _read_verified(directory, expected_hash)
    rule_set = _load_rules(manifest, contents[RULES_FILE])
    scaler = _load_scaler(manifest, contents[SCALER_FILE])
    size = len(manifest.state_names), rule_set.actions.num_actions
    golden = Golden.from_dict(
        _json_object(GOLDEN_FILE, contents[GOLDEN_FILE]),
        *size,
        planner=manifest.planner is not None,
        drift=manifest.drift,
    )
    drift = _load_drift(manifest, contents[DRIFT_FILE]) if manifest.drift else None
    sessions = {role: load_graph(role, contents[role], manifest, scaler) for role in signatures(manifest)}
    bundle = Bundle(
        directory,
        manifest,
        rule_set,
        scaler,
        golden,
        policy_session=sessions[POLICY_FILE],
        mask_session=sessions[MASK_FILE],
        uncertainty_session=sessions[UNCERTAINTY_FILE],
        planner_session=sessions.get(PLANNER_FILE),
        likelihood_session=sessions.get(LIKELIHOOD_FILE),
        drift=drift,
    )
    _check_golden(bundle)
    return bundle


def _read_verified(directory: Path, expected_hash: str | None) -> tuple[Manifest, dict[str, bytes]]:
    try:
        found = sorted(os.listdir(directory))
    except OSError as error:
        raise BundleIntegrityError(f"{directory}: expected a bundle directory: {error.strerror}") from error
    if MANIFEST_FILE not in found:
        raise BundleIntegrityError(f"{directory}: expected {MANIFEST_FILE}, was {found}")
    manifest = Manifest.from_bytes(_read(directory / MANIFEST_FILE, MAX_MANIFEST_BYTES))
    if expected_hash is not None and manifest.bundle_hash != expected_hash:
        raise BundleIntegrityError(f"{directory}: expected bundle {expected_hash}, was {manifest.bundle_hash}")
    wanted = sorted([MANIFEST_FILE, *manifest.files])
    if found != wanted:
        missing, foreign = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        raise BundleIntegrityError(f"{directory}: expected exactly {wanted}, missing {missing}, foreign {foreign}")
    contents = {}
    for name, entry in manifest.files.items():
        data = _read(directory / name, entry.size)
        digest = sha256_bytes(data)
        if len(data) != entry.size or digest != entry.sha256:
            raise BundleIntegrityError(
                f"{name}: expected {entry.size} bytes with SHA-256 {entry.sha256}, was {len(data)} with {digest}"
            )
        contents[name] = data
    return manifest, contents


# One byte more than allowed is enough to see that a file is too long.
def _read(path: Path, limit: int) -> bytes:
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise BundleIntegrityError(f"{path.name}: expected a regular file, was a link, folder or device")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise BundleIntegrityError(f"{path.name}: expected a readable file: {error.strerror}") from error
    if len(data) > limit:
        raise BundleIntegrityError(f"{path.name}: expected at most {limit} bytes, was more")
    return data


def _json_object(name: str, data: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleFormatError(f"{name}: expected JSON: {error}") from error
    if not isinstance(raw, dict):
        raise BundleFormatError(f"{name}: expected a JSON object, was {type(raw).__name__}")
    return raw


def _load_rules(manifest: Manifest, data: bytes) -> RuleSet:
    raw = _json_object(RULES_FILE, data)
    stored = raw.pop("hash", None)
    try:
        rule_set = RuleSet.from_dict(raw)
    except MaskingError as error:
        raise BundleFormatError(f"{RULES_FILE}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise BundleFormatError(f"{RULES_FILE}: expected a stored rule set: {error!r}") from error
    if not stored == rule_set.hash == manifest.rule_set_hash:
        raise BundleMismatchError(
            f"{RULES_FILE}: rule_set_hash: expected {manifest.rule_set_hash} as in the manifest, "
            f"file says {stored}, rules give {rule_set.hash}"
        )
    limits = {rule_name(rule): rule_parameters(rule) for rule in rule_set.rules}
    if canonical_json(manifest.limits) != canonical_json(limits):
        raise BundleMismatchError(f"limits: expected those of {RULES_FILE} {limits}, was {manifest.limits}")
    actions = manifest.actions
    if (rule_set.actions.factors, rule_set.actions.names) != (actions.factors, actions.names):
        raise BundleMismatchError(f"actions: expected {rule_set.actions.names} as in {RULES_FILE}, was {actions.names}")
    unknown = sorted(set(rule_set.fields) - set(manifest.state_names))
    if unknown:
        raise BundleMismatchError(f"state_names: expected every column the rules read, missing {unknown}")
    return rule_set


def _load_scaler(manifest: Manifest, data: bytes) -> Scaler:
    try:
        scaler = Scaler.from_dict(_json_object(SCALER_FILE, data))
    except DataError as error:
        raise BundleFormatError(f"{SCALER_FILE}: {error}") from error
    if scaler.names != manifest.state_names[:-1]:
        raise BundleMismatchError(
            f"{SCALER_FILE}: names: expected {list(manifest.state_names[:-1])}, was {list(scaler.names)}"
        )
    return scaler


def _load_drift(manifest: Manifest, data: bytes) -> DriftReference:
    drift = DriftReference.from_dict(_json_object(DRIFT_FILE, data))
    if drift.names != manifest.feature_names:
        raise BundleMismatchError(
            f"{DRIFT_FILE}: names: expected {list(manifest.feature_names)}, was {list(drift.names)}"
        )
    return drift


def _check_golden(bundle: Bundle) -> None:
    golden = bundle.golden
    found = difference(golden.expected, bundle.run_policy(golden.state, golden.caller_masks), GOLDEN_TOLERANCE)
    if found is not None:
        raise GoldenMismatchError(f"{POLICY_FILE}: golden {found}")
    rules = bundle.rule_set({name: golden.state[:, index] for name, index in bundle.rule_columns.items()})
    if not np.array_equal(bundle.run_masks(golden.state), rules):
        raise GoldenMismatchError(f"{MASK_FILE}: expected the masks of {RULES_FILE} on the golden states, was others")
    planner = bundle.manifest.planner
    if golden.plan is not None and planner is not None:
        # One by one, as live decisions come: a planner needs much memory for each row.
        plans = bundle.run_planner(golden.state, golden.caller_masks, golden.seeds, at_once=1)
        masks = golden.expected.action_masks
        found = plan_difference(
            golden.plan,
            plans,
            action_masks=masks,
            horizon=planner.horizon,
            tolerance=PLAN_TOLERANCE,
            spare=spared(len(masks)),
        )
        if found is not None:
            raise GoldenMismatchError(f"{PLANNER_FILE}: golden {found}")
    features, following = following_rows(golden.state, len(bundle.manifest.feature_fields))
    found = number_apart(golden.uncertainty, bundle.run_uncertainty(features), tolerance=GOLDEN_TOLERANCE)
    if found is not None:
        raise GoldenMismatchError(f"{UNCERTAINTY_FILE}: golden {found}")
    if golden.nll is not None:
        found = number_apart(golden.nll, bundle.run_likelihood(features, following), tolerance=NLL_TOLERANCE)
        if found is not None:
            raise GoldenMismatchError(f"{LIKELIHOOD_FILE}: golden {found}")
