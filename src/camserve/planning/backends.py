"""Keeps the backends that steps can be sent to, and learns how fast each of them is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from operator import mul

from camserve.methods.work import KINDS, Kind
from camserve.planning.cost import FIRST_UNITS, Load, StepCost
from camserve.planning.heap import Heap
from camserve.planning.limits import Limits
from camserve.planning.schedule import Schedule
from camserve.planning.step import Step

_RECENT = 0.1  # weight of the newest load in the usual one
_MOST_LEAD = 0.5  # fraction of a step's target that `Limits.lead_s` may be
_LEAST_LEFT = 0.1  # fraction of a step's target that counts as left for its units, whatever the rest of the step takes


@dataclass
class _Worker:
    """The learnt cost of one worker, and the time at which it was last heard of."""

    cost: StepCost
    heard_s: float


class BackendState:
    """Keeps what the planner knows of one TorchServe: its workers, its steps in flight, and their cost.

    TorchServe chooses the worker of a step itself.
    """

    def __init__(self, name: str, limits: Limits) -> None:
        self.name = name
        self.limits = limits
        """Bounds of the steps at the backend."""
        self.workers = 0
        self.in_flight_s = 0.0
        """Sum of the predicted times of the steps in flight."""
        self.cost = self._new_cost()
        """Cost of the slowest worker: whichever worker gets a step, it shall not take longer than the target."""
        self.pace = 1.0
        """Part of the slowest worker's time that a worker takes on average."""
        self.unit_s = self._unit_s([self.cost])
        """Seconds that a unit of each kind takes a worker on average, in full steps."""
        self._workers: dict[str, _Worker] = {}
        self._schedule = Schedule()
        self._usual: Sequence[float] | None = None  # `Load.amounts` of late, on average

    @property
    def known(self) -> bool:
        """Tells whether a step of the backend was observed."""
        return self.cost.observed > 0

    @property
    def steps(self) -> int:
        """Number of steps in flight at the backend."""
        return len(self._schedule)

    @property
    def room_s(self) -> float:
        """Time from which on the backend may be sent another step, by what is in flight now.

        A backend with a free worker has room at once, one with as many steps as it may have has none. In between, the
        next step is sent just in time, so that whoever comes meanwhile does not wait for it as well.
        """
        if self.steps >= self.limits.steps_per_worker * self.workers:
            return math.inf
        if self.steps < self.workers:
            return -math.inf
        return self._schedule.free_s(self.workers) - min(self.limits.lead_s, _MOST_LEAD * self.limits.target_s)

    @property
    def crowding(self) -> float:
        """Number of steps in flight for each worker."""
        return self.steps / self.workers

    def left_s(self, now_s: float) -> float:
        """Returns for how long the workers will be busy with the steps in flight, added up, by prediction."""
        return self._schedule.left_s(now_s)

    def set_workers(self, workers: int, now_s: float) -> None:
        """Sets how many workers can answer."""
        self.workers = workers
        self._schedule.begin(workers, now_s)

    def sends(self, step: Step, now_s: float) -> None:
        """Notes that the backend is sent a step."""
        self._schedule.sends(step.number, step.expected_s, self.workers, now_s)
        self.in_flight_s += step.predicted_s

    def gets_back(self, step: Step, now_s: float) -> None:
        """Notes that a step of the backend is answered, or lost."""
        self._schedule.gets_back(step.number, self.workers, now_s)
        # An empty backend starts from 0 again, so that rounding errors do not add up.
        self.in_flight_s = self.in_flight_s - step.predicted_s if self.steps else 0.0

    def observe(self, name: str, load: Load, seconds: float, now_s: float) -> None:
        """Learns from a step that a worker has answered; forgets the workers that were not heard of for long."""
        if name not in self._workers:
            self._workers[name] = _Worker(self._new_cost(), now_s)
        worker = self._workers[name]
        worker.cost.observe(load, seconds)
        worker.heard_s = now_s
        horizon_s = now_s - self.limits.forget_s
        self._workers = {name: worker for name, worker in self._workers.items() if worker.heard_s > horizon_s}
        costs = [worker.cost for worker in self._workers.values()]
        for other in costs:
            if other is not worker.cost:
                other.hear_of(worker.cost)
                worker.cost.hear_of(other)
        self.cost, self.pace = self._slowest(costs, load)
        self.unit_s = self._unit_s(costs)

    def _new_cost(self) -> StepCost:
        return StepCost(self.limits.target_s / FIRST_UNITS, self.limits.target_s)

    def _slowest(self, costs: Sequence[StepCost], load: Load) -> tuple[StepCost, float]:
        """Returns the cost of the worker that takes longest for a step as they have been of late, and the pace."""
        if self._usual is None:
            self._usual = [0.0] * len(load.amounts)
        self._usual = [usual + _RECENT * (new - usual) for usual, new in zip(self._usual, load.amounts, strict=True)]
        usual = self._usual
        times_s = [sum(map(mul, usual, cost.coefficients)) for cost in costs]
        slowest_s = max(times_s)
        pace = sum(times_s) / len(times_s) / slowest_s if slowest_s else 1.0
        return costs[times_s.index(slowest_s)], pace

    def _unit_s(self, costs: Sequence[StepCost]) -> Mapping[Kind, float]:
        """Returns the seconds of a unit of each kind in full steps, with its share of what steps and images cost."""
        columns = zip(*(cost.coefficients for cost in costs), strict=True)
        *unit_s, item_s, step_s = (sum(column) / len(costs) for column in columns)
        fixed_s = item_s + step_s
        left_s = max(self.limits.target_s - fixed_s, _LEAST_LEFT * self.limits.target_s)
        full = {}
        for kind, seconds in zip(KINDS, unit_s, strict=True):
            # A step is full of time, or else of queries (or, openings, of items).
            least_s = fixed_s / self.limits.queries
            if kind == "opening":
                seconds, least_s = seconds + item_s, step_s / self.limits.items
            full[kind] = seconds + max(seconds * fixed_s / left_s, least_s)
        return full


class Backends:
    """Holds all backends of one model, the least crowded at hand."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._backends: dict[str, BackendState] = {}
        # Backends that have room, the least crowded first, and those that will have it, the first first. Time alone
        # moves a backend from the second to the first.
        self._room: Heap[str] = Heap()
        self._soon: Heap[str] = Heap()
        self._now_s = -math.inf  # the latest time that was heard of; answers bring none
        self._pool_s: Mapping[Kind, float] | None = None  # `unit_s`, as long as nothing has changed

    def __len__(self) -> int:
        """Returns the number of backends with workers."""
        return sum(backend.workers > 0 for backend in self._backends.values())

    @property
    def working(self) -> Set[str]:
        """Names of the backends with workers."""
        return {name for name, backend in self._backends.items() if backend.workers}

    @property
    def workers(self) -> int:
        """Number of workers of all backends."""
        return sum(backend.workers for backend in self._backends.values())

    @property
    def in_flight_s(self) -> float:
        """Seconds that the steps in flight take if they are spread over all workers."""
        working = [backend for backend in self._backends.values() if backend.workers]
        return sum(backend.in_flight_s for backend in working) / self.workers if working else 0.0

    def left_s(self, now_s: float) -> float:
        """Returns for how long all workers will be busy with the steps in flight, added up, by prediction."""
        return sum(backend.left_s(now_s) for backend in self._backends.values() if backend.workers)

    def set_workers(self, name: str, workers: int, limits: Limits | None = None) -> None:
        """Sets how many workers can answer at a backend, with limits of its own if they are given.

        A backend that gets other limits has come back on another device; what was learnt of it is forgotten.
        """
        backend = self._backends.get(name)
        if backend is None or limits not in (None, backend.limits):
            backend = self._backends[name] = BackendState(name, limits or self._limits)
        backend.set_workers(workers, self._now_s)
        self._pool_s = None
        self._sort(backend)

    def remove(self, name: str) -> None:
        """Forgets a backend, if it is known."""
        self._backends.pop(name, None)
        self._pool_s = None
        self._room.drop(name)
        self._soon.drop(name)

    def observe(self, name: str, worker: str, load: Load, seconds: float, now_s: float) -> None:
        """Learns from a step that a worker has answered; learns nothing if its backend was removed."""
        self._now_s = max(self._now_s, now_s)
        if name in self._backends:
            self._backends[name].observe(worker, load, seconds, now_s)
            self._pool_s = None

    def least_crowded(self, now_s: float, apart_from: Set[str] = frozenset()) -> BackendState | None:
        """Returns the backend with the fewest steps in flight for each worker among those that have room."""
        self._look(now_s)
        passed_over = []
        while (name := self._room.first()) is not None and name in apart_from:
            # The heap shows its first entry alone: it is taken out to see the next, and put back.
            self._room.drop(name)
            passed_over.append(name)
        for other in passed_over:
            self._room.put(other, (self._backends[other].crowding,))
        return None if name is None else self._backends[name]

    def next_room_s(self, now_s: float) -> float | None:
        """Returns when the next backend gets room although nothing has come back; None where none will."""
        self._look(now_s)
        name = self._soon.first()
        return None if name is None else self._backends[name].room_s

    def sends(self, backend: BackendState, step: Step, now_s: float) -> None:
        """Notes that a step goes to a backend."""
        backend.sends(step, now_s)
        self._sort(backend)

    def gets_back(self, backend: BackendState, step: Step) -> None:
        """Notes that a step has come back from a backend, or is lost."""
        backend.gets_back(step, self._now_s)
        self._sort(backend)

    @property
    def known(self) -> Sequence[BackendState]:
        """All backends with workers of which a step was observed."""
        return [backend for backend in self._backends.values() if backend.workers and backend.known]

    @property
    def unit_s(self) -> Mapping[Kind, float]:
        """Seconds that a unit of each kind takes a worker on average; unknown backends count as like known ones."""
        if self._pool_s is None:
            self._pool_s = self._average()
        return self._pool_s

    def _average(self) -> Mapping[Kind, float]:
        """Returns the average of the known backends with workers; without any, that of known ones, and else of all."""
        known = self.known or [backend for backend in self._backends.values() if backend.known]
        some = known or list(self._backends.values()) or [BackendState("", self._limits)]
        weights = [max(1, backend.workers) for backend in some]
        # The units that one second of every worker does together add up; hence the harmonic mean.
        if len(some) == 1:
            return some[0].unit_s
        return {
            kind: sum(weights)
            / sum(weight / max(backend.unit_s[kind], 1e-12) for weight, backend in zip(weights, some, strict=True))
            for kind in KINDS
        }

    def _look(self, now_s: float) -> None:
        """Finds the backends that have got room by now."""
        self._now_s = max(self._now_s, now_s)
        while (name := self._soon.first()) is not None and self._backends[name].room_s <= now_s:
            self._soon.drop(name)
            self._room.put(name, (self._backends[name].crowding,))

    def _sort(self, backend: BackendState) -> None:
        """Puts a backend where it belongs: among those that have room, those that will have it, or neither."""
        if self._backends.get(backend.name) is not backend:
            return  # removed while steps were on their way
        self._room.drop(backend.name)
        self._soon.drop(backend.name)
        if (room_s := backend.room_s) == -math.inf:
            self._room.put(backend.name, (backend.crowding,))
        elif room_s < math.inf:
            self._soon.put(backend.name, (room_s,))
