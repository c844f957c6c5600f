"""The figures of a run, logged to MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from benchmarks import LatencyReport
from evaluation import BacktestResult
from evaluation.mask_plot import mask_reasons
from evaluation.plots import equity_and_drawdown, fan_chart, holdout_calibration, latency_histogram
from pipeline.inputs import RunInputs
from pipeline.tracking import Tracker
from pipeline.training import MBPO_NAME, LearnedMarket
from world_model import evaluate_market_model
from world_model import fan_chart as imagine_paths

FAN_PATHS = 500


def price_fan(inputs: RunInputs, market: LearnedMarket, *, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """Imagined and realised cumulative log return after the first validation bar.

    Returns: paths [N, H+1] and realised [H+1], both starting at 0.
    """
    table = inputs.validation
    moves = [table.index("gap_return"), table.index("intraday_return")]
    start = torch.as_tensor(table.values[0], dtype=torch.float32)
    generator = torch.Generator().manual_seed(inputs.config.seed)
    with torch.no_grad():
        paths = imagine_paths(market.model, start, horizon, FAN_PATHS, generator).numpy()
    imagined = paths[:, :, moves].sum(axis=2).cumsum(axis=1)
    realised = table.values[1 : horizon + 1, moves].sum(axis=1).cumsum()
    return np.pad(imagined, ((0, 0), (1, 0))), np.pad(realised, (1, 0))


def log_figures(
    tracker: Tracker,
    inputs: RunInputs,
    market: LearnedMarket,
    backtests: Mapping[str, Mapping[str, BacktestResult]],
    latency: LatencyReport,
    action_names: Sequence[str],
) -> None:
    """Equity and drawdown, masks with their reasons, calibration on validation, imagined futures, decision latency."""
    for window, by_policy in backtests.items():
        tracker.log_figure(equity_and_drawdown(by_policy), f"plots/equity_{window}.png")
    run = backtests["validation"][MBPO_NAME]
    figure = mask_reasons(
        inputs.dynamics.rule_set,
        run.rule_columns(),
        run.actions[:, 0],
        timestamps=run.timestamps[:-1],
        action_names=action_names,
        title=f"Action masks, their reasons and choices: {run.policy}",
    )
    tracker.log_figure(figure, "plots/mask_reasons_validation.png")
    scores = evaluate_market_model(market.model, inputs.validation.values, inputs.table.fields)
    tracker.log_figure(holdout_calibration(scores.pit, scores.coverage), "plots/calibration.png")
    horizon = inputs.config.mbpo.rollout_length
    paths, realised = price_fan(inputs, market, horizon=horizon)
    figure = fan_chart(paths, realised, title="Imagined futures of the price", ylabel="cumulative log return")
    tracker.log_figure(figure, "plots/rollout_fan.png")
    figure = latency_histogram(latency.samples_ms, inputs.config.export.latency_budget_ms)
    tracker.log_figure(figure, "plots/latency.png")
