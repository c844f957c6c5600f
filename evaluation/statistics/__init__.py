"""Statistics of comparisons: every estimate with its interval, and an error where the data cannot decide.

Returns are `[S, P, n]`: training seeds, independent test paths, bars. Not imported by `evaluation`, since arch and
scipy are slow to load.
"""

from evaluation.statistics.aggregate import interquartile_mean, probability_of_improvement
from evaluation.statistics.crossed import CrossedMean, VarianceComponents, crossed_mean
from evaluation.statistics.interval import Interval, NotDecidable, t_interval
from evaluation.statistics.limits import (
    KillSwitchTest,
    NonInferiority,
    drawdown_non_inferiority,
    kill_switch_difference,
    quantile_upper_bound,
)
from evaluation.statistics.multiple import (
    DeflatedSharpe,
    SuperiorPolicies,
    deflated_sharpe,
    expected_max_sharpe,
    probabilistic_sharpe,
    superior_policies,
)
from evaluation.statistics.power import PowerRow, chance_of_showing, paths_needed, power_table, seeds_needed
from evaluation.statistics.sharpe import SharpeDifference, sharpe_by_path, sharpe_difference

__all__ = [
    "CrossedMean",
    "DeflatedSharpe",
    "Interval",
    "KillSwitchTest",
    "NonInferiority",
    "NotDecidable",
    "PowerRow",
    "SharpeDifference",
    "SuperiorPolicies",
    "VarianceComponents",
    "chance_of_showing",
    "crossed_mean",
    "deflated_sharpe",
    "drawdown_non_inferiority",
    "expected_max_sharpe",
    "interquartile_mean",
    "kill_switch_difference",
    "paths_needed",
    "power_table",
    "probabilistic_sharpe",
    "probability_of_improvement",
    "quantile_upper_bound",
    "seeds_needed",
    "sharpe_by_path",
    "sharpe_difference",
    "superior_policies",
    "t_interval",
]
