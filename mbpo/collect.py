"""Real transitions for the replay store: a random-valid behaviour policy walks through history."""

from __future__ import annotations

import numpy as np

from data import DataError, FeatureTable, ReplaySchema, Scaler, Transitions
from envs import HistoryBatch, TradingDynamics

NUM_WALKS = 8
"""Walks side by side; each bar enters the store once per walk."""


def replay_schema(dynamics: TradingDynamics) -> ReplaySchema:
    """Schema of transitions of these dynamics."""
    return ReplaySchema(dynamics.obs_names, dynamics.state_names, dynamics.num_actions)


def collect_transitions(
    dynamics: TradingDynamics, scaler: Scaler, table: FeatureTable, *, seed: int, episode_bars: int
) -> Transitions:
    """Walk from the first to the last row with actions drawn uniformly from the valid ones.

    Args: table with T rows; a walk restarts flat when the kill switch latches or an episode ends.
    Returns: NUM_WALKS * (T - 1) transitions in time order, behaviour log-probability -log(number of valid actions).
    """
    rng = np.random.default_rng(seed)
    walks = HistoryBatch(dynamics, table.values, batch=NUM_WALKS, episode_bars=episode_bars)
    # Staggered ages, so that episodes do not all end on the same bar.
    walks.age = np.arange(NUM_WALKS) * episode_bars // NUM_WALKS
    times = table.timestamps.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]")
    columns: dict[str, list[np.ndarray]] = {}
    for row in range(walks.last_row):
        state, masks = walks.state, walks.action_masks
        # The largest of independent uniforms among the valid actions is a uniform choice among them.
        action = np.where(masks, rng.random(masks.shape), -1.0).argmax(axis=1)
        step = walks.step(action)
        entry = {
            "obs": np.asarray(scaler(state[:, :-1])),
            "state": state,
            "action": action,
            "action_masks": masks,
            "reward": step.reward.astype(np.float32),
            "next_obs": np.asarray(scaler(walks.state[:, :-1])),
            "next_state": walks.state,
            "next_action_masks": walks.action_masks,
            "terminated": step.terminated,
            "truncated": step.truncated,
            "behaviour_log_prob": (0.0 - np.log(masks.sum(axis=1))).astype(np.float32),
            "timestamp": np.repeat(times[row], NUM_WALKS),
        }
        for name, values in entry.items():
            columns.setdefault(name, []).append(values)
        done = np.flatnonzero(step.terminated | step.truncated)
        if len(done) and row + 1 < walks.last_row:
            walks.restart(done, np.full(len(done), row + 1))
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Transitions(schema=replay_schema(dynamics), symbol=np.full(len(joined["action"]), table.symbol), **joined)


def market_rows(transitions: Transitions, num_features: int) -> tuple[np.ndarray, np.ndarray]:
    """Feature rows that a set of transitions saw, each once and in time order.

    Returns: timestamps [T-1] and features [T, M] float64; the newest `next_state` is the last row.
    Raises: DataError if there is no transition.
    """
    if len(transitions) == 0:
        raise DataError("replay: expected transitions of the training window, found none")
    times, first = np.unique(transitions.timestamp, return_index=True)
    features = transitions.state[first, :num_features].astype(np.float64)
    newest = transitions.next_state[first[-1], :num_features].astype(np.float64)
    return times, np.concatenate((features, newest[None, :]))
