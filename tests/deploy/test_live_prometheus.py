"""The real Prometheus over the real service: every query has an answer, and an alert fires while a worker is dead.

The service is `camserve serve` with TLS, a TorchServe and a small network of random weights. Prometheus has the rules
of deploy/prometheus, with all durations 60 times shorter.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import sys
import time
import urllib.error
from collections.abc import AsyncIterator
from dataclasses import dataclass

import live
import monitoring
import pytest
import pytest_asyncio

from camserve.archive import build_archive
from camserve.errors import CamserveError

pytestmark = [
    pytest.mark.torchserve,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(180),  # the first test waits for all that happens
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through Linux's /proc"),
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="no prometheus on PATH; Debian has it in the package prometheus"
    ),
]

ALERT = "CamserveNoWorkerReady"


@dataclass
class Seen:
    """What happened, for the tests to look back at."""

    prometheus: live.Prometheus
    start_s: float
    killed_s: float
    end_s: float
    firing_before: set[str]

    def finite(self, expr: str) -> bool:
        """An expression had a value at some moment."""
        series = self.prometheus.series(expr, self.start_s, self.end_s)
        return any(math.isfinite(float(value)) for one in series for _, value in one["values"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seen(tmp_path_factory) -> AsyncIterator[Seen]:
    folder = tmp_path_factory.mktemp("live")
    store = folder / "store"
    await asyncio.to_thread(build_archive, "torchvision:squeezenet1_1", name="small", store=store, weights="random")
    service = live.serve(folder, store)
    try:
        prometheus = live.prometheus(folder, service.metrics_address)
        try:
            yield await _watched(service, prometheus)
        finally:
            prometheus.stop()
    finally:
        service.stop()


async def _watched(service: live.Service, prometheus: live.Prometheus) -> Seen:
    start_s = time.time()
    await live.until(lambda: _answers(service), f"an answer; the log is {service.log}", 90)
    async with live.load(service):
        await live.until(lambda: _healthy(prometheus), "a scraped worker that is READY", 30)
        await asyncio.sleep(8)
        firing_before = {one["labels"]["alertname"] for one in _firing(prometheus)}
        killed_s = time.time()
        await live.until(lambda: _fires_while_killed(service, prometheus), f"{ALERT} fires", 40)
        await live.until(lambda: _resolved(prometheus), f"{ALERT} is resolved", 60)
        await asyncio.sleep(5)
    return Seen(prometheus, start_s, killed_s, time.time(), firing_before)


async def _answers(service: live.Service) -> bool:
    assert service.process.poll() is None, service.log.read_text()
    try:
        async with service.client() as client:
            await client.explain(live.photo(0), timeout_s=10)
    except CamserveError:
        return False
    return True


async def _healthy(prometheus: live.Prometheus) -> bool:
    try:
        return bool(prometheus.ask("query", query="camserve_workers_ready == camserve_workers > 0")["result"])
    except urllib.error.URLError:
        return False


async def _fires_while_killed(service: live.Service, prometheus: live.Prometheus) -> bool:
    for worker in service.workers():  # also those that TorchServe has started since
        worker.kill()
    return "firing" in prometheus.states(ALERT)


async def _resolved(prometheus: live.Prometheus) -> bool:
    return not prometheus.states(ALERT) and await _healthy(prometheus)


def _firing(prometheus: live.Prometheus) -> list[dict]:
    return [one for one in prometheus.ask("alerts")["alerts"] if one["state"] == "firing"]


async def test_an_alert_fires_when_the_worker_is_killed_and_resolves_when_it_is_back(seen):
    (fired,) = seen.prometheus.series(f'ALERTS{{alertname="{ALERT}", alertstate="firing"}}', seen.start_s, seen.end_s)
    times = [moment for moment, _ in fired["values"]]
    assert fired["metric"]["severity"] == "critical"
    assert fired["metric"]["model"] == "small"
    assert seen.killed_s <= min(times) <= max(times) < seen.end_s


async def test_workers_and_targets_give_no_alarm_before(seen):
    assert not seen.firing_before & {ALERT, "CamserveWorkerDown", "CamserveTargetDown", "CamserveAbsent"}


async def test_the_replaced_worker_is_counted(seen):
    (restarts,) = seen.prometheus.series("max_over_time(camserve_worker_restarts_total[1h])", seen.end_s, seen.end_s)
    assert float(restarts["values"][-1][1]) >= 1


@pytest.mark.parametrize(
    "expr",
    ["camserve_masked_queries_total", "camserve_masked_queries_cached_total", "camserve_auto_choices_total"],
)
async def test_the_load_is_seen_in_the_figures(seen, expr):
    found = seen.prometheus.series(f"max(max_over_time({expr}[1h]))", seen.end_s, seen.end_s)
    assert float(found[0]["values"][-1][1]) > 0


@pytest.mark.parametrize(
    "expr", [pytest.param(expr, id=f"{i}-{panel['title']}") for i, (panel, expr) in enumerate(monitoring.targets())]
)
async def test_every_query_of_the_dashboard_returns_data(seen, expr):
    assert seen.finite(monitoring.substituted(expr, interval="10s", range_="60s"))


@pytest.mark.parametrize("record", [rule["record"] for rule in monitoring.recording_rules()])
async def test_every_recording_rule_returns_data(seen, record):
    assert seen.finite(record)


async def test_every_rule_is_evaluated_without_an_error(seen):
    rules = [rule for group in seen.prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(monitoring.recording_rules()) + len(monitoring.alerts())
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []


async def test_exemplars_name_requests(seen):
    found = seen.prometheus.ask(
        "query_exemplars", query="camserve_request_seconds_bucket", start=seen.start_s, end=seen.end_s
    )
    assert {len(exemplar["labels"]["request_id"]) for series in found for exemplar in series["exemplars"]} == {32}


@pytest.mark.parametrize("variable", ["job", "instance", "model", "method", "class"])
async def test_the_variables_of_the_dashboard_have_values(seen, variable):
    text = next(one["query"] for one in monitoring.dashboard()["templating"]["list"] if one["name"] == variable)
    expr = monitoring.substituted(text.removeprefix("label_values(").rpartition(", ")[0])
    series = seen.prometheus.ask("series", **{"match[]": expr, "start": seen.start_s, "end": seen.end_s})
    assert {one[variable] for one in series}
