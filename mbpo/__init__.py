"""MBPO with masks: imagined market branches, the half real, half imagined environment, and masked PPO training."""

from mbpo.checkpoint import Checkpoint, CheckpointError
from mbpo.collect import collect_transitions, market_rows, replay_schema
from mbpo.imagination import (
    Forecast,
    MarketBranches,
    branch_summary,
    historical_forecast,
    historical_uncertainty,
    imagine_market,
)
from mbpo.imagined_env import ImaginedVecEnv
from mbpo.online import OnlineConfig, OnlineResult, train_online
from mbpo.policy import TorchPolicy
from mbpo.prediction_error import model_error
from mbpo.real_rows import RealRows
from mbpo.recipe import Visited, imagine_branches, mixed_env
from mbpo.rollout_statistics import RolloutStatistics
from mbpo.snapshots import TrainedPolicy
from mbpo.starts import StartBuffer
from mbpo.training import train_policy
from mbpo.vec_env import MixedVecEnv

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Forecast",
    "ImaginedVecEnv",
    "MarketBranches",
    "MixedVecEnv",
    "OnlineConfig",
    "OnlineResult",
    "RealRows",
    "RolloutStatistics",
    "StartBuffer",
    "TorchPolicy",
    "TrainedPolicy",
    "Visited",
    "branch_summary",
    "collect_transitions",
    "historical_forecast",
    "historical_uncertainty",
    "imagine_branches",
    "imagine_market",
    "market_rows",
    "mixed_env",
    "model_error",
    "replay_schema",
    "train_online",
    "train_policy",
]
