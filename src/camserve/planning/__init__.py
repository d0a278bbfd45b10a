"""Decides which work goes into the next step, and where the step is sent. Knows no torch, gRPC, asyncio or clock.

The gateway talks to `Planner` alone. Inside, `planner` decides, by what the others know: `admission` takes requests on
or refuses them, `queue` says who comes first, `filling` shares a step out, `backends` and `cost` learn how fast the
workers are, `blame` says who is to blame for a lost step, `live` and `sent` hold requests and the steps in flight,
and `ledger` counts. `usual` learns how much is enough for requests that may stop early.
"""

from camserve.planning.auto import Candidate, Choice, choose
from camserve.planning.blame import Blame
from camserve.planning.cost import Load, StepCost
from camserve.planning.demand import Demand
from camserve.planning.limits import CLASSES, NOBODY, Limits, Owner
from camserve.planning.planner import MAX_LOSSES, Planner
from camserve.planning.step import Attempt, Counts, Fate, Slice, Span, Step
from camserve.planning.usual import UsualShares

__all__ = [
    "CLASSES",
    "MAX_LOSSES",
    "NOBODY",
    "Attempt",
    "Blame",
    "Candidate",
    "Choice",
    "Counts",
    "Demand",
    "Fate",
    "Limits",
    "Load",
    "Owner",
    "Planner",
    "Slice",
    "Span",
    "Step",
    "StepCost",
    "UsualShares",
    "choose",
]
