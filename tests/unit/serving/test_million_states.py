"""A million states, most of them at the edge of a rule or beyond reason: nothing forbidden is ever executed.

What is forbidden says an oracle that shares nothing with the rules under test.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import bundle_parts
import numpy as np
import numpy.typing as npt
import pytest
from http_worlds import make_engine
from rule_oracle import RuleOracle
from serving_parts import START, request

from masking import HOLD, ActionTable, RuleSet, trading_rules
from masking.rules import Rule
from masking.ruleset import rule_name
from serving import Bundle, OnnxPolicy, open_bundle
from serving.records import DecisionRequest

STATES = 1_000_000
CHUNK = 20_000
FACTORS = ActionTable().factors
LIMITS: dict[str, dict[str, Any]] = {
    "size": {"max_exposure": 1.0, "paper": True},
    "paper": {"max_exposure": 1.25, "paper": False},
}
"""Leverage is forbidden by size, or for all but paper trading."""
ORACLES = {"size": RuleOracle(exposure=1.0), "paper": RuleOracle(unleveraged=1.0)}
EDGES = {
    "position": [*FACTORS, *(factor + sign * 0.6 for factor in FACTORS for sign in (-1, 1)), -0.5],
    "drawdown": [0.0, 0.08, 0.12, 0.15, 1.0],
    "trading_state": [0.0, 1.0, 2.0],
    "holding_time": [0.0, 2.0, 3.0],
    "volatility_20": [0.0, 0.6],
    "data_age": [0.0, 1.0],
}
"""Where a verdict changes."""
CALM = {
    "position": (-0.2, 1.5),
    "drawdown": (0.0, 0.1),
    "trading_state": (0.0, 0.0),
    "holding_time": (3.0, 30.0),
    "volatility_20": (0.05, 0.59),
    "data_age": (0.0, 1.0),
}
"""Ranges in which most actions are allowed."""
STRANGE = np.array([np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, -0.0, -1.0, 1e9], dtype=np.float32)


@pytest.fixture(scope="module")
def paper_only(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle under the rules of `LIMITS["paper"]`."""
    dynamics = bundle_parts.make_dynamics().with_rule_set(RuleSet(trading_rules(**LIMITS["paper"]), ActionTable()))
    return open_bundle(bundle_parts.write(tmp_path_factory.mktemp("paper") / "bundle", dynamics=dynamics).path)


def adversarial(names: tuple[str, ...], rng: np.random.Generator, count: int) -> npt.NDArray[np.float32]:
    """State rows [N, S]: half of the numbers that rules read at an edge or a float32 beside it, some beyond reason."""
    rows = rng.normal(0.0, 0.1, (count, len(names))).astype(np.float32)
    for name, (low, high) in CALM.items():
        edges = np.array(EDGES[name])
        near = np.concatenate([edges, edges - 1e-6, edges + 1e-6]).astype(np.float32)
        near = np.concatenate([near, *(np.nextafter(near, np.float32(bound)) for bound in (-np.inf, np.inf))])
        calm = rng.uniform(low, high, count).astype(np.float32)
        rows[:, names.index(name)] = np.where(rng.random(count) < 0.3, rng.choice(near, count), calm)
    strange = rng.random(rows.shape) < 0.005
    rows[strange] = rng.choice(STRANGE, int(strange.sum()))
    return rows


def caller_masks(rng: np.random.Generator, count: int) -> npt.NDArray[np.bool_]:
    """Bool [N, A]: everything for half of the callers, anything for the others."""
    masks: npt.NDArray[np.bool_] = rng.random((count, len(FACTORS) + 1)) < 0.6
    masks[rng.random(count) < 0.5] = True
    return masks


@dataclass(frozen=True)
class Judge:
    """Holds actions against the oracle, row by row."""

    names: tuple[str, ...]
    oracle: RuleOracle

    def forbidden(
        self, rows: npt.NDArray[np.float32], callers: npt.NDArray[np.bool_], actions: npt.NDArray[np.int64]
    ) -> list[tuple[list[str], list[float], int]]:
        """Broken rules, state and action of every row whose action is forbidden."""
        columns = [self.names.index(name) for name in CALM]
        finite = np.logical_and.reduce(np.isfinite(rows), axis=1)
        found = []
        for index in np.flatnonzero(actions != HOLD).tolist():
            action, state = int(actions[index]), dict(zip(CALM, rows[index, columns].tolist(), strict=True))
            broken = self.oracle.broken(FACTORS[action - 1], **state)
            if not finite[index]:
                broken.append("state is not finite")
            if not callers[index, action]:
                broken.append("caller")
            if broken:
                found.append((broken, rows[index].tolist(), action))
        return found


def test_no_state_of_a_million_leads_to_a_forbidden_action(paper_only: Bundle) -> None:
    rng = np.random.default_rng(0)
    executed: Counter[int] = Counter()
    policy, judge = OnnxPolicy(paper_only), Judge(paper_only.manifest.state_names, ORACLES["paper"])
    for _ in range(STATES // CHUNK):
        rows, callers = adversarial(judge.names, rng, CHUNK), caller_masks(rng, CHUNK)
        # The graph's own answer, and what the check in NumPy made of it.
        graph, decisions = paper_only.run_policy(rows, callers).action, policy.decide(rows, callers)
        assert judge.forbidden(rows, callers, graph) == []
        np.testing.assert_array_equal(decisions.actions, graph)
        executed.update(graph.tolist())
    assert policy.overridden_total == 0
    assert executed.total() == STATES
    # What was proved would say little if nothing was traded.
    assert STATES / 4 < STATES - executed[HOLD] < STATES
    assert min(executed[action] for action in range(1, len(FACTORS))) > STATES / 200


def without(rules: tuple[Rule, ...], index: int) -> RuleSet:
    return RuleSet([rule for number, rule in enumerate(rules) if number != index], ActionTable())


@pytest.mark.parametrize("index", range(7))
@pytest.mark.parametrize("kind", ["size", "paper"])
def test_the_oracle_and_the_states_find_every_rule_that_is_missing(kind: str, index: int) -> None:
    rng = np.random.default_rng(1)
    rules, names = trading_rules(**LIMITS[kind]), tuple(CALM)
    rows, callers = adversarial(names, rng, CHUNK), np.ones((CHUNK, len(FACTORS) + 1), dtype=np.bool_)
    columns = {name: rows[:, number] for number, name in enumerate(names)}
    judge, chances = Judge(names, ORACLES[kind]), rng.random(callers.shape)
    full, lax = RuleSet(rules, ActionTable()), without(rules, index)
    assert judge.forbidden(rows, callers, chosen(full(columns), chances)) == []
    found = judge.forbidden(rows, callers, chosen(lax(columns), chances))
    name = rule_name(rules[index])
    assert (len(found) > 10) is (name != {"size": "paper_only_leverage", "paper": "max_exposure"}[kind])
    # A column that no rule reads any more may be broken as well.
    assert all({name, "non_finite"} & set(broken) for broken, _, _ in found)


def chosen(masks: npt.NDArray[np.bool_], chances: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Any valid action but Hold, where there is one [N]."""
    others: npt.NDArray[np.int64] = np.where(masks[:, 1:], chances[:, 1:], -1.0).argmax(axis=1) + 1
    return np.where(masks[:, 1:].any(axis=1), others, HOLD)


# --- the engine -------------------------------------------------------------------------------------------

DECISIONS = 4000


@dataclass
class Account:
    """The risk manager within one bar, in plain Python: equity, running peak, trading state."""

    oracle: RuleOracle
    peak: float = 0.0
    equity: float = 0.0
    state: int = 0

    def observe(self, equity: float) -> float:
        """The drawdown at this equity; between two bars the state only tightens."""
        self.equity, self.peak = equity, max(self.peak, equity)
        drawdown = 1.0 - equity / self.peak if equity > 0.0 else 1.0
        self.state = max(self.state, int(drawdown >= self.oracle.soft) + int(drawdown >= self.oracle.hard))
        return drawdown

    def reset(self) -> None:
        self.peak, self.state = self.equity, 0


def requests(rng: np.random.Generator, oracle: RuleOracle) -> Iterator[DecisionRequest]:
    """Requests of one bar: numbers at edges, and some beyond reason or not there."""
    beyond = [None, math.nan, math.inf, -math.inf, 1e308, -1e308, 1e39, 5e-324, -0.0]

    def number(low: float, high: float, edges: Sequence[float] = ()) -> float | None:
        kind = rng.random()
        if kind < 0.01:
            return beyond[int(rng.integers(len(beyond)))]
        if kind > 0.3 or not edges:
            return float(rng.uniform(low, high))
        edge = np.float32(edges[int(rng.integers(len(edges)))])
        return float(np.nextafter(edge, (np.float32(-np.inf), edge, np.float32(np.inf))[int(rng.integers(3))]))

    for index in range(DECISIONS):
        features = {name: number(-0.1, 0.1) for name in ("gap_return", "intraday_return", "momentum")}
        features["volatility_20"] = number(0.05, 0.65, EDGES["volatility_20"])
        yield request(
            f"event {index}",
            features=features,
            equity=number(940.0, 1000.0, [1000.0 * (1.0 - level) for level in (oracle.soft, oracle.hard, 0.15)]),
            position=number(0.0, 1.3, EDGES["position"]),
            holding_time=number(0.0, 20.0, EDGES["holding_time"]),
            bar_time=START - 60.0,
            action_masks=tuple((rng.random(7) < 0.7).tolist()) if rng.random() < 0.3 else None,
        )


def test_an_engine_executes_nothing_forbidden_over_thousands_of_decisions(paper_only: Bundle, tmp_path: Path) -> None:
    oracle, reasons, states, traded = ORACLES["paper"], Counter[str](), Counter[int](), 0
    account = Account(oracle)
    with closing(make_engine(paper_only, tmp_path)) as engine:
        for number, asked in enumerate(requests(np.random.default_rng(2), oracle)):
            if number % 7 == 0:
                engine.reset("Ada", "a test")
                account.reset()
            elif number % 97 == 0:
                (engine.kill if number % 2 else engine.reduce_only)("Ada", "a test")
                account.state = max(account.state, 1 + number % 2)
            record = engine.decide(asked)
            assert violations(oracle, account, asked, record.executed) == [], asked
            target = FACTORS[record.executed - 1] if record.executed else 0.0 if record.flatten else None
            assert record.target_position == target
            reasons[record.reason] += 1
            states[record.trading_state] += 1
            traded += record.executed != HOLD
    assert traded > DECISIONS / 4
    assert set(states) == {0, 1, 2}
    assert set(reasons) == {"ok", "halted", "non_finite", "no_valid_action"}


def violations(oracle: RuleOracle, account: Account, asked: DecisionRequest, executed: int) -> list[str]:
    """What an executed action breaks, judged on what was asked and not on what was recorded."""
    position, equity = asked.account.position, asked.account.equity
    if not (is_number(position) and is_number(equity)):
        return [] if executed == HOLD else ["account"]
    drawdown = account.observe(equity)
    if executed == HOLD:
        return []
    if asked.action_masks is not None and not asked.action_masks[executed]:
        return ["caller"]
    numbers = {
        "position": position,
        "drawdown": drawdown,
        "trading_state": float(account.state),
        "holding_time": asked.account.holding_time,
        "volatility_20": asked.features["volatility_20"],
        "data_age": 0.0,
    }
    if not all(map(is_number, [*numbers.values(), *asked.features.values()])):
        return ["not a number"]
    # As state rows hold them.
    return oracle.broken(FACTORS[executed - 1], **{name: float(np.float32(value)) for name, value in numbers.items()})


def is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
