"""Counts, sets and records the metrics of one model for its dispatcher and for the registry."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from camserve.gateway.ops.metrics import Metrics
from camserve.planning import Step
from camserve.types import ItemResult, Priority, StepResult


class ModelMetrics:
    """Holds the metrics of one model.

    Args:
        metrics: the metrics of the gateway.
        model: name of the model.
    """

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        metrics.introduce(model)

    def read_steps(self, steps: Callable[[], int]) -> None:
        """Has the number of steps in flight read from `steps` whenever the metrics are scraped."""
        self._metrics.steps_in_flight.labels(self._model).set_function(steps)

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Counts the time inside of the block as spent on planning."""
        began_s = time.perf_counter()
        yield
        self._metrics.planning_seconds.labels(self._model).inc(time.perf_counter() - began_s)

    def waiting(self, queries: int, seconds: float) -> None:
        """Sets the number of queries that have not been sent yet, and the work that waits, in seconds of one worker."""
        self._metrics.waiting_queries.labels(self._model).set(queries)
        self._metrics.waiting_work_seconds.labels(self._model).set(seconds)

    def queued(self, priority: Priority, seconds: float) -> None:
        """Records how long a request has waited for the first of its work to be sent."""
        self._metrics.queue_seconds.labels(self._model, priority).observe(seconds)

    def sent(self, step: Step, fill: float) -> None:
        """Records a step that is sent; `fill` is its predicted time in proportion to its target."""
        self._metrics.step_queries.labels(self._model).observe(step.queries)
        self._metrics.step_items.labels(self._model).observe(len(step.slices))
        if step.queries:
            self._metrics.step_fill_ratio.labels(self._model).observe(fill)

    def took(self, seconds: float) -> None:
        """Records the time of a step that has come back, or is lost."""
        self._metrics.step_seconds.labels(self._model).observe(seconds)

    def retried(self) -> None:
        """Counts a slice of a lost step that waits again."""
        self._metrics.step_retries.labels(self._model).inc()

    def resent(self, images: int) -> None:
        """Counts images that a worker asked for, since it had not kept their bytes."""
        self._metrics.image_resends.labels(self._model).inc(images)

    def answered(self, result: StepResult) -> None:
        """Counts the cache hits that a worker tells with an answer, and sets the memory of its device."""
        self._metrics.worker_cache.labels(self._model, "hit").inc(result.memory_hits)
        self._metrics.worker_cache.labels(self._model, "miss").inc(result.memory_misses)
        if (memory := result.device_memory) is not None:
            self._metrics.device_memory_used_bytes.labels(self._model, memory.device).set(memory.used_bytes)
            self._metrics.device_memory_limit_bytes.labels(self._model, memory.device).set(memory.limit_bytes)

    def wasted(self, result: ItemResult) -> None:
        """Counts the queries of a result for which nobody waits any more."""
        queries = sum(partial.queries for partial in result.partials)
        self._metrics.masked_queries_wasted.labels(self._model).inc(queries)

    def workers(self, ready: int, wanted: int) -> None:
        """Sets how many workers are READY and how many should be, at all backends together."""
        self._metrics.workers_ready.labels(self._model).set(ready)
        self._metrics.workers.labels(self._model).set(wanted)

    def quarantined(self, backends: int) -> None:
        """Sets how many backends get no work, since they lost too many steps in a row."""
        self._metrics.backends_quarantined.labels(self._model).set(backends)

    def replaced(self, workers: int) -> None:
        """Counts workers that have replaced others."""
        self._metrics.worker_restarts.labels(self._model).inc(workers)
