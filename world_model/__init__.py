"""A probabilistic ensemble that predicts the next feature row of the market (PETS, arXiv:1805.12114). It learns only
what is unknown: account, reward and masks are exact arithmetic elsewhere. The market does not react to the agent, so
no action enters; imagined branches can be generated once and reused by every policy update.
"""

from world_model.calibration import central_coverage, shrinkage_factor, variance_multiplier
from world_model.errors import ModelFileError, TrainingError, WorldModelError
from world_model.losses import gaussian_nll, member_nll
from world_model.metrics import ModelMetrics, evaluate_market_model, fan_chart
from world_model.model import MarketModel
from world_model.networks import EnsembleMLP
from world_model.normaliser import Normaliser
from world_model.trainer import FitReport, fit_market_model

__all__ = [
    "EnsembleMLP",
    "FitReport",
    "MarketModel",
    "ModelFileError",
    "ModelMetrics",
    "Normaliser",
    "TrainingError",
    "WorldModelError",
    "central_coverage",
    "evaluate_market_model",
    "fan_chart",
    "fit_market_model",
    "gaussian_nll",
    "member_nll",
    "shrinkage_factor",
    "variance_multiplier",
]
