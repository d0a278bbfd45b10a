"""Drives the planner with virtual workers and a virtual clock: utilisation, waiting, and what planning itself takes.

    python benchmarks/planner_sim.py            # results/planner-sim.json, and a Markdown table
    python benchmarks/planner_sim.py --quick    # a few virtual seconds: does it run?

A worker is a number that says how fast it is; what its steps take comes from a table of seconds for each kind of work,
image and step, which the planner does not know, times noise; one of 500 takes ten times as long, one of 10 000 hangs
for seconds. Requests come as a Poisson process, in bursts, or so that a fixed number of them is always there. They ask
masked queries, from none (half of them: a Grad-CAM) to RISE's 4000, or are methods with work of many kinds. Workers die
and come back. Only the planner's own time is real: it is measured around each of its calls, as processor time.

Utilisation is the part of the workers' time in which they were busy while work waited. Efficiency is the work done
while work waited (units and images, without what each step costs by itself) against what the same workers would do in
steps of exactly the target time.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from camserve.errors import Overloaded
from camserve.methods.work import Kind, Work
from camserve.planning import CLASSES, Demand, Fate, Limits, Load, Planner, Step

PER_BACKEND = 8
"""Number of workers of one backend."""
SLOW, HANGING = (0.002, 10.0), (0.0001, 200.0)
"""Probability of a step that is slow, or hangs, and how many times as long it takes."""
HOP_S = 0.004
"""Seconds of one way between planner and worker: TorchServe's front end takes 3 to 7 ms there and back."""
NOTICED_S = 0.4
"""Seconds after which TorchServe says that a worker died."""
RESTART_S = 5.0

Arrivals = Literal["poisson", "bursty", "full"]
Call = Callable[[], None]
LATE = 1.5
"""Number of target times from which on a step is late."""
WARM = 10
"""Number of steps of a kind on a worker before its steps count: until then the cost is not known."""


@dataclass(frozen=True)
class Device:
    """Says what a step takes, in seconds, and what it should take."""

    units: Mapping[Kind, float]
    """Seconds of a unit of each kind of work."""
    image_s: float
    step_s: float
    target_s: float
    steps_per_worker: int

    def seconds(self, load: Load) -> float:
        units_s = sum(units * self.units[kind] for kind, units in load.units.items())
        return units_s + self.image_s * load.items + self.step_s

    @property
    def queries_per_s(self) -> float:
        """Masked forwards per second in full steps of one image."""
        left_s = self.target_s - self.image_s - self.step_s
        return left_s / self.units["masked_forward"] / self.target_s


CPU = Device(
    {
        "decode": 0.012,
        "opening": 0.035,
        "masked_forward": 0.012,
        "layer_gradient": 0.006,
        "pixel_gradient": 0.045,
        "tail": 0.004,
        "closed_form": 0.00002,
        "ranking": 0.25,
    },
    image_s=0.005,
    step_s=0.02,
    target_s=0.3,
    steps_per_worker=1,
)
"""Costs of about EfficientNet-Lite0 on two cores."""
GPU = Device(
    {
        "decode": 0.012,
        "opening": 0.0006,
        "masked_forward": 0.0002,
        "layer_gradient": 0.0004,
        "pixel_gradient": 0.0008,
        "tail": 0.00007,
        "closed_form": 0.0000005,
        "ranking": 0.25,
    },
    image_s=0.001,
    step_s=0.004,
    target_s=0.03,
    steps_per_worker=2,
)
"""Costs sixty times as small, but with the overhead of a call; XRAI's ranking is done by the processor all the same."""


@dataclass(frozen=True)
class Ask:
    """Says what a request asks."""

    demands: tuple[Demand, ...] = ()
    opening: tuple[Work, ...] = (Work("opening", 1),)
    curves: int = 0
    """Number of queries of the last demand, which is not known until all else is done."""


def queries(kind: Kind, number: int) -> tuple[Demand, ...]:
    return (Demand(kind, number, number),)


GRAD_CAM = Ask(opening=(Work("opening", 1), Work("layer_gradient", 1)))
CHANNELS = 1280
METHODS = {
    "Score-CAM": Ask(queries("masked_forward", CHANNELS)),
    "SS-CAM(35)": Ask(queries("masked_forward", 35 * CHANNELS)),
    "IS-CAM(10)": Ask(queries("masked_forward", 10 * CHANNELS)),
    "SmoothGrad(50)": Ask(queries("pixel_gradient", 50)),
    "Ablation-CAM": Ask(queries("tail", CHANNELS)),
    "Ablation-CAM, closed form": Ask(queries("closed_form", CHANNELS)),
    "Group-CAM with curves": Ask((*queries("masked_forward", 32), Demand("masked_forward", None, 7722)), curves=514),
}
LONGEST = Ask(queries("masked_forward", 1000 * CHANNELS))
"""The longest request: SS-CAM with 1000 samples."""

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
    """Says what is simulated."""

    workers: int
    arrivals: Arrivals = "poisson"
    load: float = 0.8
    """Queries that come, as a share of what the workers can do in full steps."""
    patience: float = 1.0
    """Factor of the deadlines."""
    requests: int = 1000
    """Number of requests at any time, if arrivals are "full"; these have no deadlines."""
    methods: tuple[str, ...] = ()
    """Names of the methods that requests ask in turn; none: masked queries as in `MIX`."""
    grad_cams_per_s: float = 0.0
    """Rate of Grad-CAMs that come beside, as a Poisson process."""
    seconds: float = 10.0
    warm_s: float = 2.0
    """Seconds at the start that are not measured, because the costs are not known yet."""
    death_s: float = 0.0
    """Mean life of a worker in seconds; 0: none dies."""
    faults: bool = True
    """Whether some steps take ten times as long, and some hang."""
    device: Device = GPU
    seed: int = 0


@dataclass
class Tally:
    """Counts what is measured."""

    steps: int = 0
    queries: int = 0
    copies: int = 0
    step_s: float = 0.0
    """Seconds of the steps that came back."""
    planning_s: float = 0.0
    """Seconds of processor time in the planner."""
    busy_s: float = 0.0
    """Seconds of busy workers while work waited."""
    alive_s: float = 0.0
    """Seconds of living workers while work waited."""
    work_s: float = 0.0
    """Seconds of queries and images, by the worker that did them, while work waited."""
    judged: int = 0
    """Number of steps whose kinds of work their worker has all met ten times before."""
    slow: int = 0
    """Number of judged steps that took 1.5 x the target or more."""
    grad_cam_s: list[float] = field(default_factory=list)
    """Seconds from arrival to the answer, of the Grad-CAMs that came beside."""
    refused: int = 0
    late: int = 0
    failed: int = 0
    opened_s: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CLASSES})
    """Seconds from arrival to the first answer, by class."""
    complete_s: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CLASSES})
    """Seconds from arrival to the last answer, by class."""


@dataclass(eq=False)
class Worker:
    backend: str
    name: str
    speed: float
    alive: bool = True
    step: Step | None = None
    runs: int = 0
    """Number of steps begun, which tells the end of a step that died with its worker from a later one."""
    met: Counter[Kind] = field(default_factory=Counter)
    """Number of steps by kind of work."""


class World:
    """Holds the workers, the requests and the clock."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.now_s = 0.0
        self.tally = Tally()
        device = scene.device
        steps = device.steps_per_worker
        self.planner = Planner(Limits(device.target_s, requests=10**6, waiting_s=1e9, steps_per_worker=steps))
        self._random = random.Random(scene.seed)
        self._events: list[tuple[float, int, Call]] = []
        self._numbers = itertools.count()
        self._asked: dict[int, tuple[str, float]] = {}  # (class, arrival) by request
        self._curves: dict[int, int] = {}
        """Number of queries that are asked when all else is done, by request."""
        self._beside: set[int] = set()
        """Numbers of the Grad-CAMs that came beside."""
        self._methods = itertools.cycle(scene.methods)
        self._queues: dict[str, deque[Step]] = {}
        self._workers: dict[str, list[Worker]] = {}
        for number in range(scene.workers):
            self._hire(f"backend {number // PER_BACKEND}", f"worker {number}")
        for backend in self._workers:
            self._tell(backend)
        self._arrivals_end_s = scene.seconds

    def run(self) -> None:
        """Simulates the scene's seconds."""
        if self.scene.arrivals != "full":
            self._at(0.0, self._arrive)
        if self.scene.grad_cams_per_s:
            self._at(self.scene.warm_s, self._look)
        self._pump()
        self._until(lambda: self.now_s >= self.scene.seconds)

    def drain(self) -> None:
        """Lets no request come any more, until everything is answered."""
        self._arrivals_end_s = self.now_s
        self._until(lambda: self.planner.idle)

    def complete(self, ask: Ask) -> None:
        """Simulates one request, until it is complete."""
        self._admit(ask, "normal", float("inf"))
        self._pump()
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
        """Returns the time to the next request; in bursts nine of ten follow within a tenth of the mean."""
        if self.scene.arrivals == "bursty":
            mean_s *= 0.1 if self._random.random() < 0.9 else 9.1
        return self._random.expovariate(1 / mean_s)

    def _look(self) -> None:
        """Lets a Grad-CAM come beside, and the next one later."""
        number = self._admit(GRAD_CAM, "interactive", float("inf"))
        if number is not None:
            self._beside.add(number)
        self._at(self._random.expovariate(self.scene.grad_cams_per_s), self._look)
        self._pump()

    def _ask(self, patient: bool) -> None:
        if self.scene.methods:
            self._admit(METHODS[next(self._methods)], "normal", float("inf"))
            return
        _, sizes, classes = self._random.choices(MIX, [weight for weight, _, _ in MIX])[0]
        number, priority = self._random.choice(sizes), self._random.choice(classes)
        ask = Ask(queries("masked_forward", number)) if number else GRAD_CAM
        self._admit(ask, priority, float("inf") if patient else self.scene.patience * PATIENCE_S[priority])

    def _admit(self, ask: Ask, priority: str, patience_s: float) -> int | None:
        try:
            number = self._planning(
                self.planner.admit,
                ask.demands,
                opening=ask.opening,
                now_s=self.now_s,
                size_bytes=100_000,
                deadline_s=self.now_s + patience_s,
                priority=priority,
            )
        except Overloaded:
            self.tally.refused += 1
            return None
        self._asked[number] = (priority, self.now_s)
        if ask.curves:
            self._curves[number] = ask.curves
        if patience_s < float("inf"):
            self._at(patience_s, lambda: self._expire(number))
        return int(number)

    def _expire(self, number: int) -> None:
        if number in self.planner:
            self._planning(self.planner.cancel, number)
            self.tally.late += 1

    # steps

    _alarms = 0

    def _pump(self) -> None:
        while self.scene.arrivals == "full" and self.now_s < self._arrivals_end_s:
            if len(self.planner) >= self.scene.requests:
                break
            self._ask(patient=True)
        while (step := self._planning(self.planner.next_step, self.now_s)) is not None:
            self._send(step)
        self._set_alarm(self._planning(self.planner.wake_s, self.now_s))

    def _set_alarm(self, wake_s: float | None) -> None:
        """Has `_pump` called then; a later alarm takes the place of an earlier one."""
        self._alarms += 1
        alarm = self._alarms
        if wake_s is not None:
            self._at(wake_s - self.now_s, lambda: self._pump() if alarm == self._alarms else None)

    def _send(self, step: Step) -> None:
        self.tally.copies += step.copy_of is not None
        self._at(HOP_S, lambda: self._deliver(step))

    def _deliver(self, step: Step) -> None:
        self._queues[step.backend].append(step)
        self._work(step.backend)

    def _work(self, backend: str) -> None:
        for worker in self._workers[backend]:
            if worker.alive and worker.step is None and self._queues[backend]:
                self._begin(worker, self._queues[backend].popleft())

    def _begin(self, worker: Worker, step: Step) -> None:
        factor = worker.speed * self._noise()
        seconds = factor * self.scene.device.seconds(step.load)
        worker.step = step
        worker.runs += 1
        run = worker.runs
        self._busy += 1
        self._at(seconds, lambda: self._end(worker, run, seconds))
        if self.planner.waiting and self.now_s >= self.scene.warm_s:
            self.tally.work_s += seconds - factor * self.scene.device.step_s

    def _noise(self) -> float:
        drawn = self._random.random() if self.scene.faults else 1.0
        if drawn < HANGING[0]:
            return HANGING[1]
        return SLOW[1] if drawn < HANGING[0] + SLOW[0] else self._random.lognormvariate(0.0, 0.1)

    def _end(self, worker: Worker, run: int, seconds: float) -> None:
        if worker.step is None or worker.runs != run:
            return  # it died before
        step, worker.step = worker.step, None
        self._busy -= 1
        self._at(HOP_S, lambda: self._answer(worker, step, seconds))
        self._work(worker.backend)

    def _answer(self, worker: Worker, step: Step, seconds: float) -> None:
        plan = self.planner
        self._planning(plan.observe, step.backend, worker.name, step.load, seconds, self.now_s)
        self._judge(worker, step, seconds)
        if self.now_s >= self.scene.warm_s:
            self.tally.steps += 1
            self.tally.queries += step.queries
            self.tally.step_s += seconds
        for each in step.slices:
            counts = self._planning(plan.done, step.number, each.request)
            if counts and each.opening:
                self._note(self.tally.opened_s, each.request)
            if counts and plan.stalled(each.request):
                self._planning(plan.settle, each.request, 1, self._curves.pop(each.request))
            if counts and each.request not in plan:
                self._note(self.tally.complete_s, each.request)
                if each.request in self._beside:
                    self.tally.grad_cam_s.append(self.now_s - self._asked[each.request][1])
        self._pump()

    def _judge(self, worker: Worker, step: Step, seconds: float) -> None:
        kinds = [kind for kind, units in step.load.units.items() if units]
        if all(worker.met[kind] >= WARM for kind in kinds):
            self.tally.judged += 1
            self.tally.slow += seconds >= LATE * self.scene.device.target_s
        worker.met.update(kinds)

    def _note(self, waits: dict[str, list[float]], request: int) -> None:
        priority, came_s = self._asked[request]
        if came_s >= self.scene.warm_s:
            waits[priority].append(self.now_s - came_s)

    # workers

    _alive = 0
    _busy = 0

    def _hire(self, backend: str, name: str) -> None:
        self._queues.setdefault(backend, deque())
        worker = Worker(backend, name, self._random.lognormvariate(0.0, 0.1))
        self._workers.setdefault(backend, []).append(worker)
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
        self._at(NOTICED_S, lambda: self._mourn(worker.backend, step))
        self._at(RESTART_S, lambda: self._rise(worker))

    def _mourn(self, backend: str, step: Step | None) -> None:
        self._tell(backend)
        for each in step.slices if step else ():
            fate = self._planning(self.planner.lost, step.number, each.request)
            self.tally.failed += fate is not Fate.GOES_ON
        self._pump()

    def _rise(self, worker: Worker) -> None:
        worker.alive = True
        self._alive += 1
        self._tell(worker.backend)
        self._work(worker.backend)
        self._plan_death(worker)
        self._pump()

    def _tell(self, backend: str) -> None:
        self.planner.set_workers(backend, sum(worker.alive for worker in self._workers[backend]))


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
    """Simulates a scene, and returns its figures."""
    world = World(scene)
    began_s = time.perf_counter()
    world.run()
    tally, measured_s = world.tally, scene.seconds - scene.warm_s
    alive_s = tally.alive_s or 1.0  # nothing ever waited
    return {
        "scene": asdict(scene),
        "utilisation": tally.busy_s / alive_s,
        "efficiency": tally.work_s / alive_s / (1 - scene.device.step_s / scene.device.target_s),
        "steps_per_s": tally.steps / measured_s,
        "queries_per_s": tally.queries / measured_s,
        "mean_step_s": tally.step_s / tally.steps,
        "copies": tally.copies,
        "refused": tally.refused,
        "late": tally.late,
        "failed": tally.failed,
        "steps_within_1.5_targets": 1 - tally.slow / max(1, tally.judged),
        "grad_cam_beside": quantiles(tally.grad_cam_s),
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
    """Returns what is simulated, by what it shows."""
    seconds = {1: 62.0, 8: 32.0, 64: 12.0, 512: 5.0}
    if quick:
        seconds = {1: 4.0, 8: 3.0}
    most = max(seconds)
    counts = (100, 1000) if quick else (100, 1000, 10_000)
    largest = min(64, most)
    every = tuple(METHODS)
    return {
        "full": [Scene(workers, "full", requests=40 * workers, seconds=end) for workers, end in seconds.items()],
        "open": [
            Scene(workers, arrivals, seconds=3 * end, death_s=60.0)
            for workers, end in seconds.items()
            if workers < 512
            for arrivals in ("poisson", "bursty")
        ],
        "overload": [Scene(8, load=6.0, patience=0.1, seconds=seconds[8])],
        "growth": [Scene(largest, "full", requests=count, seconds=seconds[largest]) for count in counts],
        "mixed": [
            lasting(device, workers, every, 12 * workers, 20 if quick else 1000)
            for device in (CPU, GPU)
            for workers in (1, 8)
        ],
        "beside": [
            lasting(device, workers, methods, 2 * workers, 60 if quick else 2000, grad_cams=True)
            for device, workers in ((CPU, 1), (GPU, 1), (replace(GPU, steps_per_worker=1), 1))
            for methods in ((), *((name,) for name in METHODS))
        ],
    }


def lasting(
    device: Device, workers: int, methods: tuple[str, ...], requests: int, steps: int, grad_cams: bool = False
) -> Scene:
    """Returns a scene of some methods with a number of requests at a time, for about a number of steps of a worker."""
    end_s = steps * device.target_s
    often = 0.25 / device.target_s if grad_cams else 0.0
    return Scene(
        workers,
        "full",
        requests=requests if methods else 0,
        methods=methods,
        grad_cams_per_s=often,
        seconds=end_s,
        warm_s=end_s / 4,
        faults=not grad_cams,  # whoever comes during a step that hangs waits for that, not for the plan
        device=device,
    )


def longest(device: Device, workers: int, ask: Ask) -> dict[str, Any]:
    """Simulates one request alone, until it is complete, and returns its figures."""
    world = World(Scene(workers, "full", requests=0, seconds=float("inf"), warm_s=0.0, device=device))
    world.complete(ask)
    tally = world.tally
    return {
        "scene": asdict(world.scene),
        "queries": tally.queries,
        "steps": tally.steps,
        "took_s": world.now_s,
        "steps_within_1.5_targets": 1 - tally.slow / max(1, tally.judged),
        "planning_us_per_step": 1e6 * tally.planning_s / tally.steps,
    }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Returns the figures as Markdown."""
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
        "",
        "| target | workers | steps each | methods | steps within 1.5 targets | efficiency | mean step "
        "| beside: a Grad-CAM, p50 / p99 |",
        "| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
        *(_kinds(result) for result in [*results["mixed"], *results["beside"]]),
        "",
        "| target | workers | queries | steps | took | steps within 1.5 targets |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_long(result) for result in results["longest"]),
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


def _kinds(result: dict[str, Any]) -> str:
    scene, waits = result["scene"], result["grad_cam_beside"]
    methods = ", ".join(scene["methods"]) if len(scene["methods"]) < len(METHODS) else "all"
    cells = [
        f"{1000 * scene['device']['target_s']:.0f} ms",
        str(scene["workers"]),
        str(scene["device"]["steps_per_worker"]),
        methods or "none",
        f"{100 * result['steps_within_1.5_targets']:.1f} %",
        f"{result['efficiency']:.2f}",
        f"{1000 * result['mean_step_s']:.1f} ms",
        f"{1000 * waits['p50_s']:.0f} / {1000 * waits['p99_s']:.0f} ms" if waits["requests"] else "",
    ]
    return f"| {' | '.join(cells)} |"


def _long(result: dict[str, Any]) -> str:
    scene = result["scene"]
    cells = [
        f"{1000 * scene['device']['target_s']:.0f} ms",
        str(scene["workers"]),
        f"{result['queries']:,}",
        f"{result['steps']:,}",
        f"{result['took_s']:,.0f} s",
        f"{100 * result['steps_within_1.5_targets']:.1f} %",
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
    ask = Ask(queries("masked_forward", 10 * CHANNELS)) if given.quick else LONGEST
    results["longest"] = [longest(device, workers, ask) for device, workers in ((CPU, 8), (GPU, 1))]
    environment = common.environment(torch.device("cpu"))
    common.write(given.out, {"environment": environment, "quick": given.quick, "results": results})
    print(table(results))
    print(f"\nwritten to {given.out}")


if __name__ == "__main__":
    main()
