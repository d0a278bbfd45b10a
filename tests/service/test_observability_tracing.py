"""Spans of calls and of their steps, from the client to the worker."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent import futures

import grpc
import pytest
from gateway_harness import GRAD, QUICK, SCORE, ask, failure, photo, serving, until
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from camserve.client import AsyncClient, Client
from camserve.errors import InvalidOption
from camserve.gateway.api.request_ids import KEY
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import fixed
from camserve.gateway.pool.fake import FakeBackend, Faults
from camserve.gateway.server import Gateway

CALL = "camserve.v1.ExplanationService/Explain"
STEP = "camserve.step"


@pytest.fixture
def spans(monkeypatch):
    """What was sent by the time that the gateway has stopped."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr("opentelemetry.exporter.otlp.proto.grpc.trace_exporter.OTLPSpanExporter", lambda: exporter)
    return exporter.get_finished_spans


def named(name: str, spans: tuple[ReadableSpan, ...]) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


async def test_a_call_is_a_span_with_its_steps_as_children(spans):
    async with serving(tracing=True, step_queries=32) as server:
        await server.stub.Explain(ask(SCORE), metadata=((KEY, "call-1"),))
    (call,), steps = named(CALL, spans()), named(STEP, spans())
    assert (call.kind, call.parent, call.status.status_code) == (SpanKind.SERVER, None, StatusCode.UNSET)
    assert dict(call.attributes) == {
        "rpc.system": "grpc",
        "rpc.service": "camserve.v1.ExplanationService",
        "rpc.method": "Explain",
        "rpc.grpc.status_code": 0,
        "camserve.request_id": "call-1",
        "camserve.model": "fake",
        "camserve.methods": ("score_cam",),
        "camserve.class": "normal",
    }
    assert len(steps) == len(server.upstream.steps) > 1
    assert sum(step.attributes["camserve.queries"] for step in steps) == 96
    for step in steps:
        assert step.parent.span_id == call.context.span_id
        assert (step.kind, step.attributes["camserve.backend"]) == (SpanKind.CLIENT, "fake")
        assert call.start_time <= step.start_time <= step.end_time <= call.end_time
    assert call.resource.attributes["service.name"] == "camserve"


async def test_a_step_that_two_calls_share_is_in_both_traces(spans):
    async with serving(tracing=True, steps_per_worker=1) as server:
        server.upstream.hold()
        first = server.stub.Explain(ask(SCORE))
        await server.upstream.received(1)
        others = [server.stub.Explain(ask(GRAD, image=photo(i))) for i in (1, 2)]
        await until(lambda: len(server.gateway.registry.get("fake").dispatcher.planner) == 3)
        server.upstream.release()
        await asyncio.gather(first, *others)
    shared = [step for step in named(STEP, spans()) if step.attributes["camserve.step.items"] > 1]
    assert len({step.attributes["camserve.step"] for step in shared}) == 1
    assert len({step.context.trace_id for step in shared}) == shared[0].attributes["camserve.step.items"] >= 2
    calls = {call.context.span_id: call.context.trace_id for call in named(CALL, spans())}
    assert all(calls[step.parent.span_id] == step.context.trace_id for step in shared)


async def test_faults_are_errors_and_refusals_are_not(spans):
    upstream = FakeBackend(faults=Faults(malformed_steps=frozenset({0, 1, 2})))
    async with serving(upstream, tracing=True) as server:
        assert (await failure(server.stub.Explain(ask(GRAD))))[0] == "UNAVAILABLE"
        assert (await failure(server.stub.Explain(ask(GRAD, image=b"no image"))))[0] == "INVALID_ARGUMENT"
    lost, refused = named(CALL, spans())
    assert (lost.status.status_code, refused.status.status_code) == (StatusCode.ERROR, StatusCode.UNSET)
    assert (lost.attributes["rpc.grpc.status_code"], refused.attributes["rpc.grpc.status_code"]) == (14, 3)
    steps = [step for step in named(STEP, spans()) if step.parent.span_id == lost.context.span_id]
    assert [step.status.status_code for step in steps] == [StatusCode.ERROR] * 3
    assert "could not be read" in steps[0].status.description


async def test_a_clients_span_is_the_parent_of_the_call(spans):
    tracer = TracerProvider().get_tracer("client")
    async with serving(tracing=True) as server:
        async with AsyncClient(server.gateway.address) as client:
            with tracer.start_as_current_span("mine") as mine:
                await client.explain(photo())
            with tracer.start_as_current_span("other") as other:
                await client.explain(photo(), on_progress=lambda *_: None)
        await asyncio.to_thread(_traced_model, server.gateway.address, tracer)
    (call,) = named(CALL, spans())
    (streamed,) = named("camserve.v1.ExplanationService/StreamExplain", spans())
    assert (call.parent.span_id, call.context.trace_id) == (mine.context.span_id, mine.context.trace_id)
    assert (streamed.parent.span_id, streamed.context.trace_id) == (other.context.span_id, other.context.trace_id)


def _traced_model(address: str, tracer: trace.Tracer) -> None:
    with Client(address) as client, tracer.start_as_current_span("blocking"):
        client.model()


async def test_a_trace_that_is_not_sampled_stays_so(spans):
    parent = ("traceparent", f"00-{1:032x}-{2:016x}-00")
    async with serving(tracing=True) as server:
        await server.stub.Explain(ask(GRAD), metadata=(parent,))
    assert not spans()


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans over OTLP as a collector does."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.services: set[str] = set()

    def Export(self, request, context):  # noqa: N802  # gRPC's name
        for resource in request.resource_spans:
            self.services |= {each.value.string_value for each in resource.resource.attributes if "name" in each.key}
            self.names += [span.name for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_spans_go_where_the_variables_of_opentelemetry_say(monkeypatch):
    collector, server = Collector(), grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-explainer")
    try:
        async with serving(tracing=True) as gateway:
            await gateway.stub.Explain(ask(GRAD))
    finally:
        server.stop(None)
    assert {CALL, STEP} <= set(collector.names)
    assert "my-explainer" in collector.services


async def test_a_collector_that_is_away_does_not_hold_up_the_stop(spans, monkeypatch):
    """OpenTelemetry would try for ten seconds, for each batch of spans; this one never ends before the stop has."""
    stopped = threading.Event()
    monkeypatch.setattr(BatchSpanProcessor, "shutdown", lambda _processor: stopped.wait())
    monkeypatch.setattr("camserve.gateway.ops.tracing.FLUSH_S", 0.1)
    async with serving(tracing=True) as gateway:
        await gateway.stub.Explain(ask(GRAD))
        await gateway.gateway.stop()
    stopped.set()


async def test_without_the_package_the_start_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    gateway = Gateway(Settings(**QUICK, tracing=True), fixed({"fake": FakeBackend()}))
    with pytest.raises(InvalidOption, match=r"pip install 'camserve\[tracing\]'"):
        await gateway.start()


def test_while_tracing_is_off_opentelemetry_is_not_imported():
    program = "import sys, camserve.gateway.server, camserve.client; print('opentelemetry' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "False"
