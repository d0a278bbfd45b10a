"""What is measured of one model's steps and workers: from the dispatcher's and the watch's words to metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from camserve.gateway.metrics import Metrics
from camserve.planning import Step
from camserve.types import ItemResult, Priority, StepResult


class Observer:
    """The metrics of one model.

    Args:
        metrics: all metrics.
        model: its name.
    """

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        metrics.introduce(model)

    def follows(self, steps: Callable[[], int]) -> None:
        """How many steps are in flight is asked whenever the metrics are read."""
        self._metrics.steps_in_flight.labels(self._model).set_function(steps)

    @contextmanager
    def planning(self) -> Iterator[None]:
        """The time inside is spent on planning."""
        began_s = time.perf_counter()
        yield
        self._metrics.planning_seconds.labels(self._model).inc(time.perf_counter() - began_s)

    def waiting(self, queries: int) -> None:
        """So many queries have not been sent yet."""
        self._metrics.waiting_queries.labels(self._model).set(queries)

    def queued(self, priority: Priority, seconds: float) -> None:
        """A request has waited so long for the first of its work to be sent."""
        self._metrics.queue_seconds.labels(self._model, priority).observe(seconds)

    def sent(self, step: Step, allowed_queries: int) -> None:
        """A step is on its way; its target time allows so many queries."""
        self._metrics.step_queries.labels(self._model).observe(step.queries)
        self._metrics.step_items.labels(self._model).observe(len(step.slices))
        if step.queries:
            self._metrics.step_fill_ratio.labels(self._model).observe(step.queries / allowed_queries)

    def took(self, seconds: float) -> None:
        """A step has come back, or is lost."""
        self._metrics.step_seconds.labels(self._model).observe(seconds)

    def retried(self) -> None:
        """A request's part of a lost step waits again."""
        self._metrics.step_retries.labels(self._model).inc()

    def answered(self, result: StepResult) -> None:
        """What a worker says of itself."""
        self._metrics.worker_cache.labels(self._model, "hit").inc(result.memory_hits)
        self._metrics.worker_cache.labels(self._model, "miss").inc(result.memory_misses)
        if (memory := result.device_memory) is not None:
            self._metrics.device_memory_used_bytes.labels(self._model, memory.device).set(memory.used_bytes)
            self._metrics.device_memory_limit_bytes.labels(self._model, memory.device).set(memory.limit_bytes)

    def wasted(self, result: ItemResult) -> None:
        """Nobody waits for this any more."""
        queries = sum(partial.queries for partial in result.partials)
        self._metrics.masked_queries_wasted.labels(self._model).inc(queries)

    def workers(self, ready: int, wanted: int) -> None:
        """Of all places together."""
        self._metrics.workers_ready.labels(self._model).set(ready)
        self._metrics.workers.labels(self._model).set(wanted)

    def replaced(self, workers: int) -> None:
        """So many more workers have come in the place of others."""
        self._metrics.worker_restarts.labels(self._model).inc(workers)
