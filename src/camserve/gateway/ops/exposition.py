"""Serves a registry of metrics to Prometheus: as text, or as OpenMetrics (with exemplars) where that is asked for."""

from __future__ import annotations

import threading
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app


class MetricsServer:
    """Serves one registry over HTTP in a thread of its own."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        self._server = make_server(host.strip("[]"), port, make_wsgi_app(registry), _Server, _QuietHandler)
        self.address = f"{host}:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": _STOP_S}, name="metrics", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Closes the port and waits for the thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


_STOP_S = 0.05
"""Seconds that a stop takes at most; the server of prometheus-client itself takes up to half a second."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name in the base class
        pass
