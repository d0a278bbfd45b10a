"""Defines the rows about what callers notice: objectives, traffic, latency."""

from __future__ import annotations

from panels import Panel, Query, Threshold
from queries import ANSWERED, CALL, MODEL, RECORDED, over_range, quantile, total_rate

_CALLS = "camserve_request_seconds_count"
_JUDGED = f'{CALL}, code=~"OK|DEADLINE_EXCEEDED|UNAVAILABLE|INTERNAL|UNKNOWN"'
_FAILED = f'{CALL}, code=~"UNAVAILABLE|INTERNAL|UNKNOWN"'
_MISSED = f'{CALL}, code="DEADLINE_EXCEEDED"'
_HOPELESS = f'{MODEL}, reason="deadline"'

_FAILURES = "model:camserve_request_failures_per_requests:ratio_rate"
_LATE = "model_class:camserve_late_requests_per_requests:ratio_rate"
_RECORDED_CALLS = f'{RECORDED}, class=~"$class"'

_BURNS = (Threshold(None, "transparent"), Threshold(6, "orange"), Threshold(14.4, "red"))

_OBJECTIVES = (
    Panel(
        "Availability",
        "Share of the requests in the time range that did not fail through the service's fault (UNAVAILABLE, INTERNAL, "
        "UNKNOWN). What clients did wrong, and what was refused, does not count. Objective: 99.9 %.",
        "percentunit",
        (Query(f"1 - ({over_range(_CALLS, _FAILED)} or vector(0)) / {over_range(_CALLS, _JUDGED)}"),),
        kind="stat",
        width=6,
        height=5,
        thresholds=(Threshold(None, "red"), Threshold(0.999, "green")),
        decimals=3,
    ),
    Panel(
        "Late in the last hour",
        "Share of the requests of each class that took longer than their objective: interactive 1 s (methods of one "
        "pass), normal 10 s, batch 120 s. Objective: 5 %. From the recording rules.",
        "percentunit",
        (Query(f"max by (class) ({_LATE}1h{{{_RECORDED_CALLS}}})", "{{class}}"),),
        kind="stat",
        width=10,
        height=5,
        thresholds=(Threshold(None, "green"), Threshold(0.05, "red")),
        decimals=1,
    ),
    Panel(
        "Alerts firing",
        "camserve's alerts that fire now; docs/operations.md says of each what to do.",
        "short",
        (Query('sum(ALERTS{alertname=~"Camserve.+", alertstate="firing"}) or vector(0)'),),
        kind="stat",
        width=4,
        height=5,
        thresholds=(Threshold(None, "green"), Threshold(1, "red")),
    ),
    Panel(
        "Workers ready",
        "Workers that are READY, of those that TorchServe is to run.",
        "percentunit",
        (Query(f"sum(camserve_workers_ready{{{MODEL}}}) / sum(camserve_workers{{{MODEL}}})"),),
        kind="stat",
        width=4,
        height=5,
        thresholds=(Threshold(None, "red"), Threshold(1, "green")),
    ),
    Panel(
        "Burn rate of the error budget",
        "How many times faster than allowed failures use up the budget of 0.1 %. An alert fires above 14.4 for an "
        "hour's mean, above 6 for that of six hours. From the recording rules.",
        "short",
        tuple(
            Query(f"{_FAILURES}{window}{{{RECORDED}}} / 0.001", f"{{{{model}}}}, {window}")
            for window in ("5m", "1h", "6h")
        ),
        width=12,
        thresholds=_BURNS,
    ),
    Panel(
        "Burn rate of the latency budget",
        "How many times faster than allowed late requests use up the budget of 5 %. An alert fires above 14.4 for an "
        "hour's mean, above 6 for that of six hours. From the recording rules.",
        "short",
        tuple(
            Query(f"{_LATE}{window}{{{_RECORDED_CALLS}}} / 0.05", f"{{{{model}}}} {{{{class}}}}, {window}")
            for window in ("1h", "6h")
        ),
        width=12,
        thresholds=_BURNS,
    ),
)

_TRAFFIC = (
    Panel(
        "Requests by method",
        "Explain calls that ended, however they ended.",
        "reqps",
        (Query(total_rate(_CALLS, CALL, "method"), "{{method}}"),),
        stacked=True,
    ),
    Panel(
        "Requests by status",
        "Explain calls by gRPC status. UNAVAILABLE, INTERNAL and UNKNOWN are the service's fault.",
        "reqps",
        (Query(total_rate(_CALLS, CALL, "code"), "{{code}}"),),
        stacked=True,
    ),
    Panel(
        "Requests by class",
        "Explain calls by priority class.",
        "reqps",
        (Query(total_rate(_CALLS, CALL, "class"), "{{class}}"),),
        stacked=True,
    ),
    Panel(
        "Refusals",
        "Calls that were refused before any work: too many at once (requests), too much work waiting (work), no hope "
        "to keep the deadline (deadline); token_* are the bounds of one token.",
        "reqps",
        (Query(total_rate("camserve_refusals_total", MODEL, "reason"), "{{reason}}"),),
        stacked=True,
        width=6,
    ),
    Panel(
        "Deadlines that were not kept",
        "Share of the requests that ended at their deadline with nothing, that were refused since it could not be "
        "kept, and that were answered with what was known by then.",
        "percentunit",
        (
            Query(f"({total_rate(_CALLS, _MISSED)} or vector(0)) / {total_rate(_CALLS, CALL)}", "missed"),
            Query(f"{total_rate('camserve_refusals_total', _HOPELESS)} / {total_rate(_CALLS, MODEL)}", "refused"),
            Query(f"{total_rate('camserve_partial_answers_total', MODEL)} / {total_rate(_CALLS, MODEL)}", "partial"),
        ),
        width=6,
    ),
    Panel(
        "What AUTO chose",
        "Requests for `auto`, by the method that it found affordable.",
        "reqps",
        (Query(total_rate("camserve_auto_choices_total", MODEL, "choice"), "{{choice}}"),),
        stacked=True,
        width=6,
    ),
    Panel(
        "Result cache",
        "Requests whose reply was kept (hit), was just being made for another (shared) or had to be made (miss).",
        "reqps",
        (Query(total_rate("camserve_result_cache_total", MODEL, "outcome"), "{{outcome}}"),),
        stacked=True,
        width=6,
    ),
)

_LATENCY = (
    *(
        Panel(
            f"Latency p{round(100 * share)} by method",
            f"{round(100 * share)} % of the answered requests of a method took at most this time, from arrival to "
            "answer. The points are single requests; each names the request id by which the log finds it.",
            "s",
            (Query(quantile(share, "camserve_request_seconds", ANSWERED, "method"), "{{method}}", exemplars=True),),
        )
        for share in (0.5, 0.95, 0.99)
    ),
    Panel(
        "Latency of all answered requests",
        "How many requests took how long. Choose a method above to see one alone.",
        "s",
        (Query(total_rate("camserve_request_seconds_bucket", ANSWERED, "le"), "{{le}}", exemplars=True),),
        kind="heatmap",
        width=12,
        height=10,
    ),
    Panel(
        "Latency p95 by class",
        "95 % of the answered requests of a class took at most this time.",
        "s",
        (Query(quantile(0.95, "camserve_request_seconds", ANSWERED, "class"), "{{class}}", exemplars=True),),
        width=12,
        height=10,
    ),
)

SERVICE_ROWS = {"Objectives": _OBJECTIVES, "Traffic": _TRAFFIC, "Latency": _LATENCY}
