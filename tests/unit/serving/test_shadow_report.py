"""The shadow report: hand-made ledgers with known answers, and one that an engine wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from bundle_parts import make_dynamics, make_policy, write
from serving_parts import FEATURES, START, Hands, request

from serving import Bundle, open_bundle
from serving.engine import DecisionEngine
from serving.errors import LedgerError
from serving.ledger.base import Ledger
from serving.ledger.shadow import ShadowReport, Trial, shadow_report
from serving.ledger.sqlite import SqliteLedger
from serving.ledger.tally import Agreement, Moments, Quantiles
from serving.ledger.valuation import BAR_MISSING, NO_COLUMNS, NO_RETURNS, NO_ROW, NOT_FINITE, NOT_YET, REPLACED
from serving.records import (
    Command,
    ControlRecord,
    DecisionRecord,
    Mode,
    Reason,
    Record,
    RiskState,
    Source,
    encode,
)
from serving.settings import EngineSettings

DAY = 86_400.0
LIVE, RIVAL = "a" * 64, "b" * 64
NAMES = ("gap_return", "intraday_return", "return_2", "position", "data_age")
COST = 0.001


def live(event: str, bar: float, row: Iterable[float] = (), **changes: object) -> DecisionRecord:
    """Decided on day `bar`; row: gap, intraday, return_2, position."""
    record = DecisionRecord(
        event_id=event,
        mode=Mode.LIVE,
        time=START + bar * DAY + 60.0,
        bar_time=START + bar * DAY,
        input_hash="0" * 64,
        state=np.array([*row, 0.0], dtype="<f4").tobytes(),
        caller_masks=None,
        action_masks=(True, True, True),
        blocked={},
        proposed=0,
        executed=0,
        flatten=False,
        target_position=None,
        source=Source.POLICY,
        reason=Reason.OK,
        detail="",
        value=0.0,
        probabilities=(1.0, 0.0, 0.0),
        uncertainty=0.0,
        seed=0,
        trading_state=0,
        drawdown=0.0,
        risk=RiskState(),
        bundle_hash=LIVE,
        rule_set_hash="0" * 64,
        latency_us={"total": 1000.0},
    )
    return msgspec.structs.replace(record, **changes)


def shadow(of: DecisionRecord, **changes: object) -> DecisionRecord:
    defaults = {"mode": Mode.SHADOW, "bundle_hash": RIVAL, "executed": 0, "target_position": None}
    return msgspec.structs.replace(of, **{**defaults, **changes})


def command(name: Command, detail: str = "", **risk: object) -> ControlRecord:
    return ControlRecord(
        time=START, command=name, person="detent", detail=detail, bundle_hash=LIVE, risk=RiskState(**risk)
    )


Report = Callable[..., ShadowReport]


@pytest.fixture
def report(tmp_path: Path) -> Report:
    def make(*records: Record, columns: dict[str, tuple[str, ...]] | None = None, **options: int) -> ShadowReport:
        with closing(SqliteLedger(tmp_path / "ledger.db", fsync="never")) as ledger:
            for record in records:
                ledger.append(encode(record))
            return reported(ledger, {LIVE: NAMES} if columns is None else columns, **options)

    return make


def reported(ledger: Ledger, columns: dict[str, tuple[str, ...]], **options: int) -> ShadowReport:
    return shadow_report(ledger, columns, cost_rate=COST, bar_seconds=4 * DAY, **options)


def only(found: ShadowReport) -> Trial:
    (trial,) = found.trials
    return trial


# --- the pairs --------------------------------------------------------------------------------------------


def test_pairs_are_counted_by_action_reason_and_state(report: Report) -> None:
    first = live("a", 0, executed=1, target_position=0.25, latency_us={"policy": 100.0, "plan": 400.0, "infer": 1.0})
    second = live("b", 1, executed=0, reason=Reason.OVERRIDDEN, trading_state=1)
    third = live("c", 2, executed=0)
    found = report(
        first, shadow(first, executed=1, latency_us={"infer": 200.0, "total": 300.0}),
        second, shadow(second, executed=2, target_position=0.5),
        third, shadow(third, executed=0, reason=Reason.OVERRIDDEN),
        live("alone", 3),
    )  # fmt: skip
    assert (found.decisions, found.unpaired) == (4, 0)
    trial = only(found)
    assert (trial.challenger, trial.bundles) == (RIVAL, {LIVE: 3})
    assert (trial.first_seq, trial.last_seq, trial.first_time, trial.last_time) == (1, 5, first.time, third.time)
    assert trial.agreement == Agreement(2, 3)
    assert trial.free == Agreement(1, 1)
    assert trial.actions == {(0, 0): 1, (0, 2): 1, (1, 1): 1}
    assert trial.states == {"ACTIVE": 2, "REDUCE_ONLY": 1}
    assert trial.live.holds == {"overridden": 1, "ok": 1}
    assert trial.shadow.holds == {"overridden": 1}
    assert (trial.live.overridden, trial.shadow.overridden) == (1, 1)
    assert trial.live.inference.p50 == pytest.approx(501.0, rel=0.006)
    assert trial.shadow.inference.p99 == pytest.approx(200.0, rel=0.006)
    assert trial.live.total.p50 == pytest.approx(1000.0, rel=0.006)


def test_a_shadow_without_its_live_decision_is_not_compared(report: Report) -> None:
    first, second = live("a", 0), live("b", 1)
    found = report(first, shadow(first), second, shadow(live("other", 1)), columns={})
    assert (only(found).agreement.compared, found.unpaired) == (1, 1)
    found = report(columns={}, first=2, last=3)
    assert (only(found).agreement.compared, found.unpaired, found.decisions) == (0, 1, 1)
    assert only(found).to_dict()["agreement"]["share"] is None


def test_each_challenger_has_a_trial_of_its_own(report: Report) -> None:
    first, second = live("a", 0), live("b", 1, bundle_hash="c" * 64)
    found = report(command("shadow", "d" * 64), first, shadow(first), second, shadow(second, bundle_hash="e" * 64))
    assert [trial.challenger for trial in found.trials] == ["d" * 64, RIVAL, "e" * 64]
    assert [trial.bundles for trial in found.trials] == [{}, {LIVE: 1}, {"c" * 64: 1}]
    assert found.trials[0].first_seq is None


def test_kills_and_commands_count_while_a_challenger_is_on_trial(report: Report) -> None:
    pair = live("a", 0)
    after = live("b", 1, risk=RiskState(killed=True), trading_state=2)
    found = report(
        command("kill", killed=True), command("reset"),
        command("shadow", RIVAL), pair, shadow(pair),
        command("kill", killed=True), command("kill", killed=True), command("reset"),
        after, shadow(after), command("reset"),
        command("start"), command("kill", killed=True), command("reset"),
        command("shadow", "none"), command("drift"),
    )  # fmt: skip
    trial = only(found)
    assert trial.kills == {"person": 1, "ladder": 1}
    assert trial.commands == {"kill": 2, "reset": 2}


def test_what_is_no_record_is_an_error(tmp_path: Path) -> None:
    with closing(SqliteLedger(tmp_path / "ledger.db")) as ledger:
        ledger.append(b"{}")
        with pytest.raises(LedgerError, match="entry 1: expected a record"):
            reported(ledger, {})


# --- P&L --------------------------------------------------------------------------------------------------


def test_a_decision_earns_from_the_next_open_to_the_open_after_it_less_costs(report: Report) -> None:
    gap, day, night, late = 0.02, 0.03, -0.01, 0.05
    rows = (
        live("0", 0, (9.0, 9.0, math.nan, 0.5), executed=2, target_position=1.0),
        live("1", 1, (gap, day, math.nan, 0.25)),
        live("2", 2, (night, late, math.nan, 0.0)),
    )
    trial = only(report(rows[0], shadow(rows[0]), rows[1], rows[2]))
    # Held at the close 0.5; the gap moves it before the trade; the shadow holds what the gap left.
    held = 0.5 * math.exp(gap) / (1.0 + 0.5 * (math.exp(gap) - 1.0))
    earned = math.exp(day + night) - 1.0
    expected = 1.0 * earned - COST * (1.0 - held)
    assert trial.live.pnl.total == pytest.approx(expected, rel=1e-6)
    assert trial.shadow.pnl.total == pytest.approx(held * earned, rel=1e-6)
    assert trial.difference.total == pytest.approx(held * earned - expected, rel=1e-5)
    assert trial.live.pnl.bars == 1
    assert trial.live.pnl.standard_error is None
    assert trial.left_out == {}


def test_the_difference_is_paired_bar_by_bar(report: Report) -> None:
    records: list[Record] = []
    rng = np.random.default_rng(0)
    returns = rng.normal(0.0, 0.02, (30, 2))
    for bar, (gap, day) in enumerate(returns):
        one = live(str(bar), bar, (gap, day, math.nan, 1.0), executed=2, target_position=1.0)
        records += [one, shadow(one, executed=1, target_position=0.5)]
    trial = only(report(*records))
    gaps, days = np.expm1(returns.astype(np.float32).astype(float)).T
    earned = (1.0 + days[1:-1]) * (1.0 + gaps[2:]) - 1.0
    # From 1 to 1 costs nothing, from 1 to a half costs the half.
    values = {"live": earned, "shadow": 0.5 * earned - 0.5 * COST}
    values["difference"] = values["shadow"] - values["live"]
    for pnl, name in ((trial.live.pnl, "live"), (trial.shadow.pnl, "shadow"), (trial.difference, "difference")):
        assert pnl.bars == 28
        assert pnl.total == pytest.approx(values[name].sum(), rel=1e-6)
        assert pnl.mean == pytest.approx(values[name].mean(), rel=1e-6)
        assert pnl.standard_error == pytest.approx(values[name].std(ddof=1) / math.sqrt(28), rel=1e-6)
    assert trial.left_out == {NOT_YET: 2}


Row = tuple[float, float, float, float]
FLAT: Row = (0.0, 0.0, math.nan, 0.0)


@pytest.mark.parametrize(
    ("bars", "rows", "left_out"),
    [
        ((0, 1, 2), (FLAT, FLAT, FLAT), {NOT_YET: 2}),
        ((0, 1, 6), (FLAT, FLAT, FLAT), {BAR_MISSING: 2, NOT_YET: 1}),
        ((0, 1, 1, 2), (FLAT, FLAT, FLAT, FLAT), {REPLACED: 1, NOT_YET: 2}),
        ((0, 1, 2), (FLAT, (math.nan, 0.0, 0.0, 0.0), FLAT), {NOT_FINITE: 2, NOT_YET: 1}),
        ((0, 1, 2), (FLAT, FLAT, (0.0, math.inf, 0.0, 0.0)), {NOT_FINITE: 3}),
        ((0, 1, 2), (FLAT, (0.01, 0.02, math.nan, 0.0), (0.01, 0.0, 0.04, 0.0)), {NOT_YET: 2}),
        # The returns of two bars are not those of this bar and of the one decided on before.
        ((0, 1, 2), (FLAT, (0.01, 0.02, math.nan, 0.0), (0.01, 0.0, 0.07, 0.0)), {BAR_MISSING: 2, NOT_YET: 1}),
    ],
)
def test_a_bar_whose_return_is_unknown_is_left_out_and_counted(
    report: Report, bars: tuple[float, ...], rows: tuple[Row, ...], left_out: dict[str, int]
) -> None:
    decided = [live(str(index), bar, row) for index, (bar, row) in enumerate(zip(bars, rows, strict=True))]
    trial = only(report(*(record for one in decided for record in (one, shadow(one)))))
    assert trial.left_out == left_out
    assert trial.difference.bars == len(bars) - sum(left_out.values())


def test_a_later_decision_on_the_bar_counts_even_without_a_shadow(report: Report) -> None:
    first = live("a", 0, FLAT)
    trial = only(report(first, shadow(first), live("b", 0, FLAT), live("c", 1, FLAT), live("d", 2, FLAT)))
    assert (trial.left_out, trial.live.pnl.bars) == ({REPLACED: 1}, 0)


def test_a_refused_decision_hides_the_return_of_its_bar_but_not_of_one_that_is_known(report: Report) -> None:
    first = live("a", 0, FLAT)
    refused = live("b", 1, state=b"", reason=Reason.MISSING_FEATURE)
    pair = (first, shadow(first))
    assert only(report(*pair, refused, live("c", 2, FLAT), live("d", 3, FLAT))).left_out == {NO_ROW: 1}
    # On a bar that is known, and of a time to come, it says nothing.
    first = live("e", 4, FLAT)
    again, ahead = live("f", 4, state=b""), live("g", 99, state=b"", time=first.time)
    following = live("h", 5, FLAT), live("i", 6, FLAT)
    trial = only(report(first, shadow(first), again, ahead, *following, first=6))
    assert (trial.left_out, trial.difference.bars) == ({}, 1)


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({}, NO_COLUMNS),
        ({LIVE: NAMES[:-1]}, NO_COLUMNS),
        ({LIVE: ("open_return", *NAMES[1:])}, NO_RETURNS),
    ],
)
def test_without_columns_there_is_no_pnl(report: Report, columns: dict[str, tuple[str, ...]], why: str) -> None:
    decided = [live(str(bar), bar, FLAT) for bar in range(3)]
    trial = only(report(*(record for one in decided for record in (one, shadow(one))), columns=columns))
    assert (trial.left_out, trial.difference.bars) == ({why: 3}, 0)


def test_a_position_that_a_gap_wipes_out_has_no_pnl(report: Report) -> None:
    decided = [live("0", 0, (0, 0, math.nan, -2.0)), live("1", 1, (1.0, 0, math.nan, 0)), live("2", 2, FLAT)]
    assert only(report(decided[0], shadow(decided[0]), *decided[1:])).left_out == {NOT_FINITE: 1}


# --- the numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("equal", "compared", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (29, 29, 0.8830, 1.0)],
)
def test_wilson_intervals_are_those_of_the_literature(equal: int, compared: int, low: float, high: float) -> None:
    assert Agreement(equal, compared).interval == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert Agreement(0, 0).interval is None


def test_quantiles_are_right_within_their_resolution() -> None:
    values = np.random.default_rng(0).lognormal(6.0, 1.0, 5000)
    quantiles, moments = Quantiles(), Moments()
    assert (quantiles.result(), moments.result().mean) == ((None, None), None)
    for value in values:
        quantiles.add(float(value))
    wanted = np.quantile(values, [0.5, 0.99], method="inverted_cdf")
    assert quantiles.result() == tuple(pytest.approx(value, rel=0.006) for value in wanted)


# --- an engine's ledger -----------------------------------------------------------------------------------


def test_an_engines_ledger_is_reported_as_the_engine_counted(tmp_path: Path, bundle: Bundle) -> None:
    other = open_bundle(write(tmp_path / "other", policy=make_policy(make_dynamics(), seed=9)).path)
    hands = Hands()
    patient = EngineSettings(inference_ms=60_000.0, decision_ms=60_000.0, timeout_ms=60_000.0)
    ledger = SqliteLedger(tmp_path / "ledger.db", fsync="never")
    rng = np.random.default_rng(1)
    with closing(DecisionEngine(bundle, ledger, patient, clock=hands.clock())) as engine:
        engine.challenge(other)
        for day in range(40):
            hands.wall = START + day * DAY
            moves = {name: float(rng.normal(0.0, 0.01)) for name in ("gap_return", "intraday_return")}
            one = request(
                str(day),
                bar_time=hands.wall - 60.0,
                features=FEATURES | moves,
                position=float(rng.choice([0.0, 0.5, 1.0])),
            )
            engine.decide(one)
        found = reported(ledger, {bundle.hash: bundle.manifest.state_names})
        equal, compared = engine.agreement
    trial = only(found)
    assert trial.agreement == Agreement(equal, compared)
    assert (compared, trial.difference.bars, trial.left_out) == (40, 38, {NOT_YET: 2})
    assert 0 < equal < 40
    assert trial.difference.total == pytest.approx(trial.shadow.pnl.total - trial.live.pnl.total)
    assert trial.difference.total != 0.0
    again = json.loads(json.dumps(trial.to_dict(), allow_nan=False))
    assert again["agreement"]["equal"] == equal
    assert sum(one["pairs"] for one in again["actions"]) == 40
    assert set(again["live"]) == {"holds", "overridden", "inference", "total", "pnl"}
