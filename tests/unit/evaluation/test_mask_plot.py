from __future__ import annotations

import dataclasses
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb

from evaluation import RandomValid, backtest
from evaluation.mask_plot import BROKEN, RULE_COLOURS, STATE_COLOURS, VALID, _lighter, mask_reasons
from evaluation.plots import png_bytes
from masking import RULES, ActionTable, RuleError, RuleSet, TradingState, trading_rules

STALE, DRAWDOWN, VOLATILITY, EXPOSURE, PAPER, CHANGE, HOLDING = map(_lighter, RULE_COLOURS)
CALM = {
    "position": 0.5,
    "drawdown": 0.0,
    "trading_state": 0.0,
    "holding_time": 9.0,
    "volatility_20": 0.2,
    "data_age": 0.0,
}


def rule_set(**limits) -> RuleSet:
    return RuleSet(trading_rules(**limits), ActionTable((0.0, 0.5, 1.0, 1.25)))


def steps(*changes: dict[str, float]) -> dict[str, np.ndarray]:
    """Columns [T] of a calm account, with some values changed at each step."""
    return {name: np.array([{**CALM, **change}[name] for change in changes], np.float32) for name in CALM}


def colours(mesh) -> list[list[str]]:
    rows, width = mesh.get_array().shape
    mesh.update_scalarmappable()
    return [[to_hex(face) for face in row] for row in mesh.to_rgba(mesh.get_array()).reshape(rows, width, 4)]


def labels(figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text().strip() for text in legend.get_texts()]


def test_each_cell_has_the_colour_of_the_first_rule_and_a_stripe_of_the_second():
    state = steps(
        {},
        {"volatility_20": 0.9},
        {"trading_state": 1.0, "volatility_20": 0.9},
        {"data_age": 5.0},
        {"holding_time": 1.0},
        {"drawdown": np.nan},
    )
    figure = mask_reasons(rule_set(max_position_change=0.5), state)
    stripes = colours(figure.axes[1].collections[0])
    cells = {
        "hold": [VALID] * 6,
        "target 0": [VALID, VALID, VALID, STALE, HOLDING, BROKEN],
        "target 0.5": [VALID, VALID, VALID, STALE, HOLDING, BROKEN],
        "target 1": [VALID, VOLATILITY, DRAWDOWN, STALE, HOLDING, BROKEN],
        # Above 1 needs paper mode, and is 0.75 away from the position.
        "target 1.25": [PAPER, VOLATILITY, DRAWDOWN, STALE, PAPER, BROKEN],
    }
    for index, expected in enumerate(cells.values()):
        for stripe in (1, 2, 3):
            assert stripes[4 * index + stripe] == [colour.lower() for colour in expected]
    # Unknown drawdown allows nothing on the ladder: its second reason. At a calm step change follows paper.
    assert stripes[4 * 4] == [colour.lower() for colour in (CHANGE, PAPER, VOLATILITY, PAPER, CHANGE, DRAWDOWN)]
    assert stripes[4 * 3] == [colour.lower() for colour in (VALID, VOLATILITY, VOLATILITY, STALE, HOLDING, DRAWDOWN)]
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == list(cells)


def test_the_legend_names_rules_in_words_with_their_share_and_only_those_that_appear():
    # Two steps of four targets: paper first forbids one of eight cells, stale data four of eight.
    found = labels(mask_reasons(rule_set(max_position_change=2.0), steps({}, {"data_age": 5.0})))
    assert "stale data, 50.0%" in found
    assert "paper only leverage, 12.5%" in found
    assert not any(word in label for label in found for word in ("non finite", "drawdown", "holding", "chosen"))
    assert "(lower stripe: the second rule)" in found
    assert labels(mask_reasons(rule_set(paper=True, max_position_change=2.0), steps({}))) == [
        "Trading state", "ACTIVE", "REDUCE ONLY", "HALTED", "Forbidden by", "none",
    ]  # fmt: skip


def test_the_strip_shows_the_trading_state_and_a_gap_where_it_is_unknown():
    figure = mask_reasons(rule_set(), steps(*({"trading_state": code} for code in (0, 1, 2, np.nan))))
    mesh = figure.axes[0].collections[0]
    assert colours(mesh)[0][:3] == [STATE_COLOURS[code].lower() for code in TradingState]
    assert mesh.get_array().mask.tolist() == [[False, False, False, True]]
    stale = RuleSet(trading_rules()[:1], ActionTable())
    bare = mask_reasons(stale, {"position": np.zeros(3), "data_age": np.zeros(3)})
    assert not bare.axes[0].collections
    assert "Trading state" not in labels(bare)


def test_choices_are_dots_and_a_forbidden_one_is_a_cross_that_is_counted():
    state = steps({}, {}, {}, {}, {})
    trades, holds, crosses = mask_reasons(rule_set(), state, np.array([2, 0, 1, 0, 3])).axes[1].collections[-3:]
    assert trades.get_offsets().tolist() == [[0.5, 2.5], [2.5, 1.5], [4.5, 3.5]]
    assert holds.get_offsets().tolist() == [[1.5, 0.5], [3.5, 0.5]]
    assert len(crosses.get_offsets()) == 0
    figure = mask_reasons(rule_set(), state, np.array([2, 0, 4, -1, 9]))
    assert figure.axes[1].collections[-1].get_offsets().tolist() == [[2.5, 4.5], [3.5, 0.5], [4.5, 4.5]]
    assert "forbidden but chosen: 3" in labels(figure)


def test_a_backtest_is_drawn_as_it_was_recorded(make_dynamics, rough_history):
    dynamics = make_dynamics()
    run = backtest(dynamics, *rough_history, RandomValid(3), batch=2)
    figure = mask_reasons(dynamics.rule_set, run.rule_columns(1), run.actions[:, 1], timestamps=run.timestamps[:-1])
    forbidden = np.array(colours(figure.axes[1].collections[0]))[3::4] != VALID.lower()
    np.testing.assert_array_equal(~forbidden.T, run.action_masks[:, 1])
    assert not any("forbidden but chosen" in label for label in labels(figure))
    shown = [label.get_text() for label in figure.axes[1].get_xticklabels()]
    assert shown[:2] == ["2020-01-01", "2020-03-21"]


@pytest.mark.parametrize("length", [1, 20, 2000])
def test_any_number_of_steps_fits_with_its_legend_and_labels(length):
    changes = [
        {"data_age": 5.0},
        {"trading_state": 1.0},
        {"volatility_20": 0.9},
        {"holding_time": 1.0},
        {"position": np.inf},
    ]
    state = steps(*(changes[step % 5] for step in range(length)))
    days = np.datetime64("2020-01-01", "ns") + np.arange(length) * np.timedelta64(1, "D")
    figure = mask_reasons(rule_set(max_exposure=0.9), state, np.full(length, 4), timestamps=days)
    png = png_bytes(figure)
    assert 11 <= figure.get_size_inches()[0] <= 24.5
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.x0 >= figure.axes[1].get_window_extent().x1
    boxes = [label.get_window_extent() for label in figure.axes[1].get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    again = mask_reasons(rule_set(max_exposure=0.9), state, np.full(length, 4), timestamps=days)
    assert png_bytes(again) == png


def test_steps_are_numbered_without_timestamps_and_names_can_be_given():
    figure = mask_reasons(rule_set(), steps(*[{}] * 20), action_names="abcde", title="Fold 3")
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["0", "3", "6", "9", "12", "15", "18"]
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == list("abcde")
    assert figure.axes[0].get_title(loc="left") == "Fold 3"


def test_more_rules_than_colours_share_a_grey(monkeypatch):
    bases = (type(trading_rules()[0]),)
    types = [
        dataclasses.make_dataclass(f"Rule{index}", [], bases=bases, namespace={"name": f"rule {index}"}, frozen=True)
        for index in range(9)
    ]
    for kind in types:
        monkeypatch.setitem(RULES, kind.name, kind)
    figure = mask_reasons(
        RuleSet([kind(max_age_bars=0.0 if index == 8 else 9.0) for index, kind in enumerate(types)], ActionTable()),
        {"position": np.zeros(2), "data_age": np.array([0.0, 1.0])},
    )
    assert colours(figure.axes[1].collections[0])[5] == [VALID.lower(), _lighter("#A8A8A8")]
    assert "rule 8, 50.0%" in labels(figure)


def test_colours_differ_for_every_kind_of_sight():
    """Machado et al. (2009), severity 1: no two colours of the palette fall together."""
    sights = {
        "normal": np.eye(3),
        "protanopia": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deuteranopia": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.01182, 0.04294, 0.968881],
        ],
        "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    }
    palette = np.array([to_rgb(colour) for colour in (VALID, BROKEN, *map(_lighter, RULE_COLOURS))])
    linear = np.where(palette <= 0.04045, palette / 12.92, ((palette + 0.055) / 1.055) ** 2.4)
    to_lms = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
    to_oklab = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])
    for matrix in sights.values():
        seen = np.clip(linear @ np.array(matrix).T, 0, 1)
        oklab = np.cbrt(seen @ to_lms.T) @ to_oklab.T
        apart = np.linalg.norm(oklab[:, None] - oklab[None], axis=-1) + np.eye(len(oklab))
        # 0.02 is about the smallest difference one can see.
        assert apart.min() > 0.06


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actions": np.zeros(3, int)}, r"actions: expected \[2\], was \[3\]"),
        ({"timestamps": np.zeros(1, "M8[ns]")}, r"timestamps: expected \[2\], was \[1\]"),
        ({"action_names": ("a", "b")}, "action_names: expected 5, was 2"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mask_reasons(rule_set(), steps({}, {}), **options)


def test_no_steps_and_missing_columns_are_refused():
    with pytest.raises(ValueError, match="at least one step"):
        mask_reasons(rule_set(), {name: column[:0] for name, column in steps({}).items()})
    with pytest.raises(RuleError, match="missing"):
        mask_reasons(rule_set(), {"position": np.zeros(2)})


def test_the_picture_leaves_pyplot_alone():
    code = "import evaluation.mask_plot, sys; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
