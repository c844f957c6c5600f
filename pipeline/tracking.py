"""Runs and models of the nightly job in MLflow.

A *run* is one attempt; its `run_key` names what it computes (config, data, code, seed), so that equal work is
found again. A *model version* is a bundle in the registry. Three aliases point at versions: `challenger` (newest
registered), `champion` (serves), `previous` (the champion before, for a rollback).

The order of the writes is the safety argument. A process can be killed between any two of them; running the
same night again ends in the same registry, because every step first looks for its own result:
version found or created by `run_key` -> `challenger` -> gate tag -> `previous` -> `champion` last.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from pipeline.mlflow_access import local_uri, open_client, translated

BUNDLE_FOLDER = "bundle"
RUN_KEY_TAG = "run_key"
GATE_TAG = "gate"
CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
_RUN_KEY = re.compile(r"[A-Za-z0-9._:-]{1,200}")
_ABSENT_CODES = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # no such model, no such alias
_PARAMS_PER_CALL, _METRICS_PER_CALL = 100, 1000  # limits of the MLflow REST interface


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What MLflow holds of one run; params and tags are text, metrics the last value of each."""

    run_id: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class VersionRecord:
    """One registered model version, with the metrics of the run it came from (empty if that run was purged)."""

    version: int
    run_id: str
    source: str
    tags: dict[str, str]
    metrics: dict[str, float]


class Tracker:
    """One experiment and one registered model.

    Args:
        uri: tracking and registry URI; None is `mlflow.db` in the work directory.
        experiment: experiment name, created where missing.
        workdir: keeps the database (uri None) and the artefacts (every URI but http, whose server keeps them).
        model_name: registered model, created with its first version.

    Raises, from every method: TrackingUnavailable (the service is away); ConfigError on construction, for a URI
    or an experiment that cannot be used; OSError for artefact files.
    """

    def __init__(
        self, uri: str | None, experiment: str, workdir: str | Path, model_name: str = "detent-policy"
    ) -> None:
        self.workdir = Path(workdir).resolve()
        if not model_name or set(model_name) & set("'/:"):
            # Slash and colon are MLflow's own rule; a quote would end the string in our filter.
            raise ConfigError(f"tracking.model_name: expected a name without ' / :, was {model_name!r}")
        self._own_database = uri is None
        self.uri = local_uri(self.workdir) if uri is None else uri
        self.experiment = experiment
        self.model_name = model_name
        self.run_id: str | None = None
        self._client = open_client(self.uri)
        self._experiment_id = self._find_or_create_experiment()

    # --- runs ---------------------------------------------------------------------------------------------

    def start(self, run_name: str, run_key: str) -> str:
        """Start a run and return its id; runs that a kill left RUNNING become KILLED."""
        with translated(self.uri):
            # In a database of our own the lock says that nobody else runs; elsewhere other runs may be alive.
            for orphan in self._search(None if self._own_database else run_key, "RUNNING"):
                self._client.set_terminated(orphan.info.run_id, "KILLED")
            run = self._client.create_run(
                self._experiment_id, run_name=run_name, tags={RUN_KEY_TAG: _checked_key(run_key)}
            )
        self.run_id = run.info.run_id
        return str(run.info.run_id)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log flat settings; MLflow cuts values off at 6000 characters and refuses to change one."""
        from mlflow.entities import Param

        entities = [Param(key, str(value)) for key, value in params.items()]
        for batch in _batches(entities, _PARAMS_PER_CALL):
            with translated(self.uri):
                self._client.log_batch(self._running(), params=batch)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log numbers of one step; NaN is kept, infinity becomes the largest float."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entities = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        for batch in _batches(entities, _METRICS_PER_CALL):
            with translated(self.uri):
                self._client.log_batch(self._running(), metrics=batch)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; a tag may be set again."""
        from mlflow.entities import RunTag

        with translated(self.uri):
            self._client.log_batch(self._running(), tags=[RunTag(key, value) for key, value in tags.items()])

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Copy one file into the run, below `folder`."""
        with translated(self.uri):
            self._client.log_artifact(self._running(), str(path), folder)

    def log_artifacts(self, directory: str | Path, folder: str | None = None) -> None:
        """Copy the contents of a directory into the run, below `folder`."""
        with translated(self.uri):
            self._client.log_artifacts(self._running(), str(directory), folder)

    def log_figure(self, figure: Any, name: str) -> None:
        """Save a matplotlib figure as `name` (its suffix chooses the format); the caller closes it."""
        with translated(self.uri):
            self._client.log_figure(self._running(), figure, name)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise ValueError(f"status: expected FINISHED, FAILED or KILLED, was {status!r}")
        with translated(self.uri):
            self._client.set_terminated(self._running(), status)
        self.run_id = None

    def find_finished(self, run_key: str) -> RunRecord | None:
        """Newest FINISHED run of that key."""
        with translated(self.uri):
            runs = self._search(run_key, "FINISHED")
        if not runs:
            return None
        data = runs[0].data
        return RunRecord(
            run_id=runs[0].info.run_id,
            status=runs[0].info.status,
            params=dict(data.params),
            metrics=dict(data.metrics),
            tags=dict(data.tags),
        )

    # --- models -------------------------------------------------------------------------------------------

    def register(self, bundle_dir: str | Path, run_id: str, run_key: str, tags: Mapping[str, str] | None = None) -> int:
        """Version of the bundle, found by `run_key` or created from a copy in the run, and made challenger.

        A version that is found keeps the bundle, run and tags it was created with: equal keys mean equal work.
        """
        version = self.find_version(run_key)
        if version is None:
            if not os.path.isdir(bundle_dir) or not os.listdir(bundle_dir):
                raise ValueError(f"bundle_dir: expected a directory with files, was {str(bundle_dir)!r}")
            with translated(self.uri):
                self._client.log_artifacts(run_id, str(bundle_dir), BUNDLE_FOLDER)
                self._create_registered_model()
                source = f"{self._client.get_run(run_id).info.artifact_uri}/{BUNDLE_FOLDER}"
                version = int(
                    self._client.create_model_version(
                        self.model_name, source, run_id, tags={**(tags or {}), RUN_KEY_TAG: run_key}
                    ).version
                )
        self._point(CHALLENGER, version)
        return version

    def find_version(self, run_key: str) -> int | None:
        """Oldest version registered under that key."""
        query = f"name = '{self.model_name}' and tags.{RUN_KEY_TAG} = '{_checked_key(run_key)}'"
        with translated(self.uri):
            found = self._client.search_model_versions(query)
        return min((int(version.version) for version in found), default=None)

    def promote(self, version: int) -> None:
        """Make `version` the champion. Repeating it, whole or after a kill, changes nothing more."""
        with translated(self.uri):
            self._client.set_model_version_tag(self.model_name, str(version), GATE_TAG, "passed")
        old = self._aliased(CHAMPION)
        # A repeated promotion finds itself as champion and must not become its own predecessor.
        if old is not None and int(old.version) != version:
            self._point(PREVIOUS, int(old.version))
        self._point(CHAMPION, version)

    def reject(self, version: int, reason: str) -> None:
        """Write down why the gates kept the champion."""
        with translated(self.uri):
            self._client.set_model_version_tag(self.model_name, str(version), GATE_TAG, f"failed: {reason}")

    def champion(self) -> VersionRecord | None:
        """The version that serves, or None before the first promotion."""
        return self.version(CHAMPION)

    def version(self, alias: str) -> VersionRecord | None:
        """The version an alias points at, or None."""
        found = self._aliased(alias)
        if found is None:
            return None
        return VersionRecord(
            version=int(found.version),
            run_id=found.run_id,
            source=found.source,
            tags=dict(found.tags),
            metrics=self._metrics_of(found.run_id),
        )

    def fetch_bundle(self, version: int, destination: str | Path) -> Path:
        """Copy the bundle of a version below `destination` (created) and return its directory."""
        from mlflow.artifacts import download_artifacts

        os.makedirs(destination, exist_ok=True)
        with translated(self.uri):
            source = self._client.get_model_version_download_uri(self.model_name, str(version))
            return Path(download_artifacts(artifact_uri=source, dst_path=str(destination), tracking_uri=self.uri))

    # --- internals ----------------------------------------------------------------------------------------

    def _find_or_create_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        artifacts = str(self.workdir / "artifacts")
        with translated(self.uri):
            found = self._client.get_experiment_by_name(self.experiment)
            if found is None:
                location = None if self.uri.startswith(("http://", "https://")) else artifacts
                try:
                    return str(self._client.create_experiment(self.experiment, artifact_location=location))
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    # Another job created it between the two calls.
                    found = self._client.get_experiment_by_name(self.experiment)
        if found.lifecycle_stage == "deleted":
            raise ConfigError(
                f"tracking.experiment: expected an active experiment, was {self.experiment!r}, deleted in MLflow; "
                f"restore it or choose another name"
            )
        # MLflow records absolute paths: a moved work directory would go on writing to where it was.
        if self._own_database and found.artifact_location != artifacts:
            raise ConfigError(
                f"workdir: expected {Path(found.artifact_location).parent}, where its runs are recorded, "
                f"was {self.workdir}; move it back or start an empty one"
            )
        return str(found.experiment_id)

    def _search(self, run_key: str | None, status: str) -> Sequence[Any]:
        query = f"attributes.status = '{status}'"
        if run_key is not None:
            query += f" and tags.{RUN_KEY_TAG} = '{_checked_key(run_key)}'"
        found: Sequence[Any] = self._client.search_runs(
            [self._experiment_id], query, order_by=["attributes.start_time DESC"]
        )
        return found

    def _running(self) -> str:
        if self.run_id is None:
            raise RuntimeError("run: expected a started run, was none; call start() first")
        return self.run_id

    def _create_registered_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self.model_name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _aliased(self, alias: str) -> Any:
        from mlflow.exceptions import MlflowException

        with translated(self.uri):
            try:
                return self._client.get_model_version_by_alias(self.model_name, alias)
            except MlflowException as error:
                if error.error_code in _ABSENT_CODES:
                    return None
                raise

    def _point(self, alias: str, version: int) -> None:
        with translated(self.uri):
            self._client.set_registered_model_alias(self.model_name, alias, str(version))

    def _metrics_of(self, run_id: str) -> dict[str, float]:
        from mlflow.exceptions import MlflowException

        with translated(self.uri):
            try:
                return dict(self._client.get_run(run_id).data.metrics)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return {}
                raise


def _checked_key(run_key: str) -> str:
    # The key becomes part of a filter in MLflow's query language, which cannot bind parameters.
    if not _RUN_KEY.fullmatch(run_key):
        raise ValueError(f"run_key: expected letters, digits and . _ : - only, was {run_key!r}")
    return run_key


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
