"""The Open Inference Protocol: the unmodified tritonclient, and plain gRPC, against the gateway with its fake."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from gateway_harness import (
    GROUP,
    PATIENT,
    SCORE,
    TO_THE_MARGIN,
    arrays,
    ask,
    certified,
    failure,
    jump,
    merged,
    photo,
    serving,
    until,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from triton_harness import triton

from camserve.codecs import oip as codec
from camserve.gateway.api.access import new_token
from camserve.gateway.pool.fake import FakeBackend
from camserve.oip import inference_pb2 as oip
from camserve.oip import inference_pb2_grpc
from camserve.v1 import explain_pb2 as pb


async def test_tritonclient_sees_the_server_and_its_model(tmp_path: Path):
    async with serving() as server:
        found, _ = await triton(server.gateway.address, photo(), tmp_path)
    assert found == {
        "calls": [],
        "live": True,
        "ready": True,
        "model_ready": True,
        "version_ready": False,
        "other_ready": False,
        "server": "camserve",
        "versions": ["1.0"],
        "tensors": {
            "image": ["BYTES", [1]],
            "probabilities": ["FP32", [-1]],
            "class_indices": ["INT64", [-1]],
            "labels": ["BYTES", [-1]],
            "saliency": ["FP32", [-1, -1, -1]],
        },
    }


async def test_tritonclient_gets_what_our_own_api_gives(tmp_path: Path):
    parameters = {
        "explain_method": "group_cam; score_cam",
        "explain_targets": "tabby,top2",
        "explain_top_predictions": 3,
    }
    call = {"parameters": parameters, "request_id": "r-7", "priority": 1, "timeout": 60_000_000}
    async with serving() as server:
        found, got = await triton(server.gateway.address, photo(), tmp_path, calls=[call])
        targets = [pb.Target(label="tabby"), pb.Target(top_k=2)]
        ours = await server.stub.Explain(ask(GROUP, SCORE, targets=targets, top_predictions=3))
        assert 'class="interactive",code="OK",method="several"' in await server.metrics()
    (answer,) = found["calls"]
    assert (answer["model"], answer["id"]) == (["fake", "1.0"], "r-7")
    np.testing.assert_array_equal(got["0 saliency"], np.stack(arrays(ours)))
    assert got["0 saliency"].dtype == np.float32
    assert got["0 class_indices"].tolist() == [prediction.index for prediction in ours.predictions]
    assert got["0 labels"].tolist() == [prediction.label for prediction in ours.predictions]
    assert got["0 probabilities"].tolist() == [prediction.probability for prediction in ours.predictions]
    assert answer["parameters"]["complete"] is True
    assert len(answer["parameters"]["request_id"]) == 32
    assert json.loads(answer["parameters"]["cost"])["queries"] == ours.cost.queries
    maps = json.loads(answer["parameters"]["maps"])
    assert [(each["method"], each["target"]["label"]) for each in maps] == [
        (saliency.method.WhichOneof("method"), saliency.target.label) for saliency in ours.maps
    ]


async def test_tritonclient_sends_pixels_and_chooses_outputs_and_sizes(tmp_path: Path):
    calls = [
        {"pixels": True, "outputs": ["saliency"], "parameters": {"explain_size": "original"}},
        {"outputs": ["labels", "probabilities"]},
        {"parameters": {"explain_size": "layer", "explain_layers": "stem"}},
    ]
    async with serving() as server:
        found, got = await triton(server.gateway.address, photo(), tmp_path, calls=calls)
        pixels = np.asarray(Image.open(tmp_path / "photo"))
        tensor = pb.Tensor(data_type=pb.Tensor.UINT8, shape=pixels.shape, data=pixels.tobytes())
        ours = await server.stub.Explain(
            pb.ExplainRequest(image=pb.Image(tensor=tensor), output=pb.Output(size=pb.Output.ORIGINAL))
        )
    assert {name: array.shape for name, array in got.items()} == {
        "0 saliency": (1, 60, 80),
        "1 labels": (5,),
        "1 probabilities": (5,),
        "2 probabilities": (5,),
        "2 class_indices": (5,),
        "2 labels": (5,),
        "2 saliency": (1, 8, 12),
    }
    np.testing.assert_array_equal(got["0 saliency"], np.stack(arrays(ours)))
    assert "maps" not in found["calls"][1]["parameters"]


async def test_tritonclient_reads_what_was_wrong(tmp_path: Path):
    calls = [
        {"parameters": {"explain_colour": "red"}},
        {"parameters": {"explain_method": "grad_kam"}},
        {"parameters": {"explain_targets": "no such class"}},
        {"model_name": "other"},
        {"model_version": "2.0"},
        {"outputs": ["logits"]},
        {"sequence_id": 5, "sequence_start": True},
        {"parameters": {"explain_method": "score_cam"}, "timeout": 1},
    ]
    async with serving() as server:
        found, got = await triton(server.gateway.address, photo(), tmp_path, calls=calls)
        text = await server.metrics()
    assert got == {}
    statuses = [call["status"].removeprefix("StatusCode.") for call in found["calls"]]
    assert statuses[:-1] == ["INVALID_ARGUMENT"] * 3 + ["NOT_FOUND"] * 2 + ["INVALID_ARGUMENT"] * 2
    assert statuses[-1] in {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    assert "unknown parameter 'explain_colour'; there are explain_method" in found["calls"][0]["error"]
    assert "unknown model 'other'; there are: fake" in found["calls"][3]["error"]
    assert 'code="INVALID_ARGUMENT",method="unknown",model="fake"} 4.0' in text, "they count as other calls do"


async def test_tritonclient_with_asyncio_asks_many_at_once(tmp_path: Path):
    calls = [{"parameters": {"explain_method": "score_cam"}}] * 6
    async with serving() as server:
        found, _ = await triton(server.gateway.address, photo(), tmp_path, calls_at_once=calls)
    assert found["at_once"] == ["fake"] * 6


async def test_tritonclient_speaks_tls_and_has_a_token(tmp_path: Path):
    secret, entry = new_token("triton", priority="batch")
    (tmp_path / "tokens.toml").write_text(entry)
    files = {**certified(tmp_path)[1], "tokens": tmp_path / "tokens.toml"}
    async with serving(**files) as server:
        options = {"ca": str(tmp_path / "ca.pem"), "calls": [{"priority": 1}]}
        found, got = await triton(server.gateway.address, photo(), tmp_path, token=secret, **options)
        refused, _ = await triton(server.gateway.address, photo(), tmp_path, token="wrong", **options)
        assert 'class="batch",code="OK",method="grad_cam",model="fake"} 1.0' in await server.metrics()
    assert "0 saliency" in got
    assert found["calls"][0]["model"] == ["fake", "1.0"]
    assert refused["calls"][0]["status"] == "StatusCode.UNAUTHENTICATED"


def infer(**fields: Any) -> oip.ModelInferRequest:
    """An image in the contents, as clients without raw contents send it."""
    request = oip.ModelInferRequest(**fields)
    request.inputs.add(name="image", datatype="BYTES", shape=[1]).contents.bytes_contents.append(photo())
    return request


async def test_a_plain_client_gets_contents_for_contents():
    async with serving() as server:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel)
        reply = await stub.ModelInfer(infer())
        ours = await server.stub.Explain(ask())
    assert not reply.raw_output_contents
    (saliency,) = [output for output in reply.outputs if output.name == "saliency"]
    np.testing.assert_array_equal(
        np.array(saliency.contents.fp32_contents, np.float32).reshape(saliency.shape), np.stack(arrays(ours))
    )


async def test_a_timeout_gives_what_is_known_where_that_is_allowed(monkeypatch: pytest.MonkeyPatch):
    merges = merged(monkeypatch)
    settings = PATIENT | {"default_deadline_s": 100_000}
    async with serving(step_queries=8, steps_per_worker=1, **settings) as server:
        request = infer()
        request.parameters["explain_method"].string_param = "score_cam"
        request.parameters["explain_allow_partial"].bool_param = True
        request.parameters["timeout"].int64_param = 600_000_000
        server.upstream.hold()
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel)
        call = stub.ModelInfer(request)
        await server.upstream.received(1)
        server.upstream.release(2)
        await until(lambda: len(merges) == 2)
        jump(TO_THE_MARGIN)
        reply = await call
        server.upstream.release()
    assert reply.parameters["complete"].bool_param is False
    (saliency,) = json.loads(reply.parameters["maps"].string_param)
    assert 0 < saliency["fraction"] < 1


async def test_the_request_id_comes_back_in_the_metadata_and_the_response():
    async with serving() as server:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel)
        call = stub.ModelInfer(infer(), metadata=(("x-request-id", "abc-1"),))
        reply = await call
        assert reply.parameters["request_id"].string_param == "abc-1"
        assert dict(list(await call.initial_metadata()))["x-request-id"] == "abc-1"


async def test_metadata_of_what_does_not_exist_are_not_found():
    async with serving() as server:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel)
        assert (await failure(stub.ModelMetadata(oip.ModelMetadataRequest(name="x"))))[0] == "NOT_FOUND"
        code, text, _ = await failure(stub.ModelMetadata(oip.ModelMetadataRequest(name="fake", version="9")))
        assert (code, text) == ("NOT_FOUND", "model fake is served in version 1.0, not '9'")


async def test_before_a_model_is_ready_the_answers_say_so():
    upstream = FakeBackend()
    upstream.workers = 0
    async with serving(upstream, ready=False) as server:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel)
        health = health_pb2_grpc.HealthStub(server.channel)
        check = health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService")
        assert (await stub.ServerLive(oip.ServerLiveRequest())).live
        assert not (await stub.ServerReady(oip.ServerReadyRequest())).ready
        assert not (await stub.ModelReady(oip.ModelReadyRequest(name="fake"))).ready
        assert (await health.Check(check)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await failure(stub.ModelInfer(infer())))[0] == "UNAVAILABLE"
        upstream.workers = 1
        await server.gateway.wait_ready(30)
        assert (await stub.ServerReady(oip.ServerReadyRequest())).ready
        assert (await stub.ModelReady(oip.ModelReadyRequest(name="fake"))).ready


async def test_a_stop_lets_a_running_inference_finish():
    async with serving(step_queries=8, drain_s=3600.0) as server:
        server.upstream.hold()
        request = infer()
        request.parameters["explain_method"].string_param = "score_cam"
        running = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel).ModelInfer(request)
        await server.upstream.received(1)
        stopping = asyncio.create_task(server.gateway.stop())
        await asyncio.sleep(0)
        server.upstream.release()
        assert json.loads((await running).parameters["cost"].string_param)["queries"] == 96
        await stopping


async def test_a_stop_waits_for_a_response_that_is_being_converted(monkeypatch: pytest.MonkeyPatch):
    begun, go_on, convert = threading.Event(), threading.Event(), codec.encode

    def slow(*arguments: Any) -> bytes:
        begun.set()
        go_on.wait(30)
        return convert(*arguments)

    monkeypatch.setattr(codec, "encode", slow)
    async with serving(drain_s=3600.0) as server:
        running = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel).ModelInfer(infer())
        assert await asyncio.to_thread(begun.wait, 30)
        stopping = asyncio.create_task(server.gateway.stop())
        with suppress(grpc.aio.AioRpcError):
            while True:  # until new calls are refused; the test's own timeout is the bound
                await server.stub.Explain(ask())
        go_on.set()
        assert len((await running).outputs) == 4
        await stopping


async def test_a_client_that_goes_away_ends_its_inference():
    async with serving(step_queries=8) as server:
        server.upstream.hold()
        request = infer()
        request.parameters["explain_method"].string_param = "score_cam"
        running = inference_pb2_grpc.GRPCInferenceServiceStub(server.channel).ModelInfer(request)
        await server.upstream.received(1)
        running.cancel()
        planner = server.gateway.registry.get("fake").dispatcher.planner
        await until(lambda: len(planner) == 0)
        server.upstream.release()
        await until(lambda: planner.idle)


@pytest.mark.parametrize("order", [("camserve.client", "tritonclient.grpc"), ("tritonclient.grpc", "camserve.client")])
async def test_our_client_and_tritonclient_fit_into_one_process(order: tuple[str, str]):
    """Only the gateway loads our copy of the protocol, whose names a process can have once."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", f"import {', '.join(order)}")
    assert await process.wait() == 0


async def test_what_camserve_does_not_speak_is_unimplemented():
    async with serving() as server:
        call = server.channel.unary_unary("/inference.GRPCInferenceService/RepositoryIndex")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_maps_that_no_tensor_can_hold_are_refused_before_any_work():
    request = infer()
    request.parameters["explain_method"].string_param = "score_cam rise:masks=8"
    request.parameters["explain_size"].string_param = "layer"
    async with serving() as server:
        code, text, _ = await failure(inference_pb2_grpc.GRPCInferenceServiceStub(server.channel).ModelInfer(request))
        assert (code, "one tensor holds maps of one size" in text) == ("INVALID_ARGUMENT", True)
        assert server.upstream.steps == []
        assert 'code="INVALID_ARGUMENT"' in await server.metrics()
