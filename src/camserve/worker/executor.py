"""Executes a step: items of any requests, one forward for their images, one pool for their masked queries.

The order of work is the reverse of trust: each item is decoded on its own, images of one layer share a forward pass,
queries of all items share micro-batches. Where a shared pass fails, it is repeated item by item, so that one bad item
never harms its neighbours.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from camserve.errors import INTERNAL_MESSAGE, CamserveError, DeadlineExceeded, Internal, InvalidOption
from camserve.labels import resolve_target
from camserve.methods import GradCam, MethodSpec, ScoreCam
from camserve.queries.pack import ask
from camserve.saliency.features import Features
from camserve.saliency.masks import Queries
from camserve.saliency.registry import REGISTRY, Direct, Perturbation, Sampled
from camserve.types import (
    Item,
    ItemResult,
    MapCurves,
    Partial,
    Precision,
    Prediction,
    StepResult,
    Target,
    Task,
)
from camserve.worker.device import device_memory
from camserve.worker.forward import Forward, Wanted
from camserve.worker.memory import Memory, Passed, Seen
from camserve.worker.network import Network, exact_float32

log = logging.getLogger(__name__)

MEMORY_BYTES = 256 * 2**20
"""What a worker keeps of recent images, unless it is told otherwise."""

Progress = Callable[[int, int], None]


@dataclass
class _Job:
    """One item on its way through the step."""

    item: Item
    error: CamserveError | None = None
    layers: tuple[str, ...] = ()
    """Of its tasks, each once; the default layer where it has no task."""
    digest: bytes = b""
    seen: Seen | None = None
    features: dict[str, Features] = field(default_factory=dict)
    """By layer."""
    predictions: tuple[Prediction, ...] = ()
    targets: tuple[Prediction, ...] = ()
    asked: dict[int, Queries] = field(default_factory=dict)
    """Masked queries by place among the item's tasks."""
    orders: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Of a task's queries, where it wants to know."""
    partials: dict[int, Partial] = field(default_factory=dict)


class Executor:
    """Runs steps on one network; may be called from several threads.

    Args:
        network: the network. With a memory its weights must stay as they are.
        memory_bytes: bound of what is kept of recent images from one step to the next; 0: nothing.
    """

    def __init__(self, network: Network, memory_bytes: int = 0) -> None:
        self.network = network
        self.memory = Memory(memory_bytes)
        self._images = Forward(network, self.memory)
        self.worker = f"{socket.gethostname()}/{os.getpid()}/{network.device}"

    def execute(self, items: Sequence[Item], on_progress: Progress | None = None) -> StepResult:
        """Answers every item; an item's failure is its own outcome and nobody else's.

        Args:
            items: of any requests.
            on_progress: called with masked queries (done, total) of the step.
        """
        jobs = [_Job(item) for item in items]
        hits, misses = self.memory.hits, self.memory.misses
        seconds: dict[str, float] = {}
        with self.network.evaluating(), exact_float32(), _own_modes(self.network.device.type):
            with self._stage("decode", seconds):
                self._each(jobs, self._prepare)
            with self._stage("forward", seconds):
                for layer in dict.fromkeys(layer for job in jobs for layer in job.layers):
                    group = [job for job in jobs if layer in job.layers]
                    for first in range(0, len(group), self.network.micro_batch):
                        self._together(group[first : first + self.network.micro_batch], partial(self._forward, layer))
            with self._stage("queries", seconds):
                self._each(jobs, self._work)
                for group in _groups(jobs, lambda job: job.item.precision):
                    self._together(group, lambda jobs: self._ask(jobs, on_progress))
        found = self.memory.hits - hits, self.memory.misses - misses
        memory = device_memory(self.network.device)
        return StepResult(tuple(map(_outcome, jobs)), seconds, self.worker, *found, device_memory=memory)

    def warm_up(self) -> None:
        """Runs every kind of pass once, so that the first request does not pay for what PyTorch sets up lazily."""
        image = np.zeros((*self.network.preprocessing.crop_px, 3), np.uint8)
        score_cam = Task(0, ScoreCam(), 0, self.network.micro_batch)
        self.execute([Item(image, (), (score_cam, Task(1, GradCam(), 0, 0)))])

    @contextmanager
    def _stage(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.network.device.type == "cuda":
            torch.cuda.synchronize(self.network.device)  # kernels run behind the calls that start them
        seconds[name] = time.perf_counter() - start

    def _each(self, jobs: Sequence[_Job], work: Callable[[_Job], None]) -> None:
        for job in jobs:
            self._together([job], lambda group: work(group[0]))

    def _together(self, jobs: Sequence[_Job], work: Callable[[Sequence[_Job]], None]) -> None:
        """Work on all jobs at once, or one by one where that fails; a job that fails alone has its error."""
        jobs = [job for job in jobs if job.error is None]
        try:
            if jobs:
                work(jobs)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._together([job], work)
            else:
                jobs[0].error = _typed(error)

    def _prepare(self, job: _Job) -> None:
        if 0 < job.item.deadline_unix_s < time.time():
            raise DeadlineExceeded("the deadline passed before the worker came to this")
        info = self.network.info
        names = [task.layer for task in job.item.tasks] or [""]
        job.layers = tuple(dict.fromkeys(info.layer(name).name for name in names))
        for target in job.item.targets:
            resolve_target(target, info.labels)
        job.digest, job.seen = self._images.seen(job.item.image)

    def _forward(self, layer: str, jobs: Sequence[_Job]) -> None:
        wanted = [
            Wanted(job.digest, job.seen, partial(self._classes, job), self._needs_gradients(job, layer))
            for job in jobs
            if job.seen is not None
        ]
        for job, passed in zip(jobs, self._images.passed(layer, wanted), strict=True):
            self._take(job, layer, passed)

    def _take(self, job: _Job, layer: str, passed: Passed) -> None:
        classes = self._classes(job, passed.logits)
        needed = self._needs_gradients(job, layer)
        job.features[layer] = Features(
            input=passed.input,
            activations=passed.activations,
            logits=passed.logits,
            targets=torch.tensor(classes, device=passed.logits.device),
            gradients=torch.stack([passed.gradients[index] for index in classes]) if needed else None,
            classifier=self.network.classifier,
            passes=self.network.passes(layer),
        )
        if layer == job.layers[0]:  # the first of its passes
            self._predict(job, passed.logits.softmax(dim=0))

    def _needs_gradients(self, job: _Job, layer: str) -> bool:
        tasks = [task for task in job.item.tasks if self.network.info.layer(task.layer).name == layer]
        return any(REGISTRY[type(task.method)].needs_gradients or _has_order(task) for task in tasks)

    def _classes(self, job: _Job, logits: Tensor) -> list[int]:
        """The item's targets as class indices, in order, each once; the most probable class where there is none."""
        ranked = logits.argsort(descending=True, stable=True)
        found: dict[int, None] = {}
        for target in job.item.targets or (Target(top_k=1),):
            target = resolve_target(target, self.network.info.labels)
            found.update(dict.fromkeys([target.index] if target.index is not None else ranked[: target.top_k].tolist()))
        return list(found)

    def _predict(self, job: _Job, probabilities: Tensor) -> None:
        targets = job.features[job.layers[0]].targets
        top = probabilities.topk(min(job.item.top_predictions, len(probabilities)))
        job.predictions = _predictions(top.indices, top.values)
        job.targets = _predictions(targets, probabilities[targets])

    def _work(self, job: _Job) -> None:
        """Makes what needs no pooled query, and the masks of what does."""
        for place, task in enumerate(job.item.tasks):
            method, spec = REGISTRY[type(task.method)], task.method
            features = job.features[self.network.info.layer(task.layer).name]
            numbers, job.orders[place] = _numbers(task, features)
            made = features.passes.made
            if isinstance(method, Perturbation):
                job.asked[place] = method.masks(features, spec, numbers)
            else:
                sums = _sums(method, features, spec, numbers)
                job.partials[place] = _as_partial(task, features.passes.made - made, sums, job.orders[place])

    def _ask(self, jobs: Sequence[_Job], on_progress: Progress | None) -> None:
        precision: Precision = jobs[0].item.precision
        waiting = [(job, place, masks) for job in jobs for place, masks in job.asked.items()]
        scores = ask(
            lambda x: self.network.scores(x, precision),
            [masks for _, _, masks in waiting],
            self.network.micro_batch,
            on_progress,
        )
        for (job, place, masks), answer in zip(waiting, scores, strict=True):
            task = job.item.tasks[place]
            method = REGISTRY[type(task.method)]
            assert isinstance(method, Perturbation)
            sums = method.reduce(answer, masks, task.method)
            job.partials[place] = _as_partial(task, len(masks), sums, job.orders[place])


@contextmanager
def _own_modes(device_type: str) -> Iterator[None]:
    """Neither the caller's no_grad or inference_mode nor its autocast reaches the network."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, enabled=False):
        yield


def _groups(jobs: Sequence[_Job], key: Callable[[_Job], str]) -> Iterator[list[_Job]]:
    """The jobs without error, together where the key is the same."""
    groups: dict[str, list[_Job]] = {}
    for job in jobs:
        if job.error is None:
            groups.setdefault(key(job), []).append(job)
    yield from groups.values()


def _has_order(task: Task) -> bool:
    """The worker is to say in which order the queries matter, and the method has one."""
    method = REGISTRY[type(task.method)]
    return task.ordered and not isinstance(method, Direct) and method.order is not None


def _numbers(task: Task, features: Features) -> tuple[Tensor, tuple[int, ...]]:
    """The queries that a task asks, (n,), and the order of all queries if it asks for that."""
    total = task.method.queries(len(features.activations), len(features.targets))
    start, stop = min(task.start, total), min(task.stop, total)
    device = features.activations.device
    if task.numbers:
        if max(task.numbers) >= total:
            raise InvalidOption(f"there are {total} queries, number {max(task.numbers)} was asked")
        return torch.tensor(task.numbers, device=device), ()
    method = REGISTRY[type(task.method)]
    if task.ordered and not isinstance(method, Direct) and method.order is not None:
        order = method.order(features, task.method)
        return order[start:stop], tuple(order.tolist())
    return torch.arange(start, stop, device=device), ()


def _sums(method: Direct | Sampled, features: Features, spec: MethodSpec | MapCurves, numbers: Tensor) -> Tensor:
    if isinstance(method, Direct):
        return method.sums(features, spec)
    return method.sums(features, spec, numbers)


def _typed(error: Exception) -> CamserveError:
    if isinstance(error, CamserveError):
        return error
    log.error("an item failed", exc_info=error)
    return Internal(INTERNAL_MESSAGE)


def _predictions(indices: Tensor, probabilities: Tensor) -> tuple[Prediction, ...]:
    pairs = zip(indices.tolist(), probabilities.tolist(), strict=True)
    return tuple(Prediction(index, "", probability) for index, probability in pairs)


def _as_partial(task: Task, queries: int, sums: Tensor, order: tuple[int, ...]) -> Partial:
    return Partial(task.position, queries, sums.detach().cpu().numpy(), order)


def _outcome(job: _Job) -> ItemResult | CamserveError:
    if job.error is not None:
        return job.error
    assert job.seen is not None
    partials = tuple(job.partials[place] for place in range(len(job.item.tasks)))
    return ItemResult(job.predictions, job.targets, job.seen.view, partials)
