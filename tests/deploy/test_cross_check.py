"""Dashboard, rules and autoscalers ask only for what the gateway exports; all that it exports is asked for."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import monitoring
import promql
import pytest
import yaml
from prometheus_client.utils import floatToGoString

from camserve.gateway.ops.metrics import REFUSALS, SECONDS, SEVERAL, STAGES, UNKNOWN, catalogue
from camserve.methods import METHODS
from camserve.planning.limits import CLASSES
from camserve.types import Layer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all metrics of the process")

KUBERNETES = monitoring.ROOT / "deploy" / "kubernetes"
KNOWN = monitoring.known()
LABELS = {name: series.labels for name, series in KNOWN.items()}

RISING = {"rate", "increase"}
"""What may be asked of a counter; `absent` and `count` look at no value."""

VALUES: dict[str, set[str]] = {
    "class": {*CLASSES, UNKNOWN},
    "code": {code.name for code in grpc.StatusCode},
    "le": {floatToGoString(bound) for bound in SECONDS},
    "method": {*METHODS, SEVERAL, UNKNOWN},
    "outcome": {"hit", "shared", "miss"},
    "reason": set(REFUSALS),
    "stage": set(STAGES),
}


def _manifests() -> Iterator[dict[str, Any]]:
    for path in sorted(KUBERNETES.rglob("*.yaml")):
        yield from (one for one in yaml.safe_load_all(path.read_text()) if isinstance(one, dict))  # a patch is a list


def _autoscalers() -> Iterator[tuple[str, str]]:
    """Name and PromQL of what the autoscalers ask."""
    for manifest in _manifests():
        spec = manifest.get("spec") or {}
        if manifest.get("kind") == "HorizontalPodAutoscaler":
            for metric in spec.get("metrics", []):
                if metric["type"] in ("Pods", "External"):
                    yield "HPA", metric[metric["type"].lower()]["metric"]["name"]
        if manifest.get("kind") == "ScaledObject":
            for trigger in spec.get("triggers", []):
                if trigger["type"] == "prometheus":
                    yield "KEDA", trigger["metadata"]["query"]


EXPRESSIONS = [
    *((f"panel {panel['title']}", monitoring.substituted(expr)) for panel, expr in monitoring.targets()),
    *((one["name"], monitoring.substituted(one["expr"])) for one in monitoring.dashboard()["annotations"]["list"]),
    *((rule["record"], rule["expr"]) for rule in monitoring.recording_rules()),
    *((monitoring.alert_id(rule), rule["expr"]) for rule in monitoring.alerts()),
    *_autoscalers(),
]
each_expression = pytest.mark.parametrize(
    "expr", [pytest.param(expr, id=f"{i}-{name}") for i, (name, expr) in enumerate(EXPRESSIONS)]
)


@each_expression
def test_every_metric_and_label_exists_and_both_sides_can_match(expr):
    promql.labels(expr, LABELS)


@each_expression
def test_counters_are_asked_how_fast_they_rise_and_gauges_are_not(expr):
    for selector in promql.selectors(expr):
        kind = KNOWN[selector.metric].kind
        if kind == "counter":
            assert selector.function in RISING, f"{selector.metric} is a counter"
        else:
            assert selector.function not in RISING, f"{selector.metric} is a {kind}"


@each_expression
def test_labels_are_compared_with_values_that_they_can_have(expr):
    for selector in promql.selectors(expr):
        for matcher in selector.matchers:
            if matcher.label in VALUES and matcher.value != ".+" and not matcher.value.startswith("$"):
                assert set(matcher.value.split("|")) <= VALUES[matcher.label], matcher


@each_expression
def test_quantiles_are_made_of_buckets(expr):
    if "histogram_quantile" in promql.functions(expr):
        assert all(selector.metric.endswith("_bucket") for selector in promql.selectors(expr))


def test_both_kinds_of_autoscaler_are_among_the_checked():
    assert {name for name, _ in _autoscalers()} == {"HPA", "KEDA"}


def test_every_name_in_a_manifest_that_looks_like_a_metric_is_one():
    for path in sorted(KUBERNETES.rglob("*.yaml")):
        for name in re.findall(r"(?:\w+:)?\bcamserve_\w+(?::\w+)?", path.read_text()):
            assert name in KNOWN, f"{path}: {name}"


def test_every_metric_of_the_service_is_on_the_dashboard_or_in_a_rule():
    asked = {selector.metric for _, expr in EXPRESSIONS for selector in promql.selectors(expr)}
    for name in catalogue():
        if name.startswith("camserve_"):
            assert asked & {name, f"{name}_bucket", f"{name}_sum", f"{name}_count"}, f"nobody looks at {name}"


def test_every_recording_rule_is_used():
    asked = {selector.metric for _, expr in EXPRESSIONS for selector in promql.selectors(expr)}
    assert {rule["record"] for rule in monitoring.recording_rules()} <= asked


def test_the_labels_in_the_texts_of_an_alert_are_those_of_its_series():
    for rule in monitoring.alerts():
        labels = promql.labels(rule["expr"], LABELS) | rule["labels"].keys()
        named = set(itertools.chain(*(re.findall(r"\$labels\.(\w+)", text) for text in rule["annotations"].values())))
        assert named <= labels, rule["alert"]


def test_the_interactive_objective_covers_the_methods_of_one_pass():
    quick = {name for name, spec in METHODS.items() if spec.default_passes(Layer("layer", 1280, 7, 7)) <= 1}
    for rule in monitoring.recording_rules():
        for selector in promql.selectors(rule["expr"]):
            for matcher in selector.matchers:
                if matcher.label == "method":
                    assert set(matcher.value.split("|")) == quick
