"""Defines what the planner hands out: steps, their slices, and the counts of queries by state."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from camserve.methods.work import Kind, Work
from camserve.planning.cost import Load


class Fate(Enum):
    """Says what becomes of a request when a slice of it is lost."""

    GOES_ON = "goes on"
    """The slice waits again, or its other copy is answered or in flight."""
    OVER = "over"
    """The request had ended before."""
    GIVEN_UP = "given up"
    """The slice was lost too many times, without anybody to blame."""
    AT_FAULT = "at fault"
    """The request has broken workers that answer others."""


@dataclass(frozen=True)
class Attempt:
    """Says how a slice was lost."""

    backend: str
    by_worker: bool
    """Whether a worker died or fell silent over it, which the request itself may have caused."""
    alone: bool
    """Whether it was alone in its step, so that no other request can have caused it."""


@dataclass(frozen=True)
class Span:
    """The queries [start, stop) of one position of a request."""

    position: int
    """Index of the demand in the request."""
    start: int
    stop: int
    lost: tuple[Attempt, ...] = ()
    """The attempts at which this range was lost."""

    @property
    def queries(self) -> int:
        """Number of queries in the span."""
        return self.stop - self.start

    def split(self, queries: int) -> tuple[Span, Span]:
        """Returns the span of the first `queries` queries, and that of the rest."""
        middle = self.start + queries
        first = Span(self.position, self.start, middle, self.lost)
        return first, Span(self.position, middle, self.stop, self.lost)


@dataclass(frozen=True)
class Slice:
    """The share of one request in a step: its opening, ranges of its queries, or both."""

    request: int
    """Number of the request."""
    opening: bool
    """Whether the slice opens the request."""
    spans: tuple[Span, ...]
    """Ranges of queries; an opening also has an empty one for each position that is known to ask none."""
    work: tuple[Work, ...] = ()
    """Work of the slice: the opening's own, if it is one, and that of the queries."""
    lost: tuple[Attempt, ...] = ()
    """The attempts at which the opening was lost, if it is one."""

    @cached_property
    def attempts(self) -> frozenset[tuple[Attempt, ...]]:
        """The attempts at which parts of the slice were lost before: an entry for each history."""
        return frozenset([self.lost, *(span.lost for span in self.spans)]) - {()}

    @cached_property
    def queries(self) -> int:
        """Number of queries in the slice."""
        return sum(span.queries for span in self.spans)


@dataclass(frozen=True)
class Step:
    """The slices of one or more requests that one worker is asked at once."""

    number: int
    backend: str
    slices: tuple[Slice, ...]
    copy_of: int | None = None
    """Number of the overdue step of which this one is a copy; None for any other step."""
    predicted_s: float = 0.0
    """Seconds that the slowest worker of the backend is predicted to take."""
    allowed_s: float = 0.0
    """Seconds that the step was allowed to take when it was filled."""
    expected_s: float = 0.0
    """Seconds that a worker of the backend is predicted to take on average."""

    @cached_property
    def queries(self) -> int:
        """Number of queries in the step."""
        return sum(slice_.queries for slice_ in self.slices)

    @cached_property
    def load(self) -> Load:
        """Load of the worker, as planned."""
        return load_of(self.slices)


def load_of(slices: tuple[Slice, ...]) -> Load:
    """Returns the load that slices are together."""
    units: dict[Kind, int] = {}
    for slice_ in slices:
        for work in slice_.work:
            units[work.kind] = units.get(work.kind, 0) + work.units
    return Load(units, len(slices))


@dataclass(frozen=True)
class Counts:
    """Numbers of queries by state since the planner was made: asked = waiting + in_flight + done + cancelled."""

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
