"""The GARCH-t market: its moments against closed forms, and everything else as in the synthetic market.

Tolerances are four standard errors over independent paths or bars.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import kstest

from configs.evaluation import GarchConfig, SyntheticMarketConfig
from envs.garch import simulate_garch_panel
from envs.synthetic import MARKET_FIELDS, SyntheticPanel, simulate_panel

MARKET = SyntheticMarketConfig()
SILENT = MARKET.model_copy(update={"signal_drift": 0.0})
TAME = GarchConfig(alpha=0.05, beta=0.90, degrees_of_freedom=12.0, drift=0.0)
"""A process whose fourth moment is finite, so that its sample moments settle; the defaults have none."""
UNIT = 0.16 / math.sqrt(252)
"""Unconditional standard deviation of a daily bar."""


@pytest.fixture(scope="module")
def tame() -> np.ndarray:
    """[100, 2500] close-to-close returns in unconditional standard deviations."""
    gap, intraday = parts(simulate_garch_panel(SILENT, TAME, paths=100, bars=2500, seed=3))
    return (gap + intraday) / UNIT


def parts(panel: SyntheticPanel) -> tuple[np.ndarray, np.ndarray]:
    """Gap and intraday log returns [P, T]."""
    return panel.features.values[:, :, 0], panel.features.values[:, :, 1]


def close_to(sample: np.ndarray, expected: float) -> bool:
    return abs(sample.mean() - expected) < 4.0 * sample.std(ddof=1) / math.sqrt(sample.size)


def test_the_unconditional_volatility_is_the_configured_one(tame: np.ndarray) -> None:
    assert close_to(np.square(tame).mean(axis=1), 1.0)


def test_a_year_of_minutes_is_as_volatile_as_a_year_of_days() -> None:
    minutes = SILENT.model_copy(update={"bars_per_day": 390})
    gap, intraday = parts(simulate_garch_panel(minutes, TAME, paths=40, bars=1950, seed=5))
    assert close_to((np.square(gap + intraday) * 252 * 390).mean(axis=1), 0.16**2)


def test_tails_are_as_heavy_as_the_fourth_moment_says(tame: np.ndarray) -> None:
    # He and Terasvirta (1999): k (1 - (a+b)^2) / (1 - k a^2 - 2ab - b^2), k = 3 (12-2)/(12-4) of the innovations.
    innovation = 3.75
    kurtosis = innovation * (1 - 0.95**2) / (1 - innovation * 0.05**2 - 2 * 0.05 * 0.90 - 0.90**2)
    assert kurtosis == pytest.approx(4.0345, abs=1e-4)
    assert close_to((tame**4).mean(axis=1), kurtosis)


def test_volatility_clusters_as_long_as_the_persistence_says(tame: np.ndarray) -> None:
    # Bollerslev (1986): correlation of squares a (1 - ab - b^2) / (1 - 2ab - b^2) at lag 1, times a + b per lag more.
    first = 0.05 * (1 - 0.05 * 0.90 - 0.90**2) / (1 - 2 * 0.05 * 0.90 - 0.90**2)
    assert first == pytest.approx(0.0725)
    square = np.square(tame) - 1.0
    for lag in (1, 10):
        # Zero in the mean where the correlation is the expected one.
        assert close_to(
            (square[:, lag:] * square[:, :-lag] - first * 0.95 ** (lag - 1) * square[:, lag:] ** 2).mean(1), 0
        )
    assert close_to(tame[:, 1:] * tame[:, :-1], 0.0)


def test_without_feedback_returns_are_student_t() -> None:
    plain = GarchConfig(alpha=0.0, beta=0.0, degrees_of_freedom=5.0, drift=0.0)
    gap, intraday = parts(simulate_garch_panel(SILENT, plain, paths=10, bars=2000, seed=7))
    # A t with 5 degrees of freedom has variance 5/3.
    standard = (gap + intraday).ravel() / UNIT
    assert kstest(standard * math.sqrt(5 / 3), "t", args=(5,)).pvalue > 1e-3
    assert kstest(standard, "norm").pvalue < 1e-3


def test_default_returns_cluster_and_have_heavier_tails_than_regimes_with_jumps() -> None:
    garch = np.add(*parts(simulate_garch_panel(SILENT, GarchConfig(), paths=30, bars=2500, seed=9)))
    regimes = np.add(*parts(simulate_panel(SILENT, paths=30, bars=2500, seed=9)))
    # Share of bars beyond five deviations of their path: moments of the default process do not settle.
    beyond = [(np.abs(total) > 5.0 * total.std(axis=1, keepdims=True)).mean() for total in (garch, regimes)]
    assert beyond[0] > 1.5 * beyond[1] > 0.0
    size = np.abs(garch) - np.abs(garch).mean(axis=1, keepdims=True)
    assert (size[:, 1:] * size[:, :-1]).mean() / np.square(size).mean() > 0.1


def test_drift_and_signal_move_the_mean_of_gap_and_intraday_return() -> None:
    drifting = GarchConfig(alpha=0.05, beta=0.90, degrees_of_freedom=12.0, drift=0.6)
    market = MARKET.model_copy(update={"signal_drift": 1.0})
    panel = simulate_garch_panel(market, drifting, paths=50, bars=2500, seed=11)
    before = panel.true_signal[:, :-1]
    for response, share in zip(parts(panel), (0.2, 0.8), strict=True):
        assert close_to(response[:, 1:] * 252 - share * before, share * 0.6)
        assert close_to((response[:, 1:] * 252 - share * (0.6 + before)) * before, 0.0)


def test_gap_and_intraday_share_the_variance_and_are_uncorrelated() -> None:
    gap, intraday = parts(simulate_garch_panel(SILENT, TAME, paths=100, bars=1000, seed=13))
    assert close_to(np.square(gap / UNIT).mean(axis=1), 0.2)
    assert close_to(np.square(intraday / UNIT).mean(axis=1), 0.8)
    assert close_to((gap * intraday).mean(axis=1) / UNIT**2, 0.0)


def test_there_are_no_regimes_and_no_jumps() -> None:
    quiet = GarchConfig(annual_volatility=1e-9, drift=0.0)
    panel = simulate_garch_panel(SILENT, quiet, paths=20, bars=1000, seed=15)
    assert np.abs(parts(panel)).max() < 1e-6
    assert (panel.regime == 0).all()
    spread = panel.features.values[:, :, panel.features.names.index("spread")]
    assert close_to(spread, 1e-4)


def test_rows_fields_and_truth_are_those_of_the_synthetic_market() -> None:
    panel = simulate_garch_panel(MARKET, GarchConfig(), paths=3, bars=60, seed=17)
    assert panel.features.fields == MARKET_FIELDS
    assert panel.with_truth().values.shape == (3, 60, len(MARKET_FIELDS) + 2)


def test_a_seed_fixes_every_number_and_numpys_global_generator_is_left_alone() -> None:
    np.random.seed(1)  # noqa: NPY002  what somebody else may have done
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    one = simulate_garch_panel(SILENT, GarchConfig(), paths=2, bars=100, seed=19).features.values
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
    np.random.seed(2)  # noqa: NPY002
    same, other = (simulate_garch_panel(SILENT, GarchConfig(), paths=2, bars=100, seed=seed) for seed in (19, 20))
    np.testing.assert_array_equal(one, same.features.values)
    assert (one != other.features.values).any(axis=1).all()
    # The sum of both parts is the GARCH return alone, without the noise of its split at the open.
    assert (np.abs((one - other.features.values)[:, :, :2].sum(axis=2)) > 1e-9).all()
    assert (one[0, :, 0] != one[1, :, 0]).all()


def test_a_path_does_not_depend_on_how_many_there_are() -> None:
    many, few = (simulate_garch_panel(MARKET, GarchConfig(), paths=paths, bars=100, seed=21) for paths in (4, 2))
    np.testing.assert_allclose(few.with_truth().values, many.with_truth().values[:2], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"paths": 0, "bars": 100}, "paths: expected >= 1, was 0"),
        ({"paths": 1, "bars": 59}, "bars: expected >= 60, was 59"),
    ],
)
def test_too_few_paths_or_bars_are_refused(size: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate_garch_panel(MARKET, GarchConfig(), **size, seed=0)
