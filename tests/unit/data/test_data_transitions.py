"""Transitions: what breaks the schema is refused by column and row."""

import re

import numpy as np
import pytest
from replay_worlds import SCHEMA, columns, transitions

from data.errors import ReplayError
from data.transitions import DTYPES, ReplaySchema, Transitions


def refused(change: dict[str, np.ndarray], match: str) -> None:
    with pytest.raises(ReplayError, match=match):
        Transitions(schema=SCHEMA, **(columns(5) | change))


def test_valid_transitions_know_their_length_and_columns() -> None:
    batch = transitions(5)
    assert len(batch) == 5
    assert [name for name, _ in batch.columns()] == list(DTYPES)
    assert len(transitions(0)) == 0


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_column_must_have_its_shape(name: str) -> None:
    value = columns(5)[name]
    expected = re.escape(str(list(value.shape)))
    if name == "action":
        refused({name: value[:, None]}, r"action: expected shape \[5\], was \[5, 1\]")
        return
    refused({name: value[:4]}, rf"{name}: expected shape {expected}")
    refused({name: value.T if value.ndim == 2 else value[None]}, rf"{name}: expected shape {expected}")


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_column_must_have_its_dtype(name: str) -> None:
    value = columns(5)[name]
    others = {"f": np.float64, "i": np.int32, "b": np.int32, "M": "datetime64[ns]", "U": object}
    other = value.astype(others[value.dtype.kind])
    refused({name: other}, rf"{name}: expected {re.escape(DTYPES[name])}, was {re.escape(str(other.dtype))}")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["obs", "state", "reward", "next_obs", "next_state", "behaviour_log_prob"])
def test_numbers_must_be_finite(name: str, bad: float) -> None:
    value = columns(5)[name]
    value[3, ...] = bad
    refused({name: value}, f"{name}: row 3: expected finite numbers")


@pytest.mark.parametrize("name", ["action_masks", "next_action_masks"])
def test_hold_must_be_valid_in_every_mask(name: str) -> None:
    masks = columns(5)[name]
    masks[2, 0] = False
    refused({name: masks}, rf"{name}: row 2: expected Hold \(action 0\) valid")


def test_additive_masks_are_refused() -> None:
    masks = np.where(columns(5)["action_masks"], 0.0, -np.inf).astype(np.float32)
    refused({"action_masks": masks}, "action_masks: expected bool, was float32")


def test_forbidden_action_cannot_have_been_executed() -> None:
    change = columns(5)
    change["action_masks"][4, 6], change["action"][4] = False, 6
    refused(change, "action: row 4: expected an action that action_masks allows, was 6")


@pytest.mark.parametrize("action", [-1, 7])
def test_unknown_action_is_refused(action: int) -> None:
    actions = columns(5)["action"]
    actions[1] = action
    refused({"action": actions}, f"action: row 1: expected 0 to 6, was {action}")


def test_probability_above_one_is_refused_but_rounding_is_not() -> None:
    refused({"behaviour_log_prob": np.full(5, 0.1, np.float32)}, "behaviour_log_prob: row 0: expected at most 0")
    Transitions(schema=SCHEMA, **(columns(5) | {"behaviour_log_prob": np.full(5, 1e-7, np.float32)}))


def test_missing_time_is_refused() -> None:
    stamps = columns(5)["timestamp"]
    stamps[0] = np.datetime64("NaT")
    refused({"timestamp": stamps}, "timestamp: row 0: expected a time, was NaT")


def test_schema_hash_depends_on_names_order_and_actions() -> None:
    variants = [
        SCHEMA,
        ReplaySchema(("a", "c", "b"), SCHEMA.state_names, 7),
        ReplaySchema(SCHEMA.obs_names, ("a", "b", "c", "exposure"), 7),
        ReplaySchema(SCHEMA.obs_names, SCHEMA.state_names, 8),
    ]
    assert len({schema.hash for schema in variants}) == 4
    assert ReplaySchema.from_dict(SCHEMA.to_dict()).hash == SCHEMA.hash


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"obs_names": [], "state_names": ["a"], "num_actions": 7},
        {"obs_names": ["a", "a"], "state_names": ["a"], "num_actions": 7},
        {"obs_names": ["a"], "state_names": None, "num_actions": 7},
        {"obs_names": ["a"], "state_names": ["a"], "num_actions": 0},
    ],
)
def test_foreign_schema_is_refused(raw: dict[str, object]) -> None:
    with pytest.raises(ReplayError, match="schema"):
        ReplaySchema.from_dict(raw)
