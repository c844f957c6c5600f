"""Pictures of a report: who is drawn, on which market, from where an account starts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from report_findings import (
    CONFIG,
    TESTS,
    bars,
    findings,
    fold_findings,
    market,
    shown,
)

from benchmarks import report_pictures
from benchmarks.report_pictures import equity, first_market, fold_market, world_model
from benchmarks.walk_forward import panel_of
from evaluation.report.figures import equity_fan


def test_equity_and_one_market_are_drawn_for_the_pair_of_the_claim():
    assert shown(equity(findings().main, market()))[1] == ["Equity and drawdown"]
    section = first_market(CONFIG, findings(), market())
    assert shown(section)[1] == ["Regimes and positions", "Masks and choices"]
    assert "mbpo" in section.figures[1].alt


def test_calibration_is_drawn_where_there_is_a_world_model():
    (section,) = world_model(findings())
    assert shown(section)[1] == ["Calibration of the world model"]
    assert "on the first validation market, by the world model of the first training run" in section.figures[0].caption
    assert world_model(replace(findings(), first_path={})) == ()


def test_test_windows_are_one_market_that_keeps_its_price_and_says_where_folds_start():
    market = fold_market(panel_of(bars()), TESTS)
    assert market.starts == (31, 62)
    assert (len(market.timestamps), market.regime, market.names) == (93, None, bars().names)
    np.testing.assert_allclose(market.price[[0, 30, 31, 92]], np.exp(0.01 * np.array([0, 30, 90, 151])))
    assert market.timestamps[31] == bars().timestamps[100].tz_localize(None).to_datetime64()


def test_an_account_of_a_fold_starts_with_what_the_last_one_left(monkeypatch):
    drawn = {}

    def draw(timestamps, curves, *, unit, starts):
        drawn.update(curves)
        assert (len(timestamps), unit, starts) == (93, "training run", (31, 62))
        return equity_fan(timestamps, curves, unit=unit, starts=starts)

    monkeypatch.setattr(report_pictures, "equity_fan", draw)
    equity(fold_findings().main, fold_market(panel_of(bars()), TESTS))
    made = fold_findings().main.policies["mbpo"].returns[:, 0].astype(np.float64)
    grown = np.cumprod(1.0 + made, axis=1)
    np.testing.assert_allclose(
        drawn["mbpo"][:, [0, 30, 31, 32, 61, 62, 92]].T,
        np.stack([np.ones(2), grown[:, 29], grown[:, 29], grown[:, 30], grown[:, 59], grown[:, 59], grown[:, 89]]),
    )
