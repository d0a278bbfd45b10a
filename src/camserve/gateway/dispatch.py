"""Drives the planner of one model: sends steps while workers have room, merges answers, sends again what was lost.

Everything here runs in one event loop. `pump` is called after every change; there is no loop that polls.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context

from structlog.contextvars import bind_contextvars

from camserve.errors import INTERNAL_MESSAGE, CamserveError, Internal, Unavailable
from camserve.gateway.fit import check_fit
from camserve.gateway.metrics import Metrics
from camserve.gateway.observe import Observer
from camserve.gateway.request import Request
from camserve.gateway.requestid import request_id
from camserve.gateway.running import Origin, Running
from camserve.gateway.settings import Settings
from camserve.gateway.tracing import Tracing
from camserve.gateway.upstream import Upstream
from camserve.planning import MAX_LOSSES, NOBODY, Owner, Planner, Slice, Step
from camserve.types import Item, ItemResult, MapCurves, StepResult

_log = logging.getLogger(__name__)


class Dispatcher:
    """The running requests of one model.

    Args:
        model: name of the model.
        upstreams: its workers, by place.
        settings: bounds.
        metrics: where steps are counted.
        tracing: where they become spans.
        on_loss: called with the place when a step was lost there. Nothing is sent to it until `set_workers` says how
            many workers there are.
    """

    def __init__(
        self,
        model: str,
        upstreams: Mapping[str, Upstream],
        settings: Settings,
        metrics: Metrics,
        tracing: Tracing,
        on_loss: Callable[[str], None],
    ) -> None:
        self._model = model
        self._upstreams = upstreams
        self._settings = settings
        self._observer = Observer(metrics, model)
        self._tracing = tracing
        self._on_loss = on_loss
        self._planner = Planner(settings.limits())
        self._running: dict[int, Running] = {}
        self._steps: dict[asyncio.Task[None], str] = {}
        """Steps in flight, with their places."""
        self._observer.follows(lambda: len(self._steps))
        self._alarm: asyncio.TimerHandle | None = None
        self._closing = False

    @property
    def planner(self) -> Planner:
        """For a look at its counts and predictions."""
        return self._planner

    def start(
        self, request: Request, deadline_s: float, in_time: bool = False, owner: Owner = NOBODY
    ) -> tuple[int, Running]:
        """Takes a request on; returns its number, for `cancel`.

        Args:
            request: what is asked.
            deadline_s: a time of the event loop.
            in_time: refuse what would be late.
            owner: who asks, with its own bounds.

        Raises:
            Overloaded: too much work waits, or so much that the deadline cannot be kept.
        """
        now_s = self._now_s()
        number = self._planner.admit(
            request.totals(),
            now_s=now_s,
            size_bytes=request.step_bytes,
            deadline_s=deadline_s,
            priority=request.priority,
            in_time=in_time,
            owner=owner,
        )
        origin = Origin(request_id(), self._tracing.current())
        running = Running(request, now_s, _unix_s(deadline_s - now_s), origin)
        self._running[number] = running
        self.pump()
        return number, running

    def evaluate(self, number: int, curves: Sequence[MapCurves]) -> None:
        """Asks the curves of a live request's maps, whose methods are complete."""
        running = self._running[number]
        for position in running.add_curves(curves):
            self._planner.settle(number, position, running.curves[position].queries(0, 1))
        self.pump()

    def cancel(self, number: int) -> None:
        """Sends nothing more for a request; does nothing if it is over."""
        self._planner.cancel(number)
        self._running.pop(number, None)
        self.pump()

    def set_workers(self, place: str, workers: int, device: str) -> None:
        """So many workers can answer at a place, on such a device: sends them steps."""
        self._planner.set_workers(place, workers, self._settings.limits(device))
        self.pump()

    def fail_all(self, error: CamserveError) -> None:
        """Ends every running request."""
        for number in list(self._running):
            self._fail(number, error)

    def abandon(self, place: str) -> None:
        """No worker is left at a place: what is in flight there is lost, also where TorchServe does not say so.

        It fails the calls that its worker was busy with, but forgets those that were waiting for a batch to fill.
        """
        for step, where in self._steps.items():
            if where == place:
                step.cancel()

    def remove(self, place: str) -> None:
        """A place is gone for good."""
        self._planner.remove_place(place)
        self.abandon(place)

    async def close(self) -> None:
        """Ends every running request and drops the steps in flight."""
        self._closing = True
        self._set_alarm(None)
        self.fail_all(Unavailable("the server is shutting down"))
        steps = list(self._steps)
        for step in steps:
            step.cancel()
        await asyncio.gather(*steps, return_exceptions=True)

    def pump(self) -> None:
        """Sends steps while there is work, and room at the workers."""
        if self._closing:
            return
        while (step := self._next_step()) is not None:
            self._send(step)
        self._set_alarm(self._planner.wake_s(self._now_s()))
        self._observer.waiting(self._planner.waiting)

    def _next_step(self) -> Step | None:
        with self._observer.planning():
            return self._planner.next_step(self._now_s())

    def _set_alarm(self, at_s: float | None) -> None:
        """`pump` is called then, though nothing has come back: a step may be overdue."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = None if at_s is None else asyncio.get_running_loop().call_at(at_s, self.pump)

    def _send(self, step: Step) -> None:
        self._observer.sent(step, self._planner.allowed_queries(step))
        running = [self._running[part.request] for part in step.slices]
        for one in running:
            if (waited_s := one.sent(self._now_s())) is not None:
                self._observer.queued(one.request.priority, waited_s)
        name = f"step {step.number} of {self._model}"
        items = [one.item(part) for one, part in zip(running, step.slices, strict=True)]
        work = self._run(step, running, items, self._upstreams[step.place])
        task = asyncio.create_task(work, name=name, context=_context(running))
        self._steps[task] = step.place
        task.add_done_callback(lambda task: self._returned(step, task))

    def _returned(self, step: Step, task: asyncio.Task[None]) -> None:
        del self._steps[task]
        if self._closing:
            return
        if task.cancelled():  # perhaps before it began, so that it could not say so itself
            self._lost(step, Unavailable(f"the workers of {self._model} died"))
        self.pump()

    async def _run(self, step: Step, running: Sequence[Running], items: Sequence[Item], upstream: Upstream) -> None:
        began_s = self._now_s()
        try:
            with self._tracing.step(self._model, step, [one.origin.span for one in running]):
                result = await upstream.step(self._model, items, self._settings.step_timeout_s)
                check_fit(running[0].request.model, items, result)
        except Unavailable as error:
            self._lost(step, error)
        except CamserveError as error:
            self._refused(step, error)
        except Exception:
            _log.exception("step %d of model %s", step.number, self._model)
            self._refused(step, Internal(INTERNAL_MESSAGE))
        else:
            self._observe(step, result)
            self._answered(step, result)
        self._observer.took(self._now_s() - began_s)

    def _observe(self, step: Step, result: StepResult) -> None:
        """Teaches the planner what a step costs: the time for which the worker was busy with it."""
        self._observer.answered(result)
        answered = [outcome for outcome in result.outcomes if isinstance(outcome, ItemResult)]
        made = sum(partial.queries for outcome in answered for partial in outcome.partials)
        # Constant masks are asked and not made; some methods make passes that are no queries.
        queries = max(step.queries, made)
        seconds = sum(result.stage_seconds.values())
        if len(answered) == len(result.outcomes):
            self._planner.observe(step.place, result.worker, queries, len(answered), seconds, self._now_s())

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
            self._observer.wasted(result)
            return
        running.add(part, result)
        if part.request in self._planner:
            running.maps_complete = self._planner.stalled(part.request)
            running.changed.set()
        else:
            self._running.pop(part.request)
            running.finish(self._now_s())

    def _lost(self, step: Step, error: Unavailable) -> None:
        self._planner.set_workers(step.place, 0)  # until somebody has looked
        for part in step.slices:
            self._put_back(step, part, error)
        self._on_loss(step.place)

    def _put_back(self, step: Step, part: Slice, error: Unavailable) -> None:
        if self._planner.lost(step.number, part.request):
            self._observer.retried()
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


def _context(running: Sequence[Running]) -> Context:
    """Where the task of a step runs: not in the call that happened to send it, but for all whose work is in it."""
    context = Context()
    context.run(bind_contextvars, request_ids=[one.origin.request_id for one in running])
    return context


def _unix_s(in_s: float) -> float:
    """The Unix time in so many seconds; 0 for never."""
    return 0.0 if math.isinf(in_s) else time.time() + in_s
