from __future__ import annotations

import struct
import subprocess
import sys

import numpy as np
import pytest

from evaluation import BuyAndHold, RandomValid, backtest
from evaluation.plots import (
    coverage_by_column,
    curves,
    equity_and_drawdown,
    fan_chart,
    holdout_calibration,
    latency_histogram,
    png_bytes,
)


def size_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


def luminance(colour: tuple[float, float, float, float]) -> float:
    """Of a colour over white."""
    *parts, alpha = colour
    red, green, blue = (alpha * part + 1 - alpha for part in parts)
    return sum(w * p**2.2 for w, p in zip((0.2126, 0.7152, 0.0722), (red, green, blue), strict=True))


def texts(figure) -> list[str]:
    """All titles, axis and legend labels of a figure."""
    found = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        found += [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()]
        legend = axes.get_legend()
        found += [text.get_text() for text in legend.get_texts()] if legend else []
    return [text for text in found if text]


def test_equity_and_drawdown_draws_each_policy_and_a_band_for_many_paths(make_dynamics, rough_history):
    dynamics = make_dynamics()
    results = {
        "buy and hold": backtest(dynamics, *rough_history, BuyAndHold(dynamics)),
        "random valid": backtest(dynamics, *rough_history, RandomValid(1), batch=20),
    }
    figure = equity_and_drawdown(results)
    assert {"buy and hold", "random valid (median and 5-95 % of 20 paths)"} <= set(texts(figure))
    top, bottom = figure.axes
    assert len(top.collections) == len(bottom.collections) == 1
    np.testing.assert_array_equal(top.lines[0].get_ydata(), results["buy and hold"].equity[:, 0])
    np.testing.assert_allclose(bottom.lines[0].get_ydata(), -results["buy and hold"].drawdown[:, 0])
    assert size_of(png_bytes(figure, dpi=50)) == (500, 300)


def test_a_drawdown_tick_is_labelled_with_what_it_is(make_dynamics, rough_history):
    dynamics = make_dynamics()
    figure = equity_and_drawdown({"buy and hold": backtest(dynamics, *rough_history, BuyAndHold(dynamics))})
    bottom = figure.axes[1]
    bottom.set_ylim(-0.075, 0.0)
    bottom.set_yticks([-0.075, -0.05, -0.025, 0.0])
    figure.canvas.draw()
    assert [tick.get_text().lstrip("\N{MINUS SIGN}-") for tick in bottom.get_yticklabels()] == [
        *("7.5%", "5.0%", "2.5%", "0.0%")
    ]


def test_equity_and_drawdown_refuses_nothing_and_different_windows(make_dynamics, rough_history):
    with pytest.raises(ValueError, match="at least one"):
        equity_and_drawdown({})
    dynamics = make_dynamics()
    features, timestamps = rough_history
    early = backtest(dynamics, features[:50], timestamps[:50], BuyAndHold(dynamics))
    late = backtest(dynamics, features[50:100], timestamps[50:100], BuyAndHold(dynamics))
    with pytest.raises(ValueError, match=r"results\['late'\]"):
        equity_and_drawdown({"early": early, "late": late})


def test_holdout_calibration_of_uniform_values_is_one_everywhere():
    grid = (np.arange(2000) + 0.5) / 2000
    figure = holdout_calibration(np.stack((grid, grid[::-1]), axis=1), {"95": 0.94, "50": 0.52, "80": 0.81})
    stairs = next(patch for patch in figure.axes[0].patches if hasattr(patch, "get_data"))
    np.testing.assert_allclose(stairs.get_data().values, 1.0)
    assert figure.axes[1].lines[1].get_xydata().tolist() == [[0.5, 0.52], [0.8, 0.81], [0.95, 0.94]]
    assert any("2,000 rows, 2 features" in text for text in texts(figure))
    (patch,) = figure.axes[0].get_legend().get_patches()[:1]
    assert luminance(patch.get_facecolor()) < 0.65, "the band is seen on white"
    size_of(png_bytes(figure, dpi=50))


@pytest.mark.parametrize("pit", [np.array([0.5, 1.1]), np.array([0.5, np.nan]), np.empty((0, 3)), np.zeros((1, 1, 1))])
def test_holdout_calibration_refuses_what_is_no_probability(pit):
    with pytest.raises(ValueError, match="pit"):
        holdout_calibration(pit, {"50": 0.5})


def test_fan_chart_draws_a_band_per_pair_of_quantiles():
    paths = np.outer(np.linspace(-1, 1, 101), np.arange(4.0))
    figure = fan_chart(paths, np.zeros(4), title="Imagined volatility", ylabel="annualised")
    assert {"central 90%", "central 50%", "median", "realised", "annualised"} <= set(texts(figure))
    outer = figure.axes[0].collections[0].get_paths()[0].vertices
    assert outer[:, 1].max() == pytest.approx(0.9 * 3)
    size_of(png_bytes(figure, dpi=50))
    assert "realised" not in texts(fan_chart(paths, None))


def test_fan_chart_checks_its_input():
    paths = np.zeros((5, 3))
    with pytest.raises(ValueError, match=r"realised: expected \[3\], was \[2\]"):
        fan_chart(paths, np.zeros(2))
    with pytest.raises(ValueError, match="paths"):
        fan_chart(np.full((5, 3), np.nan), None)
    for quantiles in ((), (0.05, 0.5, 0.95), (0.95, 0.05), (0.1, 0.8)):
        with pytest.raises(ValueError, match="quantiles"):
            fan_chart(paths, None, quantiles)


def test_coverage_by_column_puts_observed_shares_beside_their_level():
    coverage = {"calm": {"50": 0.5, "95": 0.94}, "gap": {"95": 0.31, "50": 0.07}}
    figure = coverage_by_column(coverage)
    (axes,) = figure.axes
    nominal, observed = axes.lines[::2], axes.lines[1::2]
    assert [line.get_xdata()[0] for line in nominal] == [0.5, 0.95]
    assert [list(line.get_xdata()) for line in observed] == [[0.5, 0.07], [0.94, 0.31]]
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == ["calm", "gap"]
    assert axes.yaxis_inverted()
    size_of(png_bytes(figure, dpi=50))


@pytest.mark.parametrize("coverage", [{}, {"a": {}}, {"a": {"50": 0.5}, "b": {"80": 0.5}}])
def test_coverage_by_column_refuses_columns_without_common_levels(coverage):
    with pytest.raises(ValueError, match="the same levels"):
        coverage_by_column(coverage)


@pytest.mark.parametrize("share", [1.1, float("nan")])
def test_coverage_by_column_refuses_what_is_no_share(share):
    with pytest.raises(ValueError, match="shares in"):
        coverage_by_column({"a": {"50": share}})


def test_curves_draw_each_line_over_numbers_and_over_dates():
    values = {"real": np.array([1.0, 2.0, 3.0]), "imagined": np.array([3.0, np.nan, 1.0])}
    figure = curves(np.array([10, 20, 30]), values, title="Rewards", xlabel="steps", ylabel="per bar")
    assert {"real", "imagined", "Rewards", "steps", "per bar"} <= set(texts(figure))
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[10, 1], [20, 2], [30, 3]]
    days = np.array(["2018-01-30", "2018-01-31", "2018-02-01"], dtype="datetime64[D]")
    dated = curves(days, values, title="Rewards", ylabel="per bar")
    size_of(png_bytes(dated, dpi=50))
    assert "Jan-30" in [label.get_text() for label in dated.axes[0].get_xticklabels()]


def test_curves_refuse_nothing_and_other_lengths():
    with pytest.raises(ValueError, match="lines: expected at least one"):
        curves(np.arange(3), {}, title="", ylabel="")
    with pytest.raises(ValueError, match=r"lines\['a'\]: expected \[3\], was \[2\]"):
        curves(np.arange(3), {"a": np.zeros(2)}, title="", ylabel="")


def test_latency_histogram_names_percentiles_and_the_share_over_budget():
    ms = np.concatenate((np.full(98, 0.02), np.full(2, 60.0)))
    figure = latency_histogram(ms, 50.0, title="Paced")
    assert {"p50 0.02 ms", "p95 0.02 ms", "p99 60 ms", "budget 50 ms, exceeded by 2.00%"} <= set(texts(figure))
    assert sum(patch.get_height() for patch in figure.axes[0].patches) == 100
    size_of(png_bytes(figure, dpi=50))


@pytest.mark.parametrize("ms", [np.array([]), np.array([0.0, 1.0]), np.array([np.nan]), np.ones((2, 2))])
def test_latency_histogram_refuses_what_cannot_be_a_duration(ms):
    with pytest.raises(ValueError, match="ms"):
        latency_histogram(ms, 50.0)


def test_latency_histogram_refuses_a_budget_that_is_none():
    with pytest.raises(ValueError, match="budget"):
        latency_histogram(np.ones(3), 0.0)


def test_a_legend_below_a_figure_fits_into_it():
    figure = latency_histogram(np.full(9, 0.01234), 1234.5)
    png_bytes(figure)
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_a_figure_renders_to_the_same_bytes_twice():
    assert png_bytes(latency_histogram(np.ones(9), 2.0)) == png_bytes(latency_histogram(np.ones(9), 2.0))


def test_figures_leave_pyplot_alone():
    code = "import evaluation.plots, sys; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
