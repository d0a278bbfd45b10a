"""Serves a registry of metrics to Prometheus: as text, or as OpenMetrics (with exemplars) where that is asked for.

A connection has a thread as long as it is open, and there are few of both: where there is no room, the connection that
has been open for longest is cut. So a scrape is answered at once, however many others send half a request, or read
nothing of the answer.
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from contextlib import suppress
from socketserver import BaseServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from camserve.addresses import bound_socket

CONNECTIONS = 16
"""Most connections, and threads, at a time."""

EXCHANGE_S = 10.0
"""Seconds after which a connection is cut, however far its request or its answer is."""

_log = logging.getLogger(__name__)

_POLL_S = 0.05
"""Seconds between two looks for connections that are too old, and that a stop takes at most."""


class MetricsServer:
    """Serves one registry over HTTP in threads of its own.

    Args:
        registry: the metrics.
        address: "host:port" to listen on; port 0: chosen by the OS.
        exchange_s: seconds after which a connection is cut.

    Attributes:
        address: "host:port" on which it listens.

    Raises:
        InvalidOption: the port is taken, or the address is not of this machine.
    """

    def __init__(self, registry: CollectorRegistry, address: str, exchange_s: float = EXCHANGE_S) -> None:
        self._server = _Server(bound_socket(address), exchange_s)
        self._server.set_app(make_wsgi_app(registry))
        self.address = f"{address.rpartition(':')[0]}:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": _POLL_S}, name="metrics", daemon=True
        )
        self._thread.start()

    @property
    def connections(self) -> int:
        """Number of connections that are open, each with a thread."""
        return self._server.connections

    def stop(self) -> None:
        """Closes the port and waits for the thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128  # a burst of connections does not keep a scrape from coming through

    def __init__(self, bound: socket.socket, exchange_s: float) -> None:
        BaseServer.__init__(self, bound.getsockname(), _QuietHandler)
        self.socket = bound
        # Set here, since `server_bind` would ask a name server for the name of the address.
        self.server_name, self.server_port = bound.getsockname()[:2]
        self.setup_environ()
        self._exchange_s = exchange_s
        self._slots = threading.BoundedSemaphore(CONNECTIONS)
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}
        """Times at which the open connections came, the first one first."""
        self.server_activate()

    @property
    def connections(self) -> int:
        return len(self._open)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(_POLL_S)  # the connection stays there to be taken: asking again at once would be a busy loop
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        wait_s = 0.0
        while not self._slots.acquire(timeout=wait_s):
            self._cut(1)
            wait_s = _POLL_S
        with self._lock:
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            was_open = self._open.pop(request, None) is not None
        super().shutdown_request(request)
        if was_open:
            self._slots.release()

    def service_actions(self) -> None:
        late_s = time.monotonic() - self._exchange_s
        self._cut(sum(came_s < late_s for came_s in list(self._open.values())))

    def server_close(self) -> None:
        super().server_close()
        self._cut(CONNECTIONS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a scrape was not answered", exc_info=True)  # socketserver would write to stderr

    def _cut(self, connections: int) -> None:
        """Cuts the eldest connections; their threads then end by themselves."""
        with self._lock:
            eldest = list(self._open)[:connections]
            for request in eldest:
                with suppress(OSError):  # it is gone already
                    request.shutdown(socket.SHUT_RDWR)


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name in the base class
        pass
