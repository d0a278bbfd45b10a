"""What every explain call has in common, whichever API it came by: counted, measured, logged, and ended with a typed
status.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc

from camserve import wire
from camserve.errors import CamserveError, Overloaded
from camserve.gateway import requestid
from camserve.gateway.access import Rates, caller
from camserve.gateway.convert import public, status, trailing_metadata
from camserve.gateway.explainer import Explainer, OnProgress
from camserve.gateway.metrics import UNKNOWN, Metrics, exemplar, method_label
from camserve.gateway.tracing import Attributes, Tracing
from camserve.gateway.watch import Catalogue
from camserve.v1 import explain_pb2 as pb

_log = logging.getLogger(__name__)
_access_log = logging.getLogger("camserve.access")
"""One line for each explain call: who asked what, and what came of it. Never an image, never a token."""

_TRANSIT_S = 0.1
"""A client's deadline counts from its sending, ours from the arrival: its own cancellation comes that much earlier."""

_FAULTS = (
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
)
"""With these a server's span is an error, say OpenTelemetry's conventions; with others the client is at fault."""

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass
class _Call:
    """One explain call while it is answered."""

    model: str
    methods: tuple[str, ...]
    priority: str
    began_s: float
    code: grpc.StatusCode = grpc.StatusCode.OK
    error: str = ""
    reply: pb.ExplainReply = field(default_factory=pb.ExplainReply)

    def labels(self) -> tuple[str, str, str, str]:
        """Of `Metrics.request_seconds`."""
        return self.model, method_label(self.methods), self.priority, self.code.name

    def fields(self, seconds: float, caller: str) -> dict[str, Any]:
        """What the log tells of it."""
        told: dict[str, Any] = {"model": self.model, "methods": list(self.methods), "class": self.priority}
        told |= {"caller": caller} if caller else {}
        told |= {"code": self.code.name, "seconds": round(seconds, 4)}
        if self.code is not grpc.StatusCode.OK:
            return told | ({"error": self.error} if self.error else {})
        cost, complete = self.reply.cost, all(saliency.complete for saliency in self.reply.maps)
        return told | {"queries": cost.queries, "cached": cost.cached, "complete": complete}

    def attributes(self) -> Attributes:
        """What its span tells of it."""
        return {
            "rpc.grpc.status_code": self.code.value[0],
            "camserve.request_id": requestid.request_id(),
            "camserve.model": self.model,
            "camserve.methods": self.methods,
            "camserve.class": self.priority,
        }


class Calls:
    """The explain calls of one gateway."""

    def __init__(self, catalogue: Catalogue, explainer: Explainer, metrics: Metrics, tracing: Tracing) -> None:
        self._catalogue = catalogue
        self._explainer = explainer
        self._metrics = metrics
        self._tracing = tracing
        self._live: dict[int, _Call] = {}
        self._holds = 0
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._rates = Rates()
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.oldest_request_seconds.read = self._ages

    @property
    def active(self) -> int:
        """How many explain calls are being answered."""
        return len(self._live)

    async def idle(self) -> None:
        """Returns once no explain call is being answered."""
        await self._idle.wait()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, calls do not count as ended: their replies are still being converted."""
        self._holds += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._holds -= 1
            self._rest()

    async def explain(
        self,
        request: pb.ExplainRequest,
        context: Context,
        on_progress: OnProgress | None = None,
        *,
        timeout_s: float | None = None,
    ) -> pb.ExplainReply:
        """The reply; a failure ends the call with its status.

        Args:
            request: what is asked; its class becomes the best that the caller may ask for, if it is better than that.
            context: of the call.
            on_progress: awaited with each piece of news.
            timeout_s: what the client allows in seconds, beside the deadline of the call.
        """
        _cap(request)
        with self._measured(request, context) as call:
            try:
                await requestid.tell(context)
                self._rates.check(caller(), self._loop.time())
                allowed_s = _least(context.time_remaining(), timeout_s)
                call.reply = await self._explainer.explain(request, allowed_s, on_progress)
                call.reply.request_id = requestid.request_id()
                return call.reply
            except asyncio.CancelledError:
                call.code = cancellation(context)
                raise
            except Exception as error:
                self._failed(call, error)
                await abort(context, error)

    @contextmanager
    def _measured(self, request: pb.ExplainRequest, context: Context) -> Iterator[_Call]:
        """Inside the call is live and has a span; afterwards it is counted and logged."""
        call, number = self._call(request), next(self._numbers)
        self._live[number] = call
        self._idle.clear()
        in_flight = self._metrics.requests_in_flight.labels(call.priority)
        in_flight.inc()
        try:
            with self._tracing.call(requestid.rpc_method(), context.invocation_metadata() or ()) as tell:
                try:
                    yield call
                finally:
                    tell(call.attributes(), call.code in _FAULTS)
        finally:
            in_flight.dec()
            del self._live[number]
            self._rest()
            self._ended(call, self._loop.time() - call.began_s)

    async def refuse(self, request: pb.ExplainRequest, context: Context, error: Exception) -> NoReturn:
        """Ends a call of another API whose message is no request of ours; it counts as every other call."""
        with self._measured(request, context) as call:
            await requestid.tell(context)
            self._failed(call, error)
            await abort(context, error)

    def _rest(self) -> None:
        if not self._live and not self._holds:
            self._idle.set()

    def _ended(self, call: _Call, seconds: float) -> None:
        shown = exemplar(requestid.request_id())
        self._metrics.request_seconds.labels(*call.labels()).observe(seconds, shown)
        _access_log.info("explain", extra=call.fields(seconds, caller().name))

    def _failed(self, call: _Call, error: Exception) -> None:
        shown = public(error)
        call.code, call.error = status(shown), str(shown)
        if isinstance(error, Overloaded) and error.reason:
            self._metrics.refusals.labels(call.model, error.reason).inc()

    def _call(self, request: pb.ExplainRequest) -> _Call:
        """Whatever the client made up is "unknown", so that labels stay few."""
        methods = tuple(method.WhichOneof("method") or UNKNOWN for method in request.methods)
        try:
            model = self._catalogue.get(request.model).name
        except CamserveError:
            model = UNKNOWN
        return _Call(model, methods or ("grad_cam",), _priority(request), self._loop.time())

    def _ages(self) -> Mapping[tuple[str, ...], float]:
        """Age of the oldest live call by model, for the thread of a scrape."""
        now_s = self._loop.time()
        ages: dict[tuple[str, ...], float] = {(model.name,): 0.0 for model in self._catalogue.models}
        for call in list(self._live.values()):
            ages[(call.model,)] = max(ages.get((call.model,), 0.0), now_s - call.began_s)
        return ages


def _cap(request: pb.ExplainRequest) -> None:
    with suppress(CamserveError):  # an unknown class is refused with the rest of the request
        asked = wire.priority_from_proto(request.priority)
        request.priority = wire.priority_to_proto(caller().capped(asked))


def _least(*seconds: float | None) -> float | None:
    return min((each for each in seconds if each is not None), default=None)


def _priority(request: pb.ExplainRequest) -> str:
    try:
        return wire.priority_from_proto(request.priority)
    except CamserveError:
        return UNKNOWN


def cancellation(context: Context) -> grpc.StatusCode:
    """Why gRPC ended the call: its deadline, or the client."""
    remaining_s = context.time_remaining()
    passed = remaining_s is not None and remaining_s <= _TRANSIT_S
    return grpc.StatusCode.DEADLINE_EXCEEDED if passed else grpc.StatusCode.CANCELLED


async def abort(context: Context, error: Exception) -> NoReturn:
    """Ends the call with the error's status; never returns. An error without a type is logged and not shown."""
    if not isinstance(error, CamserveError):
        _log.error("a request failed", exc_info=error)
    shown = public(error)
    await context.abort(status(shown), str(shown), (*trailing_metadata(shown), (requestid.KEY, requestid.request_id())))
