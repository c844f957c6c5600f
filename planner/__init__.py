"""Planning with a model that is passed in, under masks that the model computes from every imagined state.

`Exhaustive` walks every valid sequence, `CEM` and `RandomShooting` sample valid ones; `auto_search` takes the exact one
while it fits a budget of imagined steps. `MPC` plans anew at every decision, within a time budget.
"""

from planner.controller import MPC, auto_search
from planner.exhaustive import Exhaustive
from planner.objective import Objective
from planner.plan import Plan
from planner.protocol import ActionWalk, JointPlanningModel, PlanningModel, Transition
from planner.sampling import CEM, RandomShooting, shifted

__all__ = [
    "CEM",
    "MPC",
    "ActionWalk",
    "Exhaustive",
    "JointPlanningModel",
    "Objective",
    "Plan",
    "PlanningModel",
    "RandomShooting",
    "Transition",
    "auto_search",
    "shifted",
]
