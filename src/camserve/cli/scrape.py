"""Computes what a metrics endpoint tells between two looks: increases, rates and quantiles, as Prometheus does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Labels = Mapping[str, str]


@dataclass(frozen=True)
class Scrape:
    """Holds what one look at an endpoint found."""

    at_s: float
    """Unix time of the look."""
    samples: Mapping[str, Mapping[tuple[tuple[str, str], ...], float]]
    """Values by labels, for each name of a sample."""


def parse(text: str, at_s: float) -> Scrape:
    """Returns the samples of Prometheus' text format; raises ValueError when it is another text."""
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return Scrape(at_s, samples)


class Window:
    """Compares two looks; the window is the time between them.

    Args:
        now: the later look.
        before: the earlier look; None: the window begins with the process.
    """

    def __init__(self, now: Scrape, before: Scrape | None = None) -> None:
        self._now = now
        self._before = before
        start_s = before.at_s if before else sum(now.samples.get("process_start_time_seconds", {}).values())
        self.seconds = now.at_s - start_s if start_s else math.nan
        """Length of the window in seconds; nan where it is not known."""

    @property
    def whole(self) -> bool:
        """Tells whether the window reaches from the start of the process until now."""
        return self._before is None

    def value(self, name: str, **labels: str) -> float:
        """Returns the sum of the gauges now; nan if there is none."""
        found = [value for _, value in _matching(self._now, name, labels)]
        return sum(found) if found else math.nan

    def total(self, name: str, **labels: str) -> float:
        """Returns what the counters have counted together since the start of the process, whenever the window began."""
        return sum(value for _, value in _matching(self._now, name, labels))

    def increase(self, name: str, **labels: str) -> float:
        """Returns by how much the counters have grown together; a counter that was set back has begun at 0."""
        return sum(self._grown(name, key, value) for key, value in _matching(self._now, name, labels))

    def rate(self, name: str, **labels: str) -> float:
        """Returns the increase of the counters per second."""
        return self.increase(name, **labels) / self.seconds if self.seconds else math.nan

    def mean(self, histogram: str, **labels: str) -> float:
        """Returns the mean of what was observed in the window; nan if nothing was."""
        count = self.increase(f"{histogram}_count", **labels)
        return self.increase(f"{histogram}_sum", **labels) / count if count else math.nan

    def quantile(self, share: float, histogram: str, **labels: str) -> float:
        """Returns a quantile of what was observed in the window, interpolated within its bucket; nan if nothing was."""
        counts: dict[float, float] = {}
        for key, value in _matching(self._now, f"{histogram}_bucket", labels):
            bound = float(dict(key)["le"])
            counts[bound] = counts.get(bound, 0.0) + self._grown(f"{histogram}_bucket", key, value)
        return histogram_quantile(share, counts)

    def values_of(self, label: str, name: str) -> list[str]:
        """Returns every value that a label of these samples has, sorted."""
        found = {dict(key).get(label, "") for key, _ in _matching(self._now, name, {})}
        return sorted(found - {""})

    def _grown(self, name: str, key: tuple[tuple[str, str], ...], value: float) -> float:
        before = self._before.samples.get(name, {}).get(key, 0.0) if self._before else 0.0
        return value - before if value >= before else value


def histogram_quantile(share: float, counts: Mapping[float, float]) -> float:
    """Returns the quantile by cumulative counts of buckets, as PromQL's function of this name does.

    Args:
        share: share of the observations below the quantile, in [0, 1].
        counts: number of observations up to each bound; the last bound is +Inf.

    Returns:
        A value in the quantile's bucket; the largest finite bound for the last bucket; nan without observations.
    """
    bounds = sorted(counts)
    if not bounds or not counts[bounds[-1]]:
        return math.nan
    rank, below, bound_below = share * counts[bounds[-1]], 0.0, 0.0
    for bound in bounds:
        if counts[bound] >= rank and counts[bound] > below:
            if math.isinf(bound):
                return bound_below
            return bound_below + (bound - bound_below) * (rank - below) / (counts[bound] - below)
        below, bound_below = counts[bound], bound
    return bound_below


def _matching(scrape: Scrape, name: str, labels: Labels) -> Iterator[tuple[tuple[tuple[str, str], ...], float]]:
    for key, value in scrape.samples.get(name, {}).items():
        if labels.items() <= dict(key).items():
            yield key, value
