from __future__ import annotations

import re
import struct

import numpy as np
import pytest
from matplotlib.colors import to_hex
from report_worlds import interval

from evaluation.plots import png_bytes
from evaluation.report.display import MINUS
from evaluation.report.figures import (
    REGIME_COLOURS,
    difference_distribution,
    equity_fan,
    forest,
    regime_and_position,
    sharpe_by_size,
    styles,
    traded,
)
from evaluation.report.policies import POLICIES

DAYS = np.datetime64("2020-01-01", "ns") + np.arange(300) * np.timedelta64(1, "D")


def grown(paths: int, drift: float = 0.0, closes: int = 300) -> np.ndarray:
    steps = np.random.default_rng(7).normal(drift, 0.01, (paths, closes))
    steps[:, 0] = 0.0
    return np.exp(np.cumsum(steps, axis=1))


def legend(figure) -> list[str]:
    return [text.get_text() for box in figure.legends for text in box.get_texts()]


def test_equity_fan_draws_median_band_and_drawdown_of_each_policy():
    equity = {"mbpo": grown(40, 0.001), "flat": np.ones((1, 300))}
    figure = equity_fan(DAYS, equity)
    top, bottom, end = figure.axes
    assert top.get_title(loc="left") == "Equity and drawdown after costs: median and central 80 % of up to 40 paths"
    assert legend(figure) == ["mbpo", "flat"]
    by_run = equity_fan(DAYS, equity, unit="training run").axes[0].get_title(loc="left")
    assert by_run.endswith("of up to 40 training runs")
    # A single path has no band.
    assert len(top.collections) == len(bottom.collections) == 1
    np.testing.assert_allclose(top.lines[0].get_ydata(), np.median(equity["mbpo"], axis=0))
    drawdown = equity["mbpo"] / np.maximum.accumulate(equity["mbpo"], axis=1) - 1
    np.testing.assert_allclose(bottom.lines[0].get_ydata(), np.median(drawdown, axis=0))
    band = top.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(np.quantile(equity["mbpo"], 0.9, axis=0).max())
    (whisker,) = end.collections[0].get_segments()
    np.testing.assert_allclose(whisker[:, 1], np.quantile(equity["mbpo"][:, -1], (0.1, 0.9)))


@pytest.mark.parametrize("high", [1.02, 1.8, 7.0, 900.0])
def test_equity_axis_has_readable_ticks_at_every_growth(high):
    figure = equity_fan(np.arange(50), {"one": np.geomspace(1.0, high, 50)[None]})
    png_bytes(figure, dpi=40)
    ticks = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert 3 <= len(ticks) <= 10
    assert len(set(ticks)) == len(ticks)
    assert figure.axes[1].get_xlabel() == "bars"


def test_difference_distribution_says_how_much_lies_above_each_threshold():
    samples = np.linspace(-0.1, 0.3, 401)
    figure = difference_distribution(samples, interval(0.1, -0.08, 0.28), {"no difference": 0.0, "required": 0.2})
    (axes,) = figure.axes
    title = f"+0.10, 95% interval {MINUS}0.08 to +0.28"
    assert axes.get_title(loc="left") == title
    assert legend(figure) == ["no difference (0): 75% lie above", "required (0.2): 25% lie above"]
    difference_distribution(np.zeros(5), interval(0.0, 0.0, 0.0), {})


def test_a_bootstrap_of_few_resamples_still_shows_its_shape():
    figure = difference_distribution(np.random.default_rng(0).normal(size=200), interval(0.0, -2.0, 2.0), {})
    assert len(figure.axes[0].patches) - 1 >= 20  # the interval is a patch as well


def test_drawdown_ticks_are_labelled_with_what_they_are():
    equity = np.concatenate([np.linspace(1.0, 0.93, 50), np.linspace(0.93, 1.0, 50)])[None]
    bottom = equity_fan(np.arange(100), {"one": equity}).axes[1]
    bottom.figure.canvas.draw()
    labels = [tick.get_text().replace(MINUS, "-") for tick in bottom.get_yticklabels()]
    np.testing.assert_allclose([float(label.rstrip("%")) / 100 for label in labels], bottom.get_yticks(), atol=1e-9)
    assert any("." in label for label in labels)


def test_a_policy_looks_the_same_in_every_figure():
    looks = styles(["unknown", "mbpo"])
    assert len({looks[name] for name in (*POLICIES, "unknown")}) == len(POLICIES) + 1
    assert styles(["mbpo"])["mbpo"] == styles(["ridge", "unknown", "mbpo"])["mbpo"]
    curves = {name: [interval(1.0, 0.8, 1.2)] * 2 for name in ("sac", "mbpo")}
    held = {name: np.full(300, 0.5) for name in ("mbpo", "sac")}
    fan = equity_fan(DAYS, {"ridge": grown(1), "sac": grown(1), "mbpo": grown(1)}).axes[0]
    lines = {line.get_label(): line.get_color() for line in fan.lines}
    assert {line.get_label(): line.get_color() for line in sharpe_by_size((5, 6), curves, {}).axes[0].lines} == {
        name: lines[name] for name in curves
    }
    strips = regime_and_position(DAYS, grown(1)[0], None, held).axes[1:]
    for name, axes in zip(held, strips, strict=True):
        assert to_hex(axes.collections[0].get_facecolor()[0]) == lines[name].lower()


def test_the_first_policy_lies_on_top():
    fan = equity_fan(DAYS, {"mbpo": grown(3), "sac": grown(3), "ridge": grown(3)}).axes[0]
    heights = [line.get_zorder() for line in fan.lines if line.get_label() in POLICIES]
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == 3
    assert min(heights) > max(band.get_zorder() for band in fan.collections)


def test_nothing_is_drawn_across_time_nobody_traded_and_folds_are_marked():
    days = np.concatenate([DAYS[:50], DAYS[150:200], DAYS[200:250]])
    assert traded(days, (50, 100)) == [slice(0, 50), slice(50, 150)]
    assert traded(DAYS, ()) == [slice(0, 300)]
    equity = np.concatenate([np.linspace(1.0, 0.9, 50), np.full(50, 0.9), np.linspace(0.9, 1.2, 50)])[None]
    figure = equity_fan(days, {"mbpo": equity}, starts=(50, 100))
    top, bottom, _ = figure.axes
    pieces = [line for line in top.lines if len(line.get_xdata()) > 2]
    assert [len(line.get_xdata()) for line in pieces] == [50, 100]
    rules = [line.get_xdata()[0] for line in top.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"]
    assert rules == [days[50], days[100]]
    assert legend(figure) == ["mbpo"]
    # The account of a fold has a peak of its own.
    drawdown = np.concatenate([line.get_ydata() for line in bottom.lines if len(line.get_xdata()) > 2])
    assert drawdown[49] == pytest.approx(-0.1)
    assert drawdown[50:].min() == pytest.approx(0.0)
    price, strip = regime_and_position(days, equity[0], None, {"mbpo": np.ones(150)}, starts=(50, 100)).axes
    assert [len(line.get_xdata()) for line in price.lines if len(line.get_xdata()) > 2] == [50, 100]
    assert len(strip.collections) == 2


def test_regimes_shade_the_bars_they_lasted_and_positions_keep_their_sign():
    regime = np.array([0] * 100 + [2] * 50 + [1] * 150)
    held = {"long": np.full(300, 0.5), "short": np.full(300, -1.25)}
    figure = regime_and_position(DAYS, grown(1)[0], regime, held)
    top, long, short = figure.axes
    shaded = [(patch.get_x(), patch.get_width(), patch.get_facecolor()) for patch in top.patches]
    first = (DAYS[0] - np.datetime64("1970-01-01")) / np.timedelta64(1, "D")
    assert [(x - first, width) for x, width, _ in shaded] == [(100.0, 50.0), (150.0, 149.0)]
    assert shaded[0][2][0] < shaded[1][2][0], "stressed is darker than sideways"
    assert legend(figure) == ["calm, 33%", "sideways, 50%", "stressed, 17%"]
    assert long.get_title(loc="left") == "long, mean 0.50"
    assert long.get_ylim() == short.get_ylim() == (-1.3125, 1.3125)
    assert len(REGIME_COLOURS) == 3


def test_learning_curves_stand_between_the_reference_levels():
    curves = {"mbpo": [interval(1.0, 0.8, 1.2), interval(1.2, 1.1, 1.3)], "ppo": [interval(0.9, 0.5, 1.3)] * 2}
    figure = sharpe_by_size((500, 5000), curves, {"oracle": 1.77, "filter": 1.76})
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "Sharpe ratio by training length, 95% intervals"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["500", "5,000"]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [1.0, 1.2])
    np.testing.assert_allclose(axes.collections[0].get_segments()[1][:, 1], [1.1, 1.3])
    low, high = (text.xy[1] for text in axes.texts)
    assert [text.get_text() for text in axes.texts] == ["filter 1.76", "oracle 1.77"]
    assert high - low > 0.03, "names that would overlap are pushed apart"


def test_forest_lists_every_estimate_from_top_to_bottom():
    figure = forest(
        {"fold 1": interval(0.2, -0.5, 0.9), "fold 2": interval(0.1, -0.4, 0.6)},
        label="difference of annualised Sharpe ratios",
        references={"no difference": 0.0},
    )
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["fold 1", "fold 2"]
    assert axes.yaxis_inverted()
    assert legend(figure) == ["no difference (0)"]
    assert struct.unpack(">II", png_bytes(figure, dpi=50)[16:24])[0] == 450


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: equity_fan(DAYS, {}), "equity_by_policy: expected at least one"),
        (lambda: equity_fan(DAYS, {"a": grown(2)[:, 1:]}), "equity of 'a': expected [P, 300], was [2, 299]"),
        (lambda: equity_fan(DAYS, {"a": np.zeros((1, 300))}), "equity of 'a': expected positive finite"),
        (lambda: difference_distribution(np.array([np.nan]), interval(0, 0, 0), {}), "samples: expected finite [R]"),
        (
            lambda: regime_and_position(DAYS, np.ones(300), np.full(300, 3), {"a": np.ones(300)}),
            "regime: expected indices below 3",
        ),
        (
            lambda: regime_and_position(DAYS, np.ones(300), np.zeros(300, int), {"a": np.ones(2)}),
            "position of 'a': expected [300], was [2]",
        ),
        (lambda: sharpe_by_size((5, 5), {"a": []}, {}), "sizes: expected ascending"),
        (lambda: sharpe_by_size((5, 6), {"a": []}, {}), "intervals of 'a': expected 2, was 0"),
        (lambda: forest({}, label="x", references={}), "intervals: expected at least one"),
    ],
)
def test_wrong_shapes_are_named(draw, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw()
