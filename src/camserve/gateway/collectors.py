"""Makes metrics and notes what they are, and gauges that are read when they are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class Described(NamedTuple):
    """What a metric is."""

    type: str
    """counter, gauge, histogram or info."""
    labels: tuple[str, ...]


class LiveGauge(Collector):
    """A gauge that is read when it is scraped, in the thread of the scrape.

    Attributes:
        read: the values by labels; there are no samples where it returns none.
    """

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self.read: Callable[[], Mapping[tuple[str, ...], float]] = dict
        self._family = (name, text, None, labels)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """One family."""
        family = GaugeMetricFamily(*self._family)
        for labels, value in self.read().items():
            family.add_metric(labels, value)
        return [family]


class Maker:
    """Makes metrics in one registry, and notes what they are."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.made: dict[str, Described] = {}

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        """Its name ends with _total."""
        return Counter(name, text, self._noted(name, "counter", labels), registry=self.registry)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        """What is set."""
        return Gauge(name, text, self._noted(name, "gauge", labels), registry=self.registry)

    def histogram(self, name: str, text: str, *labels: str, buckets: Sequence[float]) -> Histogram:
        """What is observed, by upper bounds of its buckets."""
        return Histogram(name, text, self._noted(name, "histogram", labels), registry=self.registry, buckets=buckets)

    def live(self, name: str, text: str, *labels: str) -> LiveGauge:
        """What is read."""
        gauge = LiveGauge(name, text, self._noted(name, "gauge", labels))
        self.registry.register(gauge)
        return gauge

    def info(self, name: str, text: str, **values: str) -> None:
        """Always 1, with what is told in its labels; it is exposed as <name>_info."""
        self._noted(f"{name}_info", "info", tuple(values))
        Info(name, text, registry=self.registry).info(values)

    def _noted(self, name: str, kind: str, labels: tuple[str, ...]) -> tuple[str, ...]:
        self.made[name] = Described(kind, labels)
        return labels
