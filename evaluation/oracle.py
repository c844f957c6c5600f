"""The best that can be done on a market of known truth: an exact dynamic programme and the policy that plays it.

Letters: K regimes, Z grid points of the signal, N positions on the action table, H bars held, A actions, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.evaluation import SyntheticMarketConfig
from envs import TradingDynamics, initial_account
from envs.synthetic import signal_persistence, stationary_law, transition_matrix
from masking import HOLD, masked_argmax
from masking.rules import MinHolding

Floats = NDArray[np.float64]

TIE = 1e-9
"""Log equity by which a trade must be better than Hold; far below any cost, far above rounding."""
TOLERANCE = 1e-10
"""Largest change of a relative value, in log equity, in the last sweep of value iteration."""
MAX_SWEEPS = 200_000


@dataclass(frozen=True, eq=False, kw_only=True)
class MarketSolution:
    """Optimal values where regime and signal are known."""

    q: Floats
    """[K, Z, N, H, A] log equity of taking the action now and the best ones from then on, relative to a value that is
    the same for every action; finite for forbidden actions too, because the masks of the walk decide. An action that
    is valid nowhere, as 1.25 outside paper mode, counts as Hold."""
    signals: Floats
    """[Z] evenly spaced grid of the signal, in standard deviations of the true one."""
    positions: Floats
    """[N] targets that the limits allow, multiples of equity."""
    growth: float
    """Optimal expected log growth per bar, to second order."""
    residual: float
    """Largest Bellman residual of the relative values, log equity."""

    def action_values(self, signal: Floats, position: Floats, holding_time: Floats) -> Floats:
        """Q in every regime: linear in the signal, at the nearest position, held no longer than the grid knows.

        Args: signal [B], clipped to the grid; position [B] multiples of equity; holding_time [B] bars.
        Returns: [B, K, A].
        """
        last, step = len(self.signals) - 1, self.signals[1] - self.signals[0]
        place = np.clip((signal - self.signals[0]) / step, 0.0, last)
        low = np.minimum(place.astype(np.int64), last - 1)
        weight = (place - low)[:, None, None]
        nearest = np.abs(position[:, None] - self.positions).argmin(axis=1)
        held = np.clip(holding_time, 1, self.q.shape[3]).astype(np.int64) - 1
        below = self.q[:, low, nearest, held].swapaxes(0, 1)
        above = self.q[:, low + 1, nearest, held].swapaxes(0, 1)
        between: Floats = (1 - weight) * below + weight * above
        return between


def solve_oracle(
    market: SyntheticMarketConfig, dynamics: TradingDynamics, *, signal_std: float = 1.0, signal_points: int = 41
) -> MarketSolution:
    """Maximise the average growth of log equity on a market whose regime and signal are observed.

    The state is regime, signal, position and bars held. A decision at a close is executed as in
    `envs.account.account_step`: the old position earns the gap of the next bar, the new one the move from open to
    close, the trade pays cost rate and the expected spread of the next bar's regime. A position p earns
    `p * mean - p^2 * variance / 2`, log growth to second order. The signal is a Markov chain with the mean and
    variance of its AR(1) (Rouwenhorst 1995); which actions are valid says the rule set itself.

    Left out: the drawdown ladder and the volatility breaker, which depend on the account's and the market's whole
    path (on a real walk the best of the valid actions is taken); features that an extra rule reads, taken as zero; the
    drift of a position between trades. So it is the optimum under holding and trade-size limits and costs, and close
    to it where the ladder rarely binds.

    Solved by relative value iteration. Regime and signal do not react to the account, so values relative to a flat
    account *in the same regime at the same signal* obey a closed recursion, which settles as fast as two accounts with
    different positions meet, not as slowly as regimes change.

    Args: signal_std: stationary standard deviation of the signal the policy will see, 1 for the true one;
        signal_points: Z.
    Raises: ValueError naming the argument, or if values have not settled after `MAX_SWEEPS`.
    """
    if not 0 < signal_std < np.inf:
        raise ValueError(f"signal_std: expected a positive number, was {signal_std}")
    if signal_points < 3:
        raise ValueError(f"signal_points: expected >= 3, was {signal_points}")
    regimes = transition_matrix(market)
    unit_grid, moves = rouwenhorst(signal_persistence(market), signal_points)
    signals = signal_std * unit_grid
    positions, masks, position_after, held_after = _choices(dynamics)
    rewards = _rewards(market, dynamics, regimes, signals, positions, position_after)

    def bellman(values: Floats) -> tuple[Floats, Floats]:
        future = np.einsum("kl,lynh->kynh", regimes, values)
        future = np.tensordot(moves, future, axes=(1, 1)).swapaxes(0, 1)
        q = rewards + future[:, :, position_after[:, None, :], held_after]
        return q, np.where(masks, q, -np.inf).max(axis=-1)

    values = np.zeros((len(regimes), signal_points, *masks.shape[:2]))
    for _ in range(MAX_SWEEPS):
        q, best = bellman(values)
        flat = best[:, :, :1, -1:]
        residual = float(np.abs(best - flat - values).max())
        values = best - flat
        if residual < TOLERANCE:
            break
    else:
        raise ValueError(
            f"solve_oracle: expected values that settle within {MAX_SWEEPS} sweeps, the last one moved them by "
            f"{residual:.2g}; are costs so high that no trade ever pays?"
        )
    growth = float(stationary_law(regimes) @ flat[:, :, 0, 0] @ stationary_law(moves))
    return MarketSolution(q=q, signals=signals, positions=positions, growth=growth, residual=residual)


class OraclePolicy:
    """Plays a solution knowing `true_regime` and `true_signal`, columns of a wider feature table.

    Raises: ValueError if the state row lacks them.
    """

    name = "oracle"

    def __init__(self, dynamics: TradingDynamics, solution: MarketSolution) -> None:
        self._solution = solution
        self._columns = columns_of(dynamics, ("true_signal", "position", "holding_time", "true_regime"))

    def act(self, state: NDArray[np.float32], action_masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The best valid action in the regime; Hold among equally good ones."""
        *where, regime = state[:, self._columns].astype(np.float64).T
        values = self._solution.action_values(*where)
        return best_valid(values[np.arange(len(state)), regime.astype(np.int64)], action_masks)


def columns_of(dynamics: TradingDynamics, names: tuple[str, ...]) -> list[int]:
    """Places of named columns in the state row. Raises: ValueError naming those that are missing."""
    missing = [name for name in names if name not in dynamics.state_names]
    if missing:
        raise ValueError(f"feature_names: expected {', '.join(names)}, missing {missing}; widen the feature panel")
    return [dynamics.state_names.index(name) for name in names]


def best_valid(values: Floats, action_masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The valid action of the highest value; Hold where no trade is better by more than `TIE`.

    Args: values, action_masks [B, A]. Returns: [B]. Raises: InvalidMaskError on a malformed mask.
    """
    trade = np.arange(values.shape[1]) != HOLD
    best: NDArray[np.int64] = masked_argmax(values - TIE * trade, action_masks)
    return best


def rouwenhorst(persistence: float, points: int) -> tuple[Floats, Floats]:
    """Markov chain with the mean, variance and autocorrelation of a stationary AR(1) of unit variance.

    Rouwenhorst (1995), as in Kopecky and Suen (2010), doi:10.1016/j.red.2010.02.002, section 3: exact at any
    persistence, where quadrature fails near one.

    Returns: grid [Z], evenly spaced; transition matrix [Z, Z].
    """
    stay = (1 + persistence) / 2
    chain = np.ones((1, 1))
    for size in range(2, points + 1):
        wider = np.zeros((size, size))
        wider[:-1, :-1] += stay * chain
        wider[:-1, 1:] += (1 - stay) * chain
        wider[1:, :-1] += (1 - stay) * chain
        wider[1:, 1:] += stay * chain
        wider[1:-1] /= 2  # counted from both neighbours
        chain = wider
    return np.sqrt(points - 1) * np.linspace(-1.0, 1.0, points), chain


def _choices(
    dynamics: TradingDynamics,
) -> tuple[Floats, NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    # Positions [N], masks [N, H, A], next place on the position grid [N, A], next place on the holding grid [N, H, A].
    factors = np.asarray(dynamics.rule_set.actions.factors)
    bars = max([1, *(rule.bars for rule in dynamics.rule_set.rules if isinstance(rule, MinHolding))])
    held = np.arange(bars)
    account = initial_account(len(factors) * bars, np, dtype=np.float64)._replace(
        position=np.repeat(factors, bars), holding_time=np.tile(held + 1.0, len(factors))
    )
    features = np.zeros((len(account.position), len(dynamics.feature_names)))
    masks = dynamics.action_masks(dynamics.state_row(features, account, np.zeros(len(features))))
    masks = masks.reshape(len(factors), bars, dynamics.num_actions)
    # A position that nobody may enter could still be held for ever: it would be a market of its own.
    reachable = masks.any(axis=(0, 1))[HOLD + 1 :]
    where = np.arange(reachable.sum())
    position_after = np.repeat(where[:, None], dynamics.num_actions, axis=1)
    position_after[:, HOLD + 1 + np.flatnonzero(reachable)] = where
    # The bar of the trade counts as held, and longer than H bars is as free as H.
    trades = (position_after != where[:, None])[:, None, :]
    held_after = np.where(trades, 0, np.minimum(held + 1, bars - 1)[:, None])
    return factors[reachable], masks[reachable], position_after, held_after


def _rewards(
    market: SyntheticMarketConfig,
    dynamics: TradingDynamics,
    regimes: Floats,
    signals: Floats,
    positions: Floats,
    position_after: NDArray[np.int64],
) -> Floats:
    # [K, Z, N, 1, A] expected log growth until the next close, given regime and signal at this one.
    bar = 1.0 / market.bars_per_year
    share = market.gap_share
    drift = np.asarray(market.drift)[:, None] + market.signal_drift * signals
    diffusion = np.asarray(market.volatility) ** 2 * bar
    jumps = np.asarray(market.jump_rate) * bar * market.jump_std**2

    def growth(mean: Floats, variance: Floats) -> Floats:
        # A log return of mean m and variance v is a simple return of mean m + v/2. [K, Z, N] after the next regime.
        simple = mean + variance[:, None] / 2
        earned = simple[:, :, None] * positions - variance[:, None, None] / 2 * positions**2
        expected: Floats = np.einsum("kl,lyn->kyn", regimes, earned)
        return expected

    over_night = growth(share * drift * bar, share * diffusion + jumps)
    by_day = growth((1 - share) * drift * bar, (1 - share) * diffusion)
    account = dynamics.account_rules
    rate = account.cost_rate + account.spread_share * 1e-4 * (regimes @ np.asarray(market.spread_bps))
    traded = np.abs(positions[position_after] - positions[:, None])
    costs = rate[:, None, None, None] * traded
    rewards: Floats = over_night[:, :, :, None] + by_day[:, :, position_after] - costs
    return rewards[:, :, :, None, :]
