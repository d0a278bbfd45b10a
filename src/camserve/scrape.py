"""What a metrics endpoint tells between two looks: increases, rates and quantiles, as Prometheus computes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Labels = Mapping[str, str]


@dataclass(frozen=True)
class Scrape:
    """One look."""

    at_s: float
    """Unix time."""
    samples: Mapping[str, Mapping[tuple[tuple[str, str], ...], float]]
    """Values by labels, by the name of the sample."""


def parse(text: str, at_s: float) -> Scrape:
    """From the text format. Raises ValueError when it is another text."""
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return Scrape(at_s, samples)


class Window:
    """The time between two looks.

    Args:
        now: the later one.
        before: the earlier one; None: the start of the process.
    """

    def __init__(self, now: Scrape, before: Scrape | None = None) -> None:
        self._now = now
        self._before = before
        start_s = before.at_s if before else sum(now.samples.get("process_start_time_seconds", {}).values())
        self.seconds = now.at_s - start_s if start_s else math.nan
        """How long it is."""

    @property
    def whole(self) -> bool:
        """It reaches from the start of the process until now."""
        return self._before is None

    def value(self, name: str, **labels: str) -> float:
        """Sum of the gauges now; nan if there is none."""
        found = [value for _, value in _matching(self._now, name, labels)]
        return sum(found) if found else math.nan

    def total(self, name: str, **labels: str) -> float:
        """Returns what the counters have counted together since the start of the process, whenever the window began."""
        return sum(value for _, value in _matching(self._now, name, labels))

    def increase(self, name: str, **labels: str) -> float:
        """By how much the counters have grown together; one that was set back has begun at 0."""
        return sum(self._grown(name, key, value) for key, value in _matching(self._now, name, labels))

    def rate(self, name: str, **labels: str) -> float:
        """The increase per second."""
        return self.increase(name, **labels) / self.seconds if self.seconds else math.nan

    def mean(self, histogram: str, **labels: str) -> float:
        """Of what was observed in the window; nan if nothing was."""
        count = self.increase(f"{histogram}_count", **labels)
        return self.increase(f"{histogram}_sum", **labels) / count if count else math.nan

    def quantile(self, part: float, histogram: str, **labels: str) -> float:
        """Of what was observed in the window, interpolated within its bucket; nan if nothing was."""
        counts: dict[float, float] = {}
        for key, value in _matching(self._now, f"{histogram}_bucket", labels):
            bound = float(dict(key)["le"])
            counts[bound] = counts.get(bound, 0.0) + self._grown(f"{histogram}_bucket", key, value)
        return histogram_quantile(part, counts)

    def values_of(self, label: str, name: str) -> list[str]:
        """Every value that a label of these samples has, sorted."""
        found = {dict(key).get(label, "") for key, _ in _matching(self._now, name, {})}
        return sorted(found - {""})

    def _grown(self, name: str, key: tuple[tuple[str, str], ...], value: float) -> float:
        before = self._before.samples.get(name, {}).get(key, 0.0) if self._before else 0.0
        return value - before if value >= before else value


def histogram_quantile(part: float, counts: Mapping[float, float]) -> float:
    """The quantile by cumulative counts of buckets, as PromQL's function of this name has it.

    Args:
        part: in [0, 1].
        counts: observations up to each bound; the last bound is +Inf.

    Returns:
        A value in the quantile's bucket; the largest finite bound for the last bucket; nan without observations.
    """
    bounds = sorted(counts)
    if not bounds or not counts[bounds[-1]]:
        return math.nan
    rank, below, bound_below = part * counts[bounds[-1]], 0.0, 0.0
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
