"""Defines the rows about how the work is done: queue and planner, stages, cost in queries."""

from __future__ import annotations

from panels import Panel, Query, Threshold
from queries import ANSWERED, METHOD, MODEL, RECORDED, gauge, mean, quantile, total_rate

_CLASS = f'{MODEL}, class=~"$class"'
_HIT = f'{MODEL}, outcome="hit"'
_MADE = "camserve_masked_queries_total"
_WASTED = "camserve_masked_queries_wasted_total"
_CACHED = "camserve_masked_queries_cached_total"


_QUEUE = (
    Panel(
        "Waiting masked queries",
        "Masked queries that no worker has been sent yet. What one costs depends on the method; the panel beside this "
        "one counts seconds.",
        "short",
        (Query(gauge("camserve_waiting_queries", MODEL, "model"), "{{model}}"),),
        width=6,
    ),
    Panel(
        "Waiting work",
        "Seconds for which one worker would be busy with the work that has not been sent yet, by prediction: openings, "
        "gradients and masked queries alike. Autoscalers look at this.",
        "s",
        (Query(gauge("camserve_waiting_work_seconds", MODEL, "model"), "{{model}}"),),
        width=6,
    ),
    Panel(
        "Time until the waiting work is done",
        "By prediction, if all READY workers do nothing else; of the gateway where it takes longest. An alert fires "
        "above two minutes, and a gateway refuses what would make it more than `max_waiting_s`. From the recording "
        "rules.",
        "s",
        (Query(f"model:camserve_waiting_work_seconds_per_workers_ready:max_ratio{{{RECORDED}}}", "{{model}}"),),
        width=6,
        thresholds=(Threshold(None, "transparent"), Threshold(120, "orange")),
    ),
    Panel(
        "Wait in the queue, p95 by class",
        "95 % of the requests of a class waited at most this time until the first of their work was sent.",
        "s",
        (Query(quantile(0.95, "camserve_queue_seconds", _CLASS, "class"), "{{class}}"),),
        width=6,
    ),
    Panel(
        "Time of a step",
        "From sending a step to its answer. The planner aims at the target time of the settings.",
        "s",
        (
            Query(quantile(0.5, "camserve_step_seconds", MODEL, "model"), "{{model}} p50"),
            Query(quantile(0.95, "camserve_step_seconds", MODEL, "model"), "{{model}} p95"),
        ),
    ),
    Panel(
        "Size of a step",
        "Mean number of masked queries in a step, and of requests that share it.",
        "short",
        (
            Query(mean("camserve_step_queries", MODEL, "model"), "{{model}} queries"),
            Query(mean("camserve_step_items", MODEL, "model"), "{{model}} requests"),
        ),
    ),
    Panel(
        "Fill of a step",
        "Mean predicted time of a step with masked queries, in proportion to the time that it may take. Little while "
        "work waits means that something else bounds the steps: requests, bytes, or one request's share. More than "
        "100 % means that single passes take longer than a step shall.",
        "percentunit",
        (Query(mean("camserve_step_fill_ratio", MODEL, "model"), "{{model}}"),),
    ),
    Panel(
        "Steps",
        "Steps that workers were sent, items of lost steps that were sent again, and images that were sent again since "
        "a worker had not kept them.",
        "ops",
        (
            Query(total_rate("camserve_step_seconds_count", MODEL, "model"), "{{model}} ended"),
            Query(total_rate("camserve_step_retries_total", MODEL, "model"), "{{model}} sent again"),
            Query(total_rate("camserve_image_resends_total", MODEL, "model"), "{{model}} images sent again"),
        ),
    ),
    Panel(
        "Share of time spent on planning",
        "Of one CPU core, by instance. Planning runs in the gateway's only event loop: much of it delays everything.",
        "percentunit",
        (Query(total_rate("camserve_planning_seconds_total", MODEL, "instance, model"), "{{instance}} {{model}}"),),
    ),
    Panel(
        "Oldest request",
        "Age of the oldest request that is being answered. An alert fires when it grows while no worker answers.",
        "s",
        (Query(gauge("camserve_oldest_request_seconds", MODEL, "instance, model", "max"), "{{instance}} {{model}}"),),
    ),
)

_STAGES = (
    Panel(
        "Mean time by stage",
        "Where an answered request spent its time, on average.",
        "s",
        (Query(mean("camserve_stage_seconds", METHOD, "stage"), "{{stage}}"),),
        stacked=True,
        width=12,
    ),
    Panel(
        "p95 by stage",
        "95 % of the answered requests spent at most this time in a stage.",
        "s",
        (Query(quantile(0.95, "camserve_stage_seconds", METHOD, "stage"), "{{stage}}"),),
        width=12,
    ),
)

_COST = (
    Panel(
        "Masked queries by method",
        "Masked forward passes made for answers: the unit in which cost is counted.",
        "cps",
        (Query(total_rate(_MADE, METHOD, "method"), "{{method}}"),),
        stacked=True,
    ),
    Panel(
        "Masked queries of an answer",
        "Mean number of masked queries behind an answered request, by method.",
        "short",
        (
            Query(
                f"{total_rate(_MADE, METHOD, 'method')} "
                f"/ {total_rate('camserve_request_seconds_count', ANSWERED, 'method')}",
                "{{method}}",
            ),
        ),
    ),
    Panel(
        "Wasted and saved queries",
        "Masked queries made for nobody (their request had ended), and those not made since the reply was kept.",
        "cps",
        (
            Query(total_rate(_WASTED, MODEL, "model"), "{{model}} wasted"),
            Query(total_rate(_CACHED, MODEL, "model"), "{{model}} saved"),
        ),
    ),
    Panel(
        "Share of wasted queries",
        "Of all masked queries that were made. Short deadlines, cancelled calls and lost steps waste.",
        "percentunit",
        (Query(f"{total_rate(_WASTED, MODEL)} / ({total_rate(_WASTED, MODEL)} + {total_rate(_MADE, MODEL)})"),),
        width=12,
    ),
    Panel(
        "Hits of the workers' caches",
        "Share of the decoded images and forward passes that a worker still had from an earlier step.",
        "percentunit",
        (
            Query(
                f"{total_rate('camserve_worker_cache_total', _HIT, 'model')} "
                f"/ {total_rate('camserve_worker_cache_total', MODEL, 'model')}",
                "{{model}}",
            ),
        ),
        width=12,
        greatest=1,
    ),
)

WORK_ROWS = {"Queue and planner": _QUEUE, "Stages": _STAGES, "Cost in queries": _COST}
