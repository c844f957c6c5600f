"""Half history, half imagination, in one batched environment for an unmodified MaskablePPO."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from data import Scaler
from envs import Account, HistoryBatch, StepOutcome, TradingDynamics
from envs.batch import BatchStep
from envs.vec_env import TradingVecEnv
from masking import check_actions
from mbpo.control_variate import unforeseen_reward
from mbpo.imagination import MOVES, Forecast, MarketBranches
from mbpo.starts import StartBuffer


@dataclass
class RolloutStatistics:
    """Sums since the last `take`; rewards are per step."""

    real_steps: int = 0
    real_reward: float = 0.0
    imagined_steps: int = 0
    raw_reward: float = 0.0
    penalised_reward: float = 0.0
    uncertainty: float = 0.0
    imagined_terminations: int = 0

    def means(self) -> dict[str, float]:
        """Per-step means, for logging."""
        real, imagined = max(self.real_steps, 1), max(self.imagined_steps, 1)
        return {
            "real_reward": self.real_reward / real,
            "imagined_raw_reward": self.raw_reward / imagined,
            "imagined_penalised_reward": self.penalised_reward / imagined,
            "imagined_uncertainty": self.uncertainty / imagined,
            "imagined_termination_rate": self.imagined_terminations / imagined,
        }


@dataclass
class _Branches:
    # Position of each imagined row in the branch pool and the state it is in.
    row: np.ndarray
    branch: np.ndarray
    depth: np.ndarray
    account: Account
    state: np.ndarray = field(default_factory=lambda: np.empty(0))
    action_masks: np.ndarray = field(default_factory=lambda: np.empty(0))


class MixedVecEnv(TradingVecEnv):
    """Rows [0, R) walk through history; rows [R, n) follow imagined branches of H bars.

    Masks hold at every real and imagined step, from the same rule set; a forbidden action raises. The reward of an
    imagined step is `reward - penalty_coef * |position after it| * disagreement` at the state the action was taken in:
    MOPO (arXiv:2005.13239) with ensemble disagreement for the max norm, weighted by what is exposed to it. From real
    and imagined rewards alike, what the world model could not foresee is taken out (`mbpo.control_variate`). An
    imagined branch never signals truncation: collect with `n_steps = H` and call `rebranch` before each rollout, so
    that the learner's last-value bootstrap cuts it. A branch that terminates early is followed by a fresh one.

    Args:
        dynamics, scaler: as in `TradingVecEnv`.
        features: [T, M] historical rows; uncertainty: [T]; forecast: [T, 2] of the bar after each row.
        branches: market continuations of those rows.
        starts: visited states; real rows keep adding to it.
        real_ratio: share of real rows, rounded to whole rows.
        penalty_coef: lambda_u, reward units per unit of position and disagreement.
        control_variate: share of the unforeseen reward that is taken out; 0 leaves rewards as they are.
        seed: of starting bars, start states and branch choice.
    """

    def __init__(
        self,
        dynamics: TradingDynamics,
        scaler: Scaler,
        features: np.ndarray,
        uncertainty: np.ndarray,
        forecast: Forecast,
        branches: MarketBranches,
        starts: StartBuffer,
        *,
        num_envs: int,
        real_ratio: float,
        penalty_coef: float,
        control_variate: float,
        episode_bars: int,
        seed: int,
    ) -> None:
        if branches.features.shape[0] != len(features):
            raise ValueError(f"branches: expected T={len(features)}, was {branches.features.shape[0]}")
        super().__init__(dynamics, scaler, num_envs)
        self.num_real = round(num_envs * real_ratio)
        self.num_imagined = num_envs - self.num_real
        self.branches, self.starts, self.penalty_coef = branches, starts, penalty_coef
        self.statistics = RolloutStatistics()
        self._uncertainty = uncertainty
        self._forecast = forecast
        self._control_variate = control_variate
        self._moves = [dynamics.feature_names.index(name) for name in MOVES]
        self._features = features
        self._rng = np.random.default_rng(seed)
        self.walks = (
            HistoryBatch(dynamics, features, uncertainty, batch=self.num_real, episode_bars=episode_bars)
            if self.num_real
            else None
        )
        self._imagined: _Branches | None = None

    def rebranch(self) -> np.ndarray:
        """Start every imagined row on a fresh branch and return the observations [B, D] of all rows."""
        if self.num_imagined:
            self._start_branches(np.arange(self.num_imagined))
        return self._observe()

    def take_statistics(self) -> dict[str, float]:
        """Means since the last call; starts new sums."""
        means, self.statistics = self.statistics.means(), RolloutStatistics()
        return means

    @property
    def _state(self) -> np.ndarray:
        return self._joined("state")

    @property
    def _masks(self) -> np.ndarray:
        return self._joined("action_masks")

    def _joined(self, name: str) -> np.ndarray:
        parts = [getattr(part, name) for part in (self.walks, self._imagined) if part is not None]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _reset_rows(self, rows: np.ndarray) -> None:
        real = rows[rows < self.num_real]
        imagined = rows[rows >= self.num_real] - self.num_real
        if self.walks is not None and len(real):
            self.walks.restart(real, self._rng.integers(0, self.walks.last_row, len(real)))
        if len(imagined):
            self._start_branches(imagined)

    def _advance(self, actions: np.ndarray) -> BatchStep:
        steps = []
        if self.walks is not None:
            steps.append(self._advance_real(self.walks, actions[: self.num_real]))
        if self._imagined is not None:
            steps.append(self._advance_imagined(self._imagined, actions[self.num_real :]))
        return BatchStep(*(np.concatenate(parts) for parts in zip(*steps, strict=True)))

    def _advance_real(self, walks: HistoryBatch, actions: np.ndarray) -> BatchStep:
        self.starts.add(walks.time, walks.state)
        held, time = walks.account.position, walks.time
        step = walks.step(actions)
        self.statistics.real_steps += len(actions)
        self.statistics.real_reward += float(step.reward.sum())
        forecast = Forecast(*(part[time] for part in self._forecast))
        luck = self._luck(held, step.outcome, self._features[time + 1], forecast)
        return BatchStep(step.reward - luck, step.terminated, step.truncated)

    # What luck added to the reward; held is the position before the bar, the features are those after it.
    def _luck(self, held: np.ndarray, outcome: StepOutcome, features: np.ndarray, forecast: Forecast) -> np.ndarray:
        if not self._control_variate:
            return np.zeros(len(held))
        positions = np.stack((held, outcome.target), axis=1)
        luck = unforeseen_reward(self.dynamics.reward, positions, features[:, self._moves], forecast)
        return self._control_variate * luck

    def _advance_imagined(self, now: _Branches, actions: np.ndarray) -> BatchStep:
        check_actions(actions, now.action_masks)
        if int(now.depth.max()) >= self.branches.horizon:
            raise RuntimeError(
                f"imagined rows: expected at most {self.branches.horizon} steps between rebranch() calls; "
                f"set n_steps={self.branches.horizon}"
            )
        disagreement = self._uncertainty_at(now)
        next_features = self.branches.features[now.row, now.branch, now.depth]
        held = now.account.position
        now.account, outcome, reward = self.dynamics.step(now.account, actions, next_features.astype(np.float64))
        at = now.row, now.branch, now.depth
        luck = self._luck(held, outcome, next_features, Forecast(*(part[at] for part in self.branches.forecast)))
        now.depth = now.depth + 1
        terminated = now.account.killed > 0
        # The market does not react, so disagreement alone would be the same for every action and teach nothing.
        penalised = reward - luck - self.penalty_coef * np.abs(now.account.position) * disagreement
        self._refresh(now)

        totals = self.statistics
        totals.imagined_steps += len(actions)
        totals.raw_reward += float(reward.sum())
        totals.penalised_reward += float(penalised.sum())
        totals.uncertainty += float(disagreement.sum())
        totals.imagined_terminations += int(terminated.sum())
        return BatchStep(penalised, terminated, np.zeros_like(terminated))

    def _start_branches(self, rows: np.ndarray) -> None:
        time, states = self.starts.sample(len(rows), self._rng)
        account = self.dynamics.account_from_state(states, np.float64)
        branch = self._rng.integers(0, self.branches.branches_per_row, len(rows))
        if self._imagined is None or len(rows) == self.num_imagined:
            self._imagined = _Branches(time, branch, np.zeros(len(rows), np.int64), account)
        else:
            now = self._imagined
            for column, fresh in zip(
                (now.row, now.branch, now.depth, *now.account),
                (time, branch, np.zeros(len(rows), np.int64), *account),
                strict=True,
            ):
                column[rows] = fresh
        self._refresh(self._imagined)

    def _uncertainty_at(self, now: _Branches) -> np.ndarray:
        depth = np.maximum(now.depth - 1, 0)
        imagined = self.branches.uncertainty[now.row, now.branch, depth].astype(np.float64)
        return np.asarray(np.where(now.depth == 0, self._uncertainty[now.row], imagined))

    def _refresh(self, now: _Branches) -> None:
        depth = np.maximum(now.depth - 1, 0)
        imagined = self.branches.features[now.row, now.branch, depth]
        features = np.where((now.depth == 0)[:, None], self._features[now.row].astype(np.float32), imagined)
        now.state = self.dynamics.state_row(features, now.account, self._uncertainty_at(now))
        now.action_masks = self.dynamics.action_masks(now.state)
