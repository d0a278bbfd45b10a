"""Defines every metric of the gateway: name, type, unit, labels and buckets are here and nowhere else.

Labels stay few: `model` is a served model or "unknown", `method` a method's name, "several" or "unknown", `class` a
priority or "unknown", `code` a gRPC status, `choice` a method of the server's own ladder. Each gateway has its own
registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from camserve import __version__, logs
from camserve.planning.limits import CLASSES

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 180.0)
SHORT_SECONDS = (0.0005, 0.001, 0.0025, *SECONDS)
STALL_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
STEP_QUERIES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
STEP_ITEMS = (1, 2, 3, 4, 6, 8, 12, 16, 32)
RATIOS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)

STAGES = ("queue", "decode", "forward", "queries", "merge", "render")
TOKEN_REFUSALS = ("token_requests", "token_work", "token_rate", "unauthenticated")
CALL_REFUSALS = ("calls", "reading", "memory")
REFUSALS = ("requests", "work", "deadline", *CALL_REFUSALS, *TOKEN_REFUSALS)
"""Reasons for which a call is refused before any work."""
UNKNOWN = "unknown"
"""Label of what a client made up, so that labels stay few."""
SEVERAL = "several"
"""Label of a request with several methods."""
NO_METHOD = "none"
"""Label of a request for predictions alone."""

_EXEMPLAR_CHARACTERS = 128
"""Bound of all names and values of an exemplar together, by OpenMetrics."""


class Described(NamedTuple):
    """Type and labels of a metric."""

    type: str
    """Type of the metric: counter, gauge, histogram or info."""
    labels: tuple[str, ...]


class Live(Collector):
    """A gauge, or a counter, that is read when it is scraped, in the thread of the scrape.

    Attributes:
        read: returns the values by labels; there are no samples where it returns none. It may be replaced.
    """

    def __init__(
        self, kind: type[GaugeMetricFamily | CounterMetricFamily], name: str, text: str, labels: Sequence[str]
    ) -> None:
        self.read: Callable[[], Mapping[tuple[str, ...], float]] = dict
        self._kind = kind
        self._arguments = (name, text, None, labels)

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        """Returns the family of the metric with the values of now."""
        family = self._kind(*self._arguments)
        for labels, value in self.read().items():
            family.add_metric(labels, value)
        return [family]


class _Maker:
    """Makes metrics in one registry, and notes their types and labels."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.made: dict[str, Described] = {}

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        """Makes a counter; its name ends with _total."""
        return Counter(name, text, self._noted(name, "counter", labels), registry=self.registry)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        """Makes a gauge that is set."""
        return Gauge(name, text, self._noted(name, "gauge", labels), registry=self.registry)

    def histogram(self, name: str, text: str, *labels: str, buckets: Sequence[float]) -> Histogram:
        """Makes a histogram; `buckets` are the upper bounds of its buckets."""
        return Histogram(name, text, self._noted(name, "histogram", labels), registry=self.registry, buckets=buckets)

    def live(self, name: str, text: str, *labels: str) -> Live:
        """Makes a gauge that is read when it is scraped; a counter if its name ends with _total."""
        counts = name.endswith("_total")
        family = CounterMetricFamily if counts else GaugeMetricFamily
        live = Live(family, name, text, self._noted(name, "counter" if counts else "gauge", labels))
        self.registry.register(live)
        return live

    def info(self, name: str, text: str, **values: str) -> None:
        """Makes a metric that is always 1 and has `values` as labels; it is exposed as <name>_info."""
        self._noted(f"{name}_info", "info", tuple(values))
        Info(name, text, registry=self.registry).info(values)

    def _noted(self, name: str, kind: str, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Notes the type and the labels of a metric; returns the labels."""
        self.made[name] = Described(kind, labels)
        return labels


class Metrics:
    """Holds the metrics of one gateway, and those of its process."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which no query asks
        make = _Maker()
        self.registry = make.registry
        self._own = make.made
        self._requests(make)
        self._queries(make)
        self._steps(make)
        self._workers(make)
        self.certificate_expiry = make.live(
            "camserve_certificate_expiry_timestamp_seconds",
            "Unix time at which the served certificate ends; absent without TLS.",
        )
        self.log_lines_lost = make.live(
            "camserve_log_lines_lost_total",
            "Lines of the log that were not written, since they came too fast, or nobody read them.",
        )
        self.log_lines_lost.read = lambda: {(): float(logs.lost_lines())}
        make.info("camserve_build", "The running release.", version=__version__)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        # Series that have no model begin here; those of a model begin in `introduce`.
        for name in CLASSES:
            self.requests_in_flight.labels(name)
        for reason in (*CALL_REFUSALS, *TOKEN_REFUSALS):
            self.refusals.labels(UNKNOWN, reason)

    def _requests(self, make: _Maker) -> None:
        self.request_seconds = make.histogram(
            "camserve_request_seconds",
            "Time from a request's arrival to its answer.",
            *("model", "method", "class", "code"),
            buckets=SECONDS,
        )
        self.stage_seconds = make.histogram(
            "camserve_stage_seconds",
            "Time that an explained request spent in each stage: " + ", ".join(STAGES) + ".",
            *("model", "method", "stage"),
            buckets=SHORT_SECONDS,
        )
        self.queue_seconds = make.histogram(
            "camserve_queue_seconds",
            "Time from a request's arrival until the first of its work was sent to a worker.",
            *("model", "class"),
            buckets=SHORT_SECONDS,
        )
        self.requests_in_flight = make.gauge("camserve_requests_in_flight", "Explain requests being answered.", "class")
        self.bytes_in_flight = make.live(
            "camserve_bytes_in_flight", "Bytes that explain requests take, with replies that are not delivered yet."
        )
        self.event_loop_stall_seconds = make.histogram(
            "camserve_event_loop_stall_seconds",
            "Time by which the event loop was late, measured twenty times in a second: nobody was served meanwhile.",
            buckets=STALL_SECONDS,
        )
        self.oldest_request_seconds = make.live(
            "camserve_oldest_request_seconds", "Age of the oldest request being answered; 0: there is none.", "model"
        )
        self.partial_answers = make.counter(
            "camserve_partial_answers_total", "Requests answered at their deadline with what was known.", "model"
        )
        self.refusals = make.counter(
            "camserve_refusals_total",
            "Calls refused before any work, by reason: " + ", ".join(REFUSALS) + ".",
            *("model", "reason"),
        )
        self.auto_choices = make.counter(
            "camserve_auto_choices_total", "What `auto` chose, as the server's ladder has it.", "model", "choice"
        )
        self.result_cache = make.counter(
            "camserve_result_cache_total",
            "Requests whose reply was kept (hit), was just being made for another (shared), or had to be made (miss).",
            *("model", "outcome"),
        )
        self.evidence_records = make.counter("camserve_evidence_records_total", "Evidence records written to the log.")
        self.evidence_failures = make.counter(
            "camserve_evidence_failures_total", "Replies withheld, since their evidence record could not be written."
        )

    def _queries(self, make: _Maker) -> None:
        self.masked_queries = make.counter(
            "camserve_masked_queries_total", "Masked forward passes made for answers.", "model", "method"
        )
        self.masked_queries_wasted = make.counter(
            "camserve_masked_queries_wasted_total",
            "Masked forward passes made for nobody: their request had ended, or another worker had answered.",
            "model",
        )
        self.masked_queries_cached = make.counter(
            "camserve_masked_queries_cached_total",
            "Masked forward passes not made, since the result cache had the reply.",
            "model",
        )
        self.waiting_queries = make.gauge(
            "camserve_waiting_queries", "Masked queries that have not been sent to a worker yet.", "model"
        )
        self.waiting_work_seconds = make.gauge(
            "camserve_waiting_work_seconds",
            "Work that has not been sent to a worker yet, in predicted seconds of one worker: openings, gradients and "
            "masked queries alike.",
            "model",
        )

    def _steps(self, make: _Maker) -> None:
        self.steps_in_flight = make.gauge("camserve_steps_in_flight", "Steps sent and not answered.", "model")
        self.step_queries = make.histogram(
            "camserve_step_queries", "Masked queries in a step.", "model", buckets=STEP_QUERIES
        )
        self.step_items = make.histogram(
            "camserve_step_items", "Requests that share a step.", "model", buckets=STEP_ITEMS
        )
        self.step_seconds = make.histogram(
            "camserve_step_seconds",
            "Time from sending a step to its answer, waiting in TorchServe included.",
            "model",
            buckets=SECONDS,
        )
        self.step_fill_ratio = make.histogram(
            "camserve_step_fill_ratio",
            "Predicted time of a step in proportion to its target; of steps with masked queries.",
            "model",
            buckets=RATIOS,
        )
        self.planning_seconds = make.counter(
            "camserve_planning_seconds_total", "Time spent on deciding what goes into the next step.", "model"
        )
        self.step_retries = make.counter(
            "camserve_step_retries_total", "Items of lost steps that were put back to be sent again.", "model"
        )
        self.image_resends = make.counter(
            "camserve_image_resends_total", "Images sent once more, since a worker had not kept their bytes.", "model"
        )

    def _workers(self, make: _Maker) -> None:
        self.worker_cache = make.counter(
            "camserve_worker_cache_total",
            "Decoded images and forward passes that a worker still had (hit) or had to make (miss).",
            *("model", "outcome"),
        )
        self.workers_ready = make.gauge("camserve_workers_ready", "Workers of TorchServe that are READY.", "model")
        self.workers = make.gauge("camserve_workers", "Workers that TorchServe is to run.", "model")
        self.backends_quarantined = make.gauge(
            "camserve_backends_quarantined",
            "TorchServes that get no work, since they lost several steps in a row and have answered no canary since.",
            "model",
        )
        self.worker_restarts = make.counter(
            "camserve_worker_restarts_total", "Workers in whose place another process became READY.", "model"
        )
        self.device_memory_used_bytes = make.gauge(
            "camserve_device_memory_used_bytes",
            "Memory in use on the device of the worker that answered last; on a CPU the worker's resident memory.",
            *("model", "device"),
        )
        self.device_memory_limit_bytes = make.gauge(
            "camserve_device_memory_limit_bytes",
            "Memory of that device; on a CPU that of the machine, or of the container if it has less.",
            *("model", "device"),
        )

    def catalogue(self) -> dict[str, Described]:
        """Returns type and labels of every exposed metric by name; the name of a histogram has no suffix."""
        found = dict(self._own)
        for family in self.registry.collect():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            if name not in found and f"{name}_info" not in found:
                labels = {label for sample in family.samples for label in sample.labels}
                found[name] = Described(family.type, tuple(sorted(labels)))
        return found

    def introduce(self, model: str) -> None:
        """Sets the counters of a model to 0, so that their first step is seen as an increase."""
        counters = (self.masked_queries_wasted, self.masked_queries_cached, self.partial_answers, self.step_retries)
        for metric in (*counters, self.image_resends, self.worker_restarts, self.planning_seconds):
            metric.labels(model)
        for reason in REFUSALS:
            self.refusals.labels(model, reason)
        for outcome in ("hit", "miss"):
            self.worker_cache.labels(model, outcome)
        for outcome in ("hit", "shared", "miss"):
            self.result_cache.labels(model, outcome)

    def stages(self, model: str, method: str, seconds: Mapping[str, float]) -> None:
        """Records the stages of one request; stages that are not in `STAGES` are left out."""
        for stage in STAGES:
            if stage in seconds:
                self.stage_seconds.labels(model, method, stage).observe(seconds[stage])


def catalogue() -> Mapping[str, Described]:
    """Returns type and labels of every metric that a gateway exposes, by name; no gateway has to run."""
    return Metrics().catalogue()


def method_label(names: Sequence[str]) -> str:
    """Returns the name of the only method, "several" for a request with several, "none" for predictions alone."""
    return names[0] if len(names) == 1 else SEVERAL if names else NO_METHOD


def exemplar(request_id: str) -> dict[str, str] | None:
    """Returns the exemplar that leads from a bucket to the log of a request; None where its id is too long for one."""
    fits = len("request_id") + len(request_id) <= _EXEMPLAR_CHARACTERS
    return {"request_id": request_id} if request_id and fits else None
