"""Puts the gateway together: a gRPC server with security, health, reflection, metrics, and the watch over workers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from camserve import images
from camserve.addresses import is_loopback
from camserve.errors import InvalidOption, Unavailable
from camserve.evidence.log import EvidenceLog
from camserve.gateway.api import explanation, inference
from camserve.gateway.api.access import token_file
from camserve.gateway.api.auth import TokenGuard
from camserve.gateway.api.calls import Calls
from camserve.gateway.api.evidence import Evidence
from camserve.gateway.api.handlers import handlers
from camserve.gateway.api.reading import SmallMessages
from camserve.gateway.api.request_ids import RequestIds
from camserve.gateway.ops.descriptors import watch_descriptors
from camserve.gateway.ops.exposition import MetricsServer
from camserve.gateway.ops.malloc import give_memory_back
from camserve.gateway.ops.metrics import UNKNOWN, Metrics
from camserve.gateway.ops.settings import Settings
from camserve.gateway.ops.stalls import measure_stalls
from camserve.gateway.ops.tls import certificates, server_credentials
from camserve.gateway.ops.tracing import tracing
from camserve.gateway.pool.discovery import Pool
from camserve.gateway.pool.registry import Registry
from camserve.gateway.requests.explainer import Explainer

if TYPE_CHECKING:
    from camserve.gateway.web.server import WebServer

_log = logging.getLogger(__name__)

SERVICE = explanation.SERVICE.full_name
"""Service whose health is readiness: a worker is READY and answered a canary. That of "" is that of the process."""

SERVICES = (SERVICE, inference.SERVICE.full_name)
"""Services that explain; all of them have the same health."""

_AGE_GRACE_S = 3600.0
"""Seconds that a call on an aged connection has to end: more than any deadline that makes sense."""

LAST_WORDS_S = 1.0
"""Seconds in which calls that were answered, or are ended by a stop, have to tell their clients so."""

_SMALL_READS = 2
"""Number of messages of one service without images that are read at once."""

_STREAMS = 1024
"""Number of Health.Watch calls at once, and of calls of reflection; a client has a sixteenth."""

_BOUNDS = (
    ("grpc.max_concurrent_streams", 256),  # of one connection; a client's further calls wait in the client
    ("grpc.http2.bdp_probe", 0),  # what is read ahead of a call stays at 64 KiB; once it is read, the window is wide
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: what inflates would be measured afterwards only
)

KEEPALIVE = (
    # A peer that has vanished without a word is found within 80 s, and its calls end.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Clients may ask whether we live every 5 s, also while they wait for an answer, and without any call.
    ("grpc.http2.min_ping_interval_without_data_ms", 4_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 4_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
"""Options of the server that keep connections alive, and find those that are dead."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Gateway:
    """Serves as long as an `async with` block runs, or from `start` to `stop`.

    Args:
        settings: addresses and bounds.
        backends: the pool of TorchServes; closed by `stop`.

    Attributes:
        address: "host:port" of the gRPC server, after `start`.
        metrics_address: "host:port" of the metrics, after `start`; "" where they are off.
    """

    def __init__(self, settings: Settings, backends: Pool) -> None:
        self.address = ""
        self.metrics_address = ""
        self.web_address = ""
        self._settings = settings
        self._backends = backends
        self._ending: asyncio.Task[None] | None = None
        self._time_is_up = asyncio.Event()

    async def __aenter__(self) -> Gateway:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def registry(self) -> Registry:
        """Registry of the models and their state."""
        return self._registry

    @property
    def drain_s(self) -> float:
        """Seconds that running requests have to finish after `stop`."""
        return self._settings.drain_s

    async def start(self) -> None:
        """Opens both ports and begins to watch the workers; does not wait for them.

        Raises:
            InvalidOption: a port is taken, an address is not of this machine, or certificates or tokens are bad.
        """
        give_memory_back()
        images.silence_libtiff()
        self.metrics = Metrics()
        self._tracing = tracing(self._settings.tracing)
        self._certificates = certificates(self._settings)
        self._tokens = None if self._settings.tokens is None else token_file(self._settings.tokens)
        self._ready = asyncio.Event()
        self._changed = asyncio.Event()
        self._registry = Registry(self._backends, self._settings, self.metrics, self._tracing, self._changed.set)
        self.explainer = Explainer(self._registry, self._settings, self.metrics)
        self._evidence_log = None
        if self._settings.evidence_log is not None:
            self._evidence_log = EvidenceLog(self._settings.evidence_log, self._settings.evidence_log_bytes)
        evidence = Evidence(self._evidence_log, self.metrics)
        self.calls = Calls(self._registry, self.explainer, self._settings, self.metrics, self._tracing, evidence)
        self._typed = explanation.ExplanationService(self._registry, self.calls, self._settings.request_limits())
        self._inference = inference.InferenceService(self._registry, self.calls, self._settings.request_limits())
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its stubs are older
        self._server = self._grpc_server()
        host = self._settings.listen.rpartition(":")[0]
        self.address = f"{host}:{self._bound()}"
        metrics_listen = self._settings.metrics_listen
        self._metrics_server = None if metrics_listen == "off" else MetricsServer(self.metrics.registry, metrics_listen)
        self.metrics_address = self._metrics_server.address if self._metrics_server else ""
        self._web = self._web_server()
        self.web_address = self._web.address if self._web else ""
        await self._health.set("", _SERVING)
        await self._set_health(_NOT_SERVING)
        await self._server.start()
        if self._web is not None:
            self._web.start()
        self._health_task = asyncio.create_task(self._keep_health(), name="camserve health")
        self._files_task = asyncio.create_task(watch_descriptors(self._settings.poll_s), name="camserve files")
        self._stalls_task = asyncio.create_task(measure_stalls(self.metrics), name="camserve stalls")
        self._registry.start()
        how = "TLS" if self._certificates else "plain text"
        if self._tokens and not self._certificates and not is_loopback(self._settings.listen):
            _log.warning("tokens come in plain text on %s: whoever reads along can use them", self.address)
        _log.info("gRPC on %s (%s), metrics on %s", self.address, how, self.metrics_address or "no port")
        if self.web_address:
            _log.info("HTTP on %s (%s)", self.web_address, how)

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns once a model answers.

        Raises:
            Unavailable: no model answered within `timeout_s` seconds.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            raise Unavailable(f"no model became ready within {timeout_s:g} s") from None

    async def stop(self, grace_s: float | None = None) -> None:
        """Sets NOT_SERVING, lets running requests finish for `grace_s` seconds (default: `drain_s`), ends the rest.

        A second stop waits for the same end; with a shorter grace it makes that come sooner.
        """
        grace_s = self._settings.drain_s if grace_s is None else grace_s
        asyncio.get_running_loop().call_later(grace_s, self._time_is_up.set)
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(), name="camserve stop")
        await asyncio.shield(self._ending)  # who is no longer interested does not stop the others' stop

    async def _end(self) -> None:
        """Lets running requests finish until time is up, then ends everything in order."""
        await _ended(self._health_task)
        await _ended(self._files_task)
        await _ended(self._stalls_task)
        await self._health.enter_graceful_shutdown()
        # New calls are refused from here on, while the running ones finish.
        if self._web is not None:
            self._web.drain()
        refusing = asyncio.create_task(self._server.stop(_AGE_GRACE_S), name="camserve drain")
        await _first(self.calls.idle(), self._time_is_up.wait())
        self.calls.end(Unavailable("the server is shutting down"))
        # A call is over only when gRPC has sent its status: what is not sent yet would be lost with the next stop.
        telling = asyncio.create_task(self.calls.idle())
        await asyncio.wait({telling, refusing}, timeout=LAST_WORDS_S)
        await _ended(telling)
        if self._web is not None:
            await self._web.stop()
        await self._server.stop(None)  # also ends health watchers, which would hold the drain up to its end
        await refusing
        await self._registry.close()
        self.explainer.close()
        if self._evidence_log is not None:
            await asyncio.to_thread(self._evidence_log.close)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.stop)
        await asyncio.to_thread(self._tracing.close)

    def _grpc_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=self._interceptors(),
            options=[
                ("grpc.max_receive_message_length", self._settings.max_request_bytes),
                ("grpc.max_send_message_length", 2 * self._settings.max_message_bytes),  # maps, and all around them
                ("grpc.so_reuseport", 0),  # a taken port is an error, not a second server behind it
                *_BOUNDS,
                *KEEPALIVE,
                *_age_options(self._settings.max_connection_age_s),
            ],
        )
        server.add_generic_rpc_handlers(
            (
                handlers(explanation.SERVICE, self._typed, explanation.RAW),
                handlers(inference.SERVICE, self._inference, inference.RAW),
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._settings.reflection:
            reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    def _web_server(self) -> WebServer | None:
        """Returns the HTTP door, bound and not answering yet; None where it is off."""
        if self._settings.web_listen == "off":
            return None
        try:
            from camserve.gateway.web.app import Web
            from camserve.gateway.web.server import WebServer
        except ImportError as error:
            raise InvalidOption(f"the HTTP door needs the extra web, pip install 'camserve[web]' ({error})") from None
        settings = self._settings
        refused = self.metrics.refusals.labels(UNKNOWN, "unauthenticated").inc
        limits, size = settings.request_limits(), settings.max_request_bytes
        web = Web(self._registry, self.calls, self._typed, self._inference, limits, size, self._tokens, refused)
        tls = (settings.tls_cert, settings.tls_key, settings.tls_client_ca)
        return WebServer(web, settings.web_listen, tls if settings.tls_cert else None)  # type: ignore[arg-type]  # both or none

    def _interceptors(self) -> list[RequestIds | TokenGuard | SmallMessages]:
        small = SmallMessages(_SMALL_READS, _STREAMS, self._settings.default_deadline_s)
        if self._tokens is None:
            return [RequestIds(), small]
        refused = self.metrics.refusals.labels(UNKNOWN, "unauthenticated").inc
        return [RequestIds(), TokenGuard(self._tokens, refused), small]

    def _bound(self) -> int:
        """Opens the port, with TLS if there are certificates; returns its number."""
        address = self._settings.listen
        try:
            if self._certificates is None:
                return self._server.add_insecure_port(address)
            files = self._certificates
            self.metrics.certificate_expiry.read = lambda: {(): files.get().expires_unix_s}
            return self._server.add_secure_port(address, server_credentials(files))
        except RuntimeError as error:
            text = f"cannot listen on {address}: the port is taken, or the address is not here ({error})"
            raise InvalidOption(text) from None

    async def _set_health(self, status: int) -> None:
        for service in SERVICES:
            await self._health.set(service, status)

    async def _keep_health(self) -> None:
        """Keeps the health of the services at SERVING while at least one model is ready."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            ready = any(model.ready for model in self._registry.models)
            await self._set_health(_SERVING if ready else _NOT_SERVING)
            if ready:
                self._ready.set()
            else:
                self._ready.clear()


def _age_options(age_s: float) -> list[tuple[str, int]]:
    """Returns options by which an aged connection takes no new calls: its client connects anew, perhaps elsewhere."""
    if not age_s:
        return []
    grace_ms, age_ms = round(1000 * _AGE_GRACE_S), max(1, round(1000 * age_s))
    return [("grpc.max_connection_age_ms", age_ms), ("grpc.max_connection_age_grace_ms", grace_ms)]


async def _first(*works: Coroutine[Any, Any, object]) -> None:
    """Returns once one of the works is done; the others are cancelled."""
    tasks = [asyncio.create_task(work) for work in works]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        await _ended(task)


async def _ended(task: asyncio.Task[Any]) -> None:
    """Cancels a task and waits for its end."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
