"""Half history, half imagination, in one batched environment for an unmodified MaskablePPO."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from data import Scaler
from envs import Account, HistoryBatch, StepOutcome, TradingDynamics
from envs.batch import BatchStep
from envs.vec_env import TradingVecEnv
from masking import ActionAudit, check_actions
from mbpo.control_variate import unforeseen_reward
from mbpo.imagination import Forecast, MarketBranches
from mbpo.penalty import PenaltySchedule, PlannedPenalty
from mbpo.ramp import Ramp
from mbpo.rollout_statistics import RolloutStatistics
from mbpo.starts import StartBuffer
from world_model.volatility import BAR_MOVES


@dataclass
class _Branches:
    # Position of each imagined row in the branch pool and the state it is in.
    row: np.ndarray
    branch: np.ndarray
    depth: np.ndarray
    account: Account
    uncertainty: np.ndarray = field(default_factory=lambda: np.empty(0))
    state: np.ndarray = field(default_factory=lambda: np.empty(0))
    action_masks: np.ndarray = field(default_factory=lambda: np.empty(0))


class MixedVecEnv(TradingVecEnv):
    """Rows [0, R) walk through history; rows [R, n) follow imagined branches of at most H bars.

    Masks hold at every real and imagined step, from the same rule set; a forbidden action raises. The reward of an
    imagined step is `reward - penalty_coef * |position after it| * disagreement` at the state the action was taken in:
    MOPO (arXiv:2005.13239) with ensemble disagreement for the max norm, weighted by what is exposed to it. From real
    and imagined rewards alike, what the world model could not foresee is taken out (`mbpo.control_variate`).

    An imagined branch is truncated, never terminated, where it reaches its length or where its next bar was drawn
    outside the support of the data and moved to its edge; the reward of that bar counts, the value of the state there
    has to be bootstrapped. Before each rollout `start_rollout` puts every imagined row on a fresh branch. It also says
    how many steps the rollout has: at the last of them a branch of full length is left to the learner's own last-value
    bootstrap, which spares signalling thousands of truncations. A branch that ends earlier is followed by a fresh one.

    Args:
        dynamics, scaler: as in `TradingVecEnv`.
        features: [T, M] historical rows; uncertainty: [T]; forecast: [T, 2] of the bar after each row.
        branches: market continuations of those rows.
        starts: visited states; real rows keep adding to it.
        real_ratio: share of real rows, rounded to whole rows.
        penalty_coef: lambda_u at the start, reward units per unit of position and disagreement.
        control_variate: share of the unforeseen reward that is taken out; 0 leaves rewards as they are.
        seed: of starting bars, start states and branch choice.
        penalty: how lambda_u goes on from there; None keeps it.
        lengths: H by share of training done, rounded down; None takes whole branches.
        risk_aversion: that of the reward by share of training done; None keeps the dynamics' own.
        model_error: [T-1] of the world model at each historical row, to report it where the policy goes; None where it
            is not of interest.
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
        penalty: PenaltySchedule | None = None,
        lengths: Ramp | None = None,
        risk_aversion: Ramp | None = None,
        model_error: np.ndarray | None = None,
    ) -> None:
        if branches.features.shape[0] != len(features):
            raise ValueError(f"branches: expected T={len(features)}, was {branches.features.shape[0]}")
        if model_error is not None and model_error.shape != (len(features) - 1,):
            raise ValueError(f"model_error: expected [{len(features) - 1}], was {list(model_error.shape)}")
        lengths = lengths or Ramp(branches.horizon, branches.horizon)
        if not all(1 <= length <= branches.horizon for length in (lengths.first, lengths.last)):
            raise ValueError(f"lengths: expected 1 to the horizon {branches.horizon}, was {lengths}")
        super().__init__(dynamics, scaler, num_envs)
        self.num_real = round(num_envs * real_ratio)
        self.num_imagined = num_envs - self.num_real
        self.branches, self.starts, self.penalty_coef = branches, starts, penalty_coef
        self.rollout_length = int(lengths(0.0))
        self._penalty = penalty or PlannedPenalty(Ramp(penalty_coef, penalty_coef))
        self._lengths, self._risk_aversion, self._model_error = lengths, risk_aversion, model_error
        self._closed, self._rollout = RolloutStatistics(), RolloutStatistics()
        self._steps_left: float = np.inf
        self._uncertainty = uncertainty
        self._forecast = forecast
        self._control_variate = control_variate
        self._moves = [dynamics.feature_names.index(name) for name in BAR_MOVES]
        self._features = features
        self._rng = np.random.default_rng(seed)
        self.walks = (
            HistoryBatch(dynamics, features, uncertainty, batch=self.num_real, episode_bars=episode_bars)
            if self.num_real
            else None
        )
        self._imagined: _Branches | None = None

    def start_rollout(self, done: float, steps: int) -> np.ndarray:
        """Put every imagined row on a fresh branch for a rollout of `steps`, when a share `done` of training is over.

        H and the reward's risk aversion are those of that moment from here on.

        Returns: observations [B, D] of all rows.
        """
        self.rollout_length = int(self._lengths(done))
        self._steps_left = steps
        if self._risk_aversion is not None:
            reward = self.dynamics.reward.model_copy(update={"risk_aversion": self._risk_aversion(done)})
            self.dynamics = replace(self.dynamics, reward=reward)
            if self.walks is not None:
                self.walks.dynamics = self.dynamics
        return self.rebranch()

    def end_rollout(self, done: float) -> None:
        """Let the penalty follow the rollout that is complete."""
        self.penalty_coef = self._penalty(self.penalty_coef, done, self._rollout)
        self._closed, self._rollout = self._closed + self._rollout, RolloutStatistics()

    def rebranch(self) -> np.ndarray:
        """Start every imagined row on a fresh branch and return the observations [B, D] of all rows."""
        if self.num_imagined:
            self._start_branches(np.arange(self.num_imagined))
        return self._observe()

    def take_statistics(self) -> dict[str, float]:
        """Means since the last call; lambda_u, risk aversion and H in force; starts new sums."""
        totals, self._closed, self._rollout = self._closed + self._rollout, RolloutStatistics(), RolloutStatistics()
        figures = totals.means() | {
            "penalty_coef": self.penalty_coef,
            "risk_aversion": self.dynamics.reward.risk_aversion,
            "rollout_length": float(self.rollout_length),
        }
        if self._model_error is not None and self.num_real:
            figures["model_error_visited"] = totals.model_error / max(totals.real_steps, 1)
            figures["model_error_history"] = float(self._model_error.mean())
        return figures

    def state_dict(self) -> dict[str, Any]:
        """What a continued training needs of this environment, between two rollouts.

        Imagined rows are not part of it, nor are sums: the next rollout starts on fresh branches and, as snapshots are
        saved when their figures have been taken, on empty sums.
        """
        state: dict[str, Any] = {
            "audit": vars(self.audit).copy(),
            "penalty_coef": self.penalty_coef,
            "rng": self._rng.bit_generator.state,
            "starts": self.starts.state_dict(),
        }
        return state if self.walks is None else state | {"walks": self.walks.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave, in an environment that was built the same."""
        self.audit = ActionAudit(**state["audit"])
        self.penalty_coef = state["penalty_coef"]
        self._rng.bit_generator.state = state["rng"]
        self.starts.load_state_dict(state["starts"])
        if self.walks is not None:
            self.walks.load_state_dict(state["walks"])

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
        totals = self._rollout
        totals.real_steps += len(actions)
        totals.real_reward += float(step.reward.sum())
        totals.real_terminations += int(step.terminated.sum())
        if self._model_error is not None:
            totals.model_error += float(self._model_error[time].sum())
        forecast = Forecast(*(part[time] for part in self._forecast))
        luck = self._luck(held, step.outcome, self._features[time + 1], forecast)
        return BatchStep(step.reward - luck, step.terminated, step.truncated)

    # What luck added to the reward; held is the position before the bar, the features are those after it.
    def _luck(self, held: np.ndarray, outcome: StepOutcome, features: np.ndarray, forecast: Forecast) -> np.ndarray:
        if not self._control_variate:
            return np.zeros(len(held))
        moves = features[:, self._moves]
        mean, variance = (tuple(part.T) for part in forecast)
        luck: np.ndarray = unforeseen_reward(
            self.dynamics.reward, (held, outcome.target), tuple(moves.T), mean, variance
        )
        return self._control_variate * luck

    def _advance_imagined(self, now: _Branches, actions: np.ndarray) -> BatchStep:
        if self._steps_left <= 0:
            raise RuntimeError("imagined rows: expected start_rollout() after the last step of a rollout, was a step")
        check_actions(actions, now.action_masks)
        disagreement = now.uncertainty
        place = (now.row, now.branch, now.depth)
        next_features = self.branches.features[place]
        held = now.account.position
        now.account, outcome, reward = self.dynamics.step(now.account, actions, next_features.astype(np.float64))
        luck = self._luck(held, outcome, next_features, Forecast(*(part[place] for part in self.branches.forecast)))
        now.depth = now.depth + 1
        self._steps_left -= 1
        terminated = now.account.killed > 0
        outside = ~(self.branches.supported[place] | terminated)
        full = (now.depth >= self.rollout_length) & (self._steps_left > 0)
        # The market does not react, so disagreement alone would be the same for every action and teach nothing.
        penalised = reward - self.penalty_coef * np.abs(now.account.position) * disagreement
        self._show(now, next_features, self.branches.uncertainty[place])

        totals = self._rollout
        totals.imagined_steps += len(actions)
        totals.raw_reward += float(reward.sum())
        totals.absolute_reward += float(np.abs(reward).sum())
        totals.penalised_reward += float(penalised.sum())
        totals.uncertainty += float(disagreement.sum())
        totals.imagined_terminations += int(terminated.sum())
        totals.out_of_range += int(outside.sum())
        return BatchStep(penalised - luck, terminated, (outside | full) & ~terminated)

    def _start_branches(self, rows: np.ndarray) -> None:
        time, states = self.starts.sample(len(rows), self._rng)
        account = self.dynamics.account_from_state(states, np.float64)
        branch = self._rng.integers(0, self.branches.branches_per_row, len(rows))
        fresh = _Branches(time, branch, np.zeros(len(rows), np.int64), account)
        self._show(fresh, self._features[time], self._uncertainty[time])
        now = self._imagined
        if now is None or len(rows) == self.num_imagined:
            self._imagined = fresh
            return
        # Copies: columns may share memory with each other or with what a caller kept.
        now.account = Account(*map(np.array, now.account))
        for name in ("row", "branch", "depth", "uncertainty", "state", "action_masks"):
            getattr(now, name)[rows] = getattr(fresh, name)
        for column, start in zip(now.account, fresh.account, strict=True):
            column[rows] = start

    def _show(self, now: _Branches, features: np.ndarray, uncertainty: np.ndarray) -> None:
        # Every row stands on these features now: state and masks follow from them and the account.
        now.uncertainty = uncertainty.astype(np.float64)
        now.state = self.dynamics.state_row(features, now.account, now.uncertainty)
        now.action_masks = self.dynamics.action_masks(now.state)
