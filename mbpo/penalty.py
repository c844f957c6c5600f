"""lambda_u, the price of model disagreement: fixed, on a line to an end value, or set by a multiplier update.

A schedule is asked once per rollout. It is a function of its arguments alone, so what a checkpoint has to keep of it is
the present lambda_u.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from configs.schema import PenaltyScheduleConfig
from mbpo.ramp import Ramp
from mbpo.rollout_statistics import RolloutStatistics

PenaltySchedule = Callable[[float, float, RolloutStatistics], float]
"""(lambda_u in force, share of training that is done, the rollout that just ended) -> lambda_u of the next rollout."""


@dataclass(frozen=True)
class PlannedPenalty:
    """What a ramp says, whatever happens: one value throughout, as MOPO (arXiv:2005.13239) has it, or on a line."""

    ramp: Ramp

    def __call__(self, coef: float, done: float, rollout: RolloutStatistics) -> float:  # noqa: ARG002 - PenaltySchedule
        """The point of the ramp at `done`."""
        return self.ramp(done)


@dataclass(frozen=True)
class DualPenalty:
    """Projected ascent on a multiplier: `clip(lambda + step_size * (measured - target), 0, max_coef)`.

    The update of the multiplier of a constraint `measured <= target` in reward-constrained policy optimisation
    (arXiv:1805.11074, sec. 4). There the multiplier prices the constrained quantity itself; here it prices
    disagreement, through which a policy comes to be better in imagination than in history.
    """

    measure: Callable[[RolloutStatistics], float]
    target: float
    step_size: float
    max_coef: float

    def __call__(self, coef: float, done: float, rollout: RolloutStatistics) -> float:  # noqa: ARG002 - PenaltySchedule
        """One step, unless the rollout has nothing to measure."""
        if not rollout.real_steps or not rollout.imagined_steps:
            return coef
        return min(max(coef + self.step_size * (self.measure(rollout) - self.target), 0.0), self.max_coef)


def reward_gap(rollout: RolloutStatistics) -> float:
    """Mean imagined reward before the penalty minus mean real reward, per step."""
    return rollout.raw_reward / rollout.imagined_steps - rollout.real_reward / rollout.real_steps


def kill_rate(rollout: RolloutStatistics) -> float:
    """Kill switches per real step."""
    return rollout.real_terminations / rollout.real_steps


def penalty_schedule(config: PenaltyScheduleConfig, first: float) -> PenaltySchedule:
    """The schedule of a config; `first` is lambda_u at the start of training."""
    if config.kind == "linear":
        return PlannedPenalty(Ramp(first, config.final))
    if config.kind == "fixed":
        return PlannedPenalty(Ramp(first, first))
    measure = {"reward_gap": reward_gap, "kill_rate": kill_rate}[config.kind]
    return DualPenalty(measure, config.target, config.step_size, config.max_coef)
