"""Keeps an eye on the workers: which models there are, what they are, and whether they answer.

A model is ready while a worker is READY and, since it became so, a canary step (a small grey image explained by
Grad-CAM through the real path) was answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import numpy as np

from camserve.errors import CamserveError, InvalidOption, NotFound, Unavailable
from camserve.gateway.dispatch import Dispatcher
from camserve.gateway.fit import check_fit
from camserve.gateway.metrics import Metrics
from camserve.gateway.settings import Settings
from camserve.gateway.upstream import Upstream
from camserve.methods import GradCam
from camserve.types import Item, ModelInfo, Target, Task

_log = logging.getLogger(__name__)


def canary(model: ModelInfo) -> Item:
    """A grey image of the network's own input size, explained by Grad-CAM."""
    grey = np.full((*model.input_size, 3), 128, np.uint8)
    return Item(image=grey, targets=(Target(top_k=1),), tasks=(Task(0, GradCam(), 0, 0),), top_predictions=1)


class ServedModel:
    """One model: its description, its workers, its running requests."""

    def __init__(
        self, name: str, upstream: Upstream, settings: Settings, metrics: Metrics, on_change: Callable[[], None]
    ) -> None:
        self.name = name
        self.info: ModelInfo | None = None
        self.ready = False
        self.dispatcher = Dispatcher(name, upstream, settings, metrics, self._look_now)
        self._upstream = upstream
        self._settings = settings
        self._workers_gauge = metrics.ready_workers.labels(name)
        self._on_change = on_change
        self._wake = asyncio.Event()
        self._away_since_s = asyncio.get_running_loop().time()

    def required(self) -> ModelInfo:
        """The description. Raises Unavailable as long as there is none."""
        if self.info is None:
            raise Unavailable(f"model {self.name} is starting; try again in some seconds")
        return self.info

    def check_ready(self) -> None:
        """Raises Unavailable while no worker answers."""
        if not self.ready:
            raise Unavailable(f"no worker of model {self.name} is ready; try again in some seconds")

    async def watch(self) -> None:
        """Looks at the workers for ever."""
        while True:
            self._wake.clear()
            await self._look()
            await _pause(self._wake, self._settings.poll_s)

    def _look_now(self) -> None:
        self._wake.set()

    async def _look(self) -> None:
        known = await self._workers()
        workers = known or 0
        self._workers_gauge.set(workers)
        if known == 0:
            self.dispatcher.abandon()
        answers = workers > 0 and (self.ready or await self._greeted())
        if answers:
            self._away_since_s = asyncio.get_running_loop().time()
            self.dispatcher.resume(workers)
        else:
            self._give_up_in_time()
        if answers != self.ready:
            _log.info("model %s is %s", self.name, "ready" if answers else "not ready")
            self.ready = answers
            self._on_change()

    async def _workers(self) -> int | None:
        """READY workers; None when nobody can tell."""
        try:
            return await self._upstream.ready_workers(self.name)
        except Unavailable as error:
            _log.debug("model %s: %s", self.name, error)
        except Exception:
            _log.exception("looking at the workers of model %s", self.name)
        return None

    async def _greeted(self) -> bool:
        """The workers have described the model and answered a canary step."""
        try:
            info = await self._upstream.describe(self.name, self._settings.step_timeout_s)
            item = canary(info)
            result = await self._upstream.step(self.name, [item], self._settings.step_timeout_s)
            check_fit([item], [info.layer("")], result)
            if isinstance(result.outcomes[0], CamserveError):
                raise result.outcomes[0]
        except CamserveError as error:
            _log.warning("model %s does not answer its canary: %s", self.name, error)
            return False
        except Exception:
            _log.exception("canary of model %s", self.name)
            return False
        self.info = info
        return True

    def _give_up_in_time(self) -> None:
        self.dispatcher.resume(0)
        away_s = asyncio.get_running_loop().time() - self._away_since_s
        if away_s >= self._settings.worker_wait_s:
            self.dispatcher.fail_all(Unavailable(f"no worker of model {self.name} came back within {away_s:.0f} s"))


class Catalogue:
    """Every model there is."""

    def __init__(self, upstream: Upstream, settings: Settings, metrics: Metrics, on_change: Callable[[], None]) -> None:
        self._upstream = upstream
        self._settings = settings
        self._metrics = metrics
        self._on_change = on_change
        self._models: dict[str, ServedModel] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to watch."""
        self._tasks.append(asyncio.create_task(self._watch(), name="camserve catalogue"))

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """The models seen so far, by name."""
        return tuple(self._models[name] for name in sorted(self._models))

    def get(self, name: str) -> ServedModel:
        """The model of this name; the only one there is for "".

        Raises:
            NotFound: there is none; the text names those that exist.
            InvalidOption: no name, and several models.
            Unavailable: TorchServe has not answered yet.
        """
        names = ", ".join(sorted(self._models))
        if not self._models:
            raise Unavailable("TorchServe does not answer yet, or serves no model; try again in some seconds")
        if name in self._models:
            return self._models[name]
        if name:
            raise NotFound(f"unknown model {name!r}; there are: {names}")
        if len(self._models) > 1:
            raise InvalidOption(f"name one of the models: {names}")
        return next(iter(self._models.values()))

    async def close(self) -> None:
        """Stops watching and ends every running request."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for model in self._models.values():
            await model.dispatcher.close()

    async def _watch(self) -> None:
        while True:
            try:
                for name in await self._upstream.models():
                    self._add(name)
            except Unavailable as error:
                _log.debug("listing the models: %s", error)
            except Exception:
                _log.exception("listing the models")
            await asyncio.sleep(self._settings.poll_s)

    def _add(self, name: str) -> None:
        if name not in self._models:
            model = ServedModel(name, self._upstream, self._settings, self._metrics, self._on_change)
            self._models[name] = model
            self._tasks.append(asyncio.create_task(model.watch(), name=f"camserve watch of {name}"))


async def _pause(wake: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await wake.wait()
    except TimeoutError:
        pass
