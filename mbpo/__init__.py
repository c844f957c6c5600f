"""MBPO with masks: imagined market branches, the half real, half imagined environment, and masked PPO training."""

from mbpo.collect import collect_transitions, market_rows, replay_schema
from mbpo.imagination import MarketBranches, branch_summary, historical_uncertainty, imagine_market
from mbpo.imagined_env import ImaginedVecEnv
from mbpo.online import OnlineConfig, OnlineResult, train_online
from mbpo.policy import TorchPolicy
from mbpo.real_rows import RealRows
from mbpo.recipe import Visited, imagine_branches, mixed_env
from mbpo.snapshots import TrainedPolicy
from mbpo.starts import StartBuffer
from mbpo.training import train_policy
from mbpo.vec_env import MixedVecEnv, RolloutStatistics

__all__ = [
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
    "historical_uncertainty",
    "imagine_branches",
    "imagine_market",
    "market_rows",
    "mixed_env",
    "replay_schema",
    "train_online",
    "train_policy",
]
