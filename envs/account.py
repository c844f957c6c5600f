"""The account step: exact bookkeeping of one bar, written once for backtest, imagination and planner.

Pure functions against the array API (NumPy, torch, traced into ONNX). Money is in multiples of the initial equity,
positions in multiples of the current equity.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import array_api_compat

from masking import TOLERANCE, ActionTable, DrawdownLadder, LadderState, TradingState

RUIN = 1e-9
"""Smallest growth factor of one price move or cost: leverage cannot take equity to zero or below."""

RISK_EVENTS = ("none", "soft", "hard", "kill")
"""Codes of `Account.last_risk_event`."""


class Account(NamedTuple):
    """Arrays [B] of one float dtype."""

    equity: Any
    """Multiples of the initial equity."""
    peak: Any
    """Running peak of equity; starts anew when the ladder releases."""
    position: Any
    """Notional over equity; drifts with the price while held."""
    open_pnl: Any
    """Return on equity since the account was last flat."""
    holding_time: Any
    """Bars since the last trade."""
    trading_state: Any
    """Code of `masking.TradingState`."""
    killed: Any
    """1 after the kill switch latched."""
    flat_bars: Any
    """Consecutive flat bars while not ACTIVE."""
    last_risk_event: Any
    """Highest rung reached since the last release, an index into `RISK_EVENTS`."""

    @property
    def drawdown(self) -> Any:
        """1 - equity / running peak, [B]."""
        return 1 - self.equity / self.peak


class StepOutcome(NamedTuple):
    """What one bar did to the account; arrays [B]."""

    log_return: Any
    """Log growth of equity, costs included."""
    cost: Any
    """Fraction of equity paid for trading."""
    turnover: Any
    """|trade| in multiples of equity, the risk manager's trades included."""
    flattened: Any
    """bool: the risk manager closed a position at this bar's open."""
    breached: Any
    """bool: the account was HALTED or the kill switch latched at this bar's close."""
    drawdown: Any
    """Running drawdown at the close, before a release starts a new peak."""
    target: Any
    """Position after the trade at the open, multiples of equity."""


@dataclass(frozen=True, kw_only=True)
class AccountRules:
    """Parameters of the account step."""

    cost_rate: float = 3e-4
    """Commission and slippage per traded notional of 1."""
    spread_share: float = 0.0
    """Share of the quoted spread of the bar traded in that is paid on top."""
    ladder: DrawdownLadder = field(default_factory=DrawdownLadder)
    actions: ActionTable = field(default_factory=ActionTable)


def initial_account(batch: int, xp: Any, *, dtype: Any, device: Any = None) -> Account:
    """A flat account with equity 1 in every row."""
    if batch < 1:
        raise ValueError(f"batch: expected >= 1, was {batch}")
    one = xp.ones(batch, dtype=dtype, device=device)
    zero = xp.zeros(batch, dtype=dtype, device=device)
    return Account(one, one, zero, zero, zero, zero, zero, zero, zero)


def account_step(
    account: Account, action: Any, gap_return: Any, intraday_return: Any, rules: AccountRules, spread: Any = None
) -> tuple[Account, StepOutcome]:
    """Carry the account from one close to the next.

    The decision made at the last close executes at this bar's open: (1) the old position earns the overnight gap;
    (2) the risk manager flattens a HALTED account and drops a reduction that the gap turned into an enlargement,
    otherwise the action trades to its target, and the cost is taken from equity; (3) the new position earns the move
    from open to close; (4) the close is marked and the drawdown ladder moves. Traded notional is measured against
    equity before the cost, an error of second order in the cost. A move that would take equity to zero leaves `RUIN`
    of it and no position, as a broker's liquidation does.

    Args: account [B]; action [B] integer; gap_return, intraday_return [B], log returns of the next bar; spread [B],
        its quoted spread as a fraction of price, needed where `rules.spread_share` is not 0. A spread below zero, which
        only a model can imagine, costs nothing.
    Returns: next account and what happened. A NaN return gives NaN equity and latches the kill switch.
    """
    xp = array_api_compat.array_namespace(account.equity)
    equity, held = _move(xp, account.equity, account.position, gap_return)

    halted = account.trading_state >= TradingState.HALTED.value
    target = rules.actions.target_of(action, held)
    # A target no larger than the position at the close was allowed as a reduction; where the gap left less than the
    # target, buying up to it would enlarge what a limit wanted smaller.
    reduces = xp.abs(target) <= xp.abs(account.position) + TOLERANCE
    grows = reduces & (xp.abs(target) > xp.abs(held))
    target = xp.where(halted, 0.0, xp.where(grows, held, target))
    traded = xp.abs(target - held)
    cost = traded * rules.cost_rate
    if rules.spread_share:
        cost = cost + traded * rules.spread_share * xp.where(spread > 0, spread, 0.0)
    kept = 1 - cost
    equity = equity * xp.where(kept < RUIN, RUIN, kept)

    equity, position = _move(xp, equity, target, intraday_return)
    peak = xp.where(equity > account.peak, equity, account.peak)
    drawdown = 1 - equity / peak

    before = LadderState(account.trading_state, account.killed, account.flat_bars)
    ladder, released = rules.ladder.step(before, drawdown, position)
    growth = equity / account.equity
    open_pnl = (1 + account.open_pnl) * growth - 1
    rung = (
        xp.astype(drawdown >= rules.ladder.soft, drawdown.dtype)
        + xp.astype(drawdown >= rules.ladder.hard, drawdown.dtype)
        + xp.astype(drawdown >= rules.ladder.kill, drawdown.dtype)
    )
    event = xp.where(rung > account.last_risk_event, rung, account.last_risk_event)
    traded_now = traded > 0
    after = Account(
        equity=equity,
        peak=xp.where(released, equity, peak),
        position=position,
        open_pnl=xp.where(position == 0, 0.0, open_pnl),
        holding_time=xp.where(traded_now, 0.0, account.holding_time) + 1,
        trading_state=ladder.trading_state,
        killed=ladder.killed,
        flat_bars=ladder.flat_bars,
        last_risk_event=xp.where(released, 0.0, event),
    )
    outcome = StepOutcome(
        log_return=xp.log(growth),
        cost=cost,
        turnover=traded,
        flattened=halted & traded_now,
        breached=((ladder.trading_state >= TradingState.HALTED.value) & ~halted)
        | ((ladder.killed > 0) & ~(account.killed > 0)),
        drawdown=drawdown,
        target=target,
    )
    return after, outcome


def _move(xp: Any, equity: Any, position: Any, log_return: Any) -> tuple[Any, Any]:
    # A price move changes equity by position * simple return, and the position's share of equity with it.
    simple = xp.expm1(log_return)
    growth = 1 + position * simple
    ruined = growth < RUIN
    growth = xp.where(ruined, RUIN, growth)
    # Without the liquidation the notional would stay while equity vanishes: a position of 1e8 times equity.
    return equity * growth, xp.where(ruined, 0.0, position * (1 + simple) / growth)
