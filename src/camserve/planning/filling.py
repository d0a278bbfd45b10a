"""Fills one step: says which requests fit into it, and how they share its time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from camserve.methods.work import Kind
from camserve.planning.backends import BackendState
from camserve.planning.cost import StepCost
from camserve.planning.demand import Demand
from camserve.planning.live import LiveRequest, Units

HASTE = 0.5
"""Fraction of the target time that a step may take in which a request asks for its opening and nothing else."""
FIXED = 0.1
"""Largest fraction of such a step's time that its fixed cost may be; the step is longer where it would be more."""
_ROUNDING = 1e-6  # a query that fits exactly fits, however its seconds were added up


class _Room:
    """The room that queries may still take: seconds, a number of queries, and units of each kind.

    Args:
        cost: says what a query takes, and how many units of a kind are trusted.
        seconds: time for queries.
        queries: number of queries.
        share: fraction of the trusted units of each kind.
    """

    def __init__(self, cost: StepCost, seconds: float, queries: int, share: float = 1.0) -> None:
        self.seconds = seconds
        self.queries = queries
        self._cost = cost
        self._share = share
        self._units: Units = {}

    def shared(self, share: float) -> _Room:
        """Returns the room of one who has a share of this one, at least one query; nothing may be taken from it yet."""
        return _Room(self._cost, share * self.seconds, max(1, int(share * self.queries)), share)

    def count(self, demand: Demand) -> int:
        """Returns how many queries of a demand fit."""
        most = min(self.queries, self._left(demand.kind) // demand.weight)
        query_s = self._cost[demand.kind] * demand.weight
        if query_s and most * query_s > self.seconds:
            most = int(self.seconds / query_s + _ROUNDING)
        return max(0, most)

    def take(self, demand: Demand, queries: int) -> None:
        """Takes room for queries; what is left may be less than nothing."""
        self.seconds -= queries * self._cost[demand.kind] * demand.weight
        self.queries -= queries
        self._units[demand.kind] = self._left(demand.kind) - queries * demand.weight

    def _left(self, kind: Kind) -> int:
        """Returns how many more units of a kind are trusted to fit."""
        left = self._units.get(kind)
        return int(self._share * self._cost.most_units(kind)) if left is None else left


@dataclass
class _Owned:
    """Counts what the requests of one owner take of the step, without their queries."""

    items: int = 0
    size: int = 0
    own_s: float = 0.0
    """Seconds of their openings' own work."""


class _Member:
    """A request in the step, with the number of queries that it has got."""

    def __init__(self, request: LiveRequest, aged: bool, turn: int, waiting_s: float) -> None:
        self.request = request
        self.order = order_of(request, turn, aged)
        self.waiting_s = waiting_s
        self.queries = 0
        self._runs: Iterator[tuple[Demand, int]] = request.runs()
        self._run: tuple[Demand, int] | None = next(self._runs, None)

    @property
    def next_demand(self) -> Demand | None:
        """Demand of the next query of the request; None when it has got all."""
        return self._run[0] if self._run else None

    def grab(self, *rooms: _Room) -> None:
        """Takes queries as long as every room has room for them."""
        while self._run is not None:
            demand, left = self._run
            count = min([left, *(room.count(demand) for room in rooms)])
            if count < left:
                count -= count % demand.piece
            self._grab(count, *rooms)
            if count < left:
                break

    def grab_piece(self, *rooms: _Room) -> None:
        """Takes a query of the next demand, or all that are asked together with it, whether there is room or not."""
        assert self._run is not None
        self._grab(min(self._run[0].piece, self._run[1]), *rooms)

    def _grab(self, queries: int, *rooms: _Room) -> None:
        """Takes queries of the next demand."""
        assert self._run is not None
        demand = self._run[0]
        left = self._run[1] - queries
        self._run = (demand, left) if left else next(self._runs, None)
        self.queries += queries
        for room in rooms:
            room.take(demand, queries)


def order_of(request: LiveRequest, turn: int, aged: bool = False) -> tuple[float, ...]:
    """Returns the key of the order in which the requests of a step get queries, the smallest first."""
    rank, *rest = request.urgency
    return (not aged, rank, turn, *rest)


class Filling:
    """Gathers the requests of one step for one backend, and shares its time and queries out among them."""

    def __init__(self, backend: BackendState) -> None:
        self._cost = backend.cost
        self._limits = backend.limits
        self._members: list[_Member] = []
        self._own_s = 0.0  # the openings' own work
        self._size = 0
        self._openings = 0
        self._owners: dict[str, _Owned] = defaultdict(_Owned)
        self._in_haste = False
        self._cut_s = math.inf

    @property
    def allowed_s(self) -> float:
        """Seconds that the step may take."""
        most_s = min(self._limits.target_s, self._cut_s)
        if not self._in_haste:
            return most_s
        return min(most_s, max(HASTE * self._limits.target_s, self._cost.step_s / FIXED))

    @property
    def behind_openings(self) -> Iterator[Mapping[Kind, int]]:
        """Units of the queries of each request that opens with this step: no other step can have them meanwhile."""
        return (member.request.units for member in self._members if member.request.to_open)

    def has_places(self, spare: int) -> bool:
        """Tells whether one more request may come in as far as items go, with room for `spare` more left."""
        return not self._members or len(self._members) + 1 + spare <= self._limits.items

    def has_room_for(self, request: LiveRequest) -> bool:
        """Tells whether the request may come in.

        An empty step has room for any request, however large it is. The first opening and the first started request
        always have the time, so that neither line can stop the other; a further request needs time for its image, its
        opening's own work, and a query.
        """
        items = len(self._members) + 1
        if not self._members:
            return True
        if items > self._limits.items or self._size + request.size_bytes > self._limits.size_bytes:
            return False
        others = self._openings if request.to_open else len(self._members) - self._openings
        if not others:
            return True
        own_s = self._seconds(request.opening) if request.to_open else 0.0
        return self._fixed_s(items) + own_s + self._first_s(request) <= self._limits.target_s

    def is_half_full_of(self, owner: str) -> bool:
        """Tells whether an owner has half of the step, or more: of its items, of its bytes, or of its time.

        That is so once one more request like those that it has would bring it beyond the half.
        """
        if not owner or owner not in self._owners:
            return False
        has, limits = self._owners[owner], self._limits
        more = (has.items + 1) / has.items
        seconds = has.own_s + has.items * self._cost.item_s
        most = (limits.items / 2, limits.size_bytes / 2, limits.target_s / 2)
        return any(more * had > half for had, half in zip((has.items, has.size, seconds), most, strict=True))

    def has_queries_for(self, request: LiveRequest, turn: int) -> bool:
        """Tells whether those who come before the request would leave it queries, each taking its share at most."""
        # Only aged requests and those that are before it in the order: the request would come in as not aged.
        order = order_of(request, turn)
        before = [each for each in self._members if each.request.waiting and each.order < order]
        if not before:
            return True
        room = self._room()
        share = room.shared(self._limits.share)
        taken_s = sum(min(each.waiting_s, share.seconds) for each in before)
        taken = sum(min(each.request.waiting, share.queries) for each in before)
        return taken_s < room.seconds and taken < room.queries

    def add(self, request: LiveRequest, turn: int = 0, aged: bool = False) -> None:
        """Lets a request in.

        Args:
            request: the request.
            turn: when its owner last had a turn of queries.
            aged: whether it gets its share before the others.
        """
        self._members.append(_Member(request, aged, turn, self._seconds(request.units)))
        self._size += request.size_bytes
        self._in_haste |= request.opens_only
        owned = self._owners[request.owner]
        owned.items += 1
        owned.size += request.size_bytes
        if request.to_open:
            own_s = self._seconds(request.opening)
            self._openings += 1
            self._own_s += own_s
            owned.own_s += own_s

    def cut(self, seconds: float, workers: int) -> None:
        """Has the step end after `seconds` and leave queries to other workers, if that saves more than a step costs.

        Args:
            seconds: when the step shall end, by what units cost in full steps; what cannot be left to others is done
                all the same, and one query.
            workers: number of workers, at least 2.
        """
        fixed_s = self._fixed_s(len(self._members))
        again_s = fixed_s - self._own_s
        whole_s = min(self.allowed_s, fixed_s + sum(member.waiting_s for member in self._members))
        query_s = min((self._first_s(member.request) for member in self._members if member.next_demand), default=0.0)
        # Steps that are not full have more of the fixed cost; and a query more, so that the last one is not left alone.
        seconds += again_s * max(0.0, 1 - seconds / self._limits.target_s)
        cut_s = max(seconds, fixed_s) + query_s
        saved_s = whole_s - cut_s
        if self._openings:
            saved_s -= saved_s / workers  # what is left can only be asked once the opening is back
        if saved_s > again_s + self._limits.lead_s:
            self._cut_s = cut_s

    def shares(self) -> list[tuple[LiveRequest, int]]:
        """Returns how many queries each request gets: first its share at most, then what is left over."""
        members = sorted(self._members, key=lambda member: member.order)
        # `room` shrinks with what is taken; `whole` stays full, since a share is always one of the whole step.
        room, whole = self._room(), self._room()
        asking = [member for member in members if member.next_demand]
        for member in asking:
            share = whole.shared(self._limits.share)
            if member is asking[0]:
                member.grab_piece(room, share)  # one query always goes, however long it takes
            elif (demand := member.next_demand) and share.count(demand) < demand.piece <= room.count(demand):
                member.grab_piece(room, share)  # a query may be larger than a share
            member.grab(room, share)
        for member in asking:
            member.grab(room)
        return [(member.request, member.queries) for member in members]

    def _room(self) -> _Room:
        """Returns the room of all queries of the step together."""
        return _Room(self._cost, self.allowed_s - self._fixed_s(len(self._members)), self._limits.queries)

    def _first_s(self, request: LiveRequest) -> float:
        """Returns the predicted seconds of a request's next query and those asked together with it; 0 without any."""
        first = next(request.runs(), None)
        return self._cost[first[0].kind] * first[0].weight * min(first[0].piece, first[1]) if first else 0.0

    def _fixed_s(self, items: int) -> float:
        """Returns the seconds that the step takes without its queries, with this many images."""
        return self._own_s + items * self._cost.item_s + self._cost.step_s

    def _seconds(self, units: Mapping[Kind, int]) -> float:
        """Returns the predicted seconds of units of work, without those of items and of the step."""
        seconds = 0.0
        for kind, number in units.items():
            seconds += number * self._cost[kind]
        return seconds
