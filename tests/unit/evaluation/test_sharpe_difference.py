from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
from arch.bootstrap import StationaryBootstrap
from scipy import stats

from evaluation import sharpe_ratio
from evaluation.statistics import (
    Interval,
    NotDecidable,
    crossed_mean,
    sharpe,
    sharpe_by_path,
    sharpe_difference,
    t_interval,
)
from evaluation.statistics.influence import block_length, hac_variance, influence

SETTINGS = {"level": 0.95, "resamples": 300, "seed": 1}


def simulate(
    rng: np.random.Generator, seeds: int, paths: int, bars: int, *, seed_std: float = 0.0, gain: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Two policies [S, P, n] of equal skill but for `gain`: 60 % market noise, 20 % each of policy and training run."""
    market = rng.standard_normal((1, paths, bars))
    policies = []
    for extra in (gain, 0.0):
        skill = (1.0 + extra + seed_std * rng.standard_normal((seeds, 1, 1))) / math.sqrt(252)
        own = rng.standard_normal((1, paths, bars)), rng.standard_normal((seeds, paths, bars))
        policies.append(0.01 * (skill + math.sqrt(0.6) * market + math.sqrt(0.2) * (own[0] + own[1])))
    return policies[0], policies[1]


# --- the estimate


def test_sharpe_of_many_paths_is_the_sharpe_of_each():
    returns = np.random.default_rng(0).normal(0.001, 0.01, (3, 4, 50))
    returns[0, 1] = 0.0
    returns[1, 2] = 0.01
    returns[2, 3, 7] = math.nan
    expected = [[sharpe_ratio(path, 252) for path in seed] for seed in returns]
    np.testing.assert_allclose(sharpe_by_path(returns, 252), expected, rtol=1e-12)
    assert math.isnan(expected[1][2])


def test_the_difference_by_hand():
    # Mean 0.01, squared deviations of 0.0008 in every four bars: 0.01 / sqrt(8 * 0.0008 / 31) a bar.
    a = np.tile([0.01, 0.03, -0.01, 0.01], 8)[None, None]
    result = sharpe_difference(a, np.zeros_like(a), 252, **SETTINGS)
    assert result.interval.estimate == pytest.approx(0.01 / math.sqrt(0.0064 / 31) * math.sqrt(252), rel=1e-12)
    assert result.hac.estimate == result.interval.estimate
    assert math.isnan(result.correlation)
    assert (result.seeds, result.paths, result.bars) == (1, 1, 32)


@pytest.mark.parametrize("paths", [1, 6])
def test_exchanging_the_policies_mirrors_the_interval_and_leverage_changes_nothing(paths):
    a, b = simulate(np.random.default_rng(2), 3, paths, 200, gain=1.0)
    there, back, levered = (sharpe_difference(x, y, 252, **SETTINGS) for x, y in ((a, b), (b, a), (3.0 * a, b)))
    assert back.interval.low == pytest.approx(-there.interval.high, rel=1e-9)
    assert back.hac.low == pytest.approx(-there.hac.high, rel=1e-9)
    assert levered.interval.low == pytest.approx(there.interval.low, rel=1e-9)
    np.testing.assert_allclose(levered.samples, there.samples, rtol=1e-9)


@pytest.mark.parametrize("paths", [1, 6])
def test_a_policy_without_training_is_paired_with_every_seed(paths):
    a, b = simulate(np.random.default_rng(3), 4, paths, 200)
    alone = sharpe_difference(a, b[:1], 252, **SETTINGS)
    repeated = sharpe_difference(a, np.repeat(b[:1], 4, axis=0), 252, **SETTINGS)
    for one, other in ((alone.interval, repeated.interval), (alone.hac, repeated.hac)):
        assert (one.low, one.high, one.method) == (pytest.approx(other.low), pytest.approx(other.high), other.method)
    assert alone.correlation == pytest.approx(repeated.correlation)


@pytest.mark.parametrize("paths", [1, 6])
def test_a_policy_compared_with_itself_differs_by_exactly_nothing(paths):
    a, _ = simulate(np.random.default_rng(4), 3, paths, 200)
    result = sharpe_difference(a, a, 252, **SETTINGS)
    for interval in (result.interval, result.hac):
        assert (interval.low, interval.high, interval.standard_error) == (0.0, 0.0, 0.0)
    assert result.correlation == pytest.approx(1.0)


@pytest.mark.parametrize("paths", [1, 6])
@pytest.mark.parametrize("stored", [np.float64, np.float32])
def test_rounding_is_no_gain(paths, stored):
    a, _ = simulate(np.random.default_rng(4), 3, paths, 200)
    result = sharpe_difference((a * 1.7).astype(stored), a.astype(stored), 252, **SETTINGS)
    assert result.interval.estimate == 0.0
    assert result.interval.low <= 0.0 <= result.interval.high
    assert result.hac.low <= 0.0 <= result.hac.high


def test_the_same_seed_gives_the_same_bits_and_another_one_other_samples():
    a, b = simulate(np.random.default_rng(5), 3, 1, 200)
    first, again = (sharpe_difference(a, b, 252, **SETTINGS) for _ in range(2))
    other = sharpe_difference(a, b, 252, **{**SETTINGS, "seed": 2})
    np.testing.assert_array_equal(first.samples, again.samples)
    assert first.interval == again.interval
    assert first.interval != other.interval


# --- seeds and paths


def test_crossed_mean_by_hand():
    # Seed means 1.5 and 4.5, path means 2 and 4, every cell half a unit off their sum: variances 4.5, 2 and residual 1.
    result = crossed_mean([[1.0, 2.0], [3.0, 6.0]], level=0.95, resamples=4000, seed=0)
    reach = 12.7062047364 * math.sqrt(4.5 / 2 + 2 / 2)
    assert result.interval.estimate == 3.0
    assert result.interval.low == pytest.approx(3.0 - reach, rel=1e-9)
    assert result.interval.high == pytest.approx(3.0 + reach, rel=1e-9)
    assert result.interval.standard_error == pytest.approx(math.sqrt(3.25))
    parts = result.components
    assert (parts.seed, parts.path, parts.residual) == pytest.approx((4.5 - 1 / 2, 2.0 - 1 / 2, 1.0))


@pytest.mark.parametrize(("seeds", "paths"), [(3, 20), (3, 1), (1, 20), (5, 5)])
def test_the_samples_spread_as_wide_as_the_interval(seeds, paths):
    a, b = simulate(np.random.default_rng(6), seeds, paths, 250, seed_std=1.0)
    result = sharpe_difference(a, b, 252, level=0.95, resamples=5000, seed=0)
    reach = (result.interval.high - result.interval.low) / 2
    assert stats.norm.ppf(0.975) * result.samples.std() == pytest.approx(reach, rel=0.05)
    assert result.samples.mean() == pytest.approx(result.interval.estimate, abs=0.1 * result.interval.standard_error)


def test_one_seed_covers_paths_or_time_only_and_says_so():
    a, b = simulate(np.random.default_rng(7), 1, 5, 200)
    for result in (sharpe_difference(a, b, 252, **SETTINGS), sharpe_difference(a[:, :1], b[:, :1], 252, **SETTINGS)):
        assert "one training run, so it does not cover the spread between runs" in result.interval.method
        assert "one training run, so it does not cover" in result.hac.method
        assert math.isnan(result.components.seed)
    D = (sharpe_by_path(a, 252) - sharpe_by_path(b, 252))[0]
    expected = stats.ttest_1samp(D, 0.0).confidence_interval(0.95)
    interval = sharpe_difference(a, b, 252, **SETTINGS).interval
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_variance_components_are_found_again():
    rng = np.random.default_rng(8)
    table = rng.normal(0, 2, (400, 1)) + rng.normal(0, 3, (1, 400)) + rng.normal(0, 1, (400, 400))
    parts = crossed_mean(table, level=0.95, resamples=1, seed=0).components
    assert (parts.seed, parts.path, parts.residual) == pytest.approx((4.0, 9.0, 1.0), rel=0.15)


def test_time_components_of_a_single_path_are_found_again():
    # Own noise of both policies: 0.4 of the variance of each is not shared, half of it by seed. Per year 252 / n.
    a, b = simulate(np.random.default_rng(9), 60, 1, 4000, seed_std=0.0)
    parts = sharpe_difference(a, b, 252, level=0.95, resamples=400, seed=0).components
    assert parts.residual == pytest.approx(2 * 0.2 * 252 / 4000, rel=0.25)
    assert parts.path == pytest.approx(2 * 0.2 * 252 / 4000, rel=0.25)
    assert parts.seed < 0.3 * parts.residual


# --- the time bootstrap


def test_resampling_bars_is_the_sharpe_difference_of_every_resample():
    a, b = simulate(np.random.default_rng(10), 1, 1, 120)
    result = sharpe_difference(a, b, 252, level=0.95, resamples=50, seed=3, block=4.0)
    bootstrap = StationaryBootstrap(4.0, np.arange(120), seed=np.random.default_rng(3))
    loop = []
    for _ in range(50):
        bars = bootstrap.update_indices()
        loop.append(sharpe_ratio(a[0, 0, bars], 252) - sharpe_ratio(b[0, 0, bars], 252))
    # 120 bars in blocks of 4 are 30 pieces.
    wider = stats.t.ppf(0.975, 29) / stats.norm.ppf(0.975)
    deviations = wider * (loop - np.mean(loop))
    np.testing.assert_allclose(result.samples - result.samples.mean(), deviations, rtol=1e-9, atol=1e-12)
    assert result.interval.standard_error == pytest.approx(np.std(loop, ddof=1))
    assert result.block == 4.0


def test_resamples_in_batches_are_those_of_one_piece(monkeypatch):
    a, b = np.random.default_rng(7).normal(0.0005, 0.01, (2, 3, 1, 200))
    settings = {"level": 0.95, "resamples": 23, "seed": 1, "block": 5.0}
    whole = sharpe_difference(a, b, 252, **settings)
    monkeypatch.setattr(sharpe, "BATCH", 10)
    assert sharpe_difference(a, b, 252, **settings).samples.tolist() == pytest.approx(whole.samples.tolist())
    assert whole.by_seed.tolist() == pytest.approx((sharpe_by_path(a, 252) - sharpe_by_path(b, 252))[:, 0].tolist())


def test_policies_and_seeds_share_the_resampled_bars():
    # The policies differ by a small part of their noise: drawn apart, the error of each would be all of it.
    rng = np.random.default_rng(11)
    market = rng.normal(0.0005, 0.01, (1, 1, 1000))
    a, b = (market + rng.normal(0, 0.0005, (3, 1, 1000)) for _ in range(2))
    result = sharpe_difference(a, b, 252, **SETTINGS)
    apart = math.sqrt(2 * 252 / 1000)
    assert result.correlation > 0.99
    assert result.interval.standard_error < 0.15 * apart
    assert result.hac.standard_error < 0.15 * apart


def test_a_policy_that_rarely_trades_has_a_sharpe_ratio_of_zero_where_it_was_not_drawn():
    rng = np.random.default_rng(12)
    b = rng.normal(0, 0.01, (1, 1, 100))
    a = np.zeros_like(b)
    a[0, 0, 40:42] = 0.02, -0.01
    result = sharpe_difference(a, b, 252, level=0.95, resamples=200, seed=0, block=5.0)
    assert np.isfinite(result.samples).all()
    assert np.abs(result.samples).max() < 20


def test_resamples_of_one_single_return_cannot_be_decided():
    a = np.full((1, 1, 60), 0.001)
    a[..., 57:] = 0.01, -0.01, 0.002
    b = np.random.default_rng(13).normal(0, 0.01, (1, 1, 60))
    with pytest.raises(NotDecidable, match="needs 60 more bars: some resamples of the bars hold one return only"):
        sharpe_difference(a, b, 252, level=0.95, resamples=300, seed=0, block=20.0)


def test_serial_dependence_lengthens_blocks_and_widens_the_interval():
    rng = np.random.default_rng(14)
    shocks = rng.normal(0, 0.01, (2, 2000))
    slow = np.zeros_like(shocks)
    for bar in range(1, 2000):
        slow[:, bar] = 0.8 * slow[:, bar - 1] + shocks[:, bar]
    slow = slow / slow.std() * 0.01
    fast = sharpe_difference(shocks[None, :1], shocks[None, 1:], 252, **SETTINGS)
    dependent = sharpe_difference(slow[None, :1], slow[None, 1:], 252, **SETTINGS)
    assert fast.block < 4
    assert dependent.block > 10
    # The error of the mean of an AR(1) with 0.8 is sqrt(1.8 / 0.2) = 3 times that of independent bars.
    assert dependent.interval.standard_error / fast.interval.standard_error == pytest.approx(3.0, rel=0.25)
    assert dependent.hac.standard_error / fast.hac.standard_error == pytest.approx(3.0, rel=0.25)


# --- Ledoit and Wolf


@pytest.mark.parametrize(("correlation", "first", "second"), [(0.5, 0.10, 0.05), (0.8, 0.06, 0.06), (0.0, 0.3, 0.1)])
def test_on_independent_normal_returns_the_hac_error_is_memmels(correlation, first, second):
    n = 20_000
    rng = np.random.default_rng(15)
    a, b = rng.multivariate_normal([first, second], [[1.0, correlation], [correlation, 1.0]], n).T
    A, B, q = a.mean() / a.std(), b.mean() / b.std(), np.corrcoef(a, b)[0, 1]
    memmel = math.sqrt((2 - 2 * q + (A**2 + B**2 - 2 * A * B * q**2) / 2) / n)
    result = sharpe_difference(a[None, None], b[None, None], 1, **SETTINGS)
    assert result.hac.standard_error == pytest.approx(memmel, rel=0.03)
    assert result.interval.standard_error == pytest.approx(memmel, rel=0.12)


def test_heavy_tails_enter_the_hac_error():
    # Fourth moment of Student's t with 9 degrees: the variance of a Sharpe ratio gains ratio^2 (kurtosis - 3) / 4.
    n, ratio = 50_000, 1.0
    returns = np.random.default_rng(16).standard_t(9, n) / math.sqrt(9 / 7) + ratio
    expected = math.sqrt((1 + ratio**2 / 2 + ratio**2 * (6 / 5) / 4) / n)
    assert math.sqrt(hac_variance(influence(returns))) == pytest.approx(expected, rel=0.03)


def test_the_long_run_variance_of_an_autoregression():
    # The kernel alone finds half of it in 400 bars; whitening first finds what there is.
    n, root, N = 400, 0.9, 60
    shocks = np.random.default_rng(17).standard_normal((N, n + 100))
    series = np.zeros_like(shocks)
    for bar in range(1, n + 100):
        series[:, bar] = root * series[:, bar - 1] + shocks[:, bar]
    found = np.mean([hac_variance(one - one.mean()) for one in series[:, 100:]])
    assert found == pytest.approx(1 / (1 - root) ** 2 / n, rel=0.1)


def test_the_influence_of_a_bar_is_what_leaving_it_out_changes():
    returns = np.random.default_rng(18).normal(0.2, 1.0, 2000)
    full = returns.mean() / returns.std()
    without = np.delete(returns, 7)
    change = (full - without.mean() / without.std()) * 2000
    assert influence(returns)[7] == pytest.approx(change, rel=0.01)
    assert not influence(np.zeros(5)).any()


# --- does it keep its promise?


@pytest.mark.parametrize(("seeds", "paths", "bars"), [(5, 20, 250), (3, 1, 1000)])
def test_the_interval_covers_and_equal_policies_are_rarely_told_apart(seeds, paths, bars):
    rng = np.random.default_rng(19)
    N, covered, false_positives = 500, 0, 0
    for run in range(N):
        a, b = simulate(rng, seeds, paths, bars, seed_std=0.3)
        interval = sharpe_difference(a, b, 252, level=0.95, resamples=100, seed=run).interval
        covered += interval.low <= 0.0 <= interval.high
        false_positives += interval.low > 0.0
    assert covered / N >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / N)
    assert false_positives / N <= 0.025 + 2 * math.sqrt(0.025 * 0.975 / N)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_lower_bound_holds_with_two_or_three_seeds_whatever_their_spread(spread):
    """Spread: variance of seeds relative to paths. Satterthwaite's pooled degrees of freedom do not hold."""
    rng = np.random.default_rng(20)
    N = 2000
    # Of pooled degrees of freedom where seeds differ as much as paths: 6.0 and 3.9 %.
    for seeds, pooled_fails in ((2, 0.05), (3, 0.035)):
        tables = (
            rng.normal(0, math.sqrt(spread), (N, seeds, 1))
            + rng.normal(0, 1, (N, 1, 20))
            + rng.normal(0, 0.7, (N, seeds, 20))
        )
        wrong = sum(crossed_mean(table, level=0.95, resamples=1, seed=0).interval.low > 0 for table in tables)
        assert wrong / N <= 0.025 + 2 * math.sqrt(0.025 * 0.975 / N)
        of_seeds, of_paths = tables.mean(2).var(axis=1, ddof=1) / seeds, tables.mean(1).var(axis=1, ddof=1) / 20
        error = np.sqrt(of_seeds + of_paths)
        freedom = error**4 / (of_seeds**2 / (seeds - 1) + of_paths**2 / 19)
        pooled = (tables.mean((1, 2)) - stats.t.ppf(0.975, freedom) * error > 0).mean()
        if spread:
            assert pooled > pooled_fails


def test_a_large_gain_is_found():
    a, b = simulate(np.random.default_rng(21), 5, 50, 1000, gain=0.5, seed_std=0.1)
    result = sharpe_difference(a, b, 252, **SETTINGS)
    assert result.interval.low > 0.0
    assert result.hac.low > 0.0
    assert result.hac.standard_error == pytest.approx(result.interval.standard_error, rel=0.25)


# --- intervals


def test_margins_add_their_squared_reaches():
    interval = t_interval(1.0, (4.0, 2), (9.0, math.inf), level=0.9, method="m")
    # t(0.95; 2) = 2.91999, normal 1.64485.
    reach = math.sqrt(4 * 2.9199856**2 + 9 * 1.6448536**2)
    assert (interval.low, interval.high) == pytest.approx((1 - reach, 1 + reach), rel=1e-6)
    assert interval.standard_error == pytest.approx(math.sqrt(13))
    alone = t_interval(1.0, (4.0, 2), level=0.9, method="m")
    assert alone.high == pytest.approx(1 + 2 * 2.9199856, rel=1e-6)


def test_an_interval_survives_json():
    written = json.loads(json.dumps(Interval(1.0, -math.inf, 2.0, 0.95, "m").to_dict(), allow_nan=False))
    assert written == {
        "estimate": 1.0, "low": None, "high": 2.0, "level": 0.95, "method": "m", "standard_error": None,
    }  # fmt: skip


def test_an_undecided_answer_survives_a_worker_process():
    error = pickle.loads(pickle.dumps(NotDecidable(4, "paths", "a: b")))  # noqa: S301
    assert (error.needed, error.what, error.reason) == (4, "paths", "a: b")
    assert str(error) == "cannot be decided, needs 4 more paths: a: b"


# --- bad input

GOOD = np.random.default_rng(22).normal(0, 0.01, (2, 3, 40))


def with_value(value: float) -> np.ndarray:
    returns = GOOD.copy()
    returns[1, 2, 30] = value
    return returns


def with_constant_path() -> np.ndarray:
    returns = GOOD.copy()
    returns[1, 0] = 0.001
    return returns


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (GOOD, GOOD[:, :, :39], r"expected the same paths and bars, was \[P, n\] = \[3, 40\] and \[3, 39\]"),
        (GOOD, GOOD[:, :2], r"expected the same paths and bars, was \[P, n\] = \[3, 40\] and \[2, 40\]"),
        (np.concatenate([GOOD, GOOD]), GOOD, "expected the same seeds, or one on a side, was 4 and 2"),
        (GOOD[0], GOOD, r"a: expected \[S, P, n\], was shape \[3, 40\]"),
        (GOOD, GOOD[:0], r"b: expected \[S, P, n\], was shape \[0, 3, 40\]"),
        (with_value(math.nan), GOOD, r"a: expected finite \[S, P, n\], was nan at \[1, 2, 30\]"),
        (GOOD, with_value(math.inf), r"b: expected finite \[S, P, n\], was inf at \[1, 2, 30\]"),
        (with_constant_path(), GOOD, r"a: expected returns that vary, .* at \[seed, path\] = \[1, 0\]"),
    ],
)
def test_bad_returns_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message) as caught:
        sharpe_difference(a, b, 252, **SETTINGS)
    assert not isinstance(caught.value, NotDecidable)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"level": 95}, "level: expected a number between 0 and 1, was 95"),
        ({"level": math.nan}, "level: expected a number between 0 and 1, was nan"),
        ({"resamples": 0}, "resamples: expected at least"),
        ({"block": 0.5}, "block: expected a mean length of at least 1 bar, was 0.5"),
        ({"block": math.nan}, "block: expected a mean length of at least 1 bar, was nan"),
    ],
)
def test_bad_settings_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        sharpe_difference(GOOD[:, :1], GOOD[:, 1:2], 252, **{**SETTINGS, **changed})


def test_bars_per_year_must_be_positive():
    with pytest.raises(ValueError, match="bars_per_year: expected a positive number, was 0"):
        sharpe_difference(GOOD, GOOD, 0, **SETTINGS)


def test_too_few_bars_cannot_be_decided():
    with pytest.raises(
        NotDecidable, match="needs 8 more bars: expected at least 30 bars of each path, was 22"
    ) as caught:
        sharpe_difference(GOOD[..., :22], GOOD[..., :22], 252, **SETTINGS)
    assert (caught.value.needed, caught.value.what) == (8, "bars")


def test_fewer_than_two_blocks_cannot_be_decided():
    with pytest.raises(
        NotDecidable, match=r"needs 11 more bars: expected at least two blocks of 25\.5 bars, was 40 bars"
    ):
        sharpe_difference(GOOD[:, :1], GOOD[:, 1:2], 252, **SETTINGS, block=25.5)
    assert block_length(np.zeros(40), None) == 1.0


def test_one_path_does_not_show_how_paths_differ():
    with pytest.raises(NotDecidable, match="needs 1 more paths"):
        crossed_mean([[1.0], [2.0]], **SETTINGS)
