"""One decision in the making, stage by stage; each may end it with Hold and the reason."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from masking import HOLD, TradingState
from masking.rules import TOLERANCE
from serving.deciders import Deciders, Masks, Proposal, Row, Verdict, only_hold, target_position
from serving.inference import InferenceThread, LateError
from serving.limits import LimitsSource
from serving.manifest import AGE_COLUMN, UNCERTAINTY_COLUMN
from serving.records import (
    FAILURES,
    MAX_EVENT_ID,
    DecisionRecord,
    DecisionRequest,
    Mode,
    Reason,
    RiskState,
    Source,
    is_event_id,
    safe_event_id,
)
from serving.risk import RiskManager, is_finite, kill
from serving.settings import Clock, EngineSettings

log = logging.getLogger(__name__)

UNSEEN = frozenset(
    {
        Reason.CLOCK_BACKWARDS,
        Reason.FUTURE_DATA,
        Reason.HASH_MISMATCH,
        Reason.MISSING_FEATURE,
        Reason.UNKNOWN_FEATURE,
    }
)
"""Reasons that end a decision before the account was looked at, though nothing is wrong with it."""


@dataclass(frozen=True, eq=False)
class Workshop:
    """What a decision is made with."""

    deciders: Deciders
    settings: EngineSettings
    clock: Clock
    manager: RiskManager
    limits: LimitsSource | None
    policy_thread: InferenceThread
    planner_thread: InferenceThread
    pulled: Callable[[], int]
    """Trading state that a person ordered just now, perhaps while the decision is made."""


class HoldError(Exception):
    """Ends a decision with Hold."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class Draft:
    """One decision in the making; stages fill in what they know, so that Hold says how far it came."""

    def __init__(
        self, shop: Workshop, request: DecisionRequest, risk: RiskState, input_hash: str, begin: float
    ) -> None:
        """Args: risk: before the decision; begin: on the steady clock."""
        self.shop, self.request, self.input_hash, self.begin = shop, request, input_hash, begin
        self.risk = risk
        """Of the risk manager; after `record` as it is to be written."""
        self.now = shop.clock.wall()
        self.row: Row | None = None
        self.callers: Masks | None = None
        self.verdict: Verdict | None = None
        self.uncertainty: float | None = None
        self.trading_state = risk.trading_state
        self.latency: dict[str, float] = {}
        self.mark = begin

    def record(self) -> DecisionRecord:
        """Pass all stages."""
        chosen, source, reason, detail, executed = None, Source.HOLD, Reason.OK, "", HOLD
        try:
            self._check_request()
            row = self._observe()
            self._lap("validate")
            chosen, source = self._infer(row)
            self._lap("infer")
            self._check_action(self.shop.deciders, row, chosen)
            executed = chosen.action
        except HoldError as hold:
            reason, detail = hold.reason, hold.detail
        if reason in UNSEEN:
            self._look_at_account()
        self._count(reason)
        flatten = self._flattens(reason)
        if flatten:
            executed = HOLD
            if reason is Reason.OK:
                reason, detail = Reason.HALTED, "trading is HALTED: the risk manager closes the position"
        self._lap("check")
        return self._compose(self.shop.deciders, Mode.LIVE, chosen, source, executed, reason, detail, flatten)

    def shadow(self, challenger: Deciders, live: DecisionRecord) -> DecisionRecord:
        """What a challenger decides on the row of the live decision, with its own uncertainty, rules and graphs."""
        self.latency, self.mark, begin = {}, self.shop.clock.steady(), self.begin
        self.begin = self.mark
        chosen, source, reason, detail, executed = None, Source.HOLD, live.reason, live.detail, HOLD
        try:
            if challenger.bundle.manifest.layout_hash != self.shop.deciders.bundle.manifest.layout_hash:
                raise HoldError(Reason.HASH_MISMATCH, "the challenger has another layout of state or actions")
            if self.row is None:
                raise HoldError(live.reason, live.detail)
            self.row, self.verdict = self.row.copy(), None
            uncertainty = challenger.fill_uncertainty(self.row)
            self.uncertainty = uncertainty if math.isfinite(uncertainty) else None
            proposal = challenger.by_policy(self.row, self.callers)
            if not proposal.probabilities:
                raise HoldError(Reason.NON_FINITE, "the challenger's answer is not finite")
            chosen = proposal
            source = Source.HOLD if chosen.fallback else Source.POLICY
            if challenger.has_planner:
                planned = challenger.by_planner(self.row, self.callers)
                chosen, source = (chosen, source) if planned.fallback else (planned, Source.PLANNER)
            self._lap("infer")
            if live.reason in (Reason.OK, Reason.OVERRIDDEN):
                self._check_action(challenger, self.row, chosen)
                reason, detail, executed = Reason.OK, "", chosen.action
        except HoldError as hold:
            reason, detail = hold.reason, hold.detail
        record = self._compose(challenger, Mode.SHADOW, chosen, source, executed, reason, detail, live.flatten)
        self.begin = begin
        return record

    def _check_request(self) -> None:
        request, bundle = self.request, self.shop.deciders.bundle
        manifest, names = bundle.manifest, self.shop.deciders.feature_names
        if not is_event_id(request.event_id):
            raise HoldError(
                Reason.INVALID_REQUEST,
                f"event_id: expected 1 to {MAX_EVENT_ID} printable characters, was {request.event_id[:MAX_EVENT_ID]!r}",
            )
        for name, wanted, actual in (
            ("bundle_hash", request.bundle_hash, manifest.bundle_hash),
            ("rule_set_hash", request.rule_set_hash, manifest.rule_set_hash),
        ):
            if wanted is not None and wanted != actual:
                raise HoldError(Reason.HASH_MISMATCH, f"{name}: expected {wanted[:64]!r}, in force is {actual}")
        if request.action_masks is not None:
            expected = bundle.rule_set.actions.num_actions
            if len(request.action_masks) != expected:
                raise HoldError(
                    Reason.INVALID_REQUEST, f"action_masks: expected {expected} values, was {len(request.action_masks)}"
                )
            self.callers = np.array([request.action_masks], dtype=np.bool_)
        missing = [name for name in names if name not in request.features]
        if missing:
            raise HoldError(Reason.MISSING_FEATURE, f"features: expected {', '.join(missing)}, missing")
        if len(request.features) > len(names):
            unknown = ", ".join(sorted(set(request.features) - set(names)))
            raise HoldError(Reason.UNKNOWN_FEATURE, f"features: expected those of the bundle, was also {unknown[:200]}")

    def _observe(self) -> Row:
        request, now, before = self.request, self.now, self.risk
        equity, position, bar_time = request.account.equity, request.account.position, request.bar_time
        tolerance = self.shop.settings.clock_tolerance_s
        if not (is_finite(equity) and is_finite(position) and is_finite(bar_time)):
            raise HoldError(Reason.NON_FINITE, "account.equity, account.position, bar_time: expected finite numbers")
        if now < before.decided_at - tolerance:
            raise HoldError(
                Reason.CLOCK_BACKWARDS, f"the clock says {now:.3f}, the decision before was at {before.decided_at:.3f}"
            )
        if bar_time < before.bar_time:
            raise HoldError(
                Reason.OUT_OF_ORDER, f"bar_time: expected {before.bar_time:.3f} or later, was {bar_time:.3f}"
            )
        if bar_time > now + tolerance:
            raise HoldError(Reason.FUTURE_DATA, f"bar_time: {bar_time - now:.3f} s after the clock's {now:.3f}")
        after = self.shop.manager.observe(before, equity=equity, position=position, bar_time=bar_time)
        self.risk = msgspec.structs.replace(after, decided_at=max(now, before.decided_at))
        self._judge_trial()
        stale_limits = self._take_limits(position)
        self._limit_capital(equity, position)
        self.row = self._state_row(equity, position)
        if stale_limits:
            raise HoldError(Reason.STALE_LIMITS, stale_limits)
        if self.row[0, -1] > 1.0:
            raise HoldError(
                Reason.STALE_DATA,
                f"the newest bar is {now - bar_time:.0f} s old, a newer one is due after "
                f"{self.shop.settings.bar_seconds:.0f}",
            )
        return self.row

    # Between two bars the state may only tighten.
    def _look_at_account(self) -> None:
        account = self.request.account
        if is_finite(account.equity) and is_finite(account.position):
            self.risk = self.shop.manager.observe(
                self.risk, equity=account.equity, position=account.position, bar_time=self.risk.bar_time
            )
            self._judge_trial()
            self.trading_state = self._newest_state()

    # Another system's trading state counts as ours does, its largest position is a mask. Returns why it is stale.
    def _take_limits(self, position: float) -> str:
        self.trading_state = self._newest_state()
        if self.shop.limits is None:
            return ""
        found = self.shop.limits.current(self.now)
        if found.max_position < math.inf:
            self._limit_position(position, found.max_position)
        return found.detail if found.stale else ""

    def _limit_position(self, position: float, largest: float) -> None:
        targets = self.shop.deciders.bundle.rule_set.actions.target_positions(np.array([position]))
        within = np.abs(targets) <= largest + TOLERANCE
        within[:, HOLD] = True
        self.callers = within if self.callers is None else self.callers & within

    # A canary's trial.

    def _limit_capital(self, equity: float, position: float) -> None:
        canary, capital = self.shop.settings.canary, self.request.account.capital
        if canary is None:
            return
        if not is_finite(capital):
            raise HoldError(Reason.NON_FINITE, "account.capital: expected a finite number, a canary needs it")
        self._limit_position(position, canary.max_position(equity, capital))

    def _count(self, reason: Reason) -> None:
        if reason in FAILURES:
            self.risk = msgspec.structs.replace(self.risk, failures=self.risk.failures + 1)
            self._judge_trial()

    def _judge_trial(self) -> None:
        canary = self.shop.settings.canary
        if canary is not None and not self.risk.killed and canary.verdict(self.risk):
            self.risk, self.verdict = kill(self.risk), None
            self.trading_state = max(self.trading_state, self.risk.trading_state)

    def _newest_state(self) -> int:
        external = 0 if self.shop.limits is None else self.shop.limits.current(self.now).trading_state
        return max(self.risk.trading_state, self.shop.pulled(), external)

    def _state_row(self, equity: float, position: float) -> Row:
        request, account, risk = self.request, self.request.account, self.risk
        columns = {
            **request.features,
            "position": position,
            "exposure": abs(position) * equity / risk.peak if risk.peak > 0.0 else None,
            "drawdown": risk.drawdown,
            "open_pnl": account.open_pnl,
            "holding_time": account.holding_time,
            "trading_state": float(self.trading_state),
            "flat_bars": risk.flat_bars,
            "last_risk_event": float(risk.last_risk_event),
            UNCERTAINTY_COLUMN: None,
            AGE_COLUMN: max(0.0, self.now - request.bar_time) / self.shop.settings.bar_seconds,
        }
        values = (columns[name] for name in self.shop.deciders.bundle.manifest.state_names)
        # Numbers beyond float32 become infinite, and are judged like any other broken number.
        with np.errstate(over="ignore"):
            return np.array([[math.nan if value is None else value for value in values]], dtype=np.float32)

    def _infer(self, row: Row) -> tuple[Proposal, Source]:
        shop, settings, callers = self.shop, self.shop.settings, self.callers
        # A copy: a thread that nobody waits for any more must not write into what is recorded.
        work = row.copy()
        try:
            uncertainty, proposal = shop.policy_thread.call(
                lambda: (shop.deciders.fill_uncertainty(work), shop.deciders.by_policy(work, callers)),
                min(settings.inference_ms / 1e3, self._left(settings.decision_ms)),
            )
        except LateError:
            raise HoldError(
                Reason.INFERENCE_LATE, f"the policy had no answer within {settings.inference_ms:g} ms"
            ) from None
        except Exception as error:
            log.exception("policy")
            raise HoldError(Reason.INFERENCE_FAILED, repr(error)) from error
        row[:] = work
        self.uncertainty = uncertainty if math.isfinite(uncertainty) else None
        if proposal.fallback:
            raise self._undecided(row)
        return self._plan(row, proposal)

    def _undecided(self, row: Row) -> HoldError:
        bundle = self.shop.deciders.bundle
        broken = [
            name for name, value in zip(bundle.manifest.state_names, row[0], strict=True) if not math.isfinite(value)
        ]
        if broken:
            return HoldError(Reason.NON_FINITE, f"state: expected finite numbers, was none in {', '.join(broken)}")
        if self.callers is not None and not self.callers[0, HOLD]:
            return HoldError(Reason.NO_VALID_ACTION, "rules and caller together leave no action")
        return HoldError(Reason.NON_FINITE, "the policy's answer is not finite")

    def _plan(self, row: Row, proposal: Proposal) -> tuple[Proposal, Source]:
        deciders, callers = self.shop.deciders, self.callers
        if not deciders.has_planner:
            return proposal, Source.POLICY
        self._lap("policy")
        try:
            planned = self.shop.planner_thread.call(
                lambda: deciders.by_planner(row, callers), self._left(self.shop.settings.decision_ms)
            )
        except LateError:
            return proposal, Source.POLICY
        # onnxruntime's errors share no base but Exception; the policy's answer is there.
        except Exception as error:
            log.exception("event %s: the policy decides, the planner failed: %r", self.request.event_id, error)
            return proposal, Source.POLICY
        finally:
            self._lap("plan")
        return (proposal, Source.POLICY) if planned.fallback else (planned, Source.PLANNER)

    # Independent of graphs and of what the state row said: the rules in NumPy, the trading state of this moment.
    def _check_action(self, deciders: Deciders, row: Row, proposal: Proposal) -> None:
        names, action = deciders.bundle.rule_set.actions.names, proposal.action
        self.trading_state = max(self.trading_state, self._newest_state())
        self.verdict = deciders.judge(row, self.callers, self.trading_state)
        if not self.verdict.allows(action):
            name = repr(names[action]) if 0 <= action < len(names) else f"action {action}"
            raise HoldError(
                Reason.OVERRIDDEN, f"{name} is not allowed while trading is {TradingState(self.trading_state).name}"
            )
        if self._left(self.shop.settings.timeout_ms) <= 0.0:
            raise HoldError(Reason.TOO_LATE, f"no decision within {self.shop.settings.timeout_ms:g} ms")

    def _flattens(self, reason: Reason) -> bool:
        # A position that nobody can vouch for is not traded on.
        if reason in (Reason.INVALID_REQUEST, Reason.OUT_OF_ORDER):
            return False
        position = self.request.account.position
        return self.trading_state >= TradingState.HALTED.value and is_finite(position) and position != 0.0

    def _left(self, budget_ms: float) -> float:
        return budget_ms / 1e3 - (self.shop.clock.steady() - self.begin)

    def _lap(self, stage: str) -> None:
        now = self.shop.clock.steady()
        self.latency[stage] = 1e6 * (now - self.mark)
        self.mark = now

    def _compose(
        self,
        deciders: Deciders,
        mode: Mode,
        chosen: Proposal | None,
        source: Source,
        executed: int,
        reason: Reason,
        detail: str,
        flatten: bool,
    ) -> DecisionRecord:
        actions, row = deciders.bundle.rule_set.actions, self.row
        verdict = self.verdict
        if verdict is None:
            nothing = Verdict(only_hold(actions.num_actions), {})
            verdict = nothing if row is None else deciders.judge(row, self.callers, self.trading_state)
        self.latency["total"] = 1e6 * (self.shop.clock.steady() - self.begin)
        return DecisionRecord(
            event_id=safe_event_id(self.request.event_id),
            mode=mode,
            time=self.now,
            bar_time=self.request.bar_time if is_finite(self.request.bar_time) else None,
            input_hash=self.input_hash,
            state=b"" if row is None else np.ascontiguousarray(row[0], dtype="<f4").tobytes(),
            caller_masks=None if self.callers is None else tuple(self.callers[0].tolist()),
            action_masks=verdict.action_masks,
            blocked=verdict.blocked,
            proposed=HOLD if chosen is None else chosen.action,
            executed=executed,
            flatten=flatten,
            target_position=target_position(deciders.bundle, executed, flatten),
            source=source,
            reason=reason,
            detail=detail,
            value=None if chosen is None else chosen.value,
            probabilities=() if chosen is None else chosen.probabilities,
            uncertainty=self.uncertainty,
            seed=self.shop.settings.seed,
            trading_state=self.trading_state,
            drawdown=self.risk.drawdown,
            risk=self.risk,
            bundle_hash=deciders.bundle.hash,
            rule_set_hash=deciders.bundle.manifest.rule_set_hash,
            latency_us=self.latency,
        )
