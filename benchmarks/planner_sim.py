"""Drives the planner with virtual workers and a virtual clock: utilisation, waiting, and what planning itself takes.

    python benchmarks/planner_sim.py            # results/planner-sim.json, and a Markdown table
    python benchmarks/planner_sim.py --quick    # a few virtual seconds: does it run?

A worker is a number that says how fast it is; its steps take a * queries + b * images + c seconds, times noise; one of
500 takes ten times as long, one of 10 000 hangs for seconds. Requests come as a Poisson process, in bursts, or so that
a fixed number of them is always there; half are Grad-CAMs (no queries), the rest goes up to RISE's 4000 queries.
Workers die and come back. Only the planner's own time is real: it is measured around each of its calls, as processor
time.

Utilisation is the part of the workers' time in which they were busy while work waited. Efficiency is the work done
while work waited (queries and images, without what each step costs by itself) against what the same workers would do in
steps of exactly the target time.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from camserve.errors import Overloaded
from camserve.planning import CLASSES, Limits, Planner, Step

PER_PLACE = 8
"""Workers of one TorchServe."""
SLOW, HANGING = (0.002, 10.0), (0.0001, 200.0)
"""(how often, how many times as long)"""
HOP_S = 0.004
"""One way between planner and worker: TorchServe's front end takes 3 to 7 ms there and back."""
NOTICED_S = 0.4
"""After this time TorchServe says that a worker died."""
RESTART_S = 5.0

Arrivals = Literal["poisson", "bursty", "full"]
Call = Callable[[], None]


@dataclass(frozen=True)
class Device:
    """What a step takes, in seconds, and what it should take."""

    query_s: float
    image_s: float
    step_s: float
    target_s: float

    def seconds(self, queries: int, images: int) -> float:
        return self.query_s * queries + self.image_s * images + self.step_s

    @property
    def queries_per_s(self) -> float:
        """In full steps of one image."""
        return (self.target_s - self.seconds(0, 1)) / self.query_s / self.target_s


GPU = Device(0.0002, 0.0015, 0.004, 0.03)
CPU = Device(0.012, 0.03, 0.02, 0.3)

MIX = [  # weight, queries, classes that ask for it
    (0.50, (0,), ("interactive", "normal")),
    (0.30, (8, 16, 32, 64), ("interactive", "normal")),
    (0.15, (512, 1024, 2048), ("normal", "batch")),
    (0.05, (4000,), ("batch",)),
]
MEAN_QUERIES = sum(weight * statistics.mean(queries) for weight, queries, _ in MIX)
PATIENCE_S = {"interactive": 10.0, "normal": 120.0, "batch": 3600.0}


@dataclass(frozen=True)
class Scene:
    """What is simulated."""

    workers: int
    arrivals: Arrivals = "poisson"
    load: float = 0.8
    """Queries that come, as a part of what the workers can do in full steps."""
    patience: float = 1.0
    """Factor of the deadlines."""
    requests: int = 1000
    """Requests that are there at any time, if arrivals are "full"; they have no deadlines."""
    seconds: float = 10.0
    warm_s: float = 2.0
    """Not measured: the costs are not known yet."""
    death_s: float = 0.0
    """Mean life of a worker; 0: none dies."""
    device: Device = GPU
    seed: int = 0


@dataclass
class Tally:
    """What is measured."""

    steps: int = 0
    queries: int = 0
    copies: int = 0
    step_s: float = 0.0
    """Time of the steps that came back."""
    planning_s: float = 0.0
    """Seconds of processor time in the planner."""
    busy_s: float = 0.0
    """Of workers, while work waited."""
    alive_s: float = 0.0
    """The same of workers that lived."""
    work_s: float = 0.0
    """Of queries and images, in time of the worker that did them, while work waited."""
    refused: int = 0
    late: int = 0
    failed: int = 0
    opened_s: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CLASSES})
    """From arrival to the first answer, by class."""
    complete_s: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CLASSES})


@dataclass(eq=False)
class Worker:
    place: str
    name: str
    speed: float
    alive: bool = True
    step: Step | None = None
    runs: int = 0
    """Counts steps, so that the end of a step that died with its worker is told from a later one."""


class World:
    """The workers, the requests and the clock."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.now_s = 0.0
        self.tally = Tally()
        self.planner = Planner(Limits(target_s=scene.device.target_s, requests=10**6, waiting_queries=10**9))
        self._random = random.Random(scene.seed)
        self._events: list[tuple[float, int, Call]] = []
        self._numbers = itertools.count()
        self._asked: dict[int, tuple[str, float]] = {}  # (class, arrival) by request
        self._queues: dict[str, deque[Step]] = {}
        self._workers: dict[str, list[Worker]] = {}
        for number in range(scene.workers):
            self._hire(f"place {number // PER_PLACE}", f"worker {number}")
        for place in self._workers:
            self._tell(place)
        self._arrivals_end_s = scene.seconds

    def run(self) -> None:
        """The scene's seconds."""
        if self.scene.arrivals != "full":
            self._at(0.0, self._arrive)
        self._pump()
        self._until(lambda: self.now_s >= self.scene.seconds)

    def drain(self) -> None:
        """Nothing comes any more, until everything is answered."""
        self._arrivals_end_s = self.now_s
        self._until(lambda: self.planner.idle)

    # events

    def _at(self, after_s: float, call: Call) -> None:
        heapq.heappush(self._events, (self.now_s + after_s, next(self._numbers), call))

    def _until(self, over: Callable[[], bool]) -> None:
        while self._events and not over():
            at_s, _, call = heapq.heappop(self._events)
            self._account(at_s - self.now_s)
            self.now_s = at_s
            call()

    def _account(self, seconds: float) -> None:
        if self.planner.waiting and self.now_s >= self.scene.warm_s:
            self.tally.busy_s += seconds * self._busy
            self.tally.alive_s += seconds * self._alive

    def _planning(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        began_s = time.thread_time()  # other programs on the machine do not count
        try:
            return call(*arguments, **named)
        finally:
            if self.now_s >= self.scene.warm_s:
                self.tally.planning_s += time.thread_time() - began_s

    # requests

    def _arrive(self) -> None:
        if self.now_s >= self._arrivals_end_s:
            return
        self._ask(patient=False)
        self._pump()
        mean_s = MEAN_QUERIES / (self.scene.load * self.scene.workers * self.scene.device.queries_per_s)
        self._at(self._gap_s(mean_s), self._arrive)

    def _gap_s(self, mean_s: float) -> float:
        """Bursts: nine of ten requests follow within a tenth of the mean, the tenth after the rest of the time."""
        if self.scene.arrivals == "bursty":
            mean_s *= 0.1 if self._random.random() < 0.9 else 9.1
        return self._random.expovariate(1 / mean_s)

    def _ask(self, patient: bool) -> None:
        _, sizes, classes = self._random.choices(MIX, [weight for weight, _, _ in MIX])[0]
        queries, priority = self._random.choice(sizes), self._random.choice(classes)
        patience_s = float("inf") if patient else self.scene.patience * PATIENCE_S[priority]
        try:
            number = self._planning(
                self.planner.admit,
                [queries],
                now_s=self.now_s,
                size_bytes=100_000,
                deadline_s=self.now_s + patience_s,
                priority=priority,
            )
        except Overloaded:
            self.tally.refused += 1
            return
        self._asked[number] = (priority, self.now_s)
        if not patient:
            self._at(patience_s, lambda: self._expire(number))

    def _expire(self, number: int) -> None:
        if number in self.planner:
            self._planning(self.planner.cancel, number)
            self.tally.late += 1

    # steps

    def _pump(self) -> None:
        while self.scene.arrivals == "full" and self.now_s < self._arrivals_end_s:
            if len(self.planner) >= self.scene.requests:
                break
            self._ask(patient=True)
        while (step := self._planning(self.planner.next_step, self.now_s)) is not None:
            self._send(step)
        wake_s = self.planner.wake_s(self.now_s)
        if wake_s is not None and not self.planner.waiting:
            self._at(wake_s - self.now_s, self._pump)

    def _send(self, step: Step) -> None:
        self.tally.copies += step.copy_of is not None
        self._at(HOP_S, lambda: self._deliver(step))

    def _deliver(self, step: Step) -> None:
        self._queues[step.place].append(step)
        self._work(step.place)

    def _work(self, place: str) -> None:
        for worker in self._workers[place]:
            if worker.alive and worker.step is None and self._queues[place]:
                self._begin(worker, self._queues[place].popleft())

    def _begin(self, worker: Worker, step: Step) -> None:
        factor = worker.speed * self._noise()
        seconds = factor * self.scene.device.seconds(step.queries, len(step.slices))
        worker.step = step
        worker.runs += 1
        run = worker.runs
        self._busy += 1
        self._at(seconds, lambda: self._end(worker, run, seconds))
        if self.planner.waiting and self.now_s >= self.scene.warm_s:
            self.tally.work_s += seconds - factor * self.scene.device.step_s

    def _noise(self) -> float:
        drawn = self._random.random()
        if drawn < HANGING[0]:
            return HANGING[1]
        return SLOW[1] if drawn < HANGING[0] + SLOW[0] else self._random.lognormvariate(0.0, 0.1)

    def _end(self, worker: Worker, run: int, seconds: float) -> None:
        if worker.step is None or worker.runs != run:
            return  # it died before
        step, worker.step = worker.step, None
        self._busy -= 1
        self._at(HOP_S, lambda: self._answer(worker, step, seconds))
        self._work(worker.place)

    def _answer(self, worker: Worker, step: Step, seconds: float) -> None:
        plan = self.planner
        self._planning(plan.observe, step.place, worker.name, step.queries, len(step.slices), seconds, self.now_s)
        if self.now_s >= self.scene.warm_s:
            self.tally.steps += 1
            self.tally.queries += step.queries
            self.tally.step_s += seconds
        for part in step.slices:
            counts = self._planning(plan.done, step.number, part.request)
            if counts and part.opening:
                self._note(self.tally.opened_s, part.request)
            if counts and part.request not in plan:
                self._note(self.tally.complete_s, part.request)
        self._pump()

    def _note(self, waits: dict[str, list[float]], request: int) -> None:
        priority, came_s = self._asked[request]
        if came_s >= self.scene.warm_s:
            waits[priority].append(self.now_s - came_s)

    # workers

    _alive = 0
    _busy = 0

    def _hire(self, place: str, name: str) -> None:
        self._queues.setdefault(place, deque())
        worker = Worker(place, name, self._random.lognormvariate(0.0, 0.1))
        self._workers.setdefault(place, []).append(worker)
        self._alive += 1
        self._plan_death(worker)

    def _plan_death(self, worker: Worker) -> None:
        if self.scene.death_s:
            self._at(self._random.expovariate(1 / self.scene.death_s), lambda: self._die(worker))

    def _die(self, worker: Worker) -> None:
        worker.alive = False
        self._alive -= 1
        step, worker.step = worker.step, None
        self._busy -= step is not None
        self._at(NOTICED_S, lambda: self._mourn(worker.place, step))
        self._at(RESTART_S, lambda: self._rise(worker))

    def _mourn(self, place: str, step: Step | None) -> None:
        self._tell(place)
        for part in step.slices if step else ():
            goes_on = self._planning(self.planner.lost, step.number, part.request)
            self.tally.failed += not goes_on
        self._pump()

    def _rise(self, worker: Worker) -> None:
        worker.alive = True
        self._alive += 1
        self._tell(worker.place)
        self._work(worker.place)
        self._plan_death(worker)
        self._pump()

    def _tell(self, place: str) -> None:
        self.planner.set_workers(place, sum(worker.alive for worker in self._workers[place]))


def quantiles(seconds: Sequence[float]) -> dict[str, float | int]:
    ordered = sorted(seconds)
    if not ordered:
        return {"requests": 0}
    return {
        "requests": len(ordered),
        "p50_s": ordered[len(ordered) // 2],
        "p99_s": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
    }


def measure(scene: Scene) -> dict[str, Any]:
    """Simulates a scene."""
    world = World(scene)
    began_s = time.perf_counter()
    world.run()
    tally, measured_s = world.tally, scene.seconds - scene.warm_s
    return {
        "scene": asdict(scene),
        "utilisation": tally.busy_s / tally.alive_s,
        "efficiency": tally.work_s / tally.alive_s / (1 - scene.device.step_s / scene.device.target_s),
        "steps_per_s": tally.steps / measured_s,
        "queries_per_s": tally.queries / measured_s,
        "mean_step_s": tally.step_s / tally.steps,
        "copies": tally.copies,
        "refused": tally.refused,
        "late": tally.late,
        "failed": tally.failed,
        "first_answer": {name: quantiles(waits) for name, waits in tally.opened_s.items()},
        "complete": {name: quantiles(waits) for name, waits in tally.complete_s.items()},
        "planning_us_per_step": 1e6 * tally.planning_s / tally.steps,
        "decisions_per_s": tally.steps / tally.planning_s,
        "planning_part_of_step_time": tally.planning_s / tally.step_s,
        "planning_part_of_one_core": tally.planning_s / measured_s,
        "counts": asdict(world.planner.counts()),
        "real_s": time.perf_counter() - began_s,
    }


def scenes(quick: bool) -> dict[str, list[Scene]]:
    """What is simulated, by what it shows."""
    seconds = {1: 62.0, 8: 32.0, 64: 12.0, 512: 5.0}
    if quick:
        seconds = {1: 4.0, 8: 3.0}
    most = max(seconds)
    counts = (100, 1000) if quick else (100, 1000, 10_000)
    lasting = min(64, most)
    return {
        "full": [Scene(workers, "full", requests=40 * workers, seconds=end) for workers, end in seconds.items()],
        "open": [
            Scene(workers, arrivals, seconds=3 * end, death_s=60.0)
            for workers, end in seconds.items()
            if workers < 512
            for arrivals in ("poisson", "bursty")
        ],
        "overload": [Scene(8, load=6.0, patience=0.1, seconds=seconds[8])],
        "growth": [Scene(lasting, "full", requests=count, seconds=seconds[lasting]) for count in counts],
    }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown."""
    lines = [
        "| workers | requests there | utilisation | efficiency | queries/s | step | decisions/s | planning per step "
        "| of the steps' time | of one core |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_speed(result) for result in [*results["full"], *results["growth"]]),
        "",
        "| workers | arrivals | load | class | requests | first answer p50 / p99 | complete p50 / p99 "
        "| refused | late |",
        "| ---: | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
        *(_waits(result, name) for result in [*results["open"], *results["overload"]] for name in CLASSES),
    ]
    return "\n".join(lines)


def _speed(result: dict[str, Any]) -> str:
    scene = result["scene"]
    cells = [
        str(scene["workers"]),
        str(scene["requests"]),
        f"{result['utilisation']:.3f}",
        f"{result['efficiency']:.3f}",
        f"{result['queries_per_s']:,.0f}",
        f"{1000 * result['mean_step_s']:.1f} ms",
        f"{result['decisions_per_s']:,.0f}",
        f"{result['planning_us_per_step']:.0f} us",
        f"{100 * result['planning_part_of_step_time']:.2f} %",
        f"{100 * result['planning_part_of_one_core']:.0f} %",
    ]
    return f"| {' | '.join(cells)} |"


def _waits(result: dict[str, Any], name: str) -> str:
    scene, opened, complete = result["scene"], result["first_answer"][name], result["complete"][name]
    spans = [f"{each['p50_s']:.3f} / {each['p99_s']:.3f} s" if each["requests"] else "" for each in (opened, complete)]
    counts = [result["refused"], result["late"]] if name == CLASSES[0] else ["", ""]  # of all classes together
    cells = [scene["workers"], scene["arrivals"], scene["load"], name, opened["requests"], *spans, *counts]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    import common  # torch comes with it, which nothing else here needs
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few virtual seconds of few workers")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "planner-sim.json")
    given = parser.parse_args()
    results = {what: [measure(scene) for scene in several] for what, several in scenes(given.quick).items()}
    environment = common.environment(torch.device("cpu"))
    common.write(given.out, {"environment": environment, "quick": given.quick, "results": results})
    print(table(results))
    print(f"\nwritten to {given.out}")


if __name__ == "__main__":
    main()
