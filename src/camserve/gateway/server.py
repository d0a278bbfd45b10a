"""The gateway as a whole: gRPC server, health, reflection, metrics and the watch over the workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from types import TracebackType

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from camserve.errors import InvalidOption, Unavailable
from camserve.gateway.calls import Calls
from camserve.gateway.explainer import Explainer
from camserve.gateway.metrics import Metrics, MetricsServer
from camserve.gateway.places import Places
from camserve.gateway.service import ExplanationService
from camserve.gateway.settings import Settings
from camserve.gateway.watch import Catalogue
from camserve.v1 import explain_pb2, explain_pb2_grpc

_log = logging.getLogger(__name__)

SERVICE = explain_pb2.DESCRIPTOR.services_by_name["ExplanationService"].full_name
"""Its health is readiness: a worker is READY and answered a canary. That of "" says that the process lives."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Gateway:
    """Serves from `async with` on, or from `start` to `stop`.

    Args:
        settings: addresses and bounds.
        places: the workers; closed by `stop`.

    Attributes:
        address: "host:port" of the gRPC server, after `start`.
        metrics_address: "host:port" of the metrics, after `start`.
    """

    def __init__(self, settings: Settings, places: Places) -> None:
        self.address = ""
        self.metrics_address = ""
        self._settings = settings
        self._places = places
        self._stopping = False

    async def __aenter__(self) -> Gateway:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def catalogue(self) -> Catalogue:
        """The models and their state."""
        return self._catalogue

    @property
    def drain_s(self) -> float:
        """How long running requests have to finish after `stop`."""
        return self._settings.drain_s

    async def start(self) -> None:
        """Opens both ports and begins to watch the workers; does not wait for them.

        Raises:
            InvalidOption: a port is taken or an address is not of this machine.
        """
        self.metrics = Metrics()
        self._ready = asyncio.Event()
        self._changed = asyncio.Event()
        self._catalogue = Catalogue(self._places, self._settings, self.metrics, self._changed.set)
        self._explainer = Explainer(self._catalogue, self._settings, self.metrics)
        self._calls = Calls(self._catalogue, self._explainer, self.metrics)
        self._service = ExplanationService(self._catalogue, self._calls)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its stubs are older
        self._server = self._grpc_server()
        host = self._settings.listen.rpartition(":")[0]
        self.address = f"{host}:{_bound(self._server, self._settings.listen)}"
        self._metrics_server = _metrics_server(self.metrics, self._settings.metrics_listen)
        self.metrics_address = self._metrics_server.address
        await self._health.set("", _SERVING)
        await self._health.set(SERVICE, _NOT_SERVING)
        await self._server.start()
        self._health_task = asyncio.create_task(self._keep_health(), name="camserve health")
        self._catalogue.start()
        _log.info("gRPC on %s, metrics on %s", self.address, self.metrics_address)

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns once a model answers.

        Raises:
            Unavailable: none did within `timeout_s` seconds.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            raise Unavailable(f"no model became ready within {timeout_s:g} s") from None

    async def stop(self, grace_s: float | None = None) -> None:
        """Says NOT_SERVING, lets running requests finish for `grace_s` seconds (default: `drain_s`), ends the rest."""
        if self._stopping:
            return
        self._stopping = True
        grace_s = self._settings.drain_s if grace_s is None else grace_s
        await _ended(self._health_task)
        await self._health.enter_graceful_shutdown()
        refusing = asyncio.create_task(self._server.stop(grace_s), name="camserve drain")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._calls.idle(), grace_s)
        await self._server.stop(None)  # also ends health watchers, which would hold the drain up to its end
        await refusing
        await self._catalogue.close()
        self._explainer.close()
        await asyncio.to_thread(self._metrics_server.stop)

    def _grpc_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._settings.max_message_bytes),
                ("grpc.max_send_message_length", 2 * self._settings.max_message_bytes),  # maps, and all around them
                ("grpc.so_reuseport", 0),  # a taken port is an error, not a second server behind it
            ]
        )
        explain_pb2_grpc.add_ExplanationServiceServicer_to_server(self._service, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    async def _keep_health(self) -> None:
        """Health follows the models: SERVING while at least one of them is ready."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            ready = any(model.ready for model in self._catalogue.models)
            await self._health.set(SERVICE, _SERVING if ready else _NOT_SERVING)
            if ready:
                self._ready.set()
            else:
                self._ready.clear()


def _bound(server: grpc.aio.Server, address: str) -> int:
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise InvalidOption(
            f"cannot listen on {address}: the port is taken, or the address is not here ({error})"
        ) from None


def _metrics_server(metrics: Metrics, address: str) -> MetricsServer:
    host, _, port = address.rpartition(":")
    try:
        return MetricsServer(metrics.registry, host, int(port))
    except OSError as error:
        raise InvalidOption(f"cannot serve metrics on {address}: {error}") from None


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
