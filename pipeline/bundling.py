"""Bundles of runs: written at the end of a run, or again from its checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from configs import ConfigError, config_hash, load_config
from data import DataError
from envs import observation_scaler
from export import BundleInfo, write_bundle
from mbpo import TorchPolicy, historical_forecast, historical_uncertainty
from mbpo.planning import PlannerPolicy
from mbpo.recipe import final_risk_aversion
from pipeline.inputs import RunInputs, load_inputs
from pipeline.provenance import git_commit
from pipeline.training import MBPO_NAME
from serving.drift.reference import MIN_NLL_WINDOWS, MIN_WINDOWS, WINDOW, DriftReference
from world_model import MarketModel
from world_model.marginals import next_row_nll

log = logging.getLogger(__name__)


def bundle_run(
    inputs: RunInputs,
    policy: TorchPolicy,
    market_model: MarketModel,
    destination: Path,
    *,
    states: np.ndarray | None = None,
) -> BundleInfo:
    """Write and prove the bundle of a run.

    Args: states [N, S]: real state rows that parity compares as well.
    Raises: ParityError, ExportError, FileExistsError, OSError; nothing is left at the destination then.
    """
    config = inputs.config
    planner = None
    if config.export.planner:
        forecast = historical_forecast(market_model, inputs.train.values)
        dynamics = inputs.dynamics.with_risk_aversion(final_risk_aversion(config, inputs.dynamics, forecast))
        planner = PlannerPolicy(
            dynamics, market_model, config.planner, seed=config.seed, gamma=config.mbpo.ppo.gamma, value=policy
        )
    return write_bundle(
        destination,
        dynamics=inputs.dynamics,
        scaler=policy.scaler,
        policy=policy.network,
        market_model=market_model,
        planner=planner,
        noise_tables=config.export.noise_tables,
        drift=drift_reference(inputs, market_model),
        fields=inputs.table.fields,
        data_hash=inputs.data_hash,
        config_hash=config_hash(config),
        git_commit=git_commit(),
        seeds={"run": config.seed},
        states=states,
        parity_states=config.export.parity_states,
        parity_tolerance=config.export.parity_tolerance,
        seed=config.seed,
    )


def drift_reference(inputs: RunInputs, market_model: MarketModel) -> DriftReference | None:
    """What training saw, and how well the market model foresaw the validation rows.

    Returns: None where there are too few training rows for it; one without likelihoods where there are too few
        validation rows. Either is logged.
    Raises: DataError for a likelihood that is not finite.
    """
    least = MIN_WINDOWS * WINDOW
    if len(inputs.train) < least:
        log.warning("drift cannot be watched: expected at least %d training rows, was %d", least, len(inputs.train))
        return None
    nll, least = None, MIN_NLL_WINDOWS * WINDOW + 1
    if len(inputs.validation) < least:
        found = len(inputs.validation)
        log.warning("likelihood cannot be watched: expected at least %d validation rows, was %d", least, found)
    else:
        # In single precision, as live rows arrive.
        rows = torch.from_numpy(inputs.validation.values.astype(np.float32))
        nll = next_row_nll(market_model, rows[:-1], rows[1:]).mean(dim=1).numpy()
    return DriftReference.fit(inputs.table.names, inputs.train.values, nll)


def export_run(workdir: Path, run: str | None, destination: Path) -> BundleInfo:
    """Rebuild policy and world model of a finished run and write its bundle again.

    Args: run: folder name below `workdir/runs`; None takes the newest finished run.
    Raises: ConfigError if there is no such run, the destination exists or rules of the user's own have changed since;
        DataError if the bars have; ParityError.
    """
    finished = sorted((workdir / "runs").glob("*/report.json"), key=lambda path: path.stat().st_mtime)
    names = [path.parent.name for path in finished]
    if not names or (run is not None and run not in names):
        raise ConfigError(f"run: expected one of {names or 'the finished runs (there are none)'}, was {run!r}")
    if destination.exists():
        raise ConfigError(f"destination: expected a path that does not exist yet, was {destination}")
    folder = workdir / "runs" / (run or names[-1])
    report = json.loads((folder / "report.json").read_text())
    expected = report["data_hash"]
    # A feed that has grown since holds the run's bars as its beginning.
    inputs = load_inputs(load_config(folder / "config.yaml"), until=pd.Timestamp(report["windows"]["test"]["last"]))
    if inputs.data_hash != expected:
        raise DataError(
            f"{folder}: expected the bars the run was trained on ({expected[:12]}), was {inputs.data_hash[:12]}"
        )
    _check_rule_sources(folder, report.get("rule_sources", {}), inputs.rule_sources)
    net_arch = inputs.config.mbpo.ppo.net_arch
    weights = folder / f"{MBPO_NAME}.safetensors"
    model = MarketModel.load(folder / "world_model", inputs.table.fields)
    scaler = observation_scaler(inputs.train, historical_uncertainty(model, inputs.train.values))
    policy = TorchPolicy.load(weights, MBPO_NAME, inputs.dynamics, scaler, net_arch)
    return bundle_run(inputs, policy, model, destination)


def _check_rule_sources(folder: Path, expected: Mapping[str, str], actual: Mapping[str, str]) -> None:
    for name in sorted({*expected, *actual}):
        was, now = expected.get(name, "none"), actual.get(name, "none")
        if was != now:
            raise ConfigError(
                f"{folder}: expected the source of {name!r} that the run was trained under ({was[:12]}), was "
                f"{now[:12]}; put the old code back, or retrain under the new one"
            )
