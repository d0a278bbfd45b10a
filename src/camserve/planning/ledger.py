"""Where every query is, by class, by owner and by deadline; each look and each change in O(1)."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from camserve.planning.limits import CLASSES
from camserve.planning.step import Counts, Slice
from camserve.planning.work import Request

if TYPE_CHECKING:
    from camserve.types import Priority

State = Literal["waiting", "in_flight", "done", "cancelled"]

_WIDE = 64
_LATEST = 2.0**40  # seconds; stands for "no deadline"


class Backlog:
    """Queries that wait, by deadline in whole seconds: counts of one second, of 64 and of 4096 seconds."""

    def __init__(self) -> None:
        self._counts: tuple[Counter[int], ...] = (Counter(), Counter(), Counter())

    def add(self, deadline_s: float, queries: int) -> None:
        """So many more, or fewer."""
        second = int(min(deadline_s, _LATEST))
        for counts in self._counts:
            counts[second] += queries
            if not counts[second]:
                del counts[second]
            second //= _WIDE

    def until(self, deadline_s: float) -> int:
        """Those with a deadline in the same second or an earlier one."""
        second = int(min(deadline_s, _LATEST)) + 1
        fine, middle, coarse = self._counts
        block, whole = second // _WIDE, second // _WIDE**2
        return (
            sum(fine[each] for each in range(block * _WIDE, second))
            + sum(middle[each] for each in range(whole * _WIDE, block))
            + sum(queries for each, queries in coarse.items() if each < whole)
        )


@dataclass
class _Owned:
    requests: int = 0
    waiting: int = 0


class Ledger:
    """Counts of queries."""

    def __init__(self) -> None:
        self._asked = [0 for _ in CLASSES]
        self._openings = [0 for _ in CLASSES]  # that wait
        self._states: list[dict[State, int]] = [
            {"waiting": 0, "in_flight": 0, "done": 0, "cancelled": 0} for _ in CLASSES
        ]
        self._backlogs = [Backlog() for _ in CLASSES]
        self._owners: dict[str, _Owned] = defaultdict(_Owned)

    @property
    def waiting(self) -> int:
        """Queries that are in no step yet."""
        return sum(states["waiting"] for states in self._states)

    def counts(self) -> Counts:
        """Where every query is."""
        return sum(self.by_class().values(), Counts())

    def by_class(self) -> dict[Priority, Counts]:
        """Where every query is, by class."""
        rows = zip(CLASSES, self._asked, self._states, strict=True)
        return {name: Counts(asked=asked, **states) for name, asked, states in rows}

    def owned(self, owner: str) -> tuple[int, int]:
        """(requests, waiting queries) of an owner."""
        owned = self._owners.get(owner, _Owned())
        return owned.requests, owned.waiting

    def ahead(self, rank: int, deadline_s: float) -> tuple[int, int]:
        """(openings, queries) that wait in better classes, or in this one: of the queries only those with a deadline
        that is no later."""
        better = sum(states["waiting"] for states in self._states[:rank])
        return sum(self._openings[: rank + 1]), better + self._backlogs[rank].until(deadline_s)

    def comes(self, request: Request) -> None:
        """A request is taken on."""
        self._owners[request.owner].requests += 1
        self._openings[request.rank] += 1
        self.asks(request, request.waiting)

    def goes(self, request: Request) -> None:
        """A request is over; what waits of it is cancelled."""
        self._openings[request.rank] -= request.to_open
        self._move(request, request.waiting, "waiting", "cancelled")
        self._owners[request.owner].requests -= 1
        if not self._owners[request.owner].requests:
            del self._owners[request.owner]

    def asks(self, request: Request, queries: int) -> None:
        """A request asks more queries."""
        self._asked[request.rank] += queries
        self._states[request.rank]["waiting"] += queries
        self._waits(request, queries)

    def sent(self, request: Request, part: Slice) -> None:
        """A slice goes into a step."""
        self._openings[request.rank] -= part.opening
        self._move(request, part.queries, "waiting", "in_flight")

    def returned(self, request: Request, part: Slice) -> None:
        """A slice was lost and waits again."""
        self._openings[request.rank] += part.opening
        self._move(request, part.queries, "in_flight", "waiting")

    def answered(self, request: Request, part: Slice) -> None:
        """A slice was answered."""
        self._move(request, part.queries, "in_flight", "done")

    def written_off(self, request: Request, part: Slice) -> None:
        """A slice of a cancelled request has come back, or is lost."""
        self._move(request, part.queries, "in_flight", "cancelled")

    def _move(self, request: Request, queries: int, state: State, to: State) -> None:
        self._states[request.rank][state] -= queries
        self._states[request.rank][to] += queries
        if state == "waiting":
            self._waits(request, -queries)
        elif to == "waiting":
            self._waits(request, queries)

    def _waits(self, request: Request, queries: int) -> None:
        if queries:
            self._owners[request.owner].waiting += queries
            self._backlogs[request.rank].add(request.deadline_s, queries)
