"""Parameters of rules: types from the annotations of the dataclass, bounds from its fields, one spelling of each value.

A parameter is a `bool`, `int`, `float`, `str`, a `tuple[..., ...]` of them, or one of these `| None`. The same checks
apply to rules in Python, in YAML and in a bundle, and to rules of a user's own.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from masking.errors import RuleError

LARGEST_INT = 2**53
"""Integers up to here are exact in float64, which rules compare them with."""
EXPECTED = {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}


def parameter(default: float, *, above: float | None = None, at_least: float | None = None) -> Any:
    """Dataclass field with a default and a lower bound; `check_parameters` enforces it."""
    return dataclasses.field(default=default, metadata={"above": above, "at_least": at_least})


def check_parameters(rule: Any) -> None:
    """For a rule's `__post_init__`: type and bound of each field, every value in its one spelling (1 becomes 1.0).

    Raises: RuleError naming rule, parameter, expected, actual.
    """
    for name, value in parameters_of(rule).items():
        object.__setattr__(rule, name, value)


def parameters_of(rule: Any) -> dict[str, Any]:
    """Parameters of a rule instance by name, JSON-able up to tuples. Raises: RuleError as `check_parameters`."""
    cls = type(rule)
    kinds = _kinds(cls)
    return {name: _checked(getattr(rule, name), kind, cls, name) for name, kind in kinds.items()}


def typed_parameters(cls: type[Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for the rule class from values read from a file.

    Raises: RuleError for an unknown or missing parameter, a wrong type, a number that is not finite or out of bounds.
    """
    kinds = _kinds(cls)
    for name in parameters:
        if name not in kinds:
            raise RuleError(f"{label(cls)}: {name}: expected a known parameter, was unknown; {likeliest(name, kinds)}")
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name in kinds and field.name not in parameters:
            raise RuleError(f"{label(cls)}: {field.name}: expected a value, was missing")
    return {name: _checked(value, kinds[name], cls, name) for name, value in parameters.items()}


def label(cls: type[Any]) -> str:
    """How errors call a rule class."""
    return f"rule {vars(cls).get('name', cls.__qualname__)!r}"


def likeliest(written: object, known: Iterable[str]) -> str:
    """The likeliest intention behind a name that does not exist, for an error."""
    names = list(known)
    near = difflib.get_close_matches(str(written), names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names) or 'none'}"


def check_rule_class(cls: type[Any]) -> None:
    """Refuse a class whose instances could change after their rule set was hashed. Raises: RuleError."""
    options = vars(cls).get("__dataclass_params__")  # its own: undecorated, a subclass would have parameters unseen
    if options is None or not options.frozen:
        was = "an ordinary class" if options is None else "one that can be changed"
        advice = "write @register_rule(...) above @dataclass(frozen=True, kw_only=True)"
        raise RuleError(f"{label(cls)}: expected a frozen dataclass, was {was}; {advice}")
    if any(field.name == "fields" for field in dataclasses.fields(cls)):
        raise RuleError(f"{label(cls)}: fields: expected the annotation ClassVar[tuple[str, ...]], was a parameter")


def _kinds(cls: type[Any]) -> dict[str, Any]:
    check_rule_class(cls)
    fields = [field for field in dataclasses.fields(cls) if field.init]
    # Only the fields: a rule defined inside a function may have other annotations that cannot be resolved from here.
    holder = types.SimpleNamespace(__annotations__={field.name: field.type for field in fields})
    try:
        return typing.get_type_hints(holder, vars(sys.modules.get(cls.__module__, typing)))
    except NameError as error:
        raise RuleError(f"{label(cls)}: expected annotations that its module can resolve: {error}") from error


def _checked(value: Any, kind: Any, cls: type[Any], name: str) -> Any:
    where = f"{label(cls)}: {name}"
    value = _typed(value, kind, where)
    bounds = next(field.metadata for field in dataclasses.fields(cls) if field.name == name)
    above, at_least = bounds.get("above"), bounds.get("at_least")
    if above is not None and not value > above:
        raise RuleError(f"{where}: expected > {above:g}, was {value:g}")
    if at_least is not None and not value >= at_least:
        raise RuleError(f"{where}: expected >= {at_least:g}, was {value:g}")
    return value


def _typed(value: Any, kind: Any, where: str) -> Any:
    choices = typing.get_args(kind)
    if typing.get_origin(kind) in (types.UnionType, typing.Union) and len(choices) == 2 and type(None) in choices:
        [inner] = [choice for choice in choices if choice is not type(None)]
        return None if value is None else _typed(value, inner, where)
    if typing.get_origin(kind) is tuple and len(choices) == 2 and choices[1] is Ellipsis:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise RuleError(f"{where}: expected a list, was {value!r} ({type(value).__name__})")
        return tuple(_typed(item, choices[0], f"{where}[{index}]") for index, item in enumerate(value))
    if kind not in EXPECTED:
        raise RuleError(
            f"{where}: expected the annotation bool, int, float, str, tuple[..., ...] or | None, was {kind}"
        )
    if kind is float and _is_number(value):
        return float(value) + 0.0  # -0.0 would hash differently
    if kind is int and _is_number(value) and value == int(value):
        if abs(value) > LARGEST_INT:
            raise RuleError(f"{where}: expected an integer within +-2**53, was {value!r}")
        return int(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    raise RuleError(f"{where}: expected {EXPECTED[kind]}, was {value!r} ({type(value).__name__})")


def _is_number(value: Any) -> bool:
    # bool is an int to Python, and never a number to a person.
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False
