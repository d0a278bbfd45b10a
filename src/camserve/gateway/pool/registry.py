"""Knows which models there are, at which backends, and whether they answer.

A model is ready at a backend while a worker is READY there and, since it became so or last lost a step, a canary step
was answered: a small grey image, asked of through the real path. It is not while the backend is in
quarantine, since it loses its steps whatever it says of itself. A model is ready if it is ready at one backend.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from camserve.errors import InvalidOption, ModelChanged, NotFound, Unavailable
from camserve.gateway.ops.metrics import Metrics
from camserve.gateway.ops.settings import Settings
from camserve.gateway.ops.tracing import Tracing
from camserve.gateway.pool.discovery import Pool
from camserve.gateway.pool.dispatcher import Dispatcher
from camserve.gateway.pool.model_metrics import ModelMetrics
from camserve.gateway.pool.readiness import Readiness
from camserve.gateway.pool.torchserve import Backend
from camserve.types import Item, ModelInfo
from camserve.wording import shown

_log = logging.getLogger(__name__)


class ServedModel:
    """Keeps one model: its description, the backends that serve it, and the dispatcher of its requests."""

    def __init__(
        self,
        name: str,
        backends: Pool,
        settings: Settings,
        metrics: Metrics,
        tracing: Tracing,
        on_change: Callable[[], None],
    ) -> None:
        self.name = name
        self.info: ModelInfo | None = None
        self.dispatcher = Dispatcher(name, backends, settings, metrics, tracing, self._look_now)
        self._settings = settings
        self._metrics = ModelMetrics(metrics, name)
        self._on_change = on_change
        self._served_at: dict[str, Readiness] = {}
        self._told_ready = False
        self._away_since_s = asyncio.get_running_loop().time()

    @property
    def ready(self) -> bool:
        """Tells whether a worker answers at one backend at least."""
        return any(readiness.ready for readiness in self._served_at.values())

    @property
    def failure(self) -> str:
        """Why the model is not ready although there are workers; empty while it is ready or may just be starting."""
        failures = [readiness.failure for readiness in self._served_at.values()]
        return failures[0] if failures and all(failures) and not self.ready else ""

    def required(self) -> ModelInfo:
        """Returns the description of the model; raises Unavailable as long as there is none."""
        if self.info is None:
            self._check_failure()
            raise Unavailable(f"model {self.name} is starting; try again in some seconds")
        return self.info

    def check_ready(self) -> None:
        """Raises Unavailable while no worker answers."""
        if not self.ready:
            self._check_failure()
            raise Unavailable(f"no worker of model {self.name} is ready; try again in some seconds")

    def _check_failure(self) -> None:
        if failure := self.failure:
            raise Unavailable(f"model {self.name} failed: {failure}")

    def join(self, name: str, backend: Backend) -> None:
        """Begins to watch the model at a backend, unless it is watched there."""
        if name not in self._served_at:
            readiness = Readiness(self.name, name, backend, self._settings, self.dispatcher.planner.blame)
            self._served_at[name] = readiness
            watching = self._watch(name, readiness)
            readiness.task = asyncio.create_task(watching, name=f"camserve watch of {self.name} at {name}")

    def leave(self, name: str) -> None:
        """Forgets a backend that is gone for good."""
        readiness = self._served_at.pop(name, None)
        if readiness is not None:
            readiness.cancel()
            self.dispatcher.remove(name)
            self._changed()

    async def close(self) -> None:
        """Stops watching and ends every running request."""
        for readiness in self._served_at.values():
            readiness.cancel()
        await self.dispatcher.close()

    async def _watch(self, name: str, readiness: Readiness) -> None:
        """Looks at the workers of a backend for ever."""
        while True:
            readiness.wake.clear()  # before the look: a wish for another one that comes meanwhile must stay
            await self._look(name, readiness)
            await _pause(readiness.wake, readiness.next_look_s(asyncio.get_running_loop().time()))

    def _look_now(self, name: str, lost: Sequence[Item]) -> None:
        """Has a backend looked at now: it must answer a canary, and a control of a lost step, before it gets more."""
        if name in self._served_at:
            readiness = self._served_at[name]
            readiness.in_doubt = True
            readiness.lost = lost or readiness.lost
            readiness.wake.set()

    async def _look(self, name: str, readiness: Readiness) -> None:
        was_ready = readiness.ready
        await readiness.look(lambda info: self._check(name, info))
        if readiness.workers == 0:
            self.dispatcher.abandon(name)
        self.dispatcher.set_workers(name, (readiness.workers or 0) if readiness.ready else 0, readiness.device)
        self._metrics.replaced(readiness.replaced)
        if readiness.ready != was_ready:
            _log.info("model %s at %s is %s", self.name, name, "ready" if readiness.ready else "not ready")
        self._changed()

    def _changed(self) -> None:
        """Tells gauges and health after a look at a backend, and ends requests that nobody answers."""
        now_s = asyncio.get_running_loop().time()
        ready = sum(readiness.workers or 0 for readiness in self._served_at.values())
        self._metrics.quarantined(self.dispatcher.planner.blame.quarantined)
        self._metrics.workers(ready, sum(readiness.wanted for readiness in self._served_at.values()))
        if self.ready:
            self._away_since_s = now_s
        elif now_s - self._away_since_s >= self._settings.worker_wait_s:
            away_s = now_s - self._away_since_s
            self.dispatcher.fail_all(Unavailable(f"no worker of model {self.name} came back within {away_s:.0f} s"))
        if self.ready != self._told_ready:
            self._told_ready = self.ready
            self._on_change()

    def _check(self, name: str, info: ModelInfo) -> None:
        """Raises ModelChanged where a backend serves another model than the others; the first one says what it is."""
        others = any(readiness.ready for other, readiness in self._served_at.items() if other != name)
        if others and info != self.info:
            raise ModelChanged("it serves another version, labels or weights than the other backends")
        self.info = info


class Registry:
    """Keeps every model that a backend serves, and watches the pool for others."""

    def __init__(
        self, backends: Pool, settings: Settings, metrics: Metrics, tracing: Tracing, on_change: Callable[[], None]
    ) -> None:
        self._backends = backends
        self._settings = settings
        self._metrics = metrics
        self._tracing = tracing
        self._on_change = on_change
        self._models: dict[str, ServedModel] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to watch the pool."""
        self._task = asyncio.create_task(self._watch(), name="camserve registry")

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """All models seen so far, sorted by name."""
        return tuple(self._models[name] for name in sorted(self._models))

    def get(self, name: str) -> ServedModel:
        """Returns the model of this name; the only one there is for "".

        Raises:
            NotFound: no model has the name; the text lists those that exist.
            InvalidOption: no name is given, and there are several models.
            Unavailable: TorchServe has not answered yet.
        """
        names = ", ".join(sorted(self._models))
        if not self._models:
            raise Unavailable("TorchServe does not answer yet, or serves no model; try again in some seconds")
        if name in self._models:
            return self._models[name]
        if name:
            raise NotFound(f"unknown model {shown(name)}; there are: {names}")
        if len(self._models) > 1:
            raise InvalidOption(f"name one of the models: {names}")
        return next(iter(self._models.values()))

    async def close(self) -> None:
        """Stops watching, ends every running request and closes the connections."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for model in self._models.values():
            await model.close()
        await self._backends.close()

    async def _watch(self) -> None:
        """Looks for backends and their models for ever."""
        while True:
            gone = await self._backends.look()
            for name, backend in gone.items():
                for model in self._models.values():
                    model.leave(name)
                await backend.close()
            await asyncio.gather(*(self._list(name, backend) for name, backend in self._backends.items()))
            await asyncio.sleep(self._settings.poll_s)

    async def _list(self, name: str, backend: Backend) -> None:
        """Has every model of a backend watched there."""
        try:
            for model in await backend.models():
                self._model(model).join(name, backend)
        except Unavailable as error:
            _log.debug("listing the models of %s: %s", name, error)
        except Exception:
            _log.exception("listing the models of %s", name)

    def _model(self, name: str) -> ServedModel:
        """Returns the model of a name, which is made the first time."""
        if name not in self._models:
            self._models[name] = ServedModel(
                name, self._backends, self._settings, self._metrics, self._tracing, self._on_change
            )
        return self._models[name]


async def _pause(wake: asyncio.Event, seconds: float) -> None:
    """Waits for an event, or until some seconds have passed."""
    try:
        async with asyncio.timeout(seconds):
            await wake.wait()
    except TimeoutError:
        pass
