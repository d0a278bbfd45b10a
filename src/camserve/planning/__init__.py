"""Decides which masked queries go into the next step, and where. No torch, no gRPC, no asyncio, no clock."""

from camserve.planning.auto import Choice, Rung, choose
from camserve.planning.cost import StepCost
from camserve.planning.limits import CLASSES, NOBODY, Limits, Owner
from camserve.planning.planner import MAX_LOSSES, Planner
from camserve.planning.step import Counts, Slice, Step
from camserve.planning.work import Span

__all__ = [
    "CLASSES",
    "MAX_LOSSES",
    "NOBODY",
    "Choice",
    "Counts",
    "Limits",
    "Owner",
    "Planner",
    "Rung",
    "Slice",
    "Span",
    "Step",
    "StepCost",
    "choose",
]
