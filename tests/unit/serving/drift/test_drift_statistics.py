"""Statistics of the drift monitor, against SciPy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
from drift_parts import WINDOW, autoregressions, verdict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serving.drift import statistics
from serving.drift.monitor import DriftReference


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.int64, 40, elements=st.integers(0, 30)),
    hnp.arrays(np.int64, 90, elements=st.integers(0, 30)),
)
def test_distance_is_scipys_where_every_value_has_a_bin_of_its_own(ours, theirs):
    counts = [np.bincount(sample, minlength=31) for sample in (ours, theirs)]
    expected = scipy.stats.ks_2samp(ours, theirs, method="asymp").statistic
    assert statistics.kolmogorov_distance(*counts) == pytest.approx(expected, abs=1e-12)


def test_p_value_is_kolmogorovs():
    scaled = np.concatenate((np.linspace(0.0, 3.0, 61), [5.0, 20.0]))
    np.testing.assert_allclose(statistics.kolmogorov_p(scaled), scipy.special.kolmogorov(scaled), atol=1e-12)


@pytest.mark.parametrize("degrees", [3.0, 5.0, 11.0, 30.0, 95.0])
@pytest.mark.parametrize("level", [0.9, 0.99, 0.9967, 0.99967])
def test_student_quantile_is_scipys_and_errs_on_the_quiet_side(degrees, level):
    expected = scipy.stats.t.ppf(level, degrees)
    assert statistics.student_quantile(level, degrees) == pytest.approx(expected, rel=0.03 if degrees >= 5.0 else 0.12)


def test_limit_of_many_windows_is_that_of_the_distribution_with_these_moments():
    draws = np.random.default_rng(0).gumbel(size=200_000)
    tail = statistics.Tail.fit(draws, len(draws))
    for rate in (0.01, 0.001):
        assert (draws > tail.limit(rate)).mean() == pytest.approx(rate, rel=0.35)
    symmetric = statistics.Tail(mean=2.0, std=3.0, skew=0.0, windows=1e9)
    assert symmetric.limit(0.01) == pytest.approx(scipy.stats.norm.ppf(0.99, 2.0, 3.0), abs=1e-6)


def test_fewer_windows_put_the_limit_further_out():
    limits = [statistics.Tail(mean=0.0, std=1.0, skew=0.3, windows=n).limit(0.001) for n in (4.0, 8.0, 20.0, 60.0)]
    assert limits == sorted(limits, reverse=True)
    # Two sources of doubt: the spread is an estimate, and so is the mean.
    four = statistics.Tail(mean=0.0, std=1.0, skew=0.0, windows=4.0)
    assert four.limit(0.001) == pytest.approx(statistics.student_quantile(0.999, 5.0) * np.sqrt(1.0 + 1.0 / 4.0))


def test_stability_index_by_hand():
    # 8 and 2 of 10 rows, half a row added to each of 2 bins; 1 and 1 of 2.
    possible = np.array([True, True])
    found = statistics.stability_index(np.array([8, 2]), np.array([1, 1]), possible)
    assert found == pytest.approx((8.5 / 11 - 0.5) * np.log(8.5 / 5.5) + (2.5 / 11 - 0.5) * np.log(2.5 / 5.5))
    assert statistics.stability_index(np.array([5, 5]), np.array([5, 5]), possible) == 0.0
    # A bin between equal edges is none.
    void = statistics.stability_index(np.array([8, 0, 2]), np.array([1, 0, 1]), np.array([True, False, True]))
    assert void == pytest.approx(found)


def test_fit_compares_each_window_with_the_rows_outside_it():
    rows = np.random.default_rng(20).standard_normal(240).astype(np.float32)
    reference = DriftReference.fit(["noise"], rows[:, None])
    cuts = reference.edges[0]
    assert cuts.tolist() == np.sort(rows)[[2, 23, 47, 71, 95, 119, 143, 167, 191, 215, 237]].tolist()
    psi, roots = [], []
    for start in range(181):
        inside = np.isin(np.arange(240), np.arange(start, start + WINDOW))
        ours, theirs = (
            np.bincount(np.searchsorted(cuts, part), minlength=12) for part in (rows[inside], rows[~inside])
        )
        p, q = (ours + 0.5) / 66, (theirs + 0.5) / 186
        psi.append(((p - q) * np.log(p / q)).sum())
        roots.append(np.sqrt(np.abs(ours.cumsum() / 60 - theirs.cumsum() / 180).max()))
    assert reference.psi_expected[0] == pytest.approx(np.mean(psi))
    assert reference.psi.centre[0] == pytest.approx(np.mean(np.cbrt(psi)))
    assert reference.ks.centre[0] == pytest.approx(np.mean(roots))
    assert reference.ks.spread[0] == pytest.approx(np.std(roots))


@pytest.mark.parametrize(("window", "within"), [(WINDOW, 0.2), (600, 0.07)])
def test_stability_index_without_drift_is_expected_to_be_that_of_a_chi_square(window, within):
    rows = np.random.default_rng(2).standard_normal((100 * window, 1))
    expected = 11 * (1 / window + 1 / (99 * window))
    assert DriftReference.fit(["noise"], rows, window=window).psi_expected[0] == pytest.approx(expected, rel=within)


def test_stability_index_without_drift_is_above_the_usual_limit_and_its_excess_is_not():
    rng = np.random.default_rng(2)
    reference = DriftReference.fit(["noise"], rng.standard_normal((4000, 1)))
    assert reference.psi_expected[0] > 0.1  # "some drift" by the usual convention
    excess = [verdict(reference, rows).psi["noise"] for rows in rng.standard_normal((200, WINDOW, 1))]
    assert np.mean(excess) == pytest.approx(0.0, abs=0.015)


def test_p_values_hold_for_persistent_bars_too():
    rng = np.random.default_rng(3)
    persistence = np.array([0.0, 0.9])
    reference = DriftReference.fit(["fast", "slow"], autoregressions(rng, 1, 20_000, persistence)[0])
    found = [verdict(reference, rows).ks for rows in autoregressions(rng, 1000, WINDOW, persistence)]
    for name in reference.names:
        p = np.array([one[name] for one in found])
        # On the quiet side for independent bars, because the bins are coarse.
        assert 0.005 < (p < 0.05).mean() < 0.08
        assert (p < 0.01).mean() < 0.025
    assert reference.independent_bars[0] > 45.0
    assert 3.0 < reference.independent_bars[1] < 12.0
