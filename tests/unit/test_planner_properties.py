"""What holds of the planner whatever happens, in any order."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from camserve.planning import MAX_LOSSES, Limits, Planner, Slice, Step

LIMITS = Limits(queries=6, items=3, size_bytes=10, requests=50, waiting_queries=10_000)

Piece = tuple[int, int]
"""(method, query number)"""


class Book:
    """What the test itself knows of one request."""

    def __init__(self, totals: list[int], late: set[int], size: int) -> None:
        self.totals, self.size = totals, size
        self.known = [None if position in late else total for position, total in enumerate(totals)]
        self.opened = self.over = self.failed = False
        self.opening_sent = False
        self.opening_losses = 0
        self.done: Counter[Piece] = Counter()
        self.flying: Counter[Piece] = Counter()
        self.losses: Counter[Piece] = Counter()

    def waiting(self) -> set[Piece]:
        totals = self.totals if self.opened else [total or 0 for total in self.known]
        every = {(position, query) for position, total in enumerate(totals) for query in range(total)}
        return every - set(self.done) - set(+self.flying)

    @property
    def live(self) -> bool:
        return not self.over

    @property
    def suspect(self) -> bool:
        if not self.opening_sent:
            return self.opening_losses > 0
        return self.opened and any(self.losses[piece] for piece in self.waiting())


def pieces(part: Slice) -> list[Piece]:
    return [(span.position, query) for span in part.spans for query in range(span.start, span.stop)]


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.planner = Planner(LIMITS)
        self.books: dict[int, Book] = {}
        self.flying: list[tuple[Step, Slice]] = []

    @rule(
        totals=st.lists(st.sampled_from([0, 0, 1, 3, 5, 9, 20]), min_size=1, max_size=3),
        late=st.sets(st.integers(0, 2), max_size=1),
        size=st.integers(0, 12),
    )
    def admit(self, totals: list[int], late: set[int], size: int) -> None:
        book = Book(totals, late, size)
        self.books[self.planner.admit(book.known, size)] = book

    @rule()
    def step(self) -> None:
        live = {number: book for number, book in self.books.items() if book.live}
        suspects = [number for number, book in live.items() if book.suspect]
        openings = [number for number, book in live.items() if not book.opening_sent]
        started = [number for number, book in live.items() if book.opened and book.waiting()]
        step = self.planner.next_step(0.0)
        if step is None:
            assert not openings
            assert not started
            return
        asked = [part.request for part in step.slices]
        assert len(asked) == len(set(asked)) <= LIMITS.items
        assert 0 <= step.queries <= LIMITS.queries
        assert len(asked) == 1 or sum(self.books[number].size for number in asked) <= LIMITS.size_bytes
        self._check_order(asked, suspects, openings, started)
        for part in step.slices:
            self._take(step, part)

    def _check_order(self, asked: list[int], suspects: list[int], openings: list[int], started: list[int]) -> None:
        if suspects:
            assert asked == suspects[:1], "lost work goes first and alone"
            return
        assert not started or started[0] in asked, "the eldest started request never starves"
        left_out = [number for number in openings if number not in asked]
        if left_out:
            size = sum(self.books[number].size for number in asked)
            full = len(asked) == LIMITS.items or size + self.books[left_out[0]].size > LIMITS.size_bytes
            assert full, "an opening waits only where there is no place"
            assert [n for n in openings if n in asked] == openings[: len(openings) - len(left_out)], "first come"

    def _take(self, step: Step, part: Slice) -> None:
        book = self.books[part.request]
        assert book.live
        assert part.opening == (not book.opening_sent)
        assert part.opening or book.opened, "nothing follows before the opening is back"
        assert set(pieces(part)) <= book.waiting()
        if part.opening:
            empty = {span.position for span in part.spans if not span.queries}
            assert empty == {position for position, total in enumerate(book.known) if total == 0}
        else:
            assert part.queries > 0
        book.opening_sent = True
        book.flying.update(pieces(part))
        self.flying.append((step, part))

    def _land(self, which: int) -> tuple[Step, Slice, Book]:
        step, part = self.flying.pop(which % len(self.flying))
        book = self.books[part.request]
        book.flying.subtract(pieces(part))
        return step, part, book

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0, 100))
    def done(self, which: int) -> None:
        step, part, book = self._land(which)
        counts = self.planner.done(step.number, part.request, book.totals if part.opening else None)
        assert counts == book.live
        if book.live:
            book.done.update(pieces(part))
            book.opened |= part.opening
            book.over = book.opened and not book.waiting() and not +book.flying

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0, 100))
    def lost(self, which: int) -> None:
        step, part, book = self._land(which)
        again = self.planner.lost(step.number, part.request)
        if not book.live:
            assert not again
            return
        book.losses.update(pieces(part))
        book.opening_losses += part.opening
        book.opening_sent &= not part.opening
        worst = max([book.losses[piece] for piece in pieces(part)] + [book.opening_losses * part.opening])
        assert again == (worst < MAX_LOSSES)
        book.failed = book.over = not again

    @precondition(lambda self: self.books)
    @rule(which=st.integers(0, 100), twice=st.booleans())
    def cancel(self, which: int, twice: bool) -> None:
        number = sorted(self.books)[which % len(self.books)]
        self.planner.cancel(number)
        before = self.planner.counts()
        if twice:
            self.planner.cancel(number)
        assert self.planner.counts() == before
        self.books[number].over = True

    @invariant()
    def adds_up(self) -> None:
        counts = self.planner.counts()
        assert counts.asked == counts.waiting + counts.in_flight + counts.done + counts.cancelled
        assert counts.done == sum(book.done.total() for book in self.books.values())
        assert counts.in_flight == sum(part.queries for _, part in self.flying)
        assert counts.waiting == sum(len(book.waiting()) for book in self.books.values() if book.live)
        assert len(self.planner) == sum(book.live for book in self.books.values())

    def teardown(self) -> None:
        """From any state, work ends when every step is answered, and every query was answered exactly once."""
        while True:
            self.step()
            if not self.flying:
                break
            self.done(0)
            self.adds_up()
        assert self.planner.idle
        for book in self.books.values():
            assert all(count == 1 for count in book.done.values())
        assert all(book.over for book in self.books.values())


Machine.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
test_the_planner_keeps_its_laws = Machine.TestCase
