"""Bundles from a real registry: whole or not at all, again when the alias moves, and what is wrong said in words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from bundle_parts import make_dynamics, make_policy, write

from configs import ConfigError
from pipeline import fetch_bundle
from pipeline.errors import ExitCode
from pipeline.fetch_bundle import FOLDER, fetch, main, registry_source
from pipeline.tracking import Tracker
from serving import Bundle, open_bundle
from serving.engine import DecisionEngine
from serving.errors import BundleError
from serving.ledger.sqlite import SqliteLedger
from serving.records import ControlRecord
from serving.watch import BundleWatcher

DIES = """
import os, signal, sys
from pathlib import Path
from pipeline import fetch_bundle, tracking

whole = tracking.Tracker.fetch_bundle

def half(self, version, destination):
    path = whole(self, version, destination)
    if sys.argv[1] == "half":
        (path / "policy.onnx").write_bytes((path / "policy.onnx").read_bytes()[:1000])
        (path / "scaler.json").unlink()
    os.kill(os.getpid(), signal.SIGKILL)

tracking.Tracker.fetch_bundle = half
sys.exit(fetch_bundle.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("other") / "bundle"
    return open_bundle(write(path, policy=make_policy(make_dynamics(), seed=9)).path)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with an empty registry: creating one takes seconds."""
    workdir = tmp_path_factory.mktemp("registry") / "var"
    Tracker(None, "detent-nightly", workdir)
    return workdir


@pytest.fixture
def served(registry: Path) -> Path:
    """Where it is fetched to, empty."""
    shutil.rmtree(registry / FOLDER, ignore_errors=True)
    return registry / FOLDER


@pytest.fixture
def tracker(registry: Path, request: pytest.FixtureRequest) -> Tracker:
    """A registered model of the test's own."""
    return Tracker(None, "detent-nightly", registry, request.node.name.partition("[")[0])


def registered(tracker: Tracker, bundle: Bundle, alias: str = "champion", **tags: str) -> int:
    run_id = tracker.start("nightly", f"{tracker.model_name}-{bundle.hash[:12]}")
    key = f"{tracker.model_name}-{bundle.hash[:12]}"
    version = tracker.register(bundle.path, run_id, key, {"bundle_hash": bundle.hash, **tags})
    tracker.finish()
    if alias == "champion":
        tracker.promote(version)
    return version


def uri_of(tracker: Tracker, alias: str = "champion") -> str:
    return f"models:/{tracker.model_name}@{alias}"


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def in_registry(registry: Path, bundle: Bundle) -> list[Path]:
    """The copies that the registry keeps."""
    found = registry.glob("artifacts/**/manifest.json")
    return [path.parent for path in found if path.read_bytes() == bundle.manifest.to_bytes()]


# --- fetching ---------------------------------------------------------------------------------------------


def test_a_version_is_fetched_whole_and_only_once(
    tracker: Tracker, registry: Path, served: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = uri_of(tracker)
    assert fetch(uri, registry, None) is None
    version = registered(tracker, bundle)
    found = fetch(uri, registry, None)
    assert found == {"path": str(served / bundle.hash), "bundle_hash": bundle.hash, "version": version}
    assert content(served / bundle.hash) == content(bundle.path)
    assert open_bundle(served / bundle.hash, bundle.hash).hash == bundle.hash
    assert {path.name for path in served.iterdir()} == {bundle.hash, ".lock"}
    monkeypatch.setattr(Tracker, "fetch_bundle", lambda *_: pytest.fail("fetched again"))
    assert fetch(uri, registry, None) == found


@pytest.mark.parametrize("when", ["half", "whole"])
def test_a_fetch_that_was_killed_leaves_nothing_that_looks_like_a_bundle(
    tracker: Tracker, registry: Path, served: Path, bundle: Bundle, when: str
) -> None:
    if tracker.version("champion") is None:
        registered(tracker, bundle)
    arguments = [when, uri_of(tracker), str(registry), ""]
    killed = subprocess.run([sys.executable, "-c", DIES, *arguments], check=False, env=environment())
    assert killed.returncode == -9
    assert {path.name for path in served.iterdir()} == {".lock", f"{bundle.hash}.partial"}
    assert fetch(uri_of(tracker), registry, None) is not None
    assert content(served / bundle.hash) == content(bundle.path)
    assert {path.name for path in served.iterdir()} == {".lock", bundle.hash}


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.mark.parametrize("name", ["policy.onnx", "manifest.json", "golden.json"])
def test_a_copy_that_was_damaged_is_fetched_anew(
    tracker: Tracker, registry: Path, served: Path, bundle: Bundle, name: str
) -> None:
    if tracker.version("champion") is None:
        registered(tracker, bundle)
    assert fetch(uri_of(tracker), registry, None) is not None
    (served / bundle.hash / name).write_bytes(b"")
    assert fetch(uri_of(tracker), registry, None) is not None
    assert content(served / bundle.hash) == content(bundle.path)


def test_a_bundle_that_is_damaged_in_the_registry_is_not_served(
    tracker: Tracker, registry: Path, served: Path, bundle: Bundle
) -> None:
    registered(tracker, bundle)
    copies = in_registry(registry, bundle)
    whole = (copies[0] / "policy.onnx").read_bytes()
    for copy in copies:
        (copy / "policy.onnx").write_bytes(whole[:-1])
    try:
        with pytest.raises(BundleError, match=f"version 1: expected the files of bundle {bundle.hash}, was others"):
            fetch(uri_of(tracker), registry, None)
        assert not (served / bundle.hash).exists()
    finally:
        for copy in copies:
            (copy / "policy.onnx").write_bytes(whole)
    assert fetch(uri_of(tracker), registry, None) is not None


def test_a_version_whose_tag_names_another_bundle_or_none_is_refused(
    tracker: Tracker, registry: Path, served: Path, bundle: Bundle, other: Bundle
) -> None:
    registered(tracker, bundle, bundle_hash=other.hash)
    with pytest.raises(BundleError, match=f"expected the files of bundle {other.hash}"):
        fetch(uri_of(tracker), registry, None)
    assert not (served / other.hash).exists()
    registered(tracker, other, bundle_hash="")
    with pytest.raises(BundleError, match="version 2: expected a tag bundle_hash, was none"):
        fetch(uri_of(tracker), registry, None)


def test_two_services_may_fetch_at_once(tracker: Tracker, registry: Path, served: Path, bundle: Bundle) -> None:
    registered(tracker, bundle)
    command = [sys.executable, "-m", "pipeline.fetch_bundle", uri_of(tracker), str(registry), ""]
    services = [
        subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    answers = [service.communicate() for service in services]
    assert [service.returncode for service in services] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert content(served / bundle.hash) == content(bundle.path)


# --- failures in words ------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["models:/detent-policy/3", "models:/a/b@c", "models:/it's@champion", "models:/a@", ""])
def test_another_form_of_uri_is_a_setting_to_correct(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a directory or models:/NAME@ALIAS, was"):
        registry_source(uri, tmp_path, None)
    assert main([uri, str(tmp_path), ""]) == ExitCode.BAD_CONFIG


@pytest.mark.parametrize(
    ("tracking_uri", "error", "words"),
    [
        ("postgresql://detent:open-sesame@127.0.0.1:1/mlflow", ConnectionError, "expected a service that answers"),
        ("gopher://nowhere", ConfigError, "tracking.uri: expected sqlite:///"),
    ],
)
def test_a_registry_that_is_away_or_none_is_told_apart(
    tmp_path: Path, tracking_uri: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        registry_source("models:/detent-policy@champion", tmp_path, tracking_uri)()
    assert str(caught.value).startswith("models:/detent-policy@champion: ")
    assert "open-sesame" not in str(caught.value)


def test_a_registry_that_does_not_answer_in_time_is_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fetch_bundle, "TIMEOUT_S", 0.0)
    with pytest.raises(TimeoutError, match="expected an answer of the registry within 0 s"):
        registry_source("models:/detent-policy@champion", tmp_path, None)()


# --- with a watcher ---------------------------------------------------------------------------------------


def test_an_alias_that_moves_is_fetched_verified_and_put_in_force(
    tracker: Tracker, registry: Path, served: Path, bundle: Bundle, other: Bundle, tmp_path: Path
) -> None:
    registered(tracker, bundle)
    champion, challenger = (
        registry_source(uri_of(tracker, alias), registry, None) for alias in ("champion", "challenger")
    )
    found = champion()
    assert found is not None
    engine = DecisionEngine(open_bundle(*found), SqliteLedger(tmp_path / "ledger.db", fsync="never"))
    with closing(engine):
        watcher = BundleWatcher(engine, champion, challenger, interval=60.0)
        watcher.look()
        assert (engine.bundle.hash, engine.challenger) == (bundle.hash, None)
        version = registered(tracker, other, "challenger")
        watcher.look()
        assert engine.challenger is not None
        assert (engine.bundle.hash, engine.challenger.hash) == (bundle.hash, other.hash)
        tracker.promote(version)
        # The registry's copy goes bad: what was fetched before is whole and serves.
        for copy in in_registry(registry, other):
            (copy / "mask.onnx").write_bytes(b"")
        watcher.look()
        assert (engine.bundle.hash, engine.challenger) == (other.hash, None)
        assert engine.bundle.path == served / other.hash
        names = [entry.record.command for entry in engine.ledger.read() if isinstance(entry.record, ControlRecord)]
    assert names == ["start", "shadow", "bundle", "shadow"]


def test_a_registry_in_a_file_is_asked_again_only_when_the_file_has_changed(
    tracker: Tracker, registry: Path, served: Path, bundle: Bundle, other: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(tracker, bundle)
    source, asked = registry_source(uri_of(tracker), registry, None), []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kinds: asked.append(args) or run(*args, **kinds))
    found = [source() for _ in range(3)]
    assert {one.bundle_hash for one in found if one} == {bundle.hash}
    assert (len(found), len(asked)) == (3, 1)
    registered(tracker, other)
    changed = source()
    assert changed is not None
    assert changed.bundle_hash == other.hash
