"""Networks of one and of four channels through every door: the same map as in process, and the same refusals."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
import torch
from gateway_harness import QUICK, failure
from PIL import Image
from torch import nn
from worker_backend import WorkerBackend

from camserve import AsyncClient, Engine
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import fixed
from camserve.gateway.server import Gateway
from camserve.oip import inference_pb2 as oip
from camserve.oip import inference_pb2_grpc
from camserve.types import Preprocessing
from camserve.v1 import explain_pb2 as pb
from camserve.v1 import explain_pb2_grpc
from camserve.worker.network import Network

SIZE = (40, 24)
METHODS = ["grad_cam", "score_cam"]


def module(channels: int) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    ).eval()


def preprocessing(channels: int) -> Preprocessing:
    return Preprocessing(24, SIZE, (0.5,) * channels, (0.25,) * channels, "bilinear")


def floats(channels: int) -> np.ndarray:
    return np.random.default_rng(1).random((*SIZE, channels), np.float32)


def grey16() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 2**16, (50, 70), np.uint16)


def file(array: np.ndarray, file_format: str) -> bytes:
    made = io.BytesIO()
    Image.fromarray(array).save(made, file_format)
    return made.getvalue()


@asynccontextmanager
async def served(channels: int) -> AsyncIterator[tuple[WorkerBackend, str]]:
    worker = WorkerBackend(Network(module(channels), preprocessing=preprocessing(channels), name="net"))
    async with Gateway(Settings(**QUICK), fixed({"here": worker})) as gateway:
        await gateway.wait_ready(30)
        yield worker, gateway.address


SENT = {
    "floats": (1, lambda: floats(1)),
    "16-bit array": (1, grey16),
    "16-bit picture": (1, lambda: Image.fromarray(grey16())),
    "16-bit PNG": (1, lambda: file(grey16(), "PNG")),
    "16-bit TIFF": (1, lambda: file(grey16(), "TIFF")),
    "grey array": (1, lambda: (grey16() >> 8).astype(np.uint8)),
    "colour picture": (1, lambda: Image.fromarray(np.random.default_rng(4).integers(0, 256, (50, 70, 3), np.uint8))),
    "four channels": (4, lambda: floats(4)),
    "grey array for colours": (3, lambda: (grey16() >> 8).astype(np.uint8)),
    "16-bit array for colours": (3, grey16),
    "grey floats for colours": (3, lambda: floats(1)[..., 0]),
}


@pytest.mark.parametrize("name", SENT)
async def test_a_map_through_the_gateway_is_that_of_the_engine(name: str):
    channels, content = SENT[name]
    engine = Engine(module(channels), preprocessing=preprocessing(channels))
    expected = engine.explain(content(), METHODS, [1, 2])
    async with served(channels) as (_, address), AsyncClient(address) as client:
        assert (await client.model()).channels == channels
        found = await client.explain(content(), METHODS, [1, 2])
        drawn = await client.explain(content(), METHODS, [1], size="original", encoding="png")
    assert found.input == expected.input
    for ours, theirs in zip(found.maps, expected.maps, strict=True):
        # Steps cut the queries in another way: sums of a few float32 in another order.
        np.testing.assert_allclose(ours.array, theirs.array, atol=1e-5)
    for saliency in (*found.maps, *drawn.maps):
        assert saliency.overlay().size == saliency.array.shape[::-1]


async def test_every_form_of_16_bits_has_the_same_map():
    forms = ("16-bit array", "16-bit picture", "16-bit PNG", "16-bit TIFF")
    async with served(1) as (worker, address), AsyncClient(address) as client:
        first, *others = [(await client.explain(SENT[name][1](), METHODS, [1])).maps for name in forms]
        (answer,) = worker.service.answer([{"data": SENT["16-bit TIFF"][1](), "format": "float", "target": "1"}])
    for maps in others:
        for ours, theirs in zip(maps, first, strict=True):
            np.testing.assert_array_equal(ours.array, theirs.array)
    (plain,) = json.loads(answer.body)["maps"]
    np.testing.assert_allclose(plain["values"], first[0].array, atol=1e-6)


def inferring(pixels: np.ndarray) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name="net", raw_input_contents=[pixels.tobytes()])
    datatype = {"float32": "FP32", "uint8": "UINT8"}[pixels.dtype.name]
    request.inputs.add(name="image", datatype=datatype, shape=pixels.shape)
    request.parameters["explain_targets"].string_param = "2"
    request.outputs.add(name="saliency")
    return request


@pytest.mark.parametrize("channels", [1, 4])
async def test_open_inference_takes_floats_of_any_number_of_channels(channels: int):
    pixels = floats(channels)
    (expected,) = Engine(module(channels), preprocessing=preprocessing(channels)).explain(pixels, targets=[2]).maps
    async with served(channels) as (_, address), grpc.aio.insecure_channel(address) as channel:
        reply = await inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(inferring(pixels))
    got = np.frombuffer(reply.raw_output_contents[0], "<f4").reshape(reply.outputs[0].shape)
    np.testing.assert_allclose(got[0], expected.array, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
async def test_pixels_without_an_axis_of_channels_are_grey_at_every_door(channels: int):
    engine = Engine(module(channels), preprocessing=preprocessing(channels))
    for pixels in (floats(1)[..., 0], (grey16() >> 8).astype(np.uint8)):
        picture = pixels if pixels.dtype == np.float32 else Image.fromarray(pixels)
        (expected,) = engine.explain(picture, targets=[2]).maps
        kind = pb.Tensor.FLOAT32 if pixels.dtype == np.float32 else pb.Tensor.UINT8
        output = pb.Output(size=pb.Output.INPUT)
        asked = pb.ExplainRequest(image=typed(pixels, kind), targets=[pb.Target(index=2)], output=output)
        async with served(channels) as (_, address), grpc.aio.insecure_channel(address) as channel:
            reply = await inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(inferring(pixels))
            answer = await explain_pb2_grpc.ExplanationServiceStub(channel).Explain(asked)
        for data in (reply.raw_output_contents[0], answer.maps[0].data):
            np.testing.assert_allclose(np.frombuffer(data, "<f4").reshape(SIZE), expected.array, atol=1e-6)


@pytest.mark.parametrize("encoding", [pb.Output.OVERLAY_PNG, pb.Output.OVERLAY_JPEG])
@pytest.mark.parametrize("size", [pb.Output.INPUT, pb.Output.ORIGINAL])
async def test_the_servers_overlays_of_four_channels_lie_on_grey(encoding: int, size: int):
    pixels = floats(4)
    image = pb.Image(tensor=pb.Tensor(data_type=pb.Tensor.FLOAT32, shape=pixels.shape, data=pixels.tobytes()))
    output = pb.Output(encoding=encoding, size=size, opacity=0)
    async with served(4) as (_, address), grpc.aio.insecure_channel(address) as channel:
        stub = explain_pb2_grpc.ExplanationServiceStub(channel)
        reply = await stub.Explain(pb.ExplainRequest(image=image, output=output))
    drawn = np.asarray(Image.open(io.BytesIO(reply.maps[0].data)).convert("RGB")).astype(float)
    tolerance = 0.51 if encoding == pb.Output.OVERLAY_PNG else 60  # rounding; JPEG on noise
    np.testing.assert_allclose(drawn, 255 * pixels.mean(axis=2, keepdims=True).repeat(3, axis=2), atol=tolerance)


def typed(array: np.ndarray, data_type: int) -> pb.Image:
    return pb.Image(tensor=pb.Tensor(data_type=data_type, shape=array.shape, data=array.tobytes()))


@pytest.mark.parametrize(
    ("channels", "image", "text"),
    [
        (4, pb.Image(encoded=file(grey16(), "PNG")), "this network has 4 channels, which no image file has"),
        (4, typed(floats(3), pb.Tensor.FLOAT32), "must have shape [40, 24, 4], got [40, 24, 3]"),
        (4, typed(floats(4)[:30].copy(), pb.Tensor.FLOAT32), "the network's input size [40, 24], got [30, 24]"),
        (4, typed(2 * floats(4), pb.Tensor.FLOAT32), "finite pixels in [0, 1]"),
        (1, typed(floats(4), pb.Tensor.FLOAT32), "must have shape [40, 24, 1], got [40, 24, 4]"),
        (1, typed(np.zeros((4, 4, 4), np.uint8), pb.Tensor.UINT8), "1 or 3 of them for UINT8"),
    ],
)
async def test_what_does_not_fit_the_channels_is_refused_at_the_door(channels: int, image: pb.Image, text: str):
    async with served(channels) as (worker, address), grpc.aio.insecure_channel(address) as channel:
        before = worker.steps
        call = explain_pb2_grpc.ExplanationServiceStub(channel).Explain(pb.ExplainRequest(image=image))
        assert text in (await failure(call))[1]
        assert worker.steps == before, "no worker was asked"


async def test_a_photo_of_12_megapixels_is_answered_as_a_picture_as_it_is_as_a_file():
    """The limits of the server are for what was sent: the photo has 8 MB as JPEG, and more than 16 MiB as PNG."""
    y, x = np.mgrid[:3000, :4000]
    grain = np.random.default_rng(0).integers(0, 40, (3000, 4000, 3))
    pixels = (grain + 80 + 60 * np.sin(x / 300)[..., None] + 40 * np.cos(y / 200)[..., None]).astype(np.uint8)
    made = io.BytesIO()
    Image.fromarray(pixels).save(made, "JPEG", quality=96)
    data = made.getvalue()
    assert 7e6 < len(data) < 2**24
    opened, loaded = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data))
    loaded.load()
    async with served(3) as (_, address), AsyncClient(address) as client:
        expected = await client.explain(data, targets=[1])
        same = await client.explain(opened, targets=[1])
        close = await client.explain(loaded, targets=[1])
    np.testing.assert_array_equal(same.maps[0].array, expected.maps[0].array)
    # It travels as another JPEG, of pixels that are averaged by the hundred: they differ by a level of 255 at most.
    np.testing.assert_allclose(close.maps[0].array, expected.maps[0].array, atol=0.05)
    assert close.input == expected.input
