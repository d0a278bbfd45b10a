"""Describes panels, and writes them down as Grafana does. Nothing here knows a metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24
HEIGHT = 8
GRAFANA = "11.0.0"

Json = dict[str, Any]
Kind = Literal["timeseries", "stat", "heatmap"]


@dataclass(frozen=True)
class Query:
    """Holds one PromQL query of a panel."""

    expr: str
    legend: str = ""
    exemplars: bool = False
    """Whether the exemplars of the query's buckets are shown."""


@dataclass(frozen=True)
class Threshold:
    """Gives figures from `value` on, up to the next threshold, a colour; a time series gets a line there."""

    value: float | None
    """Least value that has the colour; None: the lowest there is."""
    color: str


@dataclass(frozen=True)
class Panel:
    """Describes one panel; `width` counts of 24 columns, `height` Grafana's rows of 30 pixels."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    width: int = 8
    height: int = HEIGHT
    stacked: bool = False
    thresholds: tuple[Threshold, ...] = ()
    greatest: float | None = None
    """End of the axis; None: the figures decide."""
    decimals: int | None = None


def panel(one: Panel, number: int, x: int, y: int) -> Json:
    """Returns a panel as Grafana writes it, at column `x` and row `y`."""
    return {
        "id": number,
        "type": one.kind,
        "title": one.title,
        "description": one.description,
        "datasource": DATASOURCE,
        "pluginVersion": GRAFANA,
        "gridPos": {"x": x, "y": y, "w": one.width, "h": one.height},
        "targets": [_target(one, query, chr(ord("A") + i)) for i, query in enumerate(one.queries)],
        "fieldConfig": {"defaults": _FIELDS[one.kind](one), "overrides": []},
        "options": _OPTIONS[one.kind](one),
    }


def row(title: str, number: int, y: int) -> Json:
    """Returns the heading of the panels that follow, as Grafana writes it."""
    position = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": position, "panels": []}


def _target(one: Panel, query: Query, letter: str) -> Json:
    at_once = one.kind == "stat"
    return {
        "refId": letter,
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
        "format": "heatmap" if one.kind == "heatmap" else "time_series",
        "instant": at_once,
        "range": not at_once,
        "exemplar": query.exemplars,
    }


def _common(one: Panel) -> Json:
    fields: Json = {"unit": one.unit, "color": {"mode": "palette-classic"}}
    if one.greatest is not None:
        fields["max"] = one.greatest
    if one.decimals is not None:
        fields["decimals"] = one.decimals
    if one.thresholds:
        fields["thresholds"] = {"mode": "absolute", "steps": [_step(threshold) for threshold in one.thresholds]}
    return fields


def _step(threshold: Threshold) -> Json:
    return {"value": threshold.value, "color": threshold.color}


def _series_fields(one: Panel) -> Json:
    custom = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 40 if one.stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if one.stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if one.thresholds else "off"},
    }
    return {**_common(one), "min": 0, "custom": custom}


def _stat_fields(one: Panel) -> Json:
    colors = {"mode": "thresholds"} if one.thresholds else {"mode": "fixed", "fixedColor": "text"}
    return {**_common(one), "color": colors, "noValue": "none"}


def _heatmap_fields(one: Panel) -> Json:
    return {"unit": one.unit, "custom": {"hideFrom": {"legend": False, "tooltip": False, "viz": False}}}


def _series_options(one: Panel) -> Json:
    return {
        "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull", "max"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def _stat_options(one: Panel) -> Json:
    return {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "auto",
    }


def _heatmap_options(one: Panel) -> Json:
    return {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "scale": "exponential", "exponent": 0.5, "steps": 64},
        "yAxis": {"unit": one.unit, "axisPlacement": "left", "reverse": False},
        "rowsFrame": {"layout": "auto"},
        "tooltip": {"mode": "single", "yHistogram": False},
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "legend": {"show": True},
        "filterValues": {"le": 1e-9},
    }


_FIELDS = {"timeseries": _series_fields, "stat": _stat_fields, "heatmap": _heatmap_fields}
_OPTIONS = {"timeseries": _series_options, "stat": _stat_options, "heatmap": _heatmap_options}
