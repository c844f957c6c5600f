from __future__ import annotations

import pytest

from configs.schema import MBPOConfig, PenaltyScheduleConfig
from mbpo import RolloutStatistics
from mbpo.penalty import penalty_schedule

ROLLOUT = RolloutStatistics(real_steps=10, real_reward=2.0, real_terminations=1, imagined_steps=20, raw_reward=10.0)
"""Real rewards of 0.2 a bar, imagined ones of 0.5, and a kill switch in ten real bars."""


def test_a_fixed_penalty_stays() -> None:
    assert penalty_schedule(PenaltyScheduleConfig(), 0.7)(0.7, 0.5, ROLLOUT) == 0.7


@pytest.mark.parametrize(("done", "expected"), [(0.0, 1.0), (0.25, 0.8), (1.0, 0.2), (1.01, 0.2)])
def test_a_linear_penalty_goes_from_its_first_to_its_final_value(done: float, expected: float) -> None:
    schedule = penalty_schedule(PenaltyScheduleConfig(kind="linear", final=0.2), 1.0)
    assert schedule(0.33, done, ROLLOUT) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "target", "expected"),
    [("reward_gap", 0.1, 0.5 + 0.4 * (0.3 - 0.1)), ("reward_gap", 0.5, 0.5 - 0.4 * 0.2), ("kill_rate", 0.0, 0.54)],
)
def test_a_multiplier_moves_by_what_is_measured_beyond_the_target(kind: str, target: float, expected: float) -> None:
    schedule = penalty_schedule(
        PenaltyScheduleConfig.model_validate({"kind": kind, "target": target, "step_size": 0.4}), 0.5
    )
    assert schedule(0.5, 0.1, ROLLOUT) == pytest.approx(expected)


def test_a_multiplier_stays_within_its_bounds() -> None:
    config = PenaltyScheduleConfig(kind="reward_gap", step_size=100.0, max_coef=2.0)
    assert penalty_schedule(config, 0.5)(0.5, 0.0, ROLLOUT) == 2.0
    low = config.model_copy(update={"target": 9.0})
    assert penalty_schedule(low, 0.5)(0.5, 0.0, ROLLOUT) == 0.0


def test_a_multiplier_does_not_move_without_both_kinds_of_rows() -> None:
    schedule = penalty_schedule(PenaltyScheduleConfig(kind="reward_gap"), 0.5)
    assert schedule(0.5, 0.0, RolloutStatistics(real_steps=3, real_reward=-9.0)) == 0.5
    assert schedule(0.5, 0.0, RolloutStatistics(imagined_steps=3, raw_reward=9.0)) == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty_schedule": {"kind": "reward_gap"}, "real_ratio": 1.0}, "expected 0 < real_ratio < 1, was 1.0"),
        ({"penalty_schedule": {"kind": "kill_rate"}, "penalty_coef": 9.0}, "at most penalty_schedule.max_coef=5.0"),
        ({"rollout_schedule": {"initial": 4}}, "at most rollout_length=3, was 4"),
        ({"rollout_schedule": {"begin": 0.5, "end": 0.5}}, "expected begin < end"),
    ],
)
def test_schedules_that_cannot_be_kept_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MBPOConfig.model_validate(settings)
