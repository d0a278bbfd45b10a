"""Where steps can be sent, and how fast each place is."""

from __future__ import annotations

from dataclasses import dataclass

from camserve.planning.cost import FIRST_QUERIES, StepCost
from camserve.planning.heap import Heap
from camserve.planning.limits import Limits

HASTE = 0.5
"""Part of the target time that a step takes for which somebody waits who asks for an opening and nothing else..."""
FIXED = 0.1
"""... unless more than this part of it would be the fixed cost of a step."""


@dataclass
class _Worker:
    cost: StepCost
    heard_s: float
    queries_per_s: float = 0.0


@dataclass(frozen=True)
class Pace:
    """How fast work goes at all places together, by the fitted costs."""

    queries_per_s: float
    """In full steps of one image."""
    images_per_s: float
    """In full steps of openings without queries."""
    flying_s: float
    """Until what is in flight is done, if it is spread over all workers."""
    cost: StepCost
    """Of the fastest place."""
    step_queries: int
    """A full step there."""


class Place:
    """One TorchServe with a number of workers; it chooses the worker of a step itself."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name = name
        self.limits = limits
        """Of its steps."""
        self.workers = 0
        self.steps = 0
        """In flight."""
        self.flying_s = 0.0
        """Their predicted times together."""
        self.cost = StepCost(limits.target_s / FIRST_QUERIES)
        """Of the slowest worker: whichever gets a step, it shall not take longer than the target."""
        self.queries_per_s = 0.0
        """Of a worker, on average."""
        self._workers: dict[str, _Worker] = {}

    @property
    def known(self) -> bool:
        """A step has been observed."""
        return self.cost.observed > 0

    @property
    def has_room(self) -> bool:
        """Another step may be sent."""
        return self.steps < self.limits.steps_per_worker * self.workers

    @property
    def load(self) -> float:
        """Steps in flight for each worker."""
        return self.steps / self.workers

    def budget(self, images: int, in_haste: bool = False) -> int:
        """Queries of a step with so many images."""
        seconds = self.limits.target_s
        if in_haste:
            seconds = min(seconds, max(HASTE * seconds, self.cost.step_s / FIXED))
        return min(self.limits.queries, self.cost.queries_within(seconds, images))

    def sends(self, predicted_s: float) -> None:
        """A step is on its way."""
        self.steps += 1
        self.flying_s += predicted_s

    def gets_back(self, predicted_s: float) -> None:
        """A step is answered, or lost."""
        self.steps -= 1
        self.flying_s = self.flying_s - predicted_s if self.steps else 0.0

    def observe(self, name: str, queries: int, images: int, seconds: float, now_s: float) -> None:
        """A worker has answered a step."""
        worker = self._workers.get(name)
        if worker is None:
            worker = self._workers[name] = _Worker(StepCost(self.limits.target_s / FIRST_QUERIES), now_s)
        worker.cost.observe(queries, images, seconds)
        worker.heard_s = now_s
        full = min(self.limits.queries, worker.cost.queries_within(self.limits.target_s, 1))
        worker.queries_per_s = full / worker.cost.predict(full, 1)
        self._workers = {
            name: worker for name, worker in self._workers.items() if now_s - worker.heard_s < self.limits.forget_s
        }
        self.cost = min(self._workers.values(), key=lambda worker: worker.queries_per_s).cost
        self.queries_per_s = sum(worker.queries_per_s for worker in self._workers.values()) / len(self._workers)


class Places:
    """All places of one model."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._places: dict[str, Place] = {}
        self._room: Heap[str] = Heap()  # places that have room, the least loaded first

    def __len__(self) -> int:
        """Places with workers."""
        return sum(place.workers > 0 for place in self._places.values())

    def __getitem__(self, name: str) -> Place:
        return self._places[name]

    def get(self, name: str) -> Place | None:
        """The place of this name, unless it was removed."""
        return self._places.get(name)

    def set_workers(self, name: str, workers: int, limits: Limits | None = None) -> None:
        """So many workers can answer at a place, with limits of its own if they are given.

        With other limits than before it has come back on another device: what was learnt of it is forgotten.
        """
        place = self._places.get(name)
        if place is None or limits not in (None, place.limits):
            place = self._places[name] = Place(name, limits or self._limits)
        place.workers = workers
        self._sort(place)

    def remove(self, name: str) -> None:
        """Forgets a place, if it is known."""
        self._places.pop(name, None)
        self._room.drop(name)

    def free(self, apart_from: str | None = None) -> Place | None:
        """The least loaded place that has room."""
        name = self._room.first()
        if name is not None and name == apart_from:
            self._room.drop(name)
            other = self._room.first()
            self._sort(self._places[name])
            name = other
        return None if name is None else self._places[name]

    def sends(self, place: Place, predicted_s: float) -> None:
        """A step goes to a place."""
        place.sends(predicted_s)
        self._sort(place)

    def gets_back(self, place: Place, predicted_s: float) -> None:
        """A step has come back from a place, or is lost."""
        place.gets_back(predicted_s)
        self._sort(place)

    def pace(self) -> Pace | None:
        """How fast work goes; None as long as no step was observed at any place that has workers."""
        working = [place for place in self._places.values() if place.workers]
        known = [place for place in working if place.known]
        if not known:
            return None
        workers = sum(place.workers for place in working)
        part = sum(place.workers for place in known) / workers  # the others are taken to be like those
        items = self._limits.items
        fastest = max(known, key=lambda place: place.queries_per_s)
        return Pace(
            queries_per_s=sum(place.workers * place.queries_per_s for place in known) / part,
            images_per_s=sum(place.workers * items / place.cost.predict(0, items) for place in known) / part,
            flying_s=sum(place.flying_s for place in working) / workers,
            cost=fastest.cost,
            step_queries=fastest.budget(1),
        )

    def _sort(self, place: Place) -> None:
        if self._places.get(place.name) is not place:
            return  # removed while steps were on their way
        if place.has_room:
            self._room.put(place.name, (place.load,))
        else:
            self._room.drop(place.name)
