from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from configs.evaluation import VerdictConfig
from evaluation.statistics.crossed import VarianceComponents
from evaluation.statistics.interval import Interval, NotDecidable
from evaluation.statistics.limits import NonInferiority, drawdown_non_inferiority, kill_switch_difference
from evaluation.statistics.sharpe import SharpeDifference, sharpe_difference
from evaluation.verdict import QUESTIONS, Decision, Verdict, decide

CONFIG = VerdictConfig()
"""Gain 0.10, margins 0.02, 50 ms, 95 %."""
STEADY = VarianceComponents(0.004, 0.02, 0.05)


def gain(estimate: float, low: float, high: float | None = None, **changes: Any) -> SharpeDifference:
    high = 2 * estimate - low if high is None else high
    interval = Interval(estimate, low, high, level=0.95, method="given")
    sizes = {"seeds": 5, "paths": 100, "bars": 2520, "block": math.nan, "components": STEADY} | changes
    return SharpeDifference(interval, interval, np.zeros(1), correlation=0.9, by_seed=np.zeros(1), **sizes)


def loss(estimate: float, high: float, needed: int | None = 150) -> NonInferiority:
    interval = Interval(estimate, 2 * estimate - high, high, level=0.95, method="given")
    return NonInferiority(interval, margin=0.02, paths=100, paths_needed=needed)


def killed(events: int, paths: int = 400) -> np.ndarray:
    return np.arange(paths)[None] < events


def verdict(**changes: Any) -> Verdict:
    """Everything passes but what is changed."""
    measured = {
        "sharpe": gain(0.18, 0.12),
        "drawdown": loss(-0.01, 0.005),
        "kill_switch": kill_switch_difference(killed(0), killed(0), margin=0.02, level=0.95),
        "latency_ms": 3.0,
        "invalid_actions": 0,
        "exposures": (0.4, 0.5),
        "failed_checks": (),
        "config": CONFIG,
    }
    return decide("mbpo", "ppo", **(measured | changes))


KILLS = {
    "more": kill_switch_difference(killed(20), killed(0), margin=0.02, level=0.95),
    "few paths": kill_switch_difference(killed(0, 100), killed(0, 100), margin=0.02, level=0.95),
    "few events": kill_switch_difference(killed(1, 40), killed(0, 40), margin=0.02, level=0.95),
}


@pytest.mark.parametrize(
    ("changes", "decision"),
    [
        ({}, Decision.GO),
        ({"sharpe": gain(0.10, 0.01)}, Decision.GO),
        ({"sharpe": gain(0.18, 0.0)}, Decision.CONDITIONAL),
        ({"sharpe": gain(0.18, -0.02)}, Decision.CONDITIONAL),
        ({"sharpe": gain(0.08, 0.03)}, Decision.CONDITIONAL),
        ({"sharpe": gain(0.08, -0.03)}, Decision.NO_GO),
        ({"sharpe": gain(-0.2, -0.3)}, Decision.NO_GO),
        ({"sharpe": NotDecidable(12, "bars", "too short")}, Decision.CONDITIONAL),
        ({"sharpe": gain(0.18, 0.12, seeds=1)}, Decision.CONDITIONAL),
        ({"sharpe": gain(0.08, 0.03, seeds=1)}, Decision.CONDITIONAL),
        ({"drawdown": loss(0.01, 0.03)}, Decision.CONDITIONAL),
        ({"drawdown": loss(0.01, 0.03, needed=None)}, Decision.CONDITIONAL),
        ({"drawdown": loss(0.03, 0.04)}, Decision.NO_GO),
        # Beyond the margin, but not shown to be worse at all.
        ({"drawdown": loss(0.03, 0.06)}, Decision.CONDITIONAL),
        ({"kill_switch": KILLS["few events"]}, Decision.CONDITIONAL),
        ({"drawdown": NotDecidable(1, "paths", "one path")}, Decision.CONDITIONAL),
        ({"kill_switch": KILLS["few paths"]}, Decision.CONDITIONAL),
        ({"kill_switch": KILLS["more"]}, Decision.NO_GO),
        ({"latency_ms": 50.0}, Decision.GO),
        ({"latency_ms": 50.1}, Decision.NO_GO),
        ({"latency_ms": None}, Decision.CONDITIONAL),
        ({"latency_ms": NotDecidable(9, "samples", "few")}, Decision.CONDITIONAL),
        ({"invalid_actions": 1}, Decision.NO_GO),
        # Measurements come from NumPy, whose False is not False.
        ({"invalid_actions": np.int64(1)}, Decision.NO_GO),
        ({"latency_ms": np.float64(50.1)}, Decision.NO_GO),
        ({"exposures": (np.float64(0.049), np.float64(0.1))}, Decision.CONDITIONAL),
        ({"exposures": (0.05, 0.2)}, Decision.GO),
        ({"exposures": (0.049, 0.1)}, Decision.CONDITIONAL),
        ({"exposures": (0.2, 0.81)}, Decision.CONDITIONAL),
        ({"exposures": (math.nan, 0.1)}, Decision.CONDITIONAL),
        ({"exposures": (0.4, math.nan)}, Decision.CONDITIONAL),
        ({"failed_checks": ("ridge learnt nothing",)}, Decision.CONDITIONAL),
        ({"failed_checks": None}, Decision.CONDITIONAL),
        ({"failed_checks": None, "unit": "fold"}, Decision.GO),
        ({"failed_checks": ("ridge learnt nothing",), "drawdown": loss(0.03, 0.04)}, Decision.NO_GO),
        # What is open does not save what is violated, and safety alone earns nothing.
        ({"latency_ms": None, "drawdown": loss(0.03, 0.04)}, Decision.NO_GO),
        ({"latency_ms": None, "sharpe": gain(0.08, -0.03)}, Decision.NO_GO),
    ],
)
def test_the_registered_rules(changes, decision):
    assert verdict(**changes).decision == decision


@pytest.mark.parametrize(
    "changes",
    [
        {"sharpe": gain(math.nan, math.nan)},
        {"drawdown": loss(math.nan, math.nan)},
        {"latency_ms": math.nan},
    ],
)
def test_nan_never_passes(changes):
    decided = verdict(**changes)
    assert decided.decision == Decision.NO_GO
    assert json.loads(json.dumps(decided.to_dict(), allow_nan=False))["decision"] == "NO-GO"


def test_the_full_margin_is_reported_and_decides_nothing():
    full, part = verdict(), verdict(sharpe=gain(0.18, 0.05))
    assert (full.decision, full.at_full_margin) == (Decision.GO, True)
    assert (part.decision, part.at_full_margin) == (Decision.GO, False)
    assert full.next_step == (
        "Switch to mbpo; a gain of 0.10 or more is established, lower end of the 95 % interval 0.120."
    )
    assert "is not established, lower end of the 95 % interval 0.050" in part.next_step


def test_three_sharpe_verdicts_stand_apart():
    answers = {
        (0.18, 0.12): (True, True, True),
        (0.18, 0.05): (True, True, False),
        (0.18, -0.05): (True, False, False),
        (0.05, 0.01): (False, True, False),
        (0.05, -0.01): (False, False, False),
    }
    names = ("sharpe_point", "sharpe_above_zero", "sharpe_full_margin")
    for (estimate, low), expected in answers.items():
        decided = verdict(sharpe=gain(estimate, low))
        assert tuple(decided.criterion(name).passed for name in names) == expected


def test_the_headline_holds_the_numbers():
    assert verdict().headline == (
        "GO: mbpo replaces ppo; annual Sharpe higher by 0.180 (95 % interval 0.120 to 0.240), "
        "5 training runs, 100 paths of 2520 bars."
    )
    worse = verdict(sharpe=gain(-0.2, -0.3, paths=1, block=5.0)).headline
    assert worse.startswith("NO-GO: ppo stays, mbpo does not replace it; annual Sharpe lower by 0.200")
    assert worse.endswith("5 training runs, one series of 2520 bars.")
    undecided = verdict(sharpe=NotDecidable(12, "bars", "too short"))
    assert undecided.headline.endswith("the Sharpe difference cannot be decided, needs 12 more bars: too short.")
    assert undecided.next_step == (
        "Keep ppo for now. The Sharpe gain cannot be decided, needs 12 more bars: too short."
    )


def test_a_no_go_names_what_was_violated_and_nothing_else():
    step = verdict(drawdown=loss(0.03, 0.04), invalid_actions=2, latency_ms=None).next_step
    assert step == (
        "Keep ppo: mean maximum drawdown, difference +3.00 points (95 % interval +2.00 to +4.00), allowed less than "
        "+2.00; 2 forbidden actions chosen, allowed 0."
    )
    better = verdict().criterion("drawdown").reason
    assert better.startswith("mean maximum drawdown, difference -1.00 points (95 % interval -2.50 to +0.50)")


def test_a_conditional_says_what_would_settle_it():
    few = verdict(kill_switch=KILLS["few paths"]).next_step
    assert few == "Keep ppo for now. 117 more paths decide the kill-switch rate if its difference stays."
    assert "No number of paths" in verdict(drawdown=loss(0.01, 0.03, needed=None)).next_step
    chance = verdict(drawdown=loss(0.03, 0.06, needed=None)).next_step
    assert "beyond the margin, which may be chance: more paths or more training runs tell" in chance
    one_seed = verdict(sharpe=gain(0.18, 0.12, seeds=1)).next_step
    assert "needs 1 more training runs" in one_seed
    assert verdict(latency_ms=None).next_step == "Keep ppo for now. Measure the decision time."
    smaller = verdict(sharpe=gain(0.05, 0.02)).next_step
    assert "less than the 0.10 asked for: say whether it is enough; that it is smaller is established" in smaller
    near = verdict(sharpe=gain(0.08, 0.02)).next_step
    assert "or tell it apart from 0.10 with" in near
    # Nobody asks whether less than nothing is enough.
    assert verdict(sharpe=gain(-0.05, -0.2)).criterion("sharpe_point").settled_by == ""
    alone = verdict(sharpe=gain(0.05, -0.02, seeds=1)).next_step
    assert "with more training runs: one says nothing of others" in alone


def test_a_walk_forward_counts_folds():
    few = verdict(kill_switch=KILLS["few paths"], unit="fold")
    assert "117 more folds decide the kill-switch rate" in few.next_step
    hopeless = verdict(drawdown=loss(0.01, 0.03, needed=None), unit="fold").next_step
    assert "No number of folds shows that" in hopeless
    single = verdict(drawdown=NotDecidable(1, "paths", "expected at least 2 paths, was 1"), unit="fold")
    reason = single.criterion("drawdown").reason
    assert reason.endswith("cannot be decided, needs 1 more folds: expected at least 2 folds, was 1")
    assert "path" not in single.next_step


def test_a_failed_check_is_named_and_forbids_go():
    decided = verdict(failed_checks=("ridge learnt nothing", "mbpo saw noise"))
    criterion = decided.criterion("instrument")
    assert (criterion.passed, criterion.observed) == (False, 2)
    assert criterion.reason == "failed: ridge learnt nothing; mbpo saw noise"
    assert "before believing what it measured: ridge learnt nothing; mbpo saw noise." in decided.next_step
    assert verdict().criterion("instrument").passed
    worse = verdict(failed_checks=("mbpo saw noise",), invalid_actions=1)
    assert worse.next_step.endswith("before believing what it measured: mbpo saw noise.")
    unchecked = verdict(failed_checks=None)
    assert (unchecked.criterion("instrument").passed, unchecked.next_step) == (
        None,
        "Keep ppo for now. Name learners in evaluation.suite.check_learners.",
    )
    with pytest.raises(KeyError):
        verdict(unit="fold").criterion("instrument")


def test_the_sample_named_for_a_wide_interval_shows_the_gain():
    wide = gain(0.15, -0.05, components=VarianceComponents(0.01, 0.1, 0.2), seeds=4, paths=10)
    step = verdict(sharpe=wide).next_step
    assert "were the gain truly 0.150" in step.lower()
    assert "more paths" in step
    assert "80 % power" in step
    series = gain(0.15, -0.05, components=VarianceComponents(0.001, 0.04, 0.0), paths=1, block=5.0)
    # ((1.96 + 0.84) / 0.15)^2 * 0.04 = 14 times the series and more, for the few seeds.
    assert "more bars" in verdict(sharpe=series).next_step
    hopeless = gain(0.15, -0.05, components=VarianceComponents(0.5, 0.5, 0.0), seeds=3, paths=3)
    assert "more training runs and more paths together" in verdict(sharpe=hopeless).next_step


def test_measurements_at_other_thresholds_than_registered_are_refused():
    with pytest.raises(ValueError, match=r"drawdown.margin: expected the registered 0.01, was 0.02; measure it again"):
        verdict(config=VerdictConfig(drawdown_margin=0.01))
    with pytest.raises(ValueError, match=r"kill_switch.margin: expected the registered 0.05, was 0.02"):
        verdict(config=VerdictConfig(kill_switch_margin=0.05))
    with pytest.raises(ValueError, match=r"sharpe.interval.level: expected the registered 0.99, was 0.95"):
        verdict(config=VerdictConfig(confidence=0.99))


def test_the_same_record_on_both_sides_is_no_reason_to_switch():
    returns = 0.01 * np.random.default_rng(8).standard_normal((3, 10, 60))
    same = sharpe_difference(returns, returns, 252, level=0.95, resamples=20, seed=0)
    drawdown = drawdown_non_inferiority(np.full((3, 30), 0.1), np.full((3, 30), 0.1), margin=0.02, level=0.95)
    decided = verdict(sharpe=same, drawdown=drawdown)
    assert decided.decision == Decision.NO_GO
    assert decided.criterion("drawdown").passed


def test_json_carries_every_criterion_with_its_reason():
    raw = json.loads(json.dumps(verdict(latency_ms=None).to_dict(), allow_nan=False))
    assert raw["decision"] == "CONDITIONAL"
    names = [criterion["name"] for criterion in raw["criteria"]]
    assert (
        names
        == list(QUESTIONS)
        == [
            "sharpe_point",
            "sharpe_above_zero",
            "sharpe_full_margin",
            "exposure",
            "drawdown",
            "kill_switch",
            "latency",
            "valid_actions",
            "instrument",
        ]
    )
    assert [criterion["label"] for criterion in raw["criteria"]] == [one.label for one in QUESTIONS.values()]
    unknown = json.dumps(verdict(exposures=(0.4, math.nan)).to_dict(), allow_nan=False)
    assert json.loads(unknown)["criteria"][3]["threshold"] is None
    assert all(criterion["reason"] and criterion["measure"] for criterion in raw["criteria"])
    assert [criterion["unit"] for criterion in raw["criteria"]][4:7] == ["share", "share", "ms"]
    latency = raw["criteria"][6]
    assert (latency["passed"], latency["observed"], latency["threshold"]) == (None, None, 50.0)
    with pytest.raises(KeyError):
        verdict().criterion("profit")
