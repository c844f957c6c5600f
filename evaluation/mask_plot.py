"""A mask over time: which actions were valid, which rule forbade the others, and what was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from evaluation.plots import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY
from masking import HOLD, RuleSet, TradingState
from masking.ruleset import NON_FINITE

VALID, BROKEN, OTHER = "#F3F5F7", BLACK, "#A8A8A8"
YELLOW = "#F0E442"
RULE_COLOURS = (PURPLE, RED, YELLOW, ORANGE, GREEN, SKY, BLUE)
"""One per rule in the order of the rule set, so that a rule looks the same in every figure; the rest share a grey."""
STATE_COLOURS = {TradingState.ACTIVE: "#E3E3E3", TradingState.REDUCE_ONLY: "#8C8C8C", TradingState.HALTED: BLACK}
STRIPES = 4
"""Stripes of a cell: the lowest shows the second rule, the others the first."""


def mask_reasons(
    rule_set: RuleSet,
    state: Mapping[str, NDArray[np.floating]],
    actions: NDArray[np.integer] | None = None,
    *,
    timestamps: NDArray[np.datetime64] | None = None,
    action_names: Sequence[str] | None = None,
    title: str = "Action masks and their reasons",
) -> Figure:
    """Actions x steps, each forbidden cell in the colour of the first rule that forbids it.

    A stripe at the lower edge of a cell shows the second rule, where there is one. A state that is not finite comes
    before every rule. The legend gives each rule's share: of all cells but Hold's, those it is the first to forbid.
    A choice that the masks forbid is a cross, and counted.

    Args: state maps each field of the rule set to [T], e.g. `BacktestResult.rule_columns()`; actions [T] chosen;
        timestamps [T], steps are numbered without; action_names [A], those of the action table without.
    Raises: ValueError on a length, RuleError on the state.
    """
    names = tuple(rule_set.actions.names if action_names is None else action_names)
    blocked = rule_set.blocked(state)
    reasons = (NON_FINITE, *(name for name in blocked if name != NON_FINITE))
    forbidden = np.stack([blocked[name].T for name in reasons])
    steps = forbidden.shape[2]
    _check_lengths(names, rule_set.actions.num_actions, steps, actions, timestamps)
    first, second = _first_two(forbidden)

    figure = Figure(figsize=(float(np.clip(4.5 + steps / 100, 11, 24)), 5.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 16))
    top.set_title(title, loc="left")
    states_key = _draw_states(top, state.get("trading_state"))
    reasons_key = _draw_reasons(bottom, reasons, first, second)
    choices_key = [] if actions is None else _draw_choices(bottom, actions, first < 0)

    bottom.set_yticks(np.arange(len(names)) + 0.5, names)
    bottom.set_ylim(0, len(names))
    bottom.set_xlim(0, steps)
    _label_steps(bottom, steps, timestamps)
    for axes in (top, bottom):
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.legend(handles=[*states_key, *reasons_key, *choices_key], loc="outside right upper", frameon=False)
    return figure


def _draw_states(axes: Axes, codes: NDArray[np.floating] | None) -> list[Any]:
    if codes is None:
        axes.set_yticks([])
        return []
    edges = np.arange(len(codes) + 1)
    shown = np.ma.masked_invalid(codes)[None]
    axes.pcolormesh(edges, (0, 1), shown, cmap=ListedColormap(list(STATE_COLOURS.values())), vmin=-0.5, vmax=2.5)
    axes.set_yticks([0.5], ["trading state"])
    patches = [Patch(facecolor=colour, label=code.name.replace("_", " ")) for code, colour in STATE_COLOURS.items()]
    return [_heading("Trading state"), *patches]


def _draw_reasons(axes: Axes, reasons: Sequence[str], first: NDArray[np.intp], second: NDArray[np.intp]) -> list[Any]:
    num_actions, steps = first.shape
    # A little lighter than the palette, so that dark dots stand out on every colour.
    rules = [_lighter(colour) for colour in (*RULE_COLOURS, *[OTHER] * len(reasons))]
    colours = (BROKEN, *rules[: len(reasons) - 1])
    stripes = np.repeat(first[:, None], STRIPES, axis=1)
    stripes[:, 0] = np.where(second >= 0, second, first)
    axes.pcolormesh(
        np.arange(steps + 1),
        np.arange(num_actions * STRIPES + 1) / STRIPES,
        stripes.reshape(-1, steps),
        cmap=ListedColormap([VALID, *colours]),
        vmin=-1.5,
        vmax=len(reasons) - 0.5,
    )
    axes.hlines(np.arange(1, num_actions), 0, steps, color="white", linewidth=2.5)
    if steps <= 60:
        axes.vlines(np.arange(1, steps), 0, num_actions, color="white", linewidth=0.8)
    cells = first[HOLD + 1 :]
    key: list[Any] = [
        _heading("\nForbidden by"),
        Patch(facecolor=VALID, edgecolor="#BBBBBB", linewidth=0.6, label="none"),
    ]
    for index, (name, colour) in enumerate(zip(reasons, colours, strict=True)):
        share = float((cells == index).mean())
        if share > 0 or (second == index).any():
            key.append(Patch(facecolor=colour, label=f"{name.replace('_', ' ')}, {share:.1%}"))
    if (second >= 0).any():
        key.append(_heading("(lower stripe: the second rule)"))
    return key


def _draw_choices(axes: Axes, actions: NDArray[np.integer], valid: NDArray[np.bool_]) -> list[Any]:
    num_actions, steps = valid.shape
    inside = (actions >= 0) & (actions < num_actions)
    legal = inside & valid[np.where(inside, actions, HOLD), np.arange(steps)]
    holds = legal & (actions == HOLD)
    centre, height = np.arange(steps) + 0.5, np.clip(actions, 0, num_actions - 1) + 0.5
    size = float(np.clip(5000 / steps, 10, 70))
    trades = legal & ~holds
    axes.scatter(centre[trades], height[trades], s=size, color=BLACK, edgecolors="white", linewidths=0.7)
    # Hold is chosen most of the time: smaller, so that the trades stand out.
    axes.scatter(centre[holds], height[holds], s=size / 5, color=BLACK, linewidths=0)
    axes.scatter(centre[~legal], height[~legal], s=90, color=BLACK, marker="X", edgecolors="white", linewidths=1.2)
    key: list[Any] = [_heading("\nChosen"), _marker("a target", 7), _marker("hold", 3)]
    if not legal.all():
        key.append(_marker(f"forbidden but chosen: {int((~legal).sum())}", 8, "X"))
    return key


def _label_steps(axes: Axes, steps: int, timestamps: NDArray[np.datetime64] | None) -> None:
    # A set: around a single step the locator places several ticks.
    ticks = sorted({int(tick) for tick in MaxNLocator(8, integer=True).tick_values(0, steps - 1) if 0 <= tick < steps})
    labels = ticks if timestamps is None else np.datetime_as_string(timestamps[ticks], unit="D")
    axes.set_xticks(np.asarray(ticks) + 0.5, [str(label) for label in labels])
    axes.set_xlabel("step" if timestamps is None else "decision after the close of")


def _first_two(forbidden: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Index of the first and the second reason of each cell, -1 where there is none; forbidden is [R, A, T]."""
    first = np.where(forbidden.any(axis=0), forbidden.argmax(axis=0), -1)
    rest = forbidden & (np.arange(len(forbidden))[:, None, None] != first)
    return first, np.where(rest.any(axis=0), rest.argmax(axis=0), -1)


def _check_lengths(
    names: Sequence[str], num_actions: int, steps: int, actions: NDArray[Any] | None, timestamps: NDArray[Any] | None
) -> None:
    if steps == 0:
        raise ValueError("state: expected at least one step, was empty")
    if len(names) != num_actions:
        raise ValueError(f"action_names: expected {num_actions}, was {len(names)}")
    for name, values in (("actions", actions), ("timestamps", timestamps)):
        if values is not None and values.shape != (steps,):
            raise ValueError(f"{name}: expected [{steps}], was {list(values.shape)}")


def _heading(text: str) -> Line2D:
    return Line2D([], [], linestyle="", label=text)


def _marker(label: str, size: float, marker: str = "o") -> Line2D:
    return Line2D([], [], color=BLACK, linestyle="", marker=marker, markersize=size, label=label)


def _lighter(colour: str) -> str:
    red, green, blue = (0.8 * part + 0.2 for part in to_rgb(colour))
    return to_hex((red, green, blue))
