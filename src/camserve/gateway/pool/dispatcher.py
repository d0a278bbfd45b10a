"""Drives the planner of one model: sends steps while workers have room, merges answers, sends again what was lost.

Everything here runs in one event loop, but for what grows with a request: messages are made and read, and sums are
merged, in threads. `_pump` is called after every change; there is no loop that polls.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass, replace
from typing import Any

from structlog.contextvars import bind_contextvars

from camserve.errors import (
    INTERNAL_MESSAGE,
    CamserveError,
    ImageMissing,
    Internal,
    InvalidImage,
    ModelChanged,
    Unavailable,
    WorkerLost,
)
from camserve.finalise.results import follow_ups
from camserve.gateway.api.request_ids import request_id
from camserve.gateway.ops.metrics import Metrics
from camserve.gateway.ops.settings import Settings
from camserve.gateway.ops.tracing import Tracing
from camserve.gateway.pool.check_answer import check_answer
from camserve.gateway.pool.model_metrics import ModelMetrics
from camserve.gateway.pool.sent_images import SentImages
from camserve.gateway.pool.torchserve import Backend
from camserve.gateway.requests.demands import demands_of, opening_of
from camserve.gateway.requests.running import Origin, Run
from camserve.planning import CLASSES, NOBODY, Fate, Load, Owner, Planner, Slice, Step, UsualShares
from camserve.types import Item, ItemResult, StepResult
from camserve.types.parts import Part
from camserve.types.request import FittedRequest

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Passenger:
    """A run with its slice and its item in a step that is being sent."""

    slice_: Slice
    run: Run
    item: Item


class Dispatcher:
    """Works on the running requests of one model.

    Args:
        model: name of the model.
        backends: connections, by the name of the backend.
        settings: bounds of the planner and of steps.
        metrics: counts steps.
        tracing: makes spans of steps.
        look_now: called with a backend's name when a step was lost there, and the items of the step; without any
            where it was answered by another model than expected. Nothing is sent to the backend until `set_workers`
            says how many workers there are.
    """

    def __init__(
        self,
        model: str,
        backends: Mapping[str, Backend],
        settings: Settings,
        metrics: Metrics,
        tracing: Tracing,
        look_now: Callable[[str, Sequence[Item]], None],
    ) -> None:
        self._model = model
        self._backends = backends
        self._settings = settings
        self._metrics = ModelMetrics(metrics, model)
        self._tracing = tracing
        self._look_now = look_now
        self._planner = Planner(settings.limits())
        self._shares = UsualShares()
        self._images = SentImages()
        self._known: set[str] = set()
        """Names of the backends that the planner knows."""
        self._runs: dict[int, Run] = {}
        """Live runs, by their number in the planner."""
        self._by_key: dict[Hashable, int] = {}
        """Numbers of the runs that others may follow, by what is the same for their requests."""
        self._steps: dict[asyncio.Task[None], str] = {}
        """Tasks of the steps in flight, with the name of their backend."""
        self._metrics.read_steps(lambda: len(self._steps))
        self._accounts: set[asyncio.Task[None]] = set()
        """Tasks that merge answers and ask follow-ups; see `_aside`."""
        self._alarm: asyncio.TimerHandle | None = None
        self._closing = False

    @property
    def planner(self) -> Planner:
        """The planner of the model, for a look at its counts and predictions."""
        return self._planner

    def usual_share(self, part: Part) -> float:
        """Returns the share of its queries that is usually enough for a part that may stop early."""
        return self._shares.of(_kind(part))

    @asynccontextmanager
    async def running(
        self,
        fitted: FittedRequest,
        deadline_s: float,
        *,
        in_time: bool = False,
        owner: Owner = NOBODY,
        key: Hashable = None,
    ) -> AsyncIterator[Run]:
        """Works on a request as long as the block runs; leaving it, in any way, cancels what nobody else follows.

        Args:
            fitted: the request.
            deadline_s: time on the event loop's clock from which on no work is sent for it.
            in_time: whether a request that would be late is refused.
            owner: who asks, with bounds of its own.
            key: the same for requests whose results are the same; None for one that has no other. A request follows a
                run with its key that is on its way, unless that is of a class that comes later. A run goes on as long
                as anybody follows it.

        Raises:
            Overloaded: too many requests are there, too much work waits, or the deadline cannot be kept.
        """
        number = self._to_follow(fitted, key)
        if number is None:
            number = self._admitted(fitted, deadline_s, in_time, owner, key)
        else:
            self._planner.join(number, deadline_s, owner)
        run = self._runs[number]
        run.deadline_s = max(run.deadline_s, deadline_s)
        # The first caller was admitted with the request itself; the planner counts only those who joined it.
        joined, run.followers = run.followers > 0, run.followers + 1
        try:
            self._pump()
            yield run
        finally:
            run.followers -= 1
            if joined:
                self._planner.leave(owner)
            if not run.followers:
                self._note_shares(run)
                self._planner.cancel(number)
                self._drop(number)
                self._pump()

    def _to_follow(self, fitted: FittedRequest, key: Hashable) -> int | None:
        """Returns the number of the run that a request may follow; a run of a later class would be too slow for it."""
        number = None if key is None else self._by_key.get(key)
        if number is None or number not in self._planner:
            return None
        theirs, own = self._runs[number].fitted.request.priority, fitted.request.priority
        return number if CLASSES.index(theirs) <= CLASSES.index(own) else None

    def _admitted(self, fitted: FittedRequest, deadline_s: float, in_time: bool, owner: Owner, key: Hashable) -> int:
        """Returns the number of a new run that the planner has taken on."""
        now_s = self._now_s()
        number = self._planner.admit(
            demands_of(fitted, usual=self.usual_share),
            opening=opening_of(fitted),
            now_s=now_s,
            size_bytes=fitted.step_bytes,
            deadline_s=deadline_s,
            priority=fitted.request.priority,
            owner=owner,
            in_time=in_time,
        )
        self._runs[number] = Run(fitted, now_s, deadline_s, Origin(request_id(), self._tracing.current()))
        if key is not None:
            self._by_key[key] = number
        return number

    def _drop(self, number: int) -> Run | None:
        """Forgets a run that is over, so that nobody can join it any more; returns it if it was live."""
        for key in [key for key, each in self._by_key.items() if each == number]:
            del self._by_key[key]
        return self._runs.pop(number, None)

    def set_workers(self, backend: str, workers: int, device: str) -> None:
        """Notes how many workers can answer at a backend, and on what device; sends them steps."""
        self._known.add(backend)
        self._planner.set_workers(backend, workers, self._settings.limits(device))
        if not workers:
            self._images.forget(backend)
        self._pump()

    def fail_all(self, error: CamserveError) -> None:
        """Ends every running request."""
        for number in list(self._runs):
            self._fail(number, error)

    def abandon(self, backend: str) -> None:
        """Gives up the steps in flight at a backend that has no worker left.

        TorchServe fails the calls that the worker was busy with, but forgets those that waited for a batch to fill.
        """
        for step, where in self._steps.items():
            if where == backend:
                step.cancel()

    def remove(self, backend: str) -> None:
        """Forgets a backend for good."""
        self._known.discard(backend)
        self._planner.remove_backend(backend)
        self._images.forget(backend)
        self.abandon(backend)

    async def close(self) -> None:
        """Ends every running request and drops the steps in flight."""
        self._closing = True
        self._set_alarm(None)
        self.fail_all(Unavailable("the server is shutting down"))
        tasks = [*self._steps, *self._accounts]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_follow_ups(self, number: int, run: Run) -> None:
        """Asks the rankings and curves that can be asked, now that everything before them has come in."""
        assert run.results.opening is not None, "follow-ups come after the opening"
        try:
            asked = await asyncio.to_thread(follow_ups, run.results.snapshot())
        except CamserveError as error:
            self._fail(number, error)
            return
        except Exception:
            _log.exception("the follow-ups of a request for model %s", self._model)
            self._fail(number, Internal(INTERNAL_MESSAGE))
            return
        if self._runs.get(number) is not run:
            return  # it has ended meanwhile
        run.results.follow_ups |= asked
        for position, follow_up in asked.items():
            self._planner.settle(number, position, follow_up.queries(None, len(run.results.opening.targets)))
        self._pump()

    def _pump(self) -> None:
        """Sends steps while there is work, and room at the workers."""
        if self._closing:
            return
        while (step := self._next_step()) is not None:
            try:
                self._send(step)
            except Exception:  # the step is known to the planner: it must not stay in flight for ever
                _log.exception("step %d of model %s", step.number, self._model)
                self._refuse_all(step, Internal(INTERNAL_MESSAGE))
        self._set_alarm(self._planner.wake_s(self._now_s()))
        self._metrics.waiting(self._planner.waiting, self._planner.waiting_s())

    def _next_step(self) -> Step | None:
        """Returns the next step of the planner; counts the time that planning took."""
        with self._metrics.planning():
            return self._planner.next_step(self._now_s())

    def _set_alarm(self, at_s: float | None) -> None:
        """Has `_pump` called at a time although nothing may have come back: a step may be overdue."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = None if at_s is None else asyncio.get_running_loop().call_at(at_s, self._pump)

    def _send(self, step: Step) -> None:
        """Starts the task of a step."""
        self._metrics.sent(step, step.predicted_s / step.allowed_s)
        passengers = [self._passenger(slice_) for slice_ in step.slices]
        for one in passengers:
            if (waited_s := one.run.waited_s(self._now_s())) is not None:
                self._metrics.queued(one.run.fitted.request.priority, waited_s)
        work = self._carry(step, passengers, self._backends[step.backend])
        name = f"step {step.number} of {self._model}"
        task = asyncio.create_task(work, name=name, context=_context(passengers))
        self._steps[task] = step.backend
        task.add_done_callback(lambda task: self._returned(step, task))

    def _passenger(self, slice_: Slice) -> _Passenger:
        """Returns the run of a slice with the item to be sent for it."""
        run = self._runs[slice_.request]
        item = run.results.item((span.position, span.start, span.stop) for span in slice_.spans)
        return _Passenger(slice_, run, replace(item, expires_s=run.deadline_s))

    def _returned(self, step: Step, task: asyncio.Task[None]) -> None:
        """Notes that the task of a step has ended, and sends what can be sent now."""
        del self._steps[task]
        if self._closing:
            return
        # A task may be cancelled before it begins; it cannot account for its step itself then, so this does it for all.
        if task.cancelled():
            # The backend has said itself that its workers are gone: nothing speaks against it, or the step.
            self._put_all_back(step, Unavailable(f"the workers of {self._model} died"))
            self._hold(step.backend)
        elif (error := task.exception()) is not None:  # of the accounts themselves: nothing stays in flight for ever
            _log.error("step %d of model %s", step.number, self._model, exc_info=error)
            self._refuse_all(step, Internal(INTERNAL_MESSAGE))
        self._pump()

    async def _carry(self, step: Step, passengers: Sequence[_Passenger], backend: Backend) -> None:
        """Has a backend answer a step, and accounts for what becomes of it."""
        began_s = self._now_s()
        try:
            with self._tracing.step(self._model, step, [one.run.origin.span for one in passengers]):
                result = await self._answer(step, passengers, backend)
        except CamserveError as error:
            self._lost(step, passengers, began_s, error)
        except Exception:
            _log.exception("step %d of model %s", step.number, self._model)
            self._lost(step, passengers, began_s, Internal(INTERNAL_MESSAGE))
        else:
            self._account(step, passengers, began_s, result)
        self._metrics.took(self._now_s() - began_s)

    def _account(self, step: Step, passengers: Sequence[_Passenger], began_s: float, result: StepResult) -> None:
        """Accounts for the answer to a step."""
        try:
            self._learn(step, passengers, began_s, result)
            self._take(step, passengers, result)
        except Exception:
            _log.exception("the answer to step %d of model %s", step.number, self._model)
            self._refuse_all(step, Internal(INTERNAL_MESSAGE))

    async def _answer(self, step: Step, passengers: Sequence[_Passenger], backend: Backend) -> StepResult:
        """Returns the answer to a step. An image's bytes travel only to a backend that may not have them yet."""
        timeout_s, where = self._settings.step_timeout_s, step.backend
        items = [self._images.lightened(where, one.item) for one in passengers]
        for one, item in zip(passengers, items, strict=True):
            one.run.results.sent(item)
        result = await backend.step(self._model, items, timeout_s)
        check_answer(passengers[0].run.fitted.model, items, result)
        missing = [at for at, outcome in enumerate(result.outcomes) if isinstance(outcome, ImageMissing)]
        if missing:
            self._metrics.resent(len(missing))
            again = [passengers[at].item for at in missing]
            for at in missing:
                passengers[at].run.results.sent(passengers[at].item)
            second = await backend.step(self._model, again, timeout_s)
            check_answer(passengers[0].run.fitted.model, again, second)
            if not second.is_of_same_model(result):
                raise ModelChanged(f"model {self._model} was replaced while it answered a step")  # it is sent again
            result = result.with_outcomes(missing, second)
        if result.keeps_images:
            self._images.note(where, [one.item.digest for one in passengers])
        return result

    def _learn(self, step: Step, passengers: Sequence[_Passenger], began_s: float, result: StepResult) -> None:
        """Teaches the planner that the backend answers, and what work costs: for how long the worker was busy, and with
        what it really made.

        A step with an item that failed does not tell what work costs, since what was made of that item is not known.
        """
        self._metrics.answered(result)
        if all(isinstance(outcome, Unavailable) for outcome in result.outcomes):
            self._note_loss(step, passengers, began_s)  # that is no answer
        elif step.backend in self._known and not all(isinstance(outcome, Internal) for outcome in result.outcomes):
            self._planner.blame.answered(step.backend, step.predicted_s)
        if all(isinstance(outcome, ItemResult) for outcome in result.outcomes):
            load = Load(result.made, len(result.outcomes))
            seconds = sum(result.stage_seconds.values())
            self._planner.observe(step.backend, result.worker, load, seconds, self._now_s())

    def _take(self, step: Step, passengers: Sequence[_Passenger], result: StepResult) -> None:
        """Accounts for each outcome; has the sums of those that count merged in threads."""
        for one, outcome in zip(passengers, result.outcomes, strict=True):
            one.run.results.spent(result)
            if isinstance(outcome, Unavailable):
                self._put_back(step, one.slice_, outcome)
            elif isinstance(outcome, CamserveError):
                self._refuse(step, one.slice_, outcome)
            elif not result.is_of(one.run.fitted.model):
                text = f"model {self._model} was replaced while this request ran; try again"
                self._refuse(step, one.slice_, ModelChanged(text))
                self._hold(step.backend)
            else:
                self._take_sums(step, one, outcome)

    def _take_sums(self, step: Step, one: _Passenger, outcome: ItemResult) -> None:
        """Accounts for sums; has those that count merged. Sums that cannot be accounted for end their request alone."""
        try:
            counts = self._counts(step, one, outcome)
        except Exception:
            _log.exception("an answer for model %s", self._model)
            self._refuse(step, one.slice_, Internal(INTERNAL_MESSAGE))
            return
        if counts:
            # Merging has a task of its own: that of the step may still be cancelled, and what is accounted for must
            # not be lost.
            self._aside(self._merge(one, outcome))

    def _counts(self, step: Step, one: _Passenger, result: ItemResult) -> bool:
        """Tells the planner that a slice was answered; returns whether anybody still waits for it."""
        run, opening = one.run, one.slice_.opening
        live = self._runs.get(one.slice_.request) is run
        demands = demands_of(run.fitted, len(result.targets)) if live and opening else None
        if not self._planner.done(step.number, one.slice_.request, demands) or not live:
            self._metrics.wasted(result)
            return False
        run.results.take(result)
        run.merging += 1
        return True

    async def _merge(self, one: _Passenger, outcome: ItemResult) -> None:
        """Merges the sums of a slice; its run may then be complete, or have follow-ups to ask."""
        run, number = one.run, one.slice_.request
        try:
            await asyncio.to_thread(run.results.merge, one.item, outcome)
        except Exception:  # the planner has counted the slice as done: nobody would ask it again
            _log.exception("merging an answer for model %s", self._model)
            self._fail(number, Internal(INTERNAL_MESSAGE))
        run.merging -= 1
        if self._runs.get(number) is not run:
            return
        withdrawn = 0
        if number in self._planner and (enough := run.results.enough):
            withdrawn = self._planner.withdraw(number, enough)
        self._go_on(number, run)
        if withdrawn:
            self._pump()  # others need not wait for a place any more

    def _goes_on(self, number: int) -> bool:
        """Tells whether work of a live request waits or is in flight, so that its run need not be looked after now."""
        return number in self._planner and not self._planner.stalled(number)

    def _note_shares(self, run: Run) -> None:
        """Learns how much was asked of the parts that may stop early, of a run that is complete or was left."""
        known = None if run.results.opening is None else run.results.snapshot()
        for position, part in enumerate(run.fitted.parts):
            if known is not None and part.method.accepted_difference:
                self._shares.note(_kind(part), known.fraction([position]), known.is_complete(position))

    def _go_on(self, number: int, run: Run) -> None:
        """Ends a live run of which everything has come in, or asks its follow-ups; wakes those who look at it."""
        # The planner is done with a request once all its slices were answered; the last sums may be merged later.
        if number not in self._planner:
            if not run.merging:
                self._drop(number)
                run.finish(self._now_s())
            return
        if not run.merging and self._planner.stalled(number):
            self._aside(self._ask_follow_ups(number, run))
        run.wake()

    def _aside(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs work in a task that is not that of a step, which may be cancelled with its backend."""
        task = asyncio.create_task(work, name=f"accounts of {self._model}")
        self._accounts.add(task)
        task.add_done_callback(self._accounts.discard)

    def _lost(self, step: Step, passengers: Sequence[_Passenger], began_s: float, error: CamserveError) -> None:
        """Notes who may be to blame for a lost step, and puts its slices back."""
        own = self._note_loss(step, passengers, began_s)
        self._put_all_back(step, error, by_worker=own and isinstance(error, WorkerLost))

    def _note_loss(self, step: Step, passengers: Sequence[_Passenger], began_s: float) -> bool:
        """Notes that a backend has lost a step, and sends nothing more there until somebody has looked.

        Returns:
            Whether the step may have been lost by its own fault.
        """
        if step.backend not in self._known:
            return False
        requests = [slice_.request for slice_ in step.slices]
        own = self._planner.blame.lost(step.backend, requests, step.predicted_s, began_s, self._now_s())
        # Without their images, which may be large, and may never be asked for: the control has one of its own.
        self._hold(step.backend, [replace(one.item, image=None) for one in passengers] if own else ())
        return own

    def _hold(self, backend: str, lost: Sequence[Item] = ()) -> None:
        """Sends nothing more to a backend until somebody has looked; one that was removed stays removed."""
        if backend in self._known:
            self._planner.set_workers(backend, 0)
            self._images.forget(backend)
            self._look_now(backend, lost)

    def _put_all_back(self, step: Step, error: CamserveError, by_worker: bool = False) -> None:
        """Tells the planner that every slice of a step was lost."""
        for slice_ in step.slices:
            self._put_back(step, slice_, error, by_worker)

    def _put_back(self, step: Step, slice_: Slice, error: CamserveError, by_worker: bool = False) -> None:
        """Tells the planner that a slice was lost; fails its request where it is at fault or nobody is left to ask."""
        waiting, went_on = self._planner.waiting_units(), self._goes_on(slice_.request)
        fate = self._planner.lost(step.number, slice_.request, by_worker)
        if fate is Fate.AT_FAULT:
            text = f"workers that answer others do not outlive this image: {error}; it is not sent again"
            self._fail(slice_.request, InvalidImage(text))
        elif fate is Fate.GIVEN_UP:
            gave_up = Unavailable(f"{error}; given up after several attempts")
            self._fail(slice_.request, gave_up if isinstance(error, Unavailable) else error)
        # Where neither holds, a copy of the slice may be answered or in flight, and nothing was put back.
        elif self._planner.waiting_units() != waiting:
            self._metrics.retried()
        elif went_on and not self._goes_on(slice_.request):  # nothing of the slice is asked any more, nor of the rest
            self._go_on(slice_.request, self._runs[slice_.request])

    def _refuse_all(self, step: Step, error: CamserveError) -> None:
        """Fails the request of every slice of a step."""
        for slice_ in step.slices:
            self._refuse(step, slice_, error)

    def _refuse(self, step: Step, slice_: Slice, error: CamserveError) -> None:
        """Fails the request of a slice, which is not sent again."""
        # The request is cancelled first: a lost slice of a live request would wait again.
        self._fail(slice_.request, error)
        if self._planner.is_in_flight(step.number, slice_.request):  # else it was answered before the step failed
            self._planner.lost(step.number, slice_.request)

    def _fail(self, number: int, error: CamserveError) -> None:
        """Cancels a request, and ends its run with an error."""
        self._planner.cancel(number)
        run = self._drop(number)
        if run is not None:
            run.fail(error)

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()


def _kind(part: Part) -> Hashable:
    """Returns what tells apart parts that need unlike shares; tolerances within a factor of 1.4 count as one.

    There are few kinds, whatever clients ask.
    """
    return part.method.name, part.layer.name, round(math.log2(max(part.method.accepted_difference, 2.0**-10)))


def _context(passengers: Sequence[_Passenger]) -> Context:
    """Returns the context of a step's task: it names all calls whose work the step has, not the one that sent it."""
    context = Context()
    context.run(bind_contextvars, request_ids=[one.run.origin.request_id for one in passengers])
    return context
