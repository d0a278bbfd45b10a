"""`camserve top`: figures from two looks at the metrics, and what of them is shown."""

import io
import math
import re

import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from camserve.cli import camserve, top
from camserve.cli.scrape import Scrape, Window, histogram_quantile, parse
from camserve.errors import Unavailable
from camserve.gateway.ops.exposition import MetricsServer
from camserve.gateway.ops.metrics import Metrics
from camserve.methods import METHODS

INF = math.inf


def look(text: str, at_s: float) -> Scrape:
    return parse(text, at_s)


@pytest.mark.parametrize(
    ("part", "counts", "expected"),
    [
        (0.5, {1.0: 0, 2.0: 10, INF: 10}, 1.5),
        (0.5, {1.0: 10, 2.0: 10, INF: 10}, 0.5),
        (0.95, {1.0: 80, 2.0: 90, 4.0: 100, INF: 100}, 3.0),
        (1.0, {1.0: 4, 2.0: 4, INF: 4}, 1.0),
        (0.0, {1.0: 0, 2.0: 4, INF: 4}, 1.0),
        (0.99, {1.0: 1, 2.0: 1, INF: 10}, 2.0),  # beyond the last bound nothing is known
        (0.5, {1.0: 0, INF: 0}, math.nan),
        (0.5, {}, math.nan),
    ],
)
def test_quantiles_are_those_of_promql(part, counts, expected):
    assert histogram_quantile(part, counts) == pytest.approx(expected, nan_ok=True)


def test_rates_are_of_the_time_between_two_looks():
    before = look('a_total{x="1"} 10\na_total{x="2"} 5\n', 100.0)
    now = look('a_total{x="1"} 16\na_total{x="2"} 9\na_total{x="3"} 2\n', 104.0)
    window = Window(now, before)
    assert window.rate("a_total") == (6 + 4 + 2) / 4
    assert window.rate("a_total", x="1") == 6 / 4
    assert window.rate("a_total", x="9") == 0
    assert window.values_of("x", "a_total") == ["1", "2", "3"]


def test_a_counter_that_began_anew_has_grown_by_all_it_has():
    window = Window(look("a_total 3\n", 101.0), look("a_total 100\n", 100.0))
    assert window.increase("a_total") == 3


def test_one_look_alone_is_of_the_time_since_the_start():
    window = Window(look("process_start_time_seconds 50\na_total 100\n", 100.0))
    assert (window.whole, window.seconds, window.rate("a_total")) == (True, 50.0, 2.0)
    assert math.isnan(Window(look("a_total 100\n", 100.0)).rate("a_total"))


def test_a_quantile_is_of_what_came_between_the_looks():
    """Before, everything was fast; since then, everything is slow."""
    metrics = Metrics()
    seconds = metrics.request_seconds.labels("fake", "grad_cam", "normal", "OK")
    for _ in range(1000):
        seconds.observe(0.001)
    before = look(generate_latest(metrics.registry).decode(), 100.0)
    for _ in range(10):
        seconds.observe(7.0)
    window = Window(look(generate_latest(metrics.registry).decode(), 101.0), before)
    assert window.quantile(0.5, "camserve_request_seconds") == 7.5  # the middle of its bucket, 5..10 s
    assert window.quantile(0.5, "camserve_request_seconds", method="rise") == pytest.approx(math.nan, nan_ok=True)


def busy() -> Metrics:
    metrics = Metrics()
    metrics.introduce("fake")
    for code, count in (("OK", 9), ("RESOURCE_EXHAUSTED", 1)):
        for _ in range(count):
            metrics.request_seconds.labels("fake", "score_cam", "batch", code).observe(0.3)
    metrics.refusals.labels("fake", "work").inc()
    metrics.queue_seconds.labels("fake", "batch").observe(0.04)
    metrics.requests_in_flight.labels("batch").set(3)
    metrics.workers_ready.labels("fake").set(1)
    metrics.workers.labels("fake").set(2)
    metrics.worker_restarts.labels("fake").inc(4)
    metrics.waiting_queries.labels("fake").set(1234)
    metrics.waiting_work_seconds.labels("fake").set(95)
    metrics.oldest_request_seconds.read = lambda: {("fake",): 2.5}
    metrics.steps_in_flight.labels("fake").set(2)
    for queries in (16, 48):
        metrics.step_queries.labels("fake").observe(queries)
        metrics.step_items.labels("fake").observe(1)
        metrics.step_fill_ratio.labels("fake").observe(queries / 64)
        metrics.step_seconds.labels("fake").observe(0.2)
    metrics.planning_seconds.labels("fake").inc(0.2)
    metrics.masked_queries.labels("fake", "score_cam").inc(640)
    metrics.masked_queries_wasted.labels("fake").inc(20)
    metrics.masked_queries_cached.labels("fake").inc(100)
    metrics.step_retries.labels("fake").inc(5)
    metrics.partial_answers.labels("fake").inc(6)
    metrics.device_memory_used_bytes.labels("fake", "cuda:0").set(3 * 2**30)
    metrics.device_memory_limit_bytes.labels("fake", "cuda:0").set(80 * 2**30)
    return metrics


def window_of(metrics: Metrics, seconds: float = 10.0) -> Window:
    nothing = look("", 100.0)
    return Window(look(generate_latest(metrics.registry).decode(), 100.0 + seconds), nothing)


def test_every_figure_is_where_it_belongs():
    window = window_of(busy())
    assert top.methods(window).rows == (("score_cam", "10", "1", "1", "375 ms", "488 ms", "498 ms"),)
    assert top.classes(window).rows == (
        ("interactive", "0", "0", "0", "-", "-"),
        ("normal", "0", "0", "0", "-", "-"),
        ("batch", "10", "1", "3", "49 ms", "488 ms"),
    )
    assert dict(top.models(window).rows) == {
        "workers READY": "1 of 2",
        "worker restarts": "4",
        "waiting queries": "1,234",
        "waiting work": "95.0 s",
        "oldest request": "2.5 s",
        "steps in flight": "2",
        "steps": "2",
        "steps per s": "0.2",
        "step time p50": "175 ms",
        "step time p95": "242 ms",
        "queries per step": "32",
        "requests per step": "1",
        "fill": "50%",
        "planning": "2%",
        "queries": "640",
        "queries per s": "64",
        "wasted": "20",
        "wasted per s": "2",
        "cached": "100",
        "cached per s": "10",
        "steps sent again": "5",
        "partial answers": "6",
    }
    assert top.memory(window).rows == (("fake", "cuda:0", "3.0 GiB", "80.0 GiB"),)
    assert top.failures(window).rows == (
        ("code", "RESOURCE_EXHAUSTED", "1", "0.1"),
        ("reason", "work", "1", "0.1"),
    )


def test_a_gateway_that_did_nothing_yet_is_shown_without_figures():
    console = Console(file=io.StringIO(), width=80)
    console.print(top.view(window_of(Metrics()), "http://here"))
    assert "http://here" in console.file.getvalue()


DAY_S = 86400.0


@pytest.mark.parametrize("age_s", [10, 1260, 30 * DAY_S, 3000 * DAY_S], ids="{:.0f} s".format)
def test_all_of_it_fits_into_a_terminal_however_old_the_server_is(age_s):
    """What is asked seldom stays beside its count, and no name is cut for a rate of many digits."""
    console = Console(file=io.StringIO(), width=80)
    console.print(top.view(window_of(busy(), age_s), top.DEFAULT_URL))
    text = console.file.getvalue()
    assert "…" not in text
    assert len(text.splitlines()) <= 36
    assert re.search(r"^ *score_cam +10 ", text, re.MULTILINE)
    assert re.search(r"^ *batch +10 ", text, re.MULTILINE)
    assert re.search(r"queries +640 ", text)
    for shown in ("488 ms", "interactive", "1 of 2", "1,234", "80.0 GiB", "RESOURCE_EXHAUSTED", f"{age_s:.1f} s"):
        assert shown in text


@pytest.mark.parametrize("method", METHODS)
def test_the_name_of_no_method_is_cut(method):
    metrics = busy()
    metrics.request_seconds.labels("fake", method, "normal", "OK").observe(0.3)
    console = Console(file=io.StringIO(), width=80)
    console.print(top.view(window_of(metrics, DAY_S), top.DEFAULT_URL))
    assert re.search(rf"^ *{method} +\d+ ", console.file.getvalue(), re.MULTILINE)


def test_counts_are_since_the_start_and_rates_of_the_window():
    metrics = busy()
    before = look(generate_latest(metrics.registry).decode(), 100.0)
    metrics.request_seconds.labels("fake", "score_cam", "batch", "OK").observe(0.3)
    metrics.masked_queries.labels("fake", "score_cam").inc(6)
    window = Window(look(generate_latest(metrics.registry).decode(), 102.0), before)
    assert top.methods(window).rows[0][:4] == ("score_cam", "11", "0.5", "1")
    assert top.classes(window).rows[2][:3] == ("batch", "11", "0.5")
    models = dict(top.models(window).rows)
    assert (models["queries"], models["queries per s"]) == ("646", "3")


@pytest.fixture
def served():
    server = MetricsServer(busy().registry, "127.0.0.1:0")
    yield f"http://{server.address}/metrics"
    server.stop()


def test_once_prints_the_figures_since_the_start_and_exits(served):
    result = CliRunner().invoke(camserve, ["top", "--once", "--url", served], catch_exceptions=False)
    assert result.exit_code == 0
    assert "since its start" in result.output
    assert re.search(r"score_cam +10 ", result.output)


def test_it_goes_on_until_it_is_stopped(served, monkeypatch):
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(top.time, "sleep", sleep)
    console = Console(file=io.StringIO(), width=100)
    with pytest.raises(KeyboardInterrupt):
        top.show(served, 0.25, once=False, console=console)
    assert waited == [0.25] * 3
    assert console.file.getvalue().count("of the last") == 2


def test_on_a_terminal_it_stays_in_its_place(served, monkeypatch):
    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(top.time, "sleep", sleep)
    console = Console(file=io.StringIO(), width=100, height=40, force_terminal=True)
    with pytest.raises(KeyboardInterrupt):
        top.show(served, 1, once=False, console=console)
    assert console.file.getvalue().count("\x1b[?1049h") == 1  # the alternate screen
    assert "score_cam" in console.file.getvalue()


def test_while_the_gateway_does_not_answer_the_last_figures_stay(served, monkeypatch):
    looks = iter([look("camserve_build_info 1\nprocess_start_time_seconds 1\n", 100.0), Unavailable("it is gone")])

    def scrape(url: str) -> Scrape:
        found = next(looks)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(top, "scrape", scrape)
    monkeypatch.setattr(top.time, "sleep", lambda seconds: None)
    views = top.views_of("http://here", 1)
    console = Console(file=io.StringIO(), width=100)
    for _ in range(2):
        console.print(next(views))
    assert "it is gone" in console.file.getvalue()


def test_where_there_are_no_metrics_it_says_so(served):
    with pytest.raises(Unavailable, match="no metrics at http://127"):
        top.scrape("http://127.0.0.1:1/metrics")
    other = MetricsServer(CollectorRegistry(), "127.0.0.1:0")
    try:
        with pytest.raises(Unavailable, match="not those of a camserve gateway"):
            top.scrape(f"http://{other.address}")
    finally:
        other.stop()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0099, "<0.01"),
        (4e-7, "<0.01"),
        (0.01, "0.01"),
        (0.042, "0.042"),
        (3, "3"),
        (3.25, "3.2"),
        (33.26, "33.3"),
        (1234.5, "1,234"),
        (math.nan, "-"),
    ],
)
def test_numbers_are_short(value, text):
    assert top.number(value) == text
