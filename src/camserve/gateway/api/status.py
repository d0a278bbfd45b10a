"""Turns our errors into gRPC statuses, by one table."""

from __future__ import annotations

import logging
from typing import Any, NoReturn
from urllib.parse import quote

import grpc
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from camserve import errors
from camserve.errors import INTERNAL_MESSAGE, CamserveError, Internal, Overloaded
from camserve.gateway.api import request_ids

_log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

ERROR_KEY = "camserve-error"
"""Key in the trailing metadata: the name of the class in `camserve.errors`, so that a client can raise the same."""

RETRY_KEY = "grpc-retry-pushback-ms"
"""Key in the trailing metadata: milliseconds until gRPC's own retry policy tries again (gRFC A6)."""

DETAILS_KEY = "grpc-status-details-bin"
"""Key in the trailing metadata: a google.rpc.Status, gRPC's rich error model."""

_MESSAGE_BYTES = 2048

RETRY_S = 1.0
"""Seconds until another try, where nobody can say when there will be room."""

STATUS: dict[type[CamserveError], grpc.StatusCode] = {
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Unsupported: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Internal: grpc.StatusCode.INTERNAL,
}


def status(error: CamserveError) -> grpc.StatusCode:
    """Returns the status of the error's class, or of its nearest ancestor in the table."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return grpc.StatusCode.INTERNAL


def trailing_metadata(error: CamserveError) -> tuple[tuple[str, str | bytes], ...]:
    """Returns the class of an error and, for overload, when to try again: for gRPC's own retries, and as RetryInfo."""
    kind = ((ERROR_KEY, type(error).__name__),)
    if not isinstance(error, Overloaded):
        return kind
    retry_s = RETRY_S if error.retry_after_s is None else max(error.retry_after_s, 0.001)
    return *kind, (RETRY_KEY, str(round(1000 * retry_s))), (DETAILS_KEY, _details(error, retry_s))


def _details(error: Overloaded, retry_s: float) -> bytes:
    """Returns a serialized google.rpc.Status with RetryInfo."""
    found = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message=message(error))
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(round(1e9 * retry_s))
    found.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return bytes(found.SerializeToString())


def message(error: CamserveError) -> str:
    """Returns the text of an error as a status carries it: at most `_MESSAGE_BYTES` as HTTP/2 writes it.

    Clients refuse a status whose metadata are larger than their bound, often 8 KiB, and then show that instead.
    """
    text = str(error)
    while (size := len(quote(text))) > _MESSAGE_BYTES:  # a character takes up to twelve bytes
        text = text[: (len(text) * _MESSAGE_BYTES // size) - 3] + "..."
    return text


def public(error: BaseException) -> CamserveError:
    """Returns what a client may see: a typed error unchanged, anything else as a fixed sentence."""
    typed = isinstance(error, CamserveError) and not isinstance(error, Internal)
    return error if typed else Internal(INTERNAL_MESSAGE)  # type: ignore[return-value]  # mypy loses the isinstance


async def abort(context: Context, error: Exception) -> NoReturn:
    """Ends the call with the error's status; never returns. An error without a type is logged and not shown."""
    if not isinstance(error, CamserveError):
        _log.error("a request failed", exc_info=error)
    # What the failed functions held, the message first of all, goes now, and not when the client has read the status.
    error.__traceback__ = error.__context__ = error.__cause__ = None
    shown = public(error)
    await context.abort(
        status(shown), message(shown), (*trailing_metadata(shown), (request_ids.KEY, request_ids.request_id()))
    )
