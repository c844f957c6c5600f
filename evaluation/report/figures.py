"""Figures of a report: equity, differences, regimes and positions, learning curves, forests.

Each function returns a `matplotlib.figure.Figure`, as in `evaluation.plots`. Masks are drawn by
`evaluation.mask_plot`, calibration by `evaluation.plots.holdout_calibration`.

Letters: P paths, T closes, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from evaluation.plots import BLACK, CYCLE, GREY, RED, _dates, _tidy
from evaluation.report.display import number, prose
from evaluation.report.policies import POLICIES
from evaluation.statistics.interval import Interval

BAND = (0.10, 0.90)
"""Quantiles of the band around a median: the central 80 % of the paths."""
REGIME_COLOURS = ("#FFFFFF", "#DCDCDC", "#A9A9A9")
"""Of calm, sideways, stressed: the darker the worse, in print as well."""
LINES = ("-", "--", "-.")
"""The colours come around again with the next line style."""
MIDDLE = "#8C8C8C"
"""A grey for what is no policy."""
MIN_BINS = 20
"""Of a histogram: fewer hide its shape."""
Timestamps = NDArray[np.datetime64] | NDArray[np.integer]
"""[T] UTC closes, or numbers of bars where a market has no dates."""


def styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and line style by name, of `POLICIES` the same in every figure; other names get the next free ones."""
    places = {name: place for place, name in enumerate(POLICIES)}
    for name in names:
        places.setdefault(name, len(places))
    return {
        name: (CYCLE[place % len(CYCLE)], LINES[place // len(CYCLE) % len(LINES)]) for name, place in places.items()
    }


def equity_fan(
    timestamps: Timestamps,
    equity_by_policy: Mapping[str, NDArray[np.floating]],
    *,
    unit: str = "path",
    starts: Sequence[int] = (),
) -> Figure:
    """Median and central 80 % of equity and of drawdown over paths, and of equity at the end beside it.

    The first policy lies on top of the others.

    Args: equity [P, T] by policy, multiples of the start, logarithmic axis; P may differ between policies; unit: what P
        counts, in the singular; starts: closes, other than the first, at which a new account starts flat, marked by a
        rule; nothing is drawn across time that lies between two of them.
    Raises: ValueError on no policy, a shape, or equity that is not positive and finite.
    """
    _refuse_empty("equity_by_policy", equity_by_policy)
    for name, equity in equity_by_policy.items():
        if equity.ndim != 2 or equity.shape[0] == 0 or equity.shape[1:] != timestamps.shape:
            raise ValueError(f"equity of {name!r}: expected [P, {len(timestamps)}], was {list(equity.shape)}")
        if not ((equity > 0) & np.isfinite(equity)).all():
            raise ValueError(f"equity of {name!r}: expected positive finite multiples of the start, found others")
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(6, 1), height_ratios=(2.2, 1))
    top = figure.add_subplot(grid[0, 0])
    bottom = figure.add_subplot(grid[1, 0], sharex=top)
    end = figure.add_subplot(grid[0, 1], sharey=top)
    faint = 0.22 / max(1, len(equity_by_policy) - 1) ** 0.5
    style = styles(equity_by_policy)
    pieces = traded(timestamps, starts)
    for index, (name, equity) in enumerate(equity_by_policy.items()):
        colour, line = style[name]
        above = _above(index, equity_by_policy)
        accounts = np.split(equity, np.asarray(starts, dtype=np.intp), axis=1)
        drawdown = np.concatenate([one / np.maximum.accumulate(one, axis=1) - 1 for one in accounts], axis=1)
        for axes, values in ((top, equity), (bottom, drawdown)):
            low, median, high = np.quantile(values, (BAND[0], 0.5, BAND[1]), axis=0)
            for part, piece in enumerate(pieces):
                times, label = timestamps[piece], "" if part else name
                if len(values) > 1:
                    axes.fill_between(times, low[piece], high[piece], color=colour, alpha=faint, linewidth=0)
                axes.plot(times, median[piece], color=colour, linestyle=line, linewidth=1.6, label=label, zorder=above)
        low, median, high = np.quantile(equity[:, -1], (BAND[0], 0.5, BAND[1]))
        end.vlines(index, low, high, color=colour, linestyle=line, linewidth=2)
        end.plot(index, median, "o", color=colour, markersize=6)
    most = max(len(equity) for equity in equity_by_policy.values())
    over = f": median and central 80 % of up to {most} {unit}s" if most > 1 else ""
    top.set_title(f"Equity and drawdown after costs{over}", loc="left")
    _logarithmic(top)
    top.set_ylabel("equity, multiples of start")
    top.axhline(1.0, color=BLACK, linewidth=0.7, linestyle=":")
    top.tick_params(labelbottom=False)
    end.set_xlabel("at the end")
    end.set_xlim(-0.7, len(equity_by_policy) - 0.3)
    end.tick_params(bottom=False, labelbottom=False, labelleft=False, which="both")
    bottom.set_ylabel("drawdown from\npeak of the fold" if len(starts) else "drawdown from\nall-time peak")
    bottom.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    bottom.set_ylim(top=0.0)
    for axes in (top, bottom):
        _mark_starts(axes, timestamps, starts)
    for axes in (top, bottom, end):
        _tidy(axes)
    _time_axis(bottom, timestamps)
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def difference_distribution(
    samples: NDArray[np.floating],
    interval: Interval,
    thresholds: Mapping[str, float],
    *,
    label: str = "difference of annualised Sharpe ratios",
) -> Figure:
    """Bootstrap distribution of a difference, its interval, and how much of it lies above each threshold.

    Args: samples [R], drawn as wide as the interval; thresholds by what they mean, e.g. {"no difference": 0.0,
        "required": 0.10}.
    Raises: ValueError on samples that are not [R] and finite.
    """
    if samples.ndim != 1 or samples.size == 0 or not np.isfinite(samples).all():
        raise ValueError(f"samples: expected finite [R], was {list(samples.shape)} or not finite")
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    counts, _, _ = axes.hist(samples, bins=_bins(samples), color=MIDDLE, alpha=0.75, linewidth=0)
    axes.axvspan(interval.low, interval.high, color=GREY, alpha=0.55, linewidth=0, zorder=0)
    height = 1.08 * float(np.max(counts))
    axes.hlines(height, interval.low, interval.high, color=BLACK, linewidth=3)
    axes.plot(interval.estimate, height, "o", color=BLACK, markersize=8)
    for (meaning, value), line in zip(thresholds.items(), LINES * len(thresholds), strict=False):
        share = float((samples > value).mean())
        axes.axvline(
            value, color=RED, linestyle=line, linewidth=1.8, label=f"{meaning} ({value:g}): {share:.0%} lie above"
        )
    axes.set_title(
        f"{number(interval.estimate, '+.2f')}, {interval.level:.0%} interval {number(interval.low, '+.2f')} to "
        f"{number(interval.high, '+.2f')}",
        loc="left",
    )
    axes.set_xlabel(label)
    axes.set_ylabel("resamples")
    axes.set_ylim(0, 1.18 * float(np.max(counts)))
    if thresholds:
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    _tidy(axes)
    return figure


def regime_and_position(
    timestamps: Timestamps,
    price: NDArray[np.floating],
    regime: NDArray[np.integer] | None,
    position_by_policy: Mapping[str, NDArray[np.floating]],
    *,
    regime_names: Sequence[str] = ("calm", "sideways", "stressed"),
    starts: Sequence[int] = (),
) -> Figure:
    """Price over the true regimes, where they are known, and under it what each policy held.

    Args: price [T] positive, logarithmic axis; regime [T] indices of `regime_names`, None where nobody knows them;
        positions [T], multiples of equity; starts as `equity_fan` takes them.
    Raises: ValueError on a shape, an unknown regime, or no policy.
    """
    _refuse_empty("position_by_policy", position_by_policy)
    columns = {"price": price, **{f"position of {n!r}": p for n, p in position_by_policy.items()}}
    for name, values in (columns if regime is None else {"regime": regime, **columns}).items():
        if values.shape != timestamps.shape:
            raise ValueError(f"{name}: expected [{len(timestamps)}], was {list(values.shape)}")
    known = min(len(regime_names), len(REGIME_COLOURS))
    if regime is not None and not ((regime >= 0) & (regime < known)).all():
        raise ValueError(f"regime: expected indices below {known}, found others")
    strips = len(position_by_policy)
    figure = Figure(figsize=(9, 3.2 + 0.75 * strips), layout="constrained")
    top, *rest = figure.subplots(1 + strips, 1, sharex=True, height_ratios=(3.4, *[1] * strips))
    pieces = traded(timestamps, starts)
    for piece in pieces:
        top.plot(timestamps[piece], price[piece], color=BLACK, linewidth=1.1)
    _logarithmic(top)
    top.set_ylabel("price")
    shown = "Price" if regime is None else "Price, true regime"
    top.set_title(f"{shown}, and the position of each policy in multiples of equity", loc="left")
    largest = max(1.0, *(float(np.nanmax(np.abs(held), initial=0.0)) for held in position_by_policy.values()))
    short = any((held < 0).any() for held in position_by_policy.values())
    style = styles(position_by_policy)
    for axes, (name, held) in zip(rest, position_by_policy.items(), strict=True):
        for piece in pieces:
            axes.fill_between(timestamps[piece], 0, held[piece], step="post", color=style[name][0], linewidth=0)
        if short:
            axes.axhline(0.0, color=BLACK, linewidth=0.7)
        axes.set_ylim(-1.05 * largest if short else 0, 1.05 * largest)
        axes.set_yticks([-1, 0, 1] if short else [0, 1])
        axes.set_title(f"{name}, mean {np.nanmean(held):.2f}", loc="left", fontsize="medium", pad=3)
    for axes in (top, *rest):
        _tidy(axes)
        _mark_starts(axes, timestamps, starts)
        if regime is not None:
            _shade(axes, timestamps, regime)
    rest[-1].set_xlim(timestamps[0], timestamps[-1])
    _time_axis(rest[-1], timestamps)
    if regime is None:
        return figure
    patches = [
        Patch(facecolor=colour, edgecolor=BLACK, linewidth=0.5, label=f"{name}, {(regime == index).mean():.0%}")
        for index, (name, colour) in enumerate(zip(regime_names, REGIME_COLOURS, strict=False))
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    return figure


def sharpe_by_size(
    sizes: Sequence[int],
    intervals_by_policy: Mapping[str, Sequence[Interval]],
    references: Mapping[str, float],
    *,
    unit: str = "training bars",
) -> Figure:
    """Learning curves: Sharpe ratio over the training length, with intervals, between reference levels.

    The first policy lies on top of the others.

    Args: one interval per size and policy; references are levels that need no training, e.g. the oracle.
    Raises: ValueError on sizes that do not ascend from 1 up, or a number of intervals that differs from theirs.
    """
    _refuse_empty("intervals_by_policy", intervals_by_policy)
    if not sizes or sizes[0] < 1 or (np.diff(sizes) <= 0).any():
        raise ValueError(f"sizes: expected ascending positive numbers, was {list(sizes)}")
    for name, intervals in intervals_by_policy.items():
        if len(intervals) != len(sizes):
            raise ValueError(f"intervals of {name!r}: expected {len(sizes)}, was {len(intervals)}")
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    level = next(iter(intervals_by_policy.values()))[0].level
    middle = (len(intervals_by_policy) - 1) / 2
    nearest = min((later / earlier for earlier, later in pairwise(sizes)), default=2.0)
    apart = min(1.035, nearest ** (0.5 / len(intervals_by_policy)))
    style = styles(intervals_by_policy)
    for index, (name, intervals) in enumerate(intervals_by_policy.items()):
        colour, line = style[name]
        above = _above(index, intervals_by_policy)
        # Side by side, or the intervals would hide each other.
        place = np.asarray(sizes, dtype=np.float64) * apart ** (index - middle)
        estimates = np.array([interval.estimate for interval in intervals])
        ends = np.array([[interval.low, interval.high] for interval in intervals]).T
        axes.vlines(place, *ends, color=colour, linewidth=1.6, alpha=0.8, zorder=above)
        look = {"linestyle": line, "color": colour, "markersize": 5.5, "linewidth": 1.4}
        axes.plot(place, estimates, "o", label=name, zorder=above, **look)  # type: ignore[arg-type]
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel(f"{unit}, logarithmic")
    axes.set_ylabel("annualised Sharpe ratio")
    axes.set_title(f"Sharpe ratio by training length, {level:.0%} intervals", loc="left")
    for value in references.values():
        axes.axhline(value, color=BLACK, linewidth=0.9, linestyle=":")
    _label_levels(axes, references)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    _tidy(axes)
    return figure


def forest(intervals: Mapping[str, Interval], *, label: str, references: Mapping[str, float]) -> Figure:
    """Estimates with their intervals one under the other: policies, folds, markets.

    Args: label of the axis with its unit; references are vertical lines, e.g. {"no difference": 0.0}.
    Raises: ValueError if there are none.
    """
    _refuse_empty("intervals", intervals)
    figure = Figure(figsize=(9, 1.6 + 0.38 * len(intervals)), layout="constrained")
    axes = figure.subplots()
    for row, interval in enumerate(intervals.values()):
        axes.hlines(row, interval.low, interval.high, color=BLACK, linewidth=2.4, alpha=0.6)
        axes.plot(interval.estimate, row, "o", color=BLACK, markersize=7)
    for (meaning, value), line in zip(references.items(), LINES * len(references), strict=False):
        axes.axvline(value, color=RED, linewidth=1.4, linestyle=line, label=f"{meaning} ({value:g})", zorder=0)
    axes.set_yticks(range(len(intervals)), [prose(name) for name in intervals])
    axes.set_ylim(len(intervals) - 0.4, -0.6)
    axes.set_xlabel(label)
    level = next(iter(intervals.values())).level
    axes.set_title(f"Estimates and {level:.0%} intervals", loc="left")
    if references:
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    _tidy(axes)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=GREY, linewidth=0.6)
    return figure


def _refuse_empty(what: str, values: Mapping[str, object]) -> None:
    if not values:
        raise ValueError(f"{what}: expected at least one, was empty")


def traded(timestamps: Timestamps, starts: Sequence[int]) -> list[slice]:
    """Stretches of closes that follow one another: a start later than any other step takes begins the next one."""
    steps = np.diff(timestamps)
    inside = np.delete(steps, np.asarray(starts, dtype=np.intp) - 1)
    longest = inside.max(initial=steps.dtype.type(0)) if len(inside) else None
    cuts = [start for start in starts if longest is not None and steps[start - 1] > longest]
    return [slice(start, stop) for start, stop in zip([0, *cuts], [*cuts, len(timestamps)], strict=True)]


def _above(index: int, of: Sized) -> float:
    # Lines lie at 2: the first above the second, all above the bands.
    return 2.0 + (len(of) - index) / (len(of) + 1)


def _mark_starts(axes: Axes, timestamps: Timestamps, starts: Sequence[int]) -> None:
    for start in starts:
        axes.axvline(timestamps[start], color=MIDDLE, linewidth=0.8, zorder=1)


def _bins(samples: NDArray[np.floating]) -> int:
    if np.ptp(samples) == 0.0:
        return 1
    return max(MIN_BINS, len(np.histogram_bin_edges(samples, "fd")) - 1)


def _time_axis(axes: Axes, timestamps: Timestamps) -> None:
    if np.issubdtype(timestamps.dtype, np.datetime64):
        _dates(axes)
    else:
        axes.set_xlabel("bars")


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis with round ticks, also where it spans less than a decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = LogLocator(subs=(1.0, 2.0, 5.0)) if high / low > 10 else MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    axes.set_yticks([tick for tick in ticks.tick_values(low, high) if low <= tick <= high])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def _shade(axes: Axes, timestamps: Timestamps, regime: NDArray[np.integer]) -> None:
    """A patch per stay in a regime; bar t belongs to the interval from close t to close t + 1."""
    starts = np.flatnonzero(np.diff(regime, prepend=regime[0] - 1))
    ends = np.append(starts[1:], len(regime) - 1)
    for start, end in zip(starts, ends, strict=True):
        if regime[start] > 0:
            axes.axvspan(timestamps[start], timestamps[end], color=REGIME_COLOURS[regime[start]], linewidth=0, zorder=0)


def _label_levels(axes: Axes, levels: Mapping[str, float]) -> None:
    """Names of horizontal lines at the right edge, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, place = 0.045 * (high - low), -np.inf
    for name, value in sorted(levels.items(), key=lambda item: item[1]):
        place = max(value, place + gap)
        axes.annotate(
            f"{name} {number(value, '.2f')}",
            (1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
            color=BLACK,
            annotation_clip=False,
        )
