"""Drives the planner of one model: sends steps while workers have room, merges answers, sends again what was lost.

Everything here runs in one event loop. `pump` is called after every change; there is no loop that polls.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from camserve.errors import INTERNAL_MESSAGE, CamserveError, Internal, Unavailable
from camserve.gateway.fit import check_fit
from camserve.gateway.metrics import Metrics
from camserve.gateway.request import Request
from camserve.gateway.running import Running
from camserve.gateway.settings import Settings
from camserve.gateway.upstream import Upstream
from camserve.planning import MAX_LOSSES, Limits, Planner, Slice, Step
from camserve.types import Item, ItemResult, Layer, StepResult

_log = logging.getLogger(__name__)


class Dispatcher:
    """The running requests of one model.

    Args:
        model: name of the model.
        upstream: its workers.
        settings: bounds.
        metrics: where steps are counted.
        on_loss: called when a step was lost. Nothing is sent until `resume` says how many workers there are.
    """

    def __init__(
        self, model: str, upstream: Upstream, settings: Settings, metrics: Metrics, on_loss: Callable[[], None]
    ) -> None:
        self._model = model
        self._upstream = upstream
        self._settings = settings
        self._metrics = metrics
        self._on_loss = on_loss
        self._planner = Planner(
            Limits(
                queries=settings.step_queries,
                items=settings.step_items,
                size_bytes=settings.step_bytes,
                requests=settings.max_requests,
                waiting_queries=settings.max_waiting_queries,
            )
        )
        self._running: dict[int, Running] = {}
        self._steps: set[asyncio.Task[None]] = set()
        self._workers = 0
        self._closing = False

    @property
    def planner(self) -> Planner:
        """For a look at its counts."""
        return self._planner

    def start(self, request: Request, deadline_s: float) -> tuple[int, Running]:
        """Takes a request on; returns its number, for `cancel`. `deadline_s` is a time of the event loop.

        Raises:
            Overloaded: too much work waits.
        """
        number = self._planner.admit(request.totals(), request.step_bytes, deadline_s)
        running = Running(request, self._now_s())
        self._running[number] = running
        self.pump()
        return number, running

    def cancel(self, number: int) -> None:
        """Sends nothing more for a request; does nothing if it is over."""
        self._planner.cancel(number)
        self._running.pop(number, None)
        self.pump()

    def resume(self, workers: int) -> None:
        """So many workers can answer: sends them steps."""
        self._workers = workers
        self.pump()

    def fail_all(self, error: CamserveError) -> None:
        """Ends every running request."""
        for number in list(self._running):
            self._fail(number, error)

    def abandon(self) -> None:
        """No worker is left: what is in flight is lost, also where TorchServe does not say so.

        It fails the calls that its worker was busy with, but forgets those that were waiting for a batch to fill.
        """
        for step in self._steps:
            step.cancel()

    async def close(self) -> None:
        """Ends every running request and drops the steps in flight."""
        self._closing = True
        self.fail_all(Unavailable("the server is shutting down"))
        steps = list(self._steps)
        for step in steps:
            step.cancel()
        await asyncio.gather(*steps, return_exceptions=True)

    def pump(self) -> None:
        """Sends steps while there is work, and room at the workers."""
        while len(self._steps) < self._workers * self._settings.steps_per_worker:
            step = self._planner.next_step(self._now_s())
            if step is None:
                break
            self._send(step)
        self._metrics.waiting_queries.labels(self._model).set(self._planner.waiting)

    def _send(self, step: Step) -> None:
        self._metrics.step_queries.labels(self._model).observe(step.queries)
        self._metrics.step_items.labels(self._model).observe(len(step.slices))
        running = [self._running[part.request] for part in step.slices]
        items = [one.item(part) for one, part in zip(running, step.slices, strict=True)]
        layers = [one.request.layer for one in running]
        task = asyncio.create_task(self._run(step, items, layers), name=f"step {step.number} of {self._model}")
        self._steps.add(task)
        task.add_done_callback(self._returned)

    def _returned(self, task: asyncio.Task[None]) -> None:
        self._steps.discard(task)
        if not task.cancelled():
            self.pump()

    async def _run(self, step: Step, items: Sequence[Item], layers: Sequence[Layer]) -> None:
        began_s = self._now_s()
        try:
            result = await self._upstream.step(self._model, items, self._settings.step_timeout_s)
            check_fit(items, layers, result)
        except asyncio.CancelledError:
            if self._closing:
                raise
            self._lost(step, Unavailable(f"the workers of {self._model} died"))
        except Unavailable as error:
            self._lost(step, error)
        except CamserveError as error:
            self._refused(step, error)
        except Exception:
            _log.exception("step %d of model %s", step.number, self._model)
            self._refused(step, Internal(INTERNAL_MESSAGE))
        else:
            self._answered(step, result)
        self._metrics.step_seconds.labels(self._model).observe(self._now_s() - began_s)

    def _answered(self, step: Step, result: StepResult) -> None:
        for part, outcome in zip(step.slices, result.outcomes, strict=True):
            if (running := self._running.get(part.request)) is not None:
                running.spent(result.stage_seconds, result.worker)
            if isinstance(outcome, Unavailable):
                self._put_back(step, part, outcome)
            elif isinstance(outcome, CamserveError):
                self._refuse(step, part, outcome)
            else:
                self._settle(step, part, outcome)

    def _settle(self, step: Step, part: Slice, result: ItemResult) -> None:
        running = self._running.get(part.request)
        totals = running.request.final_totals(len(result.targets)) if running and part.opening else None
        if not self._planner.done(step.number, part.request, totals) or running is None:
            return
        running.add(part, result)
        if part.request in self._planner:
            running.changed.set()
        else:
            self._running.pop(part.request)
            running.finish(self._now_s())

    def _lost(self, step: Step, error: Unavailable) -> None:
        self._workers = 0  # until somebody has looked
        for part in step.slices:
            self._put_back(step, part, error)
        self._on_loss()

    def _put_back(self, step: Step, part: Slice, error: Unavailable) -> None:
        if self._planner.lost(step.number, part.request):
            self._metrics.retries.labels(self._model).inc()
        else:
            self._fail(part.request, Unavailable(f"{error}; given up after {MAX_LOSSES} attempts"))

    def _refused(self, step: Step, error: CamserveError) -> None:
        for part in step.slices:
            self._refuse(step, part, error)

    def _refuse(self, step: Step, part: Slice, error: CamserveError) -> None:
        self._fail(part.request, error)
        self._planner.lost(step.number, part.request)

    def _fail(self, number: int, error: CamserveError) -> None:
        self._planner.cancel(number)
        running = self._running.pop(number, None)
        if running is not None:
            running.fail(error)

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()
