"""One model that cannot be explained, or not by every method, never keeps the others from being ready."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import towers
from gateway_harness import QUICK
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array
from safetensors.torch import load, save
from torch import nn
from worker_backend import WorkerBackend

from camserve import Engine
from camserve.archive import build_archive, ensure_archive
from camserve.archive.package import WEIGHTS
from camserve.client import AsyncClient
from camserve.errors import Internal, InvalidOption, Unavailable, Unsupported
from camserve.evaluation.digits.asked import NAMES, QUESTIONS, in_order
from camserve.evaluation.digits.scenes import make_scene
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import fixed, torchserves
from camserve.gateway.server import Gateway
from camserve.supervisor import TorchServe, WorkerSettings
from camserve.types import Contrast, Preprocessing, Region, Target
from camserve.worker.network import Network
from camserve.worker.service import Refusal

HANDLER = Path(__file__).parents[2] / "handlers" / "saliency_handler.py"
REASON = "the network cannot be explained: its calls 1 and 2 see two views"


class Cut(nn.Module):
    """Its forward lets no gradient through."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.tiny_module()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net[5:](self.net[:5](x).detach())


class Refusing(WorkerBackend):
    """A worker that answers why its model cannot be served."""

    def __init__(self) -> None:
        super().__init__(tiny.tiny_network())
        self.service = Refusal(Unsupported(REASON))

    async def models(self) -> Sequence[str]:
        return ("refused",)


def cut_network() -> Network:
    preprocessing = Preprocessing(64, tiny.TINY_SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return Network(Cut().eval(), preprocessing=preprocessing, labels=tiny.TINY_LABELS, name="cut")


async def test_a_bad_model_fails_alone_and_says_why():
    backends = {"good": WorkerBackend(tiny.tiny_network()), "cut": WorkerBackend(cut_network()), "bad": Refusing()}
    image = tiny.png(tiny.pixels(0))
    async with Gateway(Settings(**QUICK), fixed(backends)) as gateway, AsyncClient(gateway.address) as client:
        await client.wait_ready(30)
        ready = {model.name: (model.ready, model.failure) for model in await client.models()}
        assert ready == {"tiny": (True, ""), "cut": (True, ""), "refused": (False, REASON)}
        assert (await client.explain(image, ["grad_cam"], model="tiny")).maps
        assert (await client.explain(image, ["score_cam", "rise"], model="cut")).maps
        with pytest.raises(Unsupported, match=r"forward cuts it.*score_cam"):
            await client.explain(image, ["grad_cam"], model="cut")
        with pytest.raises(Unavailable, match=REASON):
            await client.explain(image, ["score_cam"], model="refused")


def test_a_worker_whose_model_cannot_be_loaded_stays_and_says_why(tmp_path):
    spec = importlib.util.spec_from_file_location("handler_under_test", HANDLER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler, types = module.SaliencyHandler(), []
    (tmp_path / "model.json").write_text("{}")
    (tmp_path / "labels.json").write_text("[]")
    context = SimpleNamespace(
        model_yaml_config={},
        system_properties={"model_dir": str(tmp_path)},
        set_response_content_type=lambda index, kind: types.append(kind),
        set_response_status=lambda code, idx: None,
    )
    handler.initialize(context)
    (reply,) = handler.handle([{"body": b"image"}], context)
    assert json.loads(reply)["error"]["kind"] == "InvalidInput"
    assert types == ["application/json"]


NETWORKS = """
from torch import nn

def good():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )

class Picky(nn.Sequential):
    def forward(self, x):
        if x.mean() > 1.5:
            raise ValueError("this is too bright for me")
        return super().forward(x)

def picky():
    return Picky(*good())

broken = good
"""
"""Networks of a package of one's own, as they are when they are packed."""

BROKEN = """
class Broken(nn.Sequential):
    def forward(self, x):
        raise RuntimeError("my lookup table is gone")

def broken():
    return Broken(*good())
"""
"""What is written to that package afterwards."""

WHY = {
    "broken": "batch of images alone, 2 x 3 x 32 x 32 .* it fails with RuntimeError: my lookup table is gone",
    "rotten": "outputs are not finite for this image: NaN or infinite",
}


SOME = ["grad_cam", "score_cam"]
KINDS = {
    "digits-answers": (SOME, ["text:seven", "contrast:seven>two", "top2"]),
    "digits-boxes": ([("d_rise", {"masks": 200}), "occlusion"], ["detection:0", "box:10,10,60,60", "top2"]),
    "digits-segmentation": (
        SOME,
        [
            "background",
            "region:10,20,60.5,70:3",
            Region(Contrast(Target(label="3"), (Target(label="5"),)), mask=np.eye(96, dtype=bool)),
        ],
    ),
    "digits-text-image": (SOME, ["text:a seven left of a two", "a three"]),
}
"""Models of the package whose targets no other model takes, with methods and such targets, served beside the others."""
TEXTS = {"digits-answers": "which digit is left?"}
"""Texts beside the image, of models that take one."""


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """Archives of good networks, of which all but one went bad after they had been packed."""
    package = tmp_path / "their_networks.py"
    package.write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    store = tmp_path / "store"
    preprocessing = Preprocessing(32, (32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    for name, function in {"good": "good", "picky": "picky", "broken": "broken", "rotten": "good"}.items():
        build_archive(f"their_networks:{function}", name=name, store=store, preprocessing=preprocessing)
    build_archive(f"onnx:{_graph(store)}", name="graph", store=store, layer="activations", preprocessing=preprocessing)
    build_archive(f"export:{_program(store)}", name="program", store=store, preprocessing=preprocessing)
    build_archive(f"hf:{towers.saved(store / 'clip', towers.clip)}", store=store, prompts=towers.PROMPTS)
    package.write_text(NETWORKS + BROKEN)
    _spoil_weights(store / "rotten.mar")
    for name in KINDS:
        ensure_archive(name, store)
    return store


def _program(folder: Path) -> Path:
    """A program of torch.export for any number of images."""
    torch.manual_seed(5)
    network = nn.Sequential(nn.Conv2d(3, 6, 3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    program = torch.export.export(
        network.eval(), (torch.rand(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    torch.export.save(program, folder / "program.pt2")
    return folder / "program.pt2"


def _graph(folder: Path) -> Path:
    """An ONNX file, written by hand: a convolution, its ReLU, and a linear layer behind pooling."""
    draw = np.random.default_rng(4)
    numbers = {"w": (6, 3, 3, 3), "b": (6,), "head": (6, 4)}
    nodes = [
        helper.make_node("Conv", ["images", "w", "b"], ["raw"], pads=[1, 1, 1, 1], strides=[4, 4]),
        helper.make_node("Relu", ["raw"], ["activations"]),
        helper.make_node("ReduceMean", ["activations"], ["pooled"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["pooled", "head"], ["scores"]),
    ]
    described = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ("n", 3, 32, 32))],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ("n", 4))],
        [from_array(draw.standard_normal(size).astype(np.float32), name) for name, size in numbers.items()],
    )
    model = helper.make_model(described, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    return folder / "graph.onnx"


def _spoil_weights(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    spoilt = {name: torch.full_like(value, torch.nan) for name, value in load(members[WEIGHTS]).items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (members | {WEIGHTS: save(spoilt)}).items():
            archive.writestr(name, content)


@pytest.mark.torchserve
async def test_in_a_real_torchserve_bad_models_fail_alone_and_say_why(store):
    models = ("broken", "clip", *KINDS, "good", "graph", "picky", "program", "rotten")
    dark, bright = (np.full((32, 32, 3), value, np.uint8) for value in (9, 255))
    dark[4:12, 8:20] = 200
    settings = Settings(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", poll_s=0.2)
    async with (
        TorchServe(WorkerSettings(store=store, models=models, device="cpu", threads=1).on_free_ports()) as torchserve,
        Gateway(settings, torchserves([torchserve.backend])) as gateway,
        AsyncClient(gateway.address) as client,
    ):
        await client.wait_ready(120)
        listed = {model.name: model for model in await client.models()}
        assert [name for name, model in listed.items() if model.ready] == [
            "clip",
            *KINDS,
            "good",
            "graph",
            "picky",
            "program",
        ]
        for name, reason in WHY.items():
            assert re.search(reason, listed[name].failure)
            with pytest.raises(Unavailable, match=reason):
                await client.explain(dark, ["score_cam"], model=name)
            with pytest.raises(Unavailable, match=reason):
                await client.model(name)
        with pytest.raises(Internal):
            await client.explain(bright, ["grad_cam"], model="picky")
        with pytest.raises(Unsupported, match=r"grad_cam: it needs gradients.* ONNX Runtime .*score_cam"):
            await client.explain(dark, ["grad_cam"], model="graph")
        assert (await client.model("graph")).runtime.name == "onnx"
        asked = {name: ["grad_cam", "score_cam"] for name in ("good", "picky", "program")}
        asked |= {"clip": ["le_grad", "occlusion", ("rise", {"masks": 50})]}
        asked |= {"graph": ["score_cam", "eigen_cam", ("rise", {"masks": 50}), "ablation_cam"]}
        for name, methods in asked.items():
            assert (await client.model(name)).ready
            served = await client.explain(dark, methods, model=name)
            local = Engine.load(name, store, device="cpu").explain(dark, methods)
            assert not any(one.degenerate for one in served.maps)
            for one, other in zip(served.maps, local.maps, strict=True):
                np.testing.assert_allclose(one.array, other.array, atol=1e-4)  # sums in float32, in another order
        whole = make_scene(7, 0, 2, "test")
        scene = whole.pixels
        for name, (methods, targets) in KINDS.items():
            text = TEXTS.get(name, "")
            served = await client.explain(scene, methods, targets, model=name, text=text)
            local = Engine.load(name, store, device="cpu").explain(scene, methods, targets, text=text)
            assert [one.label for one in served.predictions] == [one.label for one in local.predictions]
            assert [one.box for one in served.predictions] == [one.box for one in local.predictions]
            assert len(served.maps) == len(local.maps) >= 2 * len(methods)
            for one, other in zip(served.maps, local.maps, strict=True):
                assert one.target_text == other.target_text
                assert one.score == pytest.approx(other.score, abs=1e-5)
                np.testing.assert_allclose(one.array, other.array, atol=1e-4)
        with pytest.raises(InvalidOption, match="there is no detection 40 in this image; there are 0: class"):
            await client.explain(scene, ["d_rise"], "detection:40", model="digits-boxes")
        with pytest.raises(Unsupported, match="the methods that work: rise, d_rise, occlusion"):
            await client.explain(scene, ["grad_cam"], model="digits-boxes")
        with pytest.raises(InvalidOption, match="digits-answers needs a question beside the image, such as 'which"):
            await client.explain(scene, ["grad_cam"], model="digits-answers")
        for question, box in zip(QUESTIONS[:2], (in_order(whole.boxes)[0], in_order(whole.boxes)[-1]), strict=True):
            answer = await client.explain(scene, ["grad_cam"], model="digits-answers", text=question)
            assert answer.predictions[0].label == answer.maps[0].target.label == NAMES[int(box.label)]
        empty = await client.explain(np.full((96, 96, 3), 40, np.uint8), ["occlusion"], model="digits-boxes")
        assert not empty.predictions
        assert empty.maps[0].degenerate
        with pytest.raises(
            InvalidOption, match=r"what the network sees: x 0\.\.96 and y 0\.\.96 of an image of 96 x 96"
        ):
            await client.explain(scene, targets="region:100,1,150,9:3", model="digits-segmentation")
        with pytest.raises(InvalidOption, match="a text has at most 6 tokens here, got 8"):
            await client.explain(scene, targets="text:a two above a two above a two", model="digits-text-image")
