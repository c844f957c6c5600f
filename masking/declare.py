"""Rule sets written down: YAML in, YAML out.

::

    actions: {factors: [0, 0.25, 0.5, 0.75, 1, 1.25]}    # optional
    modules: [my_rules]                                  # optional: imported first, so that their rules are known
    rules:
      - stale_data: {max_age_bars: 1}
      - drawdown_ladder: {soft: 0.08, hard: 0.12, kill: 0.15, cooldown_bars: 20}
      - max_exposure                                     # its defaults

Nothing is guessed: an unknown key, rule or parameter, a key given twice, a number that is text or out of bounds is a
`RuleError` that names file, rule and parameter. Formatting leaves no trace: equal limits have an equal `RuleSet.hash`.
`modules` runs code of the author's choice, as any import does: load files of people you trust.
"""

from __future__ import annotations

import importlib
import os
import re
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from masking.actions import ActionTable
from masking.errors import RuleError
from masking.parameters import likeliest
from masking.rules import Rule
from masking.ruleset import RuleSet, make_rule


def load_rule_set(path: str | os.PathLike[str]) -> RuleSet:
    """Rule set of a YAML file.

    Raises: RuleError naming file, rule and parameter, what was expected and what was found.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RuleError(f"{path}: expected UTF-8 text, was broken at byte {error.start}") from error
    except OSError as error:
        raise RuleError(f"{path}: expected a readable YAML file, was: {error.strerror}") from error
    return parse_rule_set(text, origin=str(path))


def parse_rule_set(source: str | Mapping[str, Any], *, origin: str = "rule set") -> RuleSet:
    """Rule set of YAML text, or of the mapping it stands for.

    Args: source; origin: how errors call it.
    Raises: RuleError naming origin, rule and parameter, what was expected and what was found.
    """
    try:
        return _rule_set(_parse(source) if isinstance(source, str) else source)
    except RuleError as error:
        raise RuleError(f"{origin}: {error}") from error


def import_rule_modules(names: Iterable[str], origin: str) -> None:
    """Import modules of one's own, so that the rules they register are known.

    Args: names, dotted; origin: how errors call the place where the names were written.
    Raises: RuleError naming origin, module and reason, with file and line, whatever the module's code raises.
    """
    for name in names:
        if not isinstance(name, str) or not name or name.startswith(".") or re.search(r"[/\\]|\.py$", name):
            raise RuleError(
                f"{origin}: expected a module name, not a path, such as my_rules or rules.mine, was {name!r}"
            )
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            hint = ""
            if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
                hint = "; put its folder on PYTHONPATH, e.g. `PYTHONPATH=. detent ...`"
            problem = f"{type(error).__name__}: {error}{_place(error)}{hint}"
            raise RuleError(f"{origin}: {name!r} cannot be imported: {problem}") from error


def dump_rule_set(rule_set: RuleSet) -> str:
    """YAML with every parameter spelled out; parsed again it is an equal rule set with an equal hash.

    Rules of one's own are listed under `modules`. Raises: RuleError for one that no import can find again.
    """
    homes = {type(rule).__module__ for rule in rule_set.rules}
    for home in ("__main__", "builtins"):
        if home in homes:
            raise RuleError(f"rules: expected rules from modules that can be imported, was {home}; move them to a file")
    description = rule_set.to_dict()
    document: dict[str, Any] = {"actions": {"factors": description["factors"]}}
    if modules := sorted(home for home in homes if home.partition(".")[0] != "masking"):
        document["modules"] = modules
    document["rules"] = [
        {rule["name"]: rule["parameters"]} if rule["parameters"] else rule["name"] for rule in description["rules"]
    ]
    return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


def _rule_set(document: Any) -> RuleSet:
    _known_keys(document, ("actions", "modules", "rules"), "top level")
    if "rules" not in document:
        raise RuleError("rules: expected a list of rules, was missing")
    import_rule_modules(_list(document.get("modules", []), "modules"), "modules")
    rules = [_rule(entry, f"rules[{index}]") for index, entry in enumerate(_list(document["rules"], "rules"))]
    return RuleSet(rules, _actions(document.get("actions", {})))


# The line at the top of a module that failed; a syntax error in that module names its own.
def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "<module>"]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _rule(entry: Any, where: str) -> Rule:
    if isinstance(entry, Mapping) and len(entry) == 1:
        [(name, parameters)] = entry.items()
    else:
        name, parameters = entry, None
    if not isinstance(name, str):
        raise RuleError(f"{where}: expected `name` or `name: {{parameter: value}}`, was {entry!r}")
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, Mapping):
        raise RuleError(f"{where}: rule {name!r}: expected a mapping of parameters, was {parameters!r}")
    try:
        return make_rule(name, parameters)
    except RuleError as error:
        raise RuleError(f"{where}: {error}") from error


def _actions(section: Any) -> ActionTable:
    _known_keys(section, ("factors",), "actions")
    if "factors" not in section:
        return ActionTable()
    try:
        return ActionTable(tuple(_list(section["factors"], "actions.factors")))
    except RuleError:
        raise
    except ValueError as error:
        raise RuleError(f"actions.{error}") from error


def _known_keys(section: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(section, Mapping):
        raise RuleError(f"{where}: expected a mapping, was {section!r}")
    for key in section:
        if key not in known:
            raise RuleError(f"{where}: {key}: expected a known key, was unknown; {likeliest(key, known)}")


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise RuleError(f"{where}: expected a list, was {value!r}")
    return list(value)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and reads `1e-3` as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; raises ConstructorError where a key repeats."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.update([key.value] if isinstance(key, yaml.ScalarNode) else [])
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _parse(text: str) -> Any:
    try:
        # _Loader is a SafeLoader: it builds plain values only.
        return yaml.load(text, Loader=_Loader)  # noqa: S506
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "an unknown line"
        raise RuleError(f"expected YAML, was broken at {where}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RuleError(f"expected YAML, was broken: {' '.join(str(error).split())}") from error
