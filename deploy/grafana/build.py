"""Writes the dashboard: `python deploy/grafana/build.py [FILE]`, by default camserve.json beside this file.

The panels are in `service.py` (what callers notice), `work.py` (how it is done) and `machine.py` (what it runs on);
`queries.py` builds the expressions of their queries, `panels.py` writes them down. Needs Python only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from machine import MACHINE_ROWS
from panels import COLUMNS, DATASOURCE, Json, Panel, panel, row
from service import SERVICE_ROWS
from work import WORK_ROWS

FILE = Path(__file__).with_name("camserve.json")
SCHEMA_VERSION = 39
"""Version of the schema in Grafana 11.0; later releases bring it up to date themselves."""

Placed = tuple[Panel, int, int]
"""A panel with its column and row."""


def dashboard() -> Json:
    """Returns the whole dashboard."""
    return {
        "uid": "camserve",
        "id": None,
        "title": "camserve",
        "description": "Saliency maps over gRPC: what callers get, how long it takes, and what it costs.",
        "tags": ["camserve"],
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "schemaVersion": SCHEMA_VERSION,
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "timepicker": {},
        "links": [],
        "annotations": {"list": [_releases()]},
        "templating": {"list": [_datasource(), *_variables()]},
        "panels": list(_panels()),
    }


def text() -> str:
    """Returns the dashboard as the file has it."""
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


def _panels() -> Iterator[Json]:
    y = number = 0
    for title, members in {**SERVICE_ROWS, **WORK_ROWS, **MACHINE_ROWS}.items():
        number += 1
        yield row(title, number, y)
        placed = list(_flowed(members, y + 1))
        for one, x, at in placed:
            number += 1
            yield panel(one, number, x, at)
        y = max(at + one.height for one, _, at in placed)


def _flowed(members: tuple[Panel, ...], y: int) -> Iterator[Placed]:
    """Yields the panels from left to right; one that does not fit begins a new line below the highest of the last."""
    x = height = 0
    for one in members:
        if x + one.width > COLUMNS:
            x, y, height = 0, y + height, 0
        yield one, x, y
        x, height = x + one.width, max(height, one.height)


def _datasource() -> Json:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "refresh": 1,
        "hide": 0,
        "current": {},
        "options": [],
        "regex": "",
    }


def _variables() -> list[Json]:
    target = 'job=~"$job", instance=~"$instance"'
    return [
        _variable("job", "Job", "label_values(camserve_build_info, job)"),
        _variable("instance", "Instance", 'label_values(camserve_build_info{job=~"$job"}, instance)'),
        _variable("model", "Model", f"label_values(camserve_workers{{{target}}}, model)"),
        _variable(
            "method", "Method", f'label_values(camserve_request_seconds_count{{{target}, model=~"$model"}}, method)'
        ),
        _variable("class", "Class", f"label_values(camserve_requests_in_flight{{{target}}}, class)"),
    ]


def _variable(name: str, label: str, query: str) -> Json:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": query,
        "definition": query,
        "refresh": 2,  # whenever the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
        "options": [],
        "regex": "",
    }


def _releases() -> Json:
    """Returns the annotation that marks when a release appears that did not run before."""
    builds = 'camserve_build_info{job=~"$job"}'
    return {
        "name": "New release",
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": "blue",
        "expr": f"count by (version) ({builds}) unless count by (version) ({builds} offset 5m)",
        "step": "60s",
        "titleFormat": "Release {{version}}",
        "textFormat": "",
        "tagKeys": "version",
    }


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else FILE).write_text(text(), encoding="utf-8")
