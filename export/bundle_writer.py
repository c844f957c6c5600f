"""Writing a bundle: export, describe, prove, and only then let it appear under its name."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy

from data import Field, Scaler, atomic_directory, canonical_json, sha256_bytes
from envs import TradingDynamics
from export.errors import ExportError, ParityError
from export.graphs import LikelihoodGraph, MaskGraph, PolicyGraph, UncertaintyGraph, check_policy
from export.onnx_files import EXAMPLE_BATCH, onnx_bytes
from export.parity import ParityReport, check_parity
from export.plan_parity import rows_at_once
from export.reference import Reference
from export.search_graph import PlannerModule, planner_graph
from export.states import probe_masks, probe_states
from masking.ruleset import rule_name, rule_parameters
from mbpo.planning import PlannerPolicy
from serving import BundleError, Golden, Manifest, PlannerOutputs, PolicyOutputs, open_bundle
from serving.drift.reference import DRIFT_FILE, DriftReference
from serving.golden import GoldenPlan
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
    graph_metadata,
    layout_hash,
)

GOLDEN_ROWS = 64
"""Golden inputs of a bundle, the last of them with a NaN."""
LIBRARIES = ("numpy", "onnx", "onnxruntime", "onnxscript", "sb3-contrib", "stable-baselines3", "torch")
"""Libraries whose version can change the bytes of a bundle."""


@dataclass(frozen=True)
class BundleInfo:
    """A written bundle."""

    path: Path
    hash: str
    parity: ParityReport


def write_bundle(
    destination: str | os.PathLike[str],
    *,
    dynamics: TradingDynamics,
    scaler: Scaler,
    policy: MaskableActorCriticPolicy,
    market_model: Any,
    planner: PlannerPolicy | None = None,
    noise_tables: int = 1,
    drift: DriftReference | None = None,
    fields: Sequence[Field],
    data_hash: str,
    config_hash: str,
    git_commit: str,
    seeds: Mapping[str, int],
    states: npt.NDArray[np.float32] | None = None,
    parity_states: int = 2000,
    parity_tolerance: float = 1e-5,
    seed: int = 0,
) -> BundleInfo:
    """Write a bundle and prove it; on any error nothing is left at the destination.

    Args:
        destination: directory to create; its name is the caller's choice and not part of the bundle.
        dynamics: names of the columns, and the rules.
        scaler: raw state columns to observation.
        policy: trained policy; it is copied, never changed.
        market_model: gives `model_uncertainty`; a `world_model.MarketModel`.
        planner: planner over the same rules, account, market model and policy; its reward and horizon are its own. None
            writes a bundle without one.
        noise_tables: of the planner, for the caller's seed to pick from.
        drift: what training saw; it goes into the bundle together with the market model's likelihood. None writes a
            bundle whose drift cannot be watched.
        fields: the M feature columns, as in `dynamics.feature_names`.
        data_hash: provenance, stored as given, like the next three.
        config_hash: of the configuration that trained the policy.
        git_commit: of the code.
        seeds: by purpose.
        states: real state rows [N, S] that parity compares as well.
        parity_states: probe states for parity, at least 1,000.
        parity_tolerance: largest probability difference.
        seed: of the probe states and golden inputs.

    Returns: where it lies, its hash and how close it came. Equal arguments give equal bytes.
    Raises: FileExistsError; ExportError if the parts do not fit together; ParityError if the files decide otherwise
        than the policy; OSError from the file system.
    """
    check_policy(dynamics, scaler, policy)
    _check_columns(dynamics, market_model, fields, states)
    plans = None
    if planner is not None:
        _check_planner(planner, dynamics, scaler, policy, market_model)
        plans = planner_graph(planner, noise_tables=noise_tables)
    if drift is not None and drift.names != dynamics.feature_names:
        raise ExportError(f"drift.names: expected {list(dynamics.feature_names)}, was {list(drift.names)}")
    reference = Reference(dynamics, scaler, policy, market_model)
    with atomic_directory(destination) as folder:
        contents = _graph_files(dynamics, scaler, policy, market_model)
        golden = _golden(reference, np.random.default_rng([seed, GOLDEN_ROWS]))
        if planner is not None and plans is not None:
            contents[PLANNER_FILE] = _planner_file(plans, dynamics, scaler)
            golden = replace(golden, plan=_golden_plan(plans, golden, rows_at_once(planner)))
        if drift is not None:
            contents[LIKELIHOOD_FILE] = _likelihood_file(market_model, dynamics, scaler)
            contents[DRIFT_FILE] = _json(drift.to_dict())
            golden = replace(golden, nll=reference.nll(golden.state))
        contents |= {
            RULES_FILE: _json({"hash": dynamics.rule_set.hash, **dynamics.rule_set.to_dict()}),
            SCALER_FILE: _json(scaler.to_dict()),
            GOLDEN_FILE: _json(golden.to_dict()),
        }
        manifest = Manifest.create(
            state_names=list(dynamics.state_names),
            feature_fields=[field.to_dict() for field in fields],
            actions={"factors": dynamics.rule_set.actions.factors, "names": dynamics.rule_set.actions.names},
            rule_set_hash=dynamics.rule_set.hash,
            limits={rule_name(rule): rule_parameters(rule) for rule in dynamics.rule_set.rules},
            planner=None if plans is None else {"horizon": plans.horizon, "noise_tables": noise_tables},
            drift=drift is not None,
            provenance={
                "data_hash": data_hash,
                "config_hash": config_hash,
                "git_commit": git_commit,
                "seeds": dict(seeds),
                "versions": library_versions(),
            },
            files={name: {"sha256": sha256_bytes(data), "size": len(data)} for name, data in contents.items()},
        )
        contents[MANIFEST_FILE] = manifest.to_bytes()
        for name, data in contents.items():
            (folder / name).write_bytes(data)
        try:
            bundle = open_bundle(folder, expected_hash=manifest.bundle_hash)
        except BundleError as error:
            raise ParityError(f"the written bundle does not open: {error}") from error
        parity = check_parity(
            bundle, reference, planner, count=parity_states, tolerance=parity_tolerance, seed=seed, states=states
        )
    return BundleInfo(Path(destination), manifest.bundle_hash, parity)


def library_versions() -> dict[str, str]:
    """Versions that went into a bundle, by distribution name."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def _check_columns(
    dynamics: TradingDynamics, market_model: Any, fields: Sequence[Field], states: npt.NDArray[np.float32] | None
) -> None:
    for label, named in (("fields", fields), ("market_model.fields", market_model.fields)):
        names = tuple(field.name for field in named)
        if names != dynamics.feature_names:
            raise ExportError(f"{label}: expected {list(dynamics.feature_names)}, was {list(names)}")
    if states is not None and (states.ndim != 2 or states.shape[1] != len(dynamics.state_names)):
        raise ExportError(f"states: expected [N, {len(dynamics.state_names)}], was {list(states.shape)}")


# The reward may differ: a planner may be more averse to risk than the policy was.
def _check_planner(
    planner: PlannerPolicy,
    dynamics: TradingDynamics,
    scaler: Scaler,
    policy: MaskableActorCriticPolicy,
    market_model: Any,
) -> None:
    for name in ("state_names", "account_rules"):
        ours, theirs = getattr(dynamics, name), getattr(planner.dynamics, name)
        if theirs != ours:
            raise ExportError(f"planner.dynamics.{name}: expected {ours}, was {theirs}")
    if planner.dynamics.rule_set.hash != dynamics.rule_set.hash:
        raise ExportError(
            f"planner.dynamics.rule_set: expected {dynamics.rule_set.to_dict()}, "
            f"was {planner.dynamics.rule_set.to_dict()}"
        )
    if planner.model is not market_model:
        raise ExportError("planner.model: expected the market_model given, was another object")
    if planner.value is not None and planner.value.network is not policy:
        raise ExportError("planner.value.network: expected the policy given, was another object")
    if planner.value is not None and planner.value.scaler.to_dict() != scaler.to_dict():
        raise ExportError(f"planner.value.scaler: expected {scaler.to_dict()}, was {planner.value.scaler.to_dict()}")


def _graph_files(
    dynamics: TradingDynamics, scaler: Scaler, policy: MaskableActorCriticPolicy, market_model: Any
) -> dict[str, bytes]:
    def metadata(role: str) -> dict[str, str]:
        return _metadata(role, dynamics, scaler)

    state = torch.zeros(EXAMPLE_BATCH, len(dynamics.state_names))
    callers = torch.ones(EXAMPLE_BATCH, dynamics.num_actions, dtype=torch.bool)
    features = torch.zeros(EXAMPLE_BATCH, len(dynamics.feature_names))
    return {
        POLICY_FILE: onnx_bytes(
            PolicyGraph(dynamics, scaler, policy),
            {"state": state, "caller_masks": callers},
            PolicyOutputs._fields,
            metadata(POLICY_FILE),
        ),
        MASK_FILE: onnx_bytes(MaskGraph(dynamics), {"state": state}, ("action_masks",), metadata(MASK_FILE)),
        UNCERTAINTY_FILE: onnx_bytes(
            UncertaintyGraph(market_model), {"features": features}, ("model_uncertainty",), metadata(UNCERTAINTY_FILE)
        ),
    }


def _likelihood_file(market_model: Any, dynamics: TradingDynamics, scaler: Scaler) -> bytes:
    features = torch.zeros(EXAMPLE_BATCH, len(dynamics.feature_names))
    example = {"features": features, "next_features": features.clone()}
    return onnx_bytes(LikelihoodGraph(market_model), example, ("nll",), _metadata(LIKELIHOOD_FILE, dynamics, scaler))


def _planner_file(graph: PlannerModule, dynamics: TradingDynamics, scaler: Scaler) -> bytes:
    example = {
        "state": torch.zeros(EXAMPLE_BATCH, len(dynamics.state_names)),
        "caller_masks": torch.ones(EXAMPLE_BATCH, dynamics.num_actions, dtype=torch.bool),
        "seed": torch.zeros(EXAMPLE_BATCH, dtype=torch.int64),
    }
    metadata = _metadata(PLANNER_FILE, dynamics, scaler, noise_tables=graph.innovations.shape[0])
    return onnx_bytes(graph, example, PlannerOutputs._fields, metadata)


def _metadata(
    role: str, dynamics: TradingDynamics, scaler: Scaler, *, noise_tables: int | None = None
) -> dict[str, str]:
    layout = layout_hash(dynamics.state_names, dynamics.feature_names, dynamics.rule_set.actions.factors)
    return graph_metadata(
        role,
        layout=layout,
        rule_set_hash=dynamics.rule_set.hash,
        scaler=np.stack([scaler.centre, scaler.scale]),
        noise_tables=noise_tables,
    )


def _golden(reference: Reference, rng: np.random.Generator) -> Golden:
    # Infinite and enormous cells are parity's business: JSON has no infinity, and 3e38 squared is none either.
    pool = probe_states(reference.dynamics, reference.scaler, 4 * GOLDEN_ROWS, rng)
    state = pool[(np.abs(pool) < 1e6).all(axis=1)][:GOLDEN_ROWS].copy()
    state[-1, 0] = np.nan
    callers = probe_masks(reference.dynamics.num_actions, len(state), rng)
    return Golden(state, callers, reference.decide(state, callers), reference.uncertainty(state))


@torch.no_grad()
def _golden_plan(plans: PlannerModule, golden: Golden, at_once: int) -> GoldenPlan:
    inputs = (golden.state, golden.caller_masks, golden.seeds)
    pieces = [
        plans(*(torch.from_numpy(part[first : first + at_once]) for part in inputs))
        for first in range(0, len(golden.state), at_once)
    ]
    return GoldenPlan(*(torch.cat([getattr(one, name) for one in pieces]).numpy() for name in GoldenPlan._fields))


def _json(obj: Any) -> bytes:
    return (canonical_json(obj) + "\n").encode("utf-8")
