"""Grad-CAM of grad-cam 1.5.7 and of torchcam 0.5.0 beside ours.

Only Grad-CAM: neither library has Group-CAM, and their Score-CAMs are other variants (raw logits or logit gains, a
softmax over channels), with which ours must not agree; the last test shows what they have in common.
"""

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM, ScoreCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from reference import twins
from reference.models import PREPROCESSING, build, picture
from scipy.stats import spearmanr
from torch import nn
from torchcam.methods import GradCAM as TorchcamGradCAM
from torchcam.methods import ScoreCAM as TorchcamScoreCAM

from camserve import Engine

pytest_plugins = ["reference.default_model"]

SMALL, DEEP = 2e-6, 1e-5
"""What float32 rounding leaves of maps in [0, 1] (1 ulp of 1 is 1.2e-7), behind 3 layers and behind 60. Seen: 1.2e-6
and 2.3e-6; it depends on the processor's convolutions."""
GRAD_CAM_EPSILON = 1e-7
"""Added to the denominator of its min-max. That is made twice, and the second, of [0, 1], undoes the first."""
TORCHCAM_EPSILON = 1e-8
"""Added to the denominator of its only min-max, which has the gradients' own scale: 1e-3 for some of these networks."""


def inputs(image: np.ndarray, preprocessing) -> torch.Tensor:
    x = twins.normalised(image, preprocessing.mean, preprocessing.std)[None].float()
    return x.requires_grad_()  # served parameters are frozen, and both libraries go backward through everything


def by_grad_cam(method, module: nn.Module, layer: str, x: torch.Tensor, target: int) -> np.ndarray:
    with method(module, [module.get_submodule(layer)]) as extractor:
        return extractor(x, [ClassifierOutputTarget(target)])[0]


def by_torchcam(method, module: nn.Module, layer: str, x: torch.Tensor, target: int) -> np.ndarray:
    with method(module, layer) as extractor:
        scores = module(x)
        return extractor(target, scores)[0][0].detach().numpy()


def same_grad_cam(engine, module, layer, image, target, preprocessing, tolerance):
    x = inputs(image, preprocessing)
    ours, ours_low = (
        engine.explain(image, targets=[target], layer=layer, size=size).maps[0] for size in ("input", "layer")
    )
    assert not ours.degenerate
    theirs = by_grad_cam(GradCAM, module, layer, x, target)
    np.testing.assert_allclose(ours.array, theirs, rtol=0, atol=tolerance + GRAD_CAM_EPSILON)
    theirs_low = by_torchcam(TorchcamGradCAM, module, layer, x, target)
    scale = ours_low.value_range[1]
    np.testing.assert_allclose(ours_low.array, theirs_low, rtol=0, atol=tolerance + TORCHCAM_EPSILON / scale)


@pytest.mark.parametrize(("name", "target"), [("pooled", 1), ("pooled", 6), ("perceptron", 5), ("perceptron", 0)])
def test_grad_cam_of_a_small_network(name, target):
    module = build(name, 2)
    engine = Engine(module, preprocessing=PREPROCESSING)
    same_grad_cam(engine, module, "features.8", picture(2), target, PREPROCESSING, SMALL)


@pytest.mark.parametrize("layer", ["_bn1", "_blocks.10"])
@pytest.mark.parametrize("rank", [0, 1])
def test_grad_cam_of_lite0(engines, lite0, photo, layer, rank):
    (module, card), engine = lite0, engines["float32"]
    target = engine.explain(photo, methods=["grad_cam"]).predictions[rank].index
    same_grad_cam(engine, module, layer, photo, target, card.preprocessing, DEEP)


def test_score_cams_differ_between_libraries_but_rank_pixels_alike():
    module, image = build("pooled", 2), picture(2)
    methods = ["score_cam"]
    engine = Engine(module, preprocessing=PREPROCESSING)
    full, low = (
        engine.explain(image, methods=methods, targets=[6], layer="features.8", size=size).maps[0].array
        for size in ("input", "layer")
    )
    x = inputs(image, PREPROCESSING)
    for ours, theirs in (
        (full, by_grad_cam(ScoreCAM, module, "features.8", x, 6)),
        (low, by_torchcam(TorchcamScoreCAM, module, "features.8", x, 6)),
    ):
        assert np.abs(ours - theirs).max() > 1e-3
        assert spearmanr(ours.ravel(), theirs.ravel()).statistic > 0.8
