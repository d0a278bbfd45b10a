"""What every explain call has in common, whichever API it came by: counted, measured, and ended with a typed status."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, NoReturn

import grpc

from camserve.errors import CamserveError
from camserve.gateway.convert import public, status, trailing_metadata
from camserve.gateway.explainer import Explainer, OnProgress
from camserve.gateway.metrics import UNKNOWN, Metrics, method_label
from camserve.gateway.watch import Catalogue
from camserve.v1 import explain_pb2 as pb

_log = logging.getLogger(__name__)

_TRANSIT_S = 0.1
"""A client's deadline counts from its sending, ours from the arrival: its own cancellation comes that much earlier."""

Context = grpc.aio.ServicerContext[Any, Any]


class Calls:
    """The explain calls of one gateway."""

    def __init__(self, catalogue: Catalogue, explainer: Explainer, metrics: Metrics) -> None:
        self._catalogue = catalogue
        self._explainer = explainer
        self._metrics = metrics
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Returns once no explain call is being answered."""
        await self._idle.wait()

    async def explain(
        self, request: pb.ExplainRequest, context: Context, on_progress: OnProgress | None = None
    ) -> pb.ExplainReply:
        """The reply; a failure ends the call with its status."""
        began_s = asyncio.get_running_loop().time()
        code = grpc.StatusCode.OK
        self._enter()
        try:
            return await self._explainer.explain(request, context.time_remaining(), on_progress)
        except asyncio.CancelledError:
            code = cancellation(context)
            raise
        except Exception as error:
            code = status(public(error))
            await abort(context, error)
        finally:
            self._leave()
            seconds = asyncio.get_running_loop().time() - began_s
            self._metrics.request_seconds.labels(*self._labels(request), code.name).observe(seconds)

    def _enter(self) -> None:
        self._active += 1
        self._metrics.in_flight.set(self._active)
        self._idle.clear()

    def _leave(self) -> None:
        self._active -= 1
        self._metrics.in_flight.set(self._active)
        if not self._active:
            self._idle.set()

    def _labels(self, request: pb.ExplainRequest) -> tuple[str, str]:
        """Model and method; whatever the client made up is "unknown", so that labels stay few."""
        names = [method.WhichOneof("method") or UNKNOWN for method in request.methods]
        try:
            model = self._catalogue.get(request.model).name
        except CamserveError:
            model = UNKNOWN
        return model, method_label(names or ["grad_cam"])


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
    await context.abort(status(shown), str(shown), trailing_metadata(shown))
