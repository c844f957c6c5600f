"""A run is named by the source of the rules it was trained under, and never continues under another."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_rule import CALM_ENTRIES

from configs import ConfigError, load_config, resolved_yaml
from masking import RULES, trading_rules
from masking.declare import import_rule_modules
from masking.ruleset import make_rule
from pipeline.bundling import export_run
from pipeline.inputs import load_inputs
from pipeline.provenance import rule_sources
from world_model import ModelFileError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package whose rule lives in a submodule."""
    folder = tmp_path / "house_rules"
    folder.mkdir()
    (folder / "__init__.py").write_text("import house_rules.entries\n")
    (folder / "entries.py").write_text(CALM_ENTRIES)
    monkeypatch.syspath_prepend(tmp_path)
    before, modules = dict(RULES), set(sys.modules)
    yield folder
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] in ("house_rules", "base_rules", "loose_rules"):
            del sys.modules[name]
    RULES.clear()
    RULES.update(before)


def sources(*modules: str) -> dict[str, str]:
    import_rule_modules(modules, "test")
    return rule_sources([make_rule("calm_entries", {})] if "calm_entries" in RULES else [], modules)


def test_every_file_of_a_package_counts(package: Path) -> None:
    helpers = package / "parts" / "helpers.py"
    helpers.parent.mkdir()
    before = sources("house_rules")
    assert sorted(before) == ["house_rules", "house_rules.entries"]
    helpers.write_text("LIMIT = 1\n")
    added = sources("house_rules")
    helpers.write_text("LIMIT = 2\n")
    edited = sources("house_rules")
    helpers.rename(package / "helpers.py")
    hashes = [entry["house_rules"] for entry in (before, added, edited, sources("house_rules"))]
    assert len(set(hashes)) == 4
    assert added["house_rules.entries"] == before["house_rules.entries"]


def test_equal_source_has_an_equal_hash_wherever_it_lies(package: Path, tmp_path: Path) -> None:
    before = sources("house_rules")
    shutil.copytree(package, tmp_path / "moved" / "house_rules")
    for name in ("house_rules", "house_rules.entries"):
        del sys.modules[name]
    RULES.pop("calm_entries")
    sys.path.insert(0, str(tmp_path / "moved"))
    try:
        assert sources("house_rules") == before
        assert sys.modules["house_rules"].__file__ != str(package / "__init__.py")
    finally:
        sys.path.remove(str(tmp_path / "moved"))


def test_the_module_of_a_rule_counts_though_the_config_names_another(package: Path) -> None:
    (package.parent / "loose_rules.py").write_text("import house_rules.entries\n")
    before = sources("loose_rules")
    (package / "entries.py").write_text(CALM_ENTRIES + "# another thought\n")
    after = sources("loose_rules")
    assert before["loose_rules"] == after["loose_rules"]
    assert before["house_rules.entries"] != after["house_rules.entries"]


def test_a_class_that_a_rule_inherits_from_counts(package: Path) -> None:
    (package.parent / "base_rules.py").write_text("class Base:\n    pass\n")
    inherits = CALM_ENTRIES.replace("class CalmEntries:", "class CalmEntries(Base):")
    (package / "entries.py").write_text("from base_rules import Base\n" + inherits)
    assert sorted(sources("house_rules.entries")) == ["base_rules", "house_rules.entries"]


def test_the_projects_own_rules_leave_it_to_the_code_hash() -> None:
    assert rule_sources(trading_rules()) == {}


def test_a_folder_without_init_counts_as_a_whole(package: Path) -> None:
    (package / "__init__.py").unlink()
    before = sources("house_rules")
    (package / "entries.py").write_text(CALM_ENTRIES + "# another thought\n")
    assert sources("house_rules") != before


def test_a_module_without_source_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"limits\.rule_modules: expected modules with source files, was 'sys'"):
        sources("sys")


def test_a_rule_whose_module_is_no_longer_there_is_refused(package: Path) -> None:
    import_rule_modules(["house_rules"], "test")
    rule = make_rule("calm_entries", {})
    del sys.modules["house_rules.entries"]
    with pytest.raises(ConfigError, match=r"expected modules with source files, was 'house_rules\.entries'"):
        rule_sources([rule])


def finished_run(workdir: Path) -> None:
    """What `export_run` reads before it loads networks, as a finished run leaves it."""
    config = load_config("smoke", ["limits.rule_modules=[house_rules]", "limits.extra_rules=[calm_entries]"])
    inputs = load_inputs(config)
    run = workdir / "runs" / "abc"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(resolved_yaml(config))
    report = {"data_hash": inputs.data_hash, "windows": inputs.windows(), "rule_sources": inputs.rule_sources}
    (run / "report.json").write_text(json.dumps(report))


def test_a_run_is_not_exported_under_edited_rules(package: Path, workdir: Path) -> None:
    finished_run(workdir)
    with pytest.raises(ModelFileError):  # equal source: on to the networks, which this run has not
        export_run(workdir, "abc", workdir / "bundle")
    (package / "entries.py").write_text(CALM_ENTRIES.replace("< self.limit", "> self.limit"))
    with pytest.raises(ConfigError, match=r"abc: expected the source of 'house_rules' .*\(\w{12}\), was \w{12};"):
        export_run(workdir, "abc", workdir / "bundle")
    assert not (workdir / "bundle").exists()
