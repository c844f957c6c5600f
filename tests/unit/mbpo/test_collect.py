from __future__ import annotations

import numpy as np
import pytest
from mbpo_worlds import make_dynamics, make_features, make_scaler, make_table

from data import DataError
from mbpo import collect_transitions, market_rows
from mbpo.collect import NUM_WALKS

DYNAMICS = make_dynamics()
SCALER = make_scaler(make_features(100))


def test_every_row_is_visited_once_per_walk_and_every_action_is_valid() -> None:
    transitions = collect_transitions(DYNAMICS, SCALER, make_table(50), seed=0, episode_bars=20)
    assert len(transitions) == NUM_WALKS * 49
    _, counts = np.unique(transitions.timestamp, return_counts=True)
    assert (counts == NUM_WALKS).all()
    assert transitions.action_masks[np.arange(len(transitions)), transitions.action].all()


def test_behaviour_log_prob_is_that_of_a_uniform_choice_among_valid_actions() -> None:
    transitions = collect_transitions(DYNAMICS, SCALER, make_table(50), seed=0, episode_bars=20)
    np.testing.assert_allclose(
        np.exp(transitions.behaviour_log_prob), 1 / transitions.action_masks.sum(axis=1), rtol=1e-6
    )


def test_episodes_are_truncated_not_terminated_and_restart_flat() -> None:
    transitions = collect_transitions(DYNAMICS, SCALER, make_table(60), seed=0, episode_bars=10)
    ends = transitions.truncated.reshape(-1, NUM_WALKS)
    assert ends.any(axis=0).all()
    assert not transitions.terminated.any()
    row, walk = np.argwhere(ends[:-1])[0]
    following = transitions.state.reshape(-1, NUM_WALKS, transitions.state.shape[1])[row + 1, walk]
    assert following[DYNAMICS.state_names.index("position")] == 0


def test_market_rows_give_back_the_feature_table() -> None:
    table = make_table(30)
    transitions = collect_transitions(DYNAMICS, SCALER, table, seed=0, episode_bars=10)
    times, features = market_rows(transitions, 4)
    np.testing.assert_array_equal(features, table.values.astype(np.float32))
    assert len(times) == 29


def test_transitions_depend_on_bars_and_seed_only() -> None:
    first, again, other = (
        collect_transitions(DYNAMICS, SCALER, make_table(40), seed=seed, episode_bars=10) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.state, again.state)
    assert not np.array_equal(first.action, other.action)


def test_no_transitions_is_bad_data() -> None:
    transitions = collect_transitions(DYNAMICS, SCALER, make_table(5), seed=0, episode_bars=10)
    with pytest.raises(DataError, match="found none"):
        market_rows(transitions.rows(np.zeros(len(transitions), bool)), 4)
