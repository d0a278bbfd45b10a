"""Counts queries by state, and units of work by class, by owner and by deadline."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from camserve.methods.work import Kind
from camserve.planning.limits import CLASSES
from camserve.planning.live import LiveRequest, Units, add
from camserve.planning.step import Counts, Slice

if TYPE_CHECKING:
    from camserve.types import Priority

State = Literal["waiting", "in_flight", "done", "cancelled"]

_WIDE = 64
"""Number of intervals of one width that make one interval of the next."""
_LATEST = 2.0**40
"""Seconds that stand for "no deadline"."""


class Backlog:
    """Counts the units that wait by deadline, in whole seconds.

    It counts the same units by intervals of 1, of 64 and of 4096 seconds, so that `until` adds up at most 64 numbers of
    each of the narrower ones instead of one for each second.
    """

    def __init__(self) -> None:
        self._counts: tuple[Counter[int], ...] = (Counter(), Counter(), Counter())

    def add(self, deadline_s: float, units: int) -> None:
        """Adds units; a negative number takes them away."""
        second = int(min(deadline_s, _LATEST))
        for counts in self._counts:
            counts[second] += units
            if not counts[second]:
                del counts[second]
            second //= _WIDE

    def until(self, deadline_s: float) -> int:
        """Returns how many units have a deadline in the same second or an earlier one."""
        second = int(min(deadline_s, _LATEST)) + 1
        fine, middle, coarse = self._counts
        # [0, second) is cut where the wider intervals end: coarse ones up to `whole`, then middle ones, then seconds.
        block, whole = second // _WIDE, second // _WIDE**2
        return (
            sum(fine[each] for each in range(block * _WIDE, second))
            + sum(middle[each] for each in range(whole * _WIDE, block))
            + sum(units for each, units in coarse.items() if each < whole)
        )


@dataclass
class _Entry:
    """Entry of one live request in the books."""

    to_open: bool = False
    """Whether the opening, with its own work, waits."""
    queries: Units = field(default_factory=dict)
    """Units of the queries that wait."""
    reserved: Units = field(default_factory=dict)
    """The most units that the positions come to whose number of queries is not known yet."""


@dataclass
class _Class:
    """Entry of one class in the books: what waits in it, of all owners or of one."""

    openings: int = 0
    """Number of openings that wait."""
    opening_units: Units = field(default_factory=dict)
    query_units: Units = field(default_factory=dict)

    @property
    def asks(self) -> bool:
        """Tells whether queries wait."""
        return any(self.query_units.values())


@dataclass
class _Owned:
    """Entry of one owner in the books."""

    requests: int = 0
    """Number of live requests."""
    units: Units = field(default_factory=dict)
    """Their units that wait or are reserved."""
    classes: tuple[_Class, ...] = field(default_factory=lambda: tuple(_Class() for _ in CLASSES))
    backlogs: tuple[dict[Kind, Backlog], ...] = field(default_factory=lambda: tuple({} for _ in CLASSES))
    """Units of the queries that wait by deadline, for each class and kind."""


@dataclass(frozen=True)
class Ahead:
    """Says what waits before a request of an owner, in its class and in better ones."""

    own: Units
    """Units of the owner's own that come before it."""
    others: Units
    """Units of all others, of which their turns decide what comes before it."""
    owners: int
    """Number of those others, at most."""
    part: float = 1.0
    """Part of their openings that comes before it, since each has a turn for each opening of the owner."""


class Ledger:
    """Counts queries by state, and units of work by class, owner and deadline.

    Each move of queries from state to state is told by a call. The books have units that wait, are reserved or are in
    flight, and no others; `update` compares a request with its entry and books the difference.
    """

    def __init__(self) -> None:
        self._asked = [0 for _ in CLASSES]
        self._states: list[dict[State, int]] = [
            {"waiting": 0, "in_flight": 0, "done": 0, "cancelled": 0} for _ in CLASSES
        ]
        self._entries: dict[int, _Entry] = {}
        self._classes: tuple[_Class, ...] = tuple(_Class() for _ in CLASSES)
        self._opening = [0 for _ in CLASSES]  # number of owners with openings that wait
        self._asking = [0 for _ in CLASSES]  # number of owners with queries that wait
        self._in_flight: Units = {}
        self._waiting: Units = {}
        self._reserved: Units = {}
        self._owners: dict[str, _Owned] = defaultdict(_Owned)
        self._large: dict[int, LiveRequest] = {}

    @property
    def waiting(self) -> int:
        """Number of queries that are in no step yet."""
        return sum(states["waiting"] for states in self._states)

    @property
    def waiting_units(self) -> Units:
        """Units of openings and queries that are in no step yet, without what is only reserved."""
        return self._waiting

    @property
    def reserved_units(self) -> Units:
        """The most units that all positions come to whose number of queries is not known yet."""
        return self._reserved

    @property
    def large(self) -> Iterable[LiveRequest]:
        """Live requests that were said to be large ones when they came."""
        return self._large.values()

    def is_worked_on(self, kind: Kind) -> bool:
        """Tells whether work of a kind waits, is sent or still to come, so that a step will say what it costs."""
        return self._waiting.get(kind, 0) + self._in_flight.get(kind, 0) + self._reserved.get(kind, 0) > 0

    def counts(self) -> Counts:
        """Returns the numbers of queries by state."""
        return sum(self.by_class().values(), Counts())

    def by_class(self) -> dict[Priority, Counts]:
        """Returns the numbers of queries by state, for each class."""
        rows = zip(CLASSES, self._asked, self._states, strict=True)
        return {name: Counts(asked=asked, **states) for name, asked, states in rows}

    def owned(self, owner: str) -> tuple[int, Units]:
        """Returns how many live requests an owner has, and their units that wait or are reserved."""
        owned = self._owners.get(owner, _Owned())
        return owned.requests, owned.units

    def openings_ahead(self, rank: int, owner: str) -> Ahead:
        """Returns what the openings come to that wait before one of an owner, in its class and in better ones."""
        mine = self._owners.get(owner, _Owned()).classes[: rank + 1]
        own, others = (
            _sum(each.opening_units for each in mine),
            _sum(each.opening_units for each in self._classes[: rank + 1]),
        )
        add(others, own, -1)
        own_number = sum(each.openings for each in mine)
        number = sum(each.openings for each in self._classes[: rank + 1]) - own_number
        owners = sum(self._opening[: rank + 1]) - sum(each.openings > 0 for each in mine)
        return Ahead(own, others, owners, min(1.0, owners * (own_number + 1) / number) if number else 1.0)

    def queries_ahead(self, rank: int, deadline_s: float, owner: str) -> Ahead:
        """Returns what the queries come to that wait before those of an owner, in its class and in better ones.

        The owner's own come before it in better classes, or in this one with no later deadline.
        """
        owned = self._owners.get(owner, _Owned())
        mine = owned.classes[: rank + 1]
        own = _sum(each.query_units for each in mine[:rank])
        for kind, number in mine[rank].query_units.items():
            if number:
                add(own, {kind: owned.backlogs[rank][kind].until(deadline_s)})
        others = _sum(each.query_units for each in self._classes[: rank + 1])
        for each in mine:
            add(others, each.query_units, -1)
        return Ahead(own, others, sum(self._asking[: rank + 1]) - sum(each.asks for each in mine))

    def comes(self, request: LiveRequest, large: bool = False) -> None:
        """Notes that a request is taken on; a large one shows up in `large` as long as it lives."""
        self.joins(request.owner)
        if large:
            self._large[request.number] = request
        self._entries[request.number] = _Entry()
        self.asks(request, request.waiting)

    def joins(self, owner: str) -> None:
        """Notes that an owner has one request more."""
        self._owners[owner].requests += 1

    def leaves(self, owner: str) -> None:
        """Notes that an owner has one request less."""
        self._owners[owner].requests -= 1
        if not self._owners[owner].requests:
            del self._owners[owner]

    def goes(self, request: LiveRequest) -> None:
        """Notes that a request is over; its queries that wait are cancelled."""
        self._move(request, request.waiting, "waiting", "cancelled")
        self._replace(request, _Entry())
        del self._entries[request.number]
        self._large.pop(request.number, None)
        self.leaves(request.owner)

    def asks(self, request: LiveRequest, queries: int) -> None:
        """Notes that a request asks more queries."""
        self._asked[request.rank] += queries
        self._states[request.rank]["waiting"] += queries
        self.update(request)

    def withdraws(self, request: LiveRequest, queries: int) -> None:
        """Notes that a request no longer asks queries that wait."""
        self._move(request, queries, "waiting", "cancelled")
        self.update(request)

    def sent(self, request: LiveRequest, slice_: Slice) -> None:
        """Notes that a slice goes into a step."""
        self._move(request, slice_.queries, "waiting", "in_flight")
        self._count_in_flight(slice_, 1)
        self.update(request)

    def returned(self, request: LiveRequest, slice_: Slice) -> None:
        """Notes that a slice was lost and waits again."""
        self._move(request, slice_.queries, "in_flight", "waiting")
        self._count_in_flight(slice_, -1)
        self.update(request)

    def answered(self, request: LiveRequest, slice_: Slice) -> None:
        """Notes that a slice was answered."""
        self._move(request, slice_.queries, "in_flight", "done")
        self._count_in_flight(slice_, -1)

    def written_off(self, request: LiveRequest, slice_: Slice) -> None:
        """Notes that a slice of a cancelled request has come back, or is lost."""
        self._move(request, slice_.queries, "in_flight", "cancelled")
        self._count_in_flight(slice_, -1)

    def update(self, request: LiveRequest) -> None:
        """Brings the books up to what waits and what is reserved of a live request."""
        self._replace(request, _Entry(request.to_open, request.units.copy(), request.reserved))

    def _replace(self, request: LiveRequest, entry: _Entry) -> None:
        """Puts another entry in the books for a request, and books the difference everywhere."""
        before = self._entries[request.number]
        self._entries[request.number] = entry
        owned, rank = self._owners[request.owner], request.rank
        books, own = self._classes[rank], owned.classes[rank]
        had_openings, asked = own.openings > 0, own.asks
        if entry.to_open != before.to_open:
            times = 1 if entry.to_open else -1
            books.openings += times
            own.openings += times
            for units in (books.opening_units, own.opening_units, self._waiting, owned.units):
                add(units, request.opening, times)
        if entry.queries != before.queries:
            more = add(entry.queries.copy(), before.queries, -1)
            for units in (books.query_units, own.query_units, self._waiting, owned.units):
                add(units, more)
            for kind, number in more.items():
                if number:
                    owned.backlogs[rank].setdefault(kind, Backlog()).add(request.deadline_s, number)
        self._opening[rank] += (own.openings > 0) - had_openings
        self._asking[rank] += own.asks - asked
        # A request replaces `reserved` and never changes it in place, so that identity tells whether it is another.
        if entry.reserved is not before.reserved:
            for units in (self._reserved, owned.units):
                add(add(units, entry.reserved), before.reserved, -1)

    def _count_in_flight(self, slice_: Slice, sign: int) -> None:
        for work in slice_.work:
            self._in_flight[work.kind] = self._in_flight.get(work.kind, 0) + sign * work.units

    def _move(self, request: LiveRequest, queries: int, state: State, to: State) -> None:
        self._states[request.rank][state] -= queries
        self._states[request.rank][to] += queries


def _sum(several: Iterable[Units]) -> Units:
    """Returns the units of several together, by kind."""
    units: Units = {}
    for each in several:
        add(units, each)
    return units
