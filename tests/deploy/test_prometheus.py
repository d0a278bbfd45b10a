"""The rules are valid, complete, tested and documented; what they compute is shown by deploy/prometheus/tests.yml."""

from __future__ import annotations

import re
import runpy
import sys

import monitoring
import promql
import pytest
import yaml
from monitoring import PROMETHEUS, needs_promtool
from prometheus_client import generate_latest

from camserve.gateway.ops.metrics import Metrics

SEVERITIES = {"critical", "warning"}
each_alert = pytest.mark.parametrize(
    "rule", [pytest.param(rule, id=monitoring.alert_id(rule)) for rule in monitoring.alerts()]
)


@needs_promtool
def test_promtool_accepts_configuration_and_rules():
    said = monitoring.promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert "SUCCESS: 2 rule files found" in said
    assert "duplicate" not in monitoring.promtool("check", "rules", *PROMETHEUS.glob("[ar]*.yml"))


@needs_promtool
def test_every_alert_fires_and_is_silent_as_its_unit_tests_say():
    assert "SUCCESS" in monitoring.promtool("test", "rules", PROMETHEUS / "tests.yml")


@needs_promtool
def test_promtool_likes_the_names_units_and_texts_of_the_metrics():
    metrics = Metrics()
    metrics.introduce("lite0")
    metrics.request_seconds.labels("lite0", "grad_cam", "normal", "OK").observe(1)
    assert monitoring.promtool("check", "metrics", given=generate_latest(metrics.registry).decode()) == ""


@each_alert
def test_the_unit_tests_show_an_alert_firing_and_silent(rule):
    tests = yaml.safe_load((PROMETHEUS / "tests.yml").read_text())["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", []) if case["alertname"] == rule["alert"]]
    fired = [labels for case in cases for labels in (alert["exp_labels"].items() for alert in case["exp_alerts"])]
    assert any(rule["labels"].items() <= labels for labels in fired)
    assert any(not case["exp_alerts"] for case in cases)


@each_alert
def test_an_alert_says_how_bad_it_is_what_it_is_and_where_to_read_on(rule):
    assert rule["labels"]["severity"] in SEVERITIES
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert all(rule["annotations"].values())
    anchor = f"docs/operations.md#{rule['alert'].lower()}"
    assert rule["annotations"]["runbook_url"] == "{{ $externalLabels.runbook_base }}" + anchor


def test_every_alert_has_a_section_and_every_section_an_alert():
    headings = re.findall(r"^## (Camserve\w+)$", monitoring.OPERATIONS.read_text(), re.MULTILINE)
    assert sorted(headings) == sorted({rule["alert"] for rule in monitoring.alerts()})


@pytest.mark.parametrize("part", ["Means", "Impact", "Look at", "Do"])
def test_every_section_of_an_alert_has_all_its_parts(part):
    sections = re.split(r"^## ", monitoring.OPERATIONS.read_text(), flags=re.MULTILINE)[1:]
    lacking = [text.split("\n")[0] for text in sections if text.startswith("Camserve") and f"**{part}**" not in text]
    assert lacking == []


def test_recorded_names_say_level_metric_and_operation():
    for rule in monitoring.recording_rules():
        assert re.fullmatch(r"model(_class)?:camserve_[a-z_]+:(max_ratio|(ratio_)?rate\d+[mhd])", rule["record"])


def test_a_recorded_name_tells_the_window_of_its_rule():
    for rule in monitoring.recording_rules():
        window = re.search(r"rate(\d+[mhd])$", rule["record"])
        ranges = {selector.range_s for selector in promql.selectors(rule["expr"]) if selector.range_s}
        assert ranges <= ({_seconds(window[1])} if window else set()), rule["record"]


def test_the_windows_of_an_alert_are_those_of_its_labels():
    for rule in monitoring.alerts():
        if "long_window" in rule["labels"]:
            windows = re.findall(r"ratio_rate(\w+)", rule["expr"])
            assert windows == [rule["labels"]["long_window"], rule["labels"]["short_window"]]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all metrics of the process")
def test_the_table_of_metrics_is_that_of_the_gateway():
    with_table = runpy.run_path(str(PROMETHEUS / "metrics_table.py"))["with_table"]
    page = monitoring.OPERATIONS.read_text()
    command = "python deploy/prometheus/metrics_table.py docs/operations.md"
    assert with_table(page) == page, f"run: {command}"


def _seconds(window: str) -> float:
    return float(window[:-1]) * {"m": 60, "h": 3600, "d": 86400}[window[-1]]
