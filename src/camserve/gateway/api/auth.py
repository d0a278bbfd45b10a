"""Lets in the calls that have a known token, and sets their caller for what handles them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from camserve.errors import Unauthenticated
from camserve.gateway.api.access import Caller, Token, identify, set_caller
from camserve.gateway.api.status import Context, abort
from camserve.gateway.ops.watched_files import Reloaded

OPEN = (
    "/grpc.health.v1.Health/",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
)
"""Beginnings of the methods that need no token: probes and load balancers have none."""

_SCHEME = "bearer "

_Handler = Any  # grpc.RpcMethodHandler has type parameters in its stubs alone
_Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]]


class TokenGuard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # its stubs have parameters, it has none
    """Asks every call for a bearer token, but for those of `OPEN`.

    Args:
        tokens: the tokens that are let in.
        on_refusal: called for each call that is refused.
    """

    def __init__(self, tokens: Reloaded[tuple[Token, ...]], on_refusal: Callable[[], None]) -> None:
        self._tokens = tokens
        self._on_refusal = on_refusal

    async def intercept_service(self, continuation: _Continuation, details: grpc.HandlerCallDetails) -> _Handler:
        """Returns the handler of the call, or one that refuses it."""
        if not details.method.startswith(OPEN):
            try:
                given = [str(value) for key, value in details.invocation_metadata if key == "authorization"]
                set_caller(caller_of(self._tokens, given, "metadata"))
            except Unauthenticated as error:
                self._on_refusal()
                return _refusal(error)
        return await continuation(details)


def caller_of(tokens: Reloaded[tuple[Token, ...]], given: Sequence[str], place: str) -> Caller:
    """Returns who makes a call.

    Args:
        tokens: the tokens that are let in.
        given: what the call has under "authorization".
        place: where that is: "metadata" or "header".

    Raises:
        Unauthenticated: there is no token, or not a known one.
    """
    if len(given) != 1 or not given[0].lower().startswith(_SCHEME):
        raise Unauthenticated(
            f"this server wants a bearer token: send the {place} `authorization: Bearer <secret>` once, "
            f"got {'another scheme' if given else 'none'}"
        )
    found = identify(tokens.get(), given[0][len(_SCHEME) :].strip())
    if found is None:
        raise Unauthenticated("the bearer token is not one of this server; it may have been withdrawn")
    return found


def _refusal(error: Unauthenticated) -> _Handler:
    """Returns a handler that ends the call with the error, whatever its kind, without reading any message."""

    async def refuse(requests: object, context: Context) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)
