"""Fit a `WorldModel` to real transitions.

Letters: N rows, E members, D obs, M = D + 1 targets, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from data.errors import DataError
from world_model.experience import Experience
from world_model.known import KnownParts
from world_model.learned_masks import LearnedMaskConfig, LearnedMasks, learn_masks
from world_model.losses import gaussian_nll, refuse_non_finite
from world_model.mask_bound import MaskBound, MaskBoundError
from world_model.mask_head import MaskHeadConfig, fit_mask_head
from world_model.networks import EnsembleMLP
from world_model.normaliser import Normaliser
from world_model.snapshots import MemberSnapshots
from world_model.trainer import epoch_batches, training_support
from world_model.warm_start import adopt_world_weights
from world_model.world import WorldModel, WorldSizes, one_hot

MIN_ROWS = 50
"""Fewest transitions a fit is tried on."""
BOOTSTRAP_BLOCK = 64
"""Rows are drawn with replacement within blocks of so many, so that a member's sample of old rows stays what it was
when new rows arrive."""
NOTHING_PROMISED = MaskBound(
    target=1.0, confidence=0.95, threshold=0.0, trials=0, errors=0, upper_bound=1.0, candidates=1, passed=1
)
"""Of masks that could not be certified. An action counts as valid where that is more likely than not, and the likeliest
always does: good enough to imagine under, and for nothing else."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(mean, logvar, target), all [E, B, M], to the loss of every member [E]."""


@dataclass(frozen=True, kw_only=True)
class WorldFitConfig:
    """Sizes and schedule of a fit."""

    num_members: int = 5
    """E."""
    num_elites: int = 3
    """Members with the best holdout score, which predictions mix."""
    hidden: tuple[int, ...] = (128, 128)
    """Widths of the hidden layers."""
    learning_rate: float = 1e-3
    """Of AdamW."""
    weight_decay: float = 1e-5
    """Of the weight matrices."""
    batch_size: int = 256
    """Rows per member and gradient step."""
    max_epochs: int = 200
    """Most passes over the training rows."""
    patience: int = 20
    """Passes without a better holdout score of any member after which a network stops."""
    holdout_fraction: float = 0.1
    """Share of the rows that never reach a gradient; a row that is held out stays so when rows are added."""
    beta: float = 0.5
    """Weight `var**beta` of the likelihood (Seitzer et al., arXiv:2203.09168): 0 is the plain one, which neglects what
    is predicted badly at first; 1 has the gradients of squared error."""
    masks: LearnedMaskConfig = field(
        default_factory=lambda: LearnedMaskConfig(
            head=MaskHeadConfig(batch_size=128, max_epochs=100, learning_rate=3e-3, patience=15)
        )
    )
    """How masks are learned where they are not declared."""

    def __post_init__(self) -> None:
        for name in ("num_members", "num_elites", "batch_size", "max_epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, was {getattr(self, name)}")
        if self.num_elites > self.num_members:
            raise ValueError(f"num_elites: expected at most num_members={self.num_members}, was {self.num_elites}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden: expected at least one width >= 1, was {self.hidden}")
        if not 0.0 < self.holdout_fraction < 0.9:
            raise ValueError(f"holdout_fraction: expected between 0 and 0.9, was {self.holdout_fraction}")
        if not 0.0 < self.learning_rate < math.inf or not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"learning_rate, weight_decay: expected > 0 and >= 0, was {self.learning_rate}, {self.weight_decay}"
            )
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta: expected between 0 and 1, was {self.beta}")


@dataclass(frozen=True, kw_only=True)
class NetworkReport:
    """What the fit of one network did."""

    epochs: int
    """Epochs run, early stopping included."""
    best_epochs: tuple[int, ...]
    """Epoch whose weights each member kept; 0 are the weights it began with."""
    scores: tuple[float, ...]
    """Holdout score of each member: nats per varying target, or per row of the termination head."""
    elites: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class WorldFitReport:
    """What a fit did."""

    train_rows: int
    holdout_rows: int
    dynamics: NetworkReport
    termination: NetworkReport | None
    """None where termination is declared or was never seen."""
    holdout_rmse: float
    """Root mean squared error of the elites' mean on the holdout, in standard deviations of the targets."""
    masks: str
    """"declared", "never masked", "certified" or "uncertified"."""


def fit_world_model(
    experience: Experience,
    config: WorldFitConfig,
    *,
    seed: int,
    known: KnownParts | None = None,
    previous: WorldModel | None = None,
    safe_action: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[WorldModel, WorldFitReport]:
    """Fit everything that is not declared.

    Each member trains on a bootstrap sample of its own, fixed for the fit, and keeps the weights of its own best
    epoch on held-out rows. Every random number comes from generators seeded with `seed`.

    Args:
        experience: real transitions, oldest first.
        config: sizes and schedule.
        seed: keep it from fit to fit, so that held-out rows stay held out.
        known: declared parts; None declares nothing.
        previous: a model of the same sizes to start from. Its weights are carried over to the new statistics so that
            its mean predictions stay what they were; without better holdout scores a member keeps them.
        safe_action: flat column of the masks that is valid in every state, or None.
        progress: called after each epoch of either network with (epoch, max_epochs, mean best score).

    Raises: DataError on too few rows; TrainingError if a loss is not finite, the previous model is untouched then;
        ValueError if `previous` has other sizes.
    """
    known = known or KnownParts()
    if len(experience) < MIN_ROWS:
        raise DataError(f"experience: expected at least {MIN_ROWS} transitions, was {len(experience)}")
    held_out = np.random.default_rng(seed).random(len(experience)) < config.holdout_fraction
    if held_out.all() or not held_out.any():
        raise DataError(f"experience: expected rows on both sides of the holdout, was {int(held_out.sum())} held out")
    train, holdout = torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))
    learns_termination = known.terminated is None and bool(experience.terminated[train.numpy()].any())
    sizes = WorldSizes(
        num_obs=experience.obs.shape[1],
        num_actions=experience.num_actions,
        num_members=config.num_members,
        hidden=config.hidden,
        terminates=learns_termination,
    )
    obs = experience.obs.astype(np.float64)
    target: NDArray[np.float64] = np.concatenate(
        (experience.next_obs.astype(np.float64) - obs, experience.reward[:, None]), axis=1
    )
    inputs, targets = Normaliser.fit(obs[train.numpy()]), _target_normaliser(target[train.numpy()], known)
    low, high = training_support(np.concatenate((obs, experience.next_obs)).astype(np.float64))
    generator = torch.Generator().manual_seed(seed)
    dynamics, termination = sizes.networks(generator)
    if previous is not None:
        adopt_world_weights(previous, dynamics, termination, sizes, inputs, targets)

    action = one_hot(torch.from_numpy(experience.action), experience.num_actions)
    visible = known.visible(sizes.num_obs, sizes.width)
    encoded = torch.cat((inputs.standardise(obs), action), dim=1) * visible
    # A generator of its own: which networks were drawn before must not change who owns which row.
    samples = torch.Generator().manual_seed(seed)
    indices = train[block_bootstrap(len(train), config.num_members, samples)]
    varying = targets.varying
    reached = targets.standardise(target)
    report = _nothing_to_learn(config)
    if varying.any():
        report = fit_network(
            dynamics,
            (encoded, reached),
            indices,
            holdout,
            loss=lambda mean, logvar, aim: beta_nll(mean, logvar, aim, config.beta)[..., varying].mean(dim=(1, 2)),
            score=lambda mean, logvar, aim: gaussian_nll(mean, logvar, aim)[..., varying].mean(dim=(1, 2)),
            config=config,
            generator=generator,
            progress=progress,
        )
    ended: NetworkReport | None = None
    if termination is not None:
        ended = fit_network(
            termination,
            (
                torch.cat(
                    (
                        encoded,
                        inputs.standardise(experience.next_obs.astype(np.float64)) * visible[: sizes.num_obs],
                    ),
                    dim=1,
                ),
                torch.from_numpy(experience.terminated.astype(np.float32))[:, None],
            ),
            indices,
            holdout,
            loss=_cross_entropy,
            score=_cross_entropy,
            config=config,
            generator=generator,
            progress=progress,
        )
    masks, how = _fit_masks(experience, known, config, seed, safe_action)
    model = WorldModel(
        sizes,
        known,
        inputs=inputs,
        targets=targets,
        dynamics=dynamics,
        termination=termination,
        elites=report.elites,
        termination_elites=() if ended is None else ended.elites,
        support=(torch.from_numpy(low), torch.from_numpy(high)),
        masks=masks,
    )
    with torch.no_grad():
        mean = dynamics(encoded[holdout], report.elites)[0].mean(dim=0)
        error = (mean - reached[holdout])[:, varying]
    return model, WorldFitReport(
        train_rows=len(train),
        holdout_rows=len(holdout),
        dynamics=report,
        termination=ended,
        holdout_rmse=float(torch.sqrt((error * error).mean())) if varying.any() else 0.0,
        masks=how,
    )


def fit_network(
    network: EnsembleMLP,
    rows: tuple[Tensor, Tensor],
    indices: Tensor,
    holdout: Tensor,
    *,
    loss: Loss,
    score: Loss,
    config: WorldFitConfig,
    generator: torch.Generator,
    progress: Callable[[int, int, float], None] | None = None,
) -> NetworkReport:
    """Train all members side by side until none has improved on the holdout for `patience` epochs.

    Args: rows: inputs [N, I] and targets [N, O]; indices [E, N'] of the rows each member owns; holdout [H] rows.
    Raises: TrainingError if a loss or a score is not finite.
    """
    inputs, targets = rows
    optimiser = torch.optim.AdamW(
        [
            {"params": [*network.weights], "weight_decay": config.weight_decay},
            {"params": [*network.biases], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
    )
    snapshots, epoch, stale = MemberSnapshots(network), 0, 0

    def judge() -> bool:
        with torch.no_grad():
            mean, logvar = network(inputs[holdout])
            scores = score(mean, logvar, targets[holdout].expand(network.num_members, -1, -1))
        refuse_non_finite(scores, epoch, "holdout score")
        return snapshots.update(epoch, scores)

    judge()  # weights that were carried over may already be the best
    while epoch < config.max_epochs and stale < config.patience:
        epoch += 1
        for batch in epoch_batches(indices, config.batch_size, generator):
            mean, logvar = network(inputs[batch])
            losses = loss(mean, logvar, targets[batch])
            refuse_non_finite(losses, epoch, "training loss")
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(losses.sum())
            optimiser.step()
        stale = 0 if judge() else stale + 1
        if progress is not None:
            progress(epoch, config.max_epochs, float(snapshots.scores.mean()))
    snapshots.restore()
    return NetworkReport(
        epochs=epoch,
        best_epochs=tuple(snapshots.epochs),
        scores=tuple(snapshots.scores.tolist()),
        elites=tuple(torch.argsort(snapshots.scores, stable=True)[: config.num_elites].tolist()),
    )


def block_bootstrap(num_rows: int, num_members: int, generator: torch.Generator) -> Tensor:
    """Rows each member owns: [E, num_rows] int64, drawn with replacement within blocks of BOOTSTRAP_BLOCK rows.

    A complete block is drawn the same whatever follows it, so that with a generator in the same state a member's
    sample of old rows does not change when rows are added.
    """
    blocks = math.ceil(num_rows / BOOTSTRAP_BLOCK)
    uniform = torch.rand(blocks, num_members, BOOTSTRAP_BLOCK, generator=generator)
    first = torch.arange(blocks)[:, None, None] * BOOTSTRAP_BLOCK
    size = torch.clamp(num_rows - first, max=BOOTSTRAP_BLOCK)
    drawn = first + (uniform * size).long()
    return drawn.transpose(0, 1).reshape(num_members, -1)[:, :num_rows]


def beta_nll(mean: Tensor, logvar: Tensor, target: Tensor, beta: float) -> Tensor:
    """Gaussian likelihood weighted by `var**beta` without gradient (arXiv:2203.09168, eq. 5), element by element."""
    return gaussian_nll(mean, logvar, target) * torch.exp(beta * logvar.detach())


# Every column is declared or constant.
def _nothing_to_learn(config: WorldFitConfig) -> NetworkReport:
    members = config.num_members
    return NetworkReport(
        epochs=0, best_epochs=(0,) * members, scores=(0.0,) * members, elites=tuple(range(config.num_elites))
    )


def _fit_masks(
    experience: Experience, known: KnownParts, config: WorldFitConfig, seed: int, safe_action: int | None
) -> tuple[LearnedMasks | None, str]:
    if known.action_masks is not None:
        return None, "declared"
    if experience.action_masks.all():
        return None, "never masked"
    rows = (experience.obs, experience.action_masks)
    if len(experience.num_actions) == 1:
        try:
            masks, _ = learn_masks(*rows, experience.episode, safe_action=safe_action, seed=seed, config=config.masks)
        except MaskBoundError:
            pass
        else:
            return masks, "certified"
    # What the bound would take is better spent on the fit; a few episodes stop it.
    stop_share = config.masks.stop_share
    fit, stop = _fit_and_stop(experience.episode, stop_share)
    head, _ = fit_mask_head(
        (rows[0][fit], rows[1][fit]),
        (rows[0][stop], rows[1][stop]),
        config.masks.head,
        torch.Generator().manual_seed(seed),
    )
    return LearnedMasks(head, NOTHING_PROMISED, safe_action=safe_action), "uncertified"


# Whole episodes on either side; the newest go to neither side alone, because policies change.
def _fit_and_stop(episode: NDArray[np.int64], stop_share: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    found, ids = np.unique(episode, return_inverse=True)
    if len(found) < 2:
        raise DataError("experience: expected at least 2 episodes to learn masks from, was 1")
    every = min(max(round(1.0 / stop_share), 2), len(found))
    stop = ids % every == every - 1
    return np.flatnonzero(~stop), np.flatnonzero(stop)


def _target_normaliser(target: NDArray[np.float64], known: KnownParts) -> Normaliser:
    fitted = Normaliser.fit(target)
    varying = fitted.varying.clone()
    varying[[*known.exact]] = False
    if known.reward is not None:
        varying[-1] = False
    return Normaliser(fitted.mean, fitted.std, varying)


def _cross_entropy(logit: Tensor, _: Tensor, target: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logit, target, reduction="none").mean(dim=(1, 2))
