"""The learned world of an environment: what it declares is computed, the rest comes from an ensemble.

Letters: E members, K members asked for, B batch, D obs, M = D + 1 outputs (delta of obs, reward), A mask width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from world_model.errors import ModelFileError
from world_model.known import KnownParts
from world_model.learned_masks import LearnedMasks
from world_model.mask_bound import MaskBound
from world_model.mask_head import MaskHead
from world_model.networks import EnsembleMLP
from world_model.normaliser import Normaliser
from world_model.paired import PairedEnsemble
from world_model.storage import read_model, write_model
from world_model.uncertainty import Measure

KIND = "world"
LOGVAR_BOUNDS = (-14.0, 4.0)
"""In units of the targets' standard deviation: deterministic physics is predicted to a thousandth of a step."""


class WorldStep(NamedTuple):
    """One imagined step of B rows."""

    next_obs: Tensor
    """[B, D]."""
    reward: Tensor
    """[B]."""
    terminated: Tensor
    """bool [B]."""
    uncertainty: Tensor
    """[B], in units of the training targets' standard deviation; 0 where no measure was asked for."""


@dataclass(frozen=True, kw_only=True)
class WorldSizes:
    """Everything needed to build the networks."""

    num_obs: int
    num_actions: tuple[int, ...]
    """Actions of each dimension; one for Discrete."""
    num_members: int
    hidden: tuple[int, ...]
    terminates: bool
    """Whether termination is learned: not declared, and seen in the data."""

    @property
    def width(self) -> int:
        """A, and the width of the one-hot action."""
        return sum(self.num_actions)

    def networks(self, generator: torch.Generator) -> tuple[EnsembleMLP, EnsembleMLP | None]:
        """Fresh networks: (obs, action) to delta and reward; (obs, action, next_obs) to the logit of termination."""
        options: dict[str, Any] = {
            "hidden": self.hidden,
            "logvar_bounds": LOGVAR_BOUNDS,
            "generator": generator,
        }
        dynamics = EnsembleMLP(self.num_members, self.num_obs + self.width, self.num_obs + 1, **options)
        if not self.terminates:
            return dynamics, None
        return dynamics, EnsembleMLP(self.num_members, 2 * self.num_obs + self.width, 1, **options)


class WorldModel(nn.Module):
    """Ensemble of environments (PETS, arXiv:1805.12114; MBPO, arXiv:1906.08253) under what is known of them.

    Delta of obs and reward are Gaussian, termination is Bernoulli given where a step led, masks come from a head of
    their own. Columns that never changed in training keep their value exactly. Actions enter one-hot. Predictions mix
    `elites`; members that are none are never asked. Inputs are clamped to the training support.

    Args:
        sizes: of the networks.
        known: declared parts, which replace what is learned.
        inputs: statistics of obs [D]; targets: of delta and reward [D + 1].
        dynamics, termination: networks as `WorldSizes.networks` builds them.
        elites: of the dynamics; termination_elites: of the termination head, empty without one.
        support: lowest and highest obs [D].
        masks: learned masks; None where masks are declared or nothing was ever masked: then every action is valid.
    """

    elite_index: Tensor
    termination_elite_index: Tensor
    support_low: Tensor
    support_high: Tensor

    def __init__(
        self,
        sizes: WorldSizes,
        known: KnownParts,
        *,
        inputs: Normaliser,
        targets: Normaliser,
        dynamics: EnsembleMLP,
        termination: EnsembleMLP | None,
        elites: Sequence[int],
        termination_elites: Sequence[int],
        support: tuple[Tensor, Tensor],
        masks: LearnedMasks | None,
    ) -> None:
        super().__init__()
        for name, value, size in (
            ("inputs", inputs.mean, sizes.num_obs),
            ("targets", targets.mean, sizes.num_obs + 1),
            ("support low", support[0], sizes.num_obs),
            ("support high", support[1], sizes.num_obs),
        ):
            if value.shape != (size,):
                raise ValueError(f"{name}: expected [{size}], was {[*value.shape]}")
        for name, chosen in {"elites": elites, "termination_elites": termination_elites}.items():
            if len({*chosen}) != len(chosen) or any(not 0 <= one < sizes.num_members for one in chosen):
                raise ValueError(f"{name}: expected distinct members in 0..{sizes.num_members - 1}, was {[*chosen]}")
        if not elites or bool(termination_elites) != sizes.terminates:
            raise ValueError(f"elites: expected some of each network, was {[*elites]} and {[*termination_elites]}")
        self.sizes, self.known = sizes, known
        self.inputs, self.targets = inputs, targets
        self.dynamics, self.termination = dynamics, termination
        self.register_buffer("elite_index", torch.tensor([*elites], dtype=torch.int64))
        self.register_buffer("termination_elite_index", torch.tensor([*termination_elites], dtype=torch.int64))
        self.register_buffer("support_low", support[0].to(torch.float32, copy=True))
        self.register_buffer("support_high", support[1].to(torch.float32, copy=True))
        self._visible = known.visible(sizes.num_obs, sizes.width)
        self.learned_masks = masks
        self.mask_head = None if masks is None else masks.head
        self.requires_grad_(False)
        self.eval()

    @property
    def elites(self) -> tuple[int, ...]:
        """Members of the dynamics that predictions mix, best first."""
        return tuple(self.elite_index.tolist())

    @property
    def termination_elites(self) -> tuple[int, ...]:
        """Members of the termination head that count, best first."""
        return tuple(self.termination_elite_index.tolist())

    def predict(self, obs: Tensor, action: Tensor, members: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Distribution of delta and reward, member by member, before any declared part.

        Args: obs [B, D]; action int64 [B, K]; members in this order, None for the elites.
        Returns: mean and var [K, B, D + 1], raw units; variance 0 in columns that never changed.
        """
        mean, var = self._standard(*self._checked(obs, action), self.elites if members is None else members)
        return self.targets.inverse(mean), var * self.targets.std**2

    @torch.no_grad()
    def step(
        self,
        obs: Tensor,
        action: Tensor,
        *,
        member: Tensor,
        noise: Tensor,
        uniform: Tensor,
        measure: Measure | None = None,
    ) -> WorldStep:
        """Draw one step from one member per row (TS1 of PETS, sec. 5.2); the arguments are its only randomness.

        Args:
            obs: [B, D]; action: int64 [B, K].
            member: int64 [B], each an elite.
            noise: standard normal [B, D + 1]; uniform: in [0, 1), [B], decides terminations.
            measure: of `world_model.uncertainty`, applied to the elites. Without one only the drawn members run.

        Raises: ValueError on a shape or a member that is no elite.
        """
        obs, action = self._checked(obs, action)
        rows = len(obs)
        if member.shape != (rows,) or not torch.isin(member, self.elite_index).all():
            raise ValueError(f"member: expected elites {self.elites} [{rows}], was {[*member.shape]}")
        for name, given, shape in (("noise", noise, (rows, self.sizes.num_obs + 1)), ("uniform", uniform, (rows,))):
            if given.shape != shape:
                raise ValueError(f"{name}: expected {[*shape]}, was {[*given.shape]}")
        uncertainty = torch.zeros(rows)
        if measure is None:
            mean, var = self._of_members(obs, action, member)
        else:
            all_mean, all_var = self._standard(obs, action, self.elites)
            uncertainty = measure(all_mean, all_var)
            place = (member[:, None] == self.elite_index).to(torch.uint8).argmax(dim=1)
            mean, var = all_mean[place, torch.arange(rows)], all_var[place, torch.arange(rows)]
        drawn = self.targets.inverse(mean + torch.sqrt(var) * noise)
        next_obs, reward = obs + drawn[:, :-1], drawn[:, -1]
        if self.known.transition is not None:
            next_obs = self.known.transition(obs, action, next_obs)
        if self.known.reward is not None:
            reward = self.known.reward(obs, action, next_obs)
        return WorldStep(next_obs, reward, self._terminated(obs, action, next_obs, uniform), uncertainty)

    @torch.no_grad()
    def step_each(
        self, obs: Tensor, action: Tensor, members: Sequence[int], noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of particles, each with a member of its own. Traceable by `torch.export`.

        Args:
            obs: [K, B, D], one slice per member; action: int64 [K, B, dimensions]; members: K elites.
            noise: standard normal [K, B, D + 1]; None takes each member's mean.

        Returns: next obs [K, B, D]; reward [K, B]; terminated bool [K, B], where that is more likely.
        """
        count, rows = obs.shape[:2]
        flat, flat_action = self._checked(obs.flatten(0, 1), action.flatten(0, 1))
        chosen = one_hot(flat_action, self.sizes.num_actions).reshape(count, rows, -1)
        network = self._paired(members, with_variance=noise is not None)
        found = network.each((self.clamp(flat) - self.inputs.mean).reshape(count, rows, -1), chosen)
        return self._arrived(flat, flat_action, self._drawn(found, noise).flatten(0, 1), (count, rows))

    @torch.no_grad()
    def branch_each(
        self, obs: Tensor, members: Sequence[int], noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `step_each`, under each of the A actions of a world with one action dimension.

        Args: obs [K, B, D]; members; noise [K, B * A, D + 1].
        Returns: next obs [K, B * A, D], all actions of a row side by side; reward and terminated [K, B * A].
        Raises: ValueError where actions have several dimensions.
        """
        if len(self.sizes.num_actions) > 1:
            raise ValueError(f"world: expected one action dimension, was {self.sizes.num_actions}")
        (count, rows, size), width = obs.shape, self.sizes.width
        network = self._paired(members, with_variance=noise is not None)
        drawn = self._drawn(network.pairs(self.clamp(obs) - self.inputs.mean), noise)
        before = obs.repeat_interleave(width, dim=1).reshape(-1, size)
        action = torch.arange(width).repeat(count * rows)[:, None]
        return self._arrived(before, action, drawn.reshape(-1, size + 1), (count, rows * width))

    @torch.no_grad()
    def termination_probability(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """Probability [B] that a step from obs to next_obs ends the episode: mean over the elites; 0 without a head."""
        obs, action = self._checked(obs, action)
        if self.termination is None:
            return torch.zeros(obs.shape[0])
        reached = self.inputs(self.clamp(next_obs)) * self._visible[: self.sizes.num_obs]
        inputs = torch.cat((self._encoded(obs, action), reached), dim=1)
        logit, _ = self.termination(inputs, self.termination_elites)
        return torch.sigmoid(logit[..., 0]).mean(dim=0)

    @torch.no_grad()
    def action_masks(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Masks of imagined states: declared, certified, or without a promise where there is none to be had.

        Returns: bool [B, A] and refused bool [B]: rows in which some dimension has no valid action, so that none may
            be taken there; the branch is cut.
        """
        if self.known.action_masks is not None:
            masks = self.known.action_masks(obs)
        elif self.learned_masks is not None and self.learned_masks.bound.trials:
            masks = self.learned_masks.judge(obs).action_masks
        elif self.learned_masks is not None:
            # Nothing is promised, so nothing is refused: what is more likely valid than not, or else the likeliest.
            parts = torch.split(self.learned_masks.head(self.clamp(obs)), [*self.sizes.num_actions], dim=1)
            masks = torch.cat([(part > 0) | (part == part.amax(dim=1, keepdim=True)) for part in parts], dim=1)
            if self.learned_masks.safe_action is not None:
                masks[:, self.learned_masks.safe_action] = True
        else:
            masks = torch.ones(obs.shape[0], self.sizes.width, dtype=torch.bool)
        possible = [part.any(dim=1) for part in torch.split(masks, [*self.sizes.num_actions], dim=1)]
        return masks, ~torch.stack(possible).all(dim=0)

    def clamp(self, obs: Tensor) -> Tensor:
        """Nearest obs inside the support, exact columns too, as the networks see it: [..., D]; NaN stays NaN."""
        return torch.minimum(torch.maximum(obs, self.support_low), self.support_high)

    def in_support(self, obs: Tensor) -> Tensor:
        """[B] bool: every number lies within the training range widened by a tenth on either side; NaN is outside.

        Columns that a declared transition computes are exact anywhere and need only be finite.
        """
        inside = (obs >= self.support_low) & (obs <= self.support_high)
        exact = torch.zeros(self.sizes.num_obs, dtype=torch.bool)
        exact[[*self.known.exact]] = True
        return (inside | (exact & torch.isfinite(obs))).all(dim=-1)

    def save(self, directory: str | os.PathLike[str]) -> str:
        """Write the model to a new folder, as a whole or not at all. Declared functions are remembered by name only.

        Returns: SHA-256 of everything saved, 64 hex digits.
        Raises: FileExistsError if the folder exists; OSError.
        """
        masks: dict[str, Any] | None = None
        if self.learned_masks is not None:
            widths = [layer.out_features for layer in self.learned_masks.head.network if isinstance(layer, nn.Linear)]
            masks = {
                "hidden": widths[:-1],
                "safe_action": self.learned_masks.safe_action,
                "bound": asdict(self.learned_masks.bound),
            }
        description = {
            "kind": KIND,
            "sizes": asdict(self.sizes),
            "known": [*self.known.names],
            "exact": [*self.known.exact],
            "elites": [*self.elites],
            "termination_elites": [*self.termination_elites],
            "masks": masks,
        }
        return write_model(directory, self.state_dict(), description)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], known: KnownParts | None = None) -> WorldModel:
        """Rebuild what `save` wrote, after verifying its hashes.

        Args: known: the parts that were declared when it was fitted; None if there were none.
        Raises: ModelFileError naming what is missing, damaged or different.
        """
        known = known or KnownParts()
        tensors, description = read_model(directory)
        if description.get("kind") != KIND:
            raise ModelFileError(f"{directory}: model.json: kind: expected {KIND!r}, was {description.get('kind')!r}")
        try:
            declared = ([*description["known"]], [*description["exact"]])
            if declared != ([*known.names], [*known.exact]):
                raise ModelFileError(
                    f"{directory}: known: expected {declared[0]} with exact columns {declared[1]}, "
                    f"was {[*known.names]} with {[*known.exact]}"
                )
            model = cls._blank(description, known)
            model.load_state_dict(tensors)
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            if isinstance(error, ModelFileError):
                raise
            raise ModelFileError(f"{directory}: weights do not fit model.json: {error}") from error
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ModelFileError(f"{directory}: {name}: expected finite numbers, was NaN or infinite")
        return model

    # A model of the described sizes whose tensors are overwritten at once.
    @classmethod
    def _blank(cls, description: Mapping[str, Any], known: KnownParts) -> WorldModel:
        raw = {**description["sizes"]}
        sizes = WorldSizes(
            **{**raw, "num_actions": tuple(raw["num_actions"]), "hidden": tuple(raw["hidden"])},
        )
        obs, out = torch.zeros(sizes.num_obs), torch.zeros(sizes.num_obs + 1)
        dynamics, termination = sizes.networks(torch.Generator())
        masks = None
        if description["masks"] is not None:
            head = MaskHead(
                Normaliser(obs, obs),
                (obs, obs),
                num_actions=sizes.width,
                hidden=description["masks"]["hidden"],
                generator=torch.Generator(),
            )
            bound = MaskBound(**description["masks"]["bound"])
            masks = LearnedMasks(head, bound, safe_action=description["masks"]["safe_action"])
        return cls(
            sizes,
            known,
            inputs=Normaliser(obs, obs),
            targets=Normaliser(out, out),
            dynamics=dynamics,
            termination=termination,
            elites=description["elites"],
            termination_elites=description["termination_elites"],
            support=(obs, obs),
            masks=masks,
        )

    # Delta and reward in raw units, and the raw log-variance after them, of members asked as pairs.
    def _paired(self, members: Sequence[int], *, with_variance: bool) -> PairedEnsemble:
        scale = self._visible.clone()
        scale[: self.sizes.num_obs] /= self.inputs.std
        spread, mean = self.targets.std * self.targets.varying, self.targets.mean
        if with_variance:
            spread, mean = torch.cat((spread, torch.ones_like(spread))), torch.cat((mean, torch.zeros_like(mean)))
        return PairedEnsemble(self.dynamics, members, input_scale=scale, output_scale=spread, output_shift=mean)

    def _drawn(self, found: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            return found
        mean, raw = found.chunk(2, dim=-1)
        spread = self.targets.std * self.targets.varying
        return mean + torch.exp(0.5 * self.dynamics.bounded(raw)) * noise * spread

    # Declared parts of a step, rows flat; what comes back has the shape [K, B, ...].
    def _arrived(
        self, obs: Tensor, action: Tensor, drawn: Tensor, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        next_obs, reward = obs + drawn[:, :-1], drawn[:, -1]
        if self.known.transition is not None:
            next_obs = self.known.transition(obs, action, next_obs)
        if self.known.reward is not None:
            reward = self.known.reward(obs, action, next_obs)
        if self.known.terminated is not None:
            ended = self.known.terminated(next_obs)
        else:
            ended = self.termination_probability(obs, action, next_obs) > 0.5
        return next_obs.reshape(*shape, self.sizes.num_obs), reward.reshape(shape), ended.reshape(shape)

    def _terminated(self, obs: Tensor, action: Tensor, next_obs: Tensor, uniform: Tensor) -> Tensor:
        if self.known.terminated is not None:
            return self.known.terminated(next_obs)
        return uniform < self.termination_probability(obs, action, next_obs)

    # Only the drawn member runs on its own rows.
    def _of_members(self, obs: Tensor, action: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        mean = obs.new_empty(len(obs), self.sizes.num_obs + 1)
        var = torch.empty_like(mean)
        for index in self.elites:
            rows = torch.nonzero(member == index).squeeze(1)
            if len(rows):
                part_mean, part_var = self._standard(obs[rows], action[rows], (index,))
                mean[rows], var[rows] = part_mean[0], part_var[0]
        return mean, var

    # Mean and variance in standard units; columns that never changed have mean 0 and no variance.
    def _standard(self, obs: Tensor, action: Tensor, members: Sequence[int]) -> tuple[Tensor, Tensor]:
        mean, logvar = self.dynamics(self._encoded(obs, action), members)
        return mean * self.targets.varying, torch.exp(logvar) * self.targets.varying

    def _encoded(self, obs: Tensor, action: Tensor) -> Tensor:
        inputs = torch.cat((self.inputs(self.clamp(obs)), one_hot(action, self.sizes.num_actions)), dim=1)
        return inputs * self._visible

    def _checked(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        if obs.ndim != 2 or obs.shape[1] != self.sizes.num_obs or not obs.is_floating_point() or obs.shape[0] == 0:
            raise ValueError(f"obs: expected floating [B >= 1, {self.sizes.num_obs}], was {obs.dtype} {[*obs.shape]}")
        wanted = (obs.shape[0], len(self.sizes.num_actions))
        if action.shape != wanted or action.dtype != torch.int64:
            raise ValueError(f"action: expected int64 {[*wanted]}, was {action.dtype} {[*action.shape]}")
        return obs.to(torch.float32), action


def one_hot(action: Tensor, num_actions: Sequence[int]) -> Tensor:
    """One-hot rows of each dimension side by side: int64 [B, K] to float32 [B, A]."""
    parts = [functional.one_hot(action[:, k], size) for k, size in enumerate(num_actions)]
    return torch.cat(parts, dim=1).to(torch.float32)
