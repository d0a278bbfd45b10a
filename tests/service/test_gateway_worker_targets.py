"""Targets of every kind through a gateway and a real worker: the same maps as without a service, and the same words."""

from __future__ import annotations

from contextlib import asynccontextmanager

import numpy as np
import pytest
import tiny
import torch
from gateway_harness import QUICK
from torch import nn
from worker_backend import WorkerBackend

from camserve import Engine
from camserve.client import AsyncClient
from camserve.gateway.ops.settings import Settings
from camserve.gateway.pool.discovery import fixed
from camserve.gateway.server import Gateway
from camserve.types import Preprocessing, Region, Target, Vector
from camserve.types.references import References
from camserve.worker.network import Network

PREPROCESSING = Preprocessing(resize_px=64, crop_px=tiny.TINY_SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
PHOTO, OTHER = tiny.png(tiny.pixels(1)), tiny.png(tiny.pixels(2))
METHODS = ("grad_cam", "score_cam", ("occlusion", {"positions": 4}))
MASKED = Region(Target(index=2), mask=tiny.pixels(3)[..., 0])
KINDS = {
    "softmax": (tiny.TINY_LABELS, ["contrast:tabby cat>lynx,3", "finer:lynx", "against:top2", "finer:top2", 2]),
    "sigmoid": (tiny.TINY_LABELS, ["contrast:1>0.5*2", "finer:1", "against:5", Target(top_k=2)]),
    "probabilities": (tiny.TINY_LABELS, ["contrast:1>2", "finer:1", "against:1", 1]),
    "binary": (("no", "yes"), ["yes", "no", "against:yes", "contrast:yes>no", "finer:yes"]),
    "value": (("age", "size"), ["up:age", "down:age", "size"]),
    "segmentation": (
        tiny.TINY_LABELS,
        ["top3", "region:1,2,40.5,44:contrast:1>2,0", "region:1,2,40,44:top2", "finer:top1", "against:top1", MASKED],
    ),
    "embedding": ((), [Vector([0.5, -1.0, 2.0, 0.25]), Vector(image=OTHER)]),
    "text-image": ((), ["text:a cat, asleep", Vector([0.5, -1.0, 2.0, 0.25]), "text:7"]),
}


class Letters(nn.Module):
    """A text encoder: the sum of a row for each letter."""

    max_length, scale = 100, 10.0

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(256, 4)

    def tokens(self, text: str) -> list[int]:
        return list(text.encode())

    def encode(self, texts: list[str]) -> torch.Tensor:
        return torch.stack([self.rows(torch.tensor(self.tokens(text))).sum(dim=0) for text in texts])


class Beside(nn.Module):
    def __init__(self, images: nn.Module) -> None:
        super().__init__()
        self.images, self.text_encoder = images, Letters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.images(x)


def module(outputs: str, labels: tuple[str, ...]) -> nn.Module:
    made = tiny.tiny_module()
    if outputs == "segmentation":
        made = nn.Sequential(*made[:5], nn.Conv2d(12, len(labels), 1))
        with torch.no_grad():  # every class is somewhere in the photo
            photo = (torch.from_numpy(tiny.pixels(1)).movedim(2, 0)[None] / 255 - 0.5) / 0.25
            made[-1].bias -= made(photo).mean(dim=(0, 2, 3))
        return made
    made[-1] = nn.Linear(16, 1 if outputs == "binary" else len(labels) or 4)
    if outputs == "text-image":
        return Beside(made).eval()
    return nn.Sequential(made, nn.Softmax(dim=1)) if outputs == "probabilities" else made


@asynccontextmanager
async def served(network: Network, **settings):
    async with Gateway(Settings(**(QUICK | settings)), fixed({"here": WorkerBackend(network)})) as gateway:
        await gateway.wait_ready(30)
        async with AsyncClient(gateway.address) as client:
            yield client


@pytest.mark.parametrize("outputs", KINDS)
async def test_the_service_answers_as_the_engine(outputs):
    labels, targets = KINDS[outputs]
    made = module(outputs, labels)
    expected = Engine(made, preprocessing=PREPROCESSING, labels=labels, outputs=outputs).explain(
        PHOTO, METHODS, targets, evaluate=True, evaluation_steps=3
    )
    network = Network(made, preprocessing=PREPROCESSING, labels=labels, outputs=outputs, name="tiny", micro_batch=5)
    async with served(network, step_queries=8) as client:
        answer = await client.explain(PHOTO, METHODS, targets, evaluate=True, evaluation_steps=3)
        model = await client.model()
    assert model.outputs == outputs
    assert answer.cost.steps > 3
    assert [one.index for one in answer.predictions] == [one.index for one in expected.predictions]
    assert len(answer.maps) == len(expected.maps) >= len(METHODS) * len(targets)
    assert [one.figure for one in answer.predictions] == [one.figure for one in expected.predictions]
    for ours, engines in zip(answer.maps, expected.maps, strict=True):
        assert ours.target_text == engines.target_text
        assert [one.label for one in ours.classes] == [one.label for one in engines.classes]
        assert ours.score == pytest.approx(engines.score, abs=1e-6)  # the wire has float32
        # Micro-batches of another size round otherwise, and maps are scaled to [0, 1].
        np.testing.assert_allclose(ours.array, engines.array, atol=1e-4)
        np.testing.assert_allclose(ours.faithfulness.deletion, engines.faithfulness.deletion, atol=1e-5)


@pytest.mark.parametrize("outputs", KINDS)
async def test_a_model_of_each_kind_takes_its_own_examples_and_needs_no_target_unless_it_gives_vectors(outputs):
    labels, _ = KINDS[outputs]
    network = Network(module(outputs, labels), preprocessing=PREPROCESSING, labels=labels, outputs=outputs, name="tiny")
    async with served(network) as client:
        model = await client.model()
        examples = [form.example for form in model.targets if form.name not in ("vector", "reference")]
        if not model.dimension:
            assert len((await client.explain(PHOTO)).maps) == 1
            assert len((await client.explain(PHOTO, targets=examples)).maps) == len(examples)
        else:
            assert examples == {"embedding": [], "text-image": ["text:a seven left of a two"]}[outputs]
            assert len((await client.explain(PHOTO, targets=examples or Vector([1.0, 2.0, 3.0, 4.0]))).maps) == 1
            assert len((await client.explain(PHOTO, targets=Vector(np.ones(model.dimension)))).maps) == 1


async def test_packed_references_are_predictions_and_targets():
    held = References(("ann", "bob"), np.array([[1, 2, 0, 0.5], [-1, 0, 0.25, 2]], np.float32))
    made = module("embedding", ())
    expected = Engine(made, preprocessing=PREPROCESSING, outputs="embedding", references=held).explain(
        PHOTO, METHODS, ["bob", "top2"], evaluate=True, evaluation_steps=3
    )
    network = Network(made, preprocessing=PREPROCESSING, outputs="embedding", name="tiny").with_references(held)
    async with served(network, step_queries=8) as client:
        answer = await client.explain(PHOTO, METHODS, ["bob", "top2"], evaluate=True, evaluation_steps=3)
        assert (await client.model()).labels == ("ann", "bob")
        assert len((await client.explain(PHOTO)).maps) == 1
    assert [one.label for one in answer.predictions] == [one.label for one in expected.predictions]
    for ours, engines in zip(answer.maps, expected.maps, strict=True):
        assert (ours.target_text, ours.target.label) == (engines.target_text, engines.target.label)
        assert ours.score == pytest.approx(engines.score, abs=1e-6)
        np.testing.assert_allclose(ours.array, engines.array, atol=1e-5)  # as the kinds above


async def test_the_score_of_a_class_is_its_probability():
    network = tiny.tiny_network()
    async with served(network) as client:
        old = await client.explain(PHOTO, ["grad_cam"], [Target(label="lynx"), Target(top_k=1), 0])
    assert {saliency.target.label for saliency in old.maps} <= set(tiny.TINY_LABELS)
    assert all(saliency.target.probability == pytest.approx(saliency.score) for saliency in old.maps)
