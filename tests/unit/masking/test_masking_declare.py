"""Rule sets in YAML: what can be written, what comes back, and how each mistake is answered."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from hypothesis import given
from masking_worlds import CALM, allowed, column_state, limits, ruleset, unregistering

from masking import ActionTable, DrawdownLadder, RuleError, RuleSet, register_rule
from masking.declare import dump_rule_set, import_rule_modules, load_rule_set, parse_rule_set
from masking.rules import DrawdownRule, MaxExposure, StaleData

DOCUMENT = """
actions: {factors: [0, 0.25, 0.5, 0.75, 1, 1.25]}
rules:
  - stale_data: {max_age_bars: 1}
  - drawdown_ladder: {soft: 0.08, hard: 0.12, kill: 0.15, cooldown_bars: 20}
  - max_exposure
"""

MODULE = """
from dataclasses import dataclass
from typing import ClassVar
from masking import is_reduction, register_rule

@register_rule("calm_mornings")
@dataclass(frozen=True, kw_only=True)
class CalmMornings:
    fields: ClassVar[tuple[str, ...]] = ("hour", "position")
    first: int = 10
    closed: tuple[float, ...] = ()

    def __call__(self, state):
        return (state["hour"] >= self.first) | is_reduction(state)
"""


@pytest.fixture
def my_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of a user's own, importable but not imported."""
    (tmp_path / "my_own_rules.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    with unregistering():
        yield
    sys.modules.pop("my_own_rules", None)


# --- reading -----------------------------------------------------------------------------------------------


def test_a_document_is_the_rule_set_it_describes() -> None:
    rules = parse_rule_set(DOCUMENT)
    assert rules.rules == (StaleData(max_age_bars=1.0), DrawdownRule(), MaxExposure())
    assert rules.actions == ActionTable()
    assert allowed(rules, position=0.5, drawdown=0.09) == {0, 1, 2, 3}


def test_text_mapping_and_file_are_one(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(DOCUMENT, encoding="utf-8")
    hashes = {parse_rule_set(DOCUMENT).hash, parse_rule_set(yaml.safe_load(DOCUMENT)).hash, load_rule_set(path).hash}
    assert hashes == {RuleSet([StaleData(), DrawdownRule(), MaxExposure()], ActionTable()).hash}


def test_no_rules_at_all_can_be_written() -> None:
    assert parse_rule_set("rules: []").hash == RuleSet([], ActionTable()).hash


@pytest.mark.parametrize("same", ["rules: [max_exposure: {limit: 1}]", "rules:\n- max_exposure:\n    limit: 1.0",
                                  "{rules: [{max_exposure: {limit: 1e0}}]}", "rules: [max_exposure: {limit: +1.}]",
                                  "actions: {}\nmodules: []\nrules: [max_exposure: {limit: 10e-1}] # one"])  # fmt: skip
def test_spelling_leaves_no_trace_in_the_hash(same: str) -> None:
    assert parse_rule_set(same).hash == RuleSet([MaxExposure(limit=1.0)], ActionTable()).hash


def test_every_parameter_moves_the_hash() -> None:
    hashes = {parse_rule_set(DOCUMENT).hash}
    edits = [
        ("max_age_bars: 1", "max_age_bars: 1.5"),
        ("soft: 0.08", "soft: 0.07"),
        ("hard: 0.12", "hard: 0.11"),
        ("kill: 0.15", "kill: 0.16"),
        ("cooldown_bars: 20", "cooldown_bars: 21"),
        ("- max_exposure", "- max_exposure: {limit: 1.2}"),
        ("1.25]", "1.5]"),
        ("  - max_exposure\n", ""),
    ]
    hashes |= {parse_rule_set(DOCUMENT.replace(*edit)).hash for edit in edits}
    assert len(hashes) == 1 + len(edits)


def test_an_exponent_without_a_dot_is_a_number() -> None:
    assert parse_rule_set("rules: [max_exposure: {limit: 1e-3}]").rules == (MaxExposure(limit=0.001),)


# --- a user's own rules ------------------------------------------------------------------------------------


def test_modules_are_imported_before_their_rules_are_looked_up(my_rules: None) -> None:
    text = "modules: [my_own_rules]\nrules: [calm_mornings: {first: 9.0, closed: [1, 2.5]}]"
    rules = parse_rule_set(text)
    assert rules.rules[0].first == 9
    assert rules.rules[0].closed == (1.0, 2.5)
    state = {"hour": np.array([8.0, 9.0]), "position": np.array([0.25, 0.25])}
    assert rules(state).sum(axis=1).tolist() == [3, 7]
    again = parse_rule_set(dump_rule_set(rules))
    assert again.rules == rules.rules
    assert again.hash == rules.hash == RuleSet.from_dict(rules.to_dict()).hash
    assert yaml.safe_load(dump_rule_set(rules))["modules"] == ["my_own_rules"]


def test_a_rule_of_ones_own_gets_the_same_errors(my_rules: None) -> None:
    for parameters, message in {
        "{first: soon}": "first: expected an integer, was 'soon'",
        "{closed: 3}": "closed: expected a list, was 3",
        "{closed: [1, x]}": r"closed\[1\]: expected a finite number, was 'x'",
        "{frist: 1}": "frist: expected a known parameter, was unknown; did you mean 'first'",
    }.items():
        with pytest.raises(RuleError, match=message):
            parse_rule_set(f"modules: [my_own_rules]\nrules: [calm_mornings: {parameters}]")


def test_a_parameter_without_a_default_must_be_given() -> None:
    with unregistering():

        @register_rule("needy")
        @dataclass(frozen=True)
        class Needy:
            fields: ClassVar[tuple[str, ...]] = ("position",)
            limit: float
            label: str | None = None

        with pytest.raises(RuleError, match="rule 'needy': limit: expected a value, was missing"):
            parse_rule_set("rules: [needy]")
        rules = parse_rule_set("rules: [needy: {limit: 1, label: null}]")
        assert rules.rules == (Needy(1.0, None),)
        assert parse_rule_set("rules: [needy: {limit: 1, label: day}]").rules == (Needy(1.0, "day"),)
        with pytest.raises(RuleError, match="label: expected text, was 5"):
            parse_rule_set("rules: [needy: {limit: 1, label: 5}]")


def test_an_annotation_that_yaml_cannot_hold_is_refused() -> None:
    with unregistering():

        @register_rule("odd")
        @dataclass(frozen=True)
        class Odd:
            fields: ClassVar[tuple[str, ...]] = ("position",)
            limits: dict[str, float] | None = None
            table: Any = 0

        with pytest.raises(RuleError, match="rule 'odd': table: expected the annotation bool, int, float"):
            parse_rule_set("rules: [odd: {table: 1}]")


def test_an_error_of_a_rules_own_check_names_the_rule() -> None:
    with unregistering():

        @register_rule("picky")
        @dataclass(frozen=True)
        class Picky:
            fields: ClassVar[tuple[str, ...]] = ("position",)
            limit: float = 1.0

            def __post_init__(self) -> None:
                if self.limit > 2:
                    raise ValueError("too much")

        with pytest.raises(RuleError, match=r"rule set: rules\[0\]: rule 'picky': too much"):
            parse_rule_set("rules: [picky: {limit: 3}]")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no_such_rules",
            r"ModuleNotFoundError: No module named 'no_such_rules'; put its folder on PYTHONPATH, e\.g\. `",
        ),
        ("no_such.rules", r"No module named 'no_such'; put its folder on PYTHONPATH"),
        ("", "expected a module name, not a path, .*was ''"),
        (".mine", r"expected a module name, not a path, .*was '\.mine'"),
        ("rules/mine.py", "expected a module name, not a path, .*was 'rules/mine.py'"),
        ("mine.py", "expected a module name, not a path, .*was 'mine.py'"),
        (3, "expected a module name, not a path, .*was 3"),
    ],
)
def test_a_module_that_does_not_exist_is_named(name: Any, message: str) -> None:
    with pytest.raises(RuleError, match=f"^--rule-module: .*{message}"):
        import_rule_modules([name], "--rule-module")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\n1 / 0", r"ZeroDivisionError: division by zero \(.*raising_rules\.py, line 2\)$"),
        ("def limit(:", r"SyntaxError: invalid syntax \(raising_rules\.py, line 1\)$"),
        ("import sys\n\nsys.exit(3)", r"SystemExit: 3 \(.*raising_rules\.py, line 3\)$"),
        ("import no_such_library", r"ModuleNotFoundError: .*'no_such_library' \(.*raising_rules\.py, line 1\)$"),
        ("from masking import register_rule\nregister_rule('max_exposure')(type('X', (), {}))",
         r"RuleError: .* \(.*raising_rules\.py, line 2\)$"),
    ],
)  # fmt: skip
def test_a_module_that_raises_is_named_with_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    (tmp_path / "raising_rules.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuleError, match=f"^rule set: modules: 'raising_rules' cannot be imported: {message}"):
        parse_rule_set("modules: [raising_rules]\nrules: []")


def test_a_rule_that_no_import_finds_again_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MaxExposure, "__module__", "__main__")
    with pytest.raises(RuleError, match="was __main__; move them to a file"):
        dump_rule_set(RuleSet([MaxExposure()], ActionTable()))


# --- writing -----------------------------------------------------------------------------------------------


def test_what_is_written_can_be_read_by_a_person() -> None:
    assert dump_rule_set(RuleSet([StaleData(), DrawdownRule()], ActionTable((0.0, 1.0)))) == (
        "actions:\n"
        "  factors: [0.0, 1.0]\n"
        "rules:\n"
        "- stale_data: {max_age_bars: 1.0}\n"
        "- drawdown_ladder: {soft: 0.08, hard: 0.12, kill: 0.15, cooldown_bars: 20}\n"
    )


@given(limit=limits())
def test_writing_and_reading_gives_an_equal_rule_set(limit: dict[str, Any]) -> None:
    original = ruleset(**limit, ladder=DrawdownLadder(soft=1e-7, hard=1 / 3, kill=0.5, cooldown_bars=3))
    copy = parse_rule_set(dump_rule_set(original))
    assert copy.rules == original.rules
    assert copy.actions == original.actions
    assert copy.hash == original.hash
    state = column_state([CALM, {**CALM, "drawdown": 0.1}])
    np.testing.assert_array_equal(copy(state), original(state))


# --- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rules: [max_expsure]",
            r"rules\[0\]: rule: expected a registered one, was 'max_expsure'; did you mean 'max_exposure'",
        ),
        (
            "rules: [stale_data, zzz]",
            r"rules\[1\]: rule: .*, was 'zzz'; known here: drawdown_ladder, .*; or import the module that registers it",
        ),
        ("rules: [max_exposure: {limt: 1}]", "'max_exposure': limt: .*was unknown; did you mean 'limit'"),
        ("rules: [max_exposure: {fields: [a]}]", "fields: expected a known parameter, was unknown; known here: limit"),
        ("rules: [max_exposure: {limit: '1e-3'}]", r"limit: expected a finite number, was '1e-3' \(str\)"),
        ("rules: [max_exposure: {limit: yes}]", r"limit: expected a finite number, was True \(bool\)"),
        ("rules: [max_exposure: {limit: .nan}]", "limit: expected a finite number, was nan"),
        ("rules: [max_exposure: {limit: -.inf}]", "limit: expected a finite number, was -inf"),
        ("rules: [max_exposure: {limit: }]", "limit: expected a finite number, was None"),
        ("rules: [max_exposure: {limit: 2024-01-01}]", r"limit: expected a finite number, was datetime.* \(date\)"),
        ("rules: [max_exposure: {limit: 0}]", "limit: expected > 0, was 0"),
        ("rules: [min_holding: {bars: 1.5}]", r"bars: expected an integer, was 1.5 \(float\)"),
        ("rules: [min_holding: {bars: 9007199254740993}]", r"bars: expected an integer within \+-2\*\*53, was 900"),
        ("rules: [min_holding: {bars: true}]", r"bars: expected an integer, was True \(bool\)"),
        ("rules: [paper_only_leverage: {paper: 1}]", r"paper: expected true or false, was 1 \(int\)"),
        ("rules: [drawdown_ladder: {soft: 0.2}]", r"rules\[0\]: drawdown ladder: expected 0 < soft < hard"),
        ("rules: [drawdown_ladder: {ladder: {soft: 0.1}}]", "ladder: expected a known parameter, was unknown"),
        ("rules: [max_exposure: 1]", "rule 'max_exposure': expected a mapping of parameters, was 1"),
        ("rules: [max_exposure: {}, max_exposure: {}]", "expected each rule once"),
        ("rules: [{max_exposure: {}, stale_data: {}}]", r"rules\[0\]: expected `name` or `name: .*was \{"),
        ("rules: [3]", r"rules\[0\]: expected `name` or .*was 3"),
        ("rules: max_exposure", "rules: expected a list, was 'max_exposure'"),
        ("rules: {max_exposure: {}}", "rules: expected a list, was"),
        ("actions: {factors: [0, 1]}", "rules: expected a list of rules, was missing"),
        ("rules: []\naction: {}", "top level: action: expected a known key, was unknown; did you mean 'actions'"),
        ("rules: []\nactions: {factor: [0]}", "actions: factor: .*did you mean 'factors'"),
        ("rules: []\nactions: [0, 1]", "actions: expected a mapping, was"),
        ("rules: []\nactions: {factors: 1}", "actions.factors: expected a list, was 1"),
        ("rules: []\nactions: {factors: [1, 0]}", "actions.factors: expected strictly ascending finite numbers"),
        ("rules: []\nactions: {factors: [yes]}", "actions.factors: expected strictly ascending finite numbers"),
        ("rules: []\nmodules: my_rules", "modules: expected a list, was 'my_rules'"),
        ("rules: []\nmodules: [3]", "modules: expected a module name, not a path, .*was 3"),
        ("rules: []\nrules: []", "broken at line 2, column 1: key 'rules' is given twice"),
        ("rules: [max_exposure: {limit: 1, limit: 2}]", "key 'limit' is given twice"),
        ("rules: [", "expected YAML, was broken at line 1"),
        ("rules: !!python/object/apply:os.getcwd []", "expected YAML, was broken at line 1"),
        ("- rules", "top level: expected a mapping, was"),
        ("", "top level: expected a mapping, was None"),
    ],
)
def test_each_mistake_is_named_with_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(RuleError, match=f"^limits.yaml: .*{message}"):
        parse_rule_set(text, origin="limits.yaml")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match=r"absent\.yaml: expected a readable YAML file, was: No such file"):
        load_rule_set(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"rules: [] # \xe9")
    with pytest.raises(RuleError, match=r"latin\.yaml: expected UTF-8 text, was broken at byte 12"):
        load_rule_set(tmp_path / "latin.yaml")
    (tmp_path / "wrong.yaml").write_text("rules: [max_expsure]")
    with pytest.raises(RuleError, match=r"wrong\.yaml: rules\[0\]: .*did you mean 'max_exposure'"):
        load_rule_set(str(tmp_path / "wrong.yaml"))
