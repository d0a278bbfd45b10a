"""Finer-CAM of torchcam 0.5.0 beside ours, in float32, with the classes that it and we find nearest."""

import numpy as np
import pytest
import torch
from reference import twins
from reference.models import PREPROCESSING, build, picture
from torch import nn
from torchcam.methods import FinerCAM, GradCAM, GradCAMpp
from torchcam.methods import LayerCAM as TorchcamsLayerCAM

from camserve import Engine
from camserve.methods import GradCam, GradCamPlusPlus, LayerCam
from camserve.types import Contrast, Finer, Target

pytest_plugins = ["reference.default_model"]

GOAL = 1e-5
"""The goal of the project for float32 maps in [0, 1]."""
EPSILON = 1e-8
"""torchcam adds it to the denominator of its min-max, at the layer's size; ours comes after upsampling."""

METHODS = {
    "grad_cam": (GradCam(), GradCAM),
    "layer_cam": (LayerCam(), TorchcamsLayerCAM),
}


def theirs(module: nn.Module, layer: str, x: torch.Tensor, target: int, base: type, **options) -> np.ndarray:
    with FinerCAM(module, layer, base_method=base, **options) as extractor:
        return extractor(target, module(x))[0][0].detach().numpy()


def inputs(image: np.ndarray, preprocessing) -> torch.Tensor:
    return twins.normalised(image, preprocessing.mean, preprocessing.std)[None].float().requires_grad_()


def compare(engine: Engine, module: nn.Module, layer: str, image: np.ndarray, target: int, method: str) -> None:
    spec, base = METHODS[method]
    expected = theirs(module, layer, inputs(image, engine.network.preprocessing), target, base)
    (found,) = engine.explain(image, [spec], [Finer(Target(index=target))], layer=layer, size="layer").maps
    scale = found.value_range[1]
    assert not found.degenerate
    # Their min-max divides by range + 1e-8, ours by the range.
    np.testing.assert_allclose(found.array, expected * (1 + EPSILON / scale), rtol=0, atol=GOAL)


@pytest.mark.parametrize("name", ["pooled", "perceptron"])
@pytest.mark.parametrize("target", [0, 3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_small_networks(name, target, method):
    module = build(name, 2)
    compare(Engine(module, preprocessing=PREPROCESSING), module, "features.8", picture(2), target, method)


@pytest.mark.parametrize("method", METHODS)
def test_default_model(engines, lite0, photo, method):
    module, engine = lite0[0], engines["float32"]
    top = engine.explain(photo, []).predictions[0].index
    compare(engine, module, engine.info.default_layer, photo, top, method)


def test_the_nearest_classes_are_those_that_torchcam_takes(engines, lite0, photo):
    (module, card), engine = lite0, engines["float32"]
    with torch.no_grad():
        logits = module(inputs(photo, card.preprocessing))[0]
    target = int(logits.argmax())
    distance = (logits - logits[target]).abs()
    distance[target] = torch.inf
    nearest = tuple(Target(index=index) for index in sorted(distance.topk(3, largest=False).indices.tolist()))
    asked = [Finer(Target(index=target)), Contrast(Target(index=target), nearest, 0.6)]
    (only,) = engine.explain(photo, ["grad_cam"], asked).maps  # both are the same target, so that there is one map
    assert [one.index for one in only.classes] == [target, *(each.index for each in nearest)]


def test_torchcams_grad_cam_plus_plus_leaves_the_division_out_also_here():
    """Its own documentation has alpha = g^2 / (2 g^2 + sum(A g^3)); what it computes is ReLU(g)^3 summed up."""
    module, layer, target = build("perceptron", 2), "features.8", 3
    engine, x = Engine(module, preprocessing=PREPROCESSING), inputs(picture(2), PREPROCESSING)
    spec, finer = GradCamPlusPlus(variant="product"), Finer(Target(index=target))
    (found,) = engine.explain(picture(2), [spec], [finer], layer=layer, size="layer").maps
    index, *others = (one.index for one in found.classes)
    contrast = Weighted(module, {index: 1.0} | dict.fromkeys(others, -0.6 / 3))
    activations, gradients = twins.activations_and_gradients(contrast, x[0].detach(), f"net.{layer}", 0)
    undivided = twins.final(torch.einsum("c,cuv->uv", gradients.relu().pow(3).sum(dim=(1, 2)), activations))
    computed = theirs(module, layer, x, target, GradCAMpp)
    np.testing.assert_allclose(undivided, computed, rtol=0, atol=GOAL)
    assert np.abs(found.array - computed).max() > 0.01


class Weighted(nn.Module):
    """Returns a weighted sum of a network's logits."""

    def __init__(self, net: nn.Module, weights: dict[int, float]) -> None:
        super().__init__()
        self.net, self.weights = net, weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.net(x)
        return sum(weight * logits[:, index, None] for index, weight in self.weights.items())
