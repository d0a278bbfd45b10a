"""What the planner hands out: steps, their slices, and where every query is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from camserve.planning.work import Span


@dataclass(frozen=True)
class Slice:
    """The part of one request inside a step."""

    request: int
    opening: bool
    spans: tuple[Span, ...]
    """Ranges of queries; in an opening also an empty one for each position that asks none."""

    @cached_property
    def queries(self) -> int:
        """Number of masked queries."""
        return sum(span.queries for span in self.spans)


@dataclass(frozen=True)
class Step:
    """What one worker is asked at once."""

    number: int
    place: str
    slices: tuple[Slice, ...]
    copy_of: int | None = None
    """The overdue step that is sent again as this one."""

    @cached_property
    def queries(self) -> int:
        """Number of masked queries."""
        return sum(part.queries for part in self.slices)


@dataclass(frozen=True)
class Counts:
    """Queries by state since the planner was made: asked = waiting + in_flight + done + cancelled."""

    asked: int = 0
    waiting: int = 0
    in_flight: int = 0
    done: int = 0
    cancelled: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.asked + other.asked,
            self.waiting + other.waiting,
            self.in_flight + other.in_flight,
            self.done + other.done,
            self.cancelled + other.cancelled,
        )
