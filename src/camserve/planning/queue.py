"""Keeps the order in which requests are served.

A request that could go into a step is in one of three lines: *lost* (its next work was lost before), *openings*, or
*started* (opened, with queries that wait). The order in a line is

1. class: interactive, normal, batch;
2. in a class the owner whose last turn is longest ago: owners take turns, however many requests each of them has;
3. of one owner the earliest deadline, then the least work that waits, then first come;
4. and before them all the eldest *aged* request of the line, if there is one.

An owner is a token, or a connection where nobody needs a token.

A request becomes one class better whenever it has lived for another `age_s`; once it is better than interactive, it is
aged: an interactive request after `age_s`, a normal one after 2 `age_s`, a batch one after 3 `age_s`. Only the eldest
aged request of a line goes before its class, and takes no more than its share of a step: a long backlog of batch work
becomes aged as a whole, and must not turn the order round.
"""

from __future__ import annotations

from camserve.planning.heap import Heap
from camserve.planning.limits import CLASSES
from camserve.planning.live import LiveRequest


class Line:
    """Holds requests in the order in which they are served, and beside it the eldest of each class."""

    def __init__(self, age_s: float) -> None:
        self._age_s = age_s
        self._requests: dict[int, LiveRequest] = {}
        self._lanes: dict[str, Heap[int]] = {}  # of each owner, its requests by urgency
        self._owners: Heap[str] = Heap()  # the owners of lanes, by their first request and their turn
        self._turns: dict[str, int] = {}  # when each owner had its last turn
        self._turn = 0
        self._passed_over: set[str] = set()
        self._eldest: tuple[Heap[int], ...] = tuple(Heap() for _ in CLASSES)

    def __len__(self) -> int:
        return len(self._requests)

    def put(self, request: LiveRequest) -> None:
        """Adds a request, or moves it to where it belongs now."""
        self._requests[request.number] = request
        self._lanes.setdefault(request.owner, Heap()).put(request.number, request.urgency)
        self._eldest[request.rank].put(request.number, (request.number,))
        self._sort(request.owner)

    def take(self, request: LiveRequest) -> None:
        """Passes the request over until the next `put` or `drop`, since it goes into a step: its owner's turn."""
        self._lanes[request.owner].drop(request.number)
        self.serve(request.owner)

    def serve(self, owner: str) -> None:
        """Notes that an owner had a turn: the others of a class come before it now."""
        self._turn += 1
        self._turns[owner] = self._turn
        self._sort(owner)

    def turn(self, owner: str) -> int:
        """Returns when an owner had its last turn, counted in turns; 0 where it never had one."""
        return self._turns.get(owner, 0)

    def drop(self, request: LiveRequest) -> None:
        """Removes a request, if it is in the line."""
        if self._requests.pop(request.number, None) is not None:
            if (lane := self._lanes.get(request.owner)) is not None:  # it may have been taken, as the last of its owner
                lane.drop(request.number)
            self._eldest[request.rank].drop(request.number)
            self._sort(request.owner)

    def pass_over(self, owner: str) -> None:
        """Passes an owner over until `pass_over_nobody`."""
        self._passed_over.add(owner)
        self._owners.drop(owner)

    def pass_over_nobody(self) -> None:
        """Puts the owners back that were passed over."""
        passed_over, self._passed_over = self._passed_over, set()
        for owner in passed_over:
            self._sort(owner)

    def first(self, now_s: float) -> LiveRequest | None:
        """Returns the request that is next. Those that come first and whose deadline has passed leave the line."""
        while (owner := self._owners.first()) is not None:
            number = self._lanes[owner].first()
            assert number is not None, "an owner without requests is not in the line"
            request = self._requests[number]
            if now_s < request.expires_s:
                return request
            self.drop(request)  # its owner's next request may be of a worse class than those of others
        return None

    def aged(self, now_s: float) -> LiveRequest | None:
        """Returns the eldest aged request; None where none is aged."""
        heads = [self._living(eldest, now_s) for eldest in self._eldest]
        aged = [head for head in heads if head and now_s - head.came_s >= self._age_s * (head.rank + 1)]
        return min(aged, key=lambda request: request.number, default=None)

    def _sort(self, owner: str) -> None:
        """Puts an owner where it belongs.

        One without requests leaves the line; its turn is remembered for as long as others wait.
        """
        lane = self._lanes.get(owner, Heap())
        if (number := lane.first()) is None:
            self._owners.drop(owner)
            self._lanes.pop(owner, None)
            if not self._lanes:
                self._turns.clear()
                self._turn = 0
        elif owner not in self._passed_over:
            rank, *rest = self._requests[number].urgency
            self._owners.put(owner, (rank, self.turn(owner), *rest))

    def _living(self, heap: Heap[int], now_s: float) -> LiveRequest | None:
        """Returns the first request of a heap whose deadline has not passed."""
        while (number := heap.first()) is not None:
            request = self._requests[number]
            if now_s < request.expires_s:
                return request
            self.drop(request)
        return None


class Queue:
    """The three lines; each request is in one of them at most."""

    def __init__(self, age_s: float) -> None:
        self.lost = Line(age_s)
        self.openings = Line(age_s)
        self.started = Line(age_s)
        self._lines: dict[int, Line] = {}  # where each request is

    def update(self, request: LiveRequest) -> None:
        """Puts a request into the line where it belongs now, if any."""
        line, before = self._line(request), self._lines.get(request.number)
        if before is not None and before is not line:
            self.drop(request)
        if line is not None:
            self._lines[request.number] = line
            line.put(request)

    def drop(self, request: LiveRequest) -> None:
        """Removes a request from its line, if it is in one."""
        line = self._lines.pop(request.number, None)
        if line is not None:
            line.drop(request)

    def _line(self, request: LiveRequest) -> Line | None:
        if request.is_lost:
            return self.lost
        if request.to_open:
            return self.openings
        return self.started if request.opened and request.waiting else None
