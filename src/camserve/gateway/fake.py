"""An upstream without TorchServe, torch or a network: answers like a worker, faults included. For tests and dry runs.

Its sums are whole numbers and additive per query, so that the merge of any split of the queries, in any order, equals
`FakeUpstream.whole` to the last bit: whatever is counted twice or forgotten shows.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from camserve.errors import CamserveError, NotFound, Unavailable
from camserve.gateway.fake_answers import answer, sums_of
from camserve.gateway.upstream import Workers
from camserve.methods import MethodSpec
from camserve.types import (
    Item,
    Layer,
    ModelInfo,
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
"""Ten classes, one name twice; two layers."""


@dataclass(frozen=True)
class Faults:
    """What goes wrong. Steps are numbered from 0 as they arrive, canaries not counted."""

    latency_s: float = 0.0
    """Each step takes so long."""
    lost_steps: frozenset[int] = frozenset()
    """The worker dies while it answers these."""
    malformed_steps: frozenset[int] = frozenset()
    """These are answered with an outcome too few."""
    hanging_steps: frozenset[int] = frozenset()
    """These are never answered; they end at the step's timeout."""
    item_errors: Mapping[bytes, CamserveError] = field(default_factory=dict)
    """By encoded image: the error that its items get."""
    canary_fails: bool = False
    """Canary steps are answered with an error."""
    crash: bool = False
    """Each step fails with an exception that no upstream should raise."""


class FakeUpstream:
    """An `Upstream` in memory.

    Attributes:
        up: False: nothing answers, as when TorchServe is not started.
        workers: how many are READY; those that come are never the same as those that went.
        wanted: how many there should be; the most that there were, unless it is set.
        faults: may be replaced at any time.
        steps: every step received, canaries not counted.
        canaries: how many canary steps were received.
    """

    def __init__(self, models: Sequence[ModelInfo] = (MODEL,), faults: Faults | None = None) -> None:
        self.up = True
        self.wanted = 1
        self.faults = faults or Faults()
        self.steps: list[tuple[Item, ...]] = []
        self.canaries = 0
        self.closed = False
        self._models = {model.name: model for model in models}
        self._allowed = math.inf
        self._gate = asyncio.Event()
        self._arrived = asyncio.Condition()
        self._ready: list[str] = []
        self._started = itertools.count()
        self.workers = 1

    @property
    def workers(self) -> int:
        """How many workers are READY."""
        return len(self._ready)

    @workers.setter
    def workers(self, workers: int) -> None:
        self.wanted = max(self.wanted, workers)
        del self._ready[workers:]
        while len(self._ready) < workers:
            self._ready.append(f"worker {next(self._started)}")

    def hold(self) -> None:
        """Steps are received and wait."""
        self._allowed = 0.0
        self._gate.clear()

    def release(self, steps: float = math.inf) -> None:
        """So many steps are answered, those that wait first."""
        self._allowed += steps
        self._gate.set()

    async def received(self, steps: int) -> None:
        """Returns once so many steps have been received."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.steps) >= steps)

    async def step(self, model: str, items: Sequence[Item], timeout_s: float) -> StepResult:
        """Answers a step, or fails as `faults` has it."""
        info = self._info(model)
        if _is_canary(items):
            self.canaries += 1
            if self.faults.canary_fails:
                raise Unavailable("the worker failed")
            return answer(info, items)
        number = len(self.steps)
        async with self._arrived:
            self.steps.append(tuple(items))
            self._arrived.notify_all()
        try:
            async with asyncio.timeout(timeout_s):
                await self._work(number)
        except TimeoutError:
            raise Unavailable(f"a worker of {model} took longer than {timeout_s:g} s for a step") from None
        self._info(model)
        return self._faulty(number, answer(info, items, self.faults.item_errors))

    async def describe(self, model: str, timeout_s: float) -> ModelInfo:
        """The model as it was given."""
        return self._info(model)

    async def look(self, model: str) -> Workers:
        """Those that are READY, while it is up."""
        await asyncio.sleep(0)  # as with a real call, others run first
        self._info(model)
        return Workers(frozenset(self._ready), self.wanted)

    async def models(self) -> Sequence[str]:
        """Names of the models."""
        self._check_up()
        return tuple(self._models)

    async def close(self) -> None:
        """Notes that it was closed."""
        self.closed = True

    @staticmethod
    def whole(
        image: bytes | np.ndarray, method: MethodSpec, model: ModelInfo, layer: str, targets: Sequence[int]
    ) -> np.ndarray:
        """(targets, h, w): the sums of all queries of a method, each counted once."""
        stop = method.queries(model.layer(layer).channels, len(targets))
        return sums_of(image, Task(0, method, 0, stop, layer), model, targets)

    async def _work(self, number: int) -> None:
        if number in self.faults.hanging_steps:
            await asyncio.Event().wait()
        await asyncio.sleep(self.faults.latency_s)
        while not self._allowed:
            await self._gate.wait()
        self._allowed -= 1
        if not self._allowed:
            self._gate.clear()

    def _faulty(self, number: int, result: StepResult) -> StepResult:
        if self.faults.crash:
            raise RuntimeError("a secret of the fake")
        if number in self.faults.lost_steps:
            raise Unavailable("the worker died while it answered")
        if number in self.faults.malformed_steps:
            return replace(result, outcomes=result.outcomes[:-1])
        return result

    def _check_up(self) -> None:
        if not self.up:
            raise Unavailable("TorchServe does not answer")

    def _info(self, model: str) -> ModelInfo:
        self._check_up()
        if model not in self._models:
            raise NotFound(f"TorchServe has no model {model}")
        return self._models[model]


def _is_canary(items: Sequence[Item]) -> bool:
    image = items[0].image
    return isinstance(image, np.ndarray) and bool((image == image.flat[0]).all())
