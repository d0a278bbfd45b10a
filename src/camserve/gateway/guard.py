"""Lets in who has a token, and says so to whoever handles the call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from camserve.errors import Unauthenticated
from camserve.gateway.access import Caller, set_caller
from camserve.gateway.calls import Context, abort
from camserve.gateway.reloaded import Reloaded
from camserve.gateway.tokens import Token, identify

OPEN = (
    "/grpc.health.v1.Health/",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
)
"""What needs no token: probes and load balancers have none."""

_SCHEME = "bearer "

_Handler = Any  # grpc.RpcMethodHandler takes no parameters when it runs
_Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]]


class TokenGuard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # a class without arguments when it runs
    """Asks every call for a bearer token, but for those of `OPEN`.

    Args:
        tokens: who is let in.
        on_refusal: called for each call that is not.
    """

    def __init__(self, tokens: Reloaded[tuple[Token, ...]], on_refusal: Callable[[], None]) -> None:
        self._tokens = tokens
        self._on_refusal = on_refusal

    async def intercept_service(self, continuation: _Continuation, details: grpc.HandlerCallDetails) -> _Handler:
        """The handler of the call, or one that refuses it."""
        if not details.method.startswith(OPEN):
            try:
                set_caller(self._caller(details.invocation_metadata))
            except Unauthenticated as error:
                self._on_refusal()
                return _refusal(error)
        return await continuation(details)

    def _caller(self, metadata: Sequence[tuple[str, str | bytes]]) -> Caller:
        """Raises Unauthenticated when there is no token, or none that is known."""
        given = [str(value) for key, value in metadata if key == "authorization"]
        if len(given) != 1 or not given[0].lower().startswith(_SCHEME):
            raise Unauthenticated(
                "this server wants a bearer token: send the metadata `authorization: Bearer <secret>` once, "
                f"got {'another scheme' if given else 'none'}"
            )
        found = identify(self._tokens.get(), given[0][len(_SCHEME) :].strip())
        if found is None:
            raise Unauthenticated("the bearer token is not one of this server; it may have been withdrawn")
        return found


def _refusal(error: Unauthenticated) -> _Handler:
    async def refuse(request: bytes, context: Context) -> None:
        await abort(context, error)

    return grpc.unary_unary_rpc_method_handler(refuse)
