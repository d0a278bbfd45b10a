"""What holds of the planner whatever happens, in any order: every step is held against a slow, obvious twin."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from camserve.errors import Overloaded
from camserve.planning import CLASSES, MAX_LOSSES, NOBODY, Limits, Owner, Planner, Slice, Step, StepCost
from camserve.planning.cost import FIRST_QUERIES

LIMITS = Limits(
    target_s=0.3,
    queries=9,
    items=3,
    size_bytes=10,
    requests=15,
    waiting_queries=150,
    age_s=4.0,
)
OWNERS = {"": NOBODY, "ann": Owner("ann", requests=5, waiting_queries=70)}
PLACES = ("east", "west")

Piece = tuple[int, int]
"""(position, query number)"""


@dataclass(eq=False)
class Book:
    """What the twin knows of one request."""

    number: int
    totals: list[int]
    """The truth."""
    known: list[int | None]
    later: list[int]
    """Positions whose totals are known only after the opening."""
    size: int
    deadline_s: float
    rank: int
    owner: str
    came_s: float
    opened: bool = False
    over: bool = False
    opening_sent: bool = False
    opening_losses: int = 0
    done: Counter[Piece] = field(default_factory=Counter)
    flying: Counter[Piece] = field(default_factory=Counter)
    losses: Counter[Piece] = field(default_factory=Counter)
    slices: int = 0
    """In flight."""

    def every(self) -> set[Piece]:
        return {(at, query) for at, total in enumerate(self.known) for query in range(total or 0)}

    def waiting(self) -> set[Piece]:
        return self.every() - set(self.done) - set(+self.flying)

    @property
    def suspect(self) -> bool:
        if not self.opening_sent:
            return self.opening_losses > 0
        return self.opened and any(self.losses[piece] for piece in self.waiting())

    @property
    def to_open(self) -> bool:
        return not self.opening_sent and not self.suspect

    @property
    def started(self) -> bool:
        return self.opened and bool(self.waiting()) and not self.suspect

    @property
    def quiet(self) -> bool:
        return self.opened and not self.waiting() and not self.slices

    def urgency(self) -> tuple[float, ...]:
        return (self.rank, self.deadline_s, len(self.waiting()), self.number)

    def is_aged(self, now_s: float) -> bool:
        return now_s - self.came_s >= LIMITS.age_s * (self.rank + 1)


@dataclass(eq=False)
class Cargo:
    """One slice and who carries it: a step, or a step and its copy."""

    part: Slice
    carriers: int = 1
    settled: bool = False


@dataclass(eq=False)
class Sent:
    """A step on its way."""

    step: Step
    cargo: list[Cargo]
    predicted_s: float
    due_s: float
    copied: bool = False


class Host:
    """A place, with fits of its own."""

    def __init__(self) -> None:
        self.workers = 0
        self.fits: dict[str, StepCost] = {}

    def cost(self) -> StepCost:
        if not self.fits:
            return StepCost(LIMITS.target_s / FIRST_QUERIES)
        return min(self.fits.values(), key=self.rate)

    def full(self, images: int = 1) -> int:
        return min(LIMITS.queries, self.cost().queries_within(LIMITS.target_s, images))

    def rate(self, fit: StepCost) -> float:
        full = min(LIMITS.queries, fit.queries_within(LIMITS.target_s, 1))
        return full / fit.predict(full, 1)

    def budget(self, members: Sequence[Book]) -> int:
        haste = any(not book.opening_sent and not book.waiting() for book in members)
        least_s = max(LIMITS.target_s / 2, self.cost().step_s / 0.1) if haste else LIMITS.target_s
        target_s = min(LIMITS.target_s, least_s)
        return min(LIMITS.queries, self.cost().queries_within(target_s, len(members)))


def expected_members(books: Sequence[Book], host: Host, now_s: float) -> list[tuple[Book, bool]]:
    """Who is in the next step, and who of them gets its queries first, by age; straight from the rules."""
    ready = sorted((book for book in books if not book.over and now_s < book.deadline_s), key=Book.urgency)
    suspects = [book for book in ready if book.suspect]
    if suspects:
        return [(suspects[0], False)]
    openings, started = [book for book in ready if book.to_open], [book for book in ready if book.started]
    members: list[tuple[Book, bool]] = []

    def fits(book: Book, spare: int = 0) -> bool:
        count = len(members) + 1 + spare
        size = sum(member.size for member, _ in members) + book.size
        in_time = count <= 2 or host.cost().predict(1, count) <= LIMITS.target_s
        return not members or (count <= LIMITS.items and size <= LIMITS.size_bytes and in_time)

    def gets_queries(book: Book) -> bool:
        budget = host.budget([member for member, _ in members])
        before = [other for other, aged in members if aged or other.urgency() < book.urgency()]
        return sum(min(len(other.waiting()), max(1, budget // 2)) for other in before) < budget

    eldest = [min((book for book in line if book.is_aged(now_s)), key=lambda book: book.number, default=None)
              for line in (started, openings)]  # fmt: skip
    for book in sorted((book for book in eldest if book), key=lambda book: book.number):
        members.extend([(book, book.started)] if fits(book) else [])
    left = [book for book in openings if (book, False) not in members]
    rest = [book for book in started if (book, True) not in members]
    while left and fits(left[0], spare=1 if started else 0):
        members.append((left.pop(0), False))
    while rest and gets_queries(rest[0]) and fits(rest[0]):
        members.append((rest.pop(0), False))
    while left and fits(left[0]):
        members.append((left.pop(0), False))
    return members


def expected_step(books: Sequence[Book], host: Host, now_s: float) -> dict[int, int]:
    """Queries by request."""
    members = expected_members(books, host, now_s)
    order = [book for book, _ in sorted(members, key=lambda member: (not member[1], member[0].urgency()))]
    budget = host.budget(order)
    given = dict.fromkeys(order, 0)
    for most in (max(1, budget // 2), budget):
        for book in order:
            left = budget - sum(given.values())
            given[book] += max(0, min(len(book.waiting()) - given[book], most - given[book], left))
    return {book.number: queries for book, queries in given.items() if queries or not book.opening_sent}


def pieces(part: Slice) -> list[Piece]:
    return [(span.position, query) for span in part.spans for query in range(span.start, span.stop)]


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.planner = Planner(LIMITS)
        self.books: dict[int, Book] = {}
        self.hosts = {name: Host() for name in PLACES}
        self.sent: list[Sent] = []
        self.landed: list[tuple[Sent, Cargo]] = []
        self.now_s = 0.0

    @initialize(
        workers=st.tuples(st.integers(1, 2), st.integers(1, 2)),
        observed=st.sets(st.sampled_from(PLACES)),
    )
    def begin(self, workers: tuple[int, int], observed: set[str]) -> None:
        for name, number in zip(PLACES, workers, strict=True):
            self.set_workers(name, number)
        for name in sorted(observed):
            self.observe(name, "a", 5, 2, 1.0)

    @property
    def live(self) -> list[Book]:
        return [book for book in self.books.values() if not book.over]

    def flying(self, name: str) -> list[Sent]:
        return [sent for sent in self.sent if sent.step.place == name]

    # what comes from outside

    @rule(
        totals=st.lists(st.sampled_from([0, 1, 5, 20, 45]), min_size=1, max_size=3),
        late=st.sets(st.integers(0, 2), max_size=1),
        curves=st.lists(st.sampled_from([0, 2, 7]), max_size=2),
        size=st.integers(0, 12),
        patience_s=st.sampled_from([0.5, 2.0, 30.0, 300.0, math.inf]),
        priority=st.sampled_from(CLASSES),
        owner=st.sampled_from(["", "", "ann"]),
    )
    def admit(self, totals, late, curves, size, patience_s, priority, owner) -> None:
        known = [None if position in late else total for position, total in enumerate(totals)]
        queries, rank, deadline_s = sum(total or 0 for total in known), CLASSES.index(priority), self.now_s + patience_s
        options = {"size_bytes": size, "deadline_s": deadline_s, "priority": priority, "owner": OWNERS[owner]}
        if refusal := self.refusal(queries, rank, deadline_s, owner):
            text, retry_after_s = refusal
            with pytest.raises(Overloaded, match=text) as error:
                self.planner.admit(known, now_s=self.now_s, **options)
            assert error.value.retry_after_s == (retry_after_s and pytest.approx(retry_after_s))
            return
        number = self.planner.admit(known, now_s=self.now_s, **options)
        later = list(range(len(totals), len(totals) + len(curves)))
        self.books[number] = Book(
            number, totals + curves, known, later, size, deadline_s, rank, owner, self.now_s
        )  # fmt: skip

    def refusal(self, queries: int, rank: int, deadline_s: float, owner: str) -> tuple[str, float | None] | None:
        """(part of the text, hint) of the refusal that is due; None if there is none."""
        live, waits = self.live, sum(len(book.waiting()) for book in self.live)
        mine = [book for book in live if owner and book.owner == owner]
        owned = sum(len(book.waiting()) for book in mine)
        speed = self.speed()
        if len(live) >= LIMITS.requests:
            return "at most 15 requests are", None
        if live and waits + queries > LIMITS.waiting_queries:
            return "at most 150 masked queries may", speed and (waits + queries - LIMITS.waiting_queries) / speed[0]
        if len(mine) >= 5:
            return "at most 5 requests of ann", None
        if mine and owned + queries > 70:
            return "at most 70 masked queries of ann", speed and (owned + queries - 70) / speed[0]
        seconds = self.predicted_s(queries, rank, deadline_s)
        if seconds is not None and self.now_s + seconds > deadline_s:
            return "the deadline is in", self.now_s + seconds - deadline_s
        return None

    def speed(self) -> tuple[float, float] | None:
        """(queries, openings) per second of all workers."""
        hosts = [host for host in self.hosts.values() if host.workers]
        known = [host for host in hosts if host.fits]
        if not known:
            return None
        scale = sum(host.workers for host in hosts) / sum(host.workers for host in known)
        queries = [host.workers * sum(map(host.rate, host.fits.values())) / len(host.fits) for host in known]
        images = [host.workers * LIMITS.items / host.cost().predict(0, LIMITS.items) for host in known]
        return scale * sum(queries), scale * sum(images)

    def predicted_s(self, queries: int, rank: int, deadline_s: float) -> float | None:
        speed = self.speed()
        if speed is None:
            return None
        hosts = {name: host for name, host in self.hosts.items() if host.workers}
        flying_s = sum(sent.predicted_s for name in hosts for sent in self.flying(name))
        fastest = max(
            (host for host in hosts.values() if host.fits),
            key=lambda host: sum(map(host.rate, host.fits.values())) / len(host.fits),
        )
        openings = sum(book.rank <= rank and not book.opening_sent for book in self.live)
        ahead = sum(
            len(book.waiting())
            for book in self.live
            if book.rank < rank or (book.rank == rank and min(book.deadline_s, 1e9) // 1 <= min(deadline_s, 1e9) // 1)
        )
        first = min(queries, fastest.full())
        seconds = flying_s / sum(host.workers for host in hosts.values()) + openings / speed[1]
        seconds += fastest.cost().predict(first, 1)
        return seconds + ((ahead + queries - first) / speed[0] if queries else 0)

    @rule(name=st.sampled_from(PLACES), workers=st.integers(0, 2))
    def set_workers(self, name: str, workers: int) -> None:
        self.hosts[name].workers = workers
        self.planner.set_workers(name, workers)

    @rule(seconds=st.sampled_from([0.01, 0.3, 3.0, 6.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.pump()

    @rule(
        name=st.sampled_from(PLACES),
        worker=st.sampled_from(["a", "b"]),
        queries=st.integers(0, 9),
        images=st.integers(1, 3),
        slow=st.sampled_from([0.2, 1.0, 1.0, 3.0]),
    )
    def observe(self, name: str, worker: str, queries: int, images: int, slow: float) -> None:
        seconds = slow * (0.02 * queries + 0.03 * images + 0.01)
        fits = self.hosts[name].fits
        fits.setdefault(worker, StepCost(LIMITS.target_s / FIRST_QUERIES)).observe(queries, images, seconds)
        self.planner.observe(name, worker, queries, images, seconds, self.now_s)

    # steps

    @rule()
    def pump(self) -> None:
        while self._step():
            self.adds_up()

    def _step(self) -> bool:
        """True when a step was sent."""
        step = self.planner.next_step(self.now_s)
        room = {
            name: len(self.flying(name)) / host.workers
            for name, host in self.hosts.items()
            if len(self.flying(name)) < LIMITS.steps_per_worker * host.workers
        }
        if not room:
            assert step is None
            return False
        place = min(room, key=lambda name: (room[name], name))
        expected = expected_step(self.live, self.hosts[place], self.now_s)
        if not expected:
            return self._copy(step, set(room))
        assert step is not None
        assert step.place == place
        assert {part.request: part.queries for part in step.slices} == expected
        self._take(step)
        return True

    def _take(self, step: Step) -> None:
        assert step.copy_of is None
        assert len(step.slices) <= LIMITS.items
        assert step.queries <= self.hosts[step.place].full(len(step.slices))
        for part in step.slices:
            book = self.books[part.request]
            assert part.opening == (not book.opening_sent)
            assert part.opening or (book.opened and part.queries)
            assert set(pieces(part)) <= book.waiting(), "each query is sent once"
            empty = {span.position for span in part.spans if not span.queries}
            assert empty == ({at for at, total in enumerate(book.known) if total == 0} if part.opening else set())
            book.opening_sent = True
            book.slices += 1
            book.flying.update(pieces(part))
        self._fly(step, [Cargo(part) for part in step.slices])

    def _fly(self, step: Step, cargo: list[Cargo]) -> None:
        host, before = self.hosts[step.place], self.flying(step.place)
        predicted_s = host.cost().predict(step.queries, len(step.slices))
        expected_s = predicted_s + sum(sent.predicted_s for sent in before) / host.workers
        due_s = self.now_s + max(1.0, 3 * expected_s) if host.fits else math.inf
        self.sent.append(Sent(step, cargo, predicted_s, due_s))

    def _copy(self, step: Step | None, room: set[str]) -> bool:
        """No fresh work: an overdue step may go to another place."""
        overdue = {
            sent.step.number: wanted
            for sent in self.sent
            if sent.step.copy_of is None and not sent.copied and sent.due_s <= self.now_s
            if room - {sent.step.place} and (wanted := self._wanted(sent))
        }
        if step is None:
            assert not overdue
            self._check_wake()
            return False
        assert step.copy_of in overdue
        original = next(sent for sent in self.sent if sent.step.number == step.copy_of)
        assert step.place != original.step.place
        assert step.slices == tuple(cargo.part for cargo in overdue[step.copy_of])
        original.copied = True
        for cargo in overdue[step.copy_of]:
            cargo.carriers += 1
        self._fly(step, overdue[step.copy_of])
        return True

    def _check_wake(self) -> None:
        due_s = [sent.due_s for sent in self.sent if sent.step.copy_of is None]
        coming = [due for due in due_s if self.now_s < due < math.inf]
        wake_s = self.planner.wake_s(self.now_s)
        if coming and sum(host.workers > 0 for host in self.hosts.values()) > 1:
            assert wake_s == pytest.approx(min(coming))
        else:
            assert wake_s is None

    def _wanted(self, sent: Sent) -> list[Cargo]:
        return [cargo for cargo in sent.cargo if not cargo.settled and self._is_wanted(cargo)]

    def _is_wanted(self, cargo: Cargo) -> bool:
        book = self.books[cargo.part.request]
        return not book.over and self.now_s < book.deadline_s

    # answers

    def _land(self, which: int) -> tuple[Sent, Cargo, Book]:
        sent, cargo = [(sent, cargo) for sent in self.sent for cargo in sent.cargo][which]
        sent.cargo.remove(cargo)
        cargo.carriers -= 1
        self.sent = [sent for sent in self.sent if sent.cargo]
        return sent, cargo, self.books[cargo.part.request]

    def _settle(self, cargo: Cargo, book: Book) -> None:
        cargo.settled = True
        book.flying.subtract(pieces(cargo.part))
        book.slices -= 1

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        self._done(data.draw(st.integers(0, sum(len(sent.cargo) for sent in self.sent) - 1)))

    def _done(self, which: int) -> None:
        sent, cargo, book = self._land(which)
        part = cargo.part
        final = [None if at in book.later else total for at, total in enumerate(book.totals)]
        counts = self.planner.done(sent.step.number, part.request, final if part.opening else None)
        assert counts == (not cargo.settled and not book.over)
        if cargo.settled:
            return
        self._settle(cargo, book)
        if counts:
            book.done.update(pieces(part))
            book.opened |= part.opening
            book.known = final if part.opening else book.known
            self._finish(book)

    def _finish(self, book: Book) -> None:
        assert self.planner.stalled(book.number) == (book.quiet and None in book.known)
        book.over = book.quiet and None not in book.known

    @precondition(lambda self: self.sent)
    @rule()
    def everything_is_answered(self) -> None:
        while self.sent:
            self._done(0)
        self.pump()

    @precondition(lambda self: self.sent)
    @rule()
    def a_worker_dies(self) -> None:
        for _ in self.sent[0].cargo[:]:
            self._lost(0)
        self.pump()

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def lost(self, data: st.DataObject) -> None:
        self._lost(data.draw(st.integers(0, sum(len(sent.cargo) for sent in self.sent) - 1)))

    def _lost(self, which: int) -> None:
        sent, cargo, book = self._land(which)
        part = cargo.part
        goes_on = self.planner.lost(sent.step.number, part.request)
        if not cargo.settled and book.over:
            self._settle(cargo, book)
        if book.over or cargo.settled or cargo.carriers:
            assert goes_on == (not book.over)
            return
        self._settle(cargo, book)
        book.losses.update(pieces(part))
        book.opening_losses += part.opening
        book.opening_sent &= not part.opening
        worst = max([book.losses[piece] for piece in pieces(part)] + [book.opening_losses * part.opening])
        assert goes_on == (worst < MAX_LOSSES)
        book.over = not goes_on

    @precondition(lambda self: any(self.planner.stalled(book.number) for book in self.live))
    @rule()
    def settle(self) -> None:
        book = next(book for book in self.live if self.planner.stalled(book.number))
        position = book.known.index(None)
        self.planner.settle(book.number, position, book.totals[position])
        book.known[position] = book.totals[position]
        self._finish(book)

    @precondition(lambda self: self.books)
    @rule(data=st.data(), twice=st.booleans())
    def cancel(self, data: st.DataObject, twice: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.books)))
        self.planner.cancel(number)
        before = self.planner.counts()
        if twice:
            self.planner.cancel(number)
        assert self.planner.counts() == before
        self.books[number].over = True

    # laws

    @invariant()
    def adds_up(self) -> None:
        counts = self.planner.counts()
        assert counts.asked == counts.waiting + counts.in_flight + counts.done + counts.cancelled
        assert counts.asked == sum(len(book.every()) for book in self.books.values())
        assert counts.waiting == self.planner.waiting == sum(len(book.waiting()) for book in self.live)
        assert counts.in_flight == sum((+book.flying).total() for book in self.books.values())
        assert counts.done == sum(book.done.total() for book in self.books.values())
        assert sum(self.planner.counts_by_class().values(), type(counts)()) == counts
        assert len(self.planner) == len(self.live)
        assert all(book.number in self.planner for book in self.live)

    def teardown(self) -> None:
        """From any state, work ends when every step is answered, and every query was answered exactly once."""
        for name in PLACES:
            self.set_workers(name, 1)
        while True:
            self.pump()
            if self.sent:
                self._done(0)
            elif any(self.planner.stalled(book.number) for book in self.live):
                self.settle()
            else:
                break
            self.adds_up()
        for book in self.live:
            assert book.deadline_s <= self.now_s, "only what came too late is left"
            self.planner.cancel(book.number)
        assert self.planner.idle
        for book in self.books.values():
            assert all(count == 1 for count in book.done.values())


Machine.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    phases=(Phase.reuse, Phase.generate),  # shrinking a failure takes minutes, more than a test may
)
test_the_planner_keeps_its_laws = Machine.TestCase
