"""A probabilistic ensemble that predicts the next feature row of the market (PETS, arXiv:1805.12114). It learns only
what is unknown: account, reward and masks are exact arithmetic elsewhere. The market does not react to the agent, so
no action enters; imagined branches can be generated once and reused by every policy update. For environments that
only tell their masks at real states, `learn_masks` learns the mask as well, with a bound on its false-valid rate.
`WorldModel` is the general case: an environment of which nothing, or only some `KnownParts`, is declared.
"""

from world_model.bar_return import return_log_density
from world_model.calibration import shrinkage_factor, variance_multiplier
from world_model.drift import DriftCalibration, calibrate_drift
from world_model.errors import ModelFileError, TrainingError, WorldModelError
from world_model.experience import Experience
from world_model.horizons import StepMetrics, evaluate_horizons
from world_model.known import KnownParts
from world_model.learned_masks import LearnedMaskConfig, LearnedMaskReport, LearnedMasks, MaskVerdict, learn_masks
from world_model.losses import gaussian_nll, member_nll
from world_model.marginals import central_coverage
from world_model.mask_bound import MaskBound, MaskBoundError, MaskErrors, mask_errors
from world_model.mask_head import MaskHead, MaskHeadConfig
from world_model.metrics import ModelMetrics, evaluate_market_model, fan_chart
from world_model.model import MarketModel
from world_model.networks import EnsembleMLP
from world_model.normaliser import Normaliser
from world_model.trainer import FitReport, fit_market_model
from world_model.world import WorldModel, WorldStep
from world_model.world_fit import WorldFitConfig, WorldFitReport, fit_world_model

__all__ = [
    "DriftCalibration",
    "EnsembleMLP",
    "Experience",
    "FitReport",
    "KnownParts",
    "LearnedMaskConfig",
    "LearnedMaskReport",
    "LearnedMasks",
    "MarketModel",
    "MaskBound",
    "MaskBoundError",
    "MaskErrors",
    "MaskHead",
    "MaskHeadConfig",
    "MaskVerdict",
    "ModelFileError",
    "ModelMetrics",
    "Normaliser",
    "StepMetrics",
    "TrainingError",
    "WorldFitConfig",
    "WorldFitReport",
    "WorldModel",
    "WorldModelError",
    "WorldStep",
    "calibrate_drift",
    "central_coverage",
    "evaluate_horizons",
    "evaluate_market_model",
    "fan_chart",
    "fit_market_model",
    "fit_world_model",
    "gaussian_nll",
    "learn_masks",
    "mask_errors",
    "member_nll",
    "return_log_density",
    "shrinkage_factor",
    "variance_multiplier",
]
