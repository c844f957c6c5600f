"""Three assets, three trades per period: the environment in which masks per asset are not enough.

Prices are normal around known mean curves, money is in dollars. After "Portfolio optimization through
multidimensional action optimization" (Amazon, 2023, aws-samples/amazon-sagemaker-rl-action-masking).

| observation | unit | min | max |
| --- | --- | --- | --- |
| observations[0] cash | multiples of the initial cash | 0 | 10 |
| observations[1:4] units | hundreds | 0 | 10 |
| observations[4:7] price | standard deviations from the asset's mean over time | -10 | 10 |
| observations[7] time | fraction of the episode | 0 | 1 |
| state[0] cash | dollars | 0 | 1e9 |
| state[1:4] units | units | 0 | 1e9 |
| state[4:7] price | dollars | 0 | 1e9 |
| asset_order | order in which an autoregressive policy decides the assets | 0 | 2 |

Actions: MultiDiscrete([11, 11, 11]), per asset sell 50, 40, ... 10, hold, buy 10, ... 50 units. An episode terminates
after 19 trades, at the 20th price. The state row is kept in float32, as it is observed, so that environment, policy and
last check judge the same numbers.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.batch import BatchStep, BatchVecEnv
from masking import ActionAudit, InvalidActionError, JointLimits, TradeTable, check_actions

Variant = Literal["strict", "published"]

TABLE = TradeTable(buy_cost=(0.03, 0.045, 0.035), sell_cost=(0.025, 0.035, 0.03))
LIMITS = JointLimits(table=TABLE, min_cash=1.0, max_share=(1.0, 2 / 3, 1 / 3))
INITIAL_CASH = 1000.0
PERIODS = 20
PRICE_STD = np.array([4.0, 2.0, 7.0])
PUBLISHED_FIRST_MEAN = np.array([40.0, 35.0, 48.0])
SMALLEST_PRICE = 0.1
ROUNDING = 1e-6
"""Dollars that the audit grants to rounding."""
LARGEST_SCALED = 10.0


def mean_prices(time: np.ndarray) -> np.ndarray:
    """Mean price of each asset: periods [...] to dollars [..., 3]."""
    return np.stack(
        (
            40 + 0.4 * time + 4 * np.cos(2 * np.pi * time / 16),
            35 + 0.1 * time,
            48 + 0.3 * time - 6 * np.sin(2 * np.pi * time / 7),
        ),
        axis=-1,
    )


PRICE_CENTRE = mean_prices(np.arange(PERIODS)).mean(axis=0)


class Trade(NamedTuple):
    """What trading did; arrays [B] or [B, 3]."""

    cash: np.ndarray
    units: np.ndarray
    overridden: np.ndarray
    """bool [B]: the environment traded less than the action said (`published` only)."""


class PortfolioBatch:
    """B portfolios stepped together.

    `strict`: what may be traded is decided by `LIMITS` for the portfolio after all trades; an action outside raises.
    The reward is the change of the portfolio's value in multiples of the initial cash.

    `published`: as in the published example, with its quirks. Limits are judged before the trade and asset by asset:
    asset 3 may be bought up to five lots while it is at most a third of the value, asset 2 while it is at most two
    thirds, so both are exceeded afterwards. The rule "nothing is bought below $1 cash" binds asset 1 alone, because
    the share rules of the other two overwrite it. Trades run in the order of the assets; a purchase that cash does
    not cover is cut down to the lots it does cover, a sale whose cost exceeds cash likewise: such overrides are
    counted. A purchase is charged the cost of selling. The first price is drawn around 40 / 35 / 48, not around the
    curves. The only reward is the value at the end. Deviations of ours: the observation has time and scaled numbers,
    and a price is at least $0.10.
    """

    def __init__(self, variant: Variant, batch: int) -> None:
        if variant not in ("strict", "published"):
            raise ValueError(f"variant: expected 'strict' or 'published', was {variant!r}")
        if batch < 1:
            raise ValueError(f"batch: expected >= 1, was {batch}")
        self.variant: Variant = variant
        self.state = np.zeros((batch, 7), dtype=np.float32)
        self.time = np.zeros(batch, dtype=np.int64)
        self.overridden = 0
        """Times the environment traded less than the action said."""
        self.audit = ActionAudit()
        """Of the environment that holds this batch: it records actions and masks, here portfolios beyond a limit."""
        self.action_masks = np.zeros((batch, sum(TABLE.nvec)), dtype=bool)

    @property
    def value(self) -> np.ndarray:
        """Value of the portfolios at the current prices, dollars [B]."""
        return portfolio_value(self.state)

    def restart(self, rows: np.ndarray, rng: np.random.Generator) -> None:
        """Begin new episodes in the given rows: all cash, first prices drawn."""
        first = PUBLISHED_FIRST_MEAN if self.variant == "published" else mean_prices(np.zeros(1))[0]
        self.state[rows] = 0.0
        self.state[rows, 0] = INITIAL_CASH
        self.state[rows, 4:] = _draw(np.broadcast_to(first, (len(rows), 3)), rng)
        self.time[rows] = 0
        self._refresh()

    def step(self, actions: np.ndarray, rng: np.random.Generator) -> BatchStep:
        """Trade at the current prices, then draw the next ones.

        Args: actions integer [B, 3].
        Raises: InvalidActionError if masks or joint limits forbid one of them; ValueError if a row has not been
            restarted since its episode ended. Nothing has moved then.
        """
        if (self.time >= PERIODS - 1).any():
            rows = np.flatnonzero(self.time >= PERIODS - 1).tolist()
            raise ValueError(f"rows {rows}: expected a restart after the end of an episode, was a step")
        check_actions(actions, self.action_masks, TABLE.nvec)
        before = self.value
        if self.variant == "strict":
            valid = LIMITS.check(self.state, actions)
            if not valid.all():
                row = int(np.flatnonzero(~valid)[0])
                reasons = "; ".join(LIMITS.explain(self.state, actions, row))
                raise InvalidActionError(f"actions: row {row} chose {actions[row].tolist()}: {reasons}")
            trade = _trade(self.state, actions)
        else:
            trade = trade_as_published(self.state, actions)
            self.overridden += int(trade.overridden.sum())
        self._audit_limits(trade)
        self.time += 1
        prices = _draw(mean_prices(self.time), rng)
        self.state = np.concatenate((trade.cash[:, None], trade.units, prices), axis=1).astype(np.float32)
        self._refresh()
        terminated = self.time >= PERIODS - 1
        reward = (
            (self.value - before) / INITIAL_CASH if self.variant == "strict" else np.where(terminated, self.value, 0)
        )
        return BatchStep(reward, terminated, np.zeros_like(terminated))

    def observations(self) -> np.ndarray:
        """What the networks see, float32 [B, 8]."""
        cash, units, prices = self.state[:, :1], self.state[:, 1:4], self.state[:, 4:]
        # In standard deviations, because what a price says is how far it is from the mean curve.
        deviations, time = (prices - PRICE_CENTRE) / PRICE_STD, self.time[:, None] / (PERIODS - 1)
        scaled = (cash / INITIAL_CASH, units / 100.0, deviations, time)
        return np.concatenate(scaled, axis=1).clip(-LARGEST_SCALED, LARGEST_SCALED).astype(np.float32)

    def _audit_limits(self, trade: Trade) -> None:
        # The portfolio as it stands after the trade, judged apart from the rules that let it through.
        if self.variant == "strict":
            bought = trade.units > self.state[:, 1:4]
            held = trade.units * self.state[:, 4:].astype(np.float64)
            most = np.array(LIMITS.max_share) * (trade.cash + held.sum(axis=1))[:, None]
            short_of_cash = bought.any(axis=1) & (trade.cash < LIMITS.min_cash - ROUNDING)
            broken = short_of_cash | (bought & (held > most + ROUNDING)).any(axis=1) | (trade.units < 0).any(axis=1)
            self.audit.invalid += int(broken.sum())

    def _refresh(self) -> None:
        masks = LIMITS.marginal_masks(self.state) if self.variant == "strict" else published_masks(self.state)
        self.action_masks = np.asarray(masks)


def observation_space() -> Any:
    """Dict space of one row; see the table of the module."""
    low = np.array([0, 0, 0, 0, -LARGEST_SCALED, -LARGEST_SCALED, -LARGEST_SCALED, 0], dtype=np.float32)
    high = np.array([LARGEST_SCALED] * 7 + [1], dtype=np.float32)
    return spaces.Dict(
        {
            "observations": spaces.Box(low, high, dtype=np.float32),
            "state": spaces.Box(0.0, 1e9, (7,), np.float32),
            "asset_order": spaces.Box(0, TABLE.num_assets - 1, (TABLE.num_assets,), np.int64),
        }
    )


class PortfolioEnv(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """One portfolio; see the module for observations and `PortfolioBatch` for the two variants.

    `info` holds `action_mask` (bool [33], True = valid), `value` in dollars and `overridden` (times the environment
    traded less than asked so far). Executed actions are counted in `audit`.

    Args: variant; shuffle_assets draws a new `asset_order` at each step, for training.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium's own declaration

    def __init__(self, variant: Variant = "strict", *, shuffle_assets: bool = False) -> None:
        self.portfolio = PortfolioBatch(variant, batch=1)
        self.audit = self.portfolio.audit
        self.shuffle_assets = shuffle_assets
        self.observation_space = observation_space()
        self.action_space = spaces.MultiDiscrete(list(TABLE.nvec))

    def reset(
        self,
        *,
        seed: int | None = None,
        options: dict[str, Any] | None = None,  # noqa: ARG002 - gymnasium's signature
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start with all cash."""
        super().reset(seed=seed)
        self.portfolio.restart(np.array([0]), self.np_random)
        return self._obs(), self._info()

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Trade, then see the next prices."""
        actions, masks = np.asarray(action)[None], self.portfolio.action_masks
        step = self.portfolio.step(actions, self.np_random)
        self.audit.record(actions, masks, TABLE.nvec)
        return self._obs(), float(step.reward[0]), bool(step.terminated[0]), False, self._info()

    def action_masks(self) -> np.ndarray:
        """Valid actions, flat bool [33]; a copy, so that no caller can open the gate."""
        return np.array(self.portfolio.action_masks[0])

    def _obs(self) -> dict[str, np.ndarray]:
        order = _orders(1, self.np_random if self.shuffle_assets else None)
        return {name: part[0] for name, part in _observe(self.portfolio, order).items()}

    def _info(self) -> dict[str, Any]:
        value, overridden = float(self.portfolio.value[0]), self.portfolio.overridden
        return {"action_mask": self.action_masks(), "value": value, "overridden": overridden}


class PortfolioVecEnv(BatchVecEnv):
    """Portfolios stepped together for stable-baselines3; arguments as `PortfolioEnv`."""

    def __init__(self, num_envs: int, variant: Variant = "strict", *, shuffle_assets: bool = False, seed: int) -> None:
        super().__init__(num_envs, observation_space(), spaces.MultiDiscrete(list(TABLE.nvec)))
        self.portfolio = PortfolioBatch(variant, num_envs)
        self.audit = self.portfolio.audit
        self.shuffle_assets = shuffle_assets
        self._rng = np.random.default_rng(seed)

    @property
    def _masks(self) -> np.ndarray:
        return self.portfolio.action_masks

    def _observe(self, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        order = _orders(self.num_envs, self._rng if self.shuffle_assets else None)
        obs = _observe(self.portfolio, order)
        return obs if rows is None else {name: part[rows] for name, part in obs.items()}

    def _reset_rows(self, rows: np.ndarray) -> None:
        self.portfolio.restart(rows, self._rng)

    def _advance(self, actions: np.ndarray) -> BatchStep:
        return self.portfolio.step(actions, self._rng)


def _observe(portfolio: PortfolioBatch, order: np.ndarray) -> dict[str, np.ndarray]:
    return {"observations": portfolio.observations(), "state": portfolio.state.copy(), "asset_order": order}


def _orders(batch: int, rng: np.random.Generator | None) -> np.ndarray:
    orders = np.tile(np.arange(TABLE.num_assets), (batch, 1))
    return orders if rng is None else rng.permuted(orders, axis=1)


def _draw(mean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.maximum(rng.normal(mean, PRICE_STD), SMALLEST_PRICE).astype(np.float32)


def portfolio_value(state: np.ndarray) -> np.ndarray:
    """Dollars [B] of states [B, 7]."""
    wide = state.astype(np.float64)
    return np.asarray(wide[:, 0] + (wide[:, 1:4] * wide[:, 4:]).sum(axis=1))


def _trade(state: np.ndarray, actions: np.ndarray) -> Trade:
    wide = state.astype(np.float64)
    lots = np.array(TABLE.lots)[actions]
    per_unit = np.where(lots > 0, TABLE.buy_cost, TABLE.sell_cost)
    cash = wide[:, 0] - (lots * wide[:, 4:] + np.abs(lots) * per_unit).sum(axis=1)
    return Trade(cash, wide[:, 1:4] + lots, np.zeros(len(state), dtype=bool))


def trade_as_published(state: np.ndarray, actions: np.ndarray) -> Trade:
    """Trades of the `published` variant at the current prices: state [B, 7], actions [B, 3]."""
    wide = state.astype(np.float64)
    cash, units, prices = wide[:, 0].copy(), wide[:, 1:4].copy(), wide[:, 4:]
    overridden = np.zeros(len(state), dtype=bool)
    for asset in range(TABLE.num_assets):
        lot = np.array(TABLE.lots)[actions[:, asset]]
        price, buy_cost, sell_cost = prices[:, asset], TABLE.buy_cost[asset], TABLE.sell_cost[asset]
        payable = np.where(lot > 0, price + buy_cost, sell_cost)
        wanted = np.abs(lot) / 10
        covered = np.where(wanted * 10 * payable > cash, np.floor(cash / (10 * payable)), wanted)
        overridden |= covered < wanted
        traded = np.sign(lot) * covered * 10
        units[:, asset] += traded
        cash -= traded * price + np.abs(traded) * sell_cost
    return Trade(cash, units, overridden)


def published_masks(state: np.ndarray) -> np.ndarray:
    """Masks of the `published` variant, judged before the trade and asset by asset: state [B, 7] to bool [B, 33]."""
    wide = state.astype(np.float64)
    share = wide[:, 1:4] * wide[:, 4:] / portfolio_value(state)[:, None]
    may_buy = np.stack((wide[:, 0] >= 1, share[:, 1] <= 2 / 3, share[:, 2] <= 1 / 3), axis=1)
    lots = np.array(TABLE.lots)
    masks = np.where(lots > 0, may_buy[:, :, None], wide[:, 1:4, None] + lots >= 0)
    return masks.reshape(len(state), -1)
