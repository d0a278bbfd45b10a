"""What a message may cost the gateway before it is answered: who is read at all, in which order, how much at once."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_harness import PATIENT, SCORE, Harness, ask, failure, jump, photo, serving, until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from camserve.codecs import v1
from camserve.gateway.api.access import new_token
from camserve.gateway.api.reading import PATIENCE_S, SMALL_BYTES
from camserve.gateway.requests.turns import Threads
from camserve.oip import inference_pb2 as oip
from camserve.oip import inference_pb2_grpc
from camserve.types.request import ExplainRequest
from camserve.v1 import explain_pb2 as pb
from camserve.v1 import explain_pb2_grpc

EXPLAIN = "/camserve.v1.ExplanationService/Explain"
HEALTH = "/grpc.health.v1.Health/Check"
METHODS = [
    *(f"/camserve.v1.ExplanationService/{name}" for name in ("Explain", "StreamExplain", "ListModels", "GetModel")),
    *(f"/inference.GRPCInferenceService/{name}" for name in ("ModelInfer", "ModelReady", "ModelMetadata")),
]


async def never() -> AsyncIterator[bytes]:
    """Messages of a client that announces one and does not send it."""
    await asyncio.Event().wait()
    yield b""


def unsent(server: Harness, method: str = EXPLAIN, metadata: Any = ()) -> Any:
    """A call whose message does not come: it ends only if the server ends it without."""
    return server.channel.stream_unary(method)(never(), metadata=metadata)


def another_connection(server: Harness) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(server.gateway.address, options=[("grpc.use_local_subchannel_pool", 1)])


@pytest.mark.parametrize("method", METHODS)
async def test_a_call_without_a_token_is_refused_before_its_message_comes(method: str, tmp_path: Path):
    (tmp_path / "tokens.toml").write_text(new_token("ann")[1])
    async with serving(tokens=tmp_path / "tokens.toml") as server:
        assert (await failure(unsent(server, method)))[0] == "UNAUTHENTICATED"


async def test_a_call_above_its_rate_is_refused_before_its_message_comes(tmp_path: Path):
    secret, entry = new_token("slow", requests_per_s=0.001, burst=1)
    (tmp_path / "tokens.toml").write_text(entry)
    metadata = (("authorization", f"Bearer {secret}"),)
    async with serving(tokens=tmp_path / "tokens.toml") as server:
        await server.stub.Explain(ask(), metadata=metadata)
        assert (await failure(unsent(server, metadata=metadata)))[0] == "RESOURCE_EXHAUSTED"


async def test_malformed_calls_of_every_door_count_against_the_rate(tmp_path: Path):
    secret, entry = new_token("slow", requests_per_s=0.001, burst=2)
    (tmp_path / "tokens.toml").write_text(entry)
    metadata = (("authorization", f"Bearer {secret}"),)
    async with serving(tokens=tmp_path / "tokens.toml") as server:
        inference = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel)
        codes = [(await failure(inference.ModelInfer(oip.ModelInferRequest(), metadata=metadata)))[0] for _ in range(4)]
        assert codes == ["INVALID_ARGUMENT"] * 2 + ["RESOURCE_EXHAUSTED"] * 2


async def test_calls_are_bounded_in_number_and_the_bound_is_free_again():
    async with serving(max_calls=2) as server:
        server.upstream.hold()
        running = [server.stub.Explain(ask(SCORE)) for _ in range(2)]
        await until(lambda: server.gateway.calls.active == 2)
        code, text, kind = await failure(unsent(server))
        assert (code, kind) == ("RESOURCE_EXHAUSTED", "Overloaded")
        assert text == "at most 2 calls are answered at once; try again later"
        server.upstream.release()
        await asyncio.gather(*running)
        assert (await server.stub.Explain(ask())).maps
        assert 'camserve_refusals_total{model="unknown",reason="calls"} 1.0' in await server.metrics()


async def test_who_does_not_send_leaves_the_places_to_others():
    """A connection has half of the places in which messages are read, however many calls it makes."""
    async with serving(max_message_bytes=2**25, max_bytes_in_flight=2**29) as server:
        stalled = [unsent(server) for _ in range(40)]
        await until(lambda: server.gateway.calls.active == 40)
        async with another_connection(server) as channel:
            stub = explain_pb2_grpc.ExplanationServiceStub(channel)
            assert (await stub.Explain(ask())).maps
        for call in stalled:
            call.cancel()
        await until(lambda: server.gateway.calls.active == 0)
        assert (await server.stub.Explain(ask())).maps


async def test_who_does_not_send_loses_the_place_while_others_wait_for_it():
    async with serving(max_message_bytes=2**25, max_bytes_in_flight=2**29, **PATIENT) as server:
        async with another_connection(server) as second, another_connection(server) as third:
            stalled = [channel.stream_unary(EXPLAIN)(never()) for channel in (server.channel, second) for _ in range(4)]
            await until(lambda: server.gateway.calls.active == 8)
            waiting = asyncio.ensure_future(explain_pb2_grpc.ExplanationServiceStub(third).Explain(ask()))
            await until(lambda: server.gateway.calls.active == 9)
            jump(PATIENCE_S + 1)
            assert (await waiting).maps
            code, text, _ = await failure(stalled[0])
            assert (code, text) == (
                "RESOURCE_EXHAUSTED",
                "the message did not come within 5 s while others waited; try again later",
            )
            for call in stalled:
                call.cancel()
            await until(lambda: server.gateway.calls.active == 0)
        assert 'reason="reading"' in await server.metrics()


async def test_a_message_that_never_comes_ends_its_call():
    async with serving(**PATIENT) as server:
        call = asyncio.ensure_future(failure(unsent(server)))

        async def later() -> None:
            jump(601)
            await asyncio.sleep(0.001)

        await until(call.done, later)  # the message may not be waited for yet
        assert (await call)[:2] == ("DEADLINE_EXCEEDED", "the message did not come within 600 s")


async def test_a_call_without_a_message_says_so():
    async with serving() as server:

        async def none() -> AsyncIterator[bytes]:
            return
            yield b""

        code, text, _ = await failure(server.channel.stream_unary(EXPLAIN)(none()))
        assert (code, "the call has no message" in text) == ("INVALID_ARGUMENT", True)
        assert (await failure(server.channel.stream_unary(HEALTH)(none())))[0] == "INVALID_ARGUMENT"


@pytest.mark.parametrize("method", [*METHODS[2:4], *METHODS[5:], HEALTH, "/grpc.health.v1.Health/Watch"])
async def test_a_large_message_to_a_method_without_images_is_not_parsed(method: str):
    async with serving() as server:
        kind = server.channel.unary_stream if method.endswith("Watch") else server.channel.unary_unary
        call = kind(method)(b"\xa0\x06\x01" * SMALL_BYTES)
        code, text, _ = await failure(call.read() if method.endswith("Watch") else call)
        assert (code, text) == (
            "INVALID_ARGUMENT",
            f"a request of this method has at most {SMALL_BYTES} bytes, got {3 * SMALL_BYTES}",
        )


async def test_a_health_check_answers_while_its_service_has_calls_without_messages():
    async with serving() as server:
        stalled = [unsent(server, HEALTH) for _ in range(10)]
        async with another_connection(server) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
        for call in stalled:
            call.cancel()


async def test_health_watches_are_bounded_for_each_client():
    async with serving() as server:
        stub = health_pb2_grpc.HealthStub(server.channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(64)]
        assert [(await watch.read()).status for watch in watches] == [1] * 64
        code, text, _ = await failure(stub.Watch(health_pb2.HealthCheckRequest()).read())
        assert (code, "too many streams" in text) == ("RESOURCE_EXHAUSTED", True)
        async with another_connection(server) as channel:
            other = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await other.read()).status == 1
            other.cancel()
        watches[0].cancel()

        async def watched() -> bool:
            watch = stub.Watch(health_pb2.HealthCheckRequest())
            try:
                return (await watch.read()).status == 1
            except grpc.aio.AioRpcError:
                return False

        while not await watched():  # until the server has heard of the end of the first one
            await asyncio.sleep(0.001)


async def test_compressed_requests_are_refused():
    async with serving() as server:
        code, text, _ = await failure(server.stub.Explain(ask(), compression=grpc.Compression.Gzip))
        assert (code, text) == ("UNIMPLEMENTED", "Compression algorithm 'gzip' is disabled.")


IN_FLIGHT = {"max_message_bytes": 2**21, "max_image_bytes": 2**20, "max_bytes_in_flight": 2**25}
"""Half of it, 16 MiB, is for calls that are being answered; each message counts twice."""


async def test_large_messages_are_refused_where_they_do_not_fit_and_leave_room_for_small_ones():
    async with serving(**IN_FLIGHT) as server:
        server.upstream.hold()
        large = [asyncio.ensure_future(failure(server.stub.Explain(_of(10**6)))) for _ in range(12)]
        await until(lambda: any(call.done() for call in large))
        code, text, kind = await next(call for call in large if call.done())
        assert (code, kind) == ("RESOURCE_EXHAUSTED", "Overloaded")
        assert "too many requests are in flight; try again later" in text
        small = asyncio.ensure_future(server.stub.Explain(ask(SCORE)))
        await until(lambda: len(server.gateway.registry.get("fake").dispatcher.planner) > 0)
        server.upstream.release()
        assert (await small).maps
        for call in large:
            call.cancel()
        await asyncio.gather(*large, return_exceptions=True)
        await until(lambda: server.gateway.calls.active == 0)
        text = await server.metrics()
        assert 'camserve_refusals_total{model="unknown",reason="memory"}' in text
        assert "camserve_bytes_in_flight 0.0" in text


def _of(size: int) -> pb.ExplainRequest:
    """A request for a Score-CAM of a photo with many bytes behind its pixels."""
    return ask(SCORE, image=photo().ljust(size, b"\0"))


async def test_a_reply_counts_before_it_is_made():
    """One map of 600 x 800 as float32 is 1.9 MB, which are counted three times; two such replies do not fit at once."""
    output = pb.Output(size=pb.Output.ORIGINAL)
    image = photo(size=(600, 800), kind="JPEG")
    async with serving(**IN_FLIGHT) as server:
        server.upstream.hold()
        first = server.stub.Explain(ask(SCORE, image=image, output=output))
        await server.upstream.received(1)
        second = server.stub.Explain(ask(SCORE, image=image, output=output))
        code, text, _ = await failure(second)
        assert code == "RESOURCE_EXHAUSTED", text
        assert (await failure(server.stub.Explain(ask(SCORE, image=image, output=output))))[0] == "RESOURCE_EXHAUSTED"
        server.upstream.release()
        assert (await first).maps
        assert 'camserve_refusals_total{model="fake",reason="memory"} 2.0' in await server.metrics()


LONG = "x" * 20_000


@pytest.mark.parametrize(
    "fields",
    [
        {"model": LONG},
        {"version": LONG},
        {"layers": [LONG]},
        {"targets": [pb.Target(label=LONG)]},
        {"output": pb.Output(colormap=LONG, encoding=pb.Output.OVERLAY_PNG)},
        {"model": "é" * 20_000},
        {"targets": [pb.Target()] * 50_000},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_a_client_gets_its_own_error_and_the_log_a_short_line(fields, caplog: pytest.LogCaptureFixture):
    """The channel has C-core's own bound on metadata, which a long text in a status would pass."""
    with caplog.at_level(logging.INFO):
        async with serving() as server:
            code, text, kind = await failure(server.stub.Explain(ask(**fields)))
            assert (code, kind) == ("INVALID_ARGUMENT", "InvalidOption"), text
            assert len(text) < 250
    (line,) = [record for record in caplog.records if record.name == "camserve.access"]
    assert len(str(vars(line))) < 2500


@pytest.mark.parametrize(
    "place", ["model_name", "model_version", "id", "input", "datatype", "output", "parameter", "value", "shape"]
)
async def test_every_name_of_the_open_protocol_is_bounded(place: str):
    request = oip.ModelInferRequest()
    image = request.inputs.add(name="image", datatype="BYTES", shape=[1])
    image.contents.bytes_contents.append(photo())
    if place in ("model_name", "model_version"):
        setattr(request, place, LONG)
    elif place == "id":
        request.id = LONG
    elif place == "input":
        image.name = LONG
    elif place == "datatype":
        image.datatype = LONG
    elif place == "output":
        request.outputs.add(name=LONG)
    elif place == "shape":
        image.shape.extend([7] * 20_000)
    else:
        name, value = (LONG, "1") if place == "parameter" else ("explain_targets", "1," * 20_000)
        request.parameters[name].string_param = value
    async with serving() as server:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel)
        code, text, _ = await failure(stub.ModelInfer(request))
        assert code == "INVALID_ARGUMENT", text
        assert len(text) < 300


async def test_names_that_ask_for_a_model_are_shown_in_short():
    async with serving() as server:
        inference = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel)
        name = "x" * 10_000
        calls = [
            server.stub.GetModel(pb.GetModelRequest(name=name)),
            inference.ModelMetadata(oip.ModelMetadataRequest(name=name)),
            inference.ModelMetadata(oip.ModelMetadataRequest(name="fake", version=name)),
        ]
        for call in calls:
            code, text, _ = await failure(call)
            assert code == "NOT_FOUND"
            assert len(text) < 300


async def test_a_stall_of_the_event_loop_is_measured():
    async with serving() as server:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while loop.time() < began + 0.7:  # nothing else runs meanwhile
            pass
        text = ""
        while not text or _stalls(text, "+Inf") == _stalls(text, "0.5"):
            text = await server.metrics()


def _stalls(text: str, bound: str) -> float:
    """The number of stalls that were measured up to a bound in seconds."""
    (found,) = re.findall(rf'camserve_event_loop_stall_seconds_bucket{{le="{re.escape(bound)}"}} (\S+)', text)
    return float(found)


@pytest.mark.parametrize(
    ("owner", "work", "works", "said"),
    [(v1, "request_from_bytes", 8, "before the message was read"), (ExplainRequest, "fit", 9, "before the answer was")],
    ids=["reading", "fitting"],
)
async def test_the_default_deadline_holds_while_a_request_waits_for_a_thread(owner, work, works, said, monkeypatch):
    """`works` are asked of threads before the time is up: the reading of each message, and the fitting of one."""
    go_on = threading.Event()
    original, run, askers = getattr(owner, work), Threads.run, []

    def blocking(*arguments: Any) -> Any:
        assert go_on.wait(60)
        return original(*arguments)

    async def noting(self: Threads, *arguments: Any) -> Any:
        askers.append(asyncio.current_task())
        return await run(self, *arguments)

    monkeypatch.setattr(owner, work, blocking)
    monkeypatch.setattr(Threads, "run", noting)
    async with serving(**PATIENT) as server:
        try:
            # More than there are threads: some have one and do not let go of it, the others wait for one to be read.
            calls = [asyncio.ensure_future(failure(server.stub.Explain(ask()))) for _ in range(8)]
            # A call that came after the jump would have all its time left: each must have asked for a thread by then.
            await until(lambda: len(set(askers)) == len(calls) and len(askers) >= works)
            jump(PATIENT["default_deadline_s"] + 1)
            outcomes = await asyncio.gather(*calls)
        finally:
            go_on.set()
    assert {code for code, _, _ in outcomes} == {"DEADLINE_EXCEEDED"}
    assert any(said in text for _, text, _ in outcomes)


async def test_the_default_deadline_counts_from_the_arrival_and_not_from_the_end_of_the_reading(monkeypatch):
    """Half of the time goes by while the message is decoded, and a bit more than the other half while it is fitted."""
    half_s, fit, decode = PATIENT["default_deadline_s"] / 2, ExplainRequest.fit, v1.request_from_bytes
    begun, go_on, fitting, end = (threading.Event() for _ in range(4))

    def decoding(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return decode(*arguments)

    def blocking(*arguments: Any) -> Any:
        fitting.set()
        assert end.wait(60)
        return fit(*arguments)

    monkeypatch.setattr(v1, "request_from_bytes", decoding)
    monkeypatch.setattr(ExplainRequest, "fit", blocking)
    async with serving(**PATIENT) as server:
        try:
            call = asyncio.ensure_future(failure(server.stub.Explain(ask())))
            await until(begun.is_set)
            jump(half_s)
            go_on.set()
            await until(fitting.is_set)
            jump(half_s + 1)
            code, text, _ = await call
        finally:
            go_on.set()
            end.set()
    assert (code, text) == ("DEADLINE_EXCEEDED", "the deadline of 600 s passed before the answer was complete")
