"""Imagined branches of a learned world behind the batched interface, for an unmodified MaskablePPO.

Letters: R real rows, B rows in all, D obs, A mask width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gymnasium import spaces

from envs.batch import BatchStep, BatchVecEnv
from masking import check_actions
from mbpo.real_rows import RealRows, action_sizes
from world_model.experience import Experience
from world_model.uncertainty import measure_named
from world_model.world import WorldModel


@dataclass
class ImaginedStatistics:
    """Sums over imagined steps since the last `take_statistics`."""

    steps: int = 0
    raw_reward: float = 0.0
    absolute_reward: float = 0.0
    """Sum of the sizes of the raw rewards."""
    penalty: float = 0.0
    uncertainty: float = 0.0
    terminated: int = 0
    out_of_support: int = 0
    """Branches cut because they left the support of the training data."""
    refused: int = 0
    """Branches cut because no action could be called valid."""

    def means(self) -> dict[str, float]:
        """Per-step means, for logging. `penalty_share` is the mean penalty over the mean size of a raw reward."""
        steps = max(self.steps, 1)
        return {
            "imagined_raw_reward": self.raw_reward / steps,
            "imagined_penalised_reward": (self.raw_reward - self.penalty) / steps,
            "penalty_share": self.penalty / self.absolute_reward if self.absolute_reward else 0.0,
            "imagined_uncertainty": self.uncertainty / steps,
            "imagined_termination_rate": self.terminated / steps,
            "imagined_out_of_support_rate": self.out_of_support / steps,
            "imagined_refused_rate": self.refused / steps,
        }


class ImaginedVecEnv(BatchVecEnv):
    """Rows [0, R) step the real environment, rows [R, B) follow imagined branches from replayed states.

    A branch starts at a recorded state under its recorded mask: an episode drawn uniformly, then a state of it, so that
    short failures weigh as much as long successes. It ends where termination is modelled: what it earned
    by getting there is its last reward. Where it leaves the support of the training data, or no action can be called
    valid, it is truncated: the learner bootstraps from the nearest state inside. At its horizon it is *not* truncated;
    collect with `n_steps = H` and call `rebranch` before each rollout, so that the last-value bootstrap cuts it. The
    reward is `reward - penalty_coef * uncertainty` (MOPO, arXiv:2005.13239, eq. 6).

    Args:
        observation_space, action_space: of the real environment.
        num_envs: B; real rows included.
        penalty_coef: lambda_u, reward units per unit of the uncertainty measure.
        support_penalty: reward units charged once for leaving the support, as MOReL's HALT state does
            (arXiv:2005.05951, eq. 3), but without ending the value there.
        uncertainty: name of the measure in `world_model.uncertainty`.
        first_share: share of branches that start where an episode began; the others start at any recorded state.
        seed: of branch starts and of everything the model draws.
        real: rows that continue the real environment; None has none.
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Discrete | spaces.MultiDiscrete,
        *,
        num_envs: int,
        penalty_coef: float = 0.0,
        support_penalty: float = 0.0,
        uncertainty: str = "ensemble_std",
        first_share: float = 0.0,
        seed: int,
        real: RealRows | None = None,
    ) -> None:
        for name, charge in {"penalty_coef": penalty_coef, "support_penalty": support_penalty}.items():
            if not 0.0 <= charge < np.inf:
                raise ValueError(f"{name}: expected at least 0, was {charge}")
        if not 0.0 <= first_share <= 1.0:
            raise ValueError(f"first_share: expected between 0 and 1, was {first_share}")
        super().__init__(num_envs, observation_space, action_space)
        self.real, self.num_real = real, 0 if real is None else real.num_rows
        self.num_imagined = num_envs - self.num_real
        if self.num_imagined < 1:
            raise ValueError(f"num_envs: expected more than the {self.num_real} real rows, was {num_envs}")
        self.penalty_coef, self.support_penalty = penalty_coef, support_penalty
        self.first_share = first_share
        self._measure = measure_named(uncertainty) if penalty_coef else None
        self._rng = np.random.default_rng(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self.statistics = ImaginedStatistics()
        self.model: WorldModel | None = None
        self._cumulative, self._first = np.zeros(0), np.zeros(0, dtype=np.int64)
        self._starts: tuple[np.ndarray, np.ndarray] | None = None
        self._obs = np.zeros((self.num_imagined, *observation_space.shape), dtype=np.float32)
        self._imagined_masks = np.zeros((self.num_imagined, sum(self._sizes)), dtype=bool)

    def use(self, model: WorldModel, experience: Experience) -> None:
        """Imagine with this model, from these states, from the next `rebranch` on."""
        self.model, self._starts = model, (experience.obs, experience.action_masks)
        _, self._first, episode, lengths = np.unique(
            experience.episode, return_index=True, return_inverse=True, return_counts=True
        )
        share = 1.0 / lengths[episode]
        self._cumulative = np.cumsum(share / share.sum())

    def rebranch(self) -> np.ndarray:
        """Start every imagined row on a fresh branch and return the observations [B, D] of all rows."""
        self._start_branches(np.arange(self.num_imagined))
        return self._observe()

    def take_statistics(self) -> dict[str, float]:
        """Means since the last call; starts new sums."""
        means, self.statistics = self.statistics.means(), ImaginedStatistics()
        return means

    @property
    def _sizes(self) -> tuple[int, ...]:
        return action_sizes(self.action_space)

    @property
    def _masks(self) -> np.ndarray:
        if self.real is None:
            return self._imagined_masks
        return np.concatenate((self.real.action_masks, self._imagined_masks))

    def _observe(self, rows: np.ndarray | None = None) -> np.ndarray:
        obs = self._obs.copy() if self.real is None else np.concatenate((self.real.obs, self._obs))
        return obs if rows is None else obs[rows]

    def _reset_rows(self, rows: np.ndarray) -> None:
        finished = rows[rows < self.num_real]
        # A first reset of all rows restarts nothing: real rows were reset when they were built.
        if self.real is not None and len(finished) and self.real.finished[finished].all():
            self.real.restart(finished)
        imagined = rows[rows >= self.num_real] - self.num_real
        if len(imagined):
            self._start_branches(imagined)

    def _advance(self, actions: np.ndarray) -> BatchStep:
        imagined = self._advance_imagined(actions[self.num_real :])
        if self.real is None:
            return imagined
        real = self.real.step(actions[: self.num_real])
        return BatchStep(*(np.concatenate(parts) for parts in zip(real, imagined, strict=True)))

    def _advance_imagined(self, actions: np.ndarray) -> BatchStep:
        if self.model is None:
            raise RuntimeError("imagined rows: expected use(model, experience) before the first step")
        check_actions(actions, self._imagined_masks, self._nvec)
        rows = len(self._obs)
        obs = torch.from_numpy(self._obs)
        elites = self.model.elite_index
        step = self.model.step(
            obs,
            torch.from_numpy(np.asarray(actions, dtype=np.int64).reshape(rows, -1)),
            member=elites[torch.randint(len(elites), (rows,), generator=self._generator)],
            noise=torch.randn(rows, obs.shape[1] + 1, generator=self._generator),
            uniform=torch.rand(rows, generator=self._generator),
            measure=self._measure,
        )
        inside = self.model.in_support(step.next_obs)
        masks, refused = self.model.action_masks(step.next_obs)
        # NaN has no nearest state inside; such a branch is cut where it was.
        landed = torch.where(torch.isfinite(step.next_obs), self.model.clamp(step.next_obs), obs)
        landed = torch.where(inside[:, None], step.next_obs, landed)
        terminated = step.terminated.numpy()
        truncated = (~inside | refused).numpy() & ~terminated
        left = ~inside.numpy() & ~terminated
        penalty = self.penalty_coef * step.uncertainty.numpy().astype(np.float64) + self.support_penalty * left
        raw = step.reward.numpy().astype(np.float64)
        totals = self.statistics
        totals.steps += rows
        totals.raw_reward += float(raw.sum())
        totals.absolute_reward += float(np.abs(raw).sum())
        totals.penalty += float(penalty.sum())
        totals.uncertainty += float(step.uncertainty.sum())
        totals.terminated += int(terminated.sum())
        totals.out_of_support += int(left.sum())
        totals.refused += int((refused & inside).numpy()[~terminated].sum())
        self._obs, self._imagined_masks = landed.numpy().astype(np.float32), masks.numpy()
        return BatchStep(raw - penalty, terminated, truncated)

    def _start_branches(self, rows: np.ndarray) -> None:
        if self._starts is None:
            raise RuntimeError("imagined rows: expected use(model, experience) before the first reset")
        obs, masks = self._starts
        picked = np.searchsorted(self._cumulative, self._rng.random(len(rows)), side="right").clip(max=len(obs) - 1)
        if self.first_share:
            at_first = self._rng.random(len(rows)) < self.first_share
            picked = np.where(at_first, self._rng.choice(self._first, len(rows)), picked)
        # Fresh arrays: observations handed out earlier must not change.
        self._obs, self._imagined_masks = self._obs.copy(), self._imagined_masks.copy()
        self._obs[rows], self._imagined_masks[rows] = obs[picked], masks[picked]
