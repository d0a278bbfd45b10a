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

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from camserve import images
from camserve.errors import INTERNAL_MESSAGE, CamserveError, Internal, InvalidImage
from camserve.labels import resolve_target
from camserve.methods import GradCam, MethodSpec, ScoreCam
from camserve.queries.pack import ask
from camserve.saliency.features import Features
from camserve.saliency.masks import Queries
from camserve.saliency.registry import REGISTRY, Direct, Perturbation, Sampled
from camserve.types import InputView, Item, ItemResult, Partial, Precision, Prediction, StepResult, Target, Task
from camserve.worker.network import Network, exact_float32

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass
class _Job:
    """One item on its way through the step."""

    item: Item
    error: CamserveError | None = None
    layer: str = ""
    pixels: Tensor | None = None
    view: InputView | None = None
    features: Features | None = None
    predictions: tuple[Prediction, ...] = ()
    targets: tuple[Prediction, ...] = ()
    asked: dict[int, Queries] = field(default_factory=dict)
    """Masked queries by place among the item's tasks."""
    partials: dict[int, Partial] = field(default_factory=dict)


class Executor:
    """Runs steps on one network. Stateless between steps; may be called from several threads."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.worker = f"{socket.gethostname()}/{os.getpid()}/{network.device}"

    def execute(self, items: Sequence[Item], on_progress: Progress | None = None) -> StepResult:
        """Answers every item; an item's failure is its own outcome and nobody else's.

        Args:
            items: of any requests.
            on_progress: called with masked queries (done, total) of the step.
        """
        jobs = [_Job(item) for item in items]
        seconds: dict[str, float] = {}
        with self.network.evaluating(), exact_float32(), _own_modes(self.network.device.type):
            with self._stage("decode", seconds):
                self._each(jobs, self._prepare)
            with self._stage("forward", seconds):
                for group in _groups(jobs, lambda job: job.layer):
                    for first in range(0, len(group), self.network.micro_batch):
                        self._together(group[first : first + self.network.micro_batch], self._forward)
            with self._stage("queries", seconds):
                self._each(jobs, self._work)
                for group in _groups(jobs, lambda job: job.item.precision):
                    self._together(group, lambda jobs: self._ask(jobs, on_progress))
        return StepResult(tuple(map(_outcome, jobs)), seconds, self.worker)

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
            if job.error is None:
                self._together([job], lambda group: work(group[0]))

    def _together(self, jobs: Sequence[_Job], work: Callable[[Sequence[_Job]], None]) -> None:
        """Work on all jobs at once, or one by one where that fails; a job that fails alone has its error."""
        try:
            work(jobs)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._together([job], work)
            else:
                jobs[0].error = _typed(error)

    def _prepare(self, job: _Job) -> None:
        info = self.network.info
        job.layer = info.layer(job.item.layer).name
        for target in job.item.targets:
            resolve_target(target, info.labels)
        if isinstance(job.item.image, np.ndarray):
            pixels, job.view = self._from_array(job.item.image)
        else:
            pixels, job.view = self._see(images.decode(job.item.image))
        job.pixels = torch.from_numpy(pixels)

    def _from_array(self, array: np.ndarray) -> tuple[np.ndarray, InputView]:
        size = self.network.preprocessing.crop_px
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise InvalidImage("a float32 image must be finite, got NaN or infinity")
        if array.shape == (*size, 3) and array.dtype in (np.uint8, np.float32):
            return np.array(array), images.whole_view(size)  # a copy: torch wants writable memory
        if array.dtype == np.float32:
            raise InvalidImage(f"a float32 image must be {size[0]} x {size[1]} x 3, got {list(array.shape)}")
        return self._see(images.from_array(array))

    def _see(self, image: Image.Image) -> tuple[np.ndarray, InputView]:
        seen, view = images.network_view(image, self.network.preprocessing)
        return np.array(seen), view

    def _forward(self, jobs: Sequence[_Job]) -> None:
        x = torch.cat([self.network.normalise(job.pixels[None]) for job in jobs if job.pixels is not None])
        captured = self.network.capture(x, jobs[0].layer)
        classes = [self._classes(job, logits) for job, logits in zip(jobs, captured.logits, strict=True)]
        gradients = None
        if any(REGISTRY[type(task.method)].needs_gradients for job in jobs for task in job.item.tasks):
            gradients = captured.gradients(torch.nn.utils.rnn.pad_sequence(classes, batch_first=True))
        for row, job in enumerate(jobs):
            job.features = Features(
                input=x[row],
                activations=captured.activations[row],
                logits=captured.logits[row],
                targets=classes[row],
                gradients=None if gradients is None else gradients[row, : len(classes[row])],
                classifier=self.network.classifier,
                passes=self.network.passes(jobs[0].layer),
            )
            self._predict(job, captured.logits[row].softmax(dim=0))

    def _classes(self, job: _Job, logits: Tensor) -> Tensor:
        """The item's targets as class indices, in order, each once; the most probable class where there is none."""
        ranked = logits.argsort(descending=True, stable=True)
        found: dict[int, None] = {}
        for target in job.item.targets or (Target(top_k=1),):
            target = resolve_target(target, self.network.info.labels)
            found.update(dict.fromkeys([target.index] if target.index is not None else ranked[: target.top_k].tolist()))
        return torch.tensor(list(found), device=logits.device)

    def _predict(self, job: _Job, probabilities: Tensor) -> None:
        assert job.features is not None
        top = probabilities.topk(min(job.item.top_predictions, len(probabilities)))
        job.predictions = _predictions(top.indices, top.values)
        job.targets = _predictions(job.features.targets, probabilities[job.features.targets])

    def _work(self, job: _Job) -> None:
        """Makes what needs no pooled query, and the masks of what does."""
        features = job.features
        assert features is not None
        for place, task in enumerate(job.item.tasks):
            method, spec = REGISTRY[type(task.method)], task.method
            total = spec.queries(len(features.activations), len(features.targets))
            start, stop = min(task.start, total), min(task.stop, total)
            made = features.passes.made
            if isinstance(method, Perturbation):
                job.asked[place] = method.masks(features, spec, start, stop)
            else:
                sums = _sums(method, features, spec, start, stop)
                job.partials[place] = _partial(task, features.passes.made - made, sums)

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
            job.partials[place] = _partial(task, len(masks), method.reduce(answer, masks, task.method))


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


def _sums(method: Direct | Sampled, features: Features, spec: MethodSpec, start: int, stop: int) -> Tensor:
    if isinstance(method, Direct):
        return method.sums(features, spec)
    return method.sums(features, spec, start, stop)


def _typed(error: Exception) -> CamserveError:
    if isinstance(error, CamserveError):
        return error
    log.error("an item failed", exc_info=error)
    return Internal(INTERNAL_MESSAGE)


def _predictions(indices: Tensor, probabilities: Tensor) -> tuple[Prediction, ...]:
    pairs = zip(indices.tolist(), probabilities.tolist(), strict=True)
    return tuple(Prediction(index, "", probability) for index, probability in pairs)


def _partial(task: Task, queries: int, sums: Tensor) -> Partial:
    return Partial(task.position, queries, sums.detach().cpu().numpy())


def _outcome(job: _Job) -> ItemResult | CamserveError:
    if job.error is not None:
        return job.error
    assert job.view is not None
    partials = tuple(job.partials[place] for place in range(len(job.item.tasks)))
    return ItemResult(job.predictions, job.targets, job.view, job.layer, partials)
