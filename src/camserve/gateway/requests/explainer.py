"""Answers explain requests: chooses the method of `auto`, has the steps made, and has the reply rendered.

It knows no gRPC.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from camserve.errors import DeadlineExceeded
from camserve.finalise.results import Snapshot
from camserve.gateway.api.access import Caller
from camserve.gateway.ops.metrics import Metrics, method_label
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.registry import Registry, ServedModel
from camserve.gateway.requests.auto import resolved
from camserve.gateway.requests.memory import PICTURE_BYTES, answer_bytes
from camserve.gateway.requests.rendering import Encode, Renderer, predictions
from camserve.gateway.requests.reply_cache import ReplyCache
from camserve.gateway.requests.running import Run
from camserve.gateway.requests.turns import Threads
from camserve.planning import Owner
from camserve.types import Cost, InputView, Progress, StreamOptions
from camserve.types.request import ExplainRequest, FittedRequest

OnProgress = Callable[[Progress, InputView], Awaitable[None]]


@dataclass(frozen=True)
class Call:
    """The facts of one call beside its request."""

    encode: Encode
    caller: Caller
    timeout_s: float | None = None
    """Seconds until the deadline of the call; None: the server's own, for which nobody is refused beforehand."""
    on_progress: OnProgress | None = None
    """Awaited with all news, from the opening on; None: nobody wants any."""
    hold: Callable[[int], None] = lambda size: None
    """Counts bytes that the answer will take, as long as the call lasts; raises Overloaded where there is no room."""
    connection: str = ""
    """Connection by which the call came."""
    on_fitted: Callable[[FittedRequest], None] = lambda fitted: None
    """Told the request as it fits its model, its methods chosen."""
    came_s: float | None = None
    """When the call came, on the event loop's clock: the server's own deadline counts from then on; None: from now."""

    @property
    def owner(self) -> Owner:
        """The caller as the planner knows it: the owner of its requests."""
        return replace(self.caller.owner, connection=self.connection)


class Explainer:
    """Answers the requests of one gateway, whichever door they came by."""

    def __init__(self, registry: Registry, settings: Settings, metrics: Metrics) -> None:
        self._registry = registry
        self._settings = settings
        self._metrics = metrics
        self.threads = Threads("requests", 1 + min(4, os.cpu_count() or 1), PICTURE_BYTES * settings.max_image_pixels)
        """Threads for all long work of requests: reading them, fitting them, rendering replies."""
        self._renderer = Renderer(self.threads)
        self._ladder = settings.ladder()
        self._choices = dict(zip(self._ladder, settings.auto_ladder.split(), strict=True))
        self._replies = ReplyCache(settings.result_cache_bytes, settings.result_cache_shared)

    async def explain(self, request: ExplainRequest, call: Call) -> Any:
        """Returns the reply to one request, as the call encodes it.

        Raises:
            CamserveError: the request cannot be answered, or not in time.
        """
        now_s = asyncio.get_running_loop().time()
        if call.timeout_s is None:
            began_s, allowed_s = now_s if call.came_s is None else call.came_s, self._settings.default_deadline_s
        else:
            began_s, allowed_s = now_s, call.timeout_s
        deadline_s = began_s + allowed_s
        model = self._registry.get(request.model)
        limits = self._settings.request_limits()
        try:
            async with asyncio.timeout_at(deadline_s) as timer:
                fitted = await self.threads.run(call.owner.party, partial(request.fit, model.required(), limits))
                model.check_ready()
                fitted = self._chosen(model, fitted, call, deadline_s)
                call.on_fitted(fitted)
                call.hold(answer_bytes(fitted, news=call.on_progress is not None))
                return await self._answer(model, fitted, call, deadline_s)
        except TimeoutError:
            if not timer.expired():
                raise  # a timeout from somewhere below is a fault, and not the deadline
            raise DeadlineExceeded(f"the deadline of {allowed_s:g} s passed before the answer was complete") from None

    def close(self) -> None:
        """Ends the threads."""
        self.threads.close()

    def _chosen(self, model: ServedModel, fitted: FittedRequest, call: Call, deadline_s: float) -> FittedRequest:
        """Returns the request with its `auto` resolved; counts the choice."""
        budget_s = self._settings.auto_budget_s if call.timeout_s is None else call.timeout_s
        planner, owner = model.dispatcher.planner, call.owner
        usual = model.dispatcher.usual_share
        fitted = resolved(fitted, self._ladder, planner, deadline_s, budget_s, owner, usual)
        for index in fitted.choices:
            self._metrics.auto_choices.labels(model.name, self._choices[fitted.methods[index]]).inc()
        return fitted

    async def _answer(self, model: ServedModel, fitted: FittedRequest, call: Call, deadline_s: float) -> Any:
        """Returns the reply, made of kept maps where the cache is switched on and has them."""
        key = self._replies.key_of(fitted, call.caller.name) if self._replies.keeps else None
        kept = None if key is None else self._replies.get(key)
        if kept is not None:
            self._count_cache(model, "hit", kept.cost.queries)
            return await self._renderer.again(kept, fitted, call.owner.party, call.encode)
        return await self._worked(model, fitted, call, deadline_s, key)

    async def _worked(
        self, model: ServedModel, fitted: FittedRequest, call: Call, deadline_s: float, key: Hashable
    ) -> Any:
        """Returns the reply of a run: one of its own, or that of a caller who is just asking the same."""
        in_time = call.timeout_s is not None and not fitted.request.allow_partial
        owner = call.owner
        async with model.dispatcher.running(fitted, deadline_s, in_time=in_time, owner=owner, key=key) as run:
            own = run.fitted is fitted
            try:
                known = await self._followed(run, fitted, call, deadline_s)
                return await self._reply(model, run, replace(known, fitted=fitted), call, key if own else None, own)
            except BaseException:
                if run.followers == 1:  # nobody else gets anything of it
                    self._metrics.masked_queries_wasted.labels(model.name).inc(sum(run.results.queries().values()))
                raise
            finally:
                if key is not None:
                    self._count_cache(model, "miss" if own else "shared", 0 if own else run.cost(0.0).queries)

    async def _followed(self, run: Run, fitted: FittedRequest, call: Call, deadline_s: float) -> Snapshot:
        """Returns what is known at the end: everything, or what there is when time is up, if that will do."""
        stream = None if call.on_progress is None else _Stream(fitted.request.stream, call.on_progress)
        until_s = deadline_s
        if fitted.request.allow_partial:
            # The maps and the way to the client take their time as well; twice what maps usually take leaves room.
            until_s -= self._settings.partial_margin_s + 2 * self._renderer.expected_s(fitted)
        known: Snapshot | None = None
        try:
            async with asyncio.timeout_at(until_s):
                async for known in run:
                    if stream is not None and not run.complete:
                        await self._tell(stream, replace(known, fitted=fitted), run, call.owner.party)
        except TimeoutError:
            if not fitted.request.allow_partial:
                raise
            # Without an opening there is nothing to show; it is waited for until the deadline itself.
            known = run.results.snapshot() if run.results.opening else await anext(aiter(run))
            self._metrics.partial_answers.labels(fitted.model.name).inc()
        assert known is not None, "a run ends with a state, or raises"
        return known

    async def _tell(self, stream: _Stream, known: Snapshot, run: Run, party: str) -> None:
        """Sends news of a run, with maps where they are due."""
        maps = await self._renderer.maps(known, party) if stream.due() else ()
        news = Progress(run.results.answered, run.results.total, predictions(known), maps)
        await stream.send(news, known.opening.view)

    async def _reply(self, model: ServedModel, run: Run, known: Snapshot, call: Call, key: Hashable, own: bool) -> Any:
        """Returns the encoded reply, keeps its maps under `key` if they are complete, and counts what it took."""

        def cost_of(render_s: float) -> Cost:
            return replace(run.cost(render_s), cached=not own)

        keep = None if key is None or not run.complete else lambda found: self._replies.keep(key, found)
        data, cost = await self._renderer.reply(known, call.owner.party, call.encode, cost_of, keep)
        label = method_label([method.name for method in known.fitted.methods])
        self._metrics.stages(model.name, label, cost.stage_seconds)
        if own:
            for method, queries in run.results.queries().items():
                self._metrics.masked_queries.labels(model.name, method).inc(queries)
        return data

    def _count_cache(self, model: ServedModel, outcome: str, spared: int) -> None:
        """Counts an outcome of the result cache, and the masked queries that it spared."""
        self._metrics.result_cache.labels(model.name, outcome).inc()
        self._metrics.masked_queries_cached.labels(model.name).inc(spared)


class _Stream:
    """Sends the news of one request, and knows when the next maps are due."""

    def __init__(self, options: StreamOptions, send: OnProgress) -> None:
        self.send = send
        self._options = options
        self._maps_left = options.max_maps
        self._last_s = -math.inf

    def due(self) -> bool:
        """Returns whether maps shall be sent now; they then count as sent."""
        now_s = asyncio.get_running_loop().time()
        if not self._maps_left or now_s - self._last_s < self._options.min_interval_s:
            return False
        self._maps_left -= 1
        self._last_s = now_s
        return True
