"""Gives every call an id, and says which call is being answered.

Logs, exemplars, spans and the metadata of the reply carry the id.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc
from structlog.contextvars import bind_contextvars

KEY = "x-request-id"
"""Key of the id in the metadata of a call: the client may send it; the answer always has it."""

_ALLOWED = re.compile(r"[!-~]{1,128}")  # printable ASCII without the space
_current: ContextVar[str] = ContextVar("camserve_request_id", default="")
_method: ContextVar[str] = ContextVar("camserve_rpc_method", default="")

_Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


def request_id() -> str:
    """Returns the id of the call that this runs in; "" outside of calls."""
    return _current.get()


def rpc_method() -> str:
    """Returns the "package.Service/Method" of the call that this runs in; "" outside of calls."""
    return _method.get()


class RequestIds(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # its stubs have parameters, it has none
    """Gives every call its id: the client's own, or a new one. Must be the first of the interceptors."""

    async def intercept_service(self, continuation: _Continuation, details: grpc.HandlerCallDetails) -> Any:
        """Sets the id of a call, and returns its handler."""
        sent = [value for key, value in details.invocation_metadata if key == KEY]
        begin(sent[0] if sent else None, details.method.lstrip("/"))
        return await continuation(details)


def begin(sent: str | bytes | None, method: str) -> None:
    """Gives the call that this task answers its id; to be called once, in the task that answers it.

    Args:
        sent: id that the client sent, if it did.
        method: "package.Service/Method" of the call.
    """
    chosen = chosen_id(sent)
    _current.set(chosen)
    _method.set(method)
    bind_contextvars(request_id=chosen)


async def tell(context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Sends the id to the client at once, whatever becomes of the call."""
    await context.send_initial_metadata(((KEY, request_id()),))


def chosen_id(sent: str | bytes | None) -> str:
    """Returns what the client sent, if it is 1..128 printable ASCII characters without spaces, else a new id."""
    fits = isinstance(sent, str) and _ALLOWED.fullmatch(sent)
    return str(sent) if fits else uuid.uuid4().hex
