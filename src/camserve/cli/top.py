"""Shows, for `camserve top`, what a gateway does right now, from its metrics endpoint alone. Needs rich."""

from __future__ import annotations

import math
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from camserve.cli.scrape import Scrape, Window, parse
from camserve.cli.terminal import duration, figures_table
from camserve.connection import is_local
from camserve.errors import Unavailable

DEFAULT_URL = "http://127.0.0.1:8501/metrics"
_TIMEOUT_S = 5.0
_QUANTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Section:
    """Holds one table of figures."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def show(url: str, interval_s: float, once: bool, console: Console) -> None:
    """Shows the figures of the last interval until Ctrl-C; with `once` shows those since the start, and returns.

    Raises:
        Unavailable: there are no metrics at the URL.
    """
    views = views_of(url, interval_s)
    if once:
        console.print(next(views))
    elif console.is_terminal:
        with Live(next(views), console=console, screen=True, auto_refresh=False) as live:
            for each in views:
                live.update(each, refresh=True)
    else:
        for each in views:
            console.print(each)


def views_of(url: str, interval_s: float) -> Iterator[RenderableType]:
    """Yields the view since the start, then one for each interval.

    The last view stays while there are no new metrics, with the reason.
    """
    before = scrape(url)
    window = Window(before)
    yield view(window, url)
    while True:
        time.sleep(interval_s)
        try:
            now = scrape(url)
        except Unavailable as error:
            yield view(window, url, str(error))
            continue
        window, before = Window(now, before), now
        yield view(window, url)


def scrape(url: str) -> Scrape:
    """Returns what one look at an endpoint finds; raises Unavailable when there are no metrics."""
    proxies: dict[str, str] | None = {} if is_local(urlsplit(url).netloc) else None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as reply:
            found = parse(str(reply.read(), "utf-8"), time.time())
    except (OSError, ValueError) as error:
        raise Unavailable(f"no metrics at {url}: {error}") from None
    if "camserve_build_info" not in found.samples:
        raise Unavailable(f"the metrics at {url} are not those of a camserve gateway")
    return found


def view(window: Window, url: str, problem: str = "") -> RenderableType:
    """Returns all sections beneath a line that says whose they are; those of models on the right.

    Counts are since the start, whatever the window, and stand beside rates: on a server that has run for long the rate
    of what is asked seldom is next to nothing.
    """
    title = Text(f"camserve {', '.join(window.values_of('version', 'camserve_build_info'))}  {url}", style="bold")
    since = "since its start {:.0f} s ago" if window.whole else "of the last {:.1f} s"
    note = Text(problem or since.format(window.seconds), style="red" if problem else "dim")
    left = [classes(window), memory(window), failures(window)]
    grid = Table.grid(padding=(0, 3))
    grid.add_row(Group(*(_table(section) for section in left if section.rows)), _table(models(window)))
    asked = methods(window)
    return Group(title, note, *([_table(asked)] if asked.rows else []), grid)


def _table(section: Section) -> Table:
    return figures_table(section.title, section.headings, section.rows)


def methods(window: Window) -> Section:
    """Returns how often each method was asked and failed, and its rate and latency."""
    rows = []
    name = "camserve_request_seconds_count"
    for method in window.values_of("method", name):
        asked = window.total(name, method=method)
        failed = asked - window.total(name, method=method, code="OK")
        rate = window.rate(name, method=method)
        latency = _quantiles(window, "camserve_request_seconds", method=method)
        rows.append((method, number(asked), number(rate), number(failed), *latency))
    return Section("requests", ("method", "in all", "per s", "failed", "p50", "p95", "p99"), tuple(rows))


def classes(window: Window) -> Section:
    """Returns the traffic, the waiting time and the latency of each class."""
    rows = []
    for name in ("interactive", "normal", "batch"):
        labels = {"class": name}
        queue = window.quantile(0.95, "camserve_queue_seconds", **labels)
        latency = window.quantile(0.95, "camserve_request_seconds", **labels)
        asked = window.total("camserve_request_seconds_count", **labels)
        rate = window.rate("camserve_request_seconds_count", **labels)
        in_flight = window.value("camserve_requests_in_flight", **labels)
        rows.append((name, number(asked), number(rate), number(in_flight), seconds(queue), seconds(latency)))
    return Section("classes", ("class", "in all", "per s", "in\nflight", "queue\np95", "p95"), tuple(rows))


def models(window: Window) -> Section:
    """Returns a column for each model."""
    names = window.values_of("model", "camserve_waiting_queries")
    rows = zip(_FIGURES, *(model_figures(window, name) for name in names), strict=True)
    return Section("models", ("", *names), tuple(rows))


_FIGURES = (
    "workers READY",
    "worker restarts",
    "waiting queries",
    "waiting work",
    "oldest request",
    "steps in flight",
    "steps",
    "steps per s",
    "step time p50",
    "step time p95",
    "queries per step",
    "requests per step",
    "fill",
    "planning",
    "queries",
    "queries per s",
    "wasted",
    "wasted per s",
    "cached",
    "cached per s",
    "steps sent again",
    "partial answers",
)


def model_figures(window: Window, model: str) -> tuple[str, ...]:
    """Returns a model's figures, one for each of `_FIGURES` in their order."""
    ready, wanted = (window.value(f"camserve_workers{which}", model=model) for which in ("_ready", ""))
    planning = window.rate("camserve_planning_seconds_total", model=model)
    counted = [f"camserve_masked_queries{which}_total" for which in ("", "_wasted", "_cached")]
    return (
        f"{number(ready)} of {number(wanted)}",
        number(window.total("camserve_worker_restarts_total", model=model)),
        number(window.value("camserve_waiting_queries", model=model)),
        seconds(window.value("camserve_waiting_work_seconds", model=model)),
        seconds(window.value("camserve_oldest_request_seconds", model=model)),
        number(window.value("camserve_steps_in_flight", model=model)),
        *_count_and_rate(window, "camserve_step_seconds_count", model),
        *_quantiles(window, "camserve_step_seconds", model=model)[:2],
        number(window.mean("camserve_step_queries", model=model)),
        number(window.mean("camserve_step_items", model=model)),
        percent(window.mean("camserve_step_fill_ratio", model=model)),
        percent(planning),
        *(figure for name in counted for figure in _count_and_rate(window, name, model)),
        number(window.increase("camserve_step_retries_total", model=model)),
        number(window.increase("camserve_partial_answers_total", model=model)),
    )


def _count_and_rate(window: Window, name: str, model: str) -> tuple[str, str]:
    """Returns how often something was counted since the start, and how often a second in the window."""
    return number(window.total(name, model=model)), number(window.rate(name, model=model))


def memory(window: Window) -> Section:
    """Returns the memory of each device of each model."""
    rows = []
    used, limit = ("camserve_device_memory_used_bytes", "camserve_device_memory_limit_bytes")
    for model in window.values_of("model", used):
        for device in window.values_of("device", used):
            values = [window.value(name, model=model, device=device) for name in (used, limit)]
            if not math.isnan(values[0]):
                rows.append((model, device, *map(gibibytes, values)))
    return Section("memory", ("model", "device", "used", "of"), tuple(rows))


def failures(window: Window) -> Section:
    """Returns the statuses other than OK and the reasons of refusals that have occurred since the start."""
    rows = []
    for label, name in (("code", "camserve_request_seconds_count"), ("reason", "camserve_refusals_total")):
        for value in window.values_of(label, name):
            total = window.total(name, **{label: value})
            if value != "OK" and total:
                rows.append((label, value, number(total), number(window.rate(name, **{label: value}))))
    return Section("failed, refused", ("", "", "in all", "per s"), tuple(rows))


def _quantiles(window: Window, histogram: str, **labels: str) -> Sequence[str]:
    return [seconds(window.quantile(share, histogram, **labels)) for share in _QUANTILES]


def number(value: float) -> str:
    """Returns a number in a few digits; "-" for what is not known.

    A number next to nothing is no wider than others, so that names beside it are not cut.
    """
    if math.isnan(value):
        return "-"
    if 0 < value < 0.01:
        return "<0.01"
    return (
        f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.2g}" if value < 10 else f"{value:.1f}"
    )


def seconds(value: float) -> str:
    """Returns seconds as a duration; "-" for what is not known."""
    return "-" if math.isnan(value) else duration(value)


def percent(value: float) -> str:
    """Returns a ratio in whole percents; "-" for what is not known."""
    return "-" if math.isnan(value) else f"{value:.0%}"


def gibibytes(value: float) -> str:
    """Returns bytes in GiB with one decimal; "-" for what is not known."""
    return "-" if math.isnan(value) else f"{value / 2**30:.1f} GiB"
