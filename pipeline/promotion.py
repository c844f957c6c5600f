"""From a finished bundle to a registered version, and to champion if every gate passes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evaluation import PolicyMetrics, backtest, evaluate
from pipeline.errors import ExitCode
from pipeline.gates import decide_gates
from pipeline.inputs import RunInputs
from pipeline.result import RetrainResult
from pipeline.tracking import Tracker
from pipeline.training import MBPO_NAME, PLANNER_NAME
from serving import BundleError, OnnxPolicy, open_bundle

MARKET_TAG = "market"
"""Tag of a model version: champions are compared within one market only."""


def register(
    inputs: RunInputs, root: Path, tracker: Tracker, served: Sequence[OnnxPolicy], result: RetrainResult
) -> None:
    """Decide the gates, log the metrics, register the bundle as challenger, promote it if all gates pass.

    The policy, first of what is served, is the challenger; a planner beside it must keep the limits as well.

    Sets `gates`, `model_version` and `exit_code` of the result, which must hold everything measured so far.
    Raises: TrackingUnavailable; RuntimeError if the registry holds another bundle for the same run.
    """
    other_market = _market_of_champion(tracker, market_name(inputs))
    champion, why = (None, "") if other_market else _champion_metrics(inputs, root, tracker, served[0])
    result.gates = decide_gates(
        inputs.config.gates,
        challenger=result.policies["validation"][MBPO_NAME],
        planner=result.policies["validation"].get(PLANNER_NAME),
        champion=champion,
        no_champion_reason=why,
        other_market=other_market,
        nll_gain=result.world_model["validation"]["nll_gain_tightest"],
        latency_p99_ms=result.latency["p99_ms"],
        latency_budget_ms=inputs.config.export.latency_budget_ms,
        invalid_actions=sum(one.overridden_total for one in served)
        + sum(run.invalid_actions for by_policy in result.policies.values() for run in by_policy.values()),
        paper=inputs.config.limits.paper,
    )
    tracker.log_metrics(result.numbers())
    if result.bundle is None or result.run_id is None:
        raise RuntimeError("registry: expected a bundle and a run, was none")
    result.model_version = tracker.register(
        result.bundle,
        result.run_id,
        inputs.run_key,
        {"bundle_hash": result.bundle_hash or "", MARKET_TAG: market_name(inputs)},
    )
    registered = tracker.version("challenger")
    if registered is None or registered.tags.get("bundle_hash") != result.bundle_hash:
        raise RuntimeError(
            f"version {result.model_version}: expected bundle {result.bundle_hash}, was "
            f"{None if registered is None else registered.tags.get('bundle_hash')}: the same run gave two bundles"
        )
    failed = [gate for gate in result.gates if not gate.passed]
    if failed:
        tracker.reject(result.model_version, "; ".join(f"{gate.name}: {gate.reason}" for gate in failed))
    else:
        tracker.promote(result.model_version)
        result.exit_code = ExitCode.PROMOTED


def market_name(inputs: RunInputs) -> str:
    """What a policy trades: symbol and bars per year."""
    return f"{inputs.table.symbol} at {inputs.config.data.bars_per_year} bars per year"


def _market_of_champion(tracker: Tracker, market: str) -> str:
    # The market of the champion if it is another one, else nothing.
    champion = tracker.champion()
    found = market if champion is None else champion.tags.get(MARKET_TAG, market)
    return "" if found == market else found


def _champion_metrics(
    inputs: RunInputs, root: Path, tracker: Tracker, served: OnnxPolicy
) -> tuple[PolicyMetrics | None, str]:
    # The champion walks the same validation window, from its own bundle, with its own uncertainty model.
    champion = tracker.champion()
    if champion is None:
        return None, "no champion yet"
    if champion.tags.get("bundle_hash") == served.bundle.hash:
        return None, f"version {champion.version} is this very bundle"
    folder = root / "champion"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        bundle = open_bundle(tracker.fetch_bundle(champion.version, folder), champion.tags.get("bundle_hash"))
    except BundleError as error:
        return None, f"champion version {champion.version} does not open and cannot serve either: {error}"
    finally:
        # What was read is in memory; the registry keeps the files.
        shutil.rmtree(folder, ignore_errors=True)
    if bundle.manifest.layout_hash != served.bundle.manifest.layout_hash:
        return None, f"champion version {champion.version} reads another state layout; not comparable"
    policy = OnnxPolicy(bundle, name="champion")
    table = inputs.validation
    uncertainty = policy.uncertainty(table.values.astype(np.float32)).astype(np.float64)
    result = backtest(inputs.dynamics, table.values, table.timestamps, policy, uncertainty)
    return evaluate(result, inputs.config.data.bars_per_year), ""
