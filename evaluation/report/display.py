"""Values as people read them: rounded, with a true minus sign, and a dash where there is none."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.verdict import Criterion, Verdict

MISSING, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
VERDICT_MARKS = {True: ("✓", "met"), False: ("✗", "not met"), None: ("?", "cannot be decided")}
"""A sign and words for `Criterion.passed`: colour is never all there is."""


def number(value: float | None, spec: str = "") -> str:
    """A number in a Python format; without one, whole numbers in full and others with three digits.

    NaN and None are a dash, and a negative number that rounds to zero is zero.
    """
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else MINUS + "∞"
    spec = spec or (",.0f" if float(value).is_integer() and abs(value) < 1e15 else ".3g")
    text = format(value, spec)
    if text.startswith("-") and not any(digit in text for digit in "123456789"):
        text = format(0.0, spec)
    return text.replace("-", MINUS)


def words(value: Any, spec: str = "") -> str:
    """Text as it is, bools as yes and no, numbers as `number`."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (value or MISSING) if isinstance(value, str) else number(value, spec)


def sentence(text: str) -> str:
    """A capital at the start and a full stop at the end, where they are missing."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def prose(text: str) -> str:
    """True minus signs, and no line that ends between a number and its percent sign."""
    return re.sub(r"(?<![\w-])-(?=[\d.])", MINUS, text).replace(" %", "\N{NO-BREAK SPACE}%")


def criterion_name(criterion: Criterion) -> str:
    """The label, with a capital at its start."""
    return criterion.label[:1].upper() + criterion.label[1:]


def headline(verdict: Verdict) -> str:
    """The headline without the decision, which stands before it already."""
    return sentence(verdict.headline.removeprefix(f"{verdict.decision}: "))


def settled_by(criterion: Criterion) -> str:
    """What would decide a criterion that is not met, where that says more than its reason."""
    is_open = criterion.passed is not True and criterion.settled_by != criterion.reason
    return sentence(criterion.settled_by) if is_open and criterion.settled_by else ""


def fact(value: Any) -> str:
    """Like `words`, but integers without separators, because seeds are copied; parts are joined by commas."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {fact(part)}" for key, part in value.items()) or MISSING
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(fact(part) for part in value) or MISSING
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else words(value)


def stored(value: Any) -> Any:
    """The value as JSON and CSV hold it: infinity, which JSON lacks, as the text "Infinity"; NaN as None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: stored(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [stored(part) for part in value]
    return value
