"""Joint limits of a portfolio: which combinations of trades keep every limit *after* the trade.

Masks per asset cannot express a shared budget: two purchases that are each affordable may not be so together. Here the
assets are decided one after another under a running budget. An action is allowed if, with it, the assets still to come
can be completed within the limits, where the completion is either to hold all of them or to sell as much of them as
is allowed. So a walk never ends in a state without a valid action, and its last mask judges the whole combination.

Pure functions against the array API, computed in float64 from the raw state row, in one order of operations: NumPy,
torch and exported graphs agree bit for bit. State row `[B, 1 + 2 K]`: cash, units of each asset, price of each asset.
Money is in one currency throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, reduce
from numbers import Integral
from operator import add
from typing import Any, NamedTuple

import array_api_compat
import numpy as np
import numpy.typing as npt

from masking.errors import InvalidActionError, InvalidMaskError, RuleError

MARGIN = 1e-9
"""Slack per undecided asset, fraction of the portfolio's value: what rounding may take from one mask to the next."""


@dataclass(frozen=True, kw_only=True)
class TradeTable:
    """What each action of each asset trades and costs."""

    lots: tuple[float, ...] = (-50.0, -40.0, -30.0, -20.0, -10.0, 0.0, 10.0, 20.0, 30.0, 40.0, 50.0)
    """Units that action a trades, negative sells; strictly ascending, with the 0 of Hold among them."""
    buy_cost: tuple[float, ...]
    """Cost per unit bought, one number per asset."""
    sell_cost: tuple[float, ...]
    """Cost per unit sold, one number per asset."""

    def __post_init__(self) -> None:
        if list(self.lots) != sorted(set(self.lots)) or not all(map(math.isfinite, self.lots)) or 0.0 not in self.lots:
            raise RuleError(f"lots: expected strictly ascending finite numbers with 0 among them, was {self.lots}")
        for name, costs in (("buy_cost", self.buy_cost), ("sell_cost", self.sell_cost)):
            if not costs or not all(math.isfinite(cost) and cost >= 0 for cost in costs):
                raise RuleError(f"{name}: expected one finite number >= 0 per asset, was {costs}")
        if len(self.buy_cost) != len(self.sell_cost):
            raise RuleError(
                f"sell_cost: expected {len(self.buy_cost)} assets as in buy_cost, was {len(self.sell_cost)}"
            )

    @property
    def num_assets(self) -> int:
        """K."""
        return len(self.buy_cost)

    @property
    def num_actions(self) -> int:
        """A: actions per asset."""
        return len(self.lots)

    @property
    def nvec(self) -> tuple[int, ...]:
        """(A, ..., A), one entry per asset."""
        return (self.num_actions,) * self.num_assets

    @cached_property
    def hold(self) -> int:
        """Index of the action that trades nothing."""
        return self.lots.index(0.0)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Columns of a state row."""
        assets = range(self.num_assets)
        return ("cash", *(f"units_{k}" for k in assets), *(f"price_{k}" for k in assets))


class Budget(NamedTuple):
    """A portfolio after some trades; float64 arrays [B], or [B, A] with one more trade each."""

    cash: Any
    invested: Any
    """Value held in assets."""
    needed: Any
    """Largest portfolio value that the share limits of the assets bought ask for; 0 if nothing is bought."""
    buys: Any
    """bool: something is bought."""


@dataclass(frozen=True, kw_only=True)
class JointLimits:
    """Limits on the portfolio after all its trades.

    Cash and gross exposure bind whenever something is bought, a share limit whenever its own asset is: prices may carry
    a portfolio beyond a limit, and holding and selling stay valid then. A row with a non-finite number
    or with a price that does not cover the cost of selling may only hold.
    """

    table: TradeTable
    min_cash: float = 1.0
    """Cash that must remain, currency."""
    max_gross: float = 1.0
    """Largest value held in assets, as a fraction of the portfolio's value after costs."""
    max_share: tuple[float, ...]
    """Largest value held in each asset, as a fraction of the portfolio's value after costs."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.min_cash) and self.min_cash >= 0):
            raise RuleError(f"min_cash: expected a finite number >= 0, was {self.min_cash}")
        if not 0 < self.max_gross <= 1:
            raise RuleError(f"max_gross: expected 0 < max_gross <= 1, was {self.max_gross}")
        if len(self.max_share) != self.table.num_assets or not all(0 < share <= 1 for share in self.max_share):
            raise RuleError(f"max_share: expected {self.table.num_assets} fractions in (0, 1], was {self.max_share}")

    def check(self, state: Any, actions: Any) -> Any:
        """The exact check of whole combinations, apart from the walk that proposes them.

        Args: state [B, 1 + 2 K]; actions [B, K] integer.
        Returns: bool [B]; holding everything is always valid.
        Raises: InvalidActionError on shape or dtype of the actions; an action that does not exist is invalid.
        """
        table = self.table
        cash, units, prices = self.columns(state)
        xp = array_api_compat.array_namespace(cash, actions)
        if tuple(actions.shape) != tuple(units.shape) or not xp.isdtype(actions.dtype, "integral"):
            raise InvalidActionError(
                f"actions: expected integers {list(units.shape)}, was {actions.dtype} {list(actions.shape)}"
            )
        inside = (actions >= 0) & (actions < table.num_actions)
        chosen = xp.reshape(xp.where(inside, actions, table.hold), (-1,))
        lots = xp.reshape(xp.take(_constant(xp, table.lots, cash), chosen, axis=0), units.shape)
        tradable = prices > _constant(xp, table.sell_cost, cash)
        single = inside & ((lots == 0) | ((units + lots >= 0) & tradable))
        after, _ = self._traded(cash, units, prices, lots)
        return xp.all(single, axis=1) & self.within(after)

    def marginal_masks(self, state: Any) -> Any:
        """Which action of which asset may occur in a valid combination: what is masked here occurs in none.

        The cash that selling everything else would bring is judged apart from the value that it would cost, so a
        corner remains in which an action is shown although no combination can have it.

        Args: state [B, 1 + 2 K].  Returns: bool [B, K * A], flat as `MultiDiscrete` masks are.
        """
        walk = JointWalk(self, state)
        masks = []
        for asset in range(self.table.num_assets):
            held, allowed = walk.options(asset)
            sold = walk.sold(asset, held)
            value = held.cash + held.invested
            slack = MARGIN * self.table.num_assets * abs(value)
            inside = (sold.cash >= self.min_cash - slack) & (held.needed <= value + slack)
            inside = inside & (sold.invested <= self.max_gross * value + slack)
            masks.append(allowed & (inside | ~held.buys))
        return walk.xp.concat(masks, axis=1)

    def separate_masks(self, state: Any) -> Any:
        """Which action of which asset is valid if the other assets are held, which is what masks per asset can say.

        Args: state [B, 1 + 2 K].  Returns: bool [B, K * A].
        """
        walk = JointWalk(self, state)
        masks = []
        for asset in range(self.table.num_assets):
            after, allowed = walk.options(asset)
            masks.append(allowed & self.within(after))
        return walk.xp.concat(masks, axis=1)

    def sample(
        self,
        state: npt.NDArray[Any],
        rng: np.random.Generator,
        action_masks: npt.NDArray[np.bool_] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Random valid combinations: assets in random order, each action drawn uniformly from its mask.

        Args: state [B, 1 + 2 K] NumPy; action_masks as for `JointWalk`, for an environment that checks its own.
        Returns: [B, K].
        """
        assets = self.table.num_assets
        order = rng.permuted(np.tile(np.arange(assets), (len(state), 1)), axis=1)
        actions, walk = np.zeros_like(order), JointWalk(self, state, action_masks, validate=False)
        for asset in order.T:
            noise = rng.random((len(state), self.table.num_actions))
            action = np.argmax(np.where(walk.action_masks(asset), noise, -1.0), axis=1)
            walk.take(asset, action)
            np.put_along_axis(actions, asset[:, None], action[:, None], axis=1)
        return actions

    def explain(self, state: Any, actions: Any, row: int = 0) -> list[str]:
        """Why a combination is invalid, in words; empty if it is valid.

        Args: state [B, 1 + 2 K]; actions [B, K] integer; row of both.
        """
        table = self.table
        numbers = [float(number) for number in state[row]]
        chosen = [int(action) for action in actions[row]]
        if len(chosen) != table.num_assets or not all(0 <= action < table.num_actions for action in chosen):
            return [f"expected {table.num_assets} actions from 0 to {table.num_actions - 1}, was {chosen}"]
        if all(action == table.hold for action in chosen):
            return []
        broken = [f"{name} is {number}" for name, number in zip(table.state_names, numbers, strict=True)
                  if not math.isfinite(number)]  # fmt: skip
        if broken:
            return [f"unknown state allows only holding: {', '.join(broken)}"]
        cash, units, prices = self.columns(np.array([numbers]))
        lots = np.array([[table.lots[action] for action in chosen]])
        reasons = []
        for asset in np.flatnonzero(lots[0]):
            lot, owned, price = lots[0, asset], units[0, asset], prices[0, asset]
            if price <= table.sell_cost[asset]:
                reasons.append(f"asset {asset}: price {price:g} does not cover the cost of selling")
            if owned + lot < 0:
                reasons.append(f"asset {asset}: selling {-lot:g} of {owned:g} units owned")
        after, needed = self._traded(cash, units, prices, lots)
        if after.buys[0]:
            left, invested = after.cash[0], after.invested[0]
            value = left + invested
            if not left >= self.min_cash:
                reasons.append(f"cash after the trade {left:.2f} is below {self.min_cash:g}")
            if not invested <= self.max_gross * value:
                reasons.append(f"{invested:.2f} invested after the trade exceeds {self.max_gross:g} of {value:.2f}")
            held = ((units + lots) * prices)[0]
            for asset in np.flatnonzero(needed[0] > value):
                share = self.max_share[asset]
                reasons.append(f"asset {asset}: {held[asset]:.2f} after the trade exceeds {share:.4g} of {value:.2f}")
        return reasons

    def columns(self, state: Any) -> tuple[Any, Any, Any]:
        """Cash [B], units [B, K] and prices [B, K] in float64; a row with a non-finite number reads as zeros.

        A price of 0 is not tradable, so such a row may only hold. Raises: RuleError on shape.
        """
        assets = self.table.num_assets
        if state.ndim != 2 or state.shape[1] != 1 + 2 * assets:
            raise RuleError(f"state: expected [B, {1 + 2 * assets}] {self.table.state_names}, was {list(state.shape)}")
        xp = array_api_compat.array_namespace(state)
        state = xp.astype(state, xp.float64)
        state = xp.where(xp.all(xp.isfinite(state), axis=1, keepdims=True), state, xp.zeros_like(state))
        return state[:, 0], state[:, 1 : 1 + assets], state[:, 1 + assets :]

    def _traded(self, cash: Any, units: Any, prices: Any, lots: Any) -> tuple[Budget, Any]:
        # The portfolio after lots [B, K], and the value [B, K] that the share limit of each asset bought asks for.
        xp = array_api_compat.array_namespace(cash)
        buys = lots > 0
        per_unit = xp.where(buys, _constant(xp, self.table.buy_cost, cash), _constant(xp, self.table.sell_cost, cash))
        after = units + lots
        needed = after * (prices / _constant(xp, self.max_share, cash))
        needed = xp.where(buys, needed, xp.zeros_like(needed))
        paid = _total(lots * prices + abs(lots) * per_unit)
        return Budget(cash - paid, _total(after * prices), xp.max(needed, axis=1), xp.any(buys, axis=1)), needed

    def within(self, budget: Budget, undecided: int = 0) -> Any:
        """Whether a portfolio keeps the limits, with `MARGIN` to spare for each asset still undecided; bool."""
        value = budget.cash + budget.invested
        slack = MARGIN * undecided * abs(value) if undecided else 0.0
        inside = (budget.cash >= self.min_cash + slack) & (budget.needed <= value - slack)
        if self.max_gross < 1:  # else it follows from cash >= 0
            inside = inside & (budget.invested <= self.max_gross * value - slack)
        return inside | ~budget.buys


class JointWalk:
    """Decides the assets of B portfolios one after another; each row may follow an order of its own.

    Args: limits; state [B, 1 + 2 K]; action_masks bool [B, K * A] of the caller, which can only forbid, never Hold; or
        None. With `validate=False` assets and actions are not checked: for graphs (`torch.export` cannot branch on
        values) and for actions that were chosen under `action_masks` or are checked as whole combinations.
    Raises: RuleError on the shape of the state; InvalidMaskError on shape or dtype of the masks; its methods
        InvalidActionError for an asset that does not exist or is decided, or an action that its mask forbids.
    """

    def __init__(self, limits: JointLimits, state: Any, action_masks: Any = None, *, validate: bool = True) -> None:
        self.limits, self.validate, table = limits, validate, limits.table
        cash, units, prices = limits.columns(state)
        xp = self.xp = array_api_compat.array_namespace(cash)
        self._lots = _constant(xp, table.lots, cash)
        per_asset = (limits.max_share, table.buy_cost, table.sell_cost)
        self._columns = (units, prices, *(_constant(xp, numbers, cash)[None, :] for numbers in per_asset))
        tradable = prices > self._columns[4]
        # Hold is valid whatever the state; everything else must be owned, tradable and allowed by the caller.
        valid = (units[:, :, None] + self._lots >= 0) & tradable[:, :, None]
        if action_masks is not None:
            width = (valid.shape[0], sum(table.nvec))
            # Of shape and dtype alone, which a traced graph knows: a float or additive mask would be read inverted.
            if tuple(action_masks.shape) != width or not xp.isdtype(action_masks.dtype, "bool"):
                raise InvalidMaskError(
                    f"action_masks: expected bool {list(width)}, True = valid, "
                    f"was {action_masks.dtype} {list(action_masks.shape)}"
                )
            valid = valid & xp.reshape(action_masks, valid.shape)
        self._valid = valid | (self._lots == 0)
        self.invested = units * prices
        """Value held in each asset after the trades decided so far, float64 [B, K]."""
        self.pending = xp.ones_like(self.invested)
        """1 where an asset is still to be decided, else 0, float64 [B, K]."""
        self.budget = Budget(cash, _total(self.invested), xp.zeros_like(cash), xp.zeros_like(cash, dtype=xp.bool))
        self._undecided = table.num_assets
        # What selling as much as is allowed frees: lots ascend, so it is the first valid action up to Hold.
        first = xp.argmax(xp.astype(self._valid[:, :, : table.hold + 1], xp.int8), axis=2)
        released = -xp.reshape(xp.take(self._lots, xp.reshape(first, (-1,)), axis=0), first.shape)
        self._released_value = released * prices
        self._released_cash = self._released_value - released * self._columns[4]

    def options(self, asset: Any) -> tuple[Budget, Any]:
        """The portfolio after each action of one asset, the others held, and which are valid for themselves.

        Args: asset, one index for all rows or integer [B].  Returns: `Budget` of arrays [B, A] and bool [B, A].
        """
        if self.validate:
            self._check_asset(asset)
        each = slice(None) if isinstance(asset, Integral) else self._row_numbers()
        return self._traded(asset, self._lots), self._valid[each, asset, :]

    def action_masks(self, asset: Any) -> Any:
        """Valid actions of the next asset.

        Args: asset as in `options`.  Returns: bool [B, A].
        """
        after, allowed = self.options(asset)
        return allowed & self._completable(asset, after)

    def sold(self, asset: Any, after: Budget) -> Budget:
        """`after`, the portfolio once this asset is decided, with as much of the undecided rest sold as is allowed.

        Args: asset as in `options`; after and result of arrays [B, A].
        """
        rest = self.pending * self._others(asset)
        return after._replace(
            cash=after.cash + _total(rest * self._released_cash)[:, None],
            invested=after.invested - _total(rest * self._released_value)[:, None],
        )

    def take(self, asset: Any, action: Any) -> None:
        """Commit the chosen actions: asset as in `options`; action integer [B]."""
        if self.validate:
            self._check_asset(asset)
            self._check_range("action", action, self.limits.table.num_actions)
        lots = self.xp.take(self._lots, action, axis=0)[:, None]
        after = self._traded(asset, lots)
        if self.validate:
            rows = self._row_numbers()
            allowed = self._valid[rows, asset, action] & self._completable(asset, after)[:, 0]
            self._require(allowed, "action", action, "one that its mask allows")
        self.budget = Budget(*(part[:, 0] for part in after))
        others = self._others(asset)
        [price] = self._of(asset, self._columns[1])
        self.invested = self.invested + (1 - others) * (lots * price)
        self.pending = self.pending * others
        self._undecided -= 1

    def _traded(self, asset: Any, lots: Any) -> Budget:
        # The portfolio [B, A] after one more trade: lots [A], or [B, 1] and then A = 1.
        budget = Budget(*(part[:, None] for part in self.budget))
        return _after(self.xp, budget, self._of(asset, *self._columns), lots)

    def _completable(self, asset: Any, after: Budget) -> Any:
        within = self.limits.within(after, self._undecided)
        if self._undecided > 1:
            # Holding the rest costs nothing, selling it frees what a purchase needs: either completion is proof.
            within = within | self.limits.within(self.sold(asset, after), self._undecided)
        return within

    def _check_asset(self, asset: Any) -> None:
        batch, assets = self.pending.shape
        if isinstance(asset, Integral):
            asset = self.xp.asarray([int(asset)] * batch, device=array_api_compat.device(self.pending))
        self._check_range("asset", asset, assets)
        self._require(self._of(asset, self.pending)[0][:, 0] == 1, "asset", asset, "one that is still to be decided")

    def _check_range(self, name: str, index: Any, size: int) -> None:
        batch, dtype, shape = self.pending.shape[0], getattr(index, "dtype", None), list(getattr(index, "shape", []))
        if shape != [batch] or not self.xp.isdtype(dtype, "integral"):
            raise InvalidActionError(
                f"{name}: expected integers [{batch}], was {dtype or type(index).__name__} {shape}"
            )
        self._require((index >= 0) & (index < size), name, index, f"0 to {size - 1}")

    def _require(self, met: Any, name: str, index: Any, expected: str) -> None:
        if not bool(self.xp.all(met)):
            row = int(self.xp.argmin(self.xp.astype(met, self.xp.int8)))
            raise InvalidActionError(f"{name}: expected {expected}, was {int(index[row])} in row {row}")

    def _row_numbers(self) -> Any:
        return self.xp.arange(self._valid.shape[0], device=array_api_compat.device(self._lots))

    def _of(self, asset: Any, *parts: Any) -> tuple[Any, ...]:
        # The columns [B or 1, 1] of one asset out of [B, K] or [1, K].
        if isinstance(asset, Integral):
            return tuple(part[:, int(asset) : int(asset) + 1] for part in parts)
        rows = self.xp.arange(asset.shape[0], device=array_api_compat.device(asset))
        return tuple((part[0, asset] if part.shape[0] == 1 else part[rows, asset])[:, None] for part in parts)

    def _others(self, asset: Any) -> Any:
        # 0 at the given asset, 1 elsewhere: [1, K] or [B, K].
        columns = self.xp.arange(self.pending.shape[1], device=array_api_compat.device(self.pending))[None, :]
        index = int(asset) if isinstance(asset, Integral) else asset[:, None]
        return self.xp.astype(columns != index, self.pending.dtype)


def _after(xp: Any, budget: Budget, columns: tuple[Any, ...], lots: Any) -> Budget:
    # One more trade: lots and columns [B], or lots [A] with everything else [B, 1].
    units, price, share, buy_cost, sell_cost = columns
    traded, buys = lots * price, lots > 0
    needed = xp.where(buys, (units + lots) * (price / share), budget.needed)
    return Budget(
        cash=budget.cash - (traded + abs(lots) * xp.where(buys, buy_cost, sell_cost)),
        invested=budget.invested + traded,
        needed=xp.where(needed > budget.needed, needed, budget.needed),
        buys=budget.buys | buys,
    )


def _total(columns: Any) -> Any:
    # Sum over the last axis of [B, K], one column after another: reductions differ between namespaces in their order.
    return reduce(add, (columns[:, asset] for asset in range(columns.shape[1])))


def _constant(xp: Any, numbers: Any, like: Any) -> Any:
    return xp.asarray(numbers, dtype=like.dtype, device=array_api_compat.device(like))
