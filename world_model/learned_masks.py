"""Masks from a learned head whose false-valid rate is bounded, or refused.

Use, for an environment that tells its masks only at real states::

    learned, report = learn_masks(obs, action_masks, episode, safe_action=None, seed=0)
    verdict = learned.judge(imagined_obs)
    # act under verdict.action_masks; truncate the branches where verdict.refused

What is promised, and what is not: see `world_model.mask_bound`. Letters: B batch, N rows, D obs, A actions.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.errors import DataError
from masking import InvalidMaskError, validate_action_masks
from world_model.errors import ModelFileError
from world_model.mask_bound import (
    MaskBound,
    MaskBoundError,
    MaskErrors,
    bound_threshold,
    mask_errors,
    one_invalid_pair_per_group,
    trials_needed,
)
from world_model.mask_head import MaskFitReport, MaskHead, MaskHeadConfig, fit_mask_head
from world_model.normaliser import Normaliser
from world_model.storage import read_model, write_model

KIND = "learned_masks"
# The threshold sequence: shares of the stop rows' valid pairs that are lost. A mask that keeps fewer than one in ten
# is no use, however safe, so the strictest starts there. Steps are fine: in a fixed sequence they cost nothing.
LOST_SHARES = (*np.geomspace(0.9, 1e-4, 200).tolist(), 0.0)


@dataclass(frozen=True, kw_only=True)
class LearnedMaskConfig:
    """How masks are learned and how sure one must be of them."""

    head: MaskHeadConfig = field(default_factory=MaskHeadConfig)
    """The network."""
    stop_share: float = 0.1
    """Share of the groups that stop the fit, set the temperature and propose the thresholds."""
    bound_share: float = 0.4
    """Share of the groups that only the bound sees; at the default target at least 2,995 groups are needed there."""
    target: float = 1e-3
    """Highest false-valid rate."""
    confidence: float = 0.95
    """Probability with which `target` must hold."""

    def __post_init__(self) -> None:
        for name in ("stop_share", "bound_share", "target", "confidence"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name}: expected strictly between 0 and 1, was {getattr(self, name)}")
        if self.stop_share + self.bound_share >= 1.0:
            raise ValueError(
                "stop_share + bound_share: expected below 1, the rest is fitted, "
                f"was {self.stop_share} + {self.bound_share}"
            )


@dataclass(frozen=True, kw_only=True)
class LearnedMaskReport:
    """What `learn_masks` did."""

    fit: MaskFitReport
    bound: MaskBound
    held_out: MaskErrors
    """All pairs of the bound rows. They chose the threshold, so their false-valid rate flatters; the bound does not,
    and neither does `false_invalid`: no valid pair had a say."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary."""
        return asdict(self)


class MaskVerdict(NamedTuple):
    """Masks of a batch, NumPy or torch like the obs."""

    action_masks: Any
    """bool [B, A], True = valid; all False in refused rows."""
    refused: Any
    """bool [B]: no action can be called valid, so none may be taken; an imagined branch is truncated here. Never True
    when a safe action is declared."""


class LearnedMasks:
    """A head, its certified threshold and the safe action: a mask function of obs.

    The safe action (Hold, or what the environment declares) is valid in every row. A row that is not finite or lies
    outside the support of the fit keeps nothing else. Without a safe action such rows are *refused*, as are rows in
    which no action reaches the threshold: the most probable action would be a guess that the bound does not cover.
    """

    def __init__(self, head: MaskHead, bound: MaskBound, *, safe_action: int | None) -> None:
        _check_safe_action(safe_action, head.num_actions)
        self.head, self.bound, self.safe_action = head, bound, safe_action

    @property
    def num_actions(self) -> int:
        """A."""
        return self.head.num_actions

    def __call__(self, obs: Any) -> Any:
        """Action masks bool [B, A] of obs [B, D], each row with a valid action.

        Args: obs: floating, NumPy array or torch tensor; the result is of the same kind.
        Raises: InvalidMaskError if a row is refused, which needs `safe_action=None`; ValueError on shape or dtype.
        """
        verdict = self.judge(obs)
        if verdict.refused.any():
            rows = np.flatnonzero(np.asarray(verdict.refused.tolist()))
            raise InvalidMaskError(
                f"learned masks: expected a valid action in every row, found none in {len(rows)} of "
                f"{len(verdict.refused)} rows, first row {rows[0]}; truncate branches where `judge` says refused"
            )
        return verdict.action_masks

    @torch.no_grad()
    def judge(self, obs: Any) -> MaskVerdict:
        """Action masks and refused rows; arguments as in `__call__`, nothing is raised for refused rows."""
        if not isinstance(obs, Tensor):
            verdict = self.judge(torch.tensor(np.asarray(obs), device=self.head.temperature.device))
            return MaskVerdict(verdict.action_masks.cpu().numpy(), verdict.refused.cpu().numpy())
        masks = self.head.scores(obs) >= self.bound.threshold
        if self.safe_action is not None:
            masks[:, self.safe_action] = True
        return MaskVerdict(masks, ~masks.any(dim=1))

    def save(self, directory: str | os.PathLike[str]) -> str:
        """Write head, bound and safe action to a new folder, as a whole or not at all.

        Returns: SHA-256 of everything saved, 64 hex digits.
        Raises: FileExistsError if the folder exists; OSError.
        """
        widths = [layer.out_features for layer in self.head.network if isinstance(layer, torch.nn.Linear)]
        description = {
            "kind": KIND,
            "num_obs": self.head.num_obs,
            "num_actions": self.num_actions,
            "hidden": widths[:-1],
            "safe_action": self.safe_action,
            "bound": asdict(self.bound),
        }
        return write_model(directory, self.head.state_dict(), description)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> LearnedMasks:
        """Rebuild what `save` wrote, after verifying its hashes.

        Raises: ModelFileError naming what is missing, damaged or of another kind.
        """
        tensors, description = read_model(directory)
        if description.get("kind") != KIND:
            raise ModelFileError(f"{directory}: model.json: kind: expected {KIND!r}, was {description.get('kind')!r}")
        try:
            blank = torch.zeros(description["num_obs"])
            # The drawn weights are overwritten at once; the generator only satisfies the constructor.
            head = MaskHead(
                Normaliser(blank, blank),
                (blank, blank),
                num_actions=description["num_actions"],
                hidden=description["hidden"],
                generator=torch.Generator(),
            )
            head.load_state_dict(tensors)
            learned = cls(
                head.requires_grad_(False).eval(),
                MaskBound(**description["bound"]),
                safe_action=description["safe_action"],
            )
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ModelFileError(f"{directory}: weights do not fit model.json: {error}") from error
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ModelFileError(f"{directory}: {name}: expected finite numbers, was NaN or infinite")
        return learned


def learn_masks(
    obs: NDArray[np.floating],
    action_masks: NDArray[np.bool_],
    groups: NDArray[np.integer],
    *,
    safe_action: int | None,
    seed: int,
    config: LearnedMaskConfig | None = None,
) -> tuple[LearnedMasks, LearnedMaskReport]:
    """Fit a mask head on real experience and certify a threshold for it.

    The groups are split in the order of their first rows into three disjoint parts: fit, stop (epoch, temperature,
    proposed thresholds) and bound, the latest, which nothing else sees.

    Args:
        obs: [N, D], real states in the order they were seen.
        action_masks: bool [N, A], what the environment said there.
        groups: [N] integers, the episode of each row. Rows of one group may depend on each other in any way; groups
            must be independent draws, so collect a fixed number of episodes rather than a fixed number of steps, which
            would favour short ones.
        safe_action: valid in every state by the environment's own word (Hold), or None if it has no such action.
        seed: of the fit and of the draw of the trials.
        config: sizes, shares, target; None is the default.

    Raises:
        MaskBoundError: the target cannot be met, with the numbers; before the fit if groups are too few.
        InvalidMaskError: masks of another dtype or shape, without a valid action, or without the safe one.
        DataError: obs not finite, too few groups to split, nothing ever masked, or no valid action beside the safe one.
        TrainingError: the fit diverged.
    """
    config = config or LearnedMaskConfig()
    obs, action_masks, groups = _checked(obs, action_masks, groups, safe_action)
    fit, stop, held_out = split_groups(groups, config.stop_share, config.bound_share)
    if action_masks.all():
        raise DataError("action_masks: expected some invalid actions to learn from, found none: nothing is ever masked")
    rows, actions = one_invalid_pair_per_group(action_masks[held_out], groups[held_out], np.random.default_rng(seed))
    if len(rows) < trials_needed(config.target, config.confidence):
        raise MaskBoundError(target=config.target, confidence=config.confidence, trials=len(rows), errors=0)

    head, fit_report = fit_mask_head(
        (obs[fit], action_masks[fit]),
        (obs[stop], action_masks[stop]),
        config.head,
        torch.Generator().manual_seed(seed),
    )
    judged = np.arange(action_masks.shape[1]) != safe_action
    bound = bound_threshold(
        _scores(head, obs[held_out])[rows, actions],
        proposed_thresholds(_scores(head, obs[stop])[action_masks[stop] & judged]),
        target=config.target,
        confidence=config.confidence,
    )
    learned = LearnedMasks(head, bound, safe_action=safe_action)
    predicted = learned.judge(obs[held_out]).action_masks
    errors = mask_errors(predicted, action_masks[held_out], groups[held_out], safe_action=safe_action)
    return learned, LearnedMaskReport(fit=fit_report, bound=bound, held_out=errors)


def split_groups(
    groups: NDArray[np.integer], stop_share: float, bound_share: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Row indices of the fit, stop and bound parts; a group lies in one part, in the order of its first row.

    Raises: DataError if a part gets no group.
    """
    _, first, ids = np.unique(groups, return_index=True, return_inverse=True)
    place = np.empty(len(first), dtype=np.int64)
    place[np.argsort(first)] = np.arange(len(first))
    bound_groups, stop_groups = round(bound_share * len(first)), round(stop_share * len(first))
    fit_groups = len(first) - stop_groups - bound_groups
    if min(fit_groups, stop_groups, bound_groups) < 1:
        raise DataError(
            f"groups: expected at least one group in each of fit, stop and bound, "
            f"was {fit_groups}, {stop_groups}, {bound_groups} of {len(first)}"
        )
    part = np.digitize(place[ids], (fit_groups, fit_groups + stop_groups))
    fit, stop, bound = (np.flatnonzero(part == index) for index in range(3))
    return fit, stop, bound


def proposed_thresholds(valid_scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Thresholds, strictest first, that lose LOST_SHARES of the given scores of valid pairs.

    None is below 0: where a loose threshold would still meet the target, an action more likely invalid than valid
    stays masked all the same.

    Raises: DataError if no score is finite.
    """
    finite = valid_scores[np.isfinite(valid_scores)].astype(np.float64)
    if not finite.size:
        raise DataError(
            "action_masks: expected valid actions beside the safe one in the stop rows, found none that can be judged"
        )
    return np.unique(np.maximum(np.quantile(finite, LOST_SHARES, method="lower"), 0.0))[::-1]


def _scores(head: MaskHead, obs: NDArray[np.floating]) -> NDArray[np.float32]:
    with torch.no_grad():
        return head.scores(torch.tensor(obs)).numpy()


def _checked(
    obs: NDArray[np.floating], action_masks: NDArray[np.bool_], groups: NDArray[np.integer], safe_action: int | None
) -> tuple[NDArray[np.floating], NDArray[np.bool_], NDArray[np.integer]]:
    obs, groups = np.asarray(obs), np.asarray(groups)
    if obs.ndim != 2 or not np.issubdtype(obs.dtype, np.floating):
        raise ValueError(f"obs: expected floating [N, D], was {obs.dtype} {[*obs.shape]}")
    if not np.isfinite(obs).all():
        row, column = np.argwhere(~np.isfinite(obs))[0]
        raise DataError(f"obs: expected finite numbers, was {obs[row, column]} at [{row}, {column}]")
    if groups.shape != (len(obs),) or not np.issubdtype(groups.dtype, np.integer):
        raise ValueError(f"groups: expected integers [{len(obs)}], was {groups.dtype} {[*groups.shape]}")
    action_masks = np.asarray(action_masks)
    if action_masks.ndim != 2:
        raise InvalidMaskError(f"action_masks: expected [{len(obs)}, A], was {[*action_masks.shape]}")
    _check_safe_action(safe_action, action_masks.shape[1])
    validate_action_masks(action_masks, num_actions=action_masks.shape[1], batch=len(obs), safe_action=safe_action)
    return obs, action_masks, groups


def _check_safe_action(safe_action: int | None, num_actions: int) -> None:
    if safe_action is not None and not 0 <= safe_action < num_actions:
        raise ValueError(f"safe_action: expected an action in 0..{num_actions - 1} or None, was {safe_action}")
