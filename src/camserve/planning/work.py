"""The work of one request: ranges of queries, taken from the front and given back when they are lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Span:
    """The queries [start, stop) of one method."""

    position: int
    """Place of the method in the request."""
    start: int
    stop: int
    losses: int = 0
    """How often this piece has been sent in vain."""

    @property
    def queries(self) -> int:
        """Number of masked queries."""
        return self.stop - self.start

    def split(self, queries: int) -> tuple[Span, Span]:
        """The first `queries` queries, and the rest."""
        middle = self.start + queries
        first = Span(self.position, self.start, middle, self.losses)
        return first, Span(self.position, middle, self.stop, self.losses)


class Request:
    """What the planner knows of one request.

    Args:
        number: counts requests in the order of their arrival.
        totals: number of queries by position; None where it is not known yet.
        size_bytes: what the request adds to a step's size.
        deadline_s: from this time on it is put into no step.
        rank: place of its class among the classes, the most urgent 0.
        owner: who asks; "" is nobody.
        came_s: time of its arrival.
    """

    def __init__(
        self,
        number: int,
        totals: Sequence[int | None],
        *,
        size_bytes: int,
        deadline_s: float,
        rank: int,
        owner: str,
        came_s: float,
    ) -> None:
        self.number = number
        self.size_bytes = size_bytes
        self.deadline_s = deadline_s
        self.rank = rank
        self.owner = owner
        self.came_s = came_s
        self.to_open = True
        self.opened = False
        self.waiting = 0
        self._totals = list(totals)
        self._spans: deque[Span] = deque()
        self._opening_losses = 0
        self._in_flight = 0  # slices
        self._add((position, total) for position, total in enumerate(totals) if total is not None)

    @property
    def complete(self) -> bool:
        """Opened, every total is known, and every query has been answered."""
        return self._quiet and None not in self._totals

    @property
    def stalled(self) -> bool:
        """Everything that is known has been answered, but a total is still to come: see `settle`."""
        return self._quiet and None in self._totals

    @property
    def opens_only(self) -> bool:
        """The next slice is an opening that asks no query: a Grad-CAM, say."""
        return self.to_open and not self.waiting

    @property
    def urgency(self) -> tuple[float, ...]:
        """Order of service, the smallest first: class, deadline, work that waits, arrival."""
        return (self.rank, self.deadline_s, self.waiting, self.number)

    @property
    def _quiet(self) -> bool:
        return self.opened and not self.waiting and not self._in_flight

    @property
    def suspect(self) -> bool:
        """The next slice holds work that was lost before."""
        if self.to_open:
            return self._opening_losses > 0
        return self.opened and bool(self._spans) and self._spans[0].losses > 0

    def take(self, queries: int) -> tuple[Span, ...]:
        """Moves that many queries from waiting to in flight.

        An opening has one span more, an empty one, for each method whose total is known to be 0.
        """
        spans = []
        if self.to_open:
            spans = [Span(position, 0, 0) for position, total in enumerate(self._totals) if total == 0]
        self.waiting -= queries
        while queries:
            span = self._spans.popleft()
            first, rest = span.split(min(queries, span.queries))
            spans.append(first)
            queries -= first.queries
            if rest.queries:
                self._spans.appendleft(rest)
        self.to_open = False
        self._in_flight += 1
        return tuple(sorted(spans, key=lambda span: (span.position, span.start)))

    def land(self, opening: bool, totals: Sequence[int | None] | None) -> int:
        """One slice is done. With an opening come the totals, or those of more positions; returns how many queries that
        adds. A total may still be None."""
        self._in_flight -= 1
        if not opening:
            return 0
        self.opened = True
        final: list[int | None] = [*(totals if totals is not None else (total or 0 for total in self._totals))]
        known = self._totals + [None] * (len(final) - len(self._totals))
        self._totals = final
        late = [(position, total) for position, total in enumerate(final) if known[position] is None]
        return self._add((position, total) for position, total in late if total is not None)

    def settle(self, position: int, total: int) -> int:
        """One total that was None; returns how many queries that adds."""
        assert self._totals[position] is None, "a total is settled once"
        self._totals[position] = total
        return self._add([(position, total)])

    def give_back(self, opening: bool, spans: Iterable[Span]) -> int:
        """One slice was lost: its work waits again, before the rest. Returns the largest number of losses in it."""
        self._in_flight -= 1
        returned = [replace(span, losses=span.losses + 1) for span in spans if span.queries]
        self._spans.extendleft(reversed(returned))
        self.waiting += sum(span.queries for span in returned)
        if opening:
            self.to_open = True
            self._opening_losses += 1
        return max([span.losses for span in returned] + [self._opening_losses * opening])

    def _add(self, totals: Iterable[tuple[int, int]]) -> int:
        spans = [Span(position, 0, total) for position, total in totals if total]
        self._spans.extend(spans)
        added = sum(span.queries for span in spans)
        self.waiting += added
        return added
