"""Answers the explain calls of every door: counts, measures and logs them, and ends them with a typed status."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import grpc

from camserve.errors import CamserveError, DeadlineExceeded, InvalidInput, Overloaded
from camserve.evidence.record import Asked
from camserve.gateway.api import request_ids
from camserve.gateway.api.access import Rates, caller, party_of
from camserve.gateway.api.delivery import Delivery
from camserve.gateway.api.evidence import Evidence, Testimony
from camserve.gateway.api.reading import NO_MESSAGE, Reader
from camserve.gateway.api.status import Context, abort, message, public, status
from camserve.gateway.ops.metrics import UNKNOWN, Metrics, exemplar, method_label
from camserve.gateway.ops.settings import Settings
from camserve.gateway.ops.tracing import Attributes, Tracing
from camserve.gateway.pool.registry import Registry
from camserve.gateway.requests.explainer import Call, Explainer, OnProgress
from camserve.gateway.requests.memory import MESSAGE_COPIES, REPLY_COPIES, Memory
from camserve.gateway.requests.rendering import Encode
from camserve.types import Explanation, ModelInfo
from camserve.types.request import ExplainRequest

_log = logging.getLogger(__name__)
_access_log = logging.getLogger("camserve.access")
"""Logs one line for each explain call: who asked what, and what came of it; never an image, never a token."""

_DELIVERY_S = 10.0
"""Seconds that a client has to read a reply that was ready just before the deadline."""

Write = Callable[[bytes], Awaitable[None]]
"""Brings a serialized message to the client of a call."""

_TRANSIT_S = 0.1
"""Seconds by which a client's own cancellation may come before our deadline: its deadline counts from the sending."""

_FAULTS = (
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
)
"""Codes that make a server's span an error by OpenTelemetry's conventions; with others the client is at fault."""


def _unchanged(reply: bytes) -> bytes:
    return reply


@dataclass(frozen=True)
class Form:
    """Makes bytes of the replies of a door. Both functions are called in threads; by default a reply is bytes."""

    canonical: Callable[[Any], bytes] = _unchanged
    """Returns the bytes that the hash of a reply is taken of."""
    written: Callable[[Any, str], bytes] = lambda reply, evidence: bytes(reply)
    """Returns a reply, with its evidence record unless that is "", as its client reads it."""


@dataclass(frozen=True)
class Decoded:
    """The message of a call, as its door has decoded it."""

    request: ExplainRequest
    encode: Encode
    """Makes the reply, of which `form` makes bytes."""
    timeout_s: float | None = None
    """Seconds that the message allows, beside the deadline of the call; None: any."""
    check: Callable[[ModelInfo], None] = lambda model: None
    """Holds the reply against the model; raises InvalidInput where it is to have what the model does not give."""
    form: Form = Form()


@dataclass(frozen=True)
class Door:
    """Reads the messages of one API. Both functions are called in threads, for messages may be large."""

    decode: Callable[[bytes], Decoded]
    """Returns the message decoded; raises CamserveError where it is bad."""
    model_name: Callable[[bytes], str]
    """Returns the model that a refused message names, so that it is counted with that model; "" where it names none."""


@dataclass
class _Record:
    """The facts of one explain call that metrics, log and trace tell."""

    began_s: float
    delivery: Delivery
    model: str = UNKNOWN
    methods: tuple[str, ...] = (UNKNOWN,)
    priority: str = UNKNOWN
    code: grpc.StatusCode = grpc.StatusCode.OK
    error: str = ""
    explanation: Explanation | None = None
    complete: bool = True

    def labels(self) -> tuple[str, str, str, str]:
        """Returns the labels of `Metrics.request_seconds`."""
        return self.model, method_label(self.methods), self.priority, self.code.name

    def fields(self, seconds: float, caller: str) -> dict[str, Any]:
        """Returns the fields of the call in the log."""
        told: dict[str, Any] = {"model": self.model, "methods": list(self.methods), "class": self.priority}
        told |= {"caller": caller} if caller else {}
        told |= {"code": self.code.name, "seconds": round(seconds, 4)}
        if self.explanation is None or self.code is not grpc.StatusCode.OK:
            return told | ({"error": self.error} if self.error else {})
        cost = self.explanation.cost
        return told | {"queries": cost.queries, "cached": cost.cached, "complete": self.complete}

    def attributes(self) -> Attributes:
        """Returns the attributes of the span of the call."""
        return {
            "rpc.grpc.status_code": self.code.value[0],
            "camserve.request_id": request_ids.request_id(),
            "camserve.model": self.model,
            "camserve.methods": self.methods,
            "camserve.class": self.priority,
        }


class Calls:
    """Answers the explain calls of one gateway, and knows those that are live."""

    def __init__(
        self,
        registry: Registry,
        explainer: Explainer,
        settings: Settings,
        metrics: Metrics,
        tracing: Tracing,
        evidence: Evidence,
    ) -> None:
        self._registry = registry
        self._evidence = evidence
        self._settings = settings
        self._memory = Memory(settings.max_bytes_in_flight // 2)
        self._reader = Reader(settings.reads_at_once, settings.default_deadline_s)
        self._explainer = explainer
        self._metrics = metrics
        self._tracing = tracing
        self._live: dict[int, _Record] = {}
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._rates = Rates()
        self._opened = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ends: set[asyncio.Timeout] = set()
        self._over: CamserveError | None = None
        metrics.oldest_request_seconds.read = self._ages
        metrics.bytes_in_flight.read = lambda: {(): self._memory.held}

    @property
    def active(self) -> int:
        """Number of explain calls that are being answered."""
        return len(self._live)

    @property
    def undelivered(self) -> int:
        """Number of calls a message of which waits for its client to read."""
        return sum(record.delivery.stuck for record in self._live.values())

    async def idle(self) -> None:
        """Returns once no explain call is being answered, or told why it is not."""
        await self._idle.wait()

    def end(self, error: CamserveError) -> None:
        """Ends every live call with an error, and every call that comes later."""
        self._over = error
        for timeout in self._ends:
            timeout.reschedule(self._loop.time())

    async def explain(
        self,
        context: Context,
        door: Door,
        on_progress: Callable[[ExplainRequest, Write], OnProgress] | None = None,
    ) -> None:
        """Answers a call, from its message to the delivery of its reply; a failure ends it with its status.

        The order of the checks is that of their cost: the token was checked before this; then come rate, number of
        calls, size of the message, its shape and values, the model, and room for the work.

        Args:
            context: gRPC's context of the call, whose message has not been read.
            door: reads the message, and says how the reply is encoded. The request's class becomes the best that the
                caller may ask for, if it is better than that.
            on_progress: makes of the request, and of what writes to the client, what is awaited with its news; None:
                nobody wants news.
        """
        with self._open():
            try:
                # Whoever hears how a call has ended finds it counted: the status is sent behind this block.
                with self._recorded(context) as record:
                    await self._recording(record, context, door, on_progress)
            except Exception as error:
                await abort(context, error)

    async def _recording(
        self,
        record: _Record,
        context: Context,
        door: Door,
        on_progress: Callable[[ExplainRequest, Write], OnProgress] | None,
    ) -> None:
        """Answers a call, and records how it has ended; raises what its client is to be told."""
        try:
            await request_ids.tell(context)
            async with self._until_end():
                self._rates.check(caller(), self._loop.time())
                self._check_number()
                await self._answer(record, context, door, on_progress)
        except asyncio.CancelledError:
            record.code = cancellation(context)
            raise
        except Exception as error:
            self._failed(record, error)
            if record.delivery.stuck:  # no status would reach the client either
                record.delivery.drop()
                error.__traceback__ = error.__context__ = error.__cause__ = None  # they refer to the call
                raise asyncio.CancelledError from None
            raise

    @asynccontextmanager
    async def _until_end(self) -> AsyncIterator[None]:
        """Has `end` cut the block short, and raises its error then."""
        try:
            async with asyncio.timeout(None if self._over is None else 0) as timeout:
                self._ends.add(timeout)
                try:
                    yield
                finally:
                    self._ends.discard(timeout)
        except TimeoutError:
            if self._over is None or not timeout.expired():
                raise  # it is not ours
            raise self._over from None

    def _check_number(self) -> None:
        """Raises Overloaded where too many calls are being answered."""
        most = self._settings.max_calls
        if self.active > most:
            raise Overloaded(f"at most {most} calls are answered at once; try again later", reason="calls")

    async def _answer(
        self,
        record: _Record,
        context: Context,
        door: Door,
        on_progress: Callable[[ExplainRequest, Write], OnProgress] | None,
    ) -> None:
        """Reads the message of a call, and writes its news and its reply."""
        data = await self._reader.read(context)
        if data is None:
            raise InvalidInput(NO_MESSAGE)
        with self._memory.hold(MESSAGE_COPIES * len(data)) as held:
            party = party_of(context)
            decoded = await self._read(record, door, data, party)
            del data  # what is needed of it is in the request
            with self._counted(record.priority):
                timeout_s = _least(context.time_remaining(), decoded.timeout_s)
                news = None if on_progress is None else on_progress(decoded.request, record.delivery.write)
                noting, peer = _noting(record, decoded), context.peer()
                call = Call(noting, caller(), timeout_s, news, held.add, peer, came_s=record.began_s)
                if decoded.request.evidence or self._evidence.of_all:
                    reply = await self._testified(record, decoded, call)
                else:
                    reply = await self._explainer.explain(decoded.request, call)
                held.count(REPLY_COPIES * len(reply))
                await self._deliver(record, reply, timeout_s)

    async def _testified(self, record: _Record, decoded: Decoded, call: Call) -> bytes:
        """Returns the reply to a call of which a record is kept; the client gets the record if it has asked for it."""
        asked = Asked(request_ids.request_id(), caller().name, request_ids.rpc_method())
        testimony = Testimony(asked, _noted(record, decoded.encode), decoded.form.canonical)
        seen = replace(call, encode=testimony.encode, on_fitted=testimony.fits)
        reply = await self._explainer.explain(replace(decoded.request, evidence=True), seen)
        line = await self._evidence.kept(testimony, self._until_s(record, call.timeout_s))
        work = partial(decoded.form.written, reply, line if decoded.request.evidence else "")
        return await self._explainer.threads.run(call.owner.party, work)

    def _until_s(self, record: _Record, timeout_s: float | None) -> float:
        """Returns until when a reply that is made may be on its way, on the event loop's clock."""
        allowed_s = self._settings.default_deadline_s if timeout_s is None else timeout_s
        return max(record.began_s + allowed_s, self._loop.time() + min(allowed_s, _DELIVERY_S))

    async def _deliver(self, record: _Record, reply: bytes, timeout_s: float | None) -> None:
        """Returns once a reply has left; raises DeadlineExceeded where the client does not read it in time."""
        try:
            async with asyncio.timeout_at(self._until_s(record, timeout_s)):
                await record.delivery.write(reply)
        except TimeoutError:
            raise DeadlineExceeded("the reply was not read before the deadline") from None

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Has a stop wait as long as the block runs."""
        self._opened += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._opened -= 1
            if not self._opened:
                self._idle.set()

    @contextmanager
    def _recorded(self, context: Context) -> Iterator[_Record]:
        """Has the call live, with a span, as long as the block runs; counts and logs it afterwards."""
        record, number = _Record(self._loop.time(), Delivery(context)), next(self._numbers)
        self._live[number] = record
        try:
            with self._tracing.call(request_ids.rpc_method(), context.invocation_metadata() or ()) as tell:
                try:
                    yield record
                finally:
                    tell(record.attributes(), record.code in _FAULTS)
        finally:
            del self._live[number]
            self._ended(record, self._loop.time() - record.began_s)

    @contextmanager
    def _counted(self, priority: str) -> Iterator[None]:
        """Counts a request as in flight as long as the block runs."""
        in_flight = self._metrics.requests_in_flight.labels(priority)
        in_flight.inc()
        try:
            yield
        finally:
            in_flight.dec()

    async def _read(self, record: _Record, door: Door, data: bytes, party: str) -> Decoded:
        """Returns a message decoded, with the class capped, and records what is known of it.

        What the client may have made up is recorded as "unknown", so that labels are few.
        """
        async with self._in_time(record):
            try:
                decoded = await self._explainer.threads.run(party, partial(door.decode, data))
            except Exception:
                with suppress(CamserveError):
                    name = await self._explainer.threads.run(party, partial(door.model_name, data))
                    record.model = self._registry.get(name).name
                raise
        request = replace(decoded.request, priority=caller().capped(decoded.request.priority))
        record.methods = tuple(method.name for method in request.methods)
        record.priority = request.priority
        model = self._registry.get(request.model)
        record.model = model.name
        decoded.check(model.required())
        return replace(decoded, request=request)

    @asynccontextmanager
    async def _in_time(self, record: _Record) -> AsyncIterator[None]:
        """Raises DeadlineExceeded where the default deadline passes in the block, which may wait for a thread.

        gRPC itself ends a call whose own deadline is earlier.
        """
        allowed_s = self._settings.default_deadline_s
        try:
            async with asyncio.timeout_at(record.began_s + allowed_s) as timer:
                yield
        except TimeoutError:
            if not timer.expired():
                raise  # it is not ours
            raise DeadlineExceeded(f"the deadline of {allowed_s:g} s passed before the message was read") from None

    def _ended(self, record: _Record, seconds: float) -> None:
        """Records and logs a call that has ended."""
        shown = exemplar(request_ids.request_id())
        self._metrics.request_seconds.labels(*record.labels()).observe(seconds, shown)
        _access_log.info("explain", extra=record.fields(seconds, caller().name))

    def _failed(self, record: _Record, error: Exception) -> None:
        """Notes the error of a call, and counts it if it is a refusal."""
        shown = public(error)
        record.code, record.error = status(shown), message(shown)
        if isinstance(error, Overloaded) and error.reason:
            self._metrics.refusals.labels(record.model, error.reason).inc()

    def _ages(self) -> Mapping[tuple[str, ...], float]:
        """Returns the age of the oldest live call by model; called in the thread of a scrape."""
        now_s = self._loop.time()
        ages: dict[tuple[str, ...], float] = {(model.name,): 0.0 for model in self._registry.models}
        for record in list(self._live.values()):  # a copy, since the event loop goes on meanwhile
            ages[(record.model,)] = max(ages.get((record.model,), 0.0), now_s - record.began_s)
        return ages


def _noting(record: _Record, decoded: Decoded) -> Encode:
    """Returns an encoder that makes the bytes of a reply, and records what the log tells."""
    encode = _noted(record, decoded.encode)
    return lambda maps, finish: decoded.form.written(encode(maps, finish), "")


def _noted(record: _Record, encode: Encode) -> Encode:
    """Returns an encoder that also records what the log tells, and gives the explanation its request id."""

    def noting(maps: Any, finish: Callable[[], Explanation]) -> Any:
        def seen() -> Iterator[Any]:
            for saliency in maps:
                record.complete &= saliency.complete
                yield saliency

        def finished() -> Explanation:
            record.explanation = replace(finish(), request_id=request_id)
            return record.explanation

        return encode(seen(), finished)

    request_id = request_ids.request_id()  # read here, since the encoder runs in a thread that knows no call
    return noting


def _least(*seconds: float | None) -> float | None:
    """Returns the least of the times that are given; None where none is."""
    return min((each for each in seconds if each is not None), default=None)


def cancellation(context: Context) -> grpc.StatusCode:
    """Returns why gRPC ended the call: because of its deadline, or because of the client."""
    remaining_s = context.time_remaining()
    passed = remaining_s is not None and remaining_s <= _TRANSIT_S
    return grpc.StatusCode.DEADLINE_EXCEEDED if passed else grpc.StatusCode.CANCELLED
