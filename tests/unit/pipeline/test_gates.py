from __future__ import annotations

import math
from typing import Any

import pytest

from configs.schema import GatesConfig
from evaluation import PolicyMetrics
from pipeline.gates import Gate, decide_gates


def metrics(**changes: Any) -> PolicyMetrics:
    values: dict[str, Any] = dict.fromkeys(PolicyMetrics.__dataclass_fields__, 0.0)
    values |= {
        "policy": "p",
        "bars": 10,
        "paths": 1,
        "invalid_actions": 0,
        "sharpe": 0.8,
        "max_drawdown": 0.1,
        "exposure": 0.3,
    }
    return PolicyMetrics(**(values | changes))


def decide(config: GatesConfig | None = None, **changes: Any) -> dict[str, Gate]:
    settings: dict[str, Any] = {
        "challenger": metrics(),
        "champion": metrics(sharpe=0.7),
        "no_champion_reason": "",
        "nll_gain": 0.1,
        "latency_p99_ms": 1.0,
        "latency_budget_ms": 50.0,
        "invalid_actions": 0,
        "paper": False,
        "other_market": "",
    }
    return {gate.name: gate for gate in decide_gates(config or GatesConfig(), **(settings | changes))}


def failed(**changes: Any) -> list[str]:
    return [name for name, gate in decide(**changes).items() if not gate.passed]


def test_a_good_challenger_passes_every_gate_and_each_has_a_reason() -> None:
    gates = decide()
    assert all(gate.passed for gate in gates.values())
    assert all(gate.reason for gate in gates.values())


@pytest.mark.parametrize(
    ("name", "value", "gate"),
    [
        ("sharpe", -0.1, "sharpe"),
        ("sharpe", math.nan, "sharpe"),
        ("exposure", 0.01, "exposure"),
        ("max_drawdown", 0.4, "drawdown"),
        ("max_drawdown", math.nan, "drawdown"),
        ("kill_switch_rate", 1.0, "kill_switch"),
    ],
)
def test_a_planner_in_the_bundle_must_keep_the_limits_as_well(name: str, value: float, gate: str) -> None:
    assert failed(planner=metrics(sharpe=0.6)) == []
    assert failed(planner=metrics(**{name: value})) == [gate]
    assert failed(challenger=metrics(**{name: value}), planner=metrics(), champion=None) == [gate]
    assert "of the planner" in decide(planner=metrics(**{name: value}))[gate].reason
    assert "of the planner" not in decide(planner=metrics())["champion"].reason


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"invalid_actions": 1}, ["invalid_actions"]),
        ({"paper": True}, ["live_limits"]),
        ({"other_market": "nasdaq at 252 bars per year"}, ["champion"]),
        ({"nll_gain": -0.01}, ["world_model"]),
        ({"challenger": metrics(sharpe=0.0), "champion": None}, ["sharpe"]),
        ({"challenger": metrics(exposure=0.049)}, ["exposure"]),
        ({"challenger": metrics(max_drawdown=0.151)}, ["drawdown"]),
        ({"challenger": metrics(kill_switch_rate=0.01)}, ["kill_switch"]),
        ({"latency_p99_ms": 50.1}, ["latency"]),
        ({"champion": metrics(sharpe=0.81)}, ["champion"]),
    ],
)
def test_each_gate_fails_alone_just_beyond_its_limit(changes: dict[str, Any], expected: list[str]) -> None:
    assert failed(**changes) == expected


def test_limits_themselves_pass_except_the_sharpe_of_doing_nothing() -> None:
    at_limit = {
        "challenger": metrics(max_drawdown=0.15, sharpe=0.7, exposure=0.05),
        "nll_gain": 0.0,
        "latency_p99_ms": 50.0,
    }
    assert failed(**at_limit) == []
    assert failed(challenger=metrics(sharpe=0.0), champion=metrics(sharpe=-1.0)) == ["sharpe"]


def test_nan_never_passes() -> None:
    nan = math.nan
    challenger = metrics(sharpe=nan, exposure=nan, max_drawdown=nan, kill_switch_rate=nan)
    assert failed(challenger=challenger, nll_gain=nan, latency_p99_ms=nan) == [
        "world_model",
        "sharpe",
        "exposure",
        "drawdown",
        "kill_switch",
        "latency",
        "champion",
    ]


def test_without_a_champion_the_gate_passes_and_says_why() -> None:
    gate = decide(champion=None, no_champion_reason="no champion yet")["champion"]
    assert gate.passed
    assert gate.reason == "no champion yet"


def test_a_required_gain_over_the_champion_is_enforced() -> None:
    config = GatesConfig(min_sharpe_gain=0.2)
    assert not decide(config)["champion"].passed
    assert decide(config, champion=metrics(sharpe=0.5))["champion"].passed
