"""Decides which masked queries go into the next step and where it is sent, for one model.

Rule 1: every such decision is in this package. Rule 2: nothing here knows torch, asyncio or the clock.

A request asks for a number of queries of each of its methods. Its first slice is its *opening*: it brings predictions,
resolves the targets, makes the gradient maps (which take no queries) and as many masked queries as it is given. The
rest follows once the opening has come back. A total may depend on how many classes the targets turn out to be; it is
then unknown (None) until the opening has come back. It may stay unknown for longer: the curves of a map are asked when
the map exists. The request is then stalled until `settle` says the total.

Where a step goes: to the place with the fewest steps in flight for each of its workers, as long as there is room. How
large it is: as many queries as the slowest worker there does in the target time, by the fitted cost; in half of it
where somebody asks for an opening alone, a Grad-CAM, and has to wait for the whole step.

Who goes into a step (the order within a line is that of `camserve.planning.queue`: class, deadline, least work):

1. Work that was lost goes before anything else, and alone: if a request itself breaks the worker, it takes its
   neighbours down once, not three times.
2. The eldest aged request of the started ones, and that of the openings.
3. All openings, whatever their class: a Grad-CAM never waits behind a Score-CAM. One place is left to the started ones.
4. Started requests, as long as those more urgent leave queries for them.

The step's queries are shared in the order of urgency, the aged started request first (an opening needs a place, not
queries). While others wait no request takes more than its share of them; what is left over is given out in that order
again. Whose deadline has passed is put into no step.

So nothing starves. A request that has become aged is in one of the next `1 + sum(1 + ceil(queries / s))` steps that it
could be in; the sum is over the live requests that came before it, and `s = max(1, share * budget)` is of the smallest
step. Steps of lost work are not counted; there are at most two for each slice.

When nothing fresh is left to send, a step that is overdue by far is sent again to another place, once. The first answer
of each slice counts.

Each query is waiting, in flight, done or cancelled, and the four counts always add up to what was asked. That sum is
the first thing to check when something is odd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from camserve.errors import Overloaded
from camserve.planning.cost import in_words
from camserve.planning.draft import Draft
from camserve.planning.flights import Flight, Flights, Piece
from camserve.planning.ledger import Ledger
from camserve.planning.limits import CLASSES, NOBODY, Limits, Owner
from camserve.planning.places import Place, Places
from camserve.planning.queue import Line, Queue
from camserve.planning.step import Counts, Slice, Step
from camserve.planning.work import Request

if TYPE_CHECKING:
    from camserve.types import Priority

MAX_LOSSES = 3
"""A piece of work that is lost this often fails its request: it is sent again at most twice."""


class Planner:
    """The waiting and running work of one model."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._requests: dict[int, Request] = {}  # live ones
        self._queue = Queue(limits.age_s)
        self._places = Places(limits)
        self._flights = Flights()
        self._ledger = Ledger()
        self._numbers = 0

    def __len__(self) -> int:
        """Requests that are neither complete nor cancelled."""
        return len(self._requests)

    def __contains__(self, request: int) -> bool:
        """The request is neither complete nor cancelled."""
        return request in self._requests

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is in flight."""
        return not self._requests and not self._flights

    @property
    def waiting(self) -> int:
        """Masked queries that are not in a step yet."""
        return self._ledger.waiting

    def counts(self) -> Counts:
        """Where every query is."""
        return self._ledger.counts()

    def counts_by_class(self) -> dict[Priority, Counts]:
        """Where every query is, by class."""
        return self._ledger.by_class()

    def set_workers(self, place: str, workers: int, limits: Limits | None = None) -> None:
        """So many workers can answer at a place; with 0 nothing is sent there. Its steps may have limits of their own:
        a GPU takes shorter ones than a CPU."""
        self._places.set_workers(place, workers, limits)

    def remove_place(self, place: str) -> None:
        """Forgets a place and what was learnt of it. Its steps in flight are still to be answered or lost."""
        self._places.remove(place)

    def observe(self, place: str, worker: str, queries: int, images: int, seconds: float, now_s: float) -> None:
        """A worker was busy for so long with a step of so many queries and images."""
        found = self._places.get(place)
        if found is not None:
            found.observe(worker, queries, images, seconds, now_s)

    def predicted_s(self, queries: int, *, priority: Priority = "normal", deadline_s: float = math.inf) -> float | None:
        """Seconds until a request that came now would be complete, by the fitted cost.

        What is in flight has to come back, the openings ahead go out, and then its own. The rest of its queries follows
        the queries that wait in better classes, or in its own with an earlier deadline, at the full width of all
        workers. No request to come is thought of, and the share of others in its steps is not either: a request that is
        predicted to be late will be late.

        Returns:
            None as long as nothing was observed.
        """
        pace = self._places.pace()
        if pace is None:
            return None
        rank = CLASSES.index(priority)
        first = min(queries, pace.step_queries)
        openings, ahead = self._ledger.ahead(rank, deadline_s)
        seconds = pace.flying_s + openings / pace.images_per_s + pace.cost.predict(first, 1)
        if queries:
            seconds += (ahead + queries - first) / pace.queries_per_s
        return seconds

    def admit(
        self,
        totals: Sequence[int | None],
        *,
        now_s: float,
        size_bytes: int = 0,
        deadline_s: float = math.inf,
        priority: Priority = "normal",
        owner: Owner = NOBODY,
        in_time: bool = True,
    ) -> int:
        """Takes on a request and returns its number.

        Args:
            totals: for each position how many queries it asks; None where that is not known yet.
            now_s: time of its arrival; later arrivals have no earlier one.
            size_bytes: what the request adds to a step's size.
            deadline_s: from this time on it is put into no step.
            priority: its class.
            owner: who asks, with its own bounds.
            in_time: refuse what would be late; otherwise it is answered as far as it comes.

        Raises:
            Overloaded: too many requests or queries wait, or it would be late: predicted to end after its deadline.
        """
        queries = sum(total or 0 for total in totals)
        self._check_room(queries)
        self._check_owner(owner, queries)
        if in_time:
            self._check_time(queries, priority, deadline_s, now_s)
        request = Request(
            self._next_number(),
            totals,
            size_bytes=size_bytes,
            deadline_s=deadline_s,
            rank=CLASSES.index(priority),
            owner=owner.name,
            came_s=now_s,
        )
        self._requests[request.number] = request
        self._ledger.comes(request)
        self._queue.update(request)
        return request.number

    def next_step(self, now_s: float) -> Step | None:
        """The next step; None when nothing can be sent now."""
        place = self._places.free()
        if place is None:
            return None
        taken = [self._taken(request, share) for request, share in self._draft(place, now_s).shares()]
        pieces = [piece for piece in taken if piece is not None]
        return self._send(place, pieces, now_s) if pieces else self._second_try(now_s)

    def allowed_queries(self, step: Step) -> int:
        """The most queries that a step just made may have at its place with so many images, by the fitted cost."""
        place = self._places.get(step.place)
        return step.queries if place is None else place.budget(len(step.slices))

    def wake_s(self, now_s: float) -> float | None:
        """When `next_step` may have something to send although nothing has come back; None: it will not."""
        return self._flights.next_due_s(now_s) if len(self._places) > 1 else None

    def done(self, step: int, request: int, totals: Sequence[int | None] | None = None) -> bool:
        """One slice has been answered. True when its result counts, False when it is to be ignored.

        Args:
            totals: with an opening, the final number of queries of each position, perhaps of more positions than were
                admitted, or None where it is still to come; may be left out if all were known.
        """
        piece = self._landed(step, request)
        if piece.settled or self._is_gone(piece):
            return False
        live = piece.request
        self._ledger.answered(live, piece.part)
        self._ledger.asks(live, live.land(piece.part.opening, totals))
        piece.settled = True
        self._changed(live)
        return True

    def lost(self, step: int, request: int) -> bool:
        """One slice got no answer. True when its request goes on: the slice waits again, or its other copy is answered
        or on its way. False when the request is over: cancelled, or this was lost too often."""
        piece = self._landed(step, request)
        if piece.settled or self._is_gone(piece):
            return request in self
        if piece.carriers:
            return True
        live = piece.request
        self._ledger.returned(live, piece.part)
        losses = live.give_back(piece.part.opening, piece.part.spans)
        piece.settled = True
        if losses == MAX_LOSSES:
            self.cancel(request)
            return False
        self._changed(live)
        return True

    def cancel(self, request: int) -> None:
        """Drops what waits of a request and ignores what is in flight. Does nothing the second time."""
        if (live := self._requests.get(request)) is not None:
            self._forget(live)

    def stalled(self, request: int) -> bool:
        """All that is known of a live request has been answered, but a total is still to come."""
        return request in self._requests and self._requests[request].stalled

    def settle(self, request: int, position: int, total: int) -> None:
        """The total of one position of a live request, which was None."""
        live = self._requests[request]
        self._ledger.asks(live, live.settle(position, total))
        self._changed(live)

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _check_room(self, queries: int) -> None:
        if len(self) >= self._limits.requests:
            text = f"at most {self._limits.requests} requests are taken on at once; try again later"
            raise Overloaded(text, reason="requests")
        excess = self.waiting + queries - self._limits.waiting_queries
        if self._requests and excess > 0:
            text = f"at most {self._limits.waiting_queries} masked queries may wait; try again later"
            raise Overloaded(text, self._worked_off_s(excess), "queries")

    def _check_owner(self, owner: Owner, queries: int) -> None:
        if not owner.name:
            return
        requests, waiting = self._ledger.owned(owner.name)
        most = owner.requests
        if most is not None and requests >= most:
            text = f"at most {most} requests of {owner.name} are taken on at once; try again later"
            raise Overloaded(text, reason="token_requests")
        most = owner.waiting_queries
        if most is not None and requests and waiting + queries > most:
            text = f"at most {most} masked queries of {owner.name} may wait; try again later"
            raise Overloaded(text, self._worked_off_s(waiting + queries - most), "token_queries")

    def _check_time(self, queries: int, priority: Priority, deadline_s: float, now_s: float) -> None:
        if math.isinf(deadline_s):
            return
        seconds = self.predicted_s(queries, priority=priority, deadline_s=deadline_s)
        if seconds is not None and now_s + seconds > deadline_s:
            left, takes = in_words(deadline_s - now_s), in_words(seconds)
            text = f"the deadline is in {left}, but by what steps take now this would take {takes}; try again later"
            raise Overloaded(text, now_s + seconds - deadline_s, "deadline")

    def _worked_off_s(self, queries: int) -> float | None:
        pace = self._places.pace()
        return None if pace is None else queries / pace.queries_per_s

    def _draft(self, place: Place, now_s: float) -> Draft:
        draft, queue = Draft(place), self._queue
        if (suspect := queue.suspects.first(now_s)) is not None:
            draft.add(suspect)
            return draft
        aged = [(request, line) for line in (queue.started, queue.openings) if (request := line.aged(now_s))]
        for request, line in sorted(aged, key=lambda pair: pair[0].number):
            if draft.fits(request):
                line.take(request)
                draft.add(request, aged=line is queue.started)
        self._let_in(draft, queue.openings, now_s, spare=1 if len(queue.started) else 0)
        self._let_in(draft, queue.started, now_s)
        self._let_in(draft, queue.openings, now_s)
        return draft

    def _let_in(self, draft: Draft, line: Line, now_s: float, spare: int = 0) -> None:
        """The first ones of a line come in. It is not jumped, so that a large image does not wait for smaller ones."""
        while (request := line.first(now_s)) is not None and draft.fits(request, spare):
            if not (request.to_open or draft.has_queries_for(request)):
                break
            line.take(request)
            draft.add(request)

    def _taken(self, request: Request, queries: int) -> Piece | None:
        """The request's slice of the step; None if nothing is left for it. It goes back into its line."""
        piece = None
        if request.to_open or queries:
            part = Slice(request.number, request.to_open, request.take(queries))
            self._ledger.sent(request, part)
            piece = Piece(request, part)
        self._queue.update(request)
        return piece

    def _second_try(self, now_s: float) -> Step | None:
        """An overdue step once more, for another place; the slices that are still wanted."""
        for flight in self._flights.overdue(now_s):
            place = self._places.free(apart_from=flight.place.name)
            pieces = [piece for piece in flight.pieces.values() if self._is_wanted(piece, now_s)]
            if place is not None and pieces:
                for piece in pieces:
                    piece.carriers += 1
                return self._send(place, pieces, now_s, copy_of=flight.step.number)
        return None

    def _is_wanted(self, piece: Piece, now_s: float) -> bool:
        return piece.request.number in self and now_s < piece.request.deadline_s

    def _send(self, place: Place, pieces: Sequence[Piece], now_s: float, copy_of: int | None = None) -> Step:
        step = Step(self._next_number(), place.name, tuple(piece.part for piece in pieces), copy_of)
        predicted_s = place.cost.predict(step.queries, len(pieces))
        due_s = now_s + self._patience_s(place, predicted_s)
        by_request = {piece.request.number: piece for piece in pieces}
        self._flights.add(Flight(step, place, predicted_s, due_s, by_request))
        self._places.sends(place, predicted_s)
        return step

    def _patience_s(self, place: Place, predicted_s: float) -> float:
        """After how long a step is overdue; the steps before it at its place have to be done as well."""
        if not place.known:
            return math.inf
        expected_s = predicted_s + place.flying_s / place.workers
        return max(self._limits.straggler_s, self._limits.straggler_factor * expected_s)

    def _landed(self, step: int, request: int) -> Piece:
        piece = self._flights.land(step, request)
        flight = self._flights.over(step)
        if flight is not None:
            self._places.gets_back(flight.place, flight.predicted_s)
        return piece

    def _is_gone(self, piece: Piece) -> bool:
        """The request was cancelled; what comes of its queries is written off."""
        if piece.request.number in self:
            return False
        self._ledger.written_off(piece.request, piece.part)
        piece.settled = True
        return True

    def _changed(self, request: Request) -> None:
        """Puts a request where it belongs after an answer or a loss."""
        if request.complete:
            self._forget(request)
        else:
            self._queue.update(request)

    def _forget(self, request: Request) -> None:
        del self._requests[request.number]
        self._ledger.goes(request)
        self._queue.drop(request)
