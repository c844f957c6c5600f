"""YAML as people write it: `1e-3` is a number, a key given twice is an error.

PyYAML follows YAML 1.1, where `1e-3` is a string because it has no dot, and where the last of two equal
keys wins silently. Both have cost people a training run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from configs.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 exponents and without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; raises ConstructorError where a key repeats."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            # Only scalars: a merge key (`<<`) may repeat, and a mapping cannot be a key here anyway.
            if not isinstance(key_node, yaml.ScalarNode) or key_node.value == "<<":
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, origin: str) -> Any:
    """Value of one YAML document.

    Args: text; origin: how the source is named in errors (file name or `--set a.b`).
    Raises: ConfigError naming origin, line and column.
    """
    try:
        # _Loader is a SafeLoader: it builds plain values only.
        return yaml.load(text, Loader=_Loader)  # noqa: S506
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown line"
        raise ConfigError(f"{origin}: expected YAML, was broken at {where}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: PyYAML recognises `2024-13-45` as a date and then fails to build it.
        raise ConfigError(f"{origin}: expected YAML, was broken: {_one_line(error)}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Top-level mapping of a YAML file; an empty file is an empty mapping.

    Raises: ConfigError when the file is missing, unreadable, not UTF-8, not YAML or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text, was broken at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable YAML file, was: {error.strerror}") from error
    value = parse_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, was {type(value).__name__}")
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
