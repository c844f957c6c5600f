"""The pictures of a report: equity of the pair that is compared, one market looked at closely, the world model."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from benchmarks.comparison import Walked
from benchmarks.findings import Findings, SizeFindings
from benchmarks.suite import judged_market
from configs import DetentConfig
from envs import TradingDynamics
from evaluation.mask_plot import mask_reasons
from evaluation.plots import holdout_calibration, png_bytes
from evaluation.report import Figure, Section
from evaluation.report.figures import equity_fan, regime_and_position

STRIP_BARS = 250
"""Bars of the first path that masks and positions are shown for."""


def explained(name: str, picture: Canvas, said: str) -> Figure:
    """A figure whose explanation is under it, for those who see it, and in its place for those who do not."""
    return Figure(name, png_bytes(picture), alt=said, caption=said)


def equity(main: SizeFindings, timestamps: NDArray[np.datetime64]) -> Section:
    """Equity and drawdown of the policies that matter. Args: timestamps [n + 1]."""
    chosen = _shown(main)
    curves = {name: _equity_of(one.returns[0] if one.paths > 1 else one.returns[:, 0]) for name, one in chosen.items()}
    by_run = next(iter(chosen.values())).paths == 1
    over = "training runs" if by_run else "paths of the first training run"
    figure = explained(
        "Equity and drawdown",
        equity_fan(timestamps, curves, unit="training run" if by_run else "path"),
        f"Median and central 80 % of equity and drawdown over {over}, for {', '.join(chosen)}.",
    )
    return Section("Equity and drawdown", (), (), (figure,))


def _equity_of(returns: NDArray[np.float32]) -> NDArray[np.float64]:
    growth = np.pad(1.0 + returns.astype(np.float64), ((0, 0), (1, 0)), constant_values=1.0)
    return np.asarray(np.cumprod(growth, axis=1), dtype=np.float64)


def first_market(config: DetentConfig, findings: Findings) -> Section:
    """One test market: regimes, positions, masks and their reasons."""
    market = judged_market(config)
    names = [name for name in _shown(findings.main) if name in findings.first_path and name != "flat"]
    gap, intraday = (market.features.names.index(name) for name in ("gap_return", "intraday_return"))
    moves = market.features.values[0, :, gap] + market.features.values[0, :, intraday]
    positions = {name: findings.first_path[name]["position"] for name in names}
    regimes = regime_and_position(
        market.features.timestamps, np.exp(np.cumsum(moves)), market.regime[0].astype(np.int64), positions
    )
    figures = [
        explained(
            "Regimes and positions",
            regimes,
            "Price of the first test market over its hidden regimes, and what each policy held.",
        )
    ]
    challenger = findings.main.claim.challenger
    first = findings.first_path[challenger]
    dynamics = TradingDynamics.from_config(market.features.names, config)
    fields = dynamics.rule_set.fields
    columns = {name: first["rule_states"][:STRIP_BARS, index] for index, name in enumerate(fields)}
    strip = mask_reasons(
        dynamics.rule_set,
        columns,
        first["actions"][:STRIP_BARS].astype(np.int64),
        timestamps=market.features.timestamps[: len(first["actions"][:STRIP_BARS])],
        title=f"Masks, their reasons and choices: {challenger}",
    )
    figures.append(
        explained(
            "Masks and choices",
            strip,
            f"Which actions were forbidden to {challenger}, by which rule, and what it chose, bar by bar.",
        )
    )
    return Section("One market looked at closely", (), (), tuple(figures))


def world_model(findings: Findings) -> tuple[Section, ...]:
    """Calibration of the world model on a validation market; nothing where no policy has one."""
    first = findings.first_path.get("mbpo", {})
    if "pit" not in first:
        return ()
    coverage = dict(zip(("50", "80", "95"), first["coverage"].tolist(), strict=True))
    figure = explained(
        "Calibration of the world model",
        holdout_calibration(first["pit"], coverage),
        "Histogram of probability integral transforms and coverage of central intervals, on the first validation "
        "market, by the world model of the first training run.",
    )
    return (Section("World model", (), (), (figure,)),)


def _shown(main: SizeFindings) -> dict[str, Walked]:
    first = [main.claim.challenger, main.claim.baseline, "belief_filter", "ridge", "buy_and_hold", "linear_signal"]
    return {name: main.policies[name] for name in first if name in main.policies and name != "flat"}
