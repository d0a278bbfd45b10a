"""What holds of the planner whatever happens, in any order: it is held against a slow, obvious twin.

The twin knows the rules, where every query is, and what work really costs: from a table of its own, with kinds that
differ by 100 x and more, workers of unlike speed, drift and outliers. What a step is predicted to take is the planner's
own business here; whether predictions are any good is asked in `test_planner_world.py`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from camserve.errors import Overloaded
from camserve.methods.work import Kind, Work
from camserve.planning import CLASSES, NOBODY, Attempt, Demand, Fate, Limits, Load, Owner, Planner, Slice, Step
from camserve.planning.cost import FIRST_UNITS, USUAL

LIMITS = Limits(
    target_s=0.3,
    queries=9,
    items=3,
    size_bytes=10,
    requests=15,
    waiting_s=4.0,
    age_s=4.0,
    lead_s=0.1,
)
OWNERS = {"": NOBODY, "ann": Owner("ann", requests=5, waiting_s=3.0), "bob": Owner("bob", requests=7, waiting_s=3.0)}
BACKENDS = ("east", "west")
COSTS: Mapping[Kind, float] = {
    "decode": 0.03,
    "opening": 0.03,
    "masked_forward": 0.02,
    "layer_gradient": 0.01,
    "pixel_gradient": 0.2,
    "tail": 0.0002,
    "closed_form": 0.0,
    "ranking": 0.5,
}
SPEEDS = {"a": 1.0, "b": 2.5}
"""How many times what the table says each worker takes."""
KINDS_OF_QUERIES: Sequence[Kind] = ("masked_forward", "masked_forward", "pixel_gradient", "tail", "closed_form")

Query = tuple[int, int]
"""(position, number)"""
Units = Counter[Kind]


def bound(demands: Sequence[Demand]) -> Units:
    units: Units = Counter()
    for demand in demands:
        units[demand.kind] += demand.weight * (demand.most if demand.queries is None else demand.queries)
    return +units


@dataclass(eq=False)
class Book:
    """What the twin knows of one request."""

    number: int
    demands: list[Demand]
    final: list[Demand]
    """What comes with the opening."""
    opening: Units
    size: int
    deadline_s: float
    rank: int
    owner: str
    came_s: float
    admitted: Units
    large: bool
    """Whether it would have taken more than a 64th of the room when it came."""
    asked: set[Query] = field(default_factory=set)
    withdrawn: set[Query] = field(default_factory=set)
    stopped: set[int] = field(default_factory=set)
    """Positions of which nothing is asked any more."""
    opened: bool = False
    over: bool = False
    opening_sent: bool = False
    opening_lost: list[Attempt] = field(default_factory=list)
    done: Counter[Query] = field(default_factory=Counter)
    flying: Counter[Query] = field(default_factory=Counter)
    losses: defaultdict[Query, list[Attempt]] = field(default_factory=lambda: defaultdict(list))
    slices: int = 0
    """In flight."""

    def ask(self, demands: list[Demand]) -> None:
        self.demands = demands
        now = {(at, query) for at, demand in enumerate(demands) for query in range(demand.queries or 0)}
        self.withdrawn |= self.waiting() - now
        self.asked |= now

    def stop(self, positions: set[int]) -> None:
        self.stopped |= positions
        self.withdrawn |= {query for query in self.waiting() if query[0] in self.stopped}

    def waiting(self) -> set[Query]:
        return self.asked - self.withdrawn - set(self.done) - set(+self.flying)

    def units(self, queries: set[Query]) -> Units:
        units: Units = Counter()
        for position, _ in queries:
            units[self.demands[position].kind] += self.demands[position].weight
        return units

    def waiting_units(self) -> Units:
        return self.units(self.waiting()) + (Counter() if self.opening_sent else self.opening)

    def reserved(self) -> Units:
        return bound([demand for demand in self.demands if demand.queries is None])

    @property
    def lost(self) -> bool:
        if not self.opening_sent:
            return bool(self.opening_lost)
        return self.opened and any(self.losses[query] for query in self.waiting())

    @property
    def lost_at(self) -> set[str]:
        """Where work was lost that waits."""
        if not self.opening_sent:
            return {attempt.backend for attempt in self.opening_lost}
        return {attempt.backend for query in self.waiting() for attempt in self.losses[query]}

    @property
    def to_open(self) -> bool:
        return not self.opening_sent and not self.lost

    @property
    def started(self) -> bool:
        return self.opened and bool(self.waiting()) and not self.lost

    @property
    def stalled(self) -> bool:
        return self.quiet and any(demand.queries is None for demand in self.demands)

    @property
    def quiet(self) -> bool:
        return self.opened and not self.waiting() and not self.slices

    def urgency(self) -> tuple[float, ...]:
        work = sum(USUAL[kind] * units for kind, units in self.waiting_units().items())
        return (self.rank, self.deadline_s, round(work, 6), self.number)

    def is_aged(self, now_s: float) -> bool:
        return now_s - self.came_s >= LIMITS.age_s * (self.rank + 1)


@dataclass(eq=False)
class Cargo:
    """One slice and who carries it: a step, or a step and its copy."""

    part: Slice
    carriers: int = 1
    settled: bool = False
    lost: list[Attempt] = field(default_factory=list)


@dataclass(eq=False)
class Sent:
    """A step on its way."""

    step: Step
    cargo: list[Cargo]
    due_s: float
    copied: bool = False
    began_s: float | None = None
    """When a worker began it, by all that can be known; None while it is at hand."""


@dataclass(eq=False)
class Host:
    """A backend."""

    workers: int = 0
    known: bool = False
    largest: Counter[Kind] = field(default_factory=Counter)
    """The largest number of units that was observed in a step."""


def first(books: Sequence[Book]) -> Book | None:
    return min(books, key=Book.urgency, default=None)


def eldest(books: Sequence[Book]) -> Book | None:
    return min(books, key=lambda book: book.number, default=None)


def certain(openings: Sequence[Book], started: Sequence[Book], now_s: float) -> tuple[list[Book], list[Book]]:
    """Who is in the next step for sure, straight from the rules: the eldest aged ones, and one of the first openings.

    Those are of the best class, one of each owner: whose turn it is the twin does not know. An owner who has half of
    the step waits for the openings of the others, and where there are none for the started ones.
    """
    members: list[Book] = []

    def fits(book: Book, spare: int = 0, before: Sequence[Book] = ()) -> bool:
        there = [*members, *before]
        size = sum(member.size for member in there) + book.size
        return not there or (len(there) + 1 + spare <= LIMITS.items and size <= LIMITS.size_bytes)

    aged = [book for line in (started, openings) if (book := eldest([each for each in line if each.is_aged(now_s)]))]
    for book in sorted(aged, key=lambda book: book.number):
        members.extend([book] if fits(book) else [])
    left = [book for book in openings if book not in members]
    assert LIMITS.items == 3, "two items are more than half of a step, so that an owner with one has half"
    halves = {book.owner for book in members if book.owner}
    others = [book for book in left if book.owner not in halves]
    before = [] if others else [book for book in started if book not in members]
    left = others or left
    best = [book for book in left if book.rank == min(each.rank for each in left)]
    heads = [head for name in OWNERS if (head := first([book for book in best if book.owner == name]))]
    spare = 1 if started and not before else 0
    if any(book in openings for book in members) or not all(fits(head, spare, before) for head in heads):
        heads = []
    return members, heads


def queries_of(part: Slice) -> list[Query]:
    return [(span.position, query) for span in part.spans for query in range(span.start, span.stop)]


demands = st.builds(
    lambda kind, queries, weight: Demand(kind, queries, queries, weight),
    st.sampled_from(KINDS_OF_QUERIES),
    st.sampled_from([0, 1, 5, 20, 45]),
    st.sampled_from([1, 1, 1, 3, 20]),
)
late_demands = st.builds(
    lambda kind, most: Demand(kind, None, most), st.sampled_from(KINDS_OF_QUERIES), st.sampled_from([0, 6, 40])
)
openings = st.sampled_from(
    [{"opening": 1}, {"opening": 1, "layer_gradient": 3}, {"opening": 1, "ranking": 1}, {"decode": 7, "opening": 1}, {}]
)  # fmt: skip


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.planner = Planner(LIMITS)
        self.books: dict[int, Book] = {}
        self.hosts = {name: Host() for name in BACKENDS}
        self.sent: list[Sent] = []
        self.now_s = 0.0
        self.drift = 1.0
        self.passed = dict.fromkeys(OWNERS, 0)
        """In how many steps others of no better class have opened something while an owner waited."""

    @initialize(workers=st.tuples(st.integers(1, 2), st.integers(1, 2)), observed=st.sets(st.sampled_from(BACKENDS)))
    def begin(self, workers: tuple[int, int], observed: set[str]) -> None:
        for name, number in zip(BACKENDS, workers, strict=True):
            self.set_workers(name, number)
        for name in sorted(observed):
            self.observe(name, "a", Load({"masked_forward": 5, "opening": 1}, 2), 1.0)

    @property
    def live(self) -> list[Book]:
        return [book for book in self.books.values() if not book.over]

    @property
    def workers(self) -> int:
        return max(1, sum(host.workers for host in self.hosts.values()))

    def flying(self, name: str) -> list[Sent]:
        return [sent for sent in self.sent if sent.step.backend == name]

    def waiting_units(self, books: Sequence[Book]) -> Units:
        return sum((book.waiting_units() for book in books), Counter())

    def reserved(self, books: Sequence[Book]) -> Units:
        return sum((book.reserved() for book in books), Counter())

    def in_flight(self) -> Units:
        units: Units = Counter()
        for cargo in {id(cargo): cargo for sent in self.sent for cargo in sent.cargo if not cargo.settled}.values():
            units.update({work.kind: work.units for work in cargo.part.work})
        return units

    # what comes from outside

    @rule(
        wanted=st.lists(demands, max_size=3),
        late=st.lists(late_demands, max_size=2),
        less=st.integers(0, 3),
        split=st.integers(1, 3),
        known=st.booleans(),
        opening=openings,
        size=st.integers(0, 12),
        patience_s=st.sampled_from([0.5, 2.0, 30.0, 300.0, math.inf]),
        priority=st.sampled_from(CLASSES),
        owner=st.sampled_from(["", "", "ann", "bob"]),
    )
    def admit(self, wanted, late, less, split, known, opening, size, patience_s, priority, owner) -> None:
        asked = [*wanted, *late]
        rank, deadline_s = CLASSES.index(priority), self.now_s + patience_s
        options = {"size_bytes": size, "deadline_s": deadline_s, "priority": priority, "owner": OWNERS[owner]}
        options["opening"] = [Work(kind, units) for kind, units in opening.items()]
        if refusal := self.refusal(asked, options):
            reason, retry_after_s = refusal
            with pytest.raises(Overloaded) as error:
                self.planner.admit(asked, now_s=self.now_s, **options)
            assert error.value.reason == reason
            assert error.value.retry_after_s == (retry_after_s and pytest.approx(retry_after_s))
            return
        large = self.planner.seconds_of(bound(asked)) / self.workers > LIMITS.waiting_s / 64
        number = self.planner.admit(asked, now_s=self.now_s, **options)
        final = [self.final(demand, less) for demand in wanted]
        for demand in late:  # "curves to come" are replaced by the curves of several maps
            parts = [replace(demand, most=demand.most // split) for _ in range(split)]
            final += [replace(part, queries=part.most) if known else part for part in parts]
        self.books[number] = Book(
            number, [], final, Counter(opening), size, deadline_s, rank, owner, self.now_s, bound(asked), large
        )
        self.books[number].ask(asked)

    @staticmethod
    def final(demand: Demand, less: int) -> Demand:
        assert demand.queries is not None
        queries = max(0, demand.queries - less * demand.queries // 4)
        return Demand(demand.kind, queries, queries, max(1, demand.weight - less))

    def refusal(self, asked: Sequence[Demand], options) -> tuple[str, float | None] | None:
        """(reason, hint) of the refusal that is due; None if there is none."""
        live, owner = self.live, options["owner"]
        if not live:
            return None
        mine = [book for book in live if owner.name and book.owner == owner.name]
        observed = any(host.known and host.workers for host in self.hosts.values())
        own = Counter({work.kind: work.units for work in options["opening"]})
        more_s = self.planner.seconds_of(bound(asked) + own)
        if len(live) >= LIMITS.requests:
            return "requests", None
        if owner.name and len(mine) >= owner.requests:
            return "token_requests", None
        worked_on = self.waiting_units(live) + self.in_flight() + self.reserved(live)
        there_s = self.planner.seconds_of(self.waiting_units(live) + self.reserved(live))
        for book in live:
            if book.large:
                its_s = self.planner.seconds_of(book.units(book.waiting()) + book.reserved())
                there_s -= max(0.0, its_s - LIMITS.waiting_s / 2 * self.workers)
        excess_s = (there_s + more_s) / self.workers - LIMITS.waiting_s
        if bound(asked) and excess_s > 0:
            return "work", excess_s if observed else None
        there_s = self.planner.seconds_of(self.waiting_units(mine) + self.reserved(mine))
        measured = all(worked_on[kind] for kind in bound(asked))
        if bound(asked) and owner.name and (mine or measured) and there_s + more_s > owner.waiting_s:
            return "token_work", (there_s + more_s - owner.waiting_s) / self.workers if observed else None
        seconds = self.planner.predicted_s(
            asked,
            opening=options["opening"],
            priority=options["priority"],
            deadline_s=options["deadline_s"],
            owner=owner,
        )
        measured = all(worked_on[kind] for kind in bound(asked) + own)
        if measured and seconds is not None and self.now_s + seconds > options["deadline_s"]:
            return "deadline", self.now_s + seconds - options["deadline_s"]
        return None

    @rule(name=st.sampled_from(BACKENDS), workers=st.integers(0, 2))
    def set_workers(self, name: str, workers: int) -> None:
        self.hosts[name].workers = workers
        self.planner.set_workers(name, workers)
        self._begin(name)

    @rule(seconds=st.sampled_from([0.01, 0.3, 3.0, 6.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.pump()

    @rule(drift=st.sampled_from([0.3, 0.8, 1.0, 1.5, 4.0]))
    def costs_drift(self, drift: float) -> None:
        self.drift = drift

    def observe(self, name: str, worker: str, load: Load, factor: float) -> None:
        seconds = sum(COSTS[kind] * units for kind, units in load.units.items()) + 0.004 * load.items + 0.01
        self.planner.observe(name, worker, load, factor * SPEEDS[worker] * self.drift * seconds, self.now_s)
        host = self.hosts[name]
        host.known = True
        for kind, units in load.units.items():
            host.largest[kind] = max(host.largest[kind], units)

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
            if self._room_s(name) <= self.now_s
        }
        if not room:
            assert step is None
            self._check_wake()
            return False
        ready = [book for book in self.live if self.now_s < book.deadline_s]
        lost = first([book for book in ready if book.lost])
        is_fresh = step is not None and step.copy_of is None
        if lost and not (is_fresh and [part.request for part in step.slices] == [lost.number]):
            # It waits for a backend with workers that has not lost it, and holds up nobody else meanwhile.
            working = {name for name, host in self.hosts.items() if host.workers}
            assert lost.lost_at & set(room), "lost work goes first and alone"
            assert working - lost.lost_at or len(lost.lost_at) > 1
            ready = [book for book in ready if not book.lost]
            if not any(book.to_open or book.started for book in ready):
                return self._copy(step, set(room))
        elif not self._fresh():
            return self._copy(step, set(room))
        elif lost:
            working = {name for name, host in self.hosts.items() if host.workers}
            assert step.backend not in lost.lost_at or not working - lost.lost_at or len(lost.lost_at) > 1
            self._check_size(step)
            self._take(step)
            return True
        assert step is not None
        assert step.backend == min(room, key=lambda name: (room[name], name))
        self._check_members(step, ready)
        self._check_size(step)
        self._take(step)
        return True

    def _fresh(self) -> bool:
        """Whether a request could go into a step, if there were room."""
        ready = [book for book in self.live if self.now_s < book.deadline_s]
        return any(book.lost or book.to_open or book.started for book in ready)

    def _begin(self, name: str) -> None:
        """Free workers begin what is at hand, the first sent first."""
        flying = self.flying(name)
        free = self.hosts[name].workers - sum(sent.began_s is not None for sent in flying)
        for sent in [sent for sent in flying if sent.began_s is None][: max(0, free)]:
            sent.began_s = self.now_s

    def _room_s(self, name: str) -> float:
        """From when on a backend may be sent a step: just before the worker is free that would begin it."""
        flying, workers = self.flying(name), self.hosts[name].workers
        if len(flying) < workers:
            return -math.inf
        if len(flying) >= 2 * workers:
            return math.inf
        ends = sorted(sent.began_s + sent.step.expected_s for sent in flying if sent.began_s is not None)
        left = len(flying)
        while left > workers and len(ends) > 1:  # one step ends, and the next at hand takes its worker
            ends.pop(0)
            left -= 1
        return ends[0] - 0.1

    def _check_members(self, step: Step, ready: Sequence[Book]) -> None:
        members = [self.books[part.request] for part in step.slices]
        to_open, started = [book for book in ready if book.to_open], [book for book in ready if book.started]
        must, heads = certain(to_open, started, self.now_s)
        assert {book.number for book in must if book.to_open} <= {book.number for book in members}
        assert not heads or {book.number for book in heads} & {book.number for book in members}
        assert set(members) <= {*to_open, *started}
        aged = eldest([book for book in to_open if book.is_aged(self.now_s)])
        for name in OWNERS:
            in_order = sorted((book for book in to_open if book.owner == name and book is not aged), key=Book.urgency)
            chosen = [book for book in in_order if book in members]
            assert chosen == in_order[: len(chosen)], "an owner's openings come in their order"
        self._check_turns(members, to_open)
        if any(book.waiting() for book in members):
            assert step.queries, "one query always goes"
        old = eldest([book for book in started if book.is_aged(self.now_s)])
        if old in must:
            assert old in members, "the eldest aged request takes its share first"

    def _check_turns(self, members: Sequence[Book], to_open: Sequence[Book]) -> None:
        """An owner waits for a step of each of the others at most, unless for better classes, or aged requests."""
        chosen = [book for book in members if book.to_open]
        for name in OWNERS:
            head = first([book for book in to_open if book.owner == name])
            if head is None or any(book.owner == name for book in chosen):
                self.passed[name] = 0
            elif not any(book.is_aged(self.now_s) for book in members):
                self.passed[name] += any(book.rank >= head.rank for book in chosen)
            assert self.passed[name] < len(OWNERS)

    def _check_size(self, step: Step) -> None:
        members = [self.books[part.request] for part in step.slices]
        assert len(members) <= LIMITS.items
        assert len(members) == 1 or sum(book.size for book in members) <= LIMITS.size_bytes
        assert step.queries <= LIMITS.queries
        divisible = Counter(step.load.units)
        for book, part in zip(members, step.slices, strict=True):
            divisible.subtract(book.opening if part.opening else {})
        for kind, units in divisible.items():
            heaviest = max([demand.weight for book in members for demand in book.demands if demand.kind == kind] + [0])
            assert units <= max(FIRST_UNITS, 2 * self.hosts[step.backend].largest[kind], heaviest)

    def _take(self, step: Step) -> None:
        assert step.copy_of is None
        for part in step.slices:
            book = self.books[part.request]
            assert part.opening == (not book.opening_sent)
            assert part.opening or (book.opened and part.queries)
            queries = set(queries_of(part))
            assert queries <= book.waiting(), "each query is sent once"
            empty = {span.position for span in part.spans if not span.queries}
            nothing = {at for at, demand in enumerate(book.demands) if demand.queries == 0}
            assert empty == (nothing if part.opening else set())
            own = book.opening if part.opening else Counter()
            assert Counter({work.kind: work.units for work in part.work}) == book.units(queries) + own
            book.opening_sent = True
            book.slices += 1
            book.flying.update(queries_of(part))
        self._fly(step, [Cargo(part) for part in step.slices])

    def _fly(self, step: Step, cargo: list[Cargo]) -> None:
        host, before = self.hosts[step.backend], self.flying(step.backend)
        expected_s = step.predicted_s + sum(sent.step.predicted_s for sent in before) / host.workers
        due_s = self.now_s + max(1.0, 3 * expected_s) if host.known else math.inf
        assert 0 <= step.expected_s <= step.predicted_s, "the slowest worker is no faster than the average"
        self.sent.append(Sent(step, cargo, due_s))
        self._begin(step.backend)

    def _copy(self, step: Step | None, room: set[str]) -> bool:
        """No fresh work: an overdue step may go to another backend."""
        overdue = {
            sent.step.number: wanted
            for sent in self._overdue()
            if room - {sent.step.backend} and (wanted := self._wanted(sent))
        }
        if step is None:
            assert not overdue
            self._check_wake()
            return False
        assert step.copy_of in overdue
        original = next(sent for sent in self.sent if sent.step.number == step.copy_of)
        assert step.backend != original.step.backend
        assert step.slices == tuple(cargo.part for cargo in overdue[step.copy_of])
        original.copied = True
        for cargo in overdue[step.copy_of]:
            cargo.carriers += 1
        self._fly(step, overdue[step.copy_of])
        return True

    def _overdue(self) -> list[Sent]:
        originals = [sent for sent in self.sent if sent.step.copy_of is None and not sent.copied]
        return [sent for sent in originals if sent.due_s <= self.now_s]

    def _check_wake(self) -> None:
        several = sum(host.workers > 0 for host in self.hosts.values()) > 1
        times_s = [sent.due_s for sent in self.sent if sent.step.copy_of is None] if several else []
        if self._fresh() or (several and any(self._wanted(sent) for sent in self._overdue())):
            times_s += [self._room_s(name) for name in BACKENDS]
        coming = [at_s for at_s in times_s if self.now_s < at_s < math.inf]
        wake_s = self.planner.wake_s(self.now_s)
        assert wake_s == (pytest.approx(min(coming)) if coming else None)

    @rule()
    def sleep_until_woken(self) -> None:
        """Whoever looks when told so misses nothing."""
        self.pump()
        wake_s = self.planner.wake_s(self.now_s)
        if wake_s is not None:
            assert wake_s > self.now_s
            self.now_s = wake_s + 1e-9  # the twin's own times are added up in another order
            self.pump()

    def _wanted(self, sent: Sent) -> list[Cargo]:
        return [cargo for cargo in sent.cargo if not cargo.settled and self._is_wanted(cargo)]

    def _is_wanted(self, cargo: Cargo) -> bool:
        book = self.books[cargo.part.request]
        return not book.over and self.now_s < book.deadline_s

    # answers

    def _find(self, which: int) -> tuple[Sent, Cargo, Book]:
        sent, cargo = [(sent, cargo) for sent in self.sent for cargo in sent.cargo][which]
        return sent, cargo, self.books[cargo.part.request]

    def _land(self, sent: Sent, cargo: Cargo) -> None:
        sent.cargo.remove(cargo)
        cargo.carriers -= 1
        self.sent = [sent for sent in self.sent if sent.cargo]
        self._begin(sent.step.backend)

    def _settle(self, cargo: Cargo, book: Book) -> None:
        cargo.settled = True
        book.flying.subtract(queries_of(cargo.part))
        book.slices -= 1

    @precondition(lambda self: self.sent)
    @rule(
        data=st.data(),
        worker=st.sampled_from(sorted(SPEEDS)),
        factor=st.sampled_from([0.9, 1.0, 1.0, 1.1, 16.0, 500.0]),
        greedy=st.booleans(),
    )
    def done(self, data: st.DataObject, worker: str, factor: float, greedy: bool) -> None:
        which = data.draw(st.integers(0, sum(len(sent.cargo) for sent in self.sent) - 1))
        sent = self._find(which)[0]
        if len(sent.cargo) == 1:
            self.observe(sent.step.backend, worker, sent.step.load, factor)
        self._done(which, greedy)

    def _done(self, which: int, greedy: bool = False) -> None:
        sent, cargo, book = self._find(which)
        part, counting = cargo.part, not cargo.settled and not book.over
        if greedy and counting and part.opening:
            self._ask_too_much(sent, book)
        final = book.final if part.opening else None
        counts = self.planner.done(sent.step.number, part.request, final)
        self._land(sent, cargo)
        assert counts == counting
        if cargo.settled:
            return
        self._settle(cargo, book)
        if counts:
            book.done.update(queries_of(part))
            book.opened |= part.opening
            if part.opening:
                book.ask(book.final)
            self._finish(book)

    def _ask_too_much(self, sent: Sent, book: Book) -> None:
        """Whatever of more is asked for than was admitted, it is refused and changes nothing."""
        before = (self.planner.counts(), self.planner.waiting_units(), self.planner.reserved_units())
        kind = next(iter(book.admitted), "tail")
        room = book.admitted[kind] - bound(book.final)[kind]
        with pytest.raises(ValueError, match="admitted"):
            self.planner.done(sent.step.number, book.number, [*book.final, Demand(kind, None, room + 1)])
        assert before == (self.planner.counts(), self.planner.waiting_units(), self.planner.reserved_units())

    def _finish(self, book: Book) -> None:
        assert self.planner.stalled(book.number) == book.stalled
        book.over = book.quiet and not book.stalled

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
            self._lost(0, by_worker=True)
        self.pump()

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), by_worker=st.booleans())
    def lost(self, data: st.DataObject, by_worker: bool) -> None:
        self._lost(data.draw(st.integers(0, sum(len(sent.cargo) for sent in self.sent) - 1)), by_worker)

    def _lost(self, which: int, by_worker: bool = False) -> None:
        sent, cargo, book = self._find(which)
        part = cargo.part
        self._land(sent, cargo)
        blame = self.planner.blame  # judged beforehand: a request at fault is taken off the records
        witnesses = {name for name in BACKENDS if blame.is_witness(name, part.request)}
        fate = self.planner.lost(sent.step.number, part.request, by_worker)
        if not cargo.settled and book.over:
            self._settle(cargo, book)
        alone = len(sent.step.slices) == 1
        cargo.lost += [Attempt(sent.step.backend, by_worker, alone)] if alone or not cargo.carriers else []
        if book.over or cargo.settled or cargo.carriers:
            assert fate is (Fate.OVER if book.over else Fate.GOES_ON)
            return
        self._settle(cargo, book)
        for query in queries_of(part):
            book.losses[query] += cargo.lost
        book.opening_lost += cargo.lost if part.opening else []
        book.opening_sent &= not part.opening
        histories = [book.losses[query] for query in queries_of(part) if query[0] not in book.stopped]
        histories += [book.opening_lost] * part.opening
        assert fate in {self._fate(history, witnesses) for history in histories} or (not histories)
        assert (fate is Fate.GOES_ON) == all(self._fate(history, witnesses) is Fate.GOES_ON for history in histories)
        book.stop(set())
        book.over = fate is not Fate.GOES_ON
        if not book.over:
            self._finish(book)

    @precondition(lambda self: any(book.opened for book in self.live))
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        """What waits of a position is cancelled, what is in flight may still be answered, and is not sent again."""
        book = data.draw(st.sampled_from([book for book in self.live if book.opened]))
        known = [at for at, demand in enumerate(book.demands) if demand.queries is not None]
        positions = set(data.draw(st.lists(st.sampled_from(known), max_size=2))) if known else set()
        waited = len(book.waiting())
        withdrawn = self.planner.withdraw(book.number, positions)
        book.stop(positions)
        assert withdrawn == waited - len(book.waiting())
        self._finish(book)

    def _fate(self, history: Sequence[Attempt], witnesses: set[str]) -> Fate:
        """Straight from the rules; the twin does not judge backends itself."""
        against = [attempt for attempt in history if attempt.backend in witnesses]
        if sum(attempt.by_worker for attempt in against) >= 2:
            return Fate.AT_FAULT
        elsewhere = [name for name in BACKENDS if self.hosts[name].workers]
        others = set(elsewhere) - {attempt.backend for attempt in history}
        return Fate.GIVEN_UP if len(against) >= 3 or (len(history) >= 3 and not others) else Fate.GOES_ON

    @rule(name=st.sampled_from(BACKENDS), what=st.sampled_from(["answers", "loses", "passes", "fails"]))
    def evidence(self, name: str, what: str) -> None:
        """Whatever is known of backends, queries are neither lost nor asked twice."""
        blame, requests = self.planner.blame, [book.number for book in self.live][:1]
        if what == "loses":
            blame.lost(name, requests, 0.1, self.now_s - 1, self.now_s)
        elif what == "answers":
            blame.answered(name, 0.3)
        else:
            blame.controlled(name, what == "passes")

    @precondition(lambda self: any(book.stalled for book in self.live))
    @rule(part=st.sampled_from([0.0, 0.5, 1.0]))
    def settle(self, part: float) -> None:
        book = next(book for book in self.live if book.stalled)
        position = next(at for at, demand in enumerate(book.demands) if demand.queries is None)
        most = book.demands[position].most
        with pytest.raises(ValueError, match="queries"):
            self.planner.settle(book.number, position, most + 1)
        queries = int(part * most)
        self.planner.settle(book.number, position, queries)
        changed = list(book.demands)
        changed[position] = replace(changed[position], queries=queries, most=queries)
        book.ask(changed)
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
        counts, live = self.planner.counts(), self.live
        assert counts.asked == counts.waiting + counts.in_flight + counts.done + counts.cancelled
        assert counts.asked == sum(len(book.asked) for book in self.books.values())
        assert counts.waiting == self.planner.waiting == sum(len(book.waiting()) for book in live)
        assert counts.in_flight == sum((+book.flying).total() for book in self.books.values())
        assert counts.done == sum(book.done.total() for book in self.books.values())
        assert sum(self.planner.counts_by_class().values(), type(counts)()) == counts
        assert len(self.planner) == len(live)
        assert all(book.number in self.planner for book in live)

    @invariant()
    def units_add_up_and_never_exceed_what_was_admitted(self) -> None:
        waiting, reserved = self.waiting_units(self.live), self.reserved(self.live)
        assert self.planner.waiting_units() == dict(+waiting)
        assert self.planner.reserved_units() == dict(+reserved)
        assert self.planner.waiting_s() == pytest.approx(self.planner.seconds_of(waiting))
        for book in self.live:
            needed = book.units(book.waiting() | set(+book.flying)) + book.reserved()
            assert all(units <= book.admitted[kind] for kind, units in needed.items())

    def teardown(self) -> None:
        """From any state, work ends when every step is answered, and every query was answered exactly once."""
        for name in BACKENDS:
            self.set_workers(name, 1)
        while True:
            self.pump()
            if self.sent:
                self._done(0)
            elif any(book.stalled for book in self.live):
                self.settle(1.0)
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
