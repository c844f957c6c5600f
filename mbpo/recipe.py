"""What MBPO trains on, put together once: visited states, imagined branches, the environment of both halves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from configs.schema import DetentConfig
from data import Scaler, Transitions
from envs import TradingDynamics
from mbpo.collect import market_rows
from mbpo.imagination import Forecast, MarketBranches, imagine_market
from mbpo.penalty import penalty_schedule
from mbpo.ramp import Ramp
from mbpo.starts import StartBuffer
from mbpo.vec_env import MixedVecEnv
from world_model import MarketModel


@dataclass(frozen=True)
class Visited:
    """Training transitions as a learner reads them."""

    features: np.ndarray
    """[T, M] feature rows in time order."""
    rows: np.ndarray
    """[N] feature row of each visited state."""
    states: np.ndarray
    """[N, S] visited, non-terminal states."""

    @classmethod
    def of(cls, transitions: Transitions, num_features: int) -> Visited:
        """States of a set of transitions and the feature rows they stand on."""
        times, features = market_rows(transitions, num_features)
        return cls(features, np.searchsorted(times, transitions.timestamp), transitions.state)


def imagine_branches(
    model: MarketModel, features: np.ndarray, config: DetentConfig, progress: Callable[[int, int], None] | None = None
) -> MarketBranches:
    """Imagine `mbpo.branch_pool` branches from the rows [T, M], once per fit; every policy update reuses them."""
    return imagine_market(
        model,
        features,
        horizon=config.mbpo.rollout_length,
        branches_per_row=max(config.mbpo.branch_pool // len(features), 1),
        generator=torch.Generator().manual_seed(config.seed),
        progress=progress,
    )


def mixed_env(
    config: DetentConfig,
    dynamics: TradingDynamics,
    scaler: Scaler,
    visited: Visited,
    uncertainty: np.ndarray,
    forecast: Forecast,
    branches: MarketBranches,
    model_error: np.ndarray | None = None,
    *,
    env_type: Callable[..., MixedVecEnv] = MixedVecEnv,
) -> MixedVecEnv:
    """The environment MBPO learns in, under the settings of `config.mbpo`.

    Args: uncertainty [T] model disagreement at `visited.features`; branches from the same rows; model_error [T-1]
        there, to be reported; env_type: builds it, for one that differs from ours on purpose.
    """
    ramp = config.mbpo.rollout_schedule
    return env_type(
        dynamics,
        scaler,
        visited.features,
        uncertainty,
        forecast,
        branches,
        StartBuffer(visited.rows, visited.states, capacity=len(visited.rows)),
        num_envs=config.mbpo.ppo.num_envs,
        real_ratio=config.mbpo.real_ratio,
        penalty_coef=config.mbpo.penalty_coef,
        control_variate=config.mbpo.control_variate,
        episode_bars=config.env.episode_bars,
        seed=config.seed,
        penalty=penalty_schedule(config.mbpo.penalty_schedule, config.mbpo.penalty_coef),
        lengths=Ramp(ramp.initial or config.mbpo.rollout_length, config.mbpo.rollout_length, ramp.begin, ramp.end),
        risk_aversion=_risk_aversion(config, dynamics, forecast),
        model_error=model_error,
    )


def final_risk_aversion(config: DetentConfig, dynamics: TradingDynamics, forecast: Forecast) -> float:
    """Risk aversion of the reward that MBPO's value function has learned in the end. Arguments as in `mixed_env`."""
    return _risk_aversion(config, dynamics, forecast).last


def _risk_aversion(config: DetentConfig, dynamics: TradingDynamics, forecast: Forecast) -> Ramp:
    shared, share = dynamics.reward.risk_aversion, config.mbpo.risk_aversion_ramp
    own = shared if config.mbpo.risk_aversion is None else config.mbpo.risk_aversion
    if config.mbpo.usual_position is not None:
        own = aversion_for(forecast, config.mbpo.usual_position)
    return Ramp(min(shared, own), own, end=share) if share else Ramp(own, own)


def aversion_for(forecast: Forecast, usual_position: float) -> float:
    """Risk aversion at which a forecast of its usual size is worth a position of `usual_position`.

    The reward `r - aversion / 2 * r^2` of a position p is largest at `p = E[m] / (aversion * E[m^2])`, m the move of a
    bar (Markowitz 1952, doi:10.2307/2975974); the usual size is the root mean square of `E[m] / E[m^2]` over the rows.

    Args: forecast of each row's next bar, [T, 2].
    """
    mean = forecast.mean.sum(axis=1)
    worth = mean / (forecast.variance.sum(axis=1) + mean * mean)
    return float(np.sqrt(np.mean(worth * worth))) / usual_position
