"""Small valid transitions for the replay tests."""

from typing import Any

import numpy as np

from data.transitions import ReplaySchema, Transitions

SCHEMA = ReplaySchema(obs_names=("a", "b", "c"), state_names=("a", "b", "c", "position"), num_actions=7)


def columns(num_rows: int, seed: int = 0, start: str = "2024-01-01") -> dict[str, Any]:
    """Valid columns of `num_rows` daily decisions from `start` on."""
    rng = np.random.default_rng(seed)
    masks = rng.random((num_rows, 7)) < 0.5
    next_masks = rng.random((num_rows, 7)) < 0.5
    masks[:, 0] = next_masks[:, 0] = True
    action = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks], dtype=np.int64)
    return {
        "obs": rng.uniform(-1, 1, (num_rows, 3)).astype(np.float32),
        "state": rng.normal(size=(num_rows, 4)).astype(np.float32),
        "action": action,
        "action_masks": masks,
        "reward": rng.normal(size=num_rows).astype(np.float32),
        "next_obs": rng.uniform(-1, 1, (num_rows, 3)).astype(np.float32),
        "next_state": rng.normal(size=(num_rows, 4)).astype(np.float32),
        "next_action_masks": next_masks,
        "terminated": rng.random(num_rows) < 0.1,
        "truncated": rng.random(num_rows) < 0.1,
        "behaviour_log_prob": np.log(rng.uniform(0.01, 1.0, num_rows)).astype(np.float32),
        "timestamp": np.datetime64(start, "us") + np.arange(num_rows) * np.timedelta64(1, "D"),
        "symbol": np.array(["sp500", "é"] * num_rows, dtype=np.str_)[:num_rows],
    }


def transitions(num_rows: int, seed: int = 0, start: str = "2024-01-01") -> Transitions:
    """Valid transitions of `num_rows` daily decisions from `start` on."""
    return Transitions(schema=SCHEMA, **columns(num_rows, seed, start))


def same(left: Transitions, right: Transitions) -> bool:
    """Equal schema and equal values of equal dtype in every column."""
    pairs = zip(left.columns(), right.columns(), strict=True)
    return left.schema == right.schema and all(
        a.dtype.kind == b.dtype.kind and np.array_equal(a, b) for (_, a), (_, b) in pairs
    )
