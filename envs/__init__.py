"""Trading environments over one exact account step, shared by history, imagination and planner.

The core (account, reward, dynamics, history) is array-API arithmetic; `envs.trading` adds the Gymnasium interface and
`envs.vec_env` the batched one for stable-baselines3.
"""

from envs.account import RISK_EVENTS, Account, AccountRules, StepOutcome, account_step, initial_account
from envs.dynamics import ACCOUNT_FIELDS, DATA_AGE, UNCERTAINTY_FIELD, TradingDynamics, observation_scaler
from envs.history import HistoryBatch, Step
from envs.reward import REWARDS, register_reward, reward_function

__all__ = [
    "ACCOUNT_FIELDS",
    "DATA_AGE",
    "REWARDS",
    "RISK_EVENTS",
    "UNCERTAINTY_FIELD",
    "Account",
    "AccountRules",
    "HistoryBatch",
    "Step",
    "StepOutcome",
    "TradingDynamics",
    "account_step",
    "initial_account",
    "observation_scaler",
    "register_reward",
    "reward_function",
]
