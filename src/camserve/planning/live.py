"""Keeps one live request: ranges of queries, taken from the front and given back when they are lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from camserve.methods.work import Kind, Work
from camserve.planning.cost import USUAL
from camserve.planning.demand import Demand
from camserve.planning.step import Attempt, Slice, Span

Units = dict[Kind, int]
"""Units of work by kind; a kind that is missing has none."""


def add(units: Units, more: Mapping[Kind, int], times: int = 1) -> Units:
    """Adds `more` to `units` in place, `times` times; returns `units`."""
    for kind, number in more.items():
        units[kind] = units.get(kind, 0) + times * number
    return units


def bound_of(demands: Iterable[Demand]) -> Units:
    """Returns the most units that demands can come to, by kind."""
    return _units_by_kind((demand, demand.most if demand.queries is None else demand.queries) for demand in demands)


def usual_of(demands: Iterable[Demand]) -> Units:
    """Returns the units that demands usually come to, by kind."""
    most = [(demand, demand.most if demand.queries is None else demand.queries) for demand in demands]
    return _units_by_kind((demand, each if demand.usual is None else min(demand.usual, each)) for demand, each in most)


def _units_by_kind(asked: Iterable[tuple[Demand, int]]) -> Units:
    """Returns the units that numbers of queries of demands come to, by kind."""
    units: Units = {}
    for demand, queries in asked:
        if queries and demand.weight:
            units[demand.kind] = units.get(demand.kind, 0) + demand.weight * queries
    return units


def units_of(works: Iterable[Work]) -> Units:
    """Returns the units of several works together, by kind."""
    units: Units = {}
    for work in works:
        if work.units:
            units[work.kind] = units.get(work.kind, 0) + work.units
    return units


def usual_work(units: Mapping[Kind, int]) -> float:
    """Returns what units usually cost, measured in masked forwards."""
    work = 0.0
    for kind, number in units.items():
        work += USUAL[kind] * number
    return work


class LiveRequest:
    """Keeps what the planner knows of a request that is neither complete nor cancelled.

    Args:
        number: counts requests in the order of their arrival.
        demands: what it asks, by position.
        opening: work that is done with the opening and cannot be divided.
        size_bytes: what the request adds to a step's size.
        deadline_s: when it has to be answered.
        rank: index of its class in `CLASSES`; 0 is the most urgent.
        owner: name of the owner; "" for nobody.
        came_s: time of its arrival.
    """

    def __init__(
        self,
        number: int,
        demands: Sequence[Demand],
        opening: Sequence[Work],
        *,
        size_bytes: int,
        deadline_s: float,
        rank: int,
        owner: str,
        came_s: float,
    ) -> None:
        self.number = number
        self.opening = units_of(opening)
        self.size_bytes = size_bytes
        self.deadline_s = deadline_s
        self.expires_s = deadline_s
        """Time from which on the request is put into no step: its deadline, or a later one of those who follow it."""
        self.rank = rank
        self.owner = owner
        self.came_s = came_s
        self.to_open = True
        self.opened = False
        self.waiting = 0
        self.units: Units = {}
        """Units of the queries that wait."""
        self.reserved: Units = {}
        """The most units that the positions come to whose number of queries is not known yet."""
        self._demands = list(demands)
        self._unknown: set[int] = set()  # positions whose number of queries is not known yet
        self._withdrawn: set[int] = set()  # positions of which no query is asked any more
        self._admitted = bound_of(demands)
        self._spans: deque[Span] = deque()
        self._opening_lost: tuple[Attempt, ...] = ()
        self._slices_in_flight = 0
        self.urgency: tuple[float, ...] = ()
        """Key of the order of service, the smallest first: class, deadline, work that waits, arrival.

        The work is measured by what its kinds usually cost, so that the order does not change with what is learnt.
        """
        self._ask(range(len(demands)))

    @property
    def complete(self) -> bool:
        """Tells whether it is opened, the number of queries of every position is known, and all were answered."""
        return self._quiet and not self._unknown

    @property
    def stalled(self) -> bool:
        """Tells whether all that is known was answered, but the number of queries of a position is still to come."""
        return self._quiet and bool(self._unknown)

    @property
    def opens_only(self) -> bool:
        """Tells whether the next slice is an opening that asks no query: that of a Grad-CAM, say."""
        return self.to_open and not self.waiting

    @property
    def is_lost(self) -> bool:
        """Tells whether the next slice holds work that was lost before."""
        if self.to_open:
            return bool(self._opening_lost)
        return self.opened and bool(self._spans) and bool(self._spans[0].lost)

    @property
    def lost_at(self) -> frozenset[str]:
        """Names of the backends that have lost the work that comes next."""
        lost = self._opening_lost if self.to_open else self._spans[0].lost if self._spans else ()
        return frozenset(attempt.backend for attempt in lost)

    def runs(self) -> Iterator[tuple[Demand, int]]:
        """Yields (demand, number of queries) for each range that waits, in the order in which they are sent."""
        return ((self._demands[span.position], span.queries) for span in self._spans)

    def take(self, queries: int) -> Slice:
        """Moves queries from waiting to in flight, with the opening if that waits; returns them as a slice.

        An opening has one span more, an empty one, for each position that is known to ask nothing.
        """
        spans: list[Span] = []
        units: Units = {}
        if self.to_open:
            units.update(self.opening)
            spans = [Span(position, 0, 0) for position, demand in enumerate(self._demands) if demand.queries == 0]
        opening, self.to_open = self.to_open, False
        self.waiting -= queries
        while queries:
            # A range that does not fit whole leaves its rest at the front, so that the order stays that of the queries.
            first, rest = self._spans[0].split(min(queries, self._spans[0].queries))
            self._spans.popleft()
            if rest.queries:
                self._spans.appendleft(rest)
            spans.append(first)
            queries -= first.queries
        taken = self._units(spans)
        add(self.units, taken, -1)
        add(units, taken)
        self._slices_in_flight += 1
        self._sort()
        spans.sort(key=lambda span: (span.position, span.start))
        work = tuple(Work(kind, number) for kind, number in units.items() if number)
        return Slice(self.number, opening, tuple(spans), work, self._opening_lost if opening else ())

    def land(self, slice_: Slice, demands: Sequence[Demand] | None) -> tuple[int, int]:
        """Notes that a slice was answered; the final demands come with an opening.

        Returns:
            (queries that are asked in addition, waiting queries that are withdrawn).
        """
        self._slices_in_flight -= 1
        if not slice_.opening:
            return 0, 0
        self.opened = True
        if demands is None:
            return 0, 0
        unknown, before = self._unknown, self._demands
        self._unknown, self._demands = set(), list(demands)
        known = set(range(len(before))) - unknown
        changed = (position for position in known if before[position] != demands[position])
        withdrawn = self._cut({position: demands[position].queries or 0 for position in changed})
        return self._ask(position for position in range(len(demands)) if position not in known), withdrawn

    def check(self, demands: Sequence[Demand]) -> None:
        """Raises ValueError where final demands go beyond what was admitted."""
        for position, admitted in enumerate(self._demands):
            if admitted.queries is None:
                continue  # what it becomes is bound by the sum below alone
            final = demands[position] if position < len(demands) else None
            if final is None or final.queries is None or final.kind != admitted.kind:
                raise ValueError(f"position {position} was admitted as {admitted}, got {final}")
            if final.queries > admitted.queries or final.weight > admitted.weight:
                raise ValueError(f"position {position} was admitted as {admitted}, got more: {final}")
        for kind, units in bound_of(demands).items():
            if units > self._admitted.get(kind, 0):
                raise ValueError(f"{self._admitted.get(kind, 0)} units of {kind} were admitted, got {units}")

    def settle(self, position: int, queries: int) -> int:
        """Notes how many queries a position asks for which that was not known; returns how many that adds.

        Raises:
            ValueError: the number was known, or it is more than what was admitted.
        """
        demand = self._demands[position]
        if demand.queries is not None:
            raise ValueError(f"position {position} is known to ask {demand.queries} queries")
        if not 0 <= queries <= demand.most:
            raise ValueError(f"position {position} may ask 0 to {demand.most} queries, got {queries}")
        self._demands[position] = replace(demand, queries=queries, most=queries)
        return self._ask([position])

    def withdraw(self, positions: Iterable[int]) -> int:
        """Asks no further query of positions; returns how many had waited. Those in flight may still be answered."""
        self._withdrawn.update(positions)
        withdrawn = self._cut(dict.fromkeys(self._withdrawn, 0))
        self._sort()
        return withdrawn

    def give_back(self, slice_: Slice, lost: tuple[Attempt, ...]) -> Sequence[tuple[Attempt, ...]]:
        """Puts a lost slice before the rest, to be sent again; returns the attempts at which parts of it were lost.

        What is not asked any more waits as well, until `withdraw` takes it away.
        """
        self._slices_in_flight -= 1
        returned = [replace(span, lost=span.lost + lost) for span in slice_.spans if span.queries]
        self._spans.extendleft(reversed(returned))  # extendleft turns the order round
        self.waiting += sum(span.queries for span in returned)
        add(self.units, self._units(returned))
        if slice_.opening:
            self.to_open = True
            self._opening_lost = slice_.lost + lost
        self._sort()
        opening = [self._opening_lost] if slice_.opening else []
        return [*opening, *(span.lost for span in returned if span.position not in self._withdrawn)]

    @property
    def _quiet(self) -> bool:
        """Tells whether it is opened, and nothing of it waits or is in flight."""
        return self.opened and not self.waiting and not self._slices_in_flight

    def _ask(self, positions: Iterable[int]) -> int:
        """Puts the queries of positions among those that wait, as far as their number is known; returns how many."""
        positions = list(positions)
        self._unknown.difference_update(positions)
        self._unknown.update(position for position in positions if self._demands[position].queries is None)
        self.reserved = bound_of(self._demands[position] for position in self._unknown)
        spans = [Span(position, 0, queries) for position in positions if (queries := self._demands[position].queries)]
        self._spans.extend(spans)
        add(self.units, self._units(spans))
        self._sort()
        added = sum(span.queries for span in spans)
        self.waiting += added
        return added

    def _cut(self, stops: Mapping[int, int]) -> int:
        """Withdraws the queries that wait beyond the final number of their position; returns how many."""
        if not stops:
            return 0
        before = self.waiting
        cut = [replace(span, stop=min(span.stop, stops.get(span.position, span.stop))) for span in self._spans]
        self._spans = deque(span for span in cut if span.queries > 0)
        self.waiting = sum(span.queries for span in self._spans)
        self.units = self._units(self._spans)  # the weight may have become less as well
        return before - self.waiting

    def _units(self, spans: Iterable[Span]) -> Units:
        """Returns the units that the queries of spans cost, by kind."""
        units: Units = {}
        for span in spans:
            demand = self._demands[span.position]
            units[demand.kind] = units.get(demand.kind, 0) + demand.weight * span.queries
        return units

    def _sort(self) -> None:
        """Brings the urgency up to date."""
        work = usual_work(self.units) + (usual_work(self.opening) if self.to_open else 0.0)
        self.urgency = (self.rank, self.deadline_s, work, self.number)
