"""Scores of a fitted model on a slice of history it has not seen.

Letters: T rows of the slice, N = T-1 transitions, K elites, M features. Likelihoods are nats per feature in units of
the training deltas' standard deviation: the constant Gaussian scores 1.419 (0.5*log(2*pi*e)) on its own data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.errors import DataError
from data.fields import Field
from world_model.density import density_nll
from world_model.losses import gaussian_nll, mixture_nll
from world_model.marginals import central_coverage, constant_nll, mixture_pit
from world_model.model import MarketModel, refuse_other_fields

PIT_BINS = 20


@dataclass(frozen=True, kw_only=True)
class ModelMetrics:
    """One-step metrics of a model on one slice; columns that never moved in training are left out throughout."""

    rows: int
    """N: transitions scored."""
    nll: float
    """Of the equal-weight mixture of elites, whole rows jointly (a sample takes its row from one member)."""
    nll_constant: float
    """Of one Gaussian per feature fitted to the training deltas."""
    nll_persistence: float
    """Of `next = current` with the training deltas' second moment as variance."""
    nll_tightest: float
    """Of the tighter of constant-delta and constant-level Gaussian for each feature, judged on training data.

    The fair baseline for features such as returns, which revert to their mean within one row: there a constant-delta
    Gaussian loses half a log 2 to anyone who knows that returns are uncorrelated.
    """
    nll_by_field: dict[str, float]
    """The mixture feature by feature; their mean differs from `nll`, which mixes whole rows."""
    nll_tightest_by_field: dict[str, float]
    """`nll_tightest` feature by feature."""
    follows_baseline: tuple[str, ...]
    """Features on which the model was no better than that on its holdout: they are drawn from the baseline."""
    r2_by_field: dict[str, float]
    """Share of the delta's squared deviation from the mean training delta that the mixture mean explains."""
    r2_by_group: dict[str, float]
    """Mean of `r2_by_field` over the fields of a group."""
    coverage: dict[str, float]
    """Share inside the central 50/80/95 % intervals of the mixture."""
    coverage_by_group: dict[str, dict[str, float]]
    """The same, field group by field group."""
    pit: NDArray[np.float64]
    """[N, M'] mixture distribution function at what happened; uniform on [0, 1] if calibrated."""
    groups: tuple[str, ...]
    """Group of each of the M' columns of `pit`."""

    @property
    def nll_gain(self) -> float:
        """Nats per feature won over the constant Gaussian; higher is better."""
        return self.nll_constant - self.nll

    @property
    def no_better(self) -> tuple[str, ...]:
        """Features on which the constant baseline is at least as good on these rows."""
        return tuple(name for name, nll in self.nll_by_field.items() if nll >= self.nll_tightest_by_field[name])

    @property
    def nll_gain_tightest(self) -> float:
        """Nats per feature won over the tightest constant baseline."""
        return self.nll_tightest - self.nll

    def pit_histogram(self, bins: int = PIT_BINS) -> dict[str, list[float]]:
        """Share of PIT values per bin and group; 1/bins everywhere if calibrated."""
        histogram = {}
        for group in sorted({*self.groups}):
            picked = self.pit[:, [own == group for own in self.groups]]
            counts, _ = np.histogram(picked, bins=bins, range=(0.0, 1.0))
            histogram[group] = (counts / picked.size).tolist()
        return histogram

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary; PIT values become histograms."""
        raw = {name: value for name, value in vars(self).items() if name not in ("pit", "groups")}
        return {
            **raw,
            "nll_gain": self.nll_gain,
            "nll_gain_tightest": self.nll_gain_tightest,
            "follows_baseline": [*self.follows_baseline],
            "no_better": [*self.no_better],
            "pit_histogram": self.pit_histogram(),
        }


@torch.no_grad()
def evaluate_market_model(model: MarketModel, features: NDArray[np.float64], fields: Sequence[Field]) -> ModelMetrics:
    """Score one-step predictions on consecutive rows.

    Args: features [T, M], raw units, in time order; fields: its columns, which must be the model's.
    Raises: ModelFileError for other fields; ValueError on shape; DataError on NaN or fewer than two rows.
    """
    refuse_other_fields("model", model.fields, fields)
    if features.ndim != 2 or features.shape[1] != len(fields):
        raise ValueError(f"features: expected [T, {len(fields)}], was {[*features.shape]}")
    if features.shape[0] < 2:
        raise DataError(f"features: expected at least 2 rows, was {features.shape[0]}")
    if not np.isfinite(features).all():
        row, column = np.argwhere(~np.isfinite(features))[0]
        raise DataError(
            f"features: expected finite numbers, was {features[row, column]} "
            f"in row {row}, field {fields[column].name!r}"
        )
    values = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float64))
    current, following = values[:-1], values[1:]
    varying = model.varying
    kept = [field for field, moves in zip(fields, varying.tolist(), strict=True) if moves]

    unit = model.delta_normaliser.std.double()
    log_unit = torch.log(unit)
    mean, var = (part.double() for part in model.predict(current, model.elites))
    by_element = (density_nll(mean, var, following, model.inverse_dof.double()) - log_unit)[..., varying]
    residual = following - mean.mean(dim=0)
    baselines = _baselines(model, current, following)
    by_field_baseline = (baselines["nll_tightest"] - log_unit)[:, varying].mean(dim=0)

    deviation = following - current - model.delta_normaliser.mean.double()
    r2_by_field = _r2(residual[:, varying], deviation[:, varying], kept)
    by_group: dict[str, list[float]] = {}
    for field in kept:
        if field.name in r2_by_field:
            by_group.setdefault(field.group, []).append(r2_by_field[field.name])
    pit = mixture_pit(model, current, following)[:, varying.numpy()]
    groups = tuple(field.group for field in kept)
    follows = model.follows_baseline.tolist()
    return ModelMetrics(
        rows=len(current),
        nll=float(mixture_nll(by_element.sum(dim=2)).mean()) / len(kept),
        **{name: float((value - log_unit)[:, varying].mean()) for name, value in baselines.items()},
        nll_by_field=by_field(kept, mixture_nll(by_element).mean(dim=0)),
        nll_tightest_by_field=by_field(kept, by_field_baseline),
        follows_baseline=tuple(field.name for field, follow in zip(fields, follows, strict=True) if follow),
        r2_by_field=r2_by_field,
        r2_by_group={group: sum(scores) / len(scores) for group, scores in by_group.items()},
        coverage=central_coverage(pit),
        coverage_by_group={
            group: central_coverage(pit[:, [own == group for own in groups]]) for group in sorted({*groups})
        },
        pit=pit,
        groups=groups,
    )


@torch.no_grad()
def fan_chart(model: MarketModel, start: Tensor, horizon: int, num_paths: int, generator: torch.Generator) -> Tensor:
    """Imagine many futures of one feature row; each step of each path asks a freshly drawn elite (TS1).

    Args: start [M], raw units; horizon: bars; num_paths; generator: the only source of randomness.
    Returns: [num_paths, horizon, M]; row h is h+1 bars after `start`.
    """
    if start.shape != (model.num_features,):
        raise ValueError(f"start: expected [{model.num_features}], was {[*start.shape]}")
    if horizon < 1 or num_paths < 1:
        raise ValueError(f"horizon and num_paths: expected at least 1, was {horizon} and {num_paths}")
    features = start.to(torch.float32).expand(num_paths, -1)
    steps = []
    for _ in range(horizon):
        drawn = torch.randint(len(model.elites), (num_paths,), generator=generator)
        noise = torch.randn(features.shape, generator=generator)
        features = model.sample_next(features, model.elite_index[drawn], noise)
        steps.append(features)
    return torch.stack(steps, dim=1)


def _baselines(model: MarketModel, current: Tensor, following: Tensor) -> dict[str, Tensor]:
    delta_mean, delta_std = model.delta_normaliser.mean.double(), model.delta_normaliser.std.double()
    second_moment = delta_std * delta_std + delta_mean * delta_mean
    return {
        "nll_constant": gaussian_nll(current + delta_mean, 2.0 * torch.log(delta_std), following),
        "nll_persistence": gaussian_nll(current, torch.log(second_moment), following),
        "nll_tightest": constant_nll(model, current, following),
    }


# A field that stands still in the slice has nothing to explain and is left out.
def _r2(residual: Tensor, deviation: Tensor, fields: Sequence[Field]) -> dict[str, float]:
    unexplained, total = (residual * residual).sum(dim=0).tolist(), (deviation * deviation).sum(dim=0).tolist()
    return {
        field.name: 1.0 - rest / whole
        for field, rest, whole in zip(fields, unexplained, total, strict=True)
        if whole > 0.0
    }


def by_field(fields: Sequence[Field], values: Tensor) -> dict[str, float]:
    """Values [M] keyed by field name."""
    return {field.name: value for field, value in zip(fields, values.tolist(), strict=True)}
