"""From a profile or a YAML file, plus `--set` overrides, to one frozen, validated `DetentConfig`.

Order, later wins: schema defaults, `extends` parents, the file itself, overrides. Merging starts from the
*values* of the schema defaults, not from the classes: `mbpo.ppo` has other defaults than `model_free`, and a
file that names only `mbpo.ppo.total_steps` must keep them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from configs.errors import ConfigError
from configs.fields import section_type, unknown_key
from configs.schema import DetentConfig
from configs.yaml_reader import parse_yaml, read_mapping


def list_profiles() -> tuple[str, ...]:
    """Names of the profiles that come with the package, sorted."""
    names = (entry.name for entry in resources.files("configs").iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def load_config(profile_or_path: str | Path = "default", overrides: Sequence[str] = ()) -> DetentConfig:
    """Load, merge and validate one configuration.

    Args:
        profile_or_path: a packaged profile (`default`, `smoke`), or a YAML file: anything with a directory
            separator, a `.yaml`/`.yml` suffix, or given as a `Path`. A file may name a profile to build
            upon with `extends: default`.
        overrides: `section.field=value`, the value written as YAML; later ones win.

    Raises: ConfigError, one line per problem with the dotted field, what was expected and what was found.
    """
    values = DetentConfig().model_dump()
    for layer in _layers(profile_or_path):
        values = _merge(values, layer, DetentConfig)
    for override in overrides:
        _apply(values, override)
    try:
        return DetentConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(problem) for problem in error.errors())) from error


def resolved_yaml(config: DetentConfig) -> str:
    """Every setting with its value in force, as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_hash(config: DetentConfig) -> str:
    """SHA-256 (hex) of the values in force: equal for equal configs, however they were written."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def json_schema() -> dict[str, Any]:
    """JSON schema of all settings, with bounds and descriptions, for editors and documentation."""
    return DetentConfig.model_json_schema()


# --- layers -----------------------------------------------------------------------------------------------


def _layers(source: str | Path) -> list[dict[str, Any]]:
    """Contents of the file and of what it extends, deepest parent first."""
    layers: list[dict[str, Any]] = []
    visited: list[str] = []
    current: str | Path | None = source
    while current is not None:
        path = _locate(current)
        if str(path) in visited:
            raise ConfigError(f"extends: expected an end of the chain, was a circle at {current!r}")
        visited.append(str(path))
        content = read_mapping(path)
        parent = content.pop("extends", None)
        if parent is not None and not isinstance(parent, str):
            raise ConfigError(f"extends: expected the name of a profile, was {parent!r}")
        layers.append(content)
        current = parent
    return layers[::-1]


def _locate(source: str | Path) -> Path:
    if isinstance(source, Path) or "/" in source or source.endswith((".yaml", ".yml")):
        return Path(source)
    profiles = list_profiles()
    if source not in profiles:
        near = difflib.get_close_matches(source, profiles, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; a file of your own needs its suffix, .yaml"
        raise ConfigError(f"profile: expected one of {', '.join(profiles)}, was {source!r}{hint}")
    # hatchling installs plain files, so a resource always has a path of its own.
    return Path(str(resources.files("configs") / f"{source}.yaml"))


def _merge(base: Mapping[str, Any], layer: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in layer.items():
        inner = section_type(model, key) if key in model.model_fields else None
        if inner is None:
            merged[key] = value
        elif isinstance(value, Mapping) and isinstance(base[key], Mapping):
            merged[key] = _merge(base[key], value, inner)
        elif value is not None:  # None: a section whose lines are all commented out
            merged[key] = value
    return merged


# --- overrides --------------------------------------------------------------------------------------------


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not path:
        raise ConfigError(f"--set {override}: expected section.field=value, was {override!r}")
    *parents, leaf = path.split(".")
    model: type[BaseModel] = DetentConfig
    target = values
    for depth, name in enumerate(parents):
        inner = section_type(model, name) if name in model.model_fields else None
        if inner is None:
            known = name in model.model_fields
            problem = unknown_key(parents, leaf) if known else unknown_key(parents[:depth], name)
            raise ConfigError(f"--set {problem}")
        # A file may have put a plain value where a section belongs; validation reports it better than we do.
        if not isinstance(target.get(name), dict):
            return
        model, target = inner, target[name]
    if leaf not in model.model_fields:
        raise ConfigError(f"--set {unknown_key(parents, leaf)}")
    section = section_type(model, leaf)
    if section is not None:
        example = f"{path}.{next(iter(section.model_fields))}"
        raise ConfigError(f"--set {path}: expected a single value, was a section; set e.g. {example}=...")
    target[leaf] = parse_yaml(text, f"--set {path}")


# --- messages ---------------------------------------------------------------------------------------------


def _describe(problem: Any) -> str:
    """One pydantic problem as `field: expected ..., was ...`."""
    if problem["type"] == "extra_forbidden":
        *parents, key = (str(part) for part in problem["loc"])
        return unknown_key(parents, key)
    field = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in problem["loc"]).lstrip(".")
    message = str(problem["msg"])
    if problem["type"] == "value_error":
        # Raised by our own validators, which already name field, expected and actual.
        return message.removeprefix("Value error, ")
    if problem["type"] in ("model_type", "model_attributes_type"):
        return f"{field}: expected a section with fields below it, was {problem['input']!r}"
    expected = "a list" if problem["type"] == "tuple_type" else message.removeprefix("Input should be ")
    return f"{field}: expected {expected}, was {problem['input']!r}"
