"""Builds the expressions that the dashboard's PromQL is made of."""

from __future__ import annotations

TARGET = 'job=~"$job", instance=~"$instance"'
MODEL = f'{TARGET}, model=~"$model"'
METHOD = f'{MODEL}, method=~"$method"'
CALL = f'{METHOD}, class=~"$class"'
ANSWERED = f'{CALL}, code="OK"'
RECORDED = 'job=~"$job", model=~"$model"'
"""Labels of recorded series, which are over all instances."""


def rate(metric: str, labels: str) -> str:
    """Returns how much a counter, or a series of a histogram, rises per second."""
    return f"rate({metric}{{{labels}}}[$__rate_interval])"


def total_rate(metric: str, labels: str, by: str = "") -> str:
    """Returns the sum of the rates; `by` names the labels that stay."""
    return f"sum{_by(by)}({rate(metric, labels)})"


def over_range(metric: str, labels: str) -> str:
    """Returns how much a counter rose within the time range of the dashboard."""
    return f"sum(increase({metric}{{{labels}}}[$__range]))"


def quantile(share: float, histogram: str, labels: str, by: str = "") -> str:
    """Returns the value that `share` of the observations do not exceed."""
    buckets = total_rate(f"{histogram}_bucket", labels, f"le, {by}" if by else "le")
    return f"histogram_quantile({share}, {buckets})"


def mean(histogram: str, labels: str, by: str = "") -> str:
    """Returns the mean observation."""
    return f"{total_rate(f'{histogram}_sum', labels, by)} / {total_rate(f'{histogram}_count', labels, by)}"


def gauge(metric: str, labels: str, by: str, how: str = "sum") -> str:
    """Returns a gauge, summed or otherwise joined; `by` names the labels that stay."""
    return f"{how} by ({by}) ({metric}{{{labels}}})"


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""
