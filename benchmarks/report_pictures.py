"""The pictures of a report: equity of the pair that is compared, one market looked at closely, the world model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from benchmarks.comparison import Walked
from benchmarks.findings import Findings, SizeFindings
from benchmarks.suite import judged_market
from configs import DetentConfig
from envs import TradingDynamics
from envs.panel import FeaturePanel
from evaluation.mask_plot import mask_reasons
from evaluation.plots import holdout_calibration, png_bytes
from evaluation.report import Figure, Section
from evaluation.report.figures import equity_fan, regime_and_position

STRIP_BARS = 250
"""Bars that masks are shown for."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Market:
    """The market that is looked at closely: the first test path, or the test windows of a walk-forward."""

    names: tuple[str, ...]
    """Columns of the features."""
    timestamps: NDArray[np.datetime64]
    """[T] closes."""
    price: NDArray[np.float64]
    """[T] multiples of the first one."""
    regime: NDArray[np.int64] | None = None
    """[T], where it is known."""
    starts: tuple[int, ...] = ()
    """Closes, other than the first, at which a fold's account starts flat."""


def suite_market(config: DetentConfig) -> Market:
    """The first test market of a suite."""
    market = judged_market(config)
    features = market.features
    return Market(
        names=features.names,
        timestamps=features.timestamps,
        price=_price(features),
        regime=market.regime[0].astype(np.int64),
    )


def fold_market(bars: FeaturePanel, windows: Sequence[slice]) -> Market:
    """The test windows of a walk-forward one after the other. Args: windows: rows, oldest first."""
    rows = np.concatenate([np.arange(window.start, window.stop) for window in windows])
    lengths = [window.stop - window.start for window in windows]
    price = _price(bars)[rows]
    return Market(
        names=bars.names,
        timestamps=bars.timestamps[rows],
        price=price / price[0],
        starts=tuple(int(start) for start in np.cumsum(lengths)[:-1]),
    )


# Of the first market, by what closes moved.
def _price(features: FeaturePanel) -> NDArray[np.float64]:
    moves = sum(features.values[0, :, features.names.index(name)] for name in ("gap_return", "intraday_return"))
    return np.asarray(np.exp(np.cumsum(moves)), dtype=np.float64)


def explained(name: str, picture: Canvas, said: str) -> Figure:
    """A figure whose explanation is under it, for those who see it, and in its place for those who do not."""
    return Figure(name, png_bytes(picture), alt=said, caption=said)


def equity(main: SizeFindings, market: Market) -> Section:
    """Equity and drawdown of the policies that matter."""
    chosen = _shown(main)
    curves = {
        name: _equity_of(one.returns[0] if one.paths > 1 else one.returns[:, 0], market) for name, one in chosen.items()
    }
    by_run = next(iter(chosen.values())).paths == 1  # as the joined folds of a walk-forward are
    over = "training runs" if by_run else "paths of the first training run"
    said = f"Median and central 80 % of equity and drawdown over {over}, for {', '.join(chosen)}."
    if main.unit == "fold":
        said += (
            " Test windows only: the account of each fold starts flat at its rule, and nothing is drawn where nobody "
            "traded."
        )
    picture = equity_fan(market.timestamps, curves, unit="training run" if by_run else "path", starts=market.starts)
    return Section("Equity and drawdown", (), (), (explained("Equity and drawdown", picture, said),))


# [R, T] of returns [R, n]: none ends at the closes where an account starts.
def _equity_of(returns: NDArray[np.float32], market: Market) -> NDArray[np.float64]:
    growth = np.ones((len(returns), len(market.timestamps)))
    growth[:, np.delete(np.arange(growth.shape[1]), (0, *market.starts))] += returns
    return np.asarray(np.cumprod(growth, axis=1), dtype=np.float64)


def first_market(config: DetentConfig, findings: Findings, market: Market) -> Section:
    """One market, by the first training runs: price, regimes, positions, masks and their reasons."""
    names = [name for name in _shown(findings.main) if name in findings.first_path and name != "flat"]
    positions = {name: findings.first_path[name]["position"] for name in names}
    picture = regime_and_position(market.timestamps, market.price, market.regime, positions, starts=market.starts)
    by_fold = findings.main.unit == "fold"
    if by_fold:
        said = "Price over the test windows, and what each policy held, by the first training run of each fold."
        held = explained("Price and positions", picture, said)
    else:
        said = "Price of the first test market over its hidden regimes, and what each policy held."
        held = explained("Regimes and positions", picture, said)
    challenger = findings.main.claim.challenger
    first = findings.first_path[challenger]
    dynamics = TradingDynamics.from_config(market.names, config)
    actions = first["actions"][:STRIP_BARS].astype(np.int64)
    newest = market.starts[-1] if market.starts else 0
    strip = mask_reasons(
        dynamics.rule_set,
        {name: first["rule_states"][: len(actions), index] for index, name in enumerate(dynamics.rule_set.fields)},
        actions,
        timestamps=market.timestamps[newest : newest + len(actions)],
        title=f"Masks, their reasons and choices: {challenger}",
    )
    said = f"Which actions were forbidden to {challenger}, by which rule, and what it chose, bar by bar" + (
        ", at the beginning of the newest fold." if by_fold else "."
    )
    return Section("One market looked at closely", (), (), (held, explained("Masks and choices", strip, said)))


def world_model(findings: Findings) -> tuple[Section, ...]:
    """Calibration of the world model on validation bars; nothing where no policy has one."""
    first = findings.first_path.get("mbpo", {})
    if "pit" not in first:
        return ()
    coverage = dict(zip(("50", "80", "95"), first["coverage"].tolist(), strict=True))
    where = "on the first validation market, by the world model of the first training run"
    if findings.main.unit == "fold":
        where = "on the validation windows of all folds, by the world models of the first training run of each"
    figure = explained(
        "Calibration of the world model",
        holdout_calibration(first["pit"], coverage),
        f"Histogram of probability integral transforms and coverage of central intervals, {where}.",
    )
    return (Section("World model", (), (), (figure,)),)


def _shown(main: SizeFindings) -> dict[str, Walked]:
    first = [main.claim.challenger, main.claim.baseline, "belief_filter", "ridge", "buy_and_hold", "linear_signal"]
    return {name: main.policies[name] for name in first if name in main.policies and name != "flat"}
