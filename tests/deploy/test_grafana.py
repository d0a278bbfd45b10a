"""The dashboard is what its program writes, is laid out well, and keeps the rules of grafana's dashboard-linter."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections import Counter

import monitoring
import promql
import promql_parser
import pytest
from monitoring import DASHBOARD, GRAFANA, dashboard, panels, substituted, targets

VARIABLES = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
ROWS = ["Objectives", "Traffic", "Latency", "Queue and planner", "Stages", "Cost in queries", "Saturation", "Process"]
UNITS = {"bytes", "cps", "ops", "percentunit", "reqps", "s", "short"}
"""The part of Grafana's units that is used."""

NOT_BY_INSTANCE = ("model:", "model_class:", "ALERTS")
"""Recorded over all instances; and alerts, which have the labels of whatever they are about."""

each_panel = pytest.mark.parametrize("panel", [pytest.param(panel, id=panel["title"]) for panel in panels()])
each_target = pytest.mark.parametrize(
    "expr", [pytest.param(expr, id=f"{i}-{panel['title']}") for i, (panel, expr) in enumerate(targets())]
)


def test_the_file_is_what_its_program_writes(tmp_path):
    written = tmp_path / "camserve.json"
    subprocess.run([sys.executable, "-B", GRAFANA / "build.py", written], check=True, timeout=60)
    assert written.read_text() == DASHBOARD.read_text(), "run: python deploy/grafana/build.py"


# Layout


def test_the_rows_are_those_that_an_operator_reads_from_top_to_bottom():
    rows = [panel for panel in dashboard()["panels"] if panel["type"] == "row"]
    assert [row["title"] for row in rows] == ROWS
    positions = [row["gridPos"]["y"] for row in rows]
    assert positions == sorted(positions)


def test_panels_fill_the_grid_without_overlap():
    cells = Counter(
        cell
        for panel in dashboard()["panels"]
        for cell in itertools.product(
            range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"]),
            range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"]),
        )
    )
    assert set(cells.values()) == {1}
    assert max(x for x, _ in cells) == 23
    assert all((x, y) in cells for x in range(24) for y in range(max(y for _, y in cells) + 1))


def test_panels_have_numbers_and_titles_of_their_own():
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])
    assert len({panel["title"] for panel in panels()}) == len(panels())


def test_the_dashboard_opens_with_the_last_hour_of_everything():
    board = dashboard()
    assert (board["id"], board["uid"], board["time"]["from"]) == (None, "camserve", "now-1h")
    assert 39 <= board["schemaVersion"] <= 41  # of Grafana 11
    assert board["graphTooltip"] == 1
    assert all(
        variable["current"]["value"] == ["$__all"] for variable in VARIABLES.values() if variable["type"] == "query"
    )


def test_latency_shows_single_requests_and_a_heat_map():
    shown = {panel["title"] for panel in panels() for target in panel["targets"] if target["exemplar"]}
    assert {f"Latency p{share} by method" for share in (50, 95, 99)} <= shown
    heat = next(panel for panel in panels() if panel["type"] == "heatmap")
    assert heat["targets"][0]["format"] == "heatmap"
    assert not heat["options"]["calculate"]  # the buckets are Prometheus's own


# The rules of dashboard-linter, by their names there


def test_template_datasource_rule():
    source = VARIABLES["datasource"]
    assert (source["type"], source["query"], source["label"]) == ("datasource", "prometheus", "Data source")


@pytest.mark.parametrize("name", ["job", "instance", "model", "method", "class"])
def test_template_job_and_template_instance_rules(name):
    variable = VARIABLES[name]
    assert variable["type"] == "query"
    assert variable["datasource"]["uid"] == "${datasource}"
    assert (variable["label"], variable["multi"], variable["includeAll"]) == (name.title(), True, True)
    assert variable["allValue"] == ".+"


def test_template_label_promql_rule():
    for variable in VARIABLES.values():
        if variable["type"] == "query":
            expr, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]).groups()
            (selector,) = promql.selectors(substituted(expr))
            assert label in monitoring.known()[selector.metric].labels


def test_template_on_time_change_reload_rule():
    assert all(variable["refresh"] == 2 for variable in VARIABLES.values() if variable["type"] == "query")


def test_uneditable_dashboard_rule():
    assert dashboard()["editable"] is False


@each_panel
def test_panel_datasource_rule(panel):
    assert {source["datasource"]["uid"] for source in (panel, *panel["targets"])} == {"${datasource}"}


@each_panel
def test_panel_title_description_rule(panel):
    assert panel["title"].strip()
    assert len(panel["description"]) > len(panel["title"])


@each_panel
def test_panel_units_rule(panel):
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS


@each_panel
def test_panel_no_targets_rule(panel):
    assert panel["targets"]


@each_target
def test_target_promql_rule(expr):
    promql_parser.parse(substituted(expr))


@each_target
def test_target_job_and_target_instance_rules(expr):
    for selector in promql.selectors(substituted(expr, variables="$")):
        matched = {matcher.label for matcher in selector.matchers if (matcher.operator, matcher.value) == ("=~", "$")}
        if selector.metric == "ALERTS":
            continue
        assert matched >= ({"job"} if selector.metric.startswith(NOT_BY_INSTANCE) else {"job", "instance"})


@each_target
def test_every_query_follows_the_variables_whose_labels_all_its_metrics_have(expr):
    known = monitoring.known()
    found = [one for one in promql.selectors(substituted(expr, variables="$")) if one.metric != "ALERTS"]
    wanted = frozenset({"model", "method", "class"}).intersection(*(known[one.metric].labels for one in found))
    for selector in found:
        assert {matcher.label for matcher in selector.matchers if matcher.value == "$"} >= wanted


@each_target
def test_target_rate_interval_rule(expr):
    """Also: no irate(), which sees two samples of whatever happened in between."""
    assert "irate" not in promql.functions(substituted(expr))
    marker_s = 421.0
    for selector in promql.selectors(substituted(expr, interval=f"{marker_s:.0f}s")):
        if selector.function == "rate":
            assert selector.range_s == marker_s


@each_target
def test_target_counter_agg_rule(expr):
    for selector in promql.selectors(substituted(expr)):
        if selector.metric.endswith("_total"):
            assert selector.function in ("rate", "increase")
