import json

import pytest

from data import canonical_json, sha256_bytes
from serving import BundleFormatError, BundleIntegrityError, Manifest
from serving.manifest import BUNDLE_FILES, DRIFT_FILES, PLANNER_FILE, layout_hash

FIELD = {"name": "gap", "group": "market", "unit": "log", "low": None, "high": 0.1, "description": "x"}


def entries(**changes):
    base = {
        "state_names": ["gap", "position", "model_uncertainty", "data_age"],
        "feature_fields": [FIELD],
        "actions": {"factors": [0.0, 1.0], "names": ["hold", "target 0", "target 1"]},
        "rule_set_hash": "a" * 64,
        "limits": {"max_exposure": {"limit": 1.25}},
        "planner": None,
        "drift": False,
        "provenance": {
            "data_hash": "d",
            "config_hash": "c",
            "git_commit": "g",
            "seeds": {"run": 0},
            "versions": {"numpy": "2"},
        },
        "files": {name: {"sha256": "b" * 64, "size": 3} for name in BUNDLE_FILES},
    }
    return {**base, **changes}


def rehashed(raw):
    raw = {key: value for key, value in raw.items() if key != "bundle_hash"}
    raw["bundle_hash"] = sha256_bytes(canonical_json(raw).encode())
    return (json.dumps(raw, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def test_manifest_survives_the_round_trip_and_its_hash_covers_all_other_entries():
    manifest = Manifest.create(**entries())
    again = Manifest.from_bytes(manifest.to_bytes())
    assert again == manifest
    rest = json.loads(manifest.to_bytes())
    del rest["bundle_hash"]
    assert manifest.bundle_hash == sha256_bytes(canonical_json(rest).encode())
    assert manifest.feature_names == ("gap",)


def test_any_entry_changes_the_hash():
    base = Manifest.create(**entries()).bundle_hash
    other = entries()
    other["provenance"] = {**other["provenance"], "git_commit": "h"}
    assert Manifest.create(**other).bundle_hash != base


def test_layout_hash_depends_on_order_and_factors():
    reference = layout_hash(("a", "b"), ("a",), (0.0, 1.0))
    assert reference == layout_hash(("a", "b"), ("a",), (0, 1))
    assert reference != layout_hash(("b", "a"), ("a",), (0.0, 1.0))
    assert reference != layout_hash(("a", "b"), ("a",), (0.0, 0.5))
    assert reference != layout_hash(("a", "b"), ("a", "b"), (0.0, 1.0))


def test_unknown_format_version_is_refused_before_its_entries_are_read():
    raw = json.loads(Manifest.create(**entries()).to_bytes())
    raw["format_version"] = 4
    raw["entry_of_the_future"] = True
    with pytest.raises(BundleFormatError, match="format_version: expected 3, was 4"):
        Manifest.from_bytes(rehashed(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_names": ["gap", "gap", "model_uncertainty", "data_age"]}, "each name once"),
        ({"state_names": ["position", "gap", "model_uncertainty", "data_age"]}, "expected to start with"),
        ({"state_names": ["gap", "data_age", "model_uncertainty"]}, "last, 'data_age'"),
        ({"state_names": ["gap", "position", "data_age"]}, "model_uncertainty"),
        ({"feature_fields": [{**FIELD, "colour": "red"}]}, "feature_fields"),
        ({"rule_set_hash": "A" * 64}, "rule_set_hash"),
        ({"rule_set_hash": "a" * 64 + "\n"}, "rule_set_hash"),
        ({"files": {"policy.onnx": {"sha256": "b" * 64, "size": 3}}}, "files: expected"),
        ({"files": {**entries()["files"], "../evil": {"sha256": "b" * 64, "size": 3}}}, "files: expected"),
        ({"files": {**entries()["files"], "golden.json": {"sha256": "b" * 64, "size": -1}}}, "golden.json.size"),
        ({"drift": 1}, "drift"),
        ({"colour": "red"}, "colour"),
        ({"actions": {"factors": [], "names": ["hold", "x"]}}, "actions.factors"),
    ],
)
def test_malformed_entry_is_refused_by_name(change, message):
    with pytest.raises(BundleFormatError, match=message):
        Manifest.create(**entries(**change))


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xfe", b"[]", b"null", b"{}", b'{"bundle_hash": NaN}', b'{"x": "\\ud800"}', b"[" * 100_000],
    ids=["empty", "not utf-8", "list", "null", "no entries", "nan", "lone surrogate", "deep"],
)
def test_garbage_is_refused(data):
    with pytest.raises(BundleIntegrityError):
        Manifest.from_bytes(data)


def test_another_spelling_of_the_same_content_is_refused():
    data = Manifest.create(**entries()).to_bytes()
    for other in (data + b"\n", data.replace(b"  ", b" ", 1), canonical_json(json.loads(data)).encode()):
        with pytest.raises(BundleIntegrityError, match="bundle_hash"):
            Manifest.from_bytes(other)
    duplicated = data.replace(b'  "actions"', b'  "actions": 1,\n  "actions"', 1)
    with pytest.raises(BundleIntegrityError):
        Manifest.from_bytes(duplicated)


def test_a_planner_is_described_where_its_file_is_and_only_there():
    planned = {"planner": {"horizon": 3, "noise_tables": 2}}
    with pytest.raises(BundleFormatError, match=r"files: expected .*planner\.onnx"):
        Manifest.create(**entries(**planned))
    files = {name: {"sha256": "b" * 64, "size": 3} for name in (*BUNDLE_FILES, PLANNER_FILE)}
    with pytest.raises(BundleFormatError, match="files: expected"):
        Manifest.create(**entries(files=files))
    manifest = Manifest.create(**entries(files=files, **planned))
    assert Manifest.from_bytes(manifest.to_bytes()).planner.horizon == 3
    with pytest.raises(BundleFormatError, match=r"planner\.horizon"):
        Manifest.create(**entries(files=files, planner={"horizon": 0, "noise_tables": 2}))


@pytest.mark.parametrize("held", [(), *[(name,) for name in DRIFT_FILES], DRIFT_FILES])
@pytest.mark.parametrize("drift", [False, True])
def test_what_drift_is_watched_with_is_there_as_a_whole_or_not_at_all(drift, held):
    files = {name: {"sha256": "b" * 64, "size": 3} for name in (*BUNDLE_FILES, *held)}
    if held == (DRIFT_FILES if drift else ()):
        assert Manifest.from_bytes(Manifest.create(**entries(files=files, drift=drift)).to_bytes()).drift is drift
        return
    with pytest.raises(BundleFormatError, match="files: expected"):
        Manifest.create(**entries(files=files, drift=drift))
