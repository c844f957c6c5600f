"""Planning with a model that is passed in, under masks that the model computes from every imagined state. A horizon of
a few bars over a few discrete actions is small enough to search whole, so no candidate is sampled and the best valid
sequence is found exactly.
"""

from planner.exhaustive import Plan, exhaustive_search
from planner.protocol import PlanningModel

__all__ = ["Plan", "PlanningModel", "exhaustive_search"]
