"""Whichever door a bad request comes through, it is refused with the same words."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import grpc
import httpx
import pytest
import pytest_asyncio
import tiny
from bad_requests import (
    BAD_REQUESTS,
    LIMITS,
    SETTINGS,
    BadRequest,
    Door,
    to_cli_arguments,
    to_engine_kwargs,
    to_oip,
    to_plain_fields,
    to_v1,
)
from gateway_harness import QUICK, failure
from worker_backend import WorkerBackend

from camserve import Engine, cli
from camserve.errors import CamserveError
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import fixed
from camserve.gateway.server import Gateway
from camserve.oip import inference_pb2_grpc
from camserve.types import Preprocessing
from camserve.v1 import explain_pb2_grpc

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORKER = WorkerBackend(tiny.tiny_network(), limits=replace(LIMITS, auto=False))


@pytest.fixture(scope="module")
def engine() -> Engine:
    preprocessing = Preprocessing(resize_px=64, crop_px=tiny.TINY_SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return Engine(tiny.tiny_module(), preprocessing=preprocessing, labels=tiny.TINY_LABELS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[tuple[Gateway, grpc.aio.Channel]]:
    settings = Settings(**QUICK, **SETTINGS, web_listen="127.0.0.1:0")
    async with Gateway(settings, fixed({"here": WORKER})) as gateway:
        await gateway.wait_ready(30)
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            yield gateway, channel


async def said_by_typed_grpc(bad: BadRequest, channel: grpc.aio.Channel) -> str:
    return (await failure(explain_pb2_grpc.ExplanationServiceStub(channel).Explain(to_v1(bad))))[1]


async def said_by_open_inference(bad: BadRequest, channel: grpc.aio.Channel) -> str:
    return (await failure(inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(to_oip(bad))))[1]


async def said_by_open_inference_over_http(bad: BadRequest, gateway: Gateway) -> str:
    """What the same request is told as REST, its elements in binary."""
    asked = to_oip(bad)
    (tensor,) = asked.inputs
    (raw,) = asked.raw_input_contents or [
        struct.pack("<I", len(each)) + each for each in tensor.contents.bytes_contents
    ]
    image = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
    values = {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in asked.parameters.items()}
    values = {name: str(value) if value != value else value for name, value in values.items()}  # JSON has no NaN
    described = image | {"parameters": {"binary_data_size": len(raw)}}
    text = json.dumps({"inputs": [described], "parameters": values}).encode()
    model = asked.model_name or gateway.registry.models[0].name
    version = f"/versions/{quote(asked.model_version, safe='')}" if asked.model_version else ""
    url = f"http://{gateway.web_address}/v2/models/{quote(model, safe='')}{version}/infer"
    headers = {"inference-header-content-length": str(len(text))}
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        answer = (await client.post(url, content=text + raw, headers=headers)).json()
    assert answer["error"] == answer["detail"]
    return str(answer["error"])


def said_by_the_plain_api(bad: BadRequest) -> str:
    (answer,) = WORKER.service.answer([to_plain_fields(bad)])
    assert answer.status == 400
    return str(json.loads(answer.body)["error"]["message"])


def said_by_the_engine(bad: BadRequest, engine: Engine) -> str:
    with pytest.raises(CamserveError) as caught:
        engine.explain(**to_engine_kwargs(bad))
    return str(caught.value)


def said_by_the_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.run(arguments) == 2
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("camserve: ")


@pytest.mark.parametrize("bad", BAD_REQUESTS, ids=lambda bad: bad.name)
async def test_every_door_says_the_same(
    bad: BadRequest,
    engine: Engine,
    served: tuple[Gateway, grpc.aio.Channel],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(Engine, "load", lambda name, store: engine)
    said: dict[Door, str] = {}
    gateway, channel = served
    if Door.V1 in bad.doors:
        said[Door.V1] = await said_by_typed_grpc(bad, channel)
    if Door.OIP in bad.doors:
        said[Door.OIP] = await said_by_open_inference(bad, channel)
        assert await said_by_open_inference_over_http(bad, gateway) == said[Door.OIP]
    if Door.PLAIN in bad.doors:
        said[Door.PLAIN] = await asyncio.to_thread(said_by_the_plain_api, bad)
    if Door.ENGINE in bad.doors:
        said[Door.ENGINE] = await asyncio.to_thread(said_by_the_engine, bad, engine)
    for door, where in ((Door.LOCAL, ["--local"]), (Door.REMOTE, ["--address", gateway.address])):
        if door in bad.doors:
            arguments = [*to_cli_arguments(bad, tmp_path), *where]
            said[door] = await asyncio.to_thread(said_by_the_command, arguments, capsys)
    assert set(said) == bad.doors
    assert all(bad.sentence in text for text in said.values()), said
    assert len(set(said.values())) == 1, said
