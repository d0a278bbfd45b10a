"""Plans the work of one model: which queries go into the next step, and where it is sent.

Rule 1: every such decision is in this package. Rule 2: nothing here knows torch, asyncio or the clock.

A request asks a number of queries at each of its positions (`Demand`). A query costs a worker a number of units of a
kind of work; what a unit costs is learnt for each worker, so that everything below is in seconds. The first slice
of a request is its *opening*: it brings predictions, resolves the targets, does the work that cannot be divided (the
gradients of a Grad-CAM) and as many queries as it is given. The rest follows once the opening has come back. How many
queries a position asks may depend on how many classes the targets turn out to be; it is then unknown (None) until the
opening has come back. It may stay unknown for longer: the curves of a map are asked when the map exists. The request is
then stalled until `settle` says the number. A request is admitted by the most that it may ask, and never asks more.

A step goes to the backend with the fewest steps in flight for each of its workers, as long as there is room. A backend
with a free worker has room; where all are busy and a second step for each is allowed (`Limits.steps_per_worker`), there
is room for it from `Limits.lead_s` before a worker is predicted to be free on: just in time, so that a Grad-CAM that
comes meanwhile does not wait for a second step. A step is as large as what the slowest worker there does in the target
time, by its learnt cost; in half of that time where a request asks for its opening alone, a Grad-CAM, and has to wait
for the whole step. Where all that waits would not fill a step of each worker, it is as large as ends when the others
do, so that no worker is idle while another has queries; an opening takes one query then, since all workers can have the
rest once it is back. The openings' own work, the images and the step itself are paid from that time first, the queries
share the rest. A step has at most twice the units of a kind of work that the largest step observed had.

Who goes into a step (the order within a line is that of `camserve.planning.queue`: class, turns of the owners,
deadline, least work):

1. Work that was lost goes before anything else, and alone: if a request itself breaks the worker, it takes its
   neighbours down once. It goes to a backend that has not lost it yet, if there is one with workers.
2. The eldest aged request of the started ones, and that of the openings.
3. All openings, whatever their class: a Grad-CAM never waits behind a Score-CAM. One item is left to the started ones,
   and an owner who has half of the step (of its items, its bytes or its time) waits for the openings of the others.
4. Started requests, as long as those that come before leave queries for them.
5. Openings again, as far as there is room.

What does not fit any more waits for the next step with all that its owner has, and goes first there; the others go on.

The first opening and the first started request always have the time; any other comes in only if the time is enough for
its image, its opening's own work and a query. So several expensive openings (a Grad-CAM of 100 targets) do not pile up
in one step, and neither line can stop the other.

The time for queries is shared in the same order, the aged started request first (an opening needs an item, not
queries). While others wait no request takes more than its share of it, or one query if a query is larger than a share
and the time is enough; what is left over is given out in that order again. One query always goes, that of the first,
however long it takes. A request whose deadline has passed is put into no step.

So nothing starves. A request that has become aged is in one of the next `1 + sum(1 + ceil(queries / s))` steps that it
could be in; the sum is over the live requests that came before it, and `s` is the number of queries that a share of the
smallest step holds, at least 1. Steps of lost work are not counted.

Lost work is sent again until its request is to blame, or nobody is left to ask. `camserve.planning.blame` says which
losses count against the request: with two dead or silent workers among them it is at fault, with `MAX_LOSSES` of any
kind it is given up. Losses that count against backends are not counted for the request as long as there is a backend
that it was not lost at.

When nothing fresh is left to send, a step that is overdue by far is sent again to another backend, once. The first
answer of each slice counts.

A request whose map is good enough may stop early: what waits of it is withdrawn and counts as cancelled, what is in
flight may still be answered, and is not sent again where it is lost (`Planner.withdraw`).

Each query is waiting, in flight, done or cancelled, and the four counts always add up to what was asked. That sum is
the first thing to check when something is odd.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from camserve.methods.work import Kind, Work
from camserve.planning.admission import Admission
from camserve.planning.backends import Backends, BackendState
from camserve.planning.blame import Blame
from camserve.planning.cost import Load
from camserve.planning.demand import Demand
from camserve.planning.filling import Filling
from camserve.planning.ledger import Ledger
from camserve.planning.limits import CLASSES, NOBODY, Limits, Owner
from camserve.planning.live import LiveRequest
from camserve.planning.queue import Line, Queue
from camserve.planning.sent import SentSlice, SentStep, StepsInFlight
from camserve.planning.step import Attempt, Counts, Fate, Step, load_of

if TYPE_CHECKING:
    from camserve.types import Priority

MAX_LOSSES = 3
"""A range of queries, or an opening, that is lost this many times fails its request, unless backends are to blame and
another one is there."""
MAX_WORKERS_LOST = 2
"""A range of queries, or an opening, over which this many workers died or fell silent, is at fault itself, unless
backends are to blame."""


class Planner:
    """Plans the waiting and running work of one model; the rules are at the top of this file."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.blame = Blame(limits)
        """Record of what speaks for and against each backend; whoever sends steps tells it what becomes of them."""
        self._requests: dict[int, LiveRequest] = {}
        self._queue = Queue(limits.age_s)
        self._backends = Backends(limits)
        self._in_flight = StepsInFlight()
        self._ledger = Ledger()
        self._admission = Admission(limits, self._ledger, self._backends)
        self._numbers = 0
        self._followers = 0

    def __len__(self) -> int:
        """Returns the number of requests that are neither complete nor cancelled."""
        return len(self._requests)

    def __contains__(self, request: int) -> bool:
        """Tells whether a request is neither complete nor cancelled."""
        return request in self._requests

    @property
    def idle(self) -> bool:
        """Tells whether nothing waits and nothing is in flight."""
        return not self._requests and not self._in_flight

    @property
    def waiting(self) -> int:
        """Number of queries that are not in a step yet."""
        return self._ledger.waiting

    @property
    def followers(self) -> int:
        """Number of callers who follow a live request of another caller: see `join`."""
        return self._followers

    def counts(self) -> Counts:
        """Returns the numbers of queries by state."""
        return self._ledger.counts()

    def counts_by_class(self) -> dict[Priority, Counts]:
        """Returns the numbers of queries by state, for each class."""
        return self._ledger.by_class()

    def waiting_units(self) -> dict[Kind, int]:
        """Returns the units of work that are in no step yet, openings included, without what is only reserved."""
        return {kind: units for kind, units in self._ledger.waiting_units.items() if units}

    def reserved_units(self) -> dict[Kind, int]:
        """Returns the most units that what is not known yet can come to."""
        return {kind: units for kind, units in self._ledger.reserved_units.items() if units}

    def waiting_s(self) -> float:
        """Returns how long one worker would be busy with what waits, without what is only reserved."""
        return self.seconds_of(self._ledger.waiting_units)

    def seconds_of(self, units: Mapping[Kind, int]) -> float:
        """Returns how long one worker is busy with units of work, in full steps and on average over all workers."""
        return self._admission.seconds_of(units)

    def set_workers(self, backend: str, workers: int, limits: Limits | None = None) -> None:
        """Sets how many workers can answer at a backend; with 0 nothing is sent there.

        The steps of a backend may have limits of their own: a GPU takes shorter ones than a CPU.
        """
        self._backends.set_workers(backend, workers, limits)

    def remove_backend(self, backend: str) -> None:
        """Forgets a backend and what was learnt of it; its steps in flight are still to be answered or lost."""
        self._backends.remove(backend)
        self.blame.remove(backend)

    def observe(self, backend: str, worker: str, load: Load, seconds: float, now_s: float) -> None:
        """Learns that a worker was busy with a load for `seconds`."""
        self._backends.observe(backend, worker, load, seconds, now_s)

    def predicted_s(
        self,
        demands: Sequence[Demand],
        *,
        opening: Sequence[Work] = (),
        priority: Priority = "normal",
        deadline_s: float = math.inf,
        owner: Owner = NOBODY,
    ) -> float | None:
        """Returns the seconds until a request that came now would be complete, by the learnt cost.

        The steps in flight have to come back and the openings ahead to go out before its own opening does. The rest of
        its queries follows the queries that wait in better classes, or in its own with an earlier deadline, at the full
        width of all workers. What is not known counts as the most that it can be. Requests that are still to come are
        left out, and so is the share of others in its steps: a request that is predicted to be late will be late. The
        largest request ahead of it takes its share of each step at most, and does not hold up the others for longer.
        Other owners do not hold it up for longer than their turns take.

        Returns:
            The seconds; None as long as nothing was observed.
        """
        return self._admission.predicted_s(demands, opening, priority, deadline_s, owner.party)

    def admit(
        self,
        demands: Sequence[Demand],
        *,
        opening: Sequence[Work] = (),
        now_s: float,
        size_bytes: int = 0,
        deadline_s: float = math.inf,
        priority: Priority = "normal",
        owner: Owner = NOBODY,
        in_time: bool = True,
    ) -> int:
        """Takes on a request and returns its number.

        Args:
            demands: what it asks, by position.
            opening: work that is done with the opening and cannot be divided.
            now_s: time of its arrival, no earlier than that of the request before.
            size_bytes: what the request adds to a step's size.
            deadline_s: from this time on it is put into no step.
            priority: its class.
            owner: who asks, with its own bounds.
            in_time: whether a request that would be late is refused; otherwise it is answered as far as it comes.

        Raises:
            Overloaded: too many requests are there, too much work waits, or it would be late. An idle planner takes
                any request: see `camserve.planning.admission`.
        """
        if self._requests:
            self._admission.check_number(len(self) + self._followers, owner)
            self._admission.check_room(demands, opening)
            self._admission.check_owner(owner, demands, opening)
            if in_time:
                self._admission.check_time(demands, opening, priority, deadline_s, now_s, owner.party)
        request = LiveRequest(
            self._next_number(),
            demands,
            opening,
            size_bytes=size_bytes,
            deadline_s=deadline_s,
            rank=CLASSES.index(priority),
            owner=owner.party,
            came_s=now_s,
        )
        self._requests[request.number] = request
        self._ledger.comes(request, self._admission.is_large(demands))
        self._queue.update(request)
        return request.number

    def join(self, request: int, deadline_s: float = math.inf, owner: Owner = NOBODY) -> None:
        """Counts a caller who follows a live request of another: that adds no work, but is one request more.

        The request stays where it is in the order, and is worked on until the latest deadline.

        Raises:
            Overloaded: too many requests are there, of all or of the owner.
        """
        self._admission.check_number(len(self) + self._followers, owner)
        self._followers += 1
        self._ledger.joins(owner.party)
        live = self._requests[request]
        live.expires_s = max(live.expires_s, deadline_s)
        self._queue.update(live)  # it may have left its line when its own deadline had passed

    def leave(self, owner: Owner = NOBODY) -> None:
        """Counts one caller less who follows a request of another."""
        self._followers -= 1
        self._ledger.leaves(owner.party)

    def next_step(self, now_s: float) -> Step | None:
        """Returns the next step, which counts as sent; None when nothing can be sent now."""
        lost, backend = self._lost_first(now_s)
        if backend is None:
            return None
        filling, queue = Filling(backend), self._queue
        if lost is not None:
            filling.add(lost)
        else:
            self._let_in_aged(filling, now_s)
            self._let_in(filling, queue.openings, now_s, spare=1 if len(queue.started) else 0, halves=True)
            self._let_in(filling, queue.started, now_s)
            self._let_in(filling, queue.openings, now_s)
            self._share_evenly(filling, backend, now_s)
        slices = [self._taken(request, queries) for request, queries in filling.shares()]
        fresh = [each for each in slices if each is not None]
        return self._send(backend, fresh, now_s, filling.allowed_s) if fresh else self._copy_of_overdue(now_s)

    def wake_s(self, now_s: float) -> float | None:
        """Returns when `next_step` may have a step although nothing has come back meanwhile; None where it will not."""
        several = len(self._backends) > 1
        times_s = [self._in_flight.next_due_s(now_s) if several else None]
        if self._has_fresh(now_s) or (several and self._has_overdue(now_s)):
            times_s.append(self._backends.next_room_s(now_s))
        return min((at_s for at_s in times_s if at_s is not None), default=None)

    def done(self, step: int, request: int, demands: Sequence[Demand] | None = None) -> bool:
        """Notes that one slice was answered; returns whether its result counts.

        Args:
            step: number of the step.
            request: number of the request.
            demands: the final demands, with an opening; None leaves them as they were admitted. Known numbers of
                queries may have become less, unknown ones may be known now or still be to come. Other positions may
                have replaced the unknown ones behind the known, as long as the units of each kind, unknown ones at
                their most, are no more than what was admitted.

        Raises:
            ValueError: the demands go beyond what was admitted; nothing is changed then.
        """
        found = self._in_flight.find(step, request)
        if demands is not None and found.slice_.opening and not found.settled and request in self:
            found.request.check(demands)
        backend = self._in_flight.sent(step).backend.name
        landed = self._landed(step, request)
        if landed.settled or self._is_gone(landed):
            return False
        live = landed.request
        for attempt in {attempt for attempts in landed.slice_.attempts for attempt in attempts}:
            if attempt.backend != backend:
                self.blame.contradicted(attempt.backend, request)
        added, withdrawn = live.land(landed.slice_, demands)
        self._ledger.answered(live, landed.slice_)
        if landed.slice_.opening:
            self._ledger.withdraws(live, withdrawn)
            self._ledger.asks(live, added)
        landed.settled = True
        self._changed(live)
        return True

    def is_in_flight(self, step: int, request: int) -> bool:
        """Tells whether a step still carries a slice of a request, which is to be answered or lost."""
        return self._in_flight.carries(step, request)

    def lost(self, step: int, request: int, by_worker: bool = False) -> Fate:
        """Notes that one slice got no answer; returns what becomes of its request.

        Args:
            step: number of the step.
            request: number of the request.
            by_worker: whether a worker died or fell silent over the step.
        """
        sent = self._in_flight.sent(step)
        attempt = Attempt(sent.backend.name, by_worker, alone=len(sent.step.slices) == 1)
        landed = self._landed(step, request)
        if landed.settled or self._is_gone(landed):
            return Fate.GOES_ON if request in self else Fate.OVER
        landed.loses(attempt)
        if landed.carriers:
            return Fate.GOES_ON
        live = landed.request
        histories = live.give_back(landed.slice_, landed.lost)
        self._ledger.returned(live, landed.slice_)
        self._ledger.withdraws(live, live.withdraw(()))
        landed.settled = True
        fate = self._fate(request, histories)
        if fate is Fate.GOES_ON:
            self._changed(live)
        else:
            self.cancel(request)
        return fate

    def cancel(self, request: int) -> None:
        """Drops what waits of a request and ignores what is in flight of it; does nothing the second time."""
        if (live := self._requests.get(request)) is not None:
            self._forget(live)

    def withdraw(self, request: int, positions: Iterable[int]) -> int:
        """Asks no further query of positions of a live request, whose maps are good enough with those answered.

        Those in flight may still be answered, and count then; those that are lost are not sent again.

        Returns:
            How many queries had waited; they count as cancelled.
        """
        live = self._requests[request]
        withdrawn = live.withdraw(positions)
        self._ledger.withdraws(live, withdrawn)
        self._changed(live)
        return withdrawn

    def stalled(self, request: int) -> bool:
        """Tells whether a live request waits for `settle`: all that is known of it was answered."""
        return request in self._requests and self._requests[request].stalled

    def settle(self, request: int, position: int, queries: int) -> None:
        """Sets how many queries a position of a live request asks, which was not known before.

        Raises:
            ValueError: the number was known, or it is more than was admitted for the position; nothing is changed then.
        """
        live = self._requests[request]
        self._ledger.asks(live, live.settle(position, queries))
        self._changed(live)

    def _lost_first(self, now_s: float) -> tuple[LiveRequest | None, BackendState | None]:
        """Returns a backend that has room, and the lost request that shall go there; None for whichever there is not.

        Lost work waits for a backend that has not lost it, and holds up nobody else meanwhile.
        """
        lost = self._queue.lost.first(now_s)
        if lost is not None:
            tried = lost.lost_at if self._backends.working - lost.lost_at else frozenset()
            if (backend := self._backends.least_crowded(now_s, apart_from=tried)) is not None:
                return lost, backend
        return None, self._backends.least_crowded(now_s)

    def _fate(self, request: int, histories: Sequence[Sequence[Attempt]]) -> Fate:
        """Returns what becomes of a request of which parts were lost, each at some attempts."""
        for history in histories:
            against = [attempt for attempt in history if self.blame.is_witness(attempt.backend, request)]
            if sum(attempt.by_worker for attempt in against) >= MAX_WORKERS_LOST:
                self.blame.excuse(request)
                return Fate.AT_FAULT
            if len(against) >= MAX_LOSSES:
                self.blame.excuse(request)
                return Fate.GIVEN_UP
            untried = self._backends.working - {attempt.backend for attempt in history}
            if len(history) >= MAX_LOSSES and not untried:
                return Fate.GIVEN_UP
        return Fate.GOES_ON

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _let_in_aged(self, filling: Filling, now_s: float) -> None:
        """Lets in the eldest aged request of the started ones and that of the openings, the elder of both first."""
        lines = (self._queue.started, self._queue.openings)
        aged = [(request, line) for line in lines if (request := line.aged(now_s))]
        for request, line in sorted(aged, key=lambda pair: pair[0].number):
            if filling.has_room_for(request):
                self._add(filling, request, line, aged=line is self._queue.started)

    def _let_in(self, filling: Filling, line: Line, now_s: float, spare: int = 0, halves: bool = False) -> None:
        """Lets in the first requests of a line.

        An owner whose first one does not fit is passed over, and is the first of the next step: small images do not
        delay a large one, and a large one does not keep those of others out of what is left of the step.

        Args:
            filling: the step.
            line: where the requests come from.
            now_s: the time.
            spare: number of further items that there must be room for.
            halves: whether an owner who has half of the step is passed over.
        """
        passed_over = 0
        while (request := line.first(now_s)) is not None and filling.has_places(spare):
            turn = self._queue.started.turn(request.owner)
            if not request.to_open and not filling.has_queries_for(request, turn):
                break  # nor for those that come after it
            if filling.has_room_for(request) and not (halves and filling.is_half_full_of(request.owner)):
                self._add(filling, request, line)
                continue
            passed_over += 1
            if passed_over > self._limits.items:  # with a step that is nearly full, there may be any number of owners
                break
            line.pass_over(request.owner)
        line.pass_over_nobody()

    def _add(self, filling: Filling, request: LiveRequest, line: Line, aged: bool = False) -> None:
        """Takes a request out of its line into the step."""
        started = self._queue.started
        filling.add(request, started.turn(request.owner), aged)
        line.take(request)
        if line is not started and request.waiting:  # its queries are a turn as well
            started.serve(request.owner)

    def _share_evenly(self, filling: Filling, backend: BackendState, now_s: float) -> None:
        """Has a step leave queries to other workers where all that waits would not fill a step of each.

        What waits behind the openings of the step is not there yet: others can have it as soon as they have come back.
        """
        workers = self._backends.workers
        if workers < 2 or not backend.known:
            return
        waiting_s = self.waiting_s() - sum(map(self.seconds_of, filling.behind_openings))
        if waiting_s < workers * backend.limits.target_s:  # else there is a full step for each of them
            filling.cut((waiting_s + self._backends.left_s(now_s)) / workers, workers)

    def _taken(self, request: LiveRequest, queries: int) -> SentSlice | None:
        """Returns a request's slice of the step, None if nothing is left for it; the request is back in its line."""
        taken = None
        if request.to_open or queries:
            slice_ = request.take(queries)
            self._ledger.sent(request, slice_)
            taken = SentSlice(request, slice_)
        self._queue.update(request)
        return taken

    def _copy_of_overdue(self, now_s: float) -> Step | None:
        """Sends the slices of an overdue step that are still wanted to another backend; None where none can be sent."""
        for sent in self._in_flight.overdue(now_s):
            backend = self._backends.least_crowded(now_s, apart_from={sent.backend.name})
            wanted = [each for each in sent.slices.values() if self._is_wanted(each, now_s)]
            if backend is not None and wanted:
                for each in wanted:
                    each.carriers += 1  # both steps carry the same `SentSlice`: the first answer settles it
                return self._send(backend, wanted, now_s, backend.limits.target_s, copy_of=sent.step.number)
        return None

    def _has_fresh(self, now_s: float) -> bool:
        """Tells whether a request could go into a step, if there were room for one."""
        lines = (self._queue.lost, self._queue.openings, self._queue.started)
        return any(line.first(now_s) is not None for line in lines)

    def _has_overdue(self, now_s: float) -> bool:
        """Tells whether a step is overdue that could be sent again, if there were room for it."""
        overdue = self._in_flight.overdue(now_s)
        return any(self._is_wanted(each, now_s) for sent in overdue for each in sent.slices.values())

    def _is_wanted(self, sent: SentSlice, now_s: float) -> bool:
        """Tells whether somebody still waits for a slice in flight."""
        return sent.request.number in self and now_s < sent.request.expires_s

    def _send(
        self,
        backend: BackendState,
        sent: Sequence[SentSlice],
        now_s: float,
        allowed_s: float,
        copy_of: int | None = None,
    ) -> Step:
        """Makes a step of slices and notes that it is in flight."""
        slices = tuple(each.slice_ for each in sent)
        predicted_s = backend.cost.predict(load_of(slices))
        expected_s = backend.pace * predicted_s
        step = Step(self._next_number(), backend.name, slices, copy_of, predicted_s, allowed_s, expected_s)
        due_s = now_s + self._patience_s(backend, predicted_s)
        self._in_flight.add(SentStep(step, backend, due_s, {each.request.number: each for each in sent}))
        self._backends.sends(backend, step, now_s)
        return step

    def _patience_s(self, backend: BackendState, predicted_s: float) -> float:
        """Returns after how many seconds a step is overdue, which includes the steps before it at its backend."""
        if not backend.known:
            return math.inf
        expected_s = predicted_s + backend.in_flight_s / backend.workers
        return max(self._limits.straggler_s, self._limits.straggler_factor * expected_s)

    def _landed(self, step: int, request: int) -> SentSlice:
        """Returns a slice that has come back, or is lost; the last one of a step takes the step off its backend."""
        landed = self._in_flight.land(step, request)
        if (over := self._in_flight.over(step)) is not None:
            self._backends.gets_back(over.backend, over.step)
        return landed

    def _is_gone(self, sent: SentSlice) -> bool:
        """Tells whether the request of a slice is over; the slice is then written off."""
        if sent.request.number in self:
            return False
        self._ledger.written_off(sent.request, sent.slice_)
        sent.settled = True
        return True

    def _changed(self, request: LiveRequest) -> None:
        """Puts a request where it belongs after an answer or a loss."""
        if request.complete:
            self._forget(request)
        else:
            self._queue.update(request)

    def _forget(self, request: LiveRequest) -> None:
        """Drops a request that is complete or cancelled everywhere."""
        del self._requests[request.number]
        self._ledger.goes(request)
        self._queue.drop(request)
