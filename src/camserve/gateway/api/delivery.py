"""Brings the replies of one call to its client: a reply counts until it has left, and one that is not read is ended.

gRPC sends as fast as the client reads, by flow control, and keeps what is not sent yet. A client that does not read,
and has no deadline, would have it kept for ever.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from typing import Any, TypeVar

import grpc

from camserve.gateway.api.status import Context

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_WATCHER = "_schedule_rpc_coro"
"""Name of the coroutine by which grpc.aio waits for the end of a call; it keeps the call alive."""

_OPERATION = "ReceiveCloseOnServerOperation"
"""Type of what C-core notes the end of a call in; it must not be freed before that."""

_KEPT_S = 60.0
"""Seconds that such an operation is kept: C-core notes the end within milliseconds."""


class Delivery:
    """Writes the messages of one call, one after the other.

    Args:
        context: gRPC's context of the call, or what stands for one.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._is_grpc = type(context).__module__.startswith("grpc")
        self._writing: asyncio.Future[None] | None = None

    @property
    def stuck(self) -> bool:
        """Tells whether a message has not left yet; no status reaches the client before it has."""
        return self._writing is not None and not self._writing.done()

    async def write(self, data: bytes) -> None:
        """Returns once a message, and those before it, have left; a timeout ends the waiting and not the writing.

        Raises:
            CancelledError: the client has gone.
        """
        if self._writing is not None:
            await completed(self._writing)
        self._writing = asyncio.ensure_future(self._context.write(data))
        await completed(self._writing)

    def drop(self) -> None:
        """Has gRPC end the call and forget what has not left; the client sees CANCELLED.

        grpc.aio has no function for that: it ends a call that nobody refers to any more. So its own task that waits for
        the call's end is cancelled. Afterwards the caller has to end its task with CancelledError.
        """
        if self._writing is not None:
            self._writing.cancel()
        if not self._is_grpc:
            return  # an HTTP connection is closed when its handling ends without the rest of the response
        task = asyncio.current_task()
        for watcher in asyncio.all_tasks():
            if getattr(watcher.get_coro(), "__name__", "") == _WATCHER:
                variables = _variables(watcher.get_coro())
                kept = [each for each in variables if type(each).__name__ == _OPERATION]
                if kept and any(each is task for each in variables):
                    asyncio.get_running_loop().call_later(_KEPT_S, kept.clear)
                    watcher.cancel()
                    return
        _log.warning("gRPC's task of a call was not found: what its client does not read stays in memory")


async def completed(operation: asyncio.Future[_T]) -> _T:
    """Returns what a read or a write of gRPC returns; a timeout ends the waiting and not the operation.

    grpc.aio frees what a message is written to when an operation is cancelled, and C-core writes to it all the same.

    Raises:
        CancelledError: the call has ended; grpc.aio tells that by errors of its own, or by cancelling what answers it.
    """
    operation.add_done_callback(_heard)
    try:
        return await asyncio.shield(operation)
    except grpc.aio.BaseError:
        raise asyncio.CancelledError from None


def _heard(operation: asyncio.Future[Any]) -> None:
    """Hears the error of an operation that perhaps nobody waits for any more, lest asyncio logs that nobody did."""
    if not operation.cancelled():
        operation.exception()


def _variables(coroutine: Any) -> list[Any]:
    """Returns what the variables of a coroutine of Cython, and of those that it awaits, refer to."""
    found: list[Any] = []
    while coroutine is not None:
        found += gc.get_referents(*gc.get_referents(coroutine))
        coroutine = getattr(coroutine, "cr_await", None)
    return found
