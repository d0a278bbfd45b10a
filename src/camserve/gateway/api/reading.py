"""Reads the messages of clients: few at once, and nobody's before the call itself is let in.

gRPC's usual handlers of unary calls read the message before anything else may look at the call, of all calls at once.
So each method of the server is registered as one that streams, which is the same on the wire: it asks for its message
when the call's token and rate are known and there is a place for it. Until then a few kB have come, by flow control.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from camserve.errors import CamserveError, DeadlineExceeded, InvalidInput, Overloaded
from camserve.gateway.api.access import party_of
from camserve.gateway.api.delivery import completed
from camserve.gateway.api.status import Context, abort
from camserve.gateway.requests.turns import Turns

PATIENCE_S = 5.0
"""Seconds that a message may take to arrive while others wait for the place of its reader."""

SMALL_BYTES = 16 * 2**10
"""Largest message of a method that takes no image: names, in all of them."""

NO_MESSAGE = "the call has no message, or a larger one than this server takes"

_Handler = Any  # grpc.RpcMethodHandler has type parameters in its stubs alone
_Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]]


@dataclass(eq=False)
class _Read:
    """One message that is being read."""

    began_s: float
    timer: asyncio.Timeout


class Reader:
    """Reads a bounded number of messages at once, since each may be large; those who wait are served in turn.

    A party has at most half of the places. A message that does not come holds its place for `PATIENCE_S` at most while
    somebody waits.

    Args:
        places: number of messages that are read at once.
        timeout_s: seconds that a message may take to arrive at all.
    """

    def __init__(self, places: int, timeout_s: float) -> None:
        self._turns = Turns(places, max(1, places // 2), self._hurry)
        self._timeout_s = timeout_s
        self._reading: list[_Read] = []

    async def read(self, context: Context) -> bytes | None:
        """Returns the next message of a call; None where there is none, or it is larger than the server takes.

        Raises:
            Overloaded: it did not come while others waited for the place.
            DeadlineExceeded: it did not come at all.
        """
        party = party_of(context)
        await self._turns.take(party)
        began_s = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(began_s + self._timeout_s) as timer:
                read = _Read(began_s, timer)
                self._reading.append(read)
                try:
                    self._hurry()
                    data = await completed(asyncio.ensure_future(context.read()))
                finally:
                    self._reading.remove(read)
        except TimeoutError:
            if asyncio.get_running_loop().time() - began_s < self._timeout_s:
                text = f"the message did not come within {PATIENCE_S:g} s while others waited; try again later"
                raise Overloaded(text, reason="reading") from None
            raise DeadlineExceeded(f"the message did not come within {self._timeout_s:g} s") from None
        finally:
            self._turns.give_back(party)
        return None if data is grpc.aio.EOF else bytes(data)  # type: ignore[attr-defined]  # its stubs have no EOF

    def _hurry(self) -> None:
        """Sets an end to what is being read for long, if somebody waits and no place is free."""
        if not self._turns.crowded:
            return
        for read in self._reading:
            end_s = read.began_s + PATIENCE_S
            if end_s < (read.timer.when() or 0.0) and not read.timer.expired():
                read.timer.reschedule(end_s)


class SmallMessages(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # its stubs have parameters, it has none
    """Reads the messages of all methods but those that take images: bounds their size, and how many streams there are.

    Each service has its own places, so that one whose clients stall leaves the others alone.

    Args:
        places: number of messages of one service that are read at once.
        streams: number of calls of one service whose replies are streams, of which a party has a sixteenth.
        timeout_s: seconds that a message may take to arrive.
    """

    def __init__(self, places: int, streams: int, timeout_s: float) -> None:
        self._make = partial(Reader, places, timeout_s)
        self._readers: dict[str, Reader] = {}
        self._streams: dict[str, Counter[str]] = {}
        self._most = streams

    async def intercept_service(self, continuation: _Continuation, details: grpc.HandlerCallDetails) -> _Handler:
        """Returns a handler that reads the message itself; that of an explain call does so already."""
        handler = await continuation(details)
        if handler is None or handler.request_deserializer is None:
            return handler
        service = details.method.rpartition("/")[0]
        if service not in self._readers:
            self._readers[service], self._streams[service] = self._make(), Counter()
        return _reading(handler, self._readers[service], partial(self._streaming, self._streams[service]))

    @contextmanager
    def _streaming(self, open_: Counter[str], context: Context) -> Iterator[None]:
        """Counts a call whose replies are a stream as long as the block runs."""
        party = party_of(context)
        if open_.total() >= self._most or open_[party] >= max(1, self._most // 16):
            raise Overloaded("too many streams of this service are open; close some, or try again later")
        open_[party] += 1
        try:
            yield
        finally:
            open_ -= Counter((party,))


def _reading(
    handler: _Handler, reader: Reader, streaming: Callable[[Context], AbstractContextManager[None]]
) -> _Handler:
    """Returns a handler that is the same for clients, and reads messages by a reader."""

    async def messages(context: Context) -> AsyncIterator[Any]:
        while (data := await reader.read(context)) is not None:
            yield _small(data, handler.request_deserializer)

    async def answer(requests: AsyncIterator[bytes], context: Context) -> None:
        try:
            if handler.unary_unary is not None:
                request = await anext(messages(context), None)
                await context.write(await handler.unary_unary(_sent(request), context))
                return
            with streaming(context):
                if handler.stream_stream is not None:
                    replies = handler.stream_stream(messages(context), context)
                else:
                    replies = handler.unary_stream(_sent(await anext(messages(context), None)), context)
                if not inspect.isasyncgen(replies):
                    await replies  # it writes by itself
                    return
                async for reply in replies:
                    await context.write(reply)
        except CamserveError as error:
            await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(answer, None, handler.response_serializer)


def _sent(request: Any) -> Any:
    if request is None:
        raise InvalidInput(NO_MESSAGE)
    return request


def _small(data: bytes, deserializer: Callable[[bytes], Any]) -> Any:
    """Returns a message read; raises InvalidInput where it is large, or none."""
    if len(data) > SMALL_BYTES:
        raise InvalidInput(f"a request of this method has at most {SMALL_BYTES} bytes, got {len(data)}")
    try:
        return deserializer(data)
    except DecodeError:
        raise InvalidInput("the message is none of this method") from None
