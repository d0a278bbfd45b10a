"""What a target, or the text beside the image, may not say: refused in the same words at every door, for each kind.

Each kind of outputs has a gateway over a real worker, with a network of these tests. Every request is refused with its
status, and one beside it is answered as ever.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import detectors
import grpc
import httpx
import numpy as np
import pytest
import tiny
import torch
from gateway_harness import QUICK, failure
from google.protobuf import json_format
from looking import asking, writing
from PIL import Image
from test_gateway_worker_targets import Beside, Letters, module
from torch import nn
from worker_backend import WorkerBackend

from camserve import cli
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import fixed
from camserve.gateway.server import Gateway
from camserve.images import mask_file
from camserve.oip import inference_pb2 as oip
from camserve.oip import inference_pb2_grpc
from camserve.types import Preprocessing
from camserve.v1 import explain_pb2 as pb
from camserve.v1 import explain_pb2_grpc
from camserve.worker.network import Network

OCCLUSION = pb.MethodSpec(occlusion={"positions": 4})
TINY = Preprocessing(resize_px=64, crop_px=tiny.TINY_SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
SMALL = Preprocessing(32, (32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
BRIGHT = (255 * detectors.picture(detectors.CAT, detectors.DOG)).astype(np.uint8)
NAN, INF = float("nan"), float("inf")


def _sometimes_no_vector() -> nn.Module:
    """The vector of "z" has no numbers, and that of "0" is all zeros."""
    made = Beside(tiny.tiny_module()[:-1])
    made.text_encoder = Letters()
    made.text_encoder.rows = nn.Embedding(256, 16)
    made.text_encoder.rows.weight.data[ord("z")] = torch.nan
    made.text_encoder.rows.weight.data[ord("0")] = 0
    return made.eval()


@dataclass(frozen=True)
class World:
    """A network, an image, and a request that it answers."""

    network: Network
    image: bytes
    good: pb.Target
    text: str = ""


def world(made: nn.Module, outputs: str, good: pb.Target, image: np.ndarray | None = None, **options: Any) -> World:
    text, given = options.pop("text", ""), {"preprocessing": TINY} | options
    network = Network(made.eval(), outputs=outputs, name="tiny", **given)
    return World(network, tiny.png(tiny.pixels(1) if image is None else image), good, text)


def worlds() -> Mapping[str, World]:
    classes = {"labels": tiny.TINY_LABELS}
    return {
        "softmax": world(tiny.tiny_module(), "softmax", pb.Target(index=1), **classes),
        "value": world(module("value", ("age", "size")), "value", pb.Target(label="age"), labels=("age", "size")),
        "segmentation": world(module("segmentation", tiny.TINY_LABELS), "segmentation", pb.Target(top_k=1), **classes),
        "embedding": world(module("embedding", ()), "embedding", vector(1, 2, 3, 4)),
        "text-image": world(_sometimes_no_vector(), "text-image", pb.Target(text="a cat")),
        "boxes": world(
            detectors.Windows(),
            "boxes",
            pb.Target(detection=0),
            BRIGHT,
            labels=detectors.LABELS,
            preprocessing=detectors.PREPROCESSING,
        ),
        "answers": world(asking(), "answers", pb.Target(index=1), preprocessing=SMALL, text="which is left"),
        "tokens": world(writing(), "tokens", pb.Target(text="one two"), preprocessing=SMALL),
    }


def vector(*numbers: float) -> pb.Target:
    return pb.Target(vector=np.array(numbers, "<f4").tobytes())


def box(x0: float, y0: float, x1: float, y1: float, **of: Any) -> pb.Target:
    edges = pb.Edges(x0=x0, y0=y0, x1=x1, y1=y1)
    return pb.Target(box=pb.BoxTarget(box=edges, of=pb.ClassTarget(**of) if of else None))


def region(x0: float, y0: float, x1: float, y1: float, of: int = 1) -> pb.Target:
    return pb.Target(region=pb.Region(box=pb.Edges(x0=x0, y0=y0, x1=x1, y1=y1), of=pb.ClassTarget(index=of)))


def masked(mask: bytes) -> pb.Target:
    return pb.Target(region=pb.Region(mask=mask, of=pb.ClassTarget(index=1)))


def grey(*size: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Bad:
    """A request that is refused; what is None or empty is as in the good one."""

    target: pb.Target | None
    said: str
    form: str | None = None
    """Text form, or JSON; None: it has none."""
    code: str = "INVALID_ARGUMENT"
    text: str | None = None
    methods: tuple[pb.MethodSpec, ...] = field(default=(OCCLUSION,))


NOT_THIS = "FAILED_PRECONDITION"
OUTSIDE, EDGES = "is outside of what the network sees of the image: x 0..32, y 0..32", "is four numbers x0, y0, x1, y1"
UNKNOWN = "the targets of this model are "
AREA = "has x0 < x1 and y0 < y1, got "
BASE64 = base64.b64encode(mask_file(np.ones((3, 5), bool))).decode()

BAD: Mapping[str, tuple[Bad, ...]] = {
    "softmax": (
        Bad(pb.Target(label="txet:a cat"), f"{UNKNOWN}class ('tabby cat')", "txet:a cat"),
        Bad(pb.Target(text="a cat"), "this model gives classes, and its targets are", "text:a cat", NOT_THIS),
        Bad(vector(1, 2), "this model gives classes, and its targets are", '[{"vector": [1, 2]}]', NOT_THIS),
        Bad(box(1, 2, 3, 4), "this model gives classes, and its targets are", "box:1,2,3,4", NOT_THIS),
        Bad(pb.Target(detection=0), "this model gives classes, and its targets are", "detection:0", NOT_THIS),
        Bad(region(1, 2, 3, 4), "this model gives classes, and its targets are", "region:1,2,3,4:1", NOT_THIS),
        Bad(pb.Target(word=pb.Word(at=1)), "this model gives classes, and its targets are", "word:1", NOT_THIS),
        Bad(pb.Target(index=1), "and no text beside it; got", "1", text="which is left"),
    ),
    "value": (
        Bad(pb.Target(top_k=1), "this model gives numbers, and its targets are value ('up:age')", "top1", NOT_THIS),
        Bad(
            pb.Target(against=pb.Against(of=pb.ClassTarget(index=0))),
            "this model gives numbers, and its targets are value ('up:age')",
            "against:0",
            NOT_THIS,
        ),
        Bad(pb.Target(label="hight"), "unknown label 'hight'", "hight"),
    ),
    "segmentation": (
        Bad(region(900, 2, 950, 9), "lies in what the network sees: x ", "region:900,2,950,9:1"),
        Bad(region(5, 5, 5, 9), f"a region's box {AREA}5,5,5,9", "region:5,5,5,9:1"),
        Bad(region(9, 5, 5, 9), f"a region's box {AREA}9,5,5,9", "region:9,5,5,9:1"),
        Bad(region(NAN, 5, 5, 9), f"a region's box {EDGES}", "region:nan,5,5,9:1"),
        Bad(region(1, 5, INF, 9), f"a region's box {EDGES}", "region:1,5,inf,9:1"),
        Bad(
            masked(b""),
            "grey PNG file, got zero bytes",
            '[{"region": {"mask": "", "of": 1}}]',
        ),
        Bad(masked(grey(64, 48)), "a mask is a grey PNG file"),
        Bad(
            masked(mask_file(np.ones((3, 5), bool))),
            "size of the sent image",
            f'[{{"region": {{"mask": "{BASE64}", "of": 1}}}}]',
        ),
        Bad(masked(mask_file(np.zeros((48, 64), bool))), "the mask of a region is empty: all of its pixels are 0"),
        Bad(pb.Target(text="a cat"), "this model gives classes of places, and its targets are", "text:a cat", NOT_THIS),
        Bad(box(1, 2, 3, 4), "region ('region:10,20,90,80:tabby cat'); got 'box:1,2,3,4'", "box:1,2,3,4", NOT_THIS),
    ),
    "embedding": (
        Bad(vector(1, 2, 3), "a vector of this model has 4 numbers, got 3", '[{"vector": [1, 2, 3]}]'),
        Bad(vector(1, NAN, 3, 4), "a vector has finite numbers, got nan", '[{"vector": [1, NaN, 3, 4]}]'),
        Bad(vector(1, 2, -INF, 4), "a vector has finite numbers, got -inf", '[{"vector": [1, 2, -Infinity, 4]}]'),
        Bad(vector(0, 0, 0, 0), "a vector must not be all zeros", '[{"vector": [0, 0, 0, 0]}]'),
        Bad(vector(), "a vector has the shape [dimension]", '[{"vector": []}]'),
        Bad(pb.Target(vector=b"abcde"), "4 bytes for each number; got 5 bytes"),
        Bad(
            pb.Target(reference=pb.Image(encoded=b"a cat")),
            "not a JPEG, PNG, WEBP image",
            '[{"reference": "YSBjYXQ="}]',
        ),
        Bad(pb.Target(index=0), "this model gives vectors, and its targets are vector", "0", NOT_THIS),
        Bad(pb.Target(text="ann"), "this model gives vectors, and its targets are vector", "text:ann", NOT_THIS),
        Bad(None, "no references are packed with it: say what to be similar to, by vector", ""),
    ),
    "text-image": (
        Bad(pb.Target(text=" "), "a text target has words", '[{"text": " "}]'),
        Bad(pb.Target(text="x" * 101), "a text has at most 100 tokens here, got 101", "text:" + "x" * 101),
        Bad(pb.Target(text="x" * 1001), "a text has at most 1000 characters, got 1001", "text:" + "x" * 1001),
        Bad(pb.Target(text="z"), "the vector of the text 'z' has numbers that are not finite", "text:z", NOT_THIS),
        Bad(pb.Target(text="0"), "the vector of the text '0' is all zeros", "text:0", NOT_THIS),
        Bad(vector(1, 2, 3), "a vector of this model has 16 numbers, got 3", '[{"vector": [1, 2, 3]}]'),
        Bad(
            vector(*[NAN] * 16), "a vector has finite numbers, got nan", f'[{{"vector": [{", ".join(["NaN"] * 16)}]}}]'
        ),
        Bad(vector(*[0] * 16), "a vector must not be all zeros", f'[{{"vector": {[0] * 16}}}]'),
        Bad(box(1, 2, 3, 4), "this model gives vectors, and its targets are text (", "box:1,2,3,4", NOT_THIS),
        Bad(None, "no prompts are packed with it: say what to be similar to, by text (", ""),
    ),
    "boxes": (
        Bad(box(40, 2, 50, 9), f"the box 40, 2, 50, 9 {OUTSIDE}", "box:40,2,50,9"),
        Bad(box(-9, -9, 0, 0), f"the box -9, -9, 0, 0 {OUTSIDE}", "box:-9,-9,0,0"),
        Bad(box(3, 3, 3, 9), f"a box {AREA}3,3,3,9", "box:3,3,3,9"),
        Bad(box(9, 9, 3, 3), f"a box {AREA}9,9,3,3", "box:9,9,3,3"),
        Bad(box(1, NAN, 3, 3), f"a box {EDGES}", "box:1,nan,3,3"),
        Bad(box(1, 2, 3, INF), f"a box {EDGES}", "box:1,2,3,inf"),
        Bad(pb.Target(box=pb.BoxTarget()), f"a box {AREA}0,0,0,0", "box:0,0,0,0"),
        Bad(box(1, 2, 9, 9, label="wolf"), "unknown label 'wolf'", "box:1,2,9,9:wolf"),
        Bad(box(1, 2, 9, 9, index=9), "class index must be 0..3, got 9", "box:1,2,9,9:9"),
        Bad(
            pb.Target(detection=2),
            "there is no detection 2 in this image; there are 0: class 2 (0.8",
            "detection:2",
        ),
        Bad(pb.Target(label="bird"), "there is no detection of class 3 in this image; there are 0: class 2", "bird"),
        Bad(pb.Target(text="a cat"), "this model gives boxes, and its targets are class", "text:a cat", NOT_THIS),
        Bad(region(1, 2, 3, 4), "this model gives boxes, and its targets are class", "region:1,2,3,4:1", NOT_THIS),
        Bad(
            pb.Target(detection=0),
            "the methods that work: rise, d_rise, occlusion",
            "detection:0",
            NOT_THIS,
            methods=(pb.MethodSpec(grad_cam={}),),
        ),
    ),
    "answers": (
        Bad(pb.Target(index=1), "needs a question beside the image", "1", text=""),
        Bad(pb.Target(index=1), "the question has no word", "1", text="?!"),
        Bad(pb.Target(index=1), "unknown word 'lefd'; close to it: left", "1", text="which is lefd"),
        Bad(pb.Target(index=1), "at most 4 tokens, got 5", "1", text="left " * 5),
        Bad(pb.Target(index=1), "a text has at most 1000 characters, got 5000", "1", text="left " * 1000),
        Bad(pb.Target(text="nine"), "unknown label 'nine'", "text:nine"),
        Bad(pb.Target(index=5), "class index must be 0..4, got 5", "5"),
        Bad(pb.Target(word=pb.Word(at=1)), "this model gives answers, and its targets are class", "word:1", NOT_THIS),
        Bad(vector(1, 2), "this model gives answers, and its targets are class", '[{"vector": [1, 2]}]', NOT_THIS),
    ),
    "tokens": (
        Bad(
            pb.Target(text="one"), "the caption so far: the network takes at most 4 tokens", "text:one", text="one " * 5
        ),
        Bad(pb.Target(text="one"), "unknown word 'none'", "text:one", text="none"),
        Bad(pb.Target(text="one " * 6), "the network takes at most 4 tokens, got 6", "text:" + "one " * 6),
        Bad(pb.Target(text="four"), "the words asked for: unknown word 'four'", "text:four"),
        Bad(pb.Target(text=" "), "a text target has words", '[{"text": " "}]'),
        Bad(pb.Target(word=pb.Word(at=0, words="one")), "word", "word:0:one"),
        Bad(pb.Target(word=pb.Word(at=3, words="one two")), "there are 2 words in 'one two', word 3", "word:3:one two"),
        Bad(box(1, 2, 3, 4), "this model gives words, and its targets are class", "box:1,2,3,4", NOT_THIS),
    ),
}


def asked(of: World, target: pb.Target | None, text: str | None, *methods: pb.MethodSpec) -> pb.ExplainRequest:
    return pb.ExplainRequest(
        image=pb.Image(encoded=of.image),
        methods=methods,
        targets=[] if target is None else [target],
        text=of.text if text is None else text,
    )


def inferred(of: World, bad: Bad) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="image", datatype="BYTES", shape=[1]).contents.bytes_contents.append(of.image)
    given = {"method": method_text(bad), "targets": bad.form, "text": of.text if bad.text is None else bad.text}
    for name, value in given.items():
        if value:
            request.parameters[f"explain_{name}"].string_param = value
    return request


def array(reply: pb.ExplainReply) -> np.ndarray:
    return np.frombuffer(reply.maps[0].data, "<f4")


def method_text(bad: Bad) -> str:
    return "occlusion:positions=4" if bad.methods == (OCCLUSION,) else "grad_cam"


def said_by_the_command(of: World, bad: Bad, address: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    path = folder / "image.png"
    path.write_bytes(of.image)
    text = of.text if bad.text is None else bad.text
    arguments = ["explain", str(path), "--out", str(folder), "--address", address, f"--method={method_text(bad)}"]
    arguments += [f"--target={bad.form}"] if bad.form else []
    arguments += [f"--text={text}"] if text else []
    assert cli.run(arguments) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kind", BAD)
async def test_each_bad_target_is_refused_in_the_same_words_at_every_door(kind, tmp_path, capsys):
    of = worlds()[kind]
    settings = Settings(**QUICK, web_listen="127.0.0.1:0")
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(Gateway(settings, fixed({"here": WorkerBackend(of.network)})))
        await gateway.wait_ready(30)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(gateway.address))
        url = f"http://{gateway.web_address}"
        web = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60, trust_env=False))
        typed, open_ = (
            explain_pb2_grpc.ExplanationServiceStub(channel),
            inference_pb2_grpc.GRPCInferenceServiceStub(channel),
        )
        good = asked(of, of.good, None, OCCLUSION)
        expected = await typed.Explain(good)
        for bad in BAD[kind]:
            request = asked(of, bad.target, bad.text, *bad.methods)
            (code, text, _), fine = await asyncio.gather(failure(typed.Explain(request)), typed.Explain(good))
            assert (code, bad.said in text) == (bad.code, True), (bad, code, text)
            # What is in a step with others is in passes of other sizes, which round otherwise.
            np.testing.assert_allclose(
                array(fine), array(expected), atol=1e-4, err_msg="a neighbour is answered as ever"
            )
            answer = await web.post("/v1/explain", json=json_format.MessageToDict(request))
            status = {"INVALID_ARGUMENT": 400, "FAILED_PRECONDITION": 422}[code]
            assert (answer.status_code, answer.json()["detail"]) == (status, text), bad
            if bad.form is not None:
                code, said, _ = await failure(open_.ModelInfer(inferred(of, bad)))
                assert (code, bad.said in said) == (bad.code, True), (bad, code, said)
            if bad.form is not None and not bad.form.startswith("["):
                said = await asyncio.to_thread(said_by_the_command, of, bad, gateway.address, tmp_path, capsys)
                assert bad.said in said, (bad, said)


async def test_no_detection_at_all_is_an_answer_at_every_door():
    """No predictions, and maps of zeros that say so."""
    of = worlds()["boxes"]
    dark = World(of.network, tiny.png(np.zeros((40, 50, 3), np.uint8)), of.good)
    settings = Settings(**QUICK, web_listen="127.0.0.1:0")
    async with Gateway(settings, fixed({"here": WorkerBackend(of.network)})) as gateway:
        await gateway.wait_ready(30)
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            stub = explain_pb2_grpc.ExplanationServiceStub(channel)
            for target in (None, pb.Target(detection=0), pb.Target(top_k=3), pb.Target(label="cat")):
                reply = await stub.Explain(asked(dark, target, None, OCCLUSION, pb.MethodSpec(d_rise={"masks": 20})))
                assert not reply.predictions
                assert [one.degenerate for one in reply.maps] == [True, True]
                assert not any(np.frombuffer(one.data, "<f4").any() for one in reply.maps)
            inference = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            found = await inference.ModelInfer(inferred(dark, Bad(None, "")))
        async with httpx.AsyncClient(base_url=f"http://{gateway.web_address}", trust_env=False) as web:
            sent = json_format.MessageToDict(asked(dark, None, None, OCCLUSION))
            body = (await web.post("/v1/explain", json=sent)).json()
    assert json.loads(found.parameters["maps"].string_param)[0]["degenerate"]
    assert {output.name: list(output.shape) for output in found.outputs}["boxes"] == [0, 4]
    assert body["predictions"] == []
    assert body["maps"][0]["degenerate"] is True


async def test_the_boxes_of_detections_are_an_output_of_the_open_inference_protocol():
    of = worlds()["boxes"]
    async with Gateway(Settings(**QUICK), fixed({"here": WorkerBackend(of.network)})) as gateway:
        await gateway.wait_ready(30)
        async with grpc.aio.insecure_channel(gateway.address) as channel:
            typed = await explain_pb2_grpc.ExplanationServiceStub(channel).Explain(asked(of, None, None, OCCLUSION))
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            found = {output.name: output for output in (await stub.ModelInfer(inferred(of, Bad(None, "")))).outputs}
    edges = [(one.box.x0, one.box.y0, one.box.x1, one.box.y1) for one in typed.predictions]
    assert len(edges) == 2
    assert list(found["boxes"].shape) == [2, 4]
    assert list(found["boxes"].contents.fp32_contents) == pytest.approx(np.ravel(edges))
    assert list(found["class_indices"].contents.int64_contents) == [one.index for one in typed.predictions]
