"""A rule of the user's own from the config into the bundle, and what is asked of whoever opens it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from own_rule import CALM_ENTRIES
from smoke_runs import SmokeRun, detent, smoke_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmokeRun:
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "house_rules.py").write_text(CALM_ENTRIES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "rules"), prepend=os.pathsep)
    rules = ("--set", "limits.rule_modules=[house_rules]", "--set", "limits.extra_rules=[calm_entries]")
    return smoke_run(tmp_path / "var", *rules)


def test_a_rule_of_ones_own_reaches_the_bundle_and_stays_with_its_source(run: SmokeRun, tmp_path: Path) -> None:
    assert run.returncode in (0, 10), run.stderr
    bundle = run.result["bundle"]
    manifest = json.loads(Path(bundle, "manifest.json").read_text())
    assert manifest["limits"]["calm_entries"] == {"limit": 0.4}
    report = json.loads((Path(bundle).parent / "report.json").read_text())
    assert list(report["rule_sources"]) == ["house_rules"]

    backtest = ("backtest", "--bundle", bundle, "--profile", "smoke", "--json")
    refused = detent(*backtest, cwd=tmp_path)
    assert refused.returncode == 65
    assert "--rule-module" in refused.stderr
    assert "limits.rule_modules" in refused.stderr
    walked = detent(*backtest, "--rule-module", "house_rules", cwd=tmp_path)
    assert walked.returncode == 0, walked.stderr
    assert json.loads(walked.stdout)["metrics"]["bundle"]["invalid_actions"] == 0

    export = ("export", tmp_path / "again", "--workdir", run.workdir, "--json")
    (tmp_path / "rules" / "house_rules.py").write_text(CALM_ENTRIES.replace("< self.limit", "< 2 * self.limit"))
    edited = detent(*export, cwd=tmp_path)
    assert edited.returncode == 78
    assert "expected the source of 'house_rules' that the run was trained under" in edited.stderr
    (tmp_path / "rules" / "house_rules.py").write_text(CALM_ENTRIES)
    exported = detent(*export, cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["bundle_hash"] == run.result["bundle_hash"]
