from __future__ import annotations

import math

import numpy as np
import pytest

from evaluation.statistics import (
    NotDecidable,
    deflated_sharpe,
    expected_max_sharpe,
    multiple,
    probabilistic_sharpe,
    superior_policies,
)

SETTINGS = {"level": 0.95, "resamples": 500, "seed": 1}

# --- deflated Sharpe ratio


def two_valued_returns(sharpe: float, bars_per_year: float) -> np.ndarray:
    """105 losses and 1145 gains: skewness -3 and kurtosis 10, the least that such a skewness allows."""
    values = np.where(np.arange(1250) < 105, -1.0, 1.0)
    return 0.01 * ((values - values.mean()) / values.std(ddof=1) + sharpe / math.sqrt(bars_per_year))


def test_the_example_of_the_paper():
    # Bailey and Lopez de Prado (2014): 5 years of daily returns, annual ratio 2.5, 100 trials whose ratios have
    # variance 1/2, skewness -3, kurtosis 10. They report a highest ratio of 0.1132 a day and a deflated one of 0.9004.
    assert expected_max_sharpe(100, math.sqrt(0.5 / 250)) == pytest.approx(0.1132, abs=5e-5)
    result = deflated_sharpe(two_valued_returns(2.5, 250), 100, math.sqrt(0.5), 250)
    assert result.probability == pytest.approx(0.9004, abs=5e-5)
    assert result.sharpe == pytest.approx(2.5, rel=1e-9)
    assert result.expected_max_sharpe / math.sqrt(250) == pytest.approx(0.1132, abs=5e-5)
    assert result.trials == 100


@pytest.mark.parametrize(("trials", "skewness", "kurtosis"), [(46, -3.0, 10.0), (88, 0.0, 3.0)])
def test_the_trials_at_which_the_example_still_reaches_95_percent(trials, skewness, kurtosis):
    threshold = expected_max_sharpe(trials, math.sqrt(0.5 / 250))
    found = probabilistic_sharpe(2.5 / math.sqrt(250), threshold, 1250, skewness, kurtosis)
    assert found == pytest.approx(0.9505, abs=5e-5)


def test_every_trial_costs_and_a_single_one_does_not():
    returns = np.random.default_rng(0).normal(0.0006, 0.01, 1000)
    probabilities = [deflated_sharpe(returns, trials, 0.5, 252).probability for trials in (1, 2, 10, 100, 1000)]
    assert probabilities == sorted(probabilities, reverse=True)
    assert len(set(probabilities)) == 5
    once = deflated_sharpe(returns, 1, 0.5, 252)
    assert once.probability == once.undeflated
    assert once.expected_max_sharpe == 0.0


def test_the_best_of_many_is_as_high_as_expected():
    draws = np.random.default_rng(1).normal(0.0, 0.4, (4000, 50)).max(axis=1)
    assert expected_max_sharpe(50, 0.4) == pytest.approx(draws.mean(), rel=0.02)


def test_the_spread_between_trials_on_one_path_deflates_and_that_of_their_means_over_paths_does_not():
    """The best of 20 policies without skill, ten years of daily bars; 40 paths for the means."""
    rng, bars, year = np.random.default_rng(9), 2520, math.sqrt(252)
    ratios = rng.normal(0.0, year / math.sqrt(bars), (2000, 20, 40))
    picked = ratios[:, :, 0].max(axis=1)
    spreads = {"one path": np.sqrt(ratios.var(axis=1, ddof=1).mean(axis=1)), "means": ratios.mean(2).std(1, ddof=1)}
    passed = {}
    for name, spread in spreads.items():
        highest = [expected_max_sharpe(20, one) for one in spread]
        chances = [
            probabilistic_sharpe(one / year, most / year, bars, 0.0, 3.0)
            for one, most in zip(picked, highest, strict=True)
        ]
        passed[name] = np.mean(np.array(chances) > 0.95)
    assert passed["one path"] < 0.05
    # 42 %.
    assert passed["means"] > 0.35


def test_negative_skewness_lowers_the_probability_of_a_gain():
    symmetric, skewed = (probabilistic_sharpe(0.1, 0.0, 500, skewness, 12.0) for skewness in (0.0, -3.0))
    assert skewed < symmetric < probabilistic_sharpe(0.1, 0.0, 500, 0.0, 3.0)
    assert probabilistic_sharpe(0.1, 0.1, 500, -1.0, 5.0) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.full(50, 0.01), 3, 0.5, 252), "returns: expected returns that vary, was 0.01 on every bar"),
        ((np.zeros(50), 3, 0.5, 252), "returns: expected returns that vary, was 0 on every bar"),
        ((np.ones((2, 50)), 3, 0.5, 252), r"returns: expected \[n\], was shape \[2, 50\]"),
        (([0.01, math.nan] * 20, 3, 0.5, 252), r"returns: expected finite \[n\], was nan at \[1\]"),
        (([0.01, 0.02] * 20, 0, 0.5, 252), "trials: expected at least 1, was 0"),
        (([0.01, 0.02] * 20, 3, math.nan, 252), "trial_sharpe_std: expected a finite number of at least 0, was nan"),
        (([0.01, 0.02] * 20, 3, 0.5, 0), "bars_per_year: expected a positive number"),
        (([0.01, 0.02] * 5, 3, 0.5, 252), "needs 20 more bars: expected at least 30 bars, was 10"),
    ],
)
def test_bad_trials_and_returns_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        deflated_sharpe(*arguments)


def test_impossible_moments_are_refused():
    with pytest.raises(ValueError, match=r"kurtosis: expected at least 1 \+ skewness\^2 = 10, .* was 3"):
        probabilistic_sharpe(1.0, 0.0, 500, 3.0, 3.0)
    with pytest.raises(ValueError, match="bars: expected at least 2, was 1"):
        probabilistic_sharpe(1.0, 0.0, 1, 0.0, 3.0)


# --- superior policies


def market(bars: int = 1000) -> tuple[np.random.Generator, np.ndarray]:
    rng = np.random.default_rng(2)
    return rng, rng.normal(0.0003, 0.01, (1, 1, bars))


def test_only_the_better_policy_is_superior():
    rng, benchmark = market()
    candidates = {name: benchmark + rng.normal(0, 0.003, 1000) for name in ("one", "two", "three")}
    candidates["better"] = benchmark + rng.normal(0.001, 0.003, 1000)
    result = superior_policies(benchmark, candidates, **SETTINGS)
    assert result.superior == ("better",)
    assert result.tested == ("one", "two", "three", "better")
    assert result.resamples == 500
    assert result.p_value < 0.01
    assert result.level == 0.95
    assert result.block >= 1.0


def test_a_noisy_candidate_does_not_hide_a_better_one():
    rng, benchmark = market()
    unrelated = rng.normal(0.0, 0.01, (1, 1, 1000))
    candidates = {
        "noisy": unrelated - unrelated.mean() + benchmark.mean(),
        "better": benchmark + rng.normal(0.0002, 0.0005, 1000),
    }
    assert superior_policies(benchmark, candidates, **SETTINGS).superior == ("better",)


def test_leverage_does_not_make_a_policy_superior():
    _, benchmark = market()
    benchmark = benchmark.astype(np.float32)
    copies = {"levered": np.float32(3.0) * benchmark, "copy": benchmark}
    result = superior_policies(benchmark, copies, **SETTINGS)
    assert result.superior == ()
    assert result.p_value == 1.0
    assert math.isnan(result.block)
    beside = superior_policies(benchmark, {**copies, "better": benchmark + 0.001}, **SETTINGS)
    assert beside.superior == ("better",)


def test_among_many_equal_policies_a_superior_one_is_rarely_found():
    rng = np.random.default_rng(3)
    N, found = 100, 0
    for run in range(N):
        benchmark = rng.normal(0.0003, 0.01, (1, 1, 150))
        candidates = {str(index): benchmark + rng.normal(0, 0.005, 150) for index in range(10)}
        found += bool(superior_policies(benchmark, candidates, level=0.9, resamples=100, seed=run, block=1.0).superior)
    assert found / N <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / N)


def test_training_runs_of_equal_skill_are_not_taken_for_the_ensemble_of_them():
    # Each run has the benchmark's ratio of 0.1 and noise of its own; averaged returns would have 0.1 sqrt(2 / 1.2).
    rng = np.random.default_rng(6)
    N, found, ensemble = 200, 0, 0
    settings = {"level": 0.95, "resamples": 100, "block": 1.0}
    for run in range(N):
        shared = rng.standard_normal((1, 20, 60))
        runs = 0.1 * math.sqrt(2.0) + shared + rng.standard_normal((5, 20, 60))
        found += bool(superior_policies(0.1 + shared, {"runs": runs}, seed=run, **settings).superior)
        both = [returns.mean(axis=(0, 1), keepdims=True) for returns in (0.1 + shared, runs)]
        ensemble += bool(superior_policies(both[0], {"mean": both[1]}, seed=run, **settings).superior)
    assert found / N <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / N)
    assert ensemble / N > 0.5


def test_a_long_series_is_averaged_over_neighbouring_bars_and_answers_the_same(monkeypatch):
    rng, benchmark = market(1001)
    candidates = {"noise": benchmark + rng.normal(0, 0.003, 1001), "better": benchmark + rng.normal(0.001, 0.003, 1001)}
    fine = superior_policies(benchmark, candidates, **SETTINGS, block=8.0)
    monkeypatch.setattr(multiple, "MOST_BARS", 251)
    coarse = superior_policies(benchmark, candidates, **SETTINGS, block=8.0)
    assert coarse.superior == fine.superior == ("better",)
    # Blocks of two groups of four bars.
    assert coarse.block == fine.block == 8.0
    assert multiple._contributions("it", benchmark, 4).shape == (250,)
    assert multiple._contributions("it", benchmark, 4).mean() == pytest.approx(
        multiple._contributions("it", benchmark, 1)[1:].mean()
    )


def test_the_gain_is_that_of_the_mean_ratio_over_runs_and_paths():
    rng = np.random.default_rng(7)
    base = rng.normal(0.0, 0.01, (1, 3, 400))
    # Better on every path by as much as worse in the other run, and better by a little more.
    even = np.concatenate([base + 0.001, base - 0.001])
    better = np.concatenate([base + 0.003, base - 0.001])
    assert superior_policies(base, {"even": even, "better": better}, **SETTINGS).superior == ("better",)


def test_the_same_seed_gives_the_same_answer():
    rng, benchmark = market(300)
    candidates = {"other": benchmark + rng.normal(0.0002, 0.003, 300)}
    first, again = (superior_policies(benchmark, candidates, **SETTINGS) for _ in range(2))
    assert first == again
    assert superior_policies(benchmark, candidates, **SETTINGS, block=7.0).block == 7.0


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ({}, "candidates: expected at least one policy, was none"),
        ({"still": np.ones((2, 1, 100))}, r"candidates\['still'\]: expected returns that vary"),
        (
            {"short": np.ones((1, 1, 50))},
            r"candidates\['short'\]: expected the \[P, n\] = \[1, 100\] of the benchmark, was \[1, 50\]",
        ),
        ({"more": np.ones((1, 2, 100))}, r"expected the \[P, n\] = \[1, 100\] of the benchmark, was \[2, 100\]"),
        ({"flat": np.ones(100)}, r"candidates\['flat'\]: expected \[S, P, n\], was shape \[100\]"),
        (
            {"gap": np.full((1, 1, 100), math.nan)},
            r"candidates\['gap'\]: expected finite \[S, P, n\], was nan at \[0, 0, 0\]",
        ),
    ],
)
def test_bad_candidates_are_refused(candidates, message):
    with pytest.raises(ValueError, match=message):
        superior_policies(np.random.default_rng(4).normal(0, 0.01, (1, 1, 100)), candidates, **SETTINGS)


def test_too_few_bars_for_a_comparison_cannot_be_decided():
    rising = np.arange(40.0)[None, None]
    with pytest.raises(NotDecidable, match="needs 10 more bars: benchmark: expected at least 30 bars, was 20"):
        superior_policies(rising[..., :20], {"other": rising[..., :20]}, **SETTINGS)
    with pytest.raises(ValueError, match="level: expected a number between 0 and 1, was 1"):
        superior_policies(rising, {"other": rising}, level=1.0, resamples=10, seed=0)
