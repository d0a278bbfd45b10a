"""Decides which masked queries go into the next step. No torch, no gRPC, no asyncio, no clock."""

from camserve.planning.planner import MAX_LOSSES, Counts, Limits, Planner, Slice, Step
from camserve.planning.work import Span

__all__ = ["MAX_LOSSES", "Counts", "Limits", "Planner", "Slice", "Span", "Step"]
