"""What a run ends with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation import PolicyMetrics
from pipeline.errors import ExitCode
from pipeline.gates import Gate

STAGES = (
    "data",
    "replay",
    "world model",
    "imagination",
    "model-free",
    "mbpo",
    "export",
    "evaluation",
    "latency",
    "registry",
)
"""Steps of a run, in order."""
EARLIER = ("bundle_hash", "gates", "metrics", "timings_s")
"""What `already_done` repeats from the report of the run that did it."""


def run_directory(root: Path, run_key: str) -> Path:
    """Folder with the checkpoints, bundle and report of one run."""
    return root / "runs" / run_key[:16]


@dataclass
class RetrainResult:
    """What a run ended with; `to_dict` is what `--json` prints."""

    exit_code: ExitCode
    run_key: str
    data_hash: str
    workdir: Path
    windows: dict[str, Any] = field(default_factory=dict)
    rule_sources: dict[str, str] = field(default_factory=dict)
    """See `pipeline.provenance.rule_sources`."""
    bundle: Path | None = None
    bundle_hash: str | None = None
    tracking_uri: str | None = None
    run_id: str | None = None
    model_name: str | None = None
    model_version: int | None = None
    gates: list[Gate] = field(default_factory=list)
    world_model: dict[str, Any] = field(default_factory=dict)
    imagination: dict[str, dict[str, float]] = field(default_factory=dict)
    """See `mbpo.branch_summary`."""
    policies: dict[str, dict[str, PolicyMetrics]] = field(default_factory=dict)
    """Window -> policy -> metrics."""
    latency: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    earlier: dict[str, Any] = field(default_factory=dict)
    """Report of the run that had already computed this one."""

    @property
    def status(self) -> str:
        """Outcome in one word."""
        return {0: "promoted", 10: "champion_kept", 11: "already_done"}[int(self.exit_code)]

    @property
    def metrics(self) -> dict[str, Any]:
        """Everything that was measured, JSON-able."""
        policies = {
            window: {name: metrics.to_dict() for name, metrics in by_policy.items()}
            for window, by_policy in self.policies.items()
        }
        measured = {
            "world_model": self.world_model,
            "imagination": self.imagination,
            "policies": policies,
            "latency": self.latency,
            "parity": self.parity,
        }
        return dict(_finite(measured))

    def numbers(self) -> dict[str, float]:
        """Every number in `metrics` by its path, e.g. `policies/test/mbpo/sharpe`; lists are left out."""
        return dict(_numbers(self.metrics))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        own = {
            "status": self.status,
            "exit_code": int(self.exit_code),
            "run_key": self.run_key,
            "data_hash": self.data_hash,
            "workdir": str(self.workdir),
            "windows": self.windows,
            "rule_sources": self.rule_sources,
            "bundle": None if self.bundle is None else str(self.bundle),
            "bundle_hash": self.bundle_hash,
            "mlflow": {
                "tracking_uri": self.tracking_uri,
                "run_id": self.run_id,
                "model_name": self.model_name,
                "model_version": self.model_version,
            },
            "gates": [gate.to_dict() for gate in self.gates],
            "metrics": self.metrics,
            "timings_s": {name: round(seconds, 3) for name, seconds in self.timings.items()},
        }
        return own | {key: self.earlier[key] for key in EARLIER if self.earlier}


# JSON has neither NaN nor infinity.
def _finite(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)
