"""Holds what `hostile.py` sends: one function for each thing that a client may do to harm the others.

An attack prepares its messages first and sends them when it is told to, so that their making costs the server nothing.
"""

from __future__ import annotations

import asyncio
import gzip
import http.client
import io
import itertools
import json
import pickle
import socket
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from PIL import Image

from camserve.oip import inference_pb2 as oip
from camserve.v1 import explain_pb2 as pb

MIB = 2**20
EXPLAIN = "/camserve.v1.ExplanationService/Explain"
STREAM = "/camserve.v1.ExplanationService/StreamExplain"
GET_MODEL = "/camserve.v1.ExplanationService/GetModel"
INFER = "/inference.GRPCInferenceService/ModelInfer"
METADATA = "/inference.GRPCInferenceService/ModelMetadata"
HEALTH = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
UNBOUNDED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@dataclass
class Target:
    """The server that is attacked."""

    address: str
    metrics_address: str
    token: str
    """Secret of an ordinary token."""
    slow_token: str
    """Secret of a token with one request per second."""
    began: Callable[[], Awaitable[None]]
    """Awaited when everything is prepared."""
    sent_bytes: int = 0
    codes: Counter[str] = field(default_factory=Counter)

    def channel(self, *options: tuple[str, Any]) -> grpc.aio.Channel:
        """Returns a connection of its own."""
        own = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        return grpc.aio.insecure_channel(self.address, options=[*UNBOUNDED, *own, *options])

    def metadata(self, token: str | None = "") -> list[tuple[str, str]]:
        """Returns the metadata of a call with a token; None: without one."""
        return [] if token is None else [("authorization", f"Bearer {token or self.token}")]


Attack = Callable[[Target], Awaitable[None]]
ATTACKS: dict[str, tuple[str, Attack]] = {}
"""Every attack by what it does, with the kind of server that it needs: see `serving` in hostile.py."""


def attack(name: str, server: str = "gateway") -> Callable[[Attack], Attack]:
    def add(function: Attack) -> Attack:
        ATTACKS[name] = server, function
        return function

    return add


async def send(
    target: Target,
    path: str,
    messages: Sequence[bytes],
    *,
    token: str | None = "",
    timeout_s: float = 10.0,
    channels: int = 1,
    at_once: bool = True,
    **options: Any,
) -> None:
    """Sends messages and counts what becomes of them."""
    open_channels = [target.channel() for _ in range(channels)]
    await target.began()

    async def one(number: int, message: bytes) -> None:
        call = open_channels[number % channels].unary_unary(path, None, None)
        try:
            await call(message, timeout=timeout_s, metadata=target.metadata(token), **options)
            target.codes["OK"] += 1
        except grpc.aio.AioRpcError as error:
            target.codes[_shown(error)] += 1

    target.sent_bytes += sum(map(len, messages))
    if at_once:
        await asyncio.gather(*(one(number, message) for number, message in enumerate(messages)))
    else:
        for number, message in enumerate(messages):
            await one(number, message)
    for channel in open_channels:
        await channel.close(None)


def _shown(error: grpc.aio.AioRpcError) -> str:
    """Returns the status; says so where gRPC itself has replaced the server's error."""
    replaced = "metadata size" in (error.details() or "")
    return f"{error.code().name}{' (metadata too large)' if replaced else ''}"


def photo(height: int = 60, width: int = 80, kind: str = "PNG", **options: Any) -> bytes:
    """Returns an image file with a gradient, which compresses well."""
    rows = np.linspace(0, 255, height, dtype=np.uint8)[:, None, None]
    columns = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None]
    pixels = np.concatenate(
        [np.broadcast_to(rows, (height, width, 1)), np.broadcast_to(columns, (height, width, 1))], 2
    )
    return _file(Image.fromarray(np.concatenate([pixels, pixels[..., :1]], 2)), kind, **options)


def _file(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ask(*methods: pb.MethodSpec, image: bytes | None = None, **fields: Any) -> bytes:
    """Returns a serialized request."""
    content = pb.Image(encoded=photo() if image is None else image)
    return pb.ExplainRequest(
        image=content, methods=methods or [pb.MethodSpec(grad_cam={})], **fields
    ).SerializeToString()


def infer(**fields: Any) -> bytes:
    """Returns a serialized Open Inference request of a photo."""
    request = oip.ModelInferRequest(**fields)
    if not fields.get("inputs"):
        request.inputs.add(name="image", datatype="BYTES", shape=[1])
        request.raw_input_contents.append(struct.pack("<I", len(photo())) + photo())
    return request.SerializeToString()


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def part(number: int, content: bytes) -> bytes:
    """Returns a length-delimited field of a message."""
    return varint(number << 3 | 2) + varint(len(content)) + content


# Work


GRAD, GROUP, SCORE = pb.MethodSpec(grad_cam={}), pb.MethodSpec(group_cam={}), pb.MethodSpec(score_cam={})


@attack("16 Grad-CAMs with curves of 4096 steps")
async def _(target: Target) -> None:
    layers = pb.MethodSpec(smooth_grad_cam_plus_plus={})
    kinds = [GRAD, GROUP, SCORE, layers, *(pb.MethodSpec(group_cam={"groups": 2 + n}) for n in range(12))]
    await send(target, EXPLAIN, [ask(*kinds, evaluate=True, evaluation_steps=4096)])


@attack("Grad-CAM of all classes with curves of 4096 steps, four times")
async def _(target: Target) -> None:
    message = ask(GRAD, targets=[pb.Target(top_k=10)], evaluate=True, evaluation_steps=4096)
    await send(target, EXPLAIN, [message] * 4)


@attack("Group-CAM of 96 groups of [index, top 9], ten times")
async def _(target: Target) -> None:
    targets = [pb.Target(index=1), pb.Target(top_k=9)]
    await send(target, EXPLAIN, [ask(pb.MethodSpec(group_cam={"groups": 96}), targets=targets)] * 10)


@attack("SS-CAM of 1000 samples")
async def _(target: Target) -> None:
    await send(target, EXPLAIN, [ask(pb.MethodSpec(ss_cam={"samples": 1000}))])


@attack("RISE of 100,000 masks with curves, eight times")
async def _(target: Target) -> None:
    message = ask(pb.MethodSpec(rise={"masks": 100_000}), evaluate=True, evaluation_steps=4096)
    await send(target, EXPLAIN, [message] * 8)


@attack("SmoothGrad of 1000 samples of 10 classes, eight times")
async def _(target: Target) -> None:
    message = ask(pb.MethodSpec(smooth_grad={"samples": 1000}), targets=[pb.Target(top_k=10)])
    await send(target, EXPLAIN, [message] * 8)


@attack("2000 Score-CAMs, each cancelled at once")
async def _(target: Target) -> None:
    message = ask(SCORE)
    await send(target, EXPLAIN, [message] * 2000, timeout_s=0.02)


# What is in a message


@attack("500,000 equal label targets")
async def _(target: Target) -> None:
    message = ask() + part(5, part(2, b"tabby")) * 500_000
    await send(target, EXPLAIN, [message])


@attack("20,000 targets, no two alike")
async def _(target: Target) -> None:
    message = ask() + b"".join(part(5, part(2, b"label %d" % number)) for number in range(20_000))
    await send(target, EXPLAIN, [message])


@attack("a million empty methods")
async def _(target: Target) -> None:
    await send(target, EXPLAIN, [ask() + part(4, b"") * 1_000_000])


@attack("30 million empty targets: 60 MiB")
async def _(target: Target) -> None:
    await send(target, EXPLAIN, [ask() + part(5, b"") * 30_000_000])


@attack("30 million empty layers in a stream: 60 MiB")
async def _(target: Target) -> None:
    await send(target, STREAM, [ask() + part(6, b"") * 30_000_000])


@attack("30 million unknown fields: 60 MiB")
async def _(target: Target) -> None:
    await send(target, EXPLAIN, [ask() + varint(999 << 3) + (varint(15 << 3 | 0)[:1] + b"\1") * 30_000_000])


@attack("a tensor's shape of 30 million numbers")
async def _(target: Target) -> None:
    shape = part(3, part(2, part(2, b"\1" * 30_000_000)))
    await send(target, EXPLAIN, [shape + part(4, part(2, b""))])


@attack("groups nested 10,000 deep, a thousand times")
async def _(target: Target) -> None:
    nested = varint(999 << 3 | 3) * 10_000 + varint(999 << 3 | 4) * 10_000
    await send(target, EXPLAIN, [ask() + nested * 1000])


@attack("a layer name of 10 MB")
async def _(target: Target) -> None:
    await send(target, EXPLAIN, [ask(layers=["features" * 1_250_000])])


@attack("a label of 4 MB")
async def _(target: Target) -> None:
    await send(target, EXPLAIN, [ask(targets=[pb.Target(label="tabby" * 800_000)])])


@attack("a model name of 60 MB, at GetModel and ModelMetadata")
async def _(target: Target) -> None:
    name = part(1, b"m" * 60_000_000)
    await send(target, GET_MODEL, [name], at_once=False)
    await send(target, METADATA, [name], at_once=False)


@attack("a health check's service name of 60 MB")
async def _(target: Target) -> None:
    await send(target, HEALTH, [part(1, b"s" * 60_000_000)])


@attack("names of 20,000 characters in every field")
async def _(target: Target) -> None:
    long = "x" * 20_000
    messages = [
        ask(targets=[pb.Target(label=long)]),
        ask(model=long),
        ask(version=long),
        ask(layers=[long]),
        ask(output=pb.Output(colormap=long)),
    ]
    await send(target, EXPLAIN, messages)
    parameters = ["explain_method", "explain_targets", "explain_layer", "explain_colormap", long]
    texts = [infer(parameters={name: oip.InferParameter(string_param=long)}) for name in parameters]
    names = [infer(model_name=long), infer(model_version=long), infer(id=long)]
    tensor = oip.ModelInferRequest.InferInputTensor(name=long, datatype=long, shape=[1])
    await send(target, INFER, [*texts, *names, infer(inputs=[tensor])])
    await send(target, GET_MODEL, [part(1, long.encode())])


@attack("control characters, quotes and lone surrogates in names")
async def _(target: Target) -> None:
    names = [b"\x00\x1b[2J\r\n", b"{'a': 1}\n" * 20, "\u202e\u2028é".encode(), b"\xff\xfe\xed\xa0\x80"]
    messages = [ask() + part(number, name) for name in names for number in (1, 2, 6)]
    await send(target, EXPLAIN, messages)


@attack('Open Inference: targets "1," a million times')
async def _(target: Target) -> None:
    await send(
        target, INFER, [infer(parameters={"explain_targets": oip.InferParameter(string_param="1," * 1_000_000)})]
    )


@attack("Open Inference: a million parameters")
async def _(target: Target) -> None:
    parameters = b"".join(part(4, part(1, b"p%d" % number)) for number in range(1_000_000))
    await send(target, INFER, [infer() + parameters])


@attack("Open Inference: 20 million empty inputs and outputs")
async def _(target: Target) -> None:
    await send(target, INFER, [infer() + part(5, b"") * 10_000_000 + part(6, b"") * 10_000_000])


@attack("Open Inference: 60 MiB of float contents")
async def _(target: Target) -> None:
    tensor = part(1, b"image") + part(2, b"FP32") + part(5, part(6, bytes(60 * MIB)))
    await send(target, INFER, [part(5, tensor)])


@attack("Open Inference: 60 MiB of numbers of one byte as contents")
async def _(target: Target) -> None:
    tensor = part(1, b"image") + part(2, b"UINT8") + part(5, part(4, b"\1" * 60 * MIB))
    await send(target, INFER, [part(5, tensor)])


@attack("Open Inference: 30 million contents of no bytes")
async def _(target: Target) -> None:
    tensor = part(1, b"image") + part(2, b"BYTES") + part(5, part(8, b"") * 30_000_000)
    await send(target, INFER, [part(5, tensor)])


@attack("60 MiB that are no message, at every door")
async def _(target: Target) -> None:
    for path in (EXPLAIN, STREAM, INFER, GET_MODEL, METADATA, HEALTH):
        await send(target, path, [b"\xff" * 60 * MIB], at_once=False)


# Headers of images


def jpeg_with(header: bytes) -> bytes:
    """Returns a JPEG with bytes behind its first marker."""
    plain = photo(kind="JPEG")
    return plain[:2] + header + plain[2:]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


SIZE = 16 * MIB - 4096

HEADERS: dict[str, Callable[[], bytes]] = {
    "16 MiB of FF before a JPEG's header": lambda: jpeg_with(b"\xff" * SIZE),
    "16 MiB of FF 00 before a JPEG's header": lambda: jpeg_with(b"\xff\x00" * (SIZE // 2)),
    "16 MiB of empty JPEG comments": lambda: jpeg_with(b"\xff\xfe\x00\x02" * (SIZE // 4)),
    "16 MiB of empty APP1 segments": lambda: jpeg_with(b"\xff\xe1\x00\x08Exif\0\0" * (SIZE // 10)),
    "16 MiB of empty APP13 segments": lambda: jpeg_with(b"\xff\xed\x00\x10Photoshop 3.0\0" * (SIZE // 18)),
    "16 MiB of empty PNG text chunks": lambda: photo()[:33] + chunk(b"tEXt", b"k\0v") * (SIZE // 15) + photo()[33:],
    "16 MiB of unknown PNG chunks": lambda: photo()[:33] + chunk(b"abCd", b"") * (SIZE // 12) + photo()[33:],
    "PNG text that inflates to a gigabyte": lambda: (
        photo()[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10 * MIB))) * 100 + photo()[33:]
    ),
    "16 MiB of empty WebP chunks": lambda: webp_with(b"JUNK\0\0\0\0" * (SIZE // 8)),
}


def webp_with(chunks: bytes) -> bytes:
    plain = photo(kind="WEBP")
    body = b"WEBP" + chunks + plain[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _header_attack(name: str, made: Callable[[], bytes]) -> None:
    @attack(name)
    async def _(target: Target) -> None:
        await send(target, EXPLAIN, [ask(image=made())])


for _name, _made in HEADERS.items():
    _header_attack(_name, _made)


@attack("16 MiB of FF before a JPEG's header, and of empty PNG text chunks, 16 of each at once")
async def _(target: Target) -> None:
    messages = [ask(image=HEADERS[name]()) for name in list(HEADERS)[:6:5]]
    await send(target, EXPLAIN, messages * 16, channels=4, timeout_s=30)


@attack("500 photos with broken EXIF")
async def _(target: Target) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8769] = 6, "maker", {0x9003: "2026:01:01 00:00:00"}
    good, random = exif.tobytes(), np.random.default_rng(0)
    messages = []
    for _ in range(500):
        broken = bytearray(good)
        for at in random.integers(6, len(broken), 4):
            broken[at] = random.integers(256)
        messages.append(ask(image=photo(kind="JPEG", exif=bytes(broken))))
    await send(target, EXPLAIN, messages, channels=8)


# Bytes


@attack("48 messages of 60 MiB without a token")
async def _(target: Target) -> None:
    await send(target, EXPLAIN, [bytes(60 * MIB)] * 48, token=None, channels=48)


@attack("48 messages of 60 MiB with a wrong token, on one connection")
async def _(target: Target) -> None:
    await send(target, INFER, [bytes(60 * MIB)] * 48, token="camserve_wrong")


@attack("48 messages of 60 MiB of no image")
async def _(target: Target) -> None:
    await send(target, EXPLAIN, [part(3, part(1, bytes(60 * MIB)))] * 48, channels=8, timeout_s=20)


@attack("128 tensors of 15 MiB")
async def _(target: Target) -> None:
    side = 2289
    tensor = pb.Tensor(data_type=pb.Tensor.UINT8, shape=[side, side, 3], data=bytes(3 * side * side))
    message = pb.ExplainRequest(image=pb.Image(tensor=tensor), methods=[SCORE]).SerializeToString()
    await send(target, EXPLAIN, [message] * 128, channels=8, timeout_s=20)


@attack("40 overlays of 17 MP in the original's size")
async def _(target: Target) -> None:
    output = pb.Output(size=pb.Output.ORIGINAL, encoding=pb.Output.PNG)
    await send(target, EXPLAIN, [ask(image=photo(4123, 4123), output=output)] * 40, channels=8, timeout_s=30)


@attack("800 MiB of zeros, 0.8 MB as gzip")
async def _(target: Target) -> None:
    channel = target.channel(("grpc.default_compression_algorithm", 2))
    message = bytes(800 * MIB)
    await target.began()
    target.sent_bytes += len(gzip.compress(message, 1))
    try:
        await channel.unary_unary(EXPLAIN, None, None)(message, timeout=20, metadata=target.metadata())
    except grpc.aio.AioRpcError as error:
        target.codes[_shown(error)] += 1
    await channel.close(None)


@attack("3000 Health.Watch without a token")
async def _(target: Target) -> None:
    channels = [target.channel() for _ in range(30)]
    await target.began()

    async def watch(channel: grpc.aio.Channel) -> None:
        try:
            async for _ in channel.unary_stream(WATCH, None, None)(b"", timeout=5):
                pass
        except grpc.aio.AioRpcError as error:
            target.codes[_shown(error)] += 1

    await asyncio.gather(*(watch(channel) for channel in channels for _ in range(100)))
    for channel in channels:
        await channel.close(None)


@attack("40 streams with maps of 24 MB that are never read")
async def _(target: Target) -> None:
    output = pb.Output(size=pb.Output.ORIGINAL, encoding=pb.Output.FLOAT32)
    message = ask(SCORE, image=photo(2449, 2449), output=output, stream={"max_maps": 100, "min_interval_s": 0})
    channels = [target.channel() for _ in range(40)]
    await target.began()
    target.sent_bytes += 40 * len(message)
    calls = [channel.unary_stream(STREAM, None, None)(message, metadata=target.metadata()) for channel in channels]
    await asyncio.sleep(15)
    for call in calls:
        target.codes["cancelled by the client" if call.cancel() else (await call.code()).name] += 1
    for channel in channels:
        await channel.close(None)


# Order of the checks, connections


@attack("100 malformed calls with a token of one request per second")
async def _(target: Target) -> None:
    await send(target, INFER, [infer() + b"\xff"] * 50, token=target.slow_token)
    await send(target, EXPLAIN, [ask(image=b"no image")] * 50, token=target.slow_token)


@attack("500 half-sent requests at the metrics' port, and a scrape")
async def _(target: Target) -> None:
    host, _, port = target.metrics_address.rpartition(":")
    await target.began()
    sockets = []
    for number in itertools.count():
        if number == 500:
            break
        one = socket.socket()
        one.settimeout(5)
        try:
            one.connect((host, int(port)))
            one.sendall(b"GET /metrics HTTP/1.1\r\nHost: ")
        except OSError as error:
            target.codes[type(error).__name__] += 1
        sockets.append(one)

    def scrape() -> str:
        connection = http.client.HTTPConnection(host, int(port), timeout=15)
        connection.request("GET", "/metrics")
        return str(connection.getresponse().status)

    try:
        target.codes[f"scrape: {await asyncio.to_thread(scrape)}"] += 1
    except OSError as error:
        target.codes[f"scrape: {type(error).__name__}"] += 1
    for one in sockets:
        one.close()


@attack("1000 connections that say nothing")
async def _(target: Target) -> None:
    host, _, port = target.address.rpartition(":")
    await target.began()
    sockets = []
    for _ in range(1000):
        one = socket.socket()
        one.setblocking(False)
        with_error = one.connect_ex((host, int(port)))
        target.codes["connected" if with_error in (0, 115) else str(with_error)] += 1
        sockets.append(one)
        await asyncio.sleep(0)
    await asyncio.sleep(5)
    for one in sockets:
        one.close()


@attack("reflection asked for a name of 1 MB, 50 times")
async def _(target: Target) -> None:
    channel = target.channel()
    await target.began()
    message = part(4, b"n" * MIB)
    target.sent_bytes += 50 * len(message)

    async def ask_once() -> None:
        try:
            async for _ in channel.stream_stream(REFLECTION, None, None)(
                [message], timeout=10, metadata=target.metadata()
            ):
                target.codes["answered"] += 1
        except grpc.aio.AioRpcError as error:
            target.codes[_shown(error)] += 1

    await asyncio.gather(*(ask_once() for _ in range(50)))
    await channel.close(None)


# A broken part


@attack("one TorchServe of three is READY and fails each step; 24 Score-CAMs", "broken")
async def _(target: Target) -> None:
    await send(target, EXPLAIN, [ask(SCORE, image=photo(60 + number)) for number in range(24)], timeout_s=60)


# Decoding, by a real worker


def scans(number: int, height: int, width: int) -> bytes:
    """Returns a progressive grey JPEG whose shortest scan, a few bytes that pass over all pixels, comes many times."""
    plain = _file(Image.fromarray(np.zeros((height, width), np.uint8)), "JPEG", progressive=True, quality=50)
    begins = [at for at in range(len(plain)) if plain.startswith(b"\xff\xda", at)]
    spans = [(begin, _end_of_scan(plain, begin)) for begin in begins]
    begin, end = min(spans, key=lambda span: span[1] - span[0])
    return plain[:begin] + plain[begin:end] * number + plain[end:]


def _end_of_scan(file: bytes, begin: int) -> int:
    """Returns where the next marker is; FF 00 is a byte of the scan's data."""
    end = file.index(b"\xff", begin + 2)
    while file[end + 1] == 0:
        end = file.index(b"\xff", end + 1)
    return end


IMAGES: dict[str, Callable[[], bytes]] = {
    "a progressive JPEG of 900 scans, 64 MP": lambda: scans(900, 8000, 8000),
    "a progressive JPEG of 2000 scans, 16 MP": lambda: scans(2000, 4000, 4000),
    "a PNG of 16-bit grey, 64 MP": lambda: _file(Image.fromarray(np.zeros((8000, 8000), np.uint16)), "PNG"),
    "a PNG with alpha, 64 MP": lambda: _file(Image.new("RGBA", (8000, 8000)), "PNG"),
    "a WebP of 64 MP": lambda: _file(Image.new("RGB", (8000, 8000)), "WEBP", method=0),
    "an image of 60,000 x 1": lambda: _file(Image.new("RGB", (60_000, 1)), "PNG"),
    "a PNG of 64 MP that is cut off": lambda: photo(8000, 8000)[:-2000],
}


def _image_attack(name: str, made: Callable[[], bytes]) -> None:
    @attack(name, "serve")
    async def _(target: Target) -> None:
        await send(target, EXPLAIN, [ask(image=made())], timeout_s=60)


for _name, _made in IMAGES.items():
    _image_attack(_name, _made)


# Archives: nobody sends them, but model owners take them from others


CARD: dict[str, Any] = {
    "name": "bad",
    "version": "1.0",
    "architecture": "torchvision:squeezenet1_1",
    "preprocessing": {"resize_px": 64, "crop_px": [64, 64], "mean": [0, 0, 0], "std": [1, 1, 1]},
    "layer": None,
    "source": "none",
    "licence": "",
}


def archive(
    *, card: object = CARD, labels: bytes = b'["a", "b"]', weights: bytes = b"", more: Mapping[str, bytes] | None = None
) -> bytes:
    """Returns a model archive with these members."""
    file = io.BytesIO()
    members = {"model.json": json.dumps(card).encode(), "labels.json": labels, "weights.safetensors": weights}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in {**members, **(more or {})}.items():
            packed.writestr(name, content)
    return file.getvalue()


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "an archive whose weights are noise": lambda: archive(weights=bytes(range(256)) * 100),
    "an archive without weights": archive,
    "a pickle in place of the weights": lambda: archive(weights=pickle.dumps({"a": [1, 2]})),
    "labels nested 100,000 deep": lambda: archive(labels=b"[" * 100_000),
    "weights that inflate to 2 GB": lambda: archive(weights=bytes(2_000_000_000)),
    "a name of 5000 letters": lambda: archive(card=CARD | {"name": "x" * 5000}),
    "a header of weights that says a terabyte": lambda: archive(weights=struct.pack("<Q", 10**12) + b"{}"),
    "100,000 empty members": lambda: archive(more={f"{number}": b"" for number in range(100_000)}),
    "members outside of the archive": lambda: archive(more={"../../evil.py": b"", "/etc/evil": b""}),
    "an input of a million by a million pixels": lambda: archive(
        card=CARD | {"preprocessing": CARD["preprocessing"] | {"crop_px": [10**6, 10**6], "resize_px": 10**6}}
    ),
    "a label of a million digits": lambda: archive(labels=b"[" + b"9" * 1_000_000 + b"]"),
    "a file that is no archive": lambda: b"PK\x03\x04" + bytes(1000),
}
"""Model archives that were made to harm, by what they are."""
