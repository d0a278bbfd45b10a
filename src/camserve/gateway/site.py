"""One model at one place: how many workers it has there, and whether they answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import numpy as np

from camserve.errors import CamserveError, Unavailable
from camserve.gateway.fit import check_fit
from camserve.gateway.settings import Settings
from camserve.gateway.turnover import Turnover
from camserve.gateway.upstream import Upstream, Workers
from camserve.methods import GradCam
from camserve.types import Item, ModelInfo, Target, Task

_log = logging.getLogger(__name__)


def canary(model: ModelInfo) -> Item:
    """A grey image of the network's own input size, explained by Grad-CAM."""
    grey = np.full((*model.input_size, 3), 128, np.uint8)
    return Item(image=grey, targets=(Target(top_k=1),), tasks=(Task(0, GradCam(), 0, 0),), top_predictions=1)


def device_of(worker: str) -> str:
    """ "cuda" of "host/process/cuda:0"; "cpu" where the name does not say."""
    return worker.rpartition("/")[2].partition(":")[0] if "/" in worker else "cpu"


class Site:
    """One model at one place."""

    def __init__(self, model: str, upstream: Upstream, settings: Settings) -> None:
        self.workers: int | None = None
        """READY ones; None when nobody can tell."""
        self.wanted = 0
        """As many as there should be, by the last one who could tell."""
        self.replaced = 0
        """Those that the last look found in the place of others."""
        self._turnover = Turnover()
        self.ready = False
        self.device = "cpu"
        """Of the worker that answered the canary."""
        self.wake = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self._model = model
        self._upstream = upstream
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
        self.replaced = 0 if seen is None else self._turnover.replaced(seen.ready)
        self.ready = bool(self.workers) and (self.ready or await self._greeted(fits))

    async def _seen(self) -> Workers | None:
        try:
            return await self._upstream.look(self._model)
        except Unavailable as error:
            _log.debug("model %s: %s", self._model, error)
        except Exception:
            _log.exception("looking at the workers of model %s", self._model)
        return None

    async def _greeted(self, fits: Callable[[ModelInfo], bool]) -> bool:
        """The workers have described the model and answered a canary step."""
        try:
            info = await self._upstream.describe(self._model, self._settings.step_timeout_s)
            item = canary(info)
            result = await self._upstream.step(self._model, [item], self._settings.step_timeout_s)
            check_fit(info, [item], result)
            if isinstance(result.outcomes[0], CamserveError):
                raise result.outcomes[0]
            self.device = device_of(result.worker)
        except CamserveError as error:
            _log.warning("model %s does not answer its canary: %s", self._model, error)
            return False
        except Exception:
            _log.exception("canary of model %s", self._model)
            return False
        return fits(info)
