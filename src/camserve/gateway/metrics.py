"""Every metric of the gateway: name, type, unit, labels and buckets are here and nowhere else.

Labels stay few: `model` is a served model or "unknown", `method` a method's name, "several" or "unknown", `code` a gRPC
status. Each gateway has its own registry.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, make_wsgi_app

from camserve import __version__

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 180.0)
STEP_QUERIES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
STEP_ITEMS = (1, 2, 3, 4, 6, 8, 12, 16, 32)

STAGES = ("queue", "decode", "forward", "queries", "merge", "render")
UNKNOWN = "unknown"
SEVERAL = "several"


class Metrics:
    """The metrics of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.request_seconds = Histogram(
            "camserve_request_seconds",
            "Time from a request's arrival to its answer.",
            ["model", "method", "code"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "camserve_stage_seconds",
            "Time that an explained request spent in each stage: " + ", ".join(STAGES) + ".",
            ["model", "method", "stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.masked_queries = Counter(
            "camserve_masked_queries",
            "Masked forward passes made.",
            ["model", "method"],
            registry=self.registry,
        )
        self.memory = Counter(
            "camserve_worker_memory",
            "Decoded images and forward passes that a worker still had (hit) or had to make (miss).",
            ["model", "outcome"],
            registry=self.registry,
        )
        self.results = Counter(
            "camserve_result_cache",
            "Requests whose reply was kept (hit), was just being made for another (shared), or had to be made (miss).",
            ["model", "outcome"],
            registry=self.registry,
        )
        self.partial_answers = Counter(
            "camserve_partial_answers",
            "Requests answered at their deadline with what was known.",
            ["model"],
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "camserve_requests_in_flight", "Explain requests being answered.", registry=self.registry
        )
        self.waiting_queries = Gauge(
            "camserve_waiting_queries",
            "Masked queries that have not been sent to a worker yet.",
            ["model"],
            registry=self.registry,
        )
        self.step_queries = Histogram(
            "camserve_step_queries",
            "Masked queries in a step.",
            ["model"],
            buckets=STEP_QUERIES,
            registry=self.registry,
        )
        self.step_items = Histogram(
            "camserve_step_items",
            "Requests that share a step.",
            ["model"],
            buckets=STEP_ITEMS,
            registry=self.registry,
        )
        self.step_seconds = Histogram(
            "camserve_step_seconds",
            "Time from sending a step to its answer, waiting in TorchServe included.",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.retries = Counter(
            "camserve_step_retries",
            "Items of lost steps that were put back to be sent again.",
            ["model"],
            registry=self.registry,
        )
        self.ready_workers = Gauge(
            "camserve_upstream_ready_workers",
            "Workers of TorchServe that are READY.",
            ["model"],
            registry=self.registry,
        )
        self.build = Info("camserve_build", "The running release.", registry=self.registry)
        self.build.info({"version": __version__})

    def stages(self, model: str, method: str, seconds: Mapping[str, float]) -> None:
        """Observes the stages of one request; stages that are not in `STAGES` are left out."""
        for stage in STAGES:
            if stage in seconds:
                self.stage_seconds.labels(model, method, stage).observe(seconds[stage])


def method_label(names: Sequence[str]) -> str:
    """The method's name, or "several" for a request with several."""
    return names[0] if len(names) == 1 else SEVERAL


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
"""How long a stop takes at most; prometheus-client's own server has half a second."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name in the base class
        pass
