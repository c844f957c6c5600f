"""The filter against enumeration and closed forms, its calibration, and what it is worth."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from scipy.stats import lognorm, norm

from configs import DetentConfig
from configs.evaluation import SyntheticMarketConfig
from envs import TradingDynamics
from envs.panel import FeaturePanel
from envs.synthetic import SyntheticPanel, signal_persistence, simulate_panel, stationary_law, transition_matrix
from evaluation import BuyAndHold, backtest, evaluate
from evaluation.belief import BELIEF_FIELDS, BeliefPolicy, filter_beliefs, filtered_signal_std, with_beliefs
from evaluation.oracle import OraclePolicy, solve_oracle

LIVELY = {
    "duration_days": (6.0, 4.0, 3.0),
    "drift": (1.0, 0.0, -2.0),
    "jump_rate": (5.0, 20.0, 60.0),
    "signal_drift": 3.0,
    "signal_half_life_days": 3.0,
}
"""So short and strong that six bars show everything."""


def market_of(**changes: Any) -> SyntheticMarketConfig:
    return SyntheticMarketConfig.model_validate(changes)


def cut(panel: FeaturePanel, bars: int) -> FeaturePanel:
    return FeaturePanel(panel.timestamps[:bars], panel.fields, panel.values[:, :bars])


def column(panel: FeaturePanel, name: str) -> np.ndarray:
    return panel.values[:, :, panel.names.index(name)]


# --- exactness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", range(2))
def test_enumeration_of_all_regime_paths_gives_the_same_beliefs(path: int):
    market = market_of(**LIVELY)
    panel = cut(simulate_panel(market, paths=2, bars=60, seed=3).features, 6)
    beliefs = filter_beliefs(panel, market)
    for bars in range(1, 7):
        np.testing.assert_allclose(beliefs.regime[path, bars - 1], _enumerated(panel, market, path, bars), rtol=1e-9)


def _enumerated(panel: FeaturePanel, market: SyntheticMarketConfig, path: int, bars: int) -> np.ndarray:
    gap, intraday, spread, observed = (
        column(panel, name)[path, :bars] for name in ("gap_return", "intraday_return", "spread", "signal")
    )
    driving = [0.0, *(_conditional_signal(observed[:bar], market)[0] for bar in range(1, bars))]
    transition, law = transition_matrix(market), stationary_law(transition_matrix(market))
    belief = np.zeros(3)
    for regimes in product(range(3), repeat=bars):
        weight = law[regimes[0]]
        for before, after in pairwise(regimes):
            weight *= transition[before, after]
        for bar, regime in enumerate(regimes):
            mean = (market.drift[regime] + market.signal_drift * driving[bar]) / 252
            variance = market.volatility[regime] ** 2 / 252
            jump = market.jump_rate[regime] / 252
            quiet = norm.pdf(gap[bar], 0.2 * mean, (0.2 * variance) ** 0.5)
            jumped = norm.pdf(gap[bar], 0.2 * mean, (0.2 * variance + market.jump_std**2) ** 0.5)
            typical = market.spread_bps[regime] * 1e-4 * np.exp(-(market.spread_noise**2) / 2)
            weight *= (1 - jump) * quiet + jump * jumped
            weight *= norm.pdf(intraday[bar], 0.8 * mean, (0.8 * variance) ** 0.5)
            weight *= lognorm.pdf(spread[bar], market.spread_noise, scale=typical)
        belief[regimes[-1]] += weight
    return belief / belief.sum()


def _conditional_signal(observed: np.ndarray, market: SyntheticMarketConfig) -> tuple[float, float]:
    # Mean and variance of the last signal given all observations: a multivariate normal, conditioned at once.
    bars = np.arange(len(observed))
    covariance = signal_persistence(market) ** np.abs(bars[:, None] - bars)
    weights = np.linalg.solve(covariance + market.signal_noise**2 * np.eye(len(bars)), covariance[-1])
    return float(weights @ observed), float(1 - weights @ covariance[-1])


def test_signal_is_the_conditional_mean_of_the_joint_normal():
    market = market_of(signal_noise=1.3)
    panel = simulate_panel(market, paths=2, bars=60, seed=4).features
    beliefs = filter_beliefs(panel, market)
    for bars in (1, 2, 7, 60):
        mean, variance = _conditional_signal(column(panel, "signal")[1, :bars], market)
        assert beliefs.signal[1, bars - 1] == pytest.approx(mean, abs=1e-12)
        assert beliefs.variance[bars - 1] == pytest.approx(variance, abs=1e-12)


@pytest.mark.parametrize("noise", [0.0, 0.2, 1.0, 5.0])
def test_remaining_variance_settles_at_the_fixed_point(noise: float):
    market = market_of(signal_noise=noise)
    variance = filter_beliefs(simulate_panel(market, paths=1, bars=400, seed=5).features, market).variance
    assert variance[-1] == pytest.approx(1 - filtered_signal_std(market) ** 2, abs=1e-9)


def test_filtered_signal_is_an_autoregression_of_the_stated_deviation():
    market = market_of(signal_noise=1.0)
    signal = filter_beliefs(simulate_panel(market, paths=200, bars=1000, seed=6).features, market).signal[:, 100:]
    # 900 bars of half-life 10 count as about 900 / 29 independent ones: 6,200 in all, standard error of the std 1 %.
    assert signal.std() == pytest.approx(filtered_signal_std(market), rel=0.03)
    lagged = (signal[:, 1:] * signal[:, :-1]).mean() / np.square(signal).mean()
    assert lagged == pytest.approx(signal_persistence(market), abs=0.005)


def test_without_noise_the_filtered_signal_is_the_true_one():
    market = market_of(signal_noise=0.0)
    panel = simulate_panel(market, paths=3, bars=80, seed=7)
    beliefs = filter_beliefs(panel.features, market)
    np.testing.assert_allclose(beliefs.signal, panel.true_signal, atol=1e-12)
    assert filtered_signal_std(market) == 1.0


def test_regimes_that_look_alike_leave_the_stationary_law():
    same = {"drift": (0.05,) * 3, "volatility": (0.1,) * 3, "jump_rate": (2.0,) * 3, "spread_bps": (3.0,) * 3}
    market = market_of(**same)
    beliefs = filter_beliefs(simulate_panel(market, paths=2, bars=60, seed=8).features, market)
    law = stationary_law(transition_matrix(market))
    np.testing.assert_allclose(beliefs.regime, np.broadcast_to(law, (2, 60, 3)), atol=1e-9)


def test_spread_without_noise_names_the_regime():
    market = market_of(spread_noise=0.0)
    panel = simulate_panel(market, paths=3, bars=300, seed=9)
    beliefs = filter_beliefs(panel.features, market)
    np.testing.assert_allclose(np.take_along_axis(beliefs.regime, panel.regime[..., None].astype(int), 2), 1.0)


@pytest.mark.parametrize("changes", [{"jump_rate": (0.0, 0.0, 0.0)}, {"jump_std": 0.0}, {"duration_days": (1.0,) * 3}])
def test_impossible_events_leave_proper_beliefs(changes: dict[str, Any]):
    market = market_of(**changes)
    panel = simulate_panel(market, paths=2, bars=60, seed=10).features
    values = panel.values.copy()
    values[0, 20:23, panel.names.index("gap_return")] = -0.5  # hundreds of standard deviations, without a jump
    beliefs = filter_beliefs(FeaturePanel(panel.timestamps, panel.fields, values), market)
    assert (beliefs.regime >= 0).all()
    np.testing.assert_allclose(beliefs.regime.sum(axis=2), 1.0)


def test_beliefs_use_no_later_bar():
    market = market_of()
    panel = simulate_panel(market, paths=2, bars=60, seed=11).features
    values = panel.values.copy()
    values[:, 30:] *= 3.0
    before, after = (
        filter_beliefs(FeaturePanel(panel.timestamps, panel.fields, rows), market) for rows in (panel.values, values)
    )
    np.testing.assert_array_equal(before.regime[:, :30], after.regime[:, :30])
    np.testing.assert_array_equal(before.signal[:, :30], after.signal[:, :30])
    assert not np.allclose(before.regime[:, 30:], after.regime[:, 30:])


def test_beliefs_are_calibrated():
    market = market_of()
    panel = simulate_panel(market, paths=400, bars=500, seed=12)
    believed = filter_beliefs(panel.features, market).regime
    for regime in range(3):
        hit = panel.regime == regime
        bins = np.digitize(believed[..., regime], [0.05, 0.2, 0.5, 0.8, 0.95])
        for place in range(6):
            # Bars of one path depend on each other, paths do not: one error and one standard error per path.
            error = np.where(bins == place, hit - believed[..., regime], 0.0).sum(axis=1)
            assert abs(error.mean()) < 4 * error.std(ddof=1) / 20


# --- the policy -------------------------------------------------------------------------------------------


def test_certain_beliefs_choose_as_the_oracle_does():
    market = market_of(signal_noise=0.0)
    panel = simulate_panel(market, paths=4, bars=120, seed=13)
    certain = np.concatenate((np.eye(3)[panel.regime], panel.true_signal[..., None]), axis=2)
    wide = panel.with_truth().widened(BELIEF_FIELDS, certain)
    dynamics = TradingDynamics.from_config(wide.names, DetentConfig())
    solution = solve_oracle(market, dynamics)
    believer, knower = (
        backtest(dynamics, wide.values, wide.timestamps, policy(dynamics, solution))
        for policy in (BeliefPolicy, OraclePolicy)
    )
    np.testing.assert_array_equal(believer.actions, knower.actions)
    assert (believer.actions != 0).any()


def test_an_undecided_belief_weighs_the_regimes():
    market = market_of(drift=(0.5, 0.0, -0.5), volatility=(0.1,) * 3, signal_drift=0.0)
    names = ("gap_return", "intraday_return", "volatility_20", *(field.name for field in BELIEF_FIELDS))
    dynamics = TradingDynamics.from_config(names, DetentConfig())
    state = np.zeros((3, len(dynamics.state_names)), dtype=np.float32)
    state[:, 3:6] = [[0.9, 0.0, 0.1], [0.5, 0.0, 0.5], [0.1, 0.0, 0.9]]
    policy = BeliefPolicy(dynamics, solve_oracle(market, dynamics))
    sure, torn, afraid = policy.act(state, dynamics.action_masks(state))
    assert sure == 3  # half: the largest step that one decision allows
    assert torn == 0
    assert afraid == 0


def test_oracle_beats_filter_beats_buy_and_hold():
    # Standard errors of the differences are about 0.06 here; the margins are several of them.
    market = market_of(signal_noise=1.5, signal_drift=0.3)
    panel = simulate_panel(market, paths=60, bars=1500, seed=14)
    oracle = _sharpe(panel.with_truth(), market, OraclePolicy, 1.0)
    believer = _sharpe(with_beliefs(panel.features, market), market, BeliefPolicy, filtered_signal_std(market))
    passive = _sharpe(panel.features, market, lambda dynamics, _: BuyAndHold(dynamics), 1.0)
    assert oracle > believer + 0.1
    assert believer > passive + 0.5


def _sharpe(panel: FeaturePanel, market: SyntheticMarketConfig, policy: Any, signal_std: float) -> float:
    dynamics = TradingDynamics.from_config(panel.names, DetentConfig())
    solution = solve_oracle(market, dynamics, signal_std=signal_std)
    metrics = evaluate(backtest(dynamics, panel.values, panel.timestamps, policy(dynamics, solution)), 252)
    assert metrics.invalid_actions == 0
    return metrics.sharpe


# --- errors -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> SyntheticPanel:
    return simulate_panel(market_of(), paths=1, bars=60, seed=15)


def test_missing_columns_are_named(small: SyntheticPanel):
    panel = small.features
    narrow = FeaturePanel(panel.timestamps, panel.fields[:2], panel.values[:, :, :2])
    with pytest.raises(ValueError, match=r"panel: expected columns .*, missing \['signal', 'spread'\]"):
        filter_beliefs(narrow, market_of())
    dynamics = TradingDynamics.from_config(panel.names, DetentConfig())
    with pytest.raises(ValueError, match=r"missing \['filtered_signal', 'belief_calm'"):
        BeliefPolicy(dynamics, solve_oracle(market_of(), dynamics))


@pytest.mark.parametrize(
    "changes",
    [{"volatility": (0.0, 0.1, 0.2)}, {"gap_share": 0.0}, {"gap_share": 1.0}, {"spread_bps": (0.0, 1.0, 2.0)}],
)
def test_markets_without_densities_are_refused(small: SyntheticPanel, changes: dict[str, Any]):
    market = SyntheticMarketConfig.model_construct(**(market_of().model_dump() | changes))
    with pytest.raises(ValueError, match="market: expected volatility and spread_bps > 0 and 0 < gap_share < 1"):
        filter_beliefs(small.features, market)
