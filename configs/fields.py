"""The tree of settings as dotted paths: what exists, what is a section, and what a typo was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from configs.schema import DetentConfig


def section_type(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """Class of the section `name` of `model`; None where that field is a plain value."""
    annotation = model.model_fields[name].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def field_paths(model: type[BaseModel] = DetentConfig, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all plain values, in the order of the schema."""
    for name in model.model_fields:
        inner = section_type(model, name)
        if inner is None:
            yield prefix + name
        else:
            yield from field_paths(inner, f"{prefix}{name}.")


def flat_values(config: DetentConfig) -> dict[str, Any]:
    """Every plain value under its dotted path, as a tracker logs it."""
    values: dict[str, Any] = {}
    for path in field_paths():
        value: Any = config
        for name in path.split("."):
            value = getattr(value, name)
        values[path] = value
    return values


def unknown_key(parents: Sequence[str], key: str) -> str:
    """Error text for `key`, which does not exist in the section at `parents`, with the likeliest intention."""
    model: type[BaseModel] = DetentConfig
    for depth, parent in enumerate(parents, start=1):
        inner = section_type(model, parent)
        if inner is None:
            path, below = ".".join(parents[:depth]), (*parents, key)[depth]
            return f"{path}.{below}: expected nothing below {path}, which is a plain value"
        model = inner
    path = ".".join((*parents, key))
    guess = _guess(parents, key, list(model.model_fields))
    hint = f"did you mean {guess!r}?" if guess else f"known here: {', '.join(model.model_fields)}"
    return f"{path}: expected a known key, was unknown; {hint}"


def _guess(parents: Sequence[str], key: str, siblings: list[str]) -> str | None:
    """Nearest sibling, else the field or section of nearly that name in another section."""
    if near := difflib.get_close_matches(key, siblings, n=1, cutoff=0.6):
        return ".".join((*parents, near[0]))
    by_leaf: dict[str, list[str]] = {}
    for path in field_paths():
        parts = path.split(".")
        for depth, name in enumerate(parts):
            by_leaf.setdefault(name, []).append(".".join(parts[: depth + 1]))
    leaf = difflib.get_close_matches(key, by_leaf, n=1, cutoff=0.8)
    if not leaf:
        return None
    # A name used by several sections: the path that resembles what was written most.
    written = ".".join((*parents, key))
    return max(by_leaf[leaf[0]], key=lambda path: difflib.SequenceMatcher(None, written, path).ratio())
