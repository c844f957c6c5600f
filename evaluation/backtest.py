"""Walk a policy over the whole of a history and keep everything that happened.

Letters: T feature rows (closes), T-1 bars between them, B paths, A actions. Row t of a per-close array is the close
of row t; row t of a per-bar array is the decision made at close t and what it did until close t+1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from envs import HistoryBatch, TradingDynamics
from evaluation.policy import Policy
from masking import InvalidActionError

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[int, int], None]
"""Called after each bar with the bars done and the bars in all."""


@dataclass(frozen=True, eq=False, kw_only=True)
class BacktestResult:
    """What B accounts did under one policy; arrays are read-only.

    Raises: ValueError on shape.
    """

    policy: str
    """Name of the policy."""
    timestamps: NDArray[np.datetime64]
    """[T] UTC closes, ascending."""
    equity: NDArray[np.float64]
    """[T, B] multiples of the initial equity; the first row is 1."""
    position: NDArray[np.float64]
    """[T, B] at the close, multiples of equity."""
    trading_state: NDArray[np.int8]
    """[T, B] code of `masking.TradingState` after the close."""
    log_returns: NDArray[np.float64]
    """[T-1, B] log growth of equity per bar, costs included."""
    actions: NDArray[np.int64]
    """[T-1, B] chosen at close t, executed at the open of t+1."""
    action_masks: NDArray[np.bool_]
    """[T-1, B, A] in force when the action was chosen."""
    rule_fields: tuple[str, ...]
    """Names of the F state columns that the rules read, sorted."""
    rule_states: NDArray[np.float32]
    """[T-1, B, F] those columns when the action was chosen; the rule set gives every mask and its reasons again."""
    cost: NDArray[np.float64]
    """[T-1, B] fraction of equity paid for trading."""
    turnover: NDArray[np.float64]
    """[T-1, B] |trade| in multiples of equity, the risk manager's trades included."""
    flattened: NDArray[np.bool_]
    """[T-1, B] the risk manager closed a position at the bar's open."""
    reward: NDArray[np.float64]
    """[T-1, B]."""
    killed: NDArray[np.bool_]
    """[B] the kill switch latched on the way."""

    def __post_init__(self) -> None:
        closes, paths = self.equity.shape
        per_bar = (closes - 1, paths)
        expected = {
            "timestamps": (closes,),
            "position": (closes, paths),
            "trading_state": (closes, paths),
            "killed": (paths,),
            **dict.fromkeys(("log_returns", "actions", "cost", "turnover", "flattened", "reward"), per_bar),
            "action_masks": (*per_bar, self.action_masks.shape[-1]),
            "rule_states": (*per_bar, len(self.rule_fields)),
        }
        for name, shape in expected.items():
            actual = getattr(self, name).shape
            if actual != shape:
                raise ValueError(f"{name}: expected {list(shape)}, was {list(actual)}")

    @cached_property
    def drawdown(self) -> NDArray[np.float64]:
        """[T, B] fraction below the all-time peak of equity.

        Not the running drawdown of the ladder, whose peak starts anew after a release: what an investor lost does
        not go away with a cool-down.
        """
        drawdown: NDArray[np.float64] = 1.0 - self.equity / np.maximum.accumulate(self.equity, axis=0)
        return drawdown

    def rule_columns(self, path: int = 0) -> dict[str, NDArray[np.float32]]:
        """What the rules saw on one path: name -> [T-1], as `RuleSet` and its `blocked` and `explain` take it."""
        return {name: self.rule_states[:, path, index] for index, name in enumerate(self.rule_fields)}

    @property
    def invalid_actions(self) -> int:
        """Decisions that their recorded mask forbids, or that name no action, over all bars and paths.

        An audit of the record itself: it shares no code with the check the environment makes before it moves.
        """
        is_chosen = self.actions[..., None] == np.arange(self.action_masks.shape[-1])
        return int((~(is_chosen & self.action_masks).any(axis=-1)).sum())

    def to_frame(self) -> pd.DataFrame:
        """Path 0 as one row per close, index `timestamp` (UTC).

        What happened during a bar stands in the row of the close that ended it; the first row has none of it, so
        its numbers are NaN, its action is missing and `flattened` is False.
        """
        import pandas as pd

        columns: dict[str, Any] = {
            "equity": self.equity[:, 0],
            "drawdown": self.drawdown[:, 0],
            "position": self.position[:, 0],
            "trading_state": self.trading_state[:, 0],
            "action": pd.array([pd.NA, *self.actions[:, 0].tolist()], dtype="Int64"),
        }
        for name in ("log_returns", "cost", "turnover", "reward"):
            columns[name] = np.concatenate(([np.nan], getattr(self, name)[:, 0]))
        columns["flattened"] = np.concatenate(([False], self.flattened[:, 0]))
        index = pd.DatetimeIndex(self.timestamps, name="timestamp").tz_localize("UTC")
        return pd.DataFrame(columns, index=index)


def backtest(
    dynamics: TradingDynamics,
    features: NDArray[np.floating],
    timestamps: Any,
    policy: Policy,
    uncertainty: NDArray[np.floating] | None = None,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> BacktestResult:
    """Drive `batch` accounts from the first feature row to the last, without an episode limit.

    All start flat with equity 1. A killed account is flattened at the next open and stays flat to the end, so every
    path has the same length.

    Args: features [T, M] raw units, or [P, T, M] of P markets on one clock; timestamps [T], anything NumPy reads as
        UTC times, e.g. a `DatetimeIndex`; uncertainty [T] or [P, T] ensemble disagreement, zero when None; batch, one
        path per market when None; path b walks market b % P, so more of them are of use only for a policy that draws
        at random; progress is called after every bar.
    Raises: InvalidActionError naming policy and bar if the policy chooses a forbidden action; ValueError on shape,
        non-finite features or timestamps that do not ascend.
    """
    features = np.asarray(features)
    batch = batch or (len(features) if features.ndim == 3 else 1)
    walk = HistoryBatch(dynamics, features, uncertainty, batch=batch)
    closes = _closes(timestamps, walk.last_row + 1)
    bars = walk.last_row
    rule_fields = dynamics.rule_set.fields
    rule_columns = [dynamics.state_names.index(name) for name in rule_fields]
    accounts = [walk.account]
    events: dict[str, list[NDArray[Any]]] = {}
    for bar in range(bars):
        action_masks, rule_states = walk.action_masks, walk.state[:, rule_columns]
        # Copies: a policy that writes into what it is given must change neither the check nor the record.
        actions = np.array(policy.act(walk.state.copy(), action_masks.copy()))
        try:
            step = walk.step(actions)
        except InvalidActionError as error:
            raise InvalidActionError(f"policy {policy.name!r}, bar {bar} after {closes[bar]}: {error}") from error
        outcome = step.outcome
        happened = {
            "log_returns": outcome.log_return,
            "actions": actions,
            "action_masks": action_masks,
            "rule_states": rule_states,
            "cost": outcome.cost,
            "turnover": outcome.turnover,
            "flattened": outcome.flattened,
            "reward": step.reward,
        }
        for name, value in happened.items():
            events.setdefault(name, []).append(value)
        accounts.append(walk.account)
        if progress is not None:
            progress(bar + 1, bars)
    columns: dict[str, NDArray[Any]] = {name: np.stack(values) for name, values in events.items()}
    columns["equity"] = np.stack([account.equity for account in accounts])
    columns["position"] = np.stack([account.position for account in accounts])
    columns["trading_state"] = np.stack([account.trading_state for account in accounts]).astype(np.int8)
    columns["actions"] = columns["actions"].astype(np.int64)
    columns["timestamps"] = closes
    columns["killed"] = accounts[-1].killed > 0
    for column in columns.values():
        column.setflags(write=False)
    return BacktestResult(policy=policy.name, rule_fields=rule_fields, **columns)


def _closes(timestamps: Any, rows: int) -> NDArray[np.datetime64]:
    closes = np.array(timestamps, dtype="datetime64[ns]")
    if closes.shape != (rows,):
        raise ValueError(f"timestamps: expected [{rows}], one per feature row, was {list(closes.shape)}")
    # NaT compares False with everything, so it is refused here too.
    ascends = closes[1:] > closes[:-1]
    if not ascends.all():
        row = int(np.argmin(ascends))
        raise ValueError(f"timestamps: expected ascending, row {row} is {closes[row]}, row {row + 1} {closes[row + 1]}")
    return closes
