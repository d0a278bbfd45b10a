"""Decides which masked queries go into the next step, for one model.

Rule 1: every such decision is in this file. Rule 2: nothing here knows torch, asyncio or the clock.

A request asks for a number of queries of each of its methods. Its first slice is its *opening*: it brings predictions,
resolves the targets, makes the gradient maps (which take no queries) and as many masked queries as it is given. The
rest follows once the opening has come back. A total may depend on how many classes the targets turn out to be; it is
then unknown (None) until the opening has come back.

Who goes into a step:

1. The eldest started request always has a place, so that nothing starves.
2. Then all openings, first come first served: a Grad-CAM never waits behind a Score-CAM.
3. Then the other started requests, first come first served.

Work that was lost is sent again before anything else, and alone: if a request itself breaks the worker, it takes its
neighbours down once, not three times.

The step's queries are shared in the same order, but while others wait no request takes more than half of them. What is
left over is given out in that order again.

Each query is waiting, in flight, done or cancelled, and the four counts always add up to what was asked. That sum is
the first thing to check when something is odd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from camserve.errors import InvalidOption, Overloaded
from camserve.planning.work import Request, Span

MAX_LOSSES = 3
"""A piece of work that is lost this often fails its request: it is sent again at most twice."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a step and of the queue."""

    queries: int = 64
    """Masked queries in a step."""
    items: int = 8
    """Requests in a step."""
    size_bytes: int = 40 * 2**20
    """What the requests of a step add to its messages; a request alone is always let in."""
    requests: int = 128
    """Requests taken on at once."""
    waiting_queries: int = 100_000

    def __post_init__(self) -> None:
        if min(self.queries, self.items) < 2:
            raise InvalidOption(f"a step has at least 2 queries and 2 items, got {self.queries} and {self.items}")


@dataclass(frozen=True)
class Slice:
    """The part of one request inside a step."""

    request: int
    opening: bool
    spans: tuple[Span, ...]
    """Ranges of queries; in an opening also an empty one for each method that asks none."""

    @property
    def queries(self) -> int:
        """Number of masked queries."""
        return sum(span.queries for span in self.spans)


@dataclass(frozen=True)
class Step:
    """What one worker is asked at once."""

    number: int
    slices: tuple[Slice, ...]

    @property
    def queries(self) -> int:
        """Number of masked queries."""
        return sum(part.queries for part in self.slices)


@dataclass(frozen=True)
class Counts:
    """Queries by state since the planner was made: asked = waiting + in_flight + done + cancelled."""

    asked: int
    waiting: int
    in_flight: int
    done: int
    cancelled: int


class Planner:
    """The waiting and running work of one model."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._requests: dict[int, Request] = {}  # live ones, first come first
        self._flying: dict[int, dict[int, Slice]] = {}  # step -> request -> slice that has not come back
        self._numbers = 0
        self._asked = self._done = self._cancelled = 0

    def __len__(self) -> int:
        """Requests that are neither complete nor cancelled."""
        return len(self._requests)

    def __contains__(self, request: int) -> bool:
        """The request is neither complete nor cancelled."""
        return request in self._requests

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is in flight."""
        return not self._requests and not self._flying

    @property
    def waiting(self) -> int:
        """Masked queries that are not in a step yet."""
        return sum(request.waiting for request in self._requests.values())

    def counts(self) -> Counts:
        """Where every query is."""
        flying = sum(part.queries for parts in self._flying.values() for part in parts.values())
        return Counts(self._asked, self.waiting, flying, self._done, self._cancelled)

    def admit(self, totals: Sequence[int | None], size_bytes: int = 0, deadline_s: float = float("inf")) -> int:
        """Takes on a request and returns its number.

        Args:
            totals: for each method how many queries it asks; None where that depends on the targets.
            size_bytes: what the request adds to a step's size.
            deadline_s: from this time on it is put into no step.

        Raises:
            Overloaded: too many requests or queries wait.
        """
        if len(self) >= self._limits.requests:
            raise Overloaded(f"at most {self._limits.requests} requests are taken on at once; try again later")
        known = sum(total or 0 for total in totals)
        if self._requests and self.waiting + known > self._limits.waiting_queries:
            raise Overloaded(f"at most {self._limits.waiting_queries} masked queries may wait; try again later")
        number = self._next_number()
        self._requests[number] = Request(totals, size_bytes, deadline_s)
        self._asked += known
        return number

    def next_step(self, now_s: float) -> Step | None:
        """The next step; None when nothing can be sent now."""
        chosen = self._chosen(now_s)
        if not chosen:
            return None
        shares = self._shares([self._requests[number] for number in chosen])
        slices = {}
        for number, share in zip(chosen, shares, strict=True):
            opening = self._requests[number].to_open
            if opening or share:
                slices[number] = Slice(number, opening, self._requests[number].take(share))
        step = Step(self._next_number(), tuple(slices.values()))
        self._flying[step.number] = slices
        return step

    def done(self, step: int, request: int, totals: Sequence[int] | None = None) -> bool:
        """One slice has been answered. True when its result counts, False when it is to be ignored.

        Args:
            totals: with an opening, the final number of queries of each method; may be left out if all were known.
        """
        part = self._landed(step, request)
        live = self._requests.get(request)
        if live is None:
            self._cancelled += part.queries
            return False
        self._done += part.queries
        self._asked += live.land(part.opening, totals)
        if live.complete:
            del self._requests[request]
        return True

    def lost(self, step: int, request: int) -> bool:
        """One slice got no answer. True when it waits again; False when it will not: lost too often, or cancelled."""
        part = self._landed(step, request)
        live = self._requests.get(request)
        if live is None:
            self._cancelled += part.queries
            return False
        losses = live.give_back(part.opening, part.spans)
        if losses == MAX_LOSSES:
            self.cancel(request)
        return losses < MAX_LOSSES

    def cancel(self, request: int) -> None:
        """Drops what waits of a request and ignores what is in flight. Does nothing the second time."""
        live = self._requests.pop(request, None)
        if live is not None:
            self._cancelled += live.waiting

    def _next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _landed(self, step: int, request: int) -> Slice:
        part = self._flying[step].pop(request)
        if not self._flying[step]:
            del self._flying[step]
        return part

    def _chosen(self, now_s: float) -> list[int]:
        live = {number: request for number, request in self._requests.items() if now_s < request.deadline_s}
        suspects = [number for number, request in live.items() if request.suspect]
        if suspects:
            return suspects[:1]
        openings = [number for number, request in live.items() if request.to_open]
        started = [number for number, request in live.items() if request.opened and request.waiting]
        return self._fitting([*started[:1], *openings, *started[1:]])

    def _fitting(self, numbers: Sequence[int]) -> list[int]:
        """The first ones that fit; the line is not jumped, so that a large image does not wait for ever."""
        chosen: list[int] = []
        size = 0
        for number in numbers[: self._limits.items]:
            size += self._requests[number].size_bytes
            if chosen and size > self._limits.size_bytes:
                break
            chosen.append(number)
        return chosen

    def _shares(self, chosen: Sequence[Request]) -> list[int]:
        """How many queries of the step each one gets."""
        budget = self._limits.queries
        wanting = sum(request.waiting > 0 for request in chosen)
        cap = budget // 2 if wanting > 1 else budget
        shares = []
        for request in chosen:
            shares.append(min(request.waiting, cap, budget))
            budget -= shares[-1]
        for index, request in enumerate(chosen):
            extra = min(request.waiting - shares[index], budget)
            shares[index] += extra
            budget -= extra
        return shares
