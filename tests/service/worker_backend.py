"""A backend of this process over a real worker: everything of the service but TorchServe, messages included."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from camserve.codecs import step
from camserve.gateway.pool.torchserve import Workers
from camserve.types import Item, ModelInfo, StepResult
from camserve.types.request import RequestLimits
from camserve.worker.executor import MEMORY_BYTES, Executor
from camserve.worker.network import Network
from camserve.worker.service import PLAIN_LIMITS, WorkerService


class WorkerBackend:
    """A `Backend` over one worker.

    Attributes:
        sent_bytes: how many bytes the steps' requests had, canaries included.
        steps: how many there were.
        service: the worker, for plain clients.
    """

    def __init__(
        self, network: Network, memory_bytes: int = MEMORY_BYTES, limits: RequestLimits = PLAIN_LIMITS
    ) -> None:
        self.sent_bytes = 0
        self.steps = 0
        self.service = WorkerService(Executor(network, memory_bytes), limits)
        self._name = network.info.name

    async def step(self, model: str, items: Sequence[Item], timeout_s: float) -> StepResult:
        """Answers a step, as TorchServe's worker would."""
        request = step.request_to_bytes(items)
        self.sent_bytes += len(request)
        self.steps += 1
        return step.result_from_bytes(await asyncio.to_thread(self._answer, request))

    async def describe(self, model: str, timeout_s: float) -> ModelInfo:
        """Returns the worker's own description."""
        return step.description_from_bytes(await asyncio.to_thread(self._answer, step.DESCRIBE))

    async def look(self, model: str) -> Workers:
        """Returns the one worker."""
        return Workers(frozenset({"worker"}), 1)

    async def models(self) -> Sequence[str]:
        """Returns the name of the one model."""
        return (self._name,)

    async def close(self) -> None:
        """Does nothing: there is no connection."""

    def _answer(self, request: bytes) -> bytes:
        (answer,) = self.service.answer([{"camserve": request}])
        return answer.body
