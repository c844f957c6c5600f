"""The decision engine: one request in, one recorded decision out, within its budgets, whatever happens.

A decision passes these stages, and each may only end in Hold: the request is checked, the risk manager takes in the
account, the policy decides on the raw state under the bundle's rules and the caller's masks, a planner may decide
better in the time that is left, the risk manager checks the action against the trading state of this moment, and the
ledger records it. What is not recorded is not executed.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Literal

import msgspec

from masking import HOLD, TradingState
from serving.bundle import Bundle
from serving.deciders import Deciders, only_hold
from serving.draft import Draft, Workshop
from serving.errors import LedgerError
from serving.inference import InferenceThread, LateError
from serving.ledger.base import Ledger
from serving.limits import LimitsSource
from serving.records import (
    AccountSnapshot,
    Command,
    ControlRecord,
    DecisionRecord,
    DecisionRequest,
    Mode,
    Reason,
    Record,
    RiskState,
    Source,
    encode,
    safe_event_id,
)
from serving.risk import RiskManager, check_command, kill, reduce_only, reset
from serving.settings import Clock, EngineSettings

log = logging.getLogger(__name__)

Observer = Callable[[Record, DecisionRecord | None], None]
"""Called after each record with it and, for a decision with a challenger, with what the challenger decided."""
SERVICE = "detent"
"""The person of a command that the service gave itself."""
REHEARSALS = 5
"""Decisions that a new engine makes for itself."""
REMEMBERED = 1024
"""Newest decisions whose events are known without asking the ledger."""


class DecisionEngine:
    """Decides for one account; safe to call from several threads, one decision at a time."""

    def __init__(
        self,
        bundle: Bundle,
        ledger: Ledger,
        settings: EngineSettings | None = None,
        *,
        clock: Clock | None = None,
        limits: LimitsSource | None = None,
    ) -> None:
        """Continue where the ledger ends.

        Args: limits: what another system allows; None asks nobody.
        Raises: LedgerError if the start cannot be recorded.
        """
        self.ledger, self.settings = ledger, settings or EngineSettings()
        self._clock, self._limits = clock or Clock(), limits
        self._policy_thread, self._planner_thread = InferenceThread("policy"), InferenceThread("planner")
        self._shadow_thread = InferenceThread("shadow")
        # Both are set before the ledger is asked: `_ordered` also before the lock, so that a decision under way does
        # not pass a kill switch that was pulled. A reset forgets what was pulled, not what was ordered meanwhile.
        self._pulled = 0
        self._ordered: list[int] = []
        self._unrecorded: Counter[Reason] = Counter()
        self._astray = False
        self._unwritten: list[tuple[Command, str, str]] = []
        """Commands that hold, and that the ledger was never told of."""
        self._shop = self._workshop(bundle)
        self._challenger: Deciders | None = None
        self._lock = threading.Lock()
        self._risk = ledger.head().risk or RiskState()
        self._known: OrderedDict[str, DecisionRecord] = OrderedDict()
        self._recent: deque[DecisionRecord] = deque(maxlen=100)
        self._observers: list[Observer] = []
        self._agreed = self._compared = 0
        self._rehearse()
        with self._lock:
            self._control("start", SERVICE, "", self._risk)

    # First calls import and allocate; the first decision that counts must not wait for that. Nobody is told of these.
    def _rehearse(self) -> None:
        golden, names = self.bundle.golden, self.bundle.manifest.feature_names
        for row in golden.state[:REHEARSALS]:
            now = self._clock.wall()
            request = DecisionRequest(
                event_id="rehearsal",
                bar_time=now,
                features=dict(zip(names, map(float, row), strict=False)),
                account=AccountSnapshot(equity=1.0, position=0.0),
            )
            encode(Draft(self._shop, request, RiskState(), "", self._clock.steady()).record())

    # --- what is in force ---------------------------------------------------------------------------------

    @property
    def bundle(self) -> Bundle:
        """The bundle in force."""
        return self._shop.deciders.bundle

    @property
    def challenger(self) -> Bundle | None:
        """The bundle that decides beside it, in shadow."""
        return None if self._challenger is None else self._challenger.bundle

    @property
    def agreement(self) -> tuple[int, int]:
        """How often the challenger executed the same action, and of how many."""
        return self._agreed, self._compared

    @property
    def risk(self) -> RiskState:
        """The risk manager's state."""
        return self._risk

    @property
    def trading_state(self) -> int:
        """The strictest of the risk manager's, a person's and another system's, now."""
        limits = 0 if self._limits is None else self._limits.current(self._clock.wall()).trading_state
        return max(self._risk.trading_state, self._pulled_now(), limits)

    @property
    def unrecorded(self) -> Mapping[Reason, int]:
        """Decisions that are in no ledger, by reason."""
        return self._unrecorded

    @property
    def recent(self) -> Sequence[DecisionRecord]:
        """The newest decisions, newest first, at most 100."""
        return tuple(self._recent)

    def subscribe(self, observer: Observer) -> None:
        """Call `observer` after each record, in the thread that decides; what it raises is logged."""
        self._observers.append(observer)

    def close(self) -> None:
        """End the threads and give the ledger back; twice does nothing."""
        with self._lock:
            with suppress(LedgerError):
                self._find_the_end()
            for thread in (self._policy_thread, self._planner_thread, self._shadow_thread):
                thread.close()
            self.ledger.close()

    # --- decisions ----------------------------------------------------------------------------------------

    def decide(self, request: DecisionRequest, *, body: bytes | None = None) -> DecisionRecord:
        """Decide, record and return; never raises.

        Args: body: the request as it came, for its hash; encoded again when None.
        Returns: the new record, or the recorded one where the event was decided on before. With `LEDGER_FAILED` or
            `INTERNAL_ERROR` nothing is recorded, and the event may be asked for again.
        """
        begin = self._clock.steady()
        with self._lock:
            try:
                return self._decide(request, encode(request) if body is None else body, begin)
            except LedgerError as error:
                return self._hold(request.event_id, Reason.LEDGER_FAILED, str(error), begin)
            except Exception as error:
                # Nothing of the caller's may stop because of us; what happened is in the log and in the record.
                log.exception("decision %s", request.event_id)
                return self._hold(request.event_id, Reason.INTERNAL_ERROR, repr(error), begin)

    def refuse(self, event_id: str, body: bytes, detail: str) -> DecisionRecord:
        """Record Hold for a request that cannot be read. Args: detail: why, in words."""
        begin = self._clock.steady()
        with self._lock:
            try:
                self._find_the_end()
                known = self._known_decision(safe_event_id(event_id))
                if known is not None:
                    return known
                record, written = self._recorded(
                    self._hold(event_id, Reason.INVALID_REQUEST, detail, begin, body), self._risk
                )
            except LedgerError as error:
                return self._hold(event_id, Reason.LEDGER_FAILED, str(error), begin)
            if written:
                self._tell(record, None)
            return record

    def _decide(self, request: DecisionRequest, body: bytes, begin: float) -> DecisionRecord:
        self._find_the_end()
        known = self._known_decision(safe_event_id(request.event_id))
        if known is not None:
            return known
        draft = Draft(self._shop, request, self._risk, hashlib.sha256(body).hexdigest(), begin)
        killed = self._risk.killed
        record, written = self._recorded(draft.record(), draft.risk)
        if written:
            self._tell(record, self._shadow(record, draft))
            if draft.risk.killed and not killed:
                self._end_trial(draft.risk)
        return record

    # The trial is over already, in the state that the decision was recorded with; this says why.
    def _end_trial(self, risk: RiskState) -> None:
        canary = self.settings.canary
        verdict = "" if canary is None else canary.verdict(risk)
        if verdict:
            log.error("canary stopped: %s", verdict)
            try:
                self._control("canary_stop", SERVICE, verdict, risk)
            except LedgerError:
                log.exception("canary stop")

    def _known_decision(self, event_id: str) -> DecisionRecord | None:
        known = self._known.get(event_id)
        if known is None:
            entry = self.ledger.find(event_id)
            record = None if entry is None else entry.record
            known = record if isinstance(record, DecisionRecord) else None
        return known

    def _recorded(self, record: DecisionRecord, risk: RiskState) -> tuple[DecisionRecord, bool]:
        body = encode(record)
        try:
            entry = self.ledger.append(body, event_id=record.event_id)
        except LedgerError as error:
            self._astray = True
            self._unrecorded[Reason.LEDGER_FAILED] += 1
            log.error("decision %s is not recorded: %s", record.event_id, error)
            self._keep_latched(risk)
            unsafe = {"executed": HOLD, "flatten": False, "target_position": None}
            reason = {"reason": Reason.LEDGER_FAILED, "detail": str(error)}
            return msgspec.structs.replace(record, **unsafe, **reason), False
        if entry.body != body and isinstance(entry.record, DecisionRecord):
            # Another process decided on it between two looks.
            self._astray = True
            return entry.record, False
        self._risk = risk
        self._known[record.event_id] = record
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        self._recent.appendleft(record)
        return record, True

    # A loss that was seen once is not forgotten because it could not be written down.
    def _keep_latched(self, risk: RiskState) -> None:
        if risk.killed and not self._risk.killed:
            self._pulled, self._risk = TradingState.HALTED.value, kill(self._risk)
            self._unwritten.append(("kill", SERVICE, f"drawdown {risk.drawdown:.2%} while the ledger failed"))

    def _shadow(self, record: DecisionRecord, draft: Draft) -> DecisionRecord | None:
        challenger = self._challenger
        if challenger is None or not record.state:
            return None
        try:
            left = self.settings.timeout_ms / 1e3 - (self._clock.steady() - draft.begin)
            shadow = self._shadow_thread.call(lambda: draft.shadow(challenger, record), left)
            self.ledger.append(encode(shadow))
        except LateError:
            log.warning("shadow of decision %s: late", record.event_id)
            return None
        except Exception as error:
            # A challenger is on trial; it may not disturb what is in force.
            self._astray |= isinstance(error, LedgerError)
            log.exception("shadow of decision %s", record.event_id)
            return None
        self._compared += 1
        self._agreed += shadow.executed == record.executed
        return shadow

    # A decision that came to nothing, not recorded.
    def _hold(self, event_id: str, reason: Reason, detail: str, begin: float, body: bytes = b"") -> DecisionRecord:
        bundle, risk = self.bundle, self._risk
        if reason is not Reason.INVALID_REQUEST:
            self._unrecorded[reason] += 1
        return DecisionRecord(
            event_id=safe_event_id(event_id),
            mode=Mode.LIVE,
            time=self._clock.wall(),
            bar_time=risk.bar_time,
            input_hash=hashlib.sha256(body).hexdigest(),
            state=b"",
            caller_masks=None,
            action_masks=only_hold(bundle.rule_set.actions.num_actions),
            blocked={},
            proposed=HOLD,
            executed=HOLD,
            flatten=False,
            target_position=None,
            source=Source.HOLD,
            reason=reason,
            detail=detail,
            value=None,
            probabilities=(),
            uncertainty=None,
            seed=self.settings.seed,
            trading_state=risk.trading_state,
            drawdown=risk.drawdown,
            risk=risk,
            bundle_hash=bundle.hash,
            rule_set_hash=bundle.manifest.rule_set_hash,
            latency_us={"total": 1e6 * (self._clock.steady() - begin)},
        )

    # --- commands -----------------------------------------------------------------------------------------

    def kill(self, person: str, reason: str) -> ControlRecord:
        """Halt and latch; an open position is closed at the next decision.

        Raises: ControlError without person or reason; LedgerError if it could not be recorded: it holds nevertheless,
            and is recorded with the next decision or at the end; a crash before that forgets it.
        """
        return self._tighten("kill", TradingState.HALTED, kill, person, reason)

    def reduce_only(self, person: str, reason: str) -> ControlRecord:
        """Allow nothing but smaller positions until a reset; errors as `kill`."""
        return self._tighten("reduce_only", TradingState.REDUCE_ONLY, reduce_only, person, reason)

    def reset(self, person: str, reason: str) -> ControlRecord:
        """Back to ACTIVE; the running peak starts anew at the newest equity.

        Raises: ControlError without person or reason; LedgerError if it could not be recorded: nothing changed then.
        """
        check_command(person, reason)
        with self._lock:
            self._find_the_end()
            record = self._control("reset", person, reason, reset(self._risk, self._clock.wall()))
            self._pulled = 0
            return record

    def use(self, bundle: Bundle) -> ControlRecord:
        """Put another bundle in force, between two decisions. Raises: LedgerError if it could not be recorded."""
        shop = self._workshop(bundle)
        with self._lock:
            self._find_the_end()
            before, self._shop = self._shop, shop
            try:
                return self._control("bundle", SERVICE, f"after {before.deciders.bundle.hash}", self._risk)
            except LedgerError:
                self._shop = before
                raise

    def challenge(self, bundle: Bundle | None) -> ControlRecord:
        """Let another bundle decide beside the one in force, in shadow; None ends it."""
        deciders = None if bundle is None else self._deciders(bundle)
        with self._lock:
            self._find_the_end()
            record = self._control("shadow", SERVICE, "none" if bundle is None else bundle.hash, self._risk)
            self._challenger, self._agreed, self._compared = deciders, 0, 0
            return record

    def note(self, command: Literal["refused_bundle", "drift"], detail: str) -> ControlRecord:
        """Record what the service noticed. Raises: LedgerError."""
        with self._lock:
            self._find_the_end()
            return self._control(command, SERVICE, detail, self._risk)

    def _tighten(
        self,
        command: Literal["kill", "reduce_only"],
        state: TradingState,
        change: Callable[[RiskState], RiskState],
        person: str,
        reason: str,
    ) -> ControlRecord:
        check_command(person, reason)
        self._ordered.append(state.value)
        with self._lock:
            self._pulled = max(self._pulled, state.value)
            self._ordered.remove(state.value)
            # Before anything is asked of the ledger: one that fails must not keep a kill switch open.
            self._risk = change(self._risk)
            try:
                self._find_the_end()
                return self._control(command, person, reason, self._risk)
            except LedgerError:
                self._unwritten.append((command, person, reason))
                raise

    def _control(self, command: Command, person: str, detail: str, risk: RiskState) -> ControlRecord:
        record = ControlRecord(
            time=self._clock.wall(),
            command=command,
            person=person,
            detail=detail,
            bundle_hash=self.bundle.hash,
            risk=risk,
        )
        try:
            self.ledger.append(encode(record))
        except LedgerError:
            self._astray = True
            raise
        self._risk = risk
        self._tell(record, None)
        return record

    # After a failure nobody knows what was written, perhaps by another process: what the ledger says holds, and
    # whatever a person ordered in the meantime.
    def _find_the_end(self) -> None:
        if not self._astray:
            return
        risk = self.ledger.head().risk or RiskState()
        if self._pulled >= TradingState.REDUCE_ONLY.value:
            risk = kill(risk) if self._pulled >= TradingState.HALTED.value else reduce_only(risk)
        self._risk, self._astray = risk, False
        while self._unwritten:
            self._control(*self._unwritten[0], self._risk)
            self._unwritten.pop(0)

    def _tell(self, record: Record, shadow: DecisionRecord | None) -> None:
        for observer in self._observers:
            try:
                observer(record, shadow)
            # Whatever somebody else's function raises, the decision is made and recorded.
            except Exception as error:
                log.exception("observer %r was told of a record and failed: %r", observer, error)

    def _pulled_now(self) -> int:
        return max([self._pulled, *self._ordered])

    def _deciders(self, bundle: Bundle) -> Deciders:
        return Deciders(bundle, planner=self.settings.planner, seed=self.settings.seed)

    def _workshop(self, bundle: Bundle) -> Workshop:
        return Workshop(
            self._deciders(bundle),
            self.settings,
            self._clock,
            RiskManager(bundle.rule_set),
            self._limits,
            self._policy_thread,
            self._planner_thread,
            self._pulled_now,
        )
