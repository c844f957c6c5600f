import numpy as np
import pytest
from bundle_parts import make_dynamics, make_scaler

from export.states import boundary_values, probe_masks, probe_states
from masking.ruleset import rule_name

DYNAMICS = make_dynamics()


@pytest.fixture(scope="module")
def probes():
    return probe_states(DYNAMICS, make_scaler(), 2000, np.random.default_rng(0))


def test_boundary_values_hold_each_limit_and_its_float_neighbours():
    values = boundary_values(DYNAMICS)
    for limit in (0.08, 0.12, 0.15, 1.25, 0.6, 3.0, 0.6 + 1e-6):
        exact = np.float32(limit)
        for value in (exact, np.nextafter(exact, np.float32(-np.inf)), np.nextafter(exact, np.float32(np.inf))):
            assert value in values
    assert (np.diff(values) > 0).all()


def test_equal_seeds_give_equal_states(probes):
    again = probe_states(DYNAMICS, make_scaler(), 2000, np.random.default_rng(0))
    assert again.tobytes() == probes.tobytes()
    assert again.dtype == np.float32
    assert again.shape == (2000, 14)
    other = probe_states(DYNAMICS, make_scaler(), 2000, np.random.default_rng(1))
    assert other.tobytes() != probes.tobytes()


def test_every_rule_is_decisive_somewhere_and_every_action_is_valid_somewhere(probes):
    state = probes[np.isfinite(probes).all(axis=1)]
    columns = DYNAMICS.named_columns(state)
    blocked = DYNAMICS.rule_set.blocked(columns)
    for rule in DYNAMICS.rule_set.rules:
        name = rule_name(rule)
        if name in ("max_exposure", "paper_only_leverage"):
            # In paper mode no action of the table exceeds these limits.
            continue
        others = np.any([mask for other, mask in blocked.items() if other != name], axis=0)
        assert (blocked[name] & ~others).any(), name
    assert DYNAMICS.action_masks(state).any(axis=0).all()


def test_states_hit_limits_exactly_and_contain_broken_rows(probes):
    drawdown = probes[:, DYNAMICS.state_names.index("drawdown")]
    assert np.isin(drawdown, boundary_values(DYNAMICS)).sum() > 20
    broken = ~np.isfinite(probes).all(axis=1)
    assert 40 <= broken.sum() <= 200
    assert broken.sum() < 2000


def test_caller_masks_never_forbid_hold():
    masks = probe_masks(7, 500, np.random.default_rng(0))
    assert masks[:, 0].all()
    assert 200 <= masks.all(axis=1).sum() <= 320
