"""Rules of a user's own: on the command line, in the config, in the run key, in the bundle."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_rule import CALM_ENTRIES
from typer.testing import CliRunner, Result

from configs import load_config
from data import FEATURE_FIELDS
from envs import TradingDynamics
from masking import RULES
from pipeline.cli import app

RUNNER = CliRunner()
SETTINGS = ("--set", "limits.rule_modules=[own_rules]", "--set", "limits.extra_rules=[{calm_entries: {limit: 0.3}}]")


def detent(*arguments: str | Path) -> Result:
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def own_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "own_rules.py"
    path.write_text(CALM_ENTRIES)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(RULES)
    yield path
    sys.modules.pop("own_rules", None)
    RULES.clear()
    RULES.update(before)


def plan(*settings: str) -> Result:
    return detent("retrain", "--profile", "smoke", "--dry-run", "--json", *settings)


def test_rules_are_listed_with_their_parameters(own_rules: Path) -> None:
    result = detent("rules", "list", "--rule-module", "own_rules")
    assert result.exit_code == 0
    for text in ("max_exposure", "limit=1.25", "calm_entries", "cooldown_bars=20"):
        assert text in result.output


def test_what_an_author_wrote_is_shown_as_written(own_rules: Path) -> None:
    text = CALM_ENTRIES.replace(
        "    fields: ", '    """Calm [/] and [bold] entries.\n\n    Not shown."""\n\n    fields: '
    )
    own_rules.write_text(
        text.replace("limit: float = 0.4", 'limit: float = 0.4\n    names: tuple[str, ...] = ("[/]",)')
    )
    result = detent("rules", "list", "--rule-module", "own_rules")
    assert result.exit_code == 0, result.output
    assert "Calm [/] and [bold] entries." in result.output
    assert "('[/]',)" in result.output
    assert "Not shown" not in result.output


def test_a_rule_without_a_docstring_shows_none(own_rules: Path) -> None:
    result = detent("rules", "list", "--rule-module", "own_rules")
    assert result.exit_code == 0
    assert "CalmEntries(" not in result.output


def test_every_column_that_a_rule_may_read_is_listed() -> None:
    result = detent("rules", "list", "--columns")
    assert result.exit_code == 0
    listed = [line.split("│")[1].strip() for line in result.output.splitlines() if line.startswith("│")]
    names = TradingDynamics.from_config([field.name for field in FEATURE_FIELDS], load_config("default")).state_names
    assert [name for name in listed if name] == list(names)
    assert "per sqrt(year)" in result.output


def test_an_empty_rule_set_does_not_pass_the_check(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text("rules: []\n")
    result = detent("rules", "check", tmp_path / "rules.yaml")
    assert result.exit_code == 78
    assert "which allows everything" in result.stderr


def test_a_rule_set_is_checked_and_spelled_out(own_rules: Path, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("modules: [own_rules]\nrules: [calm_entries, max_exposure: {limit: 1}]\n")
    result = detent("rules", "check", path)
    assert result.exit_code == 0, result.output
    assert "calm_entries: {limit: 0.4}" in result.output
    assert "2 rules conform; hash" in result.output


def test_a_rule_that_does_not_conform_is_exit_code_78(own_rules: Path, tmp_path: Path) -> None:
    own_rules.write_text(
        CALM_ENTRIES.replace('(state["volatility_5"] < self.limit)', '~(state["volatility_5"] > self.limit)')
    )
    path = tmp_path / "rules.yaml"
    path.write_text("modules: [own_rules]\nrules: [calm_entries]\n")
    result = detent("rules", "check", path)
    assert result.exit_code == 78
    assert "calm_entries" in result.stderr
    assert "NaN" in result.stderr


def test_mistakes_in_rules_are_exit_code_78(own_rules: Path, tmp_path: Path) -> None:
    for settings, message in (
        (("--set", "limits.extra_rules=[stale_dat]"), "did you mean 'stale_data'"),
        (("--set", "limits.extra_rules=[stale_data]"), "limits.extra_rules: 'stale_data' is built in; its limits are"),
        (("--set", "limits.rule_modules=[no_such_rules]"), "limits.rule_modules: 'no_such_rules' cannot be imported"),
        (("--set", "limits.rule_modules=[sys]"), "limits.rule_modules: expected modules with source files, was 'sys'"),
        (("--set", "limits.extra_rules=[3]"), "limits.extra_rules: rules[0]: expected `name` or `name:"),
        (
            ("--set", "limits.extra_rules=[{max_exposure: 1.0}]"),
            "rule 'max_exposure': expected a mapping of parameters",
        ),
        ((*SETTINGS[:2], "--set", "limits.extra_rules=[calm_entries, calm_entries]"), "expected each rule once"),
        ((*SETTINGS[:2], "--set", "limits.extra_rules=[{calm_entries: {limit: high}}]"), "expected a finite number"),
    ):
        result = plan(*settings)
        assert result.exit_code == 78, result.output
        assert message in result.stderr
    result = detent("rules", "list", "--rule-module", "no_such_rules")
    assert result.exit_code == 78
    assert "--rule-module: 'no_such_rules' cannot be imported" in result.stderr
    assert detent("rules", "check", tmp_path / "none.yaml").exit_code == 78


def test_the_code_of_a_users_rule_is_part_of_the_run_key(own_rules: Path) -> None:
    def key(*settings: str) -> str:
        for name in ("own_rules", "calm_entries"):
            sys.modules.pop(name, None)
            RULES.pop(name, None)
        result = plan(*settings)
        assert result.exit_code == 0, result.output
        return str(json.loads(result.stdout)["run_key"])

    plain, with_rule = key(), key(*SETTINGS)
    own_rules.write_text(CALM_ENTRIES + "\n# another thought\n")
    edited = key(*SETTINGS)
    assert len({plain, with_rule, edited}) == 3
    assert key() == plain


@pytest.mark.parametrize("extra", [("--dry-run",), ()])
def test_a_rule_that_judges_a_batch_otherwise_than_a_row_is_refused_before_anything_is_trained(
    own_rules: Path, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    own_rules.write_text(CALM_ENTRIES.replace("< self.limit", '<= state["volatility_5"].mean()'))
    settings = ("--set", "limits.rule_modules=[own_rules]", "--set", "limits.extra_rules=[calm_entries]")
    result = detent("retrain", "--profile", "smoke", "--workdir", tmp_path / "var", "--quiet", *settings, *extra)
    assert result.exit_code == 78, result.output
    assert "limits.extra_rules: rule 'calm_entries', property 'batch'" in result.stderr
    assert not list(tmp_path.glob("var/runs"))
    assert not list(tmp_path.glob("var/*.db"))


def test_a_rule_that_reads_an_unknown_column_is_refused_with_those_there_are(own_rules: Path) -> None:
    own_rules.write_text(CALM_ENTRIES.replace("volatility_5", "volatility_7"))
    result = plan(*SETTINGS)
    assert result.exit_code == 78
    message = (
        "limits.extra_rules: rule 'calm_entries': fields: expected columns of the state row, was 'volatility_7'; did"
    )
    assert message in result.stderr
