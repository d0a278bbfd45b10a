"""Answers explain requests: validates, has the steps made, renders. Knows no gRPC context."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from camserve import wire
from camserve.errors import DeadlineExceeded
from camserve.gateway.metrics import Metrics, method_label
from camserve.gateway.reply import cost_to_proto, render
from camserve.gateway.request import Request, request_from_proto
from camserve.gateway.running import Running
from camserve.gateway.settings import Settings
from camserve.gateway.watch import Catalogue, ServedModel
from camserve.labels import with_label
from camserve.v1 import explain_pb2 as pb

OnProgress = Callable[[pb.Progress], Awaitable[None]]


class Explainer:
    """What both explain calls do."""

    def __init__(self, catalogue: Catalogue, settings: Settings, metrics: Metrics) -> None:
        self._catalogue = catalogue
        self._settings = settings
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="render")

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
        try:
            async with asyncio.timeout_at(deadline_s) as timer:
                running = await self._run(model, request, deadline_s, on_progress)
                return await self._reply(request, running)
        except TimeoutError:
            if not timer.expired():
                raise
            raise DeadlineExceeded(f"the deadline of {allowed_s:g} s passed before the answer was complete") from None

    def close(self) -> None:
        """Ends the rendering threads; what they have not begun is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(
        self, model: ServedModel, request: Request, deadline_s: float, on_progress: OnProgress | None
    ) -> Running:
        number, running = model.dispatcher.start(request, deadline_s)
        try:
            while not running.complete:
                await running.changed.wait()
                running.changed.clear()
                if running.error is not None:
                    raise running.error
                if on_progress is not None and not running.complete:
                    await on_progress(_progress(running))
        finally:
            model.dispatcher.cancel(number)
        return running

    async def _reply(self, request: Request, running: Running) -> pb.ExplainReply:
        assert running.opening is not None  # a complete request has had its opening
        began_s = time.perf_counter()
        abandoned = threading.Event()
        try:
            reply = await asyncio.get_running_loop().run_in_executor(
                self._threads, render, request, running.opening, running.partials, self._settings, abandoned
            )
        finally:
            abandoned.set()
        cost = running.cost(time.perf_counter() - began_s)
        reply.cost.CopyFrom(cost_to_proto(cost))
        self._account(request, running, cost.stage_seconds)
        return reply

    def _account(self, request: Request, running: Running, stage_seconds: Mapping[str, float]) -> None:
        label = method_label([method.name for method in request.methods])
        self._metrics.stages(request.model.name, label, stage_seconds)
        for name, queries in running.queries().items():
            self._metrics.masked_queries.labels(request.model.name, name).inc(queries)


def _progress(running: Running) -> pb.Progress:
    opening = running.opening
    labels = running.request.model.labels
    return pb.Progress(
        done=running.answered,
        total=running.total,
        predictions=[
            wire.prediction_to_proto(with_label(prediction, labels))
            for prediction in (opening.predictions if opening else ())
        ],
    )
