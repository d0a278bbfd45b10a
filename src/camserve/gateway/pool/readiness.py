"""Looks at one model at one backend: counts its workers there, and finds out whether they answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import numpy as np

from camserve.errors import CamserveError, ModelChanged, Unavailable
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.check_answer import check_answer
from camserve.gateway.pool.replacements import Replacements
from camserve.gateway.pool.torchserve import Backend, Workers
from camserve.images import digest
from camserve.methods import GradCam
from camserve.types import Item, ModelInfo, Target, Task

_log = logging.getLogger(__name__)


def canary(model: ModelInfo) -> Item:
    """Returns an item that asks for a Grad-CAM of a grey image of the network's own input size."""
    grey = np.full((*model.input_size, 3), 128, np.uint8)
    tasks = (Task(0, GradCam(), 0, 0),)
    return Item(image=grey, digest=digest(grey), targets=(Target(top_k=1),), tasks=tasks, top_predictions=1)


def device_of(worker: str) -> str:
    """Returns "cuda" for "host/process/cuda:0"; "cpu" where the name does not say."""
    return worker.rpartition("/")[2].partition(":")[0] if "/" in worker else "cpu"


class Readiness:
    """Keeps the state of one model at one backend."""

    def __init__(self, model: str, backend: Backend, settings: Settings) -> None:
        self.workers: int | None = None
        """Number of workers that are READY; None when nobody can tell."""
        self.wanted = 0
        """Number of workers that there should be, by the last look that could tell."""
        self.replaced = 0
        """Number of workers by which the last look found others replaced."""
        self._replacements = Replacements()
        self.ready = False
        self.in_doubt = False
        """Whether the workers must describe their model again before they get more work."""
        self.device = "cpu"
        """The device of the worker that answered the canary."""
        self.wake = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self._model = model
        self._backend = backend
        self._settings = settings

    def cancel(self) -> None:
        """Stops watching."""
        if self.task is not None:
            self.task.cancel()

    async def look(self, fits: Callable[[ModelInfo], bool]) -> None:
        """Counts the workers, and greets them once they are back."""
        seen = await self._seen()
        self.workers = None if seen is None else len(seen.ready)
        self.wanted = self.wanted if seen is None else seen.wanted
        self.replaced = 0 if seen is None else self._replacements.found(seen.ready)
        if not self.workers:
            self.ready = False
        elif self.in_doubt or not self.ready:
            self.in_doubt = False  # before the greeting: a doubt that comes up while it waits must stay
            self.ready = await self._greeted(fits)

    async def _seen(self) -> Workers | None:
        """Returns the workers of the model; None when nobody can tell."""
        try:
            return await self._backend.look(self._model)
        except Unavailable as error:
            _log.debug("model %s: %s", self._model, error)
        except Exception:
            _log.exception("looking at the workers of model %s", self._model)
        return None

    async def _greeted(self, fits: Callable[[ModelInfo], bool]) -> bool:
        """Returns whether the workers describe a model that fits, and answer a canary step."""
        try:
            info = await self._backend.describe(self._model, self._settings.step_timeout_s)
            item = canary(info)
            result = await self._backend.step(self._model, [item], self._settings.step_timeout_s)
            check_answer(info, [item], result)
            if isinstance(result.outcomes[0], CamserveError):
                raise result.outcomes[0]
            if not result.is_of(info):
                raise ModelChanged("one worker describes another model than the one that answers")
            self.device = device_of(result.worker)
        except CamserveError as error:
            _log.warning("model %s does not answer its canary: %s", self._model, error)
            return False
        except Exception:
            _log.exception("canary of model %s", self._model)
            return False
        return fits(info)
