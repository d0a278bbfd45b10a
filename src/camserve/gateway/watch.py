"""Keeps an eye on the workers: which places and models there are, what the models are, and whether they answer.

A model is ready at a place while a worker is READY there and, since it became so, a canary step (a small grey image
explained by Grad-CAM through the real path) was answered. It is ready if it is so at one place.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from camserve.errors import InvalidOption, NotFound, Unavailable
from camserve.gateway.dispatch import Dispatcher
from camserve.gateway.metrics import Metrics
from camserve.gateway.observe import Observer
from camserve.gateway.places import Places
from camserve.gateway.settings import Settings
from camserve.gateway.site import Site
from camserve.gateway.tracing import Tracing
from camserve.gateway.upstream import Upstream
from camserve.types import ModelInfo

_log = logging.getLogger(__name__)


class ServedModel:
    """One model: its description, the places where it is served, its running requests."""

    def __init__(
        self,
        name: str,
        places: Places,
        settings: Settings,
        metrics: Metrics,
        tracing: Tracing,
        on_change: Callable[[], None],
    ) -> None:
        self.name = name
        self.info: ModelInfo | None = None
        self.dispatcher = Dispatcher(name, places, settings, metrics, tracing, self._look_now)
        self._settings = settings
        self._observer = Observer(metrics, name)
        self._on_change = on_change
        self._sites: dict[str, Site] = {}
        self._told_ready = False
        self._away_since_s = asyncio.get_running_loop().time()

    @property
    def ready(self) -> bool:
        """A worker answers at one place at least."""
        return any(site.ready for site in self._sites.values())

    def required(self) -> ModelInfo:
        """The description. Raises Unavailable as long as there is none."""
        if self.info is None:
            raise Unavailable(f"model {self.name} is starting; try again in some seconds")
        return self.info

    def check_ready(self) -> None:
        """Raises Unavailable while no worker answers."""
        if not self.ready:
            raise Unavailable(f"no worker of model {self.name} is ready; try again in some seconds")

    def join(self, place: str, upstream: Upstream) -> None:
        """The model is served at a place; does nothing if that is known."""
        if place not in self._sites:
            site = Site(self.name, upstream, self._settings)
            self._sites[place] = site
            site.task = asyncio.create_task(self._watch(place, site), name=f"camserve watch of {self.name} at {place}")

    def leave(self, place: str) -> None:
        """A place is gone for good."""
        site = self._sites.pop(place, None)
        if site is not None:
            site.cancel()
            self.dispatcher.remove(place)
            self._changed()

    async def close(self) -> None:
        """Stops watching and ends every running request."""
        for site in self._sites.values():
            site.cancel()
        await self.dispatcher.close()

    async def _watch(self, place: str, site: Site) -> None:
        """Looks at the workers of a place for ever."""
        while True:
            site.wake.clear()
            await self._look(place, site)
            await _pause(site.wake, self._settings.poll_s)

    def _look_now(self, place: str) -> None:
        if place in self._sites:
            self._sites[place].wake.set()

    async def _look(self, place: str, site: Site) -> None:
        was_ready = site.ready
        await site.look(self._fits)
        if site.workers == 0:
            self.dispatcher.abandon(place)
        self.dispatcher.set_workers(place, (site.workers or 0) if site.ready else 0, site.device)
        self._observer.replaced(site.replaced)
        if site.ready != was_ready:
            _log.info("model %s at %s is %s", self.name, place, "ready" if site.ready else "not ready")
        self._changed()

    def _changed(self) -> None:
        """After a look at a place: gauges, health, and an end for requests that nobody answers."""
        now_s = asyncio.get_running_loop().time()
        ready = sum(site.workers or 0 for site in self._sites.values())
        self._observer.workers(ready, sum(site.wanted for site in self._sites.values()))
        if self.ready:
            self._away_since_s = now_s
        elif now_s - self._away_since_s >= self._settings.worker_wait_s:
            away_s = now_s - self._away_since_s
            self.dispatcher.fail_all(Unavailable(f"no worker of model {self.name} came back within {away_s:.0f} s"))
        if self.ready != self._told_ready:
            self._told_ready = self.ready
            self._on_change()

    def _fits(self, info: ModelInfo) -> bool:
        """Whether a place serves what the others do; the first to be ready says what the model is."""
        if self.ready and info != self.info:
            _log.warning("model %s: a place serves another version or other labels, and is not used", self.name)
            return False
        self.info = info
        return True


class Catalogue:
    """Every model there is."""

    def __init__(
        self, places: Places, settings: Settings, metrics: Metrics, tracing: Tracing, on_change: Callable[[], None]
    ) -> None:
        self._places = places
        self._settings = settings
        self._metrics = metrics
        self._tracing = tracing
        self._on_change = on_change
        self._models: dict[str, ServedModel] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to watch."""
        self._task = asyncio.create_task(self._watch(), name="camserve catalogue")

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
        """Stops watching, ends every running request and closes the connections."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for model in self._models.values():
            await model.close()
        await self._places.close()

    async def _watch(self) -> None:
        while True:
            gone = await self._places.look()
            for place, upstream in gone.items():
                for model in self._models.values():
                    model.leave(place)
                await upstream.close()
            await asyncio.gather(*(self._list(place, upstream) for place, upstream in self._places.items()))
            await asyncio.sleep(self._settings.poll_s)

    async def _list(self, place: str, upstream: Upstream) -> None:
        try:
            for name in await upstream.models():
                self._model(name).join(place, upstream)
        except Unavailable as error:
            _log.debug("listing the models of %s: %s", place, error)
        except Exception:
            _log.exception("listing the models of %s", place)

    def _model(self, name: str) -> ServedModel:
        if name not in self._models:
            self._models[name] = ServedModel(
                name, self._places, self._settings, self._metrics, self._tracing, self._on_change
            )
        return self._models[name]


async def _pause(wake: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await wake.wait()
    except TimeoutError:
        pass
