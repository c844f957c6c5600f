"""Fit a `MarketModel` to a table of features.

Letters: T rows of the table, N training rows, E members, M features, B batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.schema import WorldModelConfig
from data.errors import DataError
from data.fields import Field
from world_model.backprop import MemberGradients
from world_model.calibration import shrinkage_factor
from world_model.drift import refit_line
from world_model.linear import fit_line
from world_model.losses import gaussian_nll, member_nll, refuse_non_finite
from world_model.marginals import (
    calibrate_variance,
    central_coverage,
    follow_baselines,
    mixture_pit,
    refit_volatility,
    shrink_logvar,
)
from world_model.metrics import ModelMetrics, by_field, evaluate_market_model
from world_model.model import MarketModel
from world_model.networks import EnsembleMLP
from world_model.normaliser import Normaliser
from world_model.snapshots import MemberSnapshots
from world_model.volatility import VolatilityLine
from world_model.warm_start import adopt_market_weights, refuse_other_network

# Fewer training rows than this per feature cannot tell a covariance from noise, let alone a network.
ROWS_PER_FEATURE = 10
# A holdout smaller than this cannot estimate a variance multiplier to better than a fifth (sqrt(2/50)).
MIN_HOLDOUT_ROWS = 50
# The most a single number may cost in the stopping score, nats: a Gaussian's own rows reach it at 4.1 std.
ELEMENT_COST_LIMIT = 10.0
# The most a single column may cost in the stopping score, nats above the constant Gaussian.
COLUMN_COST_LIMIT = 1.0
# Most gradient steps between two looks at the holdout. A pass over daily bars takes a few; one over a year of minutes
# takes 200, and fifteen of them without improvement would be most of a fit.
EPOCH_STEPS = 64
# Holdout rows that decide when to stop at most, evenly spread; calibration and metrics use all of them.
SCORED_ROWS = 32_768
# The support is the training range widened by this share of it on either side.
SUPPORT_MARGIN = 0.1


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """What a fit did. Likelihoods are nats per feature in units of the training deltas' standard deviation."""

    train_rows: int
    holdout_rows: int
    epochs: int
    """Epochs run, early stopping included."""
    best_epochs: tuple[int, ...]
    """Epoch whose weights each member kept, counted from 1."""
    member_scores: tuple[float, ...]
    """Stopping score of each member on the holdout, before recalibration; see `stopping_score`."""
    elites: tuple[int, ...]
    """Members with the lowest score, best first."""
    mean_shrinkage: dict[str, float]
    """Share of each feature's predicted departure from the baseline that is believed, found on the holdout."""
    variance_scale: dict[str, float]
    """Multiplier of each feature's predicted variance: found on the holdout, with a volatility line on all rows."""
    coverage_before: dict[str, float]
    """Share of holdout rows inside the central 50/80/95 % intervals before the multiplier."""
    coverage_after: dict[str, float]
    """The same at the end, of the rows the multiplier was found on, so it flatters; judge on a later slice."""
    holdout: ModelMetrics
    """All metrics on the holdout at the end; chosen, calibrated and fitted to these rows too, so it flatters."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        raw = {name: value for name, value in vars(self).items() if name != "holdout"}
        for name in ("best_epochs", "member_scores", "elites"):
            raw[name] = [*raw[name]]
        return {**raw, "holdout": self.holdout.to_dict()}


def fit_market_model(
    features: NDArray[np.float64],
    fields: Sequence[Field],
    config: WorldModelConfig,
    seed: int,
    progress: Callable[[int, int, float], None] | None = None,
    *,
    purge: int = 0,
    warm_start: MarketModel | None = None,
) -> tuple[MarketModel, FitReport]:
    """Fit the ensemble to the transitions of one feature table.

    A straight line is fitted to the next row (`world_model.linear`), a second one to the log-variance of what it leaves
    (`world_model.volatility`), and the networks to the rest, in units of that line and of the standard deviation of
    `features[t+1] - features[t]`. The last `holdout_fraction` of the transitions, in time order, never reach a
    gradient: each member keeps the weights of its own best epoch there, fitting stops when no member has improved for
    `patience` epochs, and the best members become elites. There it is also decided, in this order and per feature, how
    much of the networks' mean and log-variance is believed, the variance multiplier and tails, and which features
    follow the baseline. At the end both lines are fitted once more to all rows, the holdout included, and with a
    volatility line multiplier and tails are set on them. Each member trains on a bootstrap sample drawn once for the
    whole fit (PETS). Every random number comes from one generator seeded with `seed`; torch's global generator is not
    touched.

    Args:
        features: [T, M], raw units, in time order, one row per bar.
        fields: the M columns.
        config: sizes and schedule.
        seed: of the fit's generator.
        progress: called after each epoch with (epoch, max_epochs, mean best score of the members).
        purge: transitions dropped between training and holdout rows; pass the feature lookback so that no
            window reaches over the border.
        warm_start: earlier model of the same columns and sizes whose weights are the first ones; None draws them.

    Returns: the model and its report.

    Raises:
        DataError: NaN, infinity, nothing that varies, or fewer than 10 training rows per feature or 50 holdout rows.
        TrainingError: a loss is not finite. Nothing is returned or written, so whatever model the caller has stays.
        ValueError: shapes, `purge`, or a `warm_start` of other sizes; ModelFileError if it has other fields.
    """
    values = _checked_table(features, fields)
    if warm_start is not None:
        refuse_other_network(warm_start, config, fields)
    if purge < 0:
        raise ValueError(f"purge: expected at least 0 rows, was {purge}")
    current, delta = values[:-1], np.diff(values, axis=0)
    holdout_rows = round(config.holdout_fraction * len(current))
    train_rows = len(current) - holdout_rows - purge
    _refuse_few_rows(train_rows, holdout_rows, purge, values.shape)
    first_holdout = train_rows + purge

    # Statistics come from training rows alone; the holdout must stay unseen.
    input_normaliser = Normaliser.fit(current[:train_rows])
    delta_normaliser = Normaliser.fit(delta[:train_rows])
    if not delta_normaliser.varying.any():
        raise DataError("features: expected at least one column that varies, all are constant in the training rows")
    low, high = training_support(values[: train_rows + 1])
    # Clamped as in `MarketModel`: the holdout must be seen the way the model will see it.
    inputs = input_normaliser.standardise(current.clip(low, high))
    line, targets = _beyond_line(inputs, values, train_rows, input_normaliser, delta_normaliser)
    volatility = VolatilityLine(fields)
    if config.volatility_line:
        volatility.fit(current[:train_rows], targets[:train_rows], delta_normaliser.varying)
        if volatility.active:
            # In units of the line's standard deviation, so that the network learns what the line leaves.
            targets = targets * torch.exp(-0.5 * volatility(torch.from_numpy(current).to(torch.float32)))

    generator = torch.Generator().manual_seed(seed)
    size = len(fields)
    network = EnsembleMLP(
        config.num_members,
        size,
        size,
        hidden=config.hidden,
        logvar_bounds=config.logvar_bounds,
        generator=generator,
    )
    if warm_start is not None:
        adopt_market_weights(network, warm_start, input_normaliser, delta_normaliser)
    snapshots, epochs = _train(
        network,
        train=(inputs[:train_rows], targets[:train_rows]),
        holdout=(inputs[first_holdout:], targets[first_holdout:]),
        varying=delta_normaliser.varying,
        config=config,
        generator=generator,
        progress=progress,
    )

    elites = tuple(torch.argsort(snapshots.scores, stable=True)[: config.num_elites].tolist())
    model = MarketModel(
        fields,
        config,
        input_normaliser,
        delta_normaliser,
        network,
        elites=elites,
        support=(torch.from_numpy(low), torch.from_numpy(high)),
        line=line,
    )
    model.volatility.load_state_dict(volatility.state_dict())
    holdout = values[first_holdout:]
    before, _ = recalibrate(model, holdout)
    follow_baselines(model, holdout, values[: train_rows + 1])
    known = np.r_[0:train_rows, first_holdout : len(current)]
    refit_line(model, current[known], values[known + 1])
    if config.volatility_line and model.volatility.active:
        refit_volatility(model, values)
        after = recalibrate_variance(model, values)
    else:
        after = _coverage(model, *map(torch.from_numpy, (holdout[:-1], holdout[1:])))
    report = FitReport(
        train_rows=train_rows,
        holdout_rows=holdout_rows,
        epochs=epochs,
        best_epochs=tuple(snapshots.epochs),
        member_scores=tuple(snapshots.scores.tolist()),
        elites=elites,
        mean_shrinkage=by_field(fields, model.mean_shrinkage),
        variance_scale=by_field(fields, model.variance_scale),
        coverage_before=before,
        coverage_after=after,
        holdout=evaluate_market_model(model, holdout, fields),
    )
    return model, report


def bootstrap_indices(num_rows: int, num_members: int, generator: torch.Generator) -> Tensor:
    """Draw with replacement the rows each member owns for the whole fit: [E, N] int64 in 0..num_rows-1."""
    return torch.randint(num_rows, (num_members, num_rows), generator=generator)


def epoch_batches(indices: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield one epoch: every member's own rows [E, N], each in an order of its own, as batches [E, B].

    Batches are as even as possible and at most `batch_size` rows: a tiny last batch would weigh its rows more.
    """
    # A permutation each costs a tenth of sorting random numbers.
    order = torch.stack([torch.randperm(indices.shape[1], generator=generator) for _ in indices])
    shuffled = torch.gather(indices, 1, order)
    yield from torch.chunk(shuffled, math.ceil(indices.shape[1] / batch_size), dim=1)


def epoch_steps(num_rows: int, batch_size: int) -> int:
    """Gradient steps of an epoch: a pass over the rows, or an even part of one that would take over EPOCH_STEPS."""
    whole = math.ceil(num_rows / batch_size)
    return math.ceil(whole / math.ceil(whole / EPOCH_STEPS))


def stopping_score(mean: Tensor, logvar: Tensor, target: Tensor, varying: Tensor) -> Tensor:
    """Holdout likelihood by which members are stopped and ranked.

    The mean over features of each feature's NLL, limited twice so that bad data in one column cannot decide when
    all others stop learning: no single number costs more than ELEMENT_COST_LIMIT (one bar with volume 0), and no
    feature more than COLUMN_COST_LIMIT above the constant Gaussian N(0, 1) under the same first limit (a column
    that hardly ever moved in training and moves throughout the holdout).

    Args: mean, logvar: [E, N, M]; target: [N, M], normalised units; varying: [M] bool, others are left out.
    Returns: [E], nats per feature.
    """
    by_feature = gaussian_nll(mean, logvar, target).clamp(max=ELEMENT_COST_LIMIT).mean(dim=1)
    zero = torch.zeros(())
    constant = gaussian_nll(zero, zero, target).clamp(max=ELEMENT_COST_LIMIT).mean(dim=0)
    return torch.minimum(by_feature, constant + COLUMN_COST_LIMIT)[:, varying].mean(dim=1)


@torch.no_grad()
def recalibrate(model: MarketModel, features: NDArray[np.float64]) -> tuple[dict[str, float], dict[str, float]]:
    """Set the model's `mean_shrinkage`, then its `variance_scale`, on features [T, M].

    Afterwards the networks' means have as much of their least-squares size as is sure, and squared standardised
    residuals average to 1.
    Returns: central coverage before and after, both on these very rows; only a later slice is an honest test.
    """
    model.mean_shrinkage.fill_(1.0)
    model.variance_scale.fill_(1.0)
    model.logvar_shrinkage.fill_(1.0)
    model.inverse_dof.fill_(0.0)
    model.follows_baseline.fill_(False)
    current, following = torch.from_numpy(features[:-1]), torch.from_numpy(features[1:])
    mean = model.mixture(current)[0].double()
    before = _coverage(model, current, following)

    baseline = model.baseline(current)
    factor = shrinkage_factor(mean - baseline, following - baseline, model.delta_normaliser.std.double())
    model.mean_shrinkage.copy_(factor)

    # Without a line there is only a constant to shrink to, and that is worse than a network in doubt.
    if model.config.volatility_line and model.volatility.active:
        shrink_logvar(model, current, following)
    return before, recalibrate_variance(model, features)


@torch.no_grad()
def recalibrate_variance(model: MarketModel, features: NDArray[np.float64]) -> dict[str, float]:
    """Set the model's `variance_scale` and tails on features [T, M]; return central coverage on these very rows."""
    current, following = torch.from_numpy(features[:-1]), torch.from_numpy(features[1:])
    calibrate_variance(model, current, following)
    return _coverage(model, current, following)


def _coverage(model: MarketModel, current: Tensor, following: Tensor) -> dict[str, float]:
    return central_coverage(mixture_pit(model, current, following)[:, model.varying.numpy()])


def training_support(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lowest and highest value [M] of values [T, M], widened by a tenth of the range on either side."""
    low, high = values.min(axis=0), values.max(axis=0)
    margin = SUPPORT_MARGIN * (high - low)
    return low - margin, high + margin


def _train(
    network: EnsembleMLP,
    *,
    train: tuple[Tensor, Tensor],
    holdout: tuple[Tensor, Tensor],
    varying: Tensor,
    config: WorldModelConfig,
    generator: torch.Generator,
    progress: Callable[[int, int, float], None] | None,
) -> tuple[MemberSnapshots, int]:
    inputs, targets = train
    indices = bootstrap_indices(len(inputs), config.num_members, generator)
    optimiser = torch.optim.AdamW(
        [
            {"params": [*network.weights], "weight_decay": config.weight_decay},
            {"params": [*network.biases], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        fused=True,
    )
    plain = config.input_noise == 0.0 and config.dropout == 0.0
    gradients = MemberGradients(network, inputs, targets)
    held_inputs, held_targets = (part[:: math.ceil(len(part) / SCORED_ROWS)] for part in holdout)
    passes = _passes(indices, config.batch_size, generator)
    steps = epoch_steps(indices.shape[1], config.batch_size)
    snapshots, stale, epoch = MemberSnapshots(network), 0, 0
    while epoch < config.max_epochs and stale < config.patience:
        epoch += 1
        for rows in itertools.islice(passes, steps):
            # Members share no weights, so each gets the gradient it would get alone.
            losses = gradients(rows) if plain else _regularised(network, inputs[rows], targets[rows], config, generator)
            refuse_non_finite(losses, epoch, "training loss")
            optimiser.step()
        with torch.no_grad():
            mean, logvar = network(held_inputs)
            # The score limits what a single number may cost; an infinite prediction must not hide behind that.
            broken = ~(torch.isfinite(mean) & torch.isfinite(logvar)).flatten(1).all(dim=1)
            scores = stopping_score(mean, logvar, held_targets, varying).masked_fill(broken, math.nan)
        refuse_non_finite(scores, epoch, "holdout score")
        stale = 0 if snapshots.update(epoch, scores) else stale + 1
        if progress is not None:
            progress(epoch, config.max_epochs, float(snapshots.scores.mean()))
    snapshots.restore()
    return snapshots, epoch


# Loss and gradients by automatic differentiation, with noise on the inputs and silenced units; batch [E, B, M].
def _regularised(
    network: EnsembleMLP, batch: Tensor, targets: Tensor, config: WorldModelConfig, generator: torch.Generator
) -> Tensor:
    noisy = batch + config.input_noise * torch.randn(batch.shape, generator=generator)
    mean, logvar = network(noisy, dropout=config.dropout, generator=generator)
    losses = member_nll(mean, logvar, targets)
    network.zero_grad(set_to_none=False)
    torch.autograd.backward(losses.sum())
    return losses.detach()


def _passes(indices: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from epoch_batches(indices, batch_size, generator)


def _checked_table(features: NDArray[np.float64], fields: Sequence[Field]) -> NDArray[np.float64]:
    if features.ndim != 2 or features.shape[1] != len(fields) or not fields:
        raise ValueError(f"features: expected [T, {len(fields)}], one column per field, was {[*features.shape]}")
    values = np.ascontiguousarray(features, dtype=np.float64)
    # The network runs in float32; what overflows there is as bad as infinity here.
    bad = ~(np.abs(values) < np.finfo(np.float32).max)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise DataError(
            f"features: expected finite numbers, was {values[row, column]} in row {row}, field {fields[column].name!r}"
        )
    return values


def _refuse_few_rows(train_rows: int, holdout_rows: int, purge: int, shape: tuple[int, ...]) -> None:
    needed = ROWS_PER_FEATURE * shape[1]
    if train_rows < needed or holdout_rows < MIN_HOLDOUT_ROWS:
        raise DataError(
            f"features: expected at least {needed} training rows ({ROWS_PER_FEATURE} per feature) and "
            f"{MIN_HOLDOUT_ROWS} holdout rows, was {max(train_rows, 0)} and {holdout_rows} "
            f"(table of {shape[0]} rows, purge {purge})"
        )


# The line [M, 1 + M] of the training rows, and what it leaves of every next row [N, M], in delta standard deviations.
def _beyond_line(
    inputs: Tensor,
    values: NDArray[np.float64],
    train_rows: int,
    input_normaliser: Normaliser,
    delta_normaliser: Normaliser,
) -> tuple[Tensor, Tensor]:
    # Levels where a column reverts within a bar, deltas elsewhere: there 0 is what one knows without the data.
    start = np.where((input_normaliser.std < delta_normaliser.std).numpy(), 0.0, values[:-1])
    outcome = (values[1:] - start) / delta_normaliser.std.double().numpy()
    design = inputs.double().numpy()
    coefficients, _ = fit_line(design[:train_rows], outcome[:train_rows])
    line = torch.from_numpy(coefficients).to(torch.float32)
    left = torch.from_numpy(outcome) - (line[:, 0] + inputs @ line[:, 1:].T)
    return line, left.to(torch.float32)
