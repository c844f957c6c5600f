"""Field: what it accepts and that JSON keeps it."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.fields import Field
from data.files import canonical_json


@settings(deadline=None, derandomize=True)
@given(
    low=st.floats(allow_nan=False, max_value=0.0, exclude_max=True),
    high=st.floats(allow_nan=False, min_value=0.0),
    name=st.text(min_size=1),
    group=st.sampled_from(["market", "signals", "account", "uncertainty"]),
)
def test_json_round_trip_is_exact(low: float, high: float, name: str, group: str) -> None:
    field = Field(name, group, "unit", low, high, "what it is")
    assert Field.from_dict(json.loads(canonical_json(field.to_dict()))) == field


def test_infinite_bounds_become_null() -> None:
    assert Field("a", "market", "1", -math.inf, math.inf, "").to_dict()["low"] is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"name": ""}, "name"),
        ({"group": "risk"}, "group: expected one of .*'account'.* was 'risk'"),
        ({"low": 1.0}, "low < high, was low=1.0, high=1.0"),
        ({"low": math.nan}, "low < high"),
    ],
)
def test_contradictions_are_refused(change: dict[str, object], match: str) -> None:
    good = {"name": "a", "group": "market", "unit": "1", "low": 0.0, "high": 1.0, "description": ""}
    with pytest.raises(ValueError, match=match):
        Field(**(good | change))


@pytest.mark.parametrize(
    "change", [{"extra": 1}, {"unit": None}, {"low": "x"}, {"high": [1]}, {"group": "risk"}, {"name": 3}]
)
def test_foreign_json_is_a_data_error(change: dict[str, object]) -> None:
    raw = Field("a", "market", "1", 0.0, 1.0, "").to_dict()
    with pytest.raises(DataError):
        Field.from_dict(raw | change)
    with pytest.raises(DataError, match="expected keys"):
        Field.from_dict({})
