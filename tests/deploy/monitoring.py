"""The files that watch over camserve, read for the tests: metrics, rules, dashboard."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql
import pytest
import yaml

from camserve.gateway.ops.metrics import catalogue

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARD = GRAFANA / "camserve.json"
OPERATIONS = ROOT / "docs" / "operations.md"

TARGET_LABELS = frozenset({"job", "instance", "namespace", "pod"})
"""What Prometheus puts on everything it scrapes; `namespace` and `pod` only in Kubernetes."""

ALERT_LABELS = frozenset({"alertname", "alertstate", "severity"})


@dataclass(frozen=True)
class Series:
    """What a name in PromQL stands for."""

    kind: str
    """counter (rising, with _bucket, _sum and _count of histograms), gauge or info."""
    labels: promql.Labels


def exported() -> dict[str, Series]:
    """Every series of a gateway, by the name that PromQL knows it by."""
    return {
        series: Series("counter" if kind == "histogram" else kind, frozenset(labels) | extra | TARGET_LABELS)
        for name, (kind, labels) in catalogue().items()
        for series, extra in _series(name, kind)
    }


def _series(name: str, kind: str) -> list[tuple[str, frozenset[str]]]:
    if kind != "histogram":
        return [(name, frozenset())]
    return [(f"{name}_bucket", frozenset({"le"})), (f"{name}_sum", frozenset()), (f"{name}_count", frozenset())]


def known() -> dict[str, Series]:
    """What is exported, what the recording rules make of it, and what Prometheus itself adds."""
    found = exported() | {"up": Series("gauge", TARGET_LABELS), "ALERTS": Series("gauge", ALERT_LABELS)}
    for rule in recording_rules():
        labels = promql.labels(rule["expr"], {name: series.labels for name, series in found.items()})
        found[rule["record"]] = Series("gauge", (labels or frozenset()) | rule.get("labels", {}).keys())
    return found


def groups(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load((PROMETHEUS / name).read_text())["groups"])


def recording_rules() -> list[dict[str, Any]]:
    return [rule for group in groups("recording.yml") for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for group in groups("alerts.yml") for rule in group["rules"]]


def alert_id(rule: dict[str, Any]) -> str:
    """Tells the rules of one alert apart."""
    labels = rule["labels"]
    return "-".join([rule["alert"], labels["severity"], *filter(None, [labels.get("long_window")])])


def dashboard() -> dict[str, Any]:
    return dict(json.loads(DASHBOARD.read_text()))


def panels() -> list[dict[str, Any]]:
    """The panels that show something: rows are left out."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def targets() -> Iterator[tuple[dict[str, Any], str]]:
    """Every query with its panel, as it stands in the dashboard."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel, target["expr"]


def substituted(expr: str, interval: str = "5m", variables: str = ".+", range_: str = "1h") -> str:
    """A dashboard's query as Prometheus gets it."""
    for name, value in {"$__rate_interval": interval, "$__range": range_}.items():
        expr = expr.replace(name, value)
    for variable in dashboard()["templating"]["list"]:
        expr = expr.replace(f"${variable['name']}", variables)
    return expr


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool on PATH; Debian has it in the package prometheus"
)


def promtool(*arguments: str | Path, given: str = "") -> str:
    """What promtool prints when it is given a text to read; fails the test where it is not content."""
    command = ["promtool", *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
