"""The learned market: normalisers, ensemble and calibration behind one raw-unit interface.

The market does not react to the agent, so the model maps a feature row to the distribution of the next one, without
an action. Letters: E members, K members asked for, B batch, M features.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from configs.schema import WorldModelConfig
from data.fields import Field
from world_model.density import student_quantiles, transform
from world_model.errors import ModelFileError
from world_model.networks import EnsembleMLP
from world_model.normaliser import Normaliser
from world_model.storage import read_model, write_model
from world_model.volatility import VolatilityLine

# Rows run at once: beyond it what the members say of them no longer stays in the cache until it is summed up.
CHUNK_ROWS = 1024
ALL = slice(None)


class Outlook(NamedTuple):
    """The next feature row as the equal-weight mixture of elites sees it, raw units."""

    mean: Tensor
    """[B, M]."""
    variance: Tensor
    """[B, M], by the law of total variance: mean noise of the elites plus the spread of their means."""
    disagreement: Tensor
    """[B]: mean over features of the elites' population standard deviation, in units of the training deltas'."""


class MarketModel(nn.Module):
    """Ensemble of Gaussians over the next feature row (PETS, arXiv:1805.12114), all inputs and outputs raw units.

    `elites` are the members that predictions mix and that imagination samples from; they travel with the weights. The
    mean is a straight line plus what the network makes of the rest. Both see their inputs clamped to the training
    support, so they never extrapolate. The volatility line alone sees rows as they are. NaN in a feature row gives NaN
    out; it is never replaced.
    """

    elite_index: Tensor
    line: Tensor
    mean_shrinkage: Tensor
    variance_scale: Tensor
    logvar_shrinkage: Tensor
    inverse_dof: Tensor
    follows_baseline: Tensor
    innovations: Tensor
    support_low: Tensor
    support_high: Tensor

    def __init__(
        self,
        fields: Sequence[Field],
        config: WorldModelConfig,
        input_normaliser: Normaliser,
        delta_normaliser: Normaliser,
        network: EnsembleMLP,
        *,
        elites: Sequence[int],
        support: tuple[Tensor, Tensor],
        line: Tensor | None = None,
        variance_scale: Tensor | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            fields: the M feature columns, in order.
            config: what the ensemble was built from.
            input_normaliser: statistics of the feature rows.
            delta_normaliser: statistics of `next_features - features`.
            network: maps normalised features to what `baseline` leaves of the next row, in delta standard deviations.
            elites: distinct member indices.
            support: lowest and highest value [M] of each feature, raw units.
            line: coefficients [M, 1 + M] of `baseline`, intercept first; None is the training mean alone.
            variance_scale: [M], multiplies every variance; None is all ones.

        Raises: ValueError if sizes disagree.
        """
        super().__init__()
        self.fields, self.config = tuple(fields), config
        size = len(self.fields)
        scale = torch.ones(size) if variance_scale is None else variance_scale
        named = {
            "input_normaliser": input_normaliser.mean,
            "delta_normaliser": delta_normaliser.mean,
            "support low": support[0],
            "support high": support[1],
            "variance_scale": scale,
        }
        for name, value in named.items():
            if value.shape != (size,):
                raise ValueError(f"{name}: expected [{size}], one per field, was {[*value.shape]}")
        if (network.num_inputs, network.num_outputs) != (size, size):
            raise ValueError(
                f"network: expected {size} inputs and outputs, was {network.num_inputs} and {network.num_outputs}"
            )
        self.input_normaliser, self.delta_normaliser, self.network = input_normaliser, delta_normaliser, network
        self.register_buffer("line", (self._constant_line() if line is None else line).to(torch.float32, copy=True))
        if self.line.shape != (size, 1 + size):
            raise ValueError(f"line: expected [{size}, {1 + size}], was {[*self.line.shape]}")
        self.register_buffer("mean_shrinkage", torch.ones(size))
        self.register_buffer("variance_scale", scale.to(torch.float32, copy=True))
        self.register_buffer("logvar_shrinkage", torch.ones(size))
        self.volatility = VolatilityLine(self.fields)
        # Tails and draws: Gaussian until `calibrate_variance` or `follow_baselines` say otherwise.
        self.register_buffer("inverse_dof", torch.zeros(size))
        self.register_buffer("follows_baseline", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("innovations", student_quantiles(torch.zeros(size)).to(torch.float32))
        self.register_buffer("support_low", support[0].to(torch.float32, copy=True))
        self.register_buffer("support_high", support[1].to(torch.float32, copy=True))
        self.register_buffer("elite_index", torch.tensor([*elites], dtype=torch.int64))
        self.elites = _checked_elites(self.elite_index, network.num_members)
        # A model is put together after its fit; from here on nobody needs gradients.
        self.requires_grad_(False)
        self.eval()
        self.register_load_state_dict_post_hook(_sync_elites)  # type: ignore[no-untyped-call]

    @property
    def num_members(self) -> int:
        """E."""
        return self.network.num_members

    @property
    def num_features(self) -> int:
        """M."""
        return len(self.fields)

    @property
    def varying(self) -> Tensor:
        """[M] bool: columns whose deltas moved in the training data; scores leave the others out."""
        return self.delta_normaliser.varying

    @property
    def reverting(self) -> Tensor:
        """[M] bool: columns whose level varied less than their deltas, such as returns: they revert at once."""
        return self.input_normaliser.std < self.delta_normaliser.std

    def baseline(self, features: Tensor) -> Tensor:
        """Mean of the next row by the straight line alone: a level for reverting columns, else a delta.

        Args: features: [..., M]. Returns: [..., M].
        """
        inputs = self.input_normaliser(self.clamp(features)).to(torch.float32)
        forecast = self.delta_normaliser.std * (self.line[:, 0] + inputs @ self.line[:, 1:].T)
        return torch.where(self.reverting, forecast, features + forecast)

    def constant_forecast(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The best that needs no model: the training level for reverting columns, else a constant delta.

        Args: features: [..., M]. Returns: mean [..., M] and variance [M] of the next row.
        """
        drift = features + self.delta_normaliser.mean
        mean = torch.where(self.reverting, self.input_normaliser.mean.expand_as(drift), drift)
        return mean, self.constant_variance

    @property
    def constant_variance(self) -> Tensor:
        """[M] variance of `constant_forecast`."""
        return torch.where(self.reverting, self.input_normaliser.std, self.delta_normaliser.std).square()

    def predict(self, features: Tensor, members: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Distribution of the next feature row, member by member. Traceable by `torch.export`.

        Args:
            features: [B, M], or [K, B, M] to give each member rows of its own.
            members: which members, in this order; None is all E, elite or not.

        Returns: mean [K, B, M] and var [K, B, M] of the next features. The mean departs from `baseline` by
            `mean_shrinkage` times what the network says. Columns that follow the baseline have a constant variance.
        Raises: ValueError on an empty batch, a wrong shape or member.
        """
        features = self._checked(features, ranks=(2, 3))
        mean, logvar = self._run(features, members)
        return self._raw_units(self.baseline(features), mean, logvar)

    def mixture(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, M] and variance [B, M] of the equal-weight mixture of elites (law of total variance)."""
        return self.outlook(features)[:2]

    def outlook(self, features: Tensor) -> Outlook:
        """What the elites expect together, how sure they are, and how far they are apart, in one pass.

        Args: features: [B, M].
        """
        features = self._checked(features, ranks=(2,))
        # Batches of a trace are symbolic; comparing them would freeze the export to one side of the branch.
        if not torch.compiler.is_exporting() and len(features) > CHUNK_ROWS:
            parts = zip(*(self.outlook(part) for part in torch.split(features, CHUNK_ROWS)), strict=True)
            return Outlook(*map(torch.cat, parts))
        mean, logvar = self._run(features, self.elites)
        centre, between = _moments(mean)
        reach = self.mean_shrinkage * self.delta_normaliser.std
        return Outlook(
            mean=self.baseline(features) + reach * centre,
            variance=self._variance(torch.exp(logvar).mean(dim=0)) + between * (reach * reach),
            disagreement=torch.sqrt(between).mean(dim=-1),
        )

    def disagreement(self, features: Tensor) -> Tensor:
        """How far the elites' means are apart: epistemic uncertainty.

        Args: features: [B, M].
        Returns: [B], mean over features of the elites' population standard deviation, in units of the training
            deltas' standard deviation; 0 with a single elite.
        """
        features = self._checked(features, ranks=(2,))
        # Batches of a trace are symbolic; comparing them would freeze the export to one side of the branch.
        if not torch.compiler.is_exporting() and len(features) > CHUNK_ROWS:
            return torch.cat([self.disagreement(part) for part in torch.split(features, CHUNK_ROWS)])
        mean = self.network.mean(self.input_normaliser(self.clamp(features)), self.elites)
        if self.volatility.active:
            mean = mean * torch.exp(0.5 * self.volatility(features))
        return torch.sqrt(_moments(mean)[1]).mean(dim=-1)

    @torch.no_grad()
    def sample_next(self, features: Tensor, member: Tensor, noise: Tensor) -> Tensor:
        """Draw the next feature row of each row from one member (TS1 of PETS, sec. 5.2).

        Only the picked member is run, on its own rows. The draw is clamped to the support: a Gaussian tail must
        not invent a negative volatility or a crash far beyond any seen.

        Args:
            features: [B, M].
            member: [B] int64, each an elite.
            noise: [B, M] standard normal; the only source of randomness. Where a column is not Gaussian, the number's
                level picks the quantile of its Student-t, or of the baseline's residuals in training.

        Returns: [B, M].
        Raises: ValueError on an empty batch, a wrong shape, or a member that is no elite.
        """
        return self.draw(features, member, noise)[0]

    @torch.no_grad()
    def draw(self, features: Tensor, member: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`sample_next` with the mean and variance of what was drawn from, each [B, M], before the clamp."""
        features = self._checked_draw(features, member, noise)
        low, high = self.support_low, self.support_high
        noise = self.innovation(noise)
        # In place where it can be: fresh memory costs more than the arithmetic.
        inputs = torch.clamp(features, low, high).sub_(self.input_normaliser.mean).div_(self.input_normaliser.std)
        found = self._in_deltas(features, *self.network.rowwise(inputs, member))
        mean, var = self._raw_units(self.baseline(features), *found)
        return torch.addcmul(mean, var.sqrt(), noise).clamp_(low, high), mean, var

    @torch.no_grad()
    def advance(
        self, features: Tensor, member: Tensor, noise: Tensor, columns: Sequence[int]
    ) -> tuple[Tensor, Outlook]:
        """`sample_next` and the `outlook` it is drawn from by one run of the elites, equal to the two up to rounding.

        Variances cost as much as the products; here only those of the member drawn from and of `columns` are computed.

        Args: as `sample_next`; columns: C features whose mean and variance the outlook is wanted of.
        Returns: the next rows [B, M], and the outlook at the given ones with mean [B, C] and variance [B, C].
        Raises: as `sample_next`.
        """
        features, wanted = self._checked_draw(features, member, noise), [*columns]
        slot = (member.unsqueeze(1) == self.elite_index).int().argmax(dim=1)
        share, reach = self.logvar_shrinkage.expand(self.num_features), self.mean_shrinkage * self.delta_normaliser.std
        drawn, outlooks = torch.empty_like(features), []
        parts = (torch.split(whole, CHUNK_ROWS) for whole in (features, slot, self.innovation(noise), drawn))
        for rows, picked, draws, out in zip(*parts, strict=True):
            mean, raw = self.network.unbounded(self.input_normaliser(self.clamp(rows)), self.elites)
            own, size = (picked, torch.arange(len(rows))), torch.zeros(())
            if self.volatility.active:
                size = self.volatility(rows)
                mean = mean * torch.exp(0.5 * size)
            baseline = self.baseline(rows)
            level, var = self._raw_units(baseline, mean[own], share * self.network.bounded(raw[own]) + size)
            torch.addcmul(level, var.sqrt_(), draws, out=out)
            centre, between = _moments(mean)
            logvar = share[wanted] * self.network.bounded(raw[..., wanted]) + size.expand_as(rows)[:, wanted]
            outlooks.append(
                Outlook(
                    mean=(baseline + reach * centre)[:, wanted],
                    variance=self._variance(torch.exp(logvar).mean(dim=0), wanted)
                    + (between * (reach * reach))[:, wanted],
                    disagreement=torch.sqrt(between).mean(dim=-1),
                )
            )
        return drawn.clamp_(self.support_low, self.support_high), Outlook(*map(torch.cat, zip(*outlooks, strict=True)))

    def clamp(self, features: Tensor) -> Tensor:
        """Move each feature to the nearest value inside the support; [..., M]. NaN stays NaN."""
        return torch.minimum(torch.maximum(features, self.support_low), self.support_high)

    def at_edge(self, features: Tensor) -> Tensor:
        """[B] bool: a varying feature lies on or beyond a bound of the support; NaN does not.

        That is where `sample_next` leaves a draw that fell outside.
        """
        features = self._checked(features, ranks=(2,))
        reached = (features <= self.support_low) | (features >= self.support_high)
        return (reached & self.varying).any(dim=-1)

    def save(self, directory: str | os.PathLike[str]) -> str:
        """Write the model to a new folder, as a whole or not at all.

        Returns: SHA-256 of everything saved, 64 hex digits.
        Raises: FileExistsError if the folder exists; OSError.
        """
        description = {
            "config": self.config.model_dump(mode="json"),
            "elites": [*self.elites],
            "fields": [field.to_dict() for field in self.fields],
        }
        return write_model(directory, self.state_dict(), description)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], fields: Sequence[Field] | None = None) -> MarketModel:
        """Rebuild a saved model after verifying its hashes.

        Args:
            directory: what `save` wrote.
            fields: the columns the caller will pass; None accepts those of the file.

        Raises: ModelFileError naming what is missing, damaged or different.
        """
        tensors, description = read_model(directory)
        try:
            saved = tuple(Field.from_dict(raw) for raw in description["fields"])
            config = WorldModelConfig.model_validate(description["config"])
            elites = tuple(description["elites"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(f"{directory}: model.json: {error}") from error
        if fields is not None:
            refuse_other_fields(f"{directory}", saved, fields)
        size = len(saved)
        blank = torch.zeros(size)
        # The drawn weights are overwritten at once; the generator only satisfies the constructor.
        network = EnsembleMLP(
            config.num_members,
            size,
            size,
            hidden=config.hidden,
            logvar_bounds=config.logvar_bounds,
            generator=torch.Generator(),
        )
        try:
            model = cls(
                saved,
                config,
                Normaliser(blank, blank),
                Normaliser(blank, blank),
                network,
                elites=elites,
                support=(blank, blank),
            )
            model.load_state_dict(tensors)
        except (RuntimeError, ValueError) as error:
            raise ModelFileError(f"{directory}: weights do not fit model.json: {error}") from error
        if model.elites != elites:
            raise ModelFileError(f"{directory}: elites: expected {elites}, weights say {model.elites}")
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ModelFileError(f"{directory}: {name}: expected finite numbers, was NaN or infinite")
        return model

    def _constant_line(self) -> Tensor:
        line = torch.zeros(self.num_features, 1 + self.num_features)
        level = torch.where(self.reverting, self.input_normaliser.mean, self.delta_normaliser.mean)
        line[:, 0] = level / self.delta_normaliser.std
        return line

    # Mean and variance of the next row from what the network says in delta standard deviations, all [..., M].
    def _raw_units(self, baseline: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        reach = self.mean_shrinkage * self.delta_normaliser.std
        return baseline + reach * mean, self._variance(torch.exp(logvar))

    def _variance(self, unit: Tensor, columns: list[int] | slice = ALL) -> Tensor:
        spread = self.delta_normaliser.std
        size = (spread * spread * self.variance_scale)[columns]
        return torch.where(self.follows_baseline[columns], self.constant_variance[columns], unit * size)

    # Network and line see clamped inputs. Beyond the training range it would extrapolate without bound: a single
    # bar with volume 0 once made it miss every other feature of the next bar by dozens of standard deviations.
    def _run(self, features: Tensor, members: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.network(self.input_normaliser(self.clamp(features)), members)
        return self._in_deltas(features, *found)

    # The network thinks in units of the volatility line, which sees the row as it is: it may extrapolate.
    def _in_deltas(self, features: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        # A constant share shrinks towards the training variance, which `variance_scale` settles.
        logvar = self.logvar_shrinkage * logvar
        if not self.volatility.active:
            return mean, logvar
        size = self.volatility(features)
        return mean * torch.exp(0.5 * size), logvar + size

    def innovation(self, noise: Tensor) -> Tensor:
        """Standard normal noise [..., M] as draws from each column's own unit distribution; see `sample_next`."""
        gaussian = not (self.inverse_dof.any() or self.follows_baseline.any())
        return noise if gaussian else transform(noise.flatten(0, -2), self.innovations).reshape(noise.shape)

    def _checked_draw(self, features: Tensor, member: Tensor, noise: Tensor) -> Tensor:
        features = self._checked(features, ranks=(2,))
        rows = features.shape[0]
        if member.shape != (rows,) or member.dtype != torch.int64:
            raise ValueError(f"member: expected int64 [{rows}], was {member.dtype} {[*member.shape]}")
        if noise.shape != features.shape:
            raise ValueError(f"noise: expected {[*features.shape]}, was {[*noise.shape]}")
        if not torch.isin(member, self.elite_index).all():
            raise ValueError(f"member: expected elites {self.elites}, was {sorted({*member.tolist()})}")
        return features

    def _checked(self, features: Tensor, ranks: tuple[int, ...]) -> Tensor:
        wanted = " or ".join("[B, M]" if rank == 2 else "[K, B, M]" for rank in ranks)
        if features.ndim not in ranks or features.shape[-1] != self.num_features:
            raise ValueError(f"features: expected {wanted} with M={self.num_features}, was {[*features.shape]}")
        if features.shape[-2] == 0:
            raise ValueError(f"features: expected at least one row, was {[*features.shape]}")
        if not features.is_floating_point():
            raise ValueError(f"features: expected floating point, was {features.dtype}")
        return features.to(torch.float32)


# torch.var(0) costs more than the network itself; two means over the leading axis do the same.
def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    centre = values.mean(dim=0)
    gap = values - centre
    return centre, gap.mul_(gap).mean(dim=0)


def _checked_elites(index: Tensor, num_members: int) -> tuple[int, ...]:
    elites = tuple(int(member) for member in index.tolist())
    if not elites or len({*elites}) != len(elites) or min(elites) < 0 or max(elites) >= num_members:
        raise ValueError(f"elites: expected distinct indices in 0..{num_members - 1}, was {elites}")
    return elites


# Tracing needs the elites as plain integers, `state_dict` needs them as a tensor: the tensor rules.
def _sync_elites(module: Any, _keys: Any) -> None:
    module.elites = _checked_elites(module.elite_index, module.num_members)


def refuse_other_fields(owner: str, expected: Sequence[Field], given: Sequence[Field]) -> None:
    """Raise ModelFileError unless both name the same columns in the same order; `owner` starts the message."""
    ours, theirs = [field.name for field in expected], [field.name for field in given]
    if len(ours) != len(theirs):
        raise ModelFileError(f"{owner}: fields: expected {len(ours)} columns {ours}, was {len(theirs)} {theirs}")
    for column, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our != their:
            raise ModelFileError(f"{owner}: fields: expected {our!r} in column {column}, was {their!r}")
