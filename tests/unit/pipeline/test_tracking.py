"""Runs, versions and aliases against a real SQLite store; a kill between any two writes changes nothing."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError
from pipeline.tracking import Tracker

WRITES = frozenset(
    {
        "create_run",
        "log_batch",
        "log_artifacts",
        "create_registered_model",
        "create_model_version",
        "set_registered_model_alias",
        "set_model_version_tag",
        "set_terminated",
    }
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """One store for the module: creating it takes a second."""
    return tmp_path_factory.mktemp("home") / "var with space"


@pytest.fixture
def tracker(home, request) -> Tracker:
    """The store with a registered model of the test's own."""
    return Tracker(None, "tests", home, model_name=request.node.name.replace("[", "-").rstrip("]"))


@pytest.fixture
def bundle(tmp_path) -> Path:
    path = tmp_path / "built"
    (path / "graphs").mkdir(parents=True)
    (path / "manifest.json").write_text('{"made": "here"}')
    (path / "graphs" / "policy.onnx").write_bytes(b"graph")
    return path


# --- runs -------------------------------------------------------------------------------------------------


def test_everything_is_kept_below_the_work_directory(tracker, home, tmp_path, bundle, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    run_id = tracker.start("nightly", "key-places")
    tracker.register(bundle, run_id, "key-places")
    assert sorted(os.listdir()) == before
    assert (home / "mlflow.db").is_file()
    assert (home / "artifacts" / run_id / "artifacts" / "bundle" / "graphs" / "policy.onnx").is_file()


def test_a_finished_run_is_found_with_all_it_logged(tracker, tmp_path) -> None:
    from matplotlib.figure import Figure

    assert tracker.find_finished("key-all") is None
    run_id = tracker.start("nightly", "key-all")
    tracker.log_params({f"section.field_{i}": i for i in range(150)} | {"hidden": (64, 64)})
    tracker.log_metrics({"sharpe": 0.5, "nll": 2.0}, step=1)
    tracker.log_metrics({"sharpe": 0.75, "undefined": math.nan}, step=2)
    tracker.log_tags({"outcome": "promoted"})
    report = tmp_path / "report.md"
    report.write_text("# report")
    tracker.log_artifact(report)
    tracker.log_artifacts(tmp_path, "extra")
    tracker.log_figure(Figure(), "plots/equity.png")
    assert tracker.find_finished("key-all") is None  # still running
    tracker.finish()

    found = tracker.find_finished("key-all")
    assert found is not None
    assert (found.run_id, found.status) == (run_id, "FINISHED")
    assert len(found.params) == 151
    assert found.params["section.field_149"] == "149"
    assert found.params["hidden"] == "(64, 64)"
    assert found.metrics["sharpe"] == 0.75
    assert math.isnan(found.metrics["undefined"])
    assert found.tags["outcome"] == "promoted"
    artifacts = tracker.workdir / "artifacts" / run_id / "artifacts"
    assert {str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file()} == {
        "report.md",
        "extra/report.md",
        "plots/equity.png",
    }


def test_params_go_in_batches_that_a_server_accepts(tracker) -> None:
    # The SQLite store takes any number, an MLflow server at most 100 of a kind.
    tracker.start("nightly", "key-batches")
    client = tracker._client
    tracker._client = KilledAfter(client, 2)
    tracker.log_params({f"p{i}": i for i in range(101)})
    assert tracker._client.left == 0
    assert len(client.get_run(tracker.run_id).data.params) == 101


def test_a_failed_run_does_not_count_as_finished(tracker) -> None:
    tracker.start("nightly", "key-failed")
    tracker.finish("FAILED")
    assert tracker.find_finished("key-failed") is None


def test_the_newest_finished_run_of_a_key_wins(tracker) -> None:
    for _ in range(2):
        run_id = tracker.start("nightly", "key-twice")
        tracker.finish()
    found = tracker.find_finished("key-twice")
    assert found is not None
    assert found.run_id == run_id


def test_runs_that_a_kill_left_running_in_our_own_database_are_closed_by_the_next_one(tracker, home) -> None:
    orphan = tracker.start("nightly", "key-orphan")
    other = tracker.start("nightly", "key-other")
    again = Tracker(None, "tests", home)
    again.start("nightly", "key-orphan")
    status = {run_id: again._client.get_run(run_id).info.status for run_id in (orphan, other)}
    assert status == {orphan: "KILLED", other: "KILLED"}


def test_in_a_shared_database_only_runs_of_the_same_key_are_closed(home) -> None:
    uri = f"sqlite:///{home / 'shared.db'}"
    orphan, other, again = (Tracker(uri, "tests", home) for _ in range(3))
    ids = orphan.start("nightly", "key-orphan"), other.start("nightly", "key-other")
    again.start("nightly", "key-orphan")
    assert [again._client.get_run(run_id).info.status for run_id in ids] == ["KILLED", "RUNNING"]


def test_logging_without_a_run_is_refused(tracker) -> None:
    with pytest.raises(RuntimeError, match=r"call start\(\) first"):
        tracker.log_metrics({"sharpe": 1.0})
    tracker.start("nightly", "key-done")
    tracker.finish()
    with pytest.raises(RuntimeError, match=r"call start\(\) first"):
        tracker.log_params({"seed": 1})


def test_bad_arguments_name_field_expected_and_actual(tracker, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"run_key: expected letters.*was \"x' or '1'='1\""):
        tracker.find_finished("x' or '1'='1")
    run_id = tracker.start("nightly", "key-bad")
    with pytest.raises(ValueError, match="status: expected FINISHED, FAILED or KILLED, was 'DONE'"):
        tracker.finish("DONE")
    with pytest.raises(ValueError, match="bundle_dir: expected a directory with files"):
        tracker.register(tmp_path / "absent", run_id, "key-bad")
    assert tracker.find_version("key-bad") is None


@pytest.mark.parametrize("name", ["", "a'b", "a/b", "a:b"])
def test_a_model_name_that_breaks_the_registry_is_a_config_error(workdir, name: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.model_name: expected a name without"):
        Tracker(None, "tests", workdir, model_name=name)
    assert os.listdir(workdir) == []


# --- models -----------------------------------------------------------------------------------------------


def night(tracker: Tracker, bundle: Path, run_key: str, sharpe: float) -> int:
    """One nightly run up to the promotion."""
    run_id = tracker.start("nightly", run_key)
    tracker.log_metrics({"sharpe": sharpe})
    version = tracker.register(bundle, run_id, run_key, {"bundle_hash": "abc"})
    tracker.promote(version)
    tracker.finish()
    return version


def aliases(tracker: Tracker) -> dict[str, int | None]:
    found = {name: tracker.version(name) for name in ("challenger", "champion", "previous")}
    return {name: record.version if record else None for name, record in found.items()}


def test_before_the_first_promotion_there_is_no_champion(tracker, bundle) -> None:
    assert tracker.champion() is None
    run_id = tracker.start("nightly", "key-first")
    version = tracker.register(bundle, run_id, "key-first")
    assert tracker.champion() is None
    assert aliases(tracker) == {"challenger": version, "champion": None, "previous": None}


def test_the_champion_carries_metrics_tags_and_its_bundle(tracker, bundle, tmp_path) -> None:
    version = night(tracker, bundle, "key-champion", 0.5)
    champion = tracker.champion()
    assert champion is not None
    assert (champion.version, champion.metrics) == (version, {"sharpe": 0.5})
    assert champion.tags == {"bundle_hash": "abc", "run_key": "key-champion", "gate": "passed"}
    copy = tracker.fetch_bundle(version, tmp_path / "serving")
    assert (copy / "manifest.json").read_bytes() == (bundle / "manifest.json").read_bytes()
    assert (copy / "graphs" / "policy.onnx").read_bytes() == b"graph"


def test_each_promotion_keeps_the_champion_before_as_previous(tracker, bundle) -> None:
    first, second = night(tracker, bundle, "key-1", 0.1), night(tracker, bundle, "key-2", 0.2)
    assert (first, second) == (1, 2)
    assert aliases(tracker) == {"challenger": 2, "champion": 2, "previous": 1}
    assert night(tracker, bundle, "key-3", 0.3) == 3
    assert aliases(tracker) == {"challenger": 3, "champion": 3, "previous": 2}


def test_registering_the_same_key_again_finds_the_same_version(tracker, bundle) -> None:
    first = night(tracker, bundle, "key-same", 0.1)
    assert night(tracker, bundle, "key-same", 0.1) == first
    assert night(tracker, bundle, "key-different", 0.1) == first + 1


def test_a_rejected_challenger_leaves_the_champion_and_says_why(tracker, bundle) -> None:
    champion = night(tracker, bundle, "key-good", 0.5)
    run_id = tracker.start("nightly", "key-worse")
    challenger = tracker.register(bundle, run_id, "key-worse")
    tracker.reject(challenger, "sharpe 0.1 < 0.5")
    assert aliases(tracker) == {"challenger": challenger, "champion": champion, "previous": None}
    record = tracker.version("challenger")
    assert record is not None
    assert record.tags["gate"] == "failed: sharpe 0.1 < 0.5"


# --- kills ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing that handles errors may see it."""


class KilledAfter:
    """The real client, until so many writes have been made."""

    def __init__(self, client: Any, writes: int) -> None:
        self._client = client
        self.left = writes

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name not in WRITES:
            return method

        def write(*args: Any, **kwargs: Any) -> Any:
            if self.left == 0:
                raise Killed(name)
            self.left -= 1
            return method(*args, **kwargs)

        return write


def test_a_kill_between_any_two_writes_ends_in_the_same_registry(home, bundle) -> None:
    kills = 0
    while True:
        name = f"killed-{kills}"
        night(Tracker(None, "tests", home, model_name=name), bundle, f"{name}-old", 0.1)
        victim = Tracker(None, "tests", home, model_name=name)
        victim._client = KilledAfter(victim._client, kills)
        try:
            night(victim, bundle, f"{name}-new", 0.2)
            break
        except Killed:
            kills += 1
        after_kill = aliases(Tracker(None, "tests", home, model_name=name))
        assert after_kill["champion"] in (1, 2)  # there is always a champion
        again = Tracker(None, "tests", home, model_name=name)
        assert night(again, bundle, f"{name}-new", 0.2) == 2
        assert aliases(again) == {"challenger": 2, "champion": 2, "previous": 1}
        assert len(again._client.search_model_versions(f"name = '{name}'")) == 2
        champion = again.champion()
        assert champion is not None
        assert champion.tags["gate"] == "passed"
        assert (Path(champion.source) / "graphs" / "policy.onnx").is_file()
        assert not again._search(f"{name}-new", "RUNNING")
    # One kill before each write: the run and its metric, upload, model and version, challenger, gate verdict,
    # previous, champion, end of the run.
    assert kills == 10


def test_the_champion_alias_is_the_last_write_of_a_promotion(tracker, bundle) -> None:
    night(tracker, bundle, "key-old", 0.1)
    run_id = tracker.start("nightly", "key-new")
    version = tracker.register(bundle, run_id, "key-new")
    client = tracker._client
    for writes, champion in ((0, 1), (1, 1), (2, 1), (3, 2)):
        tracker._client = KilledAfter(client, writes)
        try:
            tracker.promote(version)
        except Killed:
            assert writes < 3
        tracker._client = client
        assert aliases(tracker)["champion"] == champion


# --- places -----------------------------------------------------------------------------------------------


def test_a_moved_work_directory_is_refused_with_its_old_place(home, tmp_path, tracker) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "mlflow.db").write_bytes((home / "mlflow.db").read_bytes())
    with pytest.raises(ConfigError) as caught:
        Tracker(None, "tests", moved)
    assert str(caught.value) == (
        f"workdir: expected {home}, where its runs are recorded, was {moved}; move it back or start an empty one"
    )


def test_an_experiment_deleted_in_mlflow_is_a_config_error(home) -> None:
    tracker = Tracker(None, "doomed", home)
    tracker._client.delete_experiment(tracker._experiment_id)
    with pytest.raises(ConfigError, match=r"tracking\.experiment: expected an active experiment, was 'doomed'"):
        Tracker(None, "doomed", home)


def test_metrics_of_a_purged_run_are_empty(tracker, bundle) -> None:
    version = night(tracker, bundle, "key-purged", 0.5)
    champion = tracker.champion()
    assert champion is not None
    tracker._client.delete_run(champion.run_id)
    tracker._client._tracking_client.store._hard_delete_run(champion.run_id)  # what `mlflow gc` calls
    champion = tracker.champion()
    assert champion is not None
    assert (champion.version, champion.metrics) == (version, {})
