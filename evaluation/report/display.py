"""Values as people read them: rounded, with a true minus sign, and a dash where there is none."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.verdict import Criterion, Decision, Verdict

MISSING, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
VERDICT_MARKS = {True: ("✓", "met"), False: ("✗", "not met"), None: ("?", "cannot be decided")}
"""A sign and words for `Criterion.passed`: colour is never all there is."""
CODE = re.compile(r"(`[\w .,:=/+-]+`)")
"""Code within text, its backticks included: of characters that mean nothing to HTML or Markdown."""


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
    """A capital at the start and a full stop at the end."""
    return _capital(text) + _stop(text)


def prose(text: str) -> str:
    """True minus signs, and no line that ends before one or before a percent sign; code stays as it is."""
    return "".join(part if index % 2 else _typeset(part) for index, part in enumerate(CODE.split(text)))


def _typeset(text: str) -> str:
    signed = re.sub(r"(?<![\w-])-(?=[\d.])", MINUS, text)
    return signed.replace(" - ", f"\N{NO-BREAK SPACE}{MINUS} ").replace(" %", "\N{NO-BREAK SPACE}%")


def criterion_name(criterion: Criterion) -> str:
    """The label, with a capital at its start."""
    question = criterion.question
    return _capital(f"{question.label} ({question.detail})" if question.detail else question.label)


def observed(criterion: Criterion) -> tuple[str, str]:
    """What is held against the threshold, and its value with the unit: "upper end of the difference", "+66.6 %"."""
    return criterion.question.measure, _with_unit(criterion, criterion.observed, criterion.question.format)


def asked(criterion: Criterion) -> tuple[str, str]:
    """The side of the threshold that is asked for, and the threshold with its unit: "allowed below", "+2.0 %"."""
    question, threshold = criterion.question, criterion.threshold
    is_whole = math.isfinite(threshold) and float(threshold).is_integer()
    return question.asked, _with_unit(criterion, threshold, "" if is_whole else question.format)


def unmet(verdict: Verdict) -> str:
    """Why it is not GO, by labels: of what is not met and, where the answer is not no already, of what is open."""
    parts = []
    answers = {False: "not met"} if verdict.decision == Decision.NO_GO else {False: "not met", None: "open"}
    for answer, said in answers.items():
        labels = [one.question.label for one in verdict.criteria if one.passed is answer and one.question.decides]
        if labels:
            parts.append(f"{said}: {', '.join(labels)}")
    return "; ".join(parts) or "all met"


def headline(verdict: Verdict) -> str:
    """The headline without the decision, which stands before it already; its first word, a name, stays as it is."""
    text = verdict.headline.removeprefix(f"{verdict.decision}: ")
    return text + _stop(text)


def settled_by(criterion: Criterion) -> str:
    """What would decide a criterion that is not met, where that says more than its reason."""
    is_open = criterion.passed is not True and criterion.settled_by != criterion.reason
    return sentence(criterion.settled_by) if is_open and criterion.settled_by else ""


def _with_unit(criterion: Criterion, value: float, spec: str) -> str:
    text = number(value, spec).replace("%", " %")
    unit = criterion.question.unit
    return text if text == MISSING or not unit else f"{text} {unit}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _stop(text: str) -> str:
    return "" if text.endswith((".", "!", "?")) else "."


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
