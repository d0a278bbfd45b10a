"""Every classification family of torchvision, its smallest member with random weights, from discovery to maps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from asked import asked
from reference.models import picture
from torch import nn
from torchvision import models

from camserve.errors import Unsupported
from camserve.finalise.finish import finished
from camserve.methods import METHODS, GradCam, GroupCam, ScoreCam, parse_method
from camserve.saliency.head import is_pooled_linear
from camserve.types import Item, ItemResult, Preprocessing, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network

CLASSES = 6
SIDES = {
    "alexnet": 128,
    "vgg11": 64,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "regnet_y_400mf": 64,
    "densenet121": 64,
    "inception_v3": 128,
    "googlenet": 64,
    "squeezenet1_1": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "shufflenet_v2_x0_5": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "convnext_tiny": 64,
    "vit_b_16": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "maxvit_t": 224,  # the only size that its windows of 7 x 7 divide at every stage
}
"""Sides of the input in pixels: small, but with more than one place at the last layer."""

POOLED = {
    "resnet18",
    "resnext50_32x4d",
    "regnet_y_400mf",
    "densenet121",
    "inception_v3",
    "googlenet",
    "mobilenet_v2",
    "mnasnet0_5",
    "shufflenet_v2_x0_5",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "swin_t",
    "swin_v2_t",
}
"""Those with nothing but global average pooling and one linear layer behind their default layer."""

OPTIONS = {
    "googlenet": {"init_weights": False},  # its own initialisation takes a minute
    "inception_v3": {"init_weights": False},
    "vit_b_16": {"image_size": 64},
}


def family_member(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = models.get_model(name, weights=None, num_classes=CLASSES, **OPTIONS.get(name, {}))
    last = [child for child in module.modules() if isinstance(child, (nn.Linear, nn.Conv2d))][-1]
    nn.init.normal_(last.weight)  # torchvision sets the head of its transformer to zero: every gradient would be zero
    return module


def state(module: nn.Module) -> list:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return [
        (name, child.training, *(len(getattr(child, hook)) for hook in hooks)) for name, child in module.named_modules()
    ] + [(name, p.requires_grad, p.grad is None, p._version) for name, p in module.named_parameters()]


@pytest.mark.parametrize("name", SIDES)
def test_a_family_is_explained(name):
    side, module = SIDES[name], family_member(name)
    before = state(module)
    preprocessing = Preprocessing(side, (side, side), (0.45, 0.5, 0.55), (0.25, 0.3, 0.2))
    network = Network(module, preprocessing=preprocessing, micro_batch=4)
    layer = network.info.layer("")
    assert layer.height * layer.width > 1

    image = picture(1, side, side)
    x = network.normalise(torch.from_numpy(image)[None])
    with network.evaluating():
        captured = network.capture(x, layer.name)
    assert captured.activations.shape == (1, layer.channels, layer.height, layer.width)
    gradients = captured.gradients(asked([1]))
    assert (gradients != 0).flatten(3).any(-1).float().mean() > 0.1  # not dead
    pooled = is_pooled_linear(network.classifier, captured.activations, captured.logits)
    assert pooled.item() == (name in POOLED)
    if pooled:  # float32 rounding of one division here and of a backward pass there
        backward = replace(captured, _classifier=None).gradients(asked([1]))
        torch.testing.assert_close(gradients, backward, rtol=1e-5, atol=1e-6 * float(backward.abs().max()))

    tasks = (Task(0, GradCam(), 0, 0), Task(1, GroupCam(groups=2), 0, 2), Task(2, ScoreCam(), 0, 3))
    (outcome,) = Executor(network).execute([Item(image, (Target(1),), tasks)]).outcomes
    assert isinstance(outcome, ItemResult), outcome
    for partial in outcome.partials:
        assert partial.sums.shape == (1, layer.height, layer.width)
        assert np.isfinite(partial.sums).all()
    assert state(module) == before


SMALL_SIDE = 64
QUICK = {"samples": 2, "steps": 2, "groups": 3}
"""Few passes, where a method lets one choose."""


def small_transformer(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "swin":
        return models.SwinTransformer([4, 4], 12, [2, 2], [2, 2], [4, 4], num_classes=CLASSES)
    module = models.VisionTransformer(SMALL_SIDE, 16, 2, 2, hidden_dim=16, mlp_dim=24, num_classes=CLASSES)
    nn.init.normal_(module.heads.head.weight)
    return module


@pytest.mark.parametrize("name", ["vit", "swin"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_explains_a_transformer_or_says_why_not(method, name):
    known = {parameter.name for parameter in METHODS[method].parameters()}
    spec = parse_method(method, {key: value for key, value in QUICK.items() if key in known})
    preprocessing = Preprocessing(SMALL_SIDE, (SMALL_SIDE, SMALL_SIDE), (0.45, 0.5, 0.55), (0.25, 0.3, 0.2))
    module = small_transformer(name)
    before = state(module)
    network = Network(module, preprocessing=preprocessing, micro_batch=4)
    task = Task(0, spec, 0, min(3, spec.queries(network.info.layer(""), 1)))
    (outcome,) = Executor(network).execute([Item(picture(1, SMALL_SIDE, SMALL_SIDE), (Target(1),), (task,))]).outcomes
    assert state(module) == before
    if isinstance(outcome, Unsupported):
        assert spec.needs
        return
    assert isinstance(outcome, ItemResult), outcome
    (partial,) = outcome.partials
    assert partial.sums.shape == spec.sums_shape(network.info.layer(""), (SMALL_SIDE, SMALL_SIDE), 1)
    found = finished(spec, partial)
    assert found.shape == (1, SMALL_SIDE, SMALL_SIDE) if spec.resolution == "input" else found.shape[1] < SMALL_SIDE
    assert np.isfinite(partial.sums).all()
    assert np.isfinite(found).all()
