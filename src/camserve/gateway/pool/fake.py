"""Fakes a backend without TorchServe, torch or a network, faults included, for tests and dry runs.

Its sums are whole numbers and additive per query, so that the merge of any split of the queries, in any order, equals
`FakeBackend.whole` to the last bit: a query that is counted twice or forgotten shows.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from camserve.errors import CamserveError, NotFound, Unavailable, WorkerLost
from camserve.finalise.finish import finished
from camserve.gateway.pool.fake_answers import answer, context_of, ranked, sums_of
from camserve.gateway.pool.readiness import canary, pattern
from camserve.gateway.pool.torchserve import Workers
from camserve.images import ImageContent, digest, size_bytes
from camserve.methods import MethodSpec
from camserve.types import (
    Item,
    Layer,
    ModelInfo,
    Partial,
    StepResult,
    Task,
)

MODEL = ModelInfo(
    name="fake",
    version="1.0",
    labels=("tabby", "tiger_cat", "Egyptian_cat", "espresso", "cup", "dog", "boat", "crane", "tree", "crane"),
    input_size=(32, 48),
    layers=(Layer("stem", 16, 8, 12), Layer("features", 96, 4, 6)),
    default_layer="features",
    source="none",
    licence="Apache-2.0",
)
"""A model with ten classes, of which two have the same name, and two layers."""


@dataclass(frozen=True)
class Faults:
    """Faults of a fake backend. Steps are numbered from 0 as they arrive, canaries and controls not counted."""

    latency_s: float = 0.0
    """Seconds that each step takes."""
    lost_steps: frozenset[int] = frozenset()
    """Steps during which the worker dies."""
    malformed_steps: frozenset[int] = frozenset()
    """Steps that are answered with one outcome too few."""
    hanging_steps: frozenset[int] = frozenset()
    """Steps that are never answered; they end at their timeout."""
    item_errors: Mapping[bytes, CamserveError] = field(default_factory=dict)
    """Error that the items of an image get, by encoded image."""
    canary_fails: bool = False
    """Whether canary steps are answered with an error."""
    crash: bool = False
    """Whether each step and each control fails with an exception that no backend should raise."""
    failing: CamserveError | None = None
    """Error with which each step and each control fails at once, while the workers are READY and answer canaries."""
    failing_above: float = math.inf
    """Number of queries in a step, or a control, above which the worker dies over it."""
    killers: frozenset[bytes] = frozenset()
    """Encoded images over which the worker dies."""
    deaf: bool = False
    """Whether nobody can tell the state of the workers, although they answer steps."""


class FakeBackend:
    """Answers as a `Backend` in memory.

    Attributes:
        up: whether it answers at all; False is as when TorchServe is not started.
        workers: number of workers that are READY; those that come are never the same as those that went.
        wanted: number of workers that there should be; the most that there were, unless it is set.
        faults: what goes wrong; may be replaced at any time.
        steps: items of every step received, canaries and controls not counted.
        canaries: number of canary steps received.
        controls: number of control steps received.
        image_bytes: number of bytes of images received, those of canaries and controls not counted.
    """

    def __init__(self, models: Sequence[ModelInfo] = (MODEL,), faults: Faults | None = None) -> None:
        self.up = True
        self.wanted = 1
        self.faults = faults or Faults()
        self.steps: list[tuple[Item, ...]] = []
        self.canaries = 0
        self.controls = 0
        self.closed = False
        self.image_bytes = 0
        self._images: dict[bytes, ImageContent] = {}
        self._models = {model.name: model for model in models}
        self._allowed = math.inf
        self._gate = asyncio.Event()
        self._arrived = asyncio.Condition()
        self._ready: list[str] = []
        self._started = itertools.count()
        self.workers = 1

    @property
    def workers(self) -> int:
        """Number of workers that are READY."""
        return len(self._ready)

    @workers.setter
    def workers(self, workers: int) -> None:
        self.wanted = max(self.wanted, workers)
        del self._ready[workers:]
        while len(self._ready) < workers:
            self._ready.append(f"worker {next(self._started)}")

    def serve(self, model: ModelInfo) -> None:
        """Serves a model from now on, instead of one of the same name, as after a new archive."""
        self._models[model.name] = model

    def forget_images(self) -> None:
        """Forgets every image, as a worker does that is short of memory."""
        self._images.clear()

    def hold(self) -> None:
        """Lets the steps wait that are received from now on."""
        self._allowed = 0.0
        self._gate.clear()

    def release(self, steps: float = math.inf) -> None:
        """Has a number of steps answered, those that wait first."""
        self._allowed += steps
        self._gate.set()

    async def received(self, steps: int) -> None:
        """Returns once a number of steps have been received."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.steps) >= steps)

    async def step(self, model: str, items: Sequence[Item], timeout_s: float) -> StepResult:
        """Answers a step, or fails as `faults` has it."""
        info = self._info(model)
        if items[0].digest == canary(info).digest:
            self.canaries += 1
            if self.faults.canary_fails:
                raise Unavailable("the worker failed")
            return answer(info, items)
        if items[0].digest == digest(pattern(info.input_size, info.channels)):
            self.controls += 1
            self._fail(items)
            return answer(info, items)
        number = len(self.steps)
        async with self._arrived:
            self.steps.append(tuple(items))
            self._arrived.notify_all()
        try:
            async with asyncio.timeout(timeout_s):
                await self._work(number)
        except TimeoutError:
            raise WorkerLost(f"a worker of {model} took longer than {timeout_s:g} s for a step") from None
        info = self._info(model)  # again: the model may have been replaced meanwhile, or the backend be down
        seen = [self._seen(item) for item in items]
        self._fail(seen)
        return self._faulty(number, answer(info, seen, self.faults.item_errors, items))

    def _seen(self, item: Item) -> Item:
        """Returns the item with its image, if that was ever sent."""
        if item.image is None:
            return replace(item, image=self._images.get(item.digest))
        self.image_bytes += size_bytes(item.image)
        self._images[item.digest] = item.image
        return item

    async def describe(self, model: str, timeout_s: float) -> ModelInfo:
        """Returns the model that was given."""
        return self._info(model)

    async def look(self, model: str) -> Workers:
        """Returns the workers that are READY; raises Unavailable while the backend is not up."""
        await asyncio.sleep(0)  # as with a real call, others run first
        self._info(model)
        if self.faults.deaf:
            raise Unavailable("TorchServe's management API does not answer")
        return Workers(frozenset(self._ready), self.wanted)

    async def models(self) -> Sequence[str]:
        """Returns the names of the models."""
        self._check_up()
        return tuple(self._models)

    async def close(self) -> None:
        """Notes that the backend was closed."""
        self.closed = True

    @staticmethod
    def whole(
        image: bytes | np.ndarray, method: MethodSpec, model: ModelInfo, layer: str, targets: Sequence[int]
    ) -> np.ndarray:
        """Returns what the finish makes of all queries of a method, each counted once: (targets, h, w)."""
        stop = method.queries(model.layer(layer), len(targets))
        task = Task(0, method, 0, stop, layer)
        sums, context = sums_of(image, task, model, targets), context_of(image, task, model)
        maps = finished(method, Partial(0, stop, sums, context=context))
        return ranked(maps) if method.ranked else maps

    async def _work(self, number: int) -> None:
        """Takes the time of a step: its latency, and until `release` lets it go."""
        if number in self.faults.hanging_steps:
            await asyncio.Event().wait()
        await asyncio.sleep(self.faults.latency_s)
        while not self._allowed:
            await self._gate.wait()
        self._allowed -= 1
        if not self._allowed:
            self._gate.clear()

    def _faulty(self, number: int, result: StepResult) -> StepResult:
        """Returns the answer to a step with its faults, or raises them."""
        if number in self.faults.lost_steps:
            raise WorkerLost("the worker died while it answered")
        if number in self.faults.malformed_steps:
            return replace(result, outcomes=result.outcomes[:-1])
        return result

    def _fail(self, items: Sequence[Item]) -> None:
        """Raises what a step or a control fails with."""
        if self.faults.crash:
            raise RuntimeError("a secret of the fake")
        if self.faults.failing is not None:
            raise self.faults.failing
        queries = sum(task.stop - task.start for item in items for task in item.tasks)
        kills = any(isinstance(item.image, bytes) and item.image in self.faults.killers for item in items)
        if kills or queries > self.faults.failing_above:
            raise WorkerLost("the worker died while it answered")

    def _check_up(self) -> None:
        if not self.up:
            raise Unavailable("TorchServe does not answer")

    def _info(self, model: str) -> ModelInfo:
        self._check_up()
        if model not in self._models:
            raise NotFound(f"TorchServe has no model {model}")
        return self._models[model]
