"""Executes a step: items of any requests, one forward for their images, one pool for their masked queries.

The order of work is the reverse of trust: each item is decoded on its own, images of one layer share a forward pass,
queries of all items share micro-batches. Where a shared pass fails, it is repeated item by item, so that one bad item
never harms its neighbours.

Where memory runs out, what is kept of earlier images is given up, passes get smaller, and the work goes on.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from camserve.errors import (
    INTERNAL_MESSAGE,
    CamserveError,
    DeadlineExceeded,
    Internal,
    InvalidOption,
    Unavailable,
    Unsupported,
)
from camserve.images import ImageContent
from camserve.methods import GradCam, MethodSpec
from camserve.methods.work import Kind
from camserve.queries.pack import ask
from camserve.runtimes.memory import is_out_of_memory
from camserve.runtimes.modes import deterministic, exact_float32
from camserve.runtimes.threads import all_threads, one_thread
from camserve.saliency.features import Features
from camserve.saliency.masks import Queries
from camserve.saliency.registry import REGISTRY, Direct, Perturbation, Sampled
from camserve.scores import Targets
from camserve.types import (
    AnyTarget,
    Explained,
    Item,
    ItemResult,
    Layer,
    MapCurves,
    Partial,
    Precision,
    Prediction,
    Ranking,
    StepResult,
    Target,
    Task,
    Word,
)
from camserve.types.offered import check_offered, sample_method, why_not
from camserve.types.target_forms import sample_target
from camserve.types.targets import network_made
from camserve.worker import environment
from camserve.worker.device import BrokenDevice, device_memory, free_cached, works
from camserve.worker.forward import Decoding, Forward, Wanted
from camserve.worker.memory import Known, Made, Memory, Passed, Seen, Written
from camserve.worker.micro_batch import MicroBatch
from camserve.worker.network import Network

log = logging.getLogger(__name__)

MEMORY_BYTES = 256 * 2**20
"""Number of bytes that a worker keeps of recent images, unless it is told otherwise."""

DEFAULT_TARGETS = (Target(top_k=1),)
"""Targets where nobody names any: the most probable class."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Order:
    """Holds the numbers of all blocks of queries, those of most energy first, and their energies in that order."""

    numbers: tuple[int, ...] = ()
    energies: tuple[float, ...] = ()


@dataclass
class _Job:
    """Holds one item on its way through the step."""

    item: Item
    work: Counter[Kind]
    """Units of work that the whole step has taken so far; all jobs of a step share it."""
    network: Network
    """The network; where it takes a text, as one of images alone that is asked with the item's text."""
    error: CamserveError | None = None
    layers: tuple[str, ...] = ()
    """Names of the layers of its tasks, each once; the default layer where there is no task."""
    digest: bytes = b""
    seen: Seen | None = None
    written: Written | None = None
    """Words that a network that writes has written of the image; None of another network."""
    features: dict[str, Features] = field(default_factory=dict)
    """Features by layer."""
    wanted: tuple[AnyTarget, ...] = ()
    """Targets by index, each of any number of maps, as the network's outputs know them: with the vector that is made of
    a reference image or of a text, and with what was said in pixels where the outputs have it."""
    precision: Precision = "exact"
    """Precision of its masked queries."""
    predictions: tuple[Prediction, ...] = ()
    targets: tuple[Explained, ...] = ()
    bound: Targets | None = None
    """Targets of one map each, in order and each once; None before the first outputs are there."""
    asked: dict[int, Queries] = field(default_factory=dict)
    """Masked queries by index of the task."""
    orders: dict[int, _Order] = field(default_factory=dict)
    """Order of the blocks of queries by index of the task; empty for a task that does not ask for it."""
    labels: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Labels of the groups found, by index of the task; empty for a task that brought its own."""
    partials: dict[int, Partial] = field(default_factory=dict)
    """Partials by index of the task."""

    def beside(self) -> Hashable:
        """Returns what is the same for jobs that share passes."""
        return id(self) if self.item.reproducible else id(self.network)


class Executor:
    """Runs steps on one network; may be called from several threads.

    Args:
        network: the network. With a memory its weights must stay as they are.
        memory_bytes: number of bytes kept of recent images from one step to the next; 0: nothing is kept.
        works: function that returns whether a device still works.
    """

    def __init__(
        self,
        network: Network,
        memory_bytes: int = 0,
        works: Callable[[torch.device], bool] = works,
    ) -> None:
        self.network = network
        self.memory = Memory(memory_bytes)
        self.micro_batch = MicroBatch(network.micro_batch)
        self._works = works
        self._images = Forward(network, self.memory)
        self.environment = environment.described(network)
        """Environment of this worker, as JSON."""
        self.worker = f"{socket.gethostname()}/{os.getpid()}/{network.device}"

    def remembering(self) -> Executor:
        """Returns the same executor with a memory of its own, for the steps of one request."""
        found = copy(self)
        found.memory = Memory(MEMORY_BYTES)
        found._images = self._images.with_memory(found.memory)
        return found

    def execute(self, items: Sequence[Item], on_progress: Progress | None = None) -> StepResult:
        """Returns an outcome for every item; an item's failure is its own outcome and nobody else's.

        Args:
            items: items of any requests.
            on_progress: function called with the masked queries (done, total) of the step.

        Raises:
            BrokenDevice: an unforeseen failure has left a device behind that no longer works.
        """
        try:
            result = self._executed(items, on_progress)
        except Exception:
            self._check_device()
            raise
        if any(isinstance(outcome, Internal) for outcome in result.outcomes):
            self._check_device()
        self.micro_batch.answered()
        return result

    def _executed(self, items: Sequence[Item], on_progress: Progress | None) -> StepResult:
        work: Counter[Kind] = Counter()
        jobs = [_Job(item, work, self.network.eager if item.reproducible else self.network) for item in items]
        hits, misses = self.memory.hits, self.memory.misses
        seconds: dict[str, float] = {}
        device = self.network.device.type
        pinned = deterministic() if device == "cuda" and any(item.reproducible for item in items) else nullcontext()
        threads = one_thread() if self.network.runtime.own_threads else nullcontext()
        with self.network.evaluating(), exact_float32(), pinned, threads, _own_modes(device):
            with self._stage("decode", seconds):
                decoding = self._images.decoding(items)
                self._each(jobs, lambda job: self._prepare(job, decoding), smaller=False)
            with self._stage("forward", seconds):
                for layer in dict.fromkeys(layer for job in jobs for layer in job.layers):
                    for some in _groups(jobs, _Job.beside):
                        for group in self._batches(layer, [job for job in some if layer in job.layers]):
                            self._together(group, partial(self._forward, layer), smaller=False)
            with self._stage("queries", seconds):
                self._each(jobs, self._work)
                for group in _groups(jobs, lambda job: (job.precision, job.beside())):
                    self._together(group, lambda jobs: self._ask(jobs, on_progress))
        return StepResult(
            outcomes=tuple(map(self._outcome, jobs)),
            stage_seconds=seconds,
            worker=self.worker,
            memory_hits=self.memory.hits - hits,
            memory_misses=self.memory.misses - misses,
            device_memory=device_memory(self.network.device),
            made=dict(+work),
            version=self.network.info.version,
            weights=self.network.info.weights,
            keeps_images=self.memory.keeps,
            micro_batch=self.micro_batch.size,
            environment=self.environment,
        )

    def answer(self, item: Item, on_progress: Progress | None = None) -> tuple[StepResult, ItemResult]:
        """Executes a step of one item and returns both results; raises what the item failed with."""
        step = self.execute([item], on_progress)
        (outcome,) = step.outcomes
        if isinstance(outcome, CamserveError):
            raise outcome
        return step, outcome

    def warm_up(self) -> None:
        """Runs every kind of pass once, so that the first request does not pay for what PyTorch sets up lazily."""
        image = np.zeros((*self.network.info.input_size, self.network.info.channels), np.float32)
        info = self.network.info
        queries = Task(0, sample_method(info), 0, self.network.micro_batch)
        gradients = () if why_not(GradCam, info) else (Task(1, GradCam(), 0, 0),)
        self.execute([Item(image, (sample_target(info),), (queries, *gradients), info.sample_text)])

    @contextmanager
    def _stage(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.network.device.type == "cuda":
            torch.cuda.synchronize(self.network.device)  # kernels run behind the calls that start them
        seconds[name] = time.perf_counter() - start

    def _each(self, jobs: Sequence[_Job], work: Callable[[_Job], None], smaller: bool = True) -> None:
        for job in jobs:
            self._together([job], lambda group: work(group[0]), smaller)

    def _check_device(self) -> None:
        if not self._works(self.network.device):
            raise BrokenDevice

    def _together(self, jobs: Sequence[_Job], work: Callable[[Sequence[_Job]], None], smaller: bool = True) -> None:
        """Works on all jobs at once, or one by one where that fails; a job that fails alone keeps its error.

        Args:
            jobs: the jobs; those that have failed before are left out.
            work: function that works on jobs, and may be called again for the same ones.
            smaller: whether a smaller micro-batch makes the work need less memory.
        """
        jobs = [job for job in jobs if job.error is None]
        try:
            if jobs:
                self._with_room(jobs, work, smaller and not jobs[0].item.reproducible)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._together([job], work, smaller)
            else:
                jobs[0].error = _typed(error)

    def _with_room(self, jobs: Sequence[_Job], work: Callable[[Sequence[_Job]], None], smaller: bool) -> None:
        """Works on jobs; where memory runs out, makes room and works on them anew, as long as that makes a difference.

        The first time that room is made counts as a difference, since what was kept is given up.
        """
        made_room = False
        while True:
            try:
                work(jobs)
                return
            except Exception as error:
                if not is_out_of_memory(error) or not ((smaller and self.micro_batch.halve()) or not made_room):
                    raise
            self._make_room(jobs)  # not before the exception is gone, which holds tensors of the pass that failed
            made_room = True

    def _make_room(self, jobs: Sequence[_Job] = ()) -> None:
        """Gives up what is kept of earlier images, and has the passes of jobs take as many images as fit now."""
        log.warning("out of memory: passes take %d images from now on", self.micro_batch.size)
        self.memory.clear()
        free_cached(self.network.device)
        for features in (one for job in jobs if not job.item.reproducible for one in job.features.values()):
            features.passes.shrink(self.micro_batch.size)

    def _prepare(self, job: _Job, decoding: Decoding) -> None:
        if job.item.expires_s < time.monotonic():
            raise DeadlineExceeded("the deadline passed before the worker came to this")
        info = self.network.info
        job.precision = self.network.precision(job.item.precision)
        for task in job.item.tasks:
            if isinstance(task.method, MethodSpec):
                check_offered(task.method, info)
        names = [task.layer for task in job.item.tasks] or [""]
        job.layers = tuple(dict.fromkeys(info.layer(name).name for name in names))
        wanted = [
            self._known(target.resolved(info.labels), job)
            for target in job.item.targets or (DEFAULT_TARGETS if job.item.tasks else ())
        ]
        whole = job.item.precision == "exact"
        job.digest, job.seen = self._images.seen(job.item.digest, job.item.image, job.work, whole, decoding)
        if job.item.reproducible:  # what is made of it in passes with others is another thing
            job.digest += b" alone"
        self._read(job, [self.network.score.placed(target, job.seen.view) for target in wanted])

    def _read(self, job: _Job, wanted: Sequence[AnyTarget]) -> None:
        """Has the network asked with the item's text, and the targets say what they mean behind it."""
        self.network.info.check_text(job.item.text)
        followed = [task.method.target for task in job.item.tasks if isinstance(task.method, MapCurves)]
        if self.network.score.writes:
            own = [target.at for target in wanted if isinstance(target, Word) and not target.words]
            job.written = self._written(job, max(job.item.top_predictions, *own, 0))
        written = () if job.written is None else job.written.tokens
        job.network, known = job.network.about(job.item.text, [*wanted, *followed], written)
        job.wanted = known[: len(wanted)]

    def _batches(self, layer: str, jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
        """Cuts jobs into batches whose images times gradients are at most the micro-batch, or of a single job.

        All gradients of a batch are in memory at once, for each image the number that the one with most targets needs.
        """
        batch: list[_Job] = []
        most = 1
        for job in jobs:
            needed = _most_targets(job.item) if self._needs_gradients(job, layer) else 1
            if batch and (len(batch) + 1) * max(most, needed) > self.micro_batch.size:
                yield batch
                batch, most = [], 1
            batch.append(job)
            most = max(most, needed)
        if batch:
            yield batch

    def _forward(self, layer: str, jobs: Sequence[_Job]) -> None:
        wanted = [
            Wanted(
                job.digest,
                job.seen,
                partial(self._targets, job),
                self._needs_gradients(job, layer),
                alone=job.item.reproducible,
            )
            for job in jobs
            if job.seen is not None
        ]
        first = jobs[0]
        together = self._torch_pass_of(first) or self.network.torch_batch
        passes = self._images.passed(first.network, layer, wanted, first.work, together)
        for job, passed in zip(jobs, passes, strict=True):
            self._take(job, layer, passed)

    def _take(self, job: _Job, layer: str, passed: Passed) -> None:
        if job.error is not None or (error := _not_finite(passed, layer)) is not None:
            job.error = job.error or error
            return
        targets = self._targets(job, passed.logits)
        needed = self._needs_gradients(job, layer)
        job.features[layer] = Features(
            input=passed.input,
            activations=passed.activations,
            logits=passed.logits,
            targets=targets,
            gradients=torch.stack([passed.gradients[target] for target in targets.each]) if needed else None,
            classifier=self.network.classifier,
            passes=job.network.passes(layer, job.work, self._torch_pass_of(job)),
            made_once=partial(self._made_once, (job.digest, job.network.asked)),
        )
        if layer == job.layers[0]:  # predictions are the same at every layer
            self._predict(job, passed.logits)

    def _pass_of(self, job: _Job) -> int:
        """Returns how many queries a pass of a job takes."""
        return self.network.reproducible_pass if job.item.reproducible else self.micro_batch.size

    def _torch_pass_of(self, job: _Job) -> int | None:
        """Returns how many images a pass of a job takes that PyTorch makes; None: as many as the network says."""
        whole = self.micro_batch.size == self.network.micro_batch  # else memory has run out
        return None if whole and not job.item.reproducible else self._pass_of(job)

    def _needs_gradients(self, job: _Job, layer: str) -> bool:
        tasks = (task for task in job.item.tasks if self.network.info.layer(task.layer).name == layer)
        return any(REGISTRY[type(task.method)].needs_gradients for task in tasks)

    def _made_once(self, image: Hashable, name: str, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Returns what is made of an image, from the memory if an earlier step has left it there."""
        made: Made | None = self.memory.get((name, image), counted=False)
        if made is None:
            made = Made(make())
            self.memory.put((name, image), made)
        return made.values

    def _known(self, target: AnyTarget, job: _Job) -> AnyTarget:
        """Returns the target with what the network makes of it once: the vector of a reference image, or of a text."""
        name = network_made(target)
        if name is None:
            return target
        key = ("known", name, job.item.reproducible)
        kept: Known | None = self.memory.get(key)
        if kept is None:
            if self.network.info.dimension:  # a vector is made: a pass of the network, or of its text encoder
                job.work["opening"] += 1
            with all_threads():  # a text encoder is PyTorch's
                kept = Known(self.network.score.known(target, partial(self._outputs_of, job)))
            self.memory.put(key, kept)
        return kept.target

    def _outputs_of(self, job: _Job, image: ImageContent) -> Tensor:
        """Returns the network's outputs (numbers,) for an image that is none of a request."""
        _, seen = self._images.seen(b"", image, job.work)
        return job.network.scores(job.network.normalise(seen.pixels[None]), "exact")[0]

    def _targets(self, job: _Job, outputs: Tensor) -> Targets:
        """Returns the item's targets, each of one map, in order and each once, given its outputs (numbers,).

        They are those of the first outputs: passes at other layers may round otherwise, and are to explain the same.
        """
        if job.bound is None:
            score = job.network.score
            found = dict.fromkeys(each for target in job.wanted for each in score.resolved(target, outputs))
            job.bound = score.targets(tuple(found), outputs.device)
        return job.bound

    def _written(self, job: _Job, most: int) -> Written:
        """Returns what the network writes of an image behind the item's text, from the memory if it is there."""
        assert job.seen is not None, "it is decoded"
        key = ("written", job.digest, job.item.text, most)
        written: Written | None = self.memory.get(key, counted=False)
        if written is None:
            words = self.network.writes(job.seen.pixels, job.item.text, most)
            job.work["opening"] += len(words)
            written = Written(tuple(Prediction(token, "", probability) for token, probability in words))
            self.memory.put(key, written)
        return written

    def _predict(self, job: _Job, outputs: Tensor) -> None:
        targets = job.features[job.layers[0]].targets
        assert job.seen is not None, "the forward pass was of what is seen"
        said = job.network.score.predictions(outputs).through(job.seen.view)
        most = job.item.top_predictions
        job.predictions = said.top(most) if job.written is None else job.written.words[:most]
        if any(one.index >= len(self.network.info.labels) for one in job.predictions):
            known, largest = len(self.network.info.labels), max(one.index for one in job.predictions)
            raise Unsupported(f"the network names a class {largest}, and its labels are 0..{known - 1}")
        scores = targets.query_value(outputs[None])[0].tolist()
        classes = list(map(said.about, targets.each, scores))
        job.targets = tuple(map(Explained, targets.each, scores, classes))

    def _work(self, job: _Job) -> None:
        """Makes the partials of tasks without pooled queries, and the masks of the others."""
        for index, task in enumerate(job.item.tasks):
            method, spec = REGISTRY[type(task.method)], task.method
            layer = self.network.info.layer(task.layer)
            features = self._labelled(job, index, job.features[layer.name])
            numbers, job.orders[index] = _numbers(task, layer, features)
            made = features.passes.made
            if isinstance(method, Perturbation):
                job.asked[index] = method.masks(features, spec, numbers)
                continue
            with all_threads() if self._runs_layers(job, task, layer) else nullcontext():
                sums = _sums(method, features, spec, numbers)
            if isinstance(method, Direct) and isinstance(spec, MethodSpec) and spec.kind == "closed_form":
                job.work["closed_form"] += spec.work(layer, len(features.targets)).units  # no pass that is counted
            job.partials[index] = self._as_partial(job, index, features.passes.made - made, sums)

    def _runs_layers(self, job: _Job, task: Task, layer: Layer) -> bool:
        """Tells whether PyTorch runs layers of the network for the sums of a task, once its opening is there."""
        if not isinstance(task.method, MethodSpec) or task.method.kind not in ("layer_gradient", "closed_form"):
            return True
        if isinstance(REGISTRY[type(task.method)], Direct):  # it sums the maps that are there
            return False
        x = job.features[layer.name].input[None]  # such as Integrated Grad-CAM, which makes further passes
        return not (layer.pooled_head and job.network.has_trunk(x, layer.name, gradients=True))

    def _labelled(self, job: _Job, index: int, features: Features) -> Features:
        """Returns the features with the labels of a task: those that it brought, or else those that are found now."""
        task = job.item.tasks[index]
        method = REGISTRY[type(task.method)]
        if not isinstance(method, Perturbation) or method.labels is None:
            return features
        job.labels[index] = () if task.labels else method.labels(features, task.method)
        return replace(features, labels=task.labels or job.labels[index])

    def _ask(self, jobs: Sequence[_Job], on_progress: Progress | None) -> None:
        waiting = [(job, index, masks) for job in jobs for index, masks in job.asked.items()]
        if not jobs[0].item.reproducible:
            self._ask_together(waiting, on_progress)
            return
        total, done = sum(len(masks) for _, _, masks in waiting), 0
        for one in waiting:
            self._ask_together([one], None)
            done += len(one[2])
            if on_progress is not None:
                on_progress(done, total)

    def _ask_together(self, waiting: Sequence[tuple[_Job, int, Queries]], on_progress: Progress | None) -> None:
        """Asks masked queries of tasks, given by job and index, in passes that they share."""
        if not waiting:
            return
        first = waiting[0][0]

        running = nullcontext if first.network.runtime_of(first.precision).own_threads else all_threads

        def network(x: Tensor) -> Tensor:
            with running():
                logits = self._scores(first, x)
            first.work["masked_forward"] += len(x)
            return logits

        scores = ask(
            network,
            [masks for _, _, masks in waiting],
            self._pass_of(first),
            on_progress,
        )
        for (job, index, masks), answer in zip(waiting, scores, strict=True):
            task = job.item.tasks[index]
            method = REGISTRY[type(task.method)]
            assert isinstance(method, Perturbation)
            sums = method.reduce(answer, masks, task.method)
            job.partials[index] = self._as_partial(job, index, len(masks), sums)

    def _scores(self, job: _Job, x: Tensor) -> Tensor:
        """Returns the outputs (n, numbers) of masked images; where memory runs out it goes on with smaller passes."""
        network, precision = job.network, job.precision
        if job.item.reproducible:
            return network.scores(x, precision)
        logits: list[Tensor] = []
        done = 0
        while done < len(x) or not logits:
            some = x[done : done + self.micro_batch.size]
            try:
                logits.append(network.scores(some, precision))
                done += len(some)
                continue
            except Exception as error:
                if not is_out_of_memory(error) or not self.micro_batch.halve(len(some)):
                    raise
            self._make_room()
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    def _as_partial(self, job: _Job, index: int, queries: int, sums: Tensor) -> Partial:
        task = job.item.tasks[index]
        layer = self.network.info.layer(task.layer)
        context: np.ndarray | None = None
        if isinstance(task.method, MethodSpec) and task.start == 0 and task.method.context_shape(layer) is not None:
            context = job.features[layer.name].activations.detach().cpu().numpy()
        return Partial(
            position=task.position,
            queries=queries,
            sums=sums.detach().cpu().numpy(),
            order=job.orders[index].numbers,
            energies=job.orders[index].energies,
            context=context,
            labels=job.labels.get(index, ()),
        )

    def _outcome(self, job: _Job) -> ItemResult | CamserveError:
        if job.error is not None:
            return job.error
        assert job.seen is not None
        partials = tuple(job.partials[index] for index in range(len(job.item.tasks)))
        runtime = job.network.runtime_of(job.precision).name
        return ItemResult(job.predictions, job.targets, job.seen.view, partials, job.precision, runtime)


@contextmanager
def _own_modes(device_type: str) -> Iterator[None]:
    """Keeps the caller's no_grad, inference_mode and autocast away from the network."""
    with ExitStack() as modes:  # each takes as long to enter as a small operation, and most callers have none
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            modes.enter_context(torch.enable_grad())
        if torch.is_autocast_enabled(device_type):
            modes.enter_context(torch.autocast(device_type, enabled=False))
        yield


def _groups(jobs: Sequence[_Job], key: Callable[[_Job], Hashable]) -> Iterator[list[_Job]]:
    """Yields the jobs without error, together where the key is the same."""
    groups: dict[Hashable, list[_Job]] = {}
    for job in jobs:
        if job.error is None:
            groups.setdefault(key(job), []).append(job)
    yield from groups.values()


def _numbers(task: Task, layer: Layer, features: Features) -> tuple[Tensor, _Order]:
    """Returns the numbers of the queries that a task asks, (n,), and the order of all blocks if it asks for that."""
    total = task.method.queries(layer, len(features.targets))
    start, stop = min(task.start, total), min(task.stop, total)
    device = features.activations.device
    if task.numbers:
        if max(task.numbers) >= total:
            raise InvalidOption(f"there are {total} queries, number {max(task.numbers)} was asked")
        return torch.tensor(task.numbers, device=device), _Order()
    method = REGISTRY[type(task.method)]
    if task.ordered and not isinstance(method, Direct) and method.energies is not None:
        assert isinstance(task.method, MethodSpec), "curves and rankings have no order"
        energies, blocks = method.energies(features, task.method).detach().sort(descending=True, stable=True)
        order = _Order(tuple(blocks.tolist()), tuple(energies.tolist()))
        return torch.tensor(task.method.numbers(order.numbers, start, stop), dtype=torch.long, device=device), order
    return torch.arange(start, stop, device=device), _Order()


def _most_targets(item: Item) -> int:
    """Returns the largest number of classes that the item's targets may stand for."""
    return sum(target.maps for target in item.targets) or 1


def _sums(
    method: Direct | Sampled, features: Features, spec: MethodSpec | MapCurves | Ranking, numbers: Tensor
) -> Tensor:
    if isinstance(method, Direct):
        return method.sums(features, spec)
    return method.sums(features, spec, numbers)


def _typed(error: Exception) -> CamserveError:
    if isinstance(error, CamserveError):
        return error
    if is_out_of_memory(error):  # another worker may have more, or this one at another time
        log.error("an item needs more memory than there is", exc_info=error)
        return Unavailable("a worker has too little memory for this request")
    log.error("an item failed", exc_info=error)
    return Internal(INTERNAL_MESSAGE)


def _not_finite(passed: Passed, layer: str) -> Unsupported | None:
    """Returns an error where a pass has NaN or infinite numbers: every map of it would be nonsense."""
    # A sum is not finite where one of its numbers is not, and takes a tenth of the time that looking at each takes.
    sums = torch.stack([passed.logits.double().sum(), passed.activations.sum().double()])
    if sums.isfinite().all().item():
        return None
    finite = torch.stack([passed.logits.isfinite().all(), passed.activations.isfinite().all()])
    outputs, activations = finite.tolist()
    if outputs and activations:
        return None
    what = f"activations at layer {layer!r}" if outputs else "outputs"
    return Unsupported(f"the network's {what} are not finite for this image: NaN or infinite")
