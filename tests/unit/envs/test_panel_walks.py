"""Several markets on one clock: each walk sees its own, and equals the same walk over that market alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from envs_worlds import dynamics, market, random_valid

from data import Field
from envs import HistoryBatch, account_step
from envs.panel import FeaturePanel


def three_markets(bars: int = 40) -> np.ndarray:
    rng = np.random.default_rng(5)
    panel = np.stack([market(bars)] * 3)
    panel[..., :2] = rng.normal(0.0, 0.02, (3, bars, 2))
    return panel


def test_each_walk_equals_the_walk_over_its_market_alone() -> None:
    panel = three_markets()
    disagreement = np.random.default_rng(6).random(panel.shape[:2])
    together = HistoryBatch(dynamics(), panel, disagreement, batch=6)
    alone = [HistoryBatch(dynamics(), panel[b % 3], disagreement[b % 3], batch=1) for b in range(6)]
    rng = np.random.default_rng(7)
    for _ in range(together.last_row):
        actions = random_valid(together.action_masks, rng)
        step = together.step(actions)
        for b, walk in enumerate(alone):
            single = walk.step(actions[b : b + 1])
            assert single.reward[0] == step.reward[b]
            np.testing.assert_array_equal(walk.state[0], together.state[b])
            np.testing.assert_array_equal(walk.action_masks[0], together.action_masks[b])


def test_a_panel_of_another_width_or_disagreement_of_another_shape_is_refused() -> None:
    panel = three_markets()
    with pytest.raises(ValueError, match=r"features: expected \[T >= 2, \d+\] or \[P, T, \d+\], was \[3, 40, \d+\]"):
        HistoryBatch(dynamics(), panel[..., :-1], batch=3)
    with pytest.raises(ValueError, match=r"uncertainty: expected \[3, 40\], was \[40\]"):
        HistoryBatch(dynamics(), panel, np.zeros(40), batch=3)


# --- a quoted spread -----------------------------------------------------------------------------------------


def test_a_trade_pays_its_share_of_the_spread_of_the_bar_it_trades_in() -> None:
    world = dynamics()
    rules = replace(world.account_rules, cost_rate=0.001, spread_share=0.5)
    account = HistoryBatch(world, market(5), batch=3).account
    still = np.zeros(3)
    # Half of the equity is bought: 0.5 * (0.001 + 0.5 * spread). Nothing traded costs nothing; a negative spread too.
    _, outcome = account_step(account, np.array([3, 0, 3]), still, still, rules, np.array([0.004, 0.004, -0.004]))
    np.testing.assert_allclose(outcome.cost, [0.0015, 0.0, 0.0005], rtol=1e-12)


def test_a_spread_that_is_charged_has_to_be_a_feature() -> None:
    world = dynamics()
    assert "spread" not in world.feature_names
    with pytest.raises(ValueError, match="feature_names: expected gap_return, intraday_return, spread, missing"):
        replace(world, account_rules=replace(world.account_rules, spread_share=0.5))


def test_the_dynamics_charge_the_spread_of_the_next_row() -> None:
    world = dynamics()
    names = (*world.feature_names, "spread")
    charged = replace(
        world, feature_names=names, account_rules=replace(world.account_rules, cost_rate=0.0, spread_share=1.0)
    )
    rows = np.concatenate((market(4), np.array([[9.0], [0.01], [9.0], [9.0]])), axis=1)
    walk = HistoryBatch(charged, rows, batch=1)
    assert walk.step(np.array([3])).outcome.cost[0] == pytest.approx(0.005, rel=1e-12)


# --- the panel -----------------------------------------------------------------------------------------------


FIELDS = tuple(Field(name, "market", "1", -1.0, 1.0, "x") for name in ("a", "b"))
TIMES = np.arange("2020-01-01", "2020-01-05", dtype="datetime64[D]")


def test_a_panel_is_cut_and_widened_without_touching_its_columns() -> None:
    values = np.arange(24.0).reshape(3, 4, 2)
    panel = FeaturePanel(TIMES, FIELDS, values)
    assert (len(panel), panel.names) == (3, ("a", "b"))
    np.testing.assert_array_equal(panel.first_paths(2).values, values[:2])
    assert len(panel.first_paths(9)) == 3
    wider = panel.widened([replace(FIELDS[0], name="c")], np.full((3, 4, 1), 7.0))
    assert wider.names == ("a", "b", "c")
    np.testing.assert_array_equal(wider.values[..., :2], values)
    assert (wider.values[..., 2] == 7.0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": np.zeros((3, 5, 2))}, r"values: expected \[P >= 1, T, M\] = \[3, 4, 2\], was \[3, 5, 2\]"),
        ({"values": np.zeros((0, 4, 2))}, "values: expected"),
        ({"fields": (FIELDS[0], FIELDS[0])}, r"fields: expected each name once, repeated \['a'\]"),
        ({"timestamps": TIMES[::-1]}, "timestamps: expected ascending"),
        ({"values": np.full((3, 4, 2), [0.0, np.nan])}, "values: expected finite numbers, column 'b'"),
    ],
)
def test_a_malformed_panel_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeaturePanel(**{"timestamps": TIMES, "fields": FIELDS, "values": np.zeros((3, 4, 2)), **change})  # type: ignore[arg-type]
