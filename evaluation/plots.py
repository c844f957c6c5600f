"""Figures of backtests, model calibration and latency.

Each function returns a `matplotlib.figure.Figure` of its own and touches no global state (no pyplot), so it can run
in a thread and be handed to MLflow as it is. Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from evaluation.backtest import BacktestResult

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
BLACK, GREY = "#222222", "#DDDDDD"
BAND_GREY = "#C4C4C4"
"""Of areas: dark enough for a small patch in a legend."""
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK, RED)


def png_bytes(figure: Figure, dpi: int = 120) -> bytes:
    """Render a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def equity_and_drawdown(results: Mapping[str, BacktestResult]) -> Figure:
    """Equity and all-time drawdown of several policies over one window.

    A result with several paths is drawn as its median and the band from the 5th to the 95th percentile.

    Args: results by label, all over the same timestamps.
    Raises: ValueError if there are none or their timestamps differ.
    """
    if not results:
        raise ValueError("results: expected at least one backtest, was empty")
    first = next(iter(results.values()))
    for label, result in results.items():
        if not np.array_equal(result.timestamps, first.timestamps):
            raise ValueError(f"results[{label!r}]: expected the timestamps of the first result, were others")
    figure = Figure(figsize=(10, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    for index, (label, result) in enumerate(results.items()):
        colour = CYCLE[index % len(CYCLE)]
        paths = result.equity.shape[1]
        text = label if paths == 1 else f"{label} (median and 5-95 % of {paths} paths)"
        for axes, values in ((top, result.equity), (bottom, -result.drawdown)):
            if paths > 1:
                low, high = np.quantile(values, (0.05, 0.95), axis=1)
                axes.fill_between(result.timestamps, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(result.timestamps, np.median(values, axis=1), color=colour, linewidth=1.4, label=text)
    top.axhline(1.0, color=BLACK, linewidth=0.6, linestyle=":")
    top.set_title("Equity and drawdown after costs", loc="left")
    top.set_ylabel("equity, multiples of start")
    top.legend(loc="upper left", frameon=False)
    bottom.set_ylabel("drawdown from\nall-time peak")
    bottom.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    bottom.set_ylim(top=0.0)
    for axes in (top, bottom):
        _tidy(axes)
    _dates(bottom)
    return figure


def holdout_calibration(pit: NDArray[np.floating], coverage: Mapping[str, float], bins: int = 20) -> Figure:
    """Is the model's uncertainty the right size? PIT histogram and interval coverage.

    Args: pit [N] or [N, M], predicted distribution function at what happened, uniform on [0, 1] if calibrated;
        coverage maps the nominal level in percent to the observed share, e.g. {"80": 0.79}.
    Raises: ValueError on a rank, on no values or on values outside [0, 1].
    """
    if pit.ndim not in (1, 2) or pit.size == 0:
        raise ValueError(f"pit: expected [N] or [N, M] with values, was {list(pit.shape)}")
    if not ((pit >= 0) & (pit <= 1)).all():
        raise ValueError("pit: expected values in [0, 1], found others or NaN")
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    columns = pit.reshape(len(pit), -1)
    counts = np.stack([np.histogram(column, bins=bins, range=(0.0, 1.0))[0] for column in columns.T])
    density = counts.mean(axis=0) / len(columns) * bins
    # Rows count as independent and the features of a row as one: the widest band that chance can explain.
    slack = 2.0 * np.sqrt((1 - 1 / bins) / (len(columns) / bins))
    edges = np.linspace(0.0, 1.0, bins + 1)
    left.axhspan(1 - slack, 1 + slack, color=BAND_GREY, linewidth=0, zorder=0, label="calibrated, ±2 standard errors")
    left.axhline(1.0, color=BLACK, linewidth=0.8)
    left.stairs(density, edges, color=BLUE, linewidth=2.0, label="observed")
    left.set_xlim(0, 1)
    left.set_ylim(0, 1.1 * max(density.max(), 1 + slack))
    features = f"{columns.shape[1]} features" if columns.shape[1] > 1 else "1 feature"
    left.set_title(f"PIT on unseen bars: {len(columns):,} rows, {features}", loc="left")
    left.set_xlabel("predicted distribution function at the outcome")
    left.set_ylabel("density (1 = calibrated)")
    # Below the axes: within them the patch of the band would lie on the band itself.
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)

    levels = sorted(coverage, key=float)
    nominal = [float(level) / 100 for level in levels]
    observed = [coverage[level] for level in levels]
    right.plot((0, 1), (0, 1), color=BLACK, linewidth=0.8, label="calibrated")
    right.plot(nominal, observed, "o", color=RED, markersize=7, label="observed")
    for x, y in zip(nominal, observed, strict=True):
        right.annotate(f"{y:.1%}", (x, y), xytext=(8, -12), textcoords="offset points")
    right.set(xlim=(0, 1.15), ylim=(0, 1.05), xticks=nominal)
    right.set_title("Coverage of central intervals", loc="left")
    right.set_xlabel("nominal level")
    right.set_ylabel("share of outcomes inside")
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    right.legend(loc="upper left", frameon=False)
    for axes in (left, right):
        _tidy(axes)
    return figure


def fan_chart(
    paths: NDArray[np.floating],
    realised: NDArray[np.floating] | None,
    quantiles: Sequence[float] = (0.05, 0.25, 0.75, 0.95),
    *,
    title: str = "Imagined futures",
    ylabel: str = "value",
) -> Figure:
    """Central intervals and median of imagined paths, with what really happened on top.

    Args: paths [N, H+1], column 0 is the common start; realised [H+1] or None; quantiles ascending in pairs that
        mirror around 0.5.
    Raises: ValueError on shape, NaN or quantiles.
    """
    if paths.ndim != 2 or paths.size == 0 or not np.isfinite(paths).all():
        raise ValueError(f"paths: expected finite [N, H+1], was {list(paths.shape)} or not finite")
    if realised is not None and realised.shape != paths.shape[1:]:
        raise ValueError(f"realised: expected [{paths.shape[1]}], was {list(realised.shape)}")
    levels = np.asarray(quantiles, dtype=np.float64)
    mirrored = len(levels) > 0 and len(levels) % 2 == 0 and np.allclose(levels, 1 - levels[::-1])
    if not mirrored or (np.diff(levels) <= 0).any() or levels[0] < 0:
        raise ValueError(f"quantiles: expected ascending pairs mirrored around 0.5, was {tuple(quantiles)}")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    bars = np.arange(paths.shape[1])
    bounds = np.quantile(paths, levels, axis=0)
    pairs = len(levels) // 2
    for index in range(pairs):
        share = levels[-1 - index] - levels[index]
        axes.fill_between(
            bars,
            bounds[index],
            bounds[-1 - index],
            color=BLUE,
            alpha=0.15 + 0.2 * (index + 1) / pairs,
            linewidth=0,
            label=f"central {share:.0%}",
        )
    axes.plot(bars, np.median(paths, axis=0), color=BLUE, linewidth=1.6, label="median")
    if realised is not None:
        axes.plot(bars, realised, color=RED, linewidth=1.8, marker="o", markersize=3.5, label="realised")
    axes.set_title(f"{title}: {len(paths):,} paths", loc="left")
    axes.set_xlabel("bars ahead")
    axes.set_ylabel(ylabel)
    axes.set_xlim(0, max(1, len(bars) - 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left", frameon=False)
    _tidy(axes)
    return figure


def coverage_by_column(coverage: Mapping[str, Mapping[str, float]], *, title: str = "Coverage by column") -> Figure:
    """Which columns have intervals of the wrong size: the observed shares of each, beside their nominal levels.

    Args: column to nominal level in percent to the observed share, e.g. {"volume": {"80": 0.79}}; the same levels for
        all. Drawn from top to bottom.
    Raises: ValueError if there are no columns, the levels differ or a share is outside [0, 1].
    """
    levels = sorted(next(iter(coverage.values()), {}), key=float)
    if not levels or any({*shares} != {*levels} for shares in coverage.values()):
        raise ValueError(f"coverage: expected the same levels for one column or more, was {dict(coverage)}")
    shares = np.array([[column[level] for level in levels] for column in coverage.values()])
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError("coverage: expected shares in [0, 1], found others or NaN")
    figure = Figure(figsize=(8, 1.4 + 0.25 * len(coverage)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(coverage))
    for index, (level, observed) in enumerate(zip(levels, shares.T, strict=True)):
        colour, nominal = CYCLE[index % len(CYCLE)], float(level) / 100
        axes.axvline(nominal, color=colour, linewidth=1.2, linestyle="--")
        axes.plot(observed, rows, "o", color=colour, markersize=5, label=f"{level} % interval, nominal dashed")
    axes.set_yticks(rows, list(coverage))
    axes.set(xlim=(0, 1.02), ylim=(len(coverage) - 0.5, -0.5))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_title(title, loc="left")
    axes.set_xlabel("share of outcomes inside")
    figure.legend(loc="outside lower center", ncols=len(levels), frameon=False)
    _tidy(axes)
    return figure


def curves(
    x: NDArray[np.number] | NDArray[np.datetime64],
    lines: Mapping[str, NDArray[np.floating]],
    *,
    title: str,
    ylabel: str,
    xlabel: str = "",
) -> Figure:
    """Several quantities over the same axis, such as learning curves or densities over time.

    Args: x [N], numbers or timestamps; lines by label, each [N]. NaN leaves a gap.
    Raises: ValueError if there are none or a length differs.
    """
    if not lines:
        raise ValueError("lines: expected at least one, was empty")
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for index, (label, values) in enumerate(lines.items()):
        if np.shape(values) != (len(x),):
            raise ValueError(f"lines[{label!r}]: expected [{len(x)}], was {list(np.shape(values))}")
        axes.plot(x, values, color=CYCLE[index % len(CYCLE)], linewidth=1.4, label=label)
    axes.set_title(title, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.legend(loc="best", frameon=False)
    _tidy(axes)
    if np.issubdtype(np.asarray(x).dtype, np.datetime64):
        _dates(axes)
    return figure


def latency_histogram(ms: NDArray[np.floating], budget: float, *, title: str = "Decision latency") -> Figure:
    """Histogram of latencies on a logarithmic axis, with p50, p95, p99 and the budget.

    Args: ms [N], milliseconds > 0; budget in milliseconds.
    Raises: ValueError on rank, emptiness or values that are not positive.
    """
    if ms.ndim != 1 or ms.size == 0 or not (ms > 0).all() or not np.isfinite(ms).all():
        raise ValueError(f"ms: expected [N] positive finite milliseconds, was {list(ms.shape)} or out of range")
    if not 0 < budget < np.inf:
        raise ValueError(f"budget: expected positive milliseconds, was {budget}")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    low, high = ms.min() / 1.2, max(ms.max(), budget) * 1.3
    axes.hist(ms, bins=np.geomspace(low, high, 90).tolist(), color=SKY, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    for quantile, style in ((0.5, "-"), (0.95, "--"), (0.99, ":")):
        value = float(np.quantile(ms, quantile))
        axes.axvline(value, color=BLUE, linestyle=style, linewidth=1.6, label=f"p{quantile * 100:.0f} {_ms(value)}")
    late = float((ms > budget).mean())
    axes.axvline(budget, color=RED, linewidth=2.2, label=f"budget {_ms(budget)}, exceeded by {late:.2%}")
    axes.set_title(f"{title}: {len(ms):,} decisions", loc="left")
    axes.set_xlabel("milliseconds, logarithmic")
    axes.set_ylabel("decisions, logarithmic")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _tidy(axes)
    return figure


def _ms(value: float) -> str:
    return f"{value:.3g} ms"


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GREY, linewidth=0.6)
    axes.set_axisbelow(True)


def _dates(axes: Axes) -> None:
    axes.xaxis.set_major_locator(AutoDateLocator())  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_formatter(ConciseDateFormatter(axes.xaxis.get_major_locator()))  # type: ignore[no-untyped-call]
