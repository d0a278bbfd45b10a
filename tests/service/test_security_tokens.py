"""Bearer tokens in front of the gateway: who is let in, and how much each may ask for."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_harness import GRAD, SCORE, Harness, ask, failure, photo, serving, until
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from camserve import AsyncClient
from camserve.errors import Overloaded, Unauthenticated
from camserve.gateway.api.access import new_token
from camserve.oip import inference_pb2 as oip
from camserve.oip import inference_pb2_grpc
from camserve.v1 import explain_pb2 as pb


class Tokens:
    """A file of tokens, and their secrets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.secrets: dict[str, str] = {}
        self._entries: dict[str, str] = {}

    def add(self, name: str, **bounds: Any) -> None:
        self.secrets[name], self._entries[name] = new_token(name, **bounds)
        self._write()

    def withdraw(self, name: str) -> None:
        del self._entries[name]
        self._write()

    def _write(self) -> None:
        self.path.write_text("\n".join(self._entries.values()))

    def of(self, name: str) -> tuple[tuple[str, str], ...]:
        """The metadata of a call."""
        return (("authorization", f"Bearer {self.secrets[name]}"),)


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    made = Tokens(tmp_path / "tokens.toml")
    made.add("ann")
    return made


async def test_a_token_lets_in(tokens: Tokens):
    async with serving(tokens=tokens.path) as server:
        reply = await server.stub.Explain(ask(), metadata=tokens.of("ann"))
        assert len(reply.maps) == 1
        lower = (("authorization", f"bearer {tokens.secrets['ann']}"),)
        assert [update async for update in server.stub.StreamExplain(ask(SCORE), metadata=lower)][-1].HasField("reply")


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ((), "this server wants a bearer token: .*`authorization: Bearer <secret>` once, got none"),
        ((("authorization", "Basic eDp5"),), "got another scheme"),
        ((("authorization", "Bearer wrong"),), "the bearer token is not one of this server"),
        ((("authorization", "Bearer "),), "got another scheme|not one of this server"),
    ],
)
async def test_a_missing_or_wrong_token_is_unauthenticated(tokens: Tokens, metadata, text: str):
    async with serving(tokens=tokens.path) as server:
        calls = [
            server.stub.Explain(ask(), metadata=metadata),
            server.stub.ListModels(pb.ListModelsRequest(), metadata=metadata),
            server.stub.GetModel(pb.GetModelRequest(), metadata=metadata),
            server.stub.StreamExplain(ask(), metadata=metadata).read(),
            inference_pb2_grpc.GRPCInferenceServiceStub(server.channel).ModelInfer(
                oip.ModelInferRequest(), metadata=metadata
            ),
        ]
        for call in calls:
            code, details, kind = await failure(call)
            assert (code, kind) == ("UNAUTHENTICATED", "Unauthenticated")
            assert re.search(text, details)
        counted = f'camserve_refusals_total{{model="unknown",reason="unauthenticated"}} {len(calls)}.0'
        assert counted in await server.metrics()
        assert not server.upstream.steps


async def test_two_tokens_in_one_call_are_none(tokens: Tokens):
    async with serving(tokens=tokens.path) as server:
        assert (await failure(server.stub.Explain(ask(), metadata=tokens.of("ann") * 2)))[0] == "UNAUTHENTICATED"


async def test_health_needs_no_token(tokens: Tokens):
    async with serving(tokens=tokens.path) as server:
        stub, inference = health_pb2_grpc.HealthStub(server.channel), oip
        for service in ("", "camserve.v1.ExplanationService", "inference.GRPCInferenceService"):
            found = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert found.status == health_pb2.HealthCheckResponse.SERVING
        open_stub = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel)
        assert (await open_stub.ServerLive(inference.ServerLiveRequest())).live
        assert (await open_stub.ServerReady(inference.ServerReadyRequest())).ready
        assert (await failure(open_stub.ModelReady(inference.ModelReadyRequest(name="fake"))))[0] == "UNAUTHENTICATED"


async def test_the_python_clients_send_their_token(tokens: Tokens):
    async with serving(tokens=tokens.path) as server:
        address = server.gateway.address
        async with AsyncClient(address, token=tokens.secrets["ann"]) as client:
            assert (await client.explain(photo(), ["score_cam"], on_progress=lambda done, total: None)).maps
            assert await client.models()
        async with AsyncClient(address, token="wrong") as client:
            with pytest.raises(Unauthenticated, match="not one of this server"):
                await client.explain(photo())


async def test_reflection_needs_a_token_where_tokens_are_on(tokens: Tokens):
    async with serving(tokens=tokens.path) as server:
        with pytest.raises(grpc.RpcError) as caught:
            await asyncio.to_thread(_services, server.gateway.address, ())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        found = await asyncio.to_thread(_services, server.gateway.address, tokens.of("ann"))
        assert {"camserve.v1.ExplanationService", "inference.GRPCInferenceService"} <= set(found)


async def test_reflection_can_be_switched_off():
    async with serving(reflection=False) as server:
        with pytest.raises(grpc.RpcError) as caught:
            await asyncio.to_thread(_services, server.gateway.address, ())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert (await server.stub.Explain(ask())).maps


async def test_a_generic_client_finds_the_inference_service_by_reflection():
    async with serving() as server:

        def parameters() -> set[str]:
            with grpc.insecure_channel(server.gateway.address) as channel:
                pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
                service = pool.FindServiceByName("inference.GRPCInferenceService")
                return {field.name for field in service.FindMethodByName("ModelInfer").input_type.fields}

        assert {"model_name", "inputs", "raw_input_contents"} <= await asyncio.to_thread(parameters)


class _WithMetadata(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Adds metadata to every call, as grpcurl's -H does."""

    def __init__(self, metadata) -> None:
        self.metadata = metadata

    def intercept_stream_stream(self, continuation, details, requests):
        return continuation(details._replace(metadata=self.metadata), requests)

    intercept_unary_unary = intercept_stream_stream


def _services(address: str, metadata) -> list[str]:
    with grpc.insecure_channel(address) as channel:
        with_metadata = grpc.intercept_channel(channel, _WithMetadata(metadata))
        return list(ProtoReflectionDescriptorDatabase(with_metadata).get_services())


async def test_a_class_is_capped_by_the_token(tokens: Tokens):
    tokens.add("nightly", priority="batch")
    async with serving(tokens=tokens.path, step_queries=8) as server:
        server.upstream.hold()
        call = server.stub.Explain(ask(SCORE, priority=pb.INTERACTIVE), metadata=tokens.of("nightly"))
        await server.upstream.received(1)
        counts = _planner(server).counts_by_class()
        assert (counts["interactive"].asked, counts["batch"].asked) == (0, 96)
        server.upstream.release()
        await call
        await server.stub.Explain(ask(GRAD, priority=pb.INTERACTIVE), metadata=tokens.of("ann"))
        text = await server.metrics()
    assert 'class="batch",code="OK",method="score_cam",model="fake"} 1.0' in text
    assert 'class="interactive",code="OK",method="grad_cam",model="fake"} 1.0' in text


def _planner(server: Harness):
    return server.gateway.registry.get("fake").dispatcher.planner


async def test_an_unknown_class_is_still_refused(tokens: Tokens):
    async with serving(tokens=tokens.path) as server:
        code, text, _ = await failure(server.stub.Explain(ask(priority=77), metadata=tokens.of("ann")))
        assert (code, text) == ("INVALID_ARGUMENT", "unknown priority 77")


async def test_a_token_has_a_rate_and_says_when_to_come_back(tokens: Tokens):
    tokens.add("slow", requests_per_s=0.001, burst=2)
    async with serving(tokens=tokens.path) as server:
        for _ in range(2):
            await server.stub.Explain(ask(), metadata=tokens.of("slow"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.stub.Explain(ask(), metadata=tokens.of("slow"))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "at most 0.001 requests per second of slow, 2 at once" in caught.value.details()
        details = caught.value.trailing_metadata()["grpc-status-details-bin"]
        info = error_details_pb2.RetryInfo()
        assert status_pb2.Status.FromString(details).details[0].Unpack(info)
        assert 900 < info.retry_delay.seconds <= 1000
        inference = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel)
        request = oip.ModelInferRequest()
        request.inputs.add(name="image", datatype="BYTES", shape=[1]).contents.bytes_contents.append(photo())
        assert (await failure(inference.ModelInfer(request, metadata=tokens.of("slow"))))[0] == "RESOURCE_EXHAUSTED"
        for _ in range(3):
            await server.stub.Explain(ask(), metadata=tokens.of("ann"))
            await server.stub.ListModels(pb.ListModelsRequest(), metadata=tokens.of("slow"))
        assert 'camserve_refusals_total{model="unknown",reason="token_rate"} 2.0' in await server.metrics()


async def test_requests_of_a_token_are_bounded_and_leave_room_for_others(tokens: Tokens):
    tokens.add("two", max_requests=2)
    async with serving(tokens=tokens.path) as server:
        server.upstream.hold()
        running = [server.stub.Explain(ask(SCORE), metadata=tokens.of("two")) for _ in range(2)]
        await until(lambda: len(_planner(server)) == 2)
        code, text, _ = await failure(server.stub.Explain(ask(), metadata=tokens.of("two")))
        assert (code, text) == (
            "RESOURCE_EXHAUSTED",
            "at most 2 requests of two are taken on at once; try again later",
        )
        other = server.stub.Explain(ask(), metadata=tokens.of("ann"))
        await until(lambda: len(_planner(server)) == 3)
        server.upstream.release()
        await asyncio.gather(*running, other)
        await server.stub.Explain(ask(), metadata=tokens.of("two"))
        assert 'camserve_refusals_total{model="fake",reason="token_requests"} 1.0' in await server.metrics()


async def test_waiting_work_of_a_token_is_bounded(tokens: Tokens):
    tokens.add("small", max_waiting_s=3.0)
    async with serving(tokens=tokens.path, step_queries=2, step_target_s=0.3) as server:
        server.upstream.hold()
        running = server.stub.Explain(ask(SCORE), metadata=tokens.of("small"))
        await until(lambda: len(_planner(server)) == 1)
        async with AsyncClient(server.gateway.address, token=tokens.secrets["small"]) as client:
            with pytest.raises(Overloaded, match=r"at most 3\.0 s of one worker's work may wait for small"):
                await client.explain(photo(), ["score_cam"])
        other = server.stub.Explain(ask(SCORE), metadata=tokens.of("ann"))
        await until(lambda: len(_planner(server)) == 2)
        server.upstream.release()
        await asyncio.gather(running, other)
        assert 'camserve_refusals_total{model="fake",reason="token_work"} 1.0' in await server.metrics()


async def test_the_file_is_read_again_and_a_withdrawn_token_is_out(tokens: Tokens):
    async with serving(tokens=tokens.path) as server:
        await server.stub.Explain(ask(), metadata=tokens.of("ann"))
        tokens.add("bob")
        tokens.withdraw("ann")

        async def status(name: str) -> str:
            try:
                await server.stub.ListModels(pb.ListModelsRequest(), metadata=tokens.of(name))
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

        while await status("bob") != "OK":  # the test's own timeout is the bound
            await asyncio.sleep(0.05)
        assert await status("ann") == "UNAUTHENTICATED"


async def test_the_log_names_the_caller_and_no_secret(tokens: Tokens, caplog: pytest.LogCaptureFixture):
    tokens.add("bob")
    with caplog.at_level(logging.DEBUG):
        async with serving(tokens=tokens.path) as server:
            await asyncio.gather(
                *(server.stub.Explain(ask(), metadata=tokens.of(name)) for name in ("ann", "bob", "ann", "bob"))
            )
            await failure(server.stub.Explain(ask(), metadata=(("authorization", "Bearer not-a-secret"),)))
    callers = [record.caller for record in caplog.records if record.name == "camserve.access"]
    assert sorted(callers) == ["ann", "ann", "bob", "bob"]
    logged = " ".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    assert not any(secret in logged for secret in (*tokens.secrets.values(), "not-a-secret"))
