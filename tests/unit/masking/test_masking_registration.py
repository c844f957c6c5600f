"""Which classes may become rules, under which name, and which instances a rule set takes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from masking_worlds import unregistering

from masking import RULES, ActionTable, RuleError, RuleSet, register_rule
from masking.parameters import check_parameters, parameters_of
from masking.rules import MaxExposure, StaleData
from masking.ruleset import make_rule

SOURCE = """
from dataclasses import dataclass
from typing import ClassVar
from masking import register_rule

@register_rule("calm_entries")
@dataclass(frozen=True, kw_only=True)
class CalmEntries:
    fields: ClassVar[tuple[str, ...]] = ("position",)
    limit: float = LIMIT

    def __call__(self, state):
        return state["position"] < self.limit
"""


@pytest.fixture(autouse=True)
def _own_rules() -> Iterator[None]:
    with unregistering():
        yield


@pytest.fixture
def module_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`mods/reg_rules.py`, importable as `mods.reg_rules` and as `reg_rules`."""
    file = tmp_path / "mods" / "reg_rules.py"
    file.parent.mkdir()
    file.write_text(SOURCE.replace("LIMIT", "0.25"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file changed within the second would not be read again
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(file.parent)
    yield file
    for name in ("mods", "mods.reg_rules", "reg_rules"):
        sys.modules.pop(name, None)


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A rule but for its name."""

    fields: ClassVar[tuple[str, ...]] = ("position",)
    limit: float = 1.0

    def __call__(self, state: Any) -> Any:
        return state["position"] < self.limit


# --- names -------------------------------------------------------------------------------------------------


def test_a_taken_name_is_refused_with_both_homes() -> None:
    with pytest.raises(
        RuleError,
        match=r"'max_exposure' is already registered by masking\.rules\.MaxExposure \(.*rules\.py\), "
        r"now by masking\.rules\.StaleData \(.*rules\.py\); choose another name",
    ):
        register_rule("max_exposure")(StaleData)
    assert StaleData.name == "stale_data"


def test_a_class_defined_again_replaces_itself(module_file: Path) -> None:
    module = importlib.import_module("reg_rules")
    old = RULES["calm_entries"]
    earlier = RuleSet([old()], ActionTable())
    module_file.write_text(SOURCE.replace("LIMIT", "0.5"))
    importlib.reload(module)
    assert RULES["calm_entries"] is module.CalmEntries is not old
    assert make_rule("calm_entries", {}).limit == 0.5  # type: ignore[attr-defined]
    with pytest.raises(RuleError, match="CalmEntries: expected the class that is registered as 'calm_entries', was an"):
        RuleSet([old()], ActionTable())
    assert list(earlier.blocked({"position": np.array([0.3])})) == ["calm_entries", "non_finite"]


def test_one_file_imported_under_two_names_is_told_apart(module_file: Path) -> None:
    importlib.import_module("reg_rules")
    with pytest.raises(
        RuleError,
        match=r"by reg_rules\.CalmEntries \(.*\.py\), now by mods\.reg_rules\.CalmEntries \(.*\.py\); "
        "import the module under one name",
    ):
        importlib.import_module("mods.reg_rules")


@pytest.mark.parametrize("name", [3, "", None, Plain])
def test_registering_needs_a_name(name: Any) -> None:
    with pytest.raises(RuleError, match=r'register_rule: expected a name, was .*; use @register_rule\("name"\)'):
        register_rule(name)


# --- classes -----------------------------------------------------------------------------------------------


def _undecorated() -> type[Any]:
    class Tighter(MaxExposure):
        limit: float = 0.1

    return Tighter


def _unfrozen() -> type[Any]:
    @dataclass
    class Loose:
        fields: ClassVar[tuple[str, ...]] = ("position",)
        limit: float = 1.0

    return Loose


def _fields_as_parameter() -> type[Any]:
    @dataclass(frozen=True)
    class Forgetful:
        fields: tuple[str, ...] = ("position",)

    return Forgetful


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: type("Ordinary", (), {}), r"was an ordinary class; write @register_rule\(\.\.\.\) above @dataclass"),
        (_undecorated, r".*Tighter': expected a frozen dataclass, was an ordinary class"),
        (_unfrozen, "expected a frozen dataclass, was one that can be changed"),
        (_fields_as_parameter, r"fields: expected the annotation ClassVar\[tuple\[str, \.\.\.\]\], was a parameter"),
    ],
)
def test_what_is_no_frozen_dataclass_is_refused_wherever_it_is_described(make: Any, message: str) -> None:
    cls = make()
    for describe in (register_rule("mine"), lambda cls: parameters_of(cls()), lambda cls: check_parameters(cls())):
        with pytest.raises(RuleError, match=message):
            describe(cls)
    assert "mine" not in RULES


# --- instances ---------------------------------------------------------------------------------------------


def test_a_subclass_of_a_rule_is_not_taken_for_its_parent() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Tighter(MaxExposure):
        def __call__(self, state: Any) -> Any:
            return super().__call__(state) & (state["position"] < 0)

    with pytest.raises(
        RuleError,
        match="Tighter: expected a class registered itself, was a subclass of 'max_exposure'; decorate it with @reg",
    ):
        RuleSet([Tighter()], ActionTable())
    tighter = register_rule("tighter")(Tighter)
    assert RuleSet([tighter(), MaxExposure()], ActionTable()).to_dict()["rules"][0]["name"] == "tighter"


def test_a_class_in_the_place_of_an_instance_is_named() -> None:
    with pytest.raises(RuleError, match=r"MaxExposure: expected an instance, MaxExposure\(\), was the class"):
        RuleSet([MaxExposure], ActionTable())  # type: ignore[list-item]


@pytest.mark.parametrize("fields", [None, "position", ["position"], (1,)])
def test_fields_that_are_no_tuple_of_names_are_refused(fields: Any) -> None:
    cls = type("Mistaken", (), {} if fields is None else {"fields": fields})
    rule = register_rule("mistaken")(dataclass(frozen=True)(cls))()
    with pytest.raises(RuleError, match="rule 'mistaken': fields: expected a tuple of column names, was"):
        RuleSet([rule], ActionTable())


def test_an_integer_that_floats_cannot_hold_is_refused() -> None:
    assert make_rule("min_holding", {"bars": 2**53}).bars == 2**53  # type: ignore[attr-defined]
    for bars in (2**53 + 1, 1e300):
        with pytest.raises(RuleError, match=r"'min_holding': bars: expected an integer within \+-2\*\*53, was"):
            make_rule("min_holding", {"bars": bars})
