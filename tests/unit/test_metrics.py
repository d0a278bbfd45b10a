"""The metrics as a whole: names, types, labels, and what is exposed before anything has happened."""

import re

import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from camserve.gateway.ops.metrics import REFUSALS, UNKNOWN, Metrics, catalogue, exemplar, method_label

UNITS = ("_seconds", "_bytes", "_ratio", "_total", "_info")
COUNTS = ("_queries", "_items", "_in_flight", "camserve_workers", "_ready", "_quarantined")  # things have no unit


def own() -> dict[str, tuple[str, tuple[str, ...]]]:
    return {name: tuple(found) for name, found in catalogue().items() if name.startswith("camserve_")}


def test_every_metric_is_what_dashboards_and_rules_take_it_for():
    model, outcome = ("model",), ("model", "outcome")
    assert own() == {
        "camserve_request_seconds": ("histogram", ("model", "method", "class", "code")),
        "camserve_stage_seconds": ("histogram", ("model", "method", "stage")),
        "camserve_queue_seconds": ("histogram", ("model", "class")),
        "camserve_masked_queries_total": ("counter", ("model", "method")),
        "camserve_masked_queries_wasted_total": ("counter", model),
        "camserve_masked_queries_cached_total": ("counter", model),
        "camserve_worker_cache_total": ("counter", outcome),
        "camserve_result_cache_total": ("counter", outcome),
        "camserve_partial_answers_total": ("counter", model),
        "camserve_refusals_total": ("counter", ("model", "reason")),
        "camserve_auto_choices_total": ("counter", ("model", "choice")),
        "camserve_requests_in_flight": ("gauge", ("class",)),
        "camserve_bytes_in_flight": ("gauge", ()),
        "camserve_event_loop_stall_seconds": ("histogram", ()),
        "camserve_waiting_queries": ("gauge", model),
        "camserve_waiting_work_seconds": ("gauge", model),
        "camserve_steps_in_flight": ("gauge", model),
        "camserve_oldest_request_seconds": ("gauge", model),
        "camserve_step_queries": ("histogram", model),
        "camserve_step_items": ("histogram", model),
        "camserve_step_seconds": ("histogram", model),
        "camserve_step_fill_ratio": ("histogram", model),
        "camserve_planning_seconds_total": ("counter", model),
        "camserve_step_retries_total": ("counter", model),
        "camserve_image_resends_total": ("counter", model),
        "camserve_workers_ready": ("gauge", model),
        "camserve_workers": ("gauge", model),
        "camserve_backends_quarantined": ("gauge", model),
        "camserve_worker_restarts_total": ("counter", model),
        "camserve_device_memory_used_bytes": ("gauge", ("model", "device")),
        "camserve_device_memory_limit_bytes": ("gauge", ("model", "device")),
        "camserve_certificate_expiry_timestamp_seconds": ("gauge", ()),
        "camserve_log_lines_lost_total": ("counter", ()),
        "camserve_evidence_records_total": ("counter", ()),
        "camserve_evidence_failures_total": ("counter", ()),
        "camserve_build_info": ("info", ("version",)),
    }


def test_names_end_with_their_base_unit():
    for name, (kind, _) in own().items():
        assert name.endswith(UNITS) or name.endswith(COUNTS), name
        assert name.endswith("_total") == (kind == "counter"), name


def test_the_catalogue_has_the_metrics_of_the_process_too():
    found = catalogue()
    assert found["process_resident_memory_bytes"] == ("gauge", ())
    assert found["process_cpu_seconds_total"].type == "counter"
    assert found["python_gc_collections_total"].labels == ("generation",)


def test_everything_that_is_exposed_is_in_the_catalogue_and_has_a_help_text():
    metrics = Metrics()
    metrics.introduce("fake")
    families = list(text_string_to_metric_families(generate_latest(metrics.registry).decode()))
    for family in families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found = catalogue()[name]
        assert all(set(sample.labels) - {"le"} == set(found.labels) for sample in family.samples), name
        assert family.documentation, name
    assert not [family.name for family in families if family.name.endswith("_created")]


def test_counters_of_a_model_begin_at_zero():
    metrics = Metrics()
    metrics.introduce("fake")
    text = generate_latest(metrics.registry).decode()
    for reason in REFUSALS:
        assert f'camserve_refusals_total{{model="fake",reason="{reason}"}} 0.0' in text
    assert 'camserve_worker_restarts_total{model="fake"} 0.0' in text
    assert 'camserve_requests_in_flight{class="batch"} 0.0' in text


def test_without_tls_there_is_no_certificate_that_could_end():
    metrics = Metrics()
    sample = re.compile("^camserve_certificate_expiry_timestamp_seconds ", re.MULTILINE)
    assert not sample.search(generate_latest(metrics.registry).decode())
    metrics.certificate_expiry.read = lambda: {(): 1.5e9}
    assert sample.search(generate_latest(metrics.registry).decode())


@pytest.mark.parametrize(("length", "fits"), [(0, False), (1, True), (118, True), (119, False)])
def test_an_id_that_is_too_long_for_an_exemplar_is_left_out(length, fits):
    found = exemplar("x" * length)
    assert (found is not None) == fits
    metrics = Metrics()
    metrics.request_seconds.labels("fake", "grad_cam", "normal", "OK").observe(0.1, found)
    assert ('# {request_id="x' in openmetrics(metrics.registry).decode()) == fits


def test_several_methods_are_one_label():
    assert method_label(["grad_cam"]) == "grad_cam"
    assert method_label(["grad_cam", UNKNOWN]) == "several"
