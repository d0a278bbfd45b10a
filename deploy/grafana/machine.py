"""Defines the rows about what the work runs on: workers and their devices, the gateway's process."""

from __future__ import annotations

from panels import Panel, Query, Threshold
from queries import MODEL, TARGET, gauge, rate, total_rate

_SATURATION = (
    Panel(
        "Requests in flight",
        "Explain calls that are being answered, by class.",
        "short",
        (Query(gauge("camserve_requests_in_flight", f'{TARGET}, class=~"$class"', "class"), "{{class}}"),),
        stacked=True,
    ),
    Panel(
        "Steps in flight",
        "Steps that were sent and not answered. With as many as workers take, new work waits.",
        "short",
        (Query(gauge("camserve_steps_in_flight", MODEL, "instance, model"), "{{instance}} {{model}}"),),
    ),
    Panel(
        "Workers",
        "Workers that TorchServe is to run, and those that are READY. Quarantined: TorchServes that lose their steps.",
        "short",
        (
            Query(gauge("camserve_workers", MODEL, "model"), "{{model}} wanted"),
            Query(gauge("camserve_workers_ready", MODEL, "model"), "{{model}} ready"),
            Query(gauge("camserve_backends_quarantined", MODEL, "model"), "{{model}} quarantined"),
        ),
    ),
    Panel(
        "Restarts of workers",
        "Workers in whose place another process became READY, within the last ten minutes.",
        "short",
        (
            Query(
                f"sum by (instance, model) (increase(camserve_worker_restarts_total{{{MODEL}}}[10m]))",
                "{{instance}} {{model}}",
            ),
        ),
        decimals=0,
    ),
    Panel(
        "Memory of the devices",
        "Share in use: of a GPU's memory, or on a CPU what the worker holds of the machine's or container's. An alert "
        "fires above 95 %.",
        "percentunit",
        (
            Query(
                f"camserve_device_memory_used_bytes{{{MODEL}}} / camserve_device_memory_limit_bytes{{{MODEL}}}",
                "{{instance}} {{model}} {{device}}",
            ),
        ),
        greatest=1,
        thresholds=(Threshold(None, "transparent"), Threshold(0.95, "red")),
    ),
    Panel(
        "Memory in use on the devices",
        "Bytes in use on the device of the worker that answered last; on a CPU the worker's resident memory.",
        "bytes",
        (
            Query(
                gauge("camserve_device_memory_used_bytes", MODEL, "instance, model, device"),
                "{{instance}} {{model}} {{device}}",
            ),
        ),
    ),
)

_PROCESS = (
    Panel(
        "CPU of the gateway",
        "Cores that a gateway's process uses. It has one event loop: near 1 it is the bottleneck.",
        "short",
        (Query(f"sum by (instance) ({rate('process_cpu_seconds_total', TARGET)})", "{{instance}}"),),
        width=6,
    ),
    Panel(
        "Stalls of the event loop",
        "How late the gateway's event loop was, at worst of a hundred times: nobody is served meanwhile. An alert "
        "fires when half a second is passed again and again.",
        "s",
        (
            Query(
                "histogram_quantile(0.99, sum by (le, instance) ("
                f"{rate('camserve_event_loop_stall_seconds_bucket', TARGET)}))",
                "{{instance}}",
            ),
        ),
        width=6,
    ),
    Panel(
        "Bytes in flight",
        "Bytes of the requests that are being answered, with their replies until they are delivered. What passes half "
        "of max_bytes_in_flight is refused.",
        "bytes",
        (Query(gauge("camserve_bytes_in_flight", TARGET, "instance"), "{{instance}}"),),
        width=6,
    ),
    Panel(
        "Memory of the gateway",
        "Resident memory of a gateway's process.",
        "bytes",
        (Query(gauge("process_resident_memory_bytes", TARGET, "instance"), "{{instance}}"),),
        width=6,
    ),
    Panel(
        "Open file descriptors",
        "Share of the descriptors that the process may have. An alert fires above 80 %. "
        "When none is left, new connections wait.",
        "percentunit",
        (Query(f"process_open_fds{{{TARGET}}} / process_max_fds{{{TARGET}}}", "{{instance}}"),),
        greatest=1,
        width=6,
        thresholds=(Threshold(None, "transparent"), Threshold(0.8, "red")),
    ),
    Panel(
        "Lost lines of the log",
        "Lines that were not written: they came too fast, or nobody reads the gateway's stderr.",
        "cps",
        (Query(total_rate("camserve_log_lines_lost_total", TARGET, "instance"), "{{instance}}"),),
        width=6,
    ),
    Panel(
        "Evidence records",
        "Records written to evidence logs, and replies that were withheld since theirs could not be written.",
        "cps",
        (
            Query(total_rate("camserve_evidence_records_total", TARGET, "instance"), "{{instance}}, written"),
            Query(total_rate("camserve_evidence_failures_total", TARGET, "instance"), "{{instance}}, withheld"),
        ),
        width=6,
    ),
    Panel(
        "Garbage collections",
        "Runs of Python's collector; those of generation 2 stop everything for longest.",
        "cps",
        (Query(total_rate("python_gc_collections_total", TARGET, "generation"), "generation {{generation}}"),),
        width=6,
    ),
    Panel(
        "Time since start",
        "Age of each gateway's process.",
        "s",
        (Query(f"time() - process_start_time_seconds{{{TARGET}}}", "{{instance}}"),),
        width=6,
    ),
    Panel(
        "Releases",
        "What runs, and on how many instances.",
        "short",
        (Query(f"count by (version) (camserve_build_info{{{TARGET}}})", "{{version}}"),),
        kind="stat",
        width=6,
    ),
    Panel(
        "Certificate",
        "Until the first of the served certificates ends; none without TLS.",
        "s",
        (Query(f"min(camserve_certificate_expiry_timestamp_seconds{{{TARGET}}}) - time()"),),
        kind="stat",
        width=12,
        thresholds=(Threshold(None, "red"), Threshold(14 * 86400, "green")),
    ),
)

MACHINE_ROWS = {"Saturation": _SATURATION, "Process": _PROCESS}
