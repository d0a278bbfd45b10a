"""Decides whether a request is taken on, and predicts how long it would take.

Everything is measured in seconds of predicted work. Work that waits counts in full, work that is not known yet as the
most that it can come to; both have to fit under the bounds of the server and of the owner. Only the time that a request
itself will take is predicted by what such requests usually ask, where they may stop early. A request that adds nothing
that could be divided (a Grad-CAM) is refused for its deadline or for the number of requests, never for lack of room.

No request fills the room alone: it counts for half of it at most, so that the others always have the other half. Steps
are shared fairly, so that a large request that is taken on slows the others down, but does not shut them out.

A prediction never cuts off its own feedback: what is refused is never measured, so that a wrong prediction would
stay. That is why an idle planner takes any request, and nobody is refused for a deadline on account of a kind of work
of which nothing waits, is in flight or is still to come, since no step would then say what it really takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from camserve.errors import Overloaded
from camserve.methods.work import Kind, Work
from camserve.planning.backends import Backends, BackendState
from camserve.planning.cost import Load, in_words
from camserve.planning.demand import Demand
from camserve.planning.ledger import Ledger
from camserve.planning.limits import CLASSES, Limits, Owner
from camserve.planning.live import add, bound_of, units_of, usual_of

if TYPE_CHECKING:
    from camserve.types import Priority


_LARGE = 64
"""Part of the room from which on a request counts as a large one."""


class Admission:
    """Holds requests against the bounds of one planner and of their owners."""

    def __init__(self, limits: Limits, ledger: Ledger, backends: Backends) -> None:
        self._limits = limits
        self._ledger = ledger
        self._backends = backends

    def seconds_of(self, units: Mapping[Kind, int]) -> float:
        """Returns how long one worker is busy with units, in full steps and on average over all workers."""
        unit_s = self._backends.unit_s
        seconds = 0.0
        for kind, number in units.items():
            seconds += number * unit_s[kind]
        return seconds

    def predicted_s(
        self,
        demands: Sequence[Demand],
        opening: Sequence[Work],
        priority: Priority,
        deadline_s: float,
        owner: str = "",
    ) -> float | None:
        """Returns what `Planner.predicted_s` says."""
        known = self._backends.known
        if not known:
            return None
        rank, workers = CLASSES.index(priority), self._backends.workers
        own, queries_s = units_of(opening), self.seconds_of(usual_of(demands))
        opening_s, left_s = min(_opening_s(backend, own) for backend in known)
        first_s = min(queries_s, left_s)
        seconds = self._backends.in_flight_s + opening_s + first_s
        openings = self._ledger.openings_ahead(rank, owner)
        seconds += self.seconds_of(openings.own) / workers
        seconds += openings.part * self.seconds_of(openings.others) / workers
        if queries_s:
            queries = self._ledger.queries_ahead(rank, deadline_s, owner)
            own_s = self.seconds_of(queries.own) + queries_s
            if self._limits.share < 1:
                # The largest one that goes first takes its share of each step at most, so the others have the rest.
                beside_s = own_s - self._largest_ahead_s(rank, deadline_s, owner)
                own_s = min(own_s, beside_s / (1 - self._limits.share))
            # Each of the other owners has as much of the steps meanwhile, as long as it asks for more.
            others_s = min(self.seconds_of(queries.others), queries.owners * own_s)
            seconds += (own_s + others_s - first_s) / workers
        return seconds

    def check_number(self, requests: int, owner: Owner) -> None:
        """Raises Overloaded where the server, or the owner, has as many requests as it may have."""
        if requests >= self._limits.requests:
            text = f"at most {self._limits.requests} requests are taken on at once; try again later"
            raise Overloaded(text, reason="requests")
        most = max(1, int(owner.part * self._limits.requests)) if owner.requests is None else owner.requests
        if owner.name and self._ledger.owned(owner.name)[0] >= most:
            text = f"at most {most} requests of {owner.name} are taken on at once; try again later"
            raise Overloaded(text, reason="token_requests")

    def check_room(self, demands: Sequence[Demand], opening: Sequence[Work]) -> None:
        """Raises Overloaded where too much work would wait for each worker."""
        asked = bound_of(demands)
        if not asked:
            return
        there_s, more_s = self._there_s(), self._each_s(add(units_of(opening), asked))
        excess_s = there_s + more_s - self._limits.waiting_s
        if excess_s > 0:
            text = (
                f"at most {in_words(self._limits.waiting_s)} of work may wait for each worker; "
                f"this would add {in_words(more_s)} to {in_words(there_s)}; try again later"
            )
            raise Overloaded(text, self._worked_off_s(excess_s), "work")

    def is_large(self, demands: Sequence[Demand]) -> bool:
        """Tells whether a request takes so much of the room that there can be only some of them."""
        return self._each_s(bound_of(demands)) > self._limits.waiting_s / _LARGE

    def _there_s(self) -> float:
        """Returns the seconds of work that wait for each worker; a large request counts for half of the room."""
        seconds, half_s = self._each_s(self._ledger.waiting_units), self._limits.waiting_s / 2
        seconds += self._each_s(self._ledger.reserved_units)
        for request in self._ledger.large:
            seconds -= max(0.0, self._each_s(add(request.units.copy(), request.reserved)) - half_s)
        return seconds

    def _largest_ahead_s(self, rank: int, deadline_s: float, owner: str) -> float:
        """Returns the seconds of queries that wait of the owner's largest request that is more urgent than that."""
        large = [each for each in self._ledger.large if each.owner == owner]
        ahead = [each for each in large if (each.rank, each.deadline_s) <= (rank, deadline_s)]
        return max((self.seconds_of(each.units) for each in ahead), default=0.0)

    def _each_s(self, units: Mapping[Kind, int]) -> float:
        """Returns how long units keep the workers busy that are there, or one while there is none."""
        return self.seconds_of(units) / max(1, self._backends.workers)

    def check_owner(self, owner: Owner, demands: Sequence[Demand], opening: Sequence[Work]) -> None:
        """Raises Overloaded where too much work of the owner would wait.

        Its only request is not refused for that as long as nobody's steps say what such work really takes.
        """
        asked = bound_of(demands)
        if not owner.name or not asked:
            return
        requests, units = self._ledger.owned(owner.name)
        if not requests and not self._are_measured(asked):
            return
        most_s = owner.waiting_s
        if most_s is None:
            most_s = owner.part * self._limits.waiting_s * max(1, self._backends.workers)
        there_s, more_s = self.seconds_of(units), self.seconds_of(add(units_of(opening), asked))
        excess_s = there_s + more_s - most_s
        if excess_s > 0:
            text = (
                f"at most {in_words(most_s)} of one worker's work may wait for {owner.name}; "
                f"this would add {in_words(more_s)} to {in_words(there_s)}; try again later"
            )
            raise Overloaded(text, self._worked_off_s(excess_s / max(1, self._backends.workers)), "token_work")

    def check_time(
        self,
        demands: Sequence[Demand],
        opening: Sequence[Work],
        priority: Priority,
        deadline_s: float,
        now_s: float,
        owner: str = "",
    ) -> None:
        """Raises Overloaded where the request is predicted to end after its deadline."""
        if math.isinf(deadline_s) or not self._are_measured(bound_of(demands) | units_of(opening)):
            return
        seconds = self.predicted_s(demands, opening, priority, deadline_s, owner)
        if seconds is not None and now_s + seconds > deadline_s:
            left, takes = in_words(deadline_s - now_s), in_words(seconds)
            text = f"the deadline is in {left}, but by what steps take now this would take {takes}; try again later"
            raise Overloaded(text, now_s + seconds - deadline_s, "deadline")

    def _are_measured(self, kinds: Iterable[Kind]) -> bool:
        """Tells whether steps will go on to say what all of these kinds cost."""
        return all(self._ledger.is_worked_on(kind) for kind in kinds)

    def _worked_off_s(self, seconds: float) -> float | None:
        """Returns in how many seconds this much work of each worker is done; None as long as nothing was observed."""
        return seconds if self._backends.known else None


def _opening_s(backend: BackendState, own: Mapping[Kind, int]) -> tuple[float, float]:
    """Returns how long an opening takes in a step of its own, and what it leaves of the target time for queries."""
    seconds = backend.cost.predict(Load(own, 1))
    return seconds, max(0.0, backend.limits.target_s - seconds)
