"""Hot reload: what is wanted comes into force verified and warmed; what is bad is refused once, the old one goes on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from bundle_parts import FIELDS, make_dynamics, make_policy, write
from repack import repack
from serving_parts import Hands, request

from configs.schema import RewardConfig
from envs import AccountRules, TradingDynamics
from masking import ActionTable, RuleSet, trading_rules
from serving import Bundle, open_bundle
from serving.engine import DecisionEngine
from serving.errors import BundleError, BundleIntegrityError, LedgerError, ServingError
from serving.ledger.sqlite import SqliteLedger
from serving.records import ControlRecord, DecisionRecord
from serving.settings import EngineSettings
from serving.watch import BundleSource, BundleWatcher, Found, directory_source, warmed


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Another policy, same layout."""
    path = tmp_path_factory.mktemp("other") / "bundle"
    return open_bundle(write(path, policy=make_policy(make_dynamics(), seed=9)).path)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Other actions: another layout."""
    actions = ActionTable((0.0, 0.5, 1.0))
    rules = RuleSet(trading_rules(paper=True), actions)
    names = tuple(field.name for field in FIELDS)
    dynamics = TradingDynamics(names, AccountRules(actions=actions), rules, RewardConfig())
    path = tmp_path_factory.mktemp("narrow") / "bundle"
    return open_bundle(write(path, dynamics=dynamics, policy=make_policy(dynamics)).path)


@dataclass
class Wanted:
    """A source that tests point at something."""

    found: Found | Exception | None = None
    asked: int = 0

    def __call__(self) -> Found | None:
        self.asked += 1
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def point_at(self, bundle: Bundle) -> None:
        self.found = Found(bundle.path, bundle.hash)


@pytest.fixture
def engine(tmp_path: Path, bundle: Bundle) -> Iterator[DecisionEngine]:
    patient = EngineSettings(inference_ms=60_000.0, decision_ms=60_000.0, timeout_ms=60_000.0)
    engine = DecisionEngine(bundle, SqliteLedger(tmp_path / "ledger.db", fsync="never"), patient, clock=Hands().clock())
    yield engine
    engine.close()


def watcher_of(engine: DecisionEngine, champion: BundleSource, challenger: BundleSource | None = None) -> BundleWatcher:
    return BundleWatcher(engine, champion, challenger, interval=0.01)


def commands(engine: DecisionEngine, *names: str) -> list[ControlRecord]:
    records = [entry.record for entry in engine.ledger.read()]
    return [record for record in records if isinstance(record, ControlRecord) and record.command in names]


# --- the champion -----------------------------------------------------------------------------------------


def test_what_is_wanted_comes_into_force_once(engine: DecisionEngine, bundle: Bundle, other: Bundle) -> None:
    champion = Wanted(Found(bundle.path, bundle.hash))
    watcher = watcher_of(engine, champion)
    watcher.look()
    assert (engine.bundle.hash, commands(engine, "bundle")) == (bundle.hash, [])
    champion.point_at(other)
    watcher.look()
    watcher.look()
    assert engine.bundle.hash == other.hash
    (record,) = commands(engine, "bundle")
    assert (record.bundle_hash, record.detail) == (other.hash, f"after {bundle.hash}")
    assert engine.decide(request("next")).bundle_hash == other.hash
    champion.found = None
    watcher.look()
    assert engine.bundle.hash == other.hash


def test_a_link_that_is_moved_on_is_followed(
    engine: DecisionEngine, bundle: Bundle, other: Bundle, tmp_path: Path
) -> None:
    link = tmp_path / "champion"
    link.symlink_to(bundle.path)
    watcher = watcher_of(engine, directory_source(link))
    watcher.look()
    assert engine.bundle is bundle
    moved = tmp_path / "next"
    moved.symlink_to(other.path)
    os.replace(moved, link)
    watcher.look()
    assert engine.bundle.hash == other.hash


def test_a_bundle_is_verified_against_its_registry_and_decides_while_it_is_warmed(
    bundle: Bundle, planned: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleIntegrityError, match=f"expected bundle {'0' * 64}"):
        warmed(Found(bundle.path, "0" * 64), planner=True, seed=0)
    runs: list[str] = []
    for name in ("run_policy", "run_planner", "run_uncertainty"):
        graph = getattr(Bundle, name)
        monkeypatch.setattr(
            Bundle, name, lambda *args, _graph=graph, _name=name, **more: (runs.append(_name), _graph(*args, **more))[1]
        )
    opened = open_bundle(planned.path)
    golden = list(runs)
    runs.clear()
    assert warmed(Found(planned.path, planned.hash), planner=True, seed=0).hash == opened.hash
    for name in ("run_policy", "run_planner", "run_uncertainty"):
        assert runs.count(name) - golden.count(name) >= 10
    runs.clear()
    warmed(Found(planned.path), planner=False, seed=0)
    assert runs.count("run_planner") == golden.count("run_planner")


def damaged(source: Path, target: Path, name: str = "policy.onnx") -> Path:
    shutil.copytree(source, target)
    data = bytearray((target / name).read_bytes())
    data[len(data) // 2] ^= 1
    (target / name).write_bytes(data)
    return target


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", ["policy.onnx", "manifest.json"])
def test_a_bad_bundle_is_refused_once_and_recorded_and_the_old_one_serves(
    engine: DecisionEngine, bundle: Bundle, other: Bundle, tmp_path: Path, name: str, named: bool
) -> None:
    path = damaged(other.path, tmp_path / "bad", name)
    champion = Wanted(Found(path, other.hash if named else None))
    watcher = watcher_of(engine, champion)
    for _ in range(3):
        watcher.look()
    (record,) = commands(engine, "refused_bundle")
    assert record.detail.startswith(f"{path}: {name}: expected")
    assert record.bundle_hash == bundle.hash
    assert engine.decide(request("next")).bundle_hash == bundle.hash
    champion.found = Found(other.path)
    watcher.look()
    assert engine.bundle.hash == other.hash


def test_a_manifest_that_is_no_text_is_refused_like_any_other(
    engine: DecisionEngine, other: Bundle, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(other.path, tmp_path / "bad"))
    (path / "manifest.json").write_bytes(b"\xff\xfe" + (path / "manifest.json").read_bytes())
    watcher_of(engine, directory_source(path)).look()
    (record,) = commands(engine, "refused_bundle")
    assert "manifest.json: expected UTF-8 JSON" in record.detail


def test_a_folder_that_was_looked_at_while_it_was_copied_is_looked_at_again(
    engine: DecisionEngine, other: Bundle, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(other.path, tmp_path / "copied"))
    whole = (path / "policy.onnx").read_bytes()
    (path / "policy.onnx").write_bytes(whole[:1000])
    watcher = watcher_of(engine, directory_source(path))
    watcher.look()
    assert len(commands(engine, "refused_bundle")) == 1
    (path / "policy.onnx").write_bytes(whole)
    watcher.look()
    assert engine.bundle.hash == other.hash


def test_another_layout_is_refused(engine: DecisionEngine, bundle: Bundle, narrow: Bundle) -> None:
    wanted = Wanted(Found(narrow.path, narrow.hash))
    watcher = watcher_of(engine, wanted, wanted)
    watcher.look()
    assert (engine.bundle.hash, engine.challenger) == (bundle.hash, None)
    (record,) = commands(engine, "refused_bundle")
    assert f"expected {bundle.manifest.layout_hash}, was {narrow.manifest.layout_hash}" in record.detail
    assert "start the service anew" in record.detail


def test_a_bundle_that_decides_otherwise_than_in_training_is_refused(
    engine: DecisionEngine, other: Bundle, tmp_path: Path
) -> None:
    raw = json.loads((other.path / "golden.json").read_text())
    raw["uncertainty"] = [1.0 + (value or 0.0) for value in raw["uncertainty"]]
    path = repack(other.path, tmp_path / "bad", {"golden.json": json.dumps(raw).encode()})
    watcher_of(engine, directory_source(path)).look()
    (record,) = commands(engine, "refused_bundle")
    assert "golden" in record.detail


# --- what is away -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ConnectionError("registry away"), ServingError("no answer"), ValueError("no JSON"), IndexError("nothing")]
)
def test_a_source_that_cannot_tell_changes_nothing_and_is_asked_again(
    engine: DecisionEngine, bundle: Bundle, other: Bundle, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    champion, challenger = Wanted(error), Wanted(error)
    watcher = watcher_of(engine, champion, challenger)
    engine.challenge(other)
    with caplog.at_level(logging.WARNING, "serving.watch"):
        watcher.look()
        watcher.look()
    assert [record.getMessage() for record in caplog.records].count(caplog.records[0].getMessage()) == 4
    assert "cannot be looked at now" in caplog.records[0].getMessage()
    assert (engine.bundle, engine.challenger, champion.asked) == (bundle, other, 2)
    assert commands(engine, "refused_bundle") == []
    champion.point_at(other)
    watcher.look()
    assert engine.bundle.hash == other.hash


def test_a_bundle_that_is_damaged_in_its_registry_is_recorded_once(engine: DecisionEngine, other: Bundle) -> None:
    challenger = Wanted(BundleError("version 3: expected the files of bundle 17, was others"))
    engine.challenge(other)
    watcher = watcher_of(engine, Wanted(), challenger)
    watcher.look()
    watcher.look()
    assert [record.detail for record in commands(engine, "refused_bundle")] == [str(challenger.found)]
    assert engine.challenger is other


def test_a_folder_that_is_gone_or_empty_changes_nothing(engine: DecisionEngine, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "gone", tmp_path / "empty"):
        watcher_of(engine, directory_source(path)).look()
    assert engine.bundle is bundle


def test_a_refusal_that_the_ledger_did_not_take_is_recorded_later(
    engine: DecisionEngine, other: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = watcher_of(engine, directory_source(damaged(other.path, tmp_path / "bad")))

    def full(*_: object, **__: object) -> None:
        raise LedgerError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(engine.ledger, "append", full)
        watcher.look()
    assert commands(engine, "refused_bundle") == []
    watcher.look()
    assert len(commands(engine, "refused_bundle")) == 1


# --- the challenger ---------------------------------------------------------------------------------------


def test_a_challenger_decides_in_shadow_until_it_is_champion(
    engine: DecisionEngine, bundle: Bundle, other: Bundle, planned: Bundle
) -> None:
    champion, challenger = Wanted(Found(bundle.path, bundle.hash)), Wanted(Found(other.path, other.hash))
    watcher = watcher_of(engine, champion, challenger)
    watcher.look()
    watcher.look()
    assert engine.challenger is not None
    assert engine.challenger.hash == other.hash
    assert [record.detail for record in commands(engine, "shadow")] == [other.hash]
    engine.decide(request("both"))
    assert engine.agreement[1] == 1
    champion.point_at(other)
    watcher.look()
    assert (engine.bundle.hash, engine.challenger) == (other.hash, None)
    challenger.point_at(planned)
    watcher.look()
    assert engine.challenger is not None
    assert engine.challenger.hash == planned.hash


def test_the_shadow_ends_with_promotion_even_while_the_challenger_cannot_be_asked_for(
    engine: DecisionEngine, other: Bundle
) -> None:
    engine.challenge(other)
    watcher_of(engine, Wanted(Found(other.path, other.hash)), Wanted(ConnectionError("away"))).look()
    assert (engine.bundle.hash, engine.challenger) == (other.hash, None)


@pytest.mark.parametrize("promoted", [True, False])
def test_a_challenger_that_nobody_names_any_more_ends(
    engine: DecisionEngine, bundle: Bundle, other: Bundle, promoted: bool
) -> None:
    challenger = Wanted(Found(other.path, other.hash))
    watcher = watcher_of(engine, Wanted(), challenger)
    watcher.look()
    assert engine.challenger is not None
    # The newest version became champion and challenger at once, or the alias was taken away.
    challenger.found = Found(bundle.path, bundle.hash) if promoted else None
    watcher.look()
    watcher.look()
    assert engine.challenger is None
    assert [record.detail for record in commands(engine, "shadow")] == [other.hash, "none"]


# --- the thread -------------------------------------------------------------------------------------------


def until(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(12_000):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it does not happen")


def test_the_thread_looks_on_after_whatever_happened_until_it_is_stopped(
    engine: DecisionEngine, bundle: Bundle, other: Bundle
) -> None:
    champion = Wanted(RuntimeError("a mistake"))
    watcher = watcher_of(engine, champion)
    watcher.start()
    until(lambda: champion.asked > 2)
    champion.point_at(other)
    until(lambda: engine.bundle.hash == other.hash)
    watcher.stop()
    asked = champion.asked
    champion.point_at(bundle)
    engine.decide(request("next"))
    assert (champion.asked, engine.bundle.hash) == (asked, other.hash)
    assert isinstance(next(engine.ledger.read(-1)).record, DecisionRecord)


def test_a_look_that_hangs_does_not_keep_the_service_from_ending(
    engine: DecisionEngine, bundle: Bundle, other: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer, done = threading.Event(), threading.Event(), threading.Event()

    def slow() -> Found:
        asked.set()
        answer.wait()
        return Found(other.path, other.hash)

    monkeypatch.setattr("serving.watch.GRACE_S", 0.0)
    watcher = watcher_of(engine, slow)
    monkeypatch.setattr(watcher, "_run", lambda: (watcher.look(), done.set()))
    watcher._thread = threading.Thread(target=watcher._run, daemon=True)
    watcher.start()
    asked.wait()
    watcher.stop()
    # What comes too late is not put in force.
    answer.set()
    done.wait()
    assert engine.bundle is bundle


def test_a_watcher_that_never_began_can_be_stopped(engine: DecisionEngine) -> None:
    watcher_of(engine, Wanted()).stop()
