"""Answers explain requests: validates, has the steps made, renders. Knows no gRPC context."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from camserve import wire
from camserve.errors import DeadlineExceeded
from camserve.gateway.access import caller
from camserve.gateway.auto import resolved
from camserve.gateway.dispatch import Dispatcher
from camserve.gateway.metrics import Metrics, method_label
from camserve.gateway.reply import cost_to_proto, curves_of, predictions_to_proto, render, render_maps
from camserve.gateway.request import Request, request_from_proto
from camserve.gateway.results import Results, key_of
from camserve.gateway.running import Running
from camserve.gateway.settings import Settings
from camserve.gateway.watch import Catalogue, ServedModel
from camserve.types import StreamOptions
from camserve.v1 import explain_pb2 as pb

_T = TypeVar("_T")
OnProgress = Callable[[pb.Progress], Awaitable[None]]


class Explainer:
    """What both explain calls do."""

    def __init__(self, catalogue: Catalogue, settings: Settings, metrics: Metrics) -> None:
        self._catalogue = catalogue
        self._settings = settings
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="render")
        self._ladder = settings.ladder()
        self._choices = dict(zip(self._ladder, settings.auto_ladder.split(), strict=True))
        self._results = Results(settings.result_cache_bytes)
        self._render_s = 0.0
        """Running mean of the time that a reply takes to render."""

    async def explain(
        self, message: pb.ExplainRequest, timeout_s: float | None, on_progress: OnProgress | None = None
    ) -> pb.ExplainReply:
        """The reply to one request.

        Args:
            message: the request.
            timeout_s: seconds until its deadline; None for the default.
            on_progress: awaited with each piece of news, from the opening on.

        Raises:
            CamserveError: whatever kept it from being answered.
        """
        allowed_s = self._settings.default_deadline_s if timeout_s is None else timeout_s
        deadline_s = asyncio.get_running_loop().time() + allowed_s
        model = self._catalogue.get(message.model)
        request = request_from_proto(message, model.required(), self._settings)
        model.check_ready()
        budget_s = self._settings.auto_budget_s if timeout_s is None else timeout_s
        request = resolved(request, self._ladder, partial(_predicted_s, model, request, deadline_s), budget_s)
        for place in request.choices:
            self._metrics.auto_choices.labels(model.name, self._choices[request.parts.methods[place]]).inc()
        try:
            async with asyncio.timeout_at(deadline_s) as timer:
                return await self._answer(model, request, _Deadline(deadline_s, timeout_s is not None), on_progress)
        except TimeoutError:
            if not timer.expired():
                raise
            raise DeadlineExceeded(f"the deadline of {allowed_s:g} s passed before the answer was complete") from None

    async def _answer(
        self, model: ServedModel, request: Request, deadline: _Deadline, on_progress: OnProgress | None
    ) -> pb.ExplainReply:
        """The reply, from the cache if that is switched on and has it."""

        async def make() -> pb.ExplainReply:
            return await self._made(model, request, deadline, on_progress)

        if not self._results.keeps:
            return await make()
        key = await self._in_thread(key_of, request)
        reply, outcome = await self._results.get(key, make)
        reply.cost.cached = outcome != "miss"
        self._metrics.result_cache.labels(model.name, outcome).inc()
        if reply.cost.cached:
            self._metrics.masked_queries_cached.labels(model.name).inc(reply.cost.queries)
        return reply

    def close(self) -> None:
        """Ends the rendering threads; what they have not begun is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _made(
        self, model: ServedModel, request: Request, deadline: _Deadline, on_progress: OnProgress | None
    ) -> pb.ExplainReply:
        """The reply; where there is none, the queries made for it were wasted."""
        in_time = deadline.asked and not request.allow_partial
        number, running = model.dispatcher.start(request, deadline.at_s, in_time, caller().owner)
        stream = None if on_progress is None else _Stream(request.stream, on_progress)
        try:
            await self._run(model, number, running, deadline, stream)
            return await self._reply(running)
        except BaseException:
            self._metrics.masked_queries_wasted.labels(model.name).inc(sum(running.queries().values()))
            raise

    async def _run(
        self, model: ServedModel, number: int, running: Running, deadline: _Deadline, stream: _Stream | None
    ) -> None:
        """Works on the request as far as its time allows: complete, or opened where a partial answer will do."""
        request = running.request
        until_s = deadline.at_s - self._margin_s() if request.allow_partial else deadline.at_s
        try:
            async with asyncio.timeout_at(until_s):
                await self._follow(model.dispatcher, number, running, stream)
        except TimeoutError:
            if not request.allow_partial:
                raise
            while running.opening is None:  # until the deadline itself
                await _news(running)
            self._metrics.partial_answers.labels(request.model.name).inc()
        finally:
            model.dispatcher.cancel(number)

    async def _follow(self, dispatcher: Dispatcher, number: int, running: Running, stream: _Stream | None) -> None:
        """Returns once the request is complete."""
        while not running.complete:
            await _news(running)
            if running.maps_complete:
                curves = await self._in_thread(curves_of, running.snapshot())
                dispatcher.evaluate(number, curves)
            if stream is not None and not running.complete and running.opening is not None:
                await self._tell(running, stream)

    async def _tell(self, running: Running, stream: _Stream) -> None:
        known = running.snapshot()
        progress = pb.Progress(done=running.answered, total=running.total, predictions=predictions_to_proto(known))
        progress.input.CopyFrom(wire.view_to_proto(known.opening.view))
        if stream.due():
            with _abandoned_at_end() as abandoned:
                progress.maps.extend(await self._in_thread(render_maps, known, self._settings, abandoned))
        await stream.send(progress)

    async def _reply(self, running: Running) -> pb.ExplainReply:
        began_s = time.perf_counter()
        with _abandoned_at_end() as abandoned:
            reply = await self._in_thread(render, running.snapshot(), self._settings, abandoned)
        render_s = time.perf_counter() - began_s
        self._render_s += (render_s - self._render_s) / 8
        cost = running.cost(render_s)
        reply.cost.CopyFrom(cost_to_proto(cost))
        self._account(running, cost.stage_seconds)
        return reply

    def _margin_s(self) -> float:
        """How long before its deadline a partial answer is begun: rendering, and the way to the client."""
        return self._settings.partial_margin_s + 2 * self._render_s

    async def _in_thread(self, work: Callable[..., _T], *arguments: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def _account(self, running: Running, stage_seconds: Mapping[str, float]) -> None:
        request = running.request
        label = method_label([method.name for method in request.parts.methods])
        self._metrics.stages(request.model.name, label, stage_seconds)
        for name, queries in running.queries().items():
            self._metrics.masked_queries.labels(request.model.name, name).inc(queries)


def _predicted_s(model: ServedModel, request: Request, deadline_s: float, queries: int) -> float | None:
    return model.dispatcher.planner.predicted_s(queries, priority=request.priority, deadline_s=deadline_s)


async def _news(running: Running) -> None:
    """Returns when something has come in; raises what ended the request."""
    await running.changed.wait()
    running.changed.clear()
    if running.error is not None:
        raise running.error


@dataclass(frozen=True)
class _Deadline:
    """When a request has to be answered."""

    at_s: float
    """A time of the event loop."""
    asked: bool
    """The client said so; else it is the server's own bound, for which nobody is refused beforehand."""


class _Stream:
    """Where news of one request go, and when the next maps are due."""

    def __init__(self, options: StreamOptions, send: OnProgress) -> None:
        self.send = send
        self._options = options
        self._maps_left = options.max_maps
        self._last_s = -math.inf

    def due(self) -> bool:
        """Maps shall be sent now; counts them as sent."""
        now_s = asyncio.get_running_loop().time()
        if not self._maps_left or now_s - self._last_s < self._options.min_interval_s:
            return False
        self._maps_left -= 1
        self._last_s = now_s
        return True


@contextmanager
def _abandoned_at_end() -> Iterator[threading.Event]:
    """Set on the way out: what still runs in a thread then runs for nobody."""
    abandoned = threading.Event()
    try:
        yield abandoned
    finally:
        abandoned.set()
