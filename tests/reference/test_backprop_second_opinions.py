"""Captum 0.9.0 and PyPI `saliency` 0.2.1 beside ours; where a library is wrong, a test shows it."""

import copy
import math

import numpy as np
import pytest
import torch
from captum.attr import Deconvolution as CaptumsDeconvolution
from captum.attr import GuidedBackprop as CaptumsGuidedBackprop
from captum.attr import GuidedGradCam as CaptumsGuidedGradCam
from captum.attr import IntegratedGradients as CaptumsIntegratedGradients
from captum.attr import Saliency
from reference import once, twins
from reference.models import HEIGHT, PREPROCESSING, WIDTH, build, picture
from reference.test_backprop_against_twins import untied
from saliency.core import xrai as library
from saliency.core.base import INPUT_OUTPUT_GRADIENTS
from torch import Tensor, nn
from torch.nn import functional as F

from camserve import Engine
from camserve.methods import Deconvolution, GuidedBackprop, GuidedGradCam, IntegratedGradients, SmoothGrad, Xrai
from camserve.saliency import xrai

pytest_plugins = ["reference.default_model", "reference.once"]
pytestmark = [
    pytest.mark.usefixtures("segmented_once"),
    pytest.mark.filterwarnings(
        "ignore:Setting backward hooks on ReLU:UserWarning",  # Captum's way of saying what it is for
        "ignore:Input Tensor .* did not already require gradients:UserWarning",  # and that it changes that
    ),
]

SMALL = 2e-6
"""What float32 rounding leaves of maps in [0, 1] behind 3 layers: 1 ulp of 1 is 1.2e-7."""
FLOAT32_SUMS = 1e-5
"""`saliency` adds up gradients in float32, whatever they are made in."""


class ClippedReLU(nn.ReLU):
    """ReLU6 as a kind of nn.ReLU, which is all that Captum looks for."""

    def forward(self, z: Tensor) -> Tensor:
        return z.clamp(0, 6)


def for_captum(module: nn.Module) -> nn.Module:
    """Returns a copy with ReLU6 as Captum sees it."""
    copied = copy.deepcopy(module)
    for parent in list(copied.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(parent, name, ClippedReLU())
    return copied


def captums(method: str, module: nn.Module, layer: str, x: Tensor, target: int, steps: int = 50) -> Tensor:
    """Returns Captum's attributions, (3, H, W)."""
    x = x.to(next(module.parameters())).clone().requires_grad_()
    if method == "guided_backprop":
        found = CaptumsGuidedBackprop(module).attribute(x, target)
    elif method == "deconvolution":
        found = CaptumsDeconvolution(module).attribute(x, target)
    elif method == "guided_grad_cam":
        found = CaptumsGuidedGradCam(module, module.get_submodule(layer)).attribute(x, target)
    else:
        found = CaptumsIntegratedGradients(module).attribute(x, target=target, n_steps=steps, internal_batch_size=4)
    return found[0].detach()


BY_CAPTUM = {
    "guided_backprop": GuidedBackprop(),
    "deconvolution": Deconvolution(),
    "guided_grad_cam": GuidedGradCam(interpolation="nearest"),
    "integrated_gradients": IntegratedGradients(),
}


def as_map(method: str, attribution: Tensor) -> np.ndarray:
    """Makes a map of Captum's three channels."""
    merged = attribution.sum(dim=0) if method == "integrated_gradients" else attribution.abs().amax(dim=0)
    return twins.final(merged)


def normalised(image: np.ndarray, preprocessing) -> Tensor:
    return twins.normalised(image, preprocessing.mean, preprocessing.std)[None]


def ours(engine: Engine, image: np.ndarray, spec, target: int, layer: str = "") -> np.ndarray:
    return engine.explain(image, methods=[spec], targets=[target], layer=layer).maps[0].array


@pytest.mark.parametrize("method", BY_CAPTUM)
@pytest.mark.parametrize(
    ("name", "layer"), [("pooled", "features.8"), ("perceptron", "features.8"), ("reused", "third")]
)
def test_small_network_by_captum(name, layer, method):
    module, image = build(name, 2), picture(2)
    x = normalised(image, PREPROCESSING)
    found = ours(Engine(module, preprocessing=PREPROCESSING), image, BY_CAPTUM[method], 5, layer)
    if method == "integrated_gradients":  # the picture's saturated places tie in a max pooling
        module = untied(module)
        found = ours(Engine(module, preprocessing=PREPROCESSING), image, BY_CAPTUM[method], 5, layer)
    expected = as_map(method, captums(method, for_captum(module), layer, x, 5))
    assert expected.max() == 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=SMALL)


@pytest.mark.parametrize("method", BY_CAPTUM)
def test_lite0_by_captum(small_engines, lite0_float64, small_photo, method):
    """Runs in float64, because in float32 a ReLU6 whose input is 0 to rounding opens in one and not in the other."""
    (photo, preprocessing), target, layer = small_photo, 281, "_blocks.10"
    x = normalised(photo, preprocessing)
    expected = captums(method, for_captum(lite0_float64), layer, x, target, steps=10)
    spec = IntegratedGradients(steps=10) if method == "integrated_gradients" else BY_CAPTUM[method]
    found = ours(small_engines["float64"], photo, spec, target, layer)
    np.testing.assert_allclose(found, as_map(method, expected), rtol=0, atol=SMALL)


@pytest.mark.parametrize("method", ["guided_backprop", "deconvolution"])
def test_captum_leaves_relu6_and_functional_relus_as_they_are(engines, lite0, photo, method):
    """Captum's guided backpropagation of the default model is the plain gradient."""
    x = normalised(photo, lite0[1].preprocessing).float()
    plain = Saliency(lite0[0]).attribute(x.clone().requires_grad_(), target=281, abs=False)[0]
    torch.testing.assert_close(captums(method, lite0[0], "", x, 281), plain)
    found = ours(engines["float32"], photo, BY_CAPTUM[method], 281)
    assert np.abs(found - as_map(method, plain)).max() > 0.1


def test_smooth_grad_without_noise_is_captums_saliency():
    module, image = build("perceptron", 2), picture(2)
    expected = (
        Saliency(module).attribute(normalised(image, PREPROCESSING).float().requires_grad_(), target=5)[0].amax(dim=0)
    )
    found = ours(Engine(module, preprocessing=PREPROCESSING), image, SmoothGrad(samples=2, sigma=0), 5)
    np.testing.assert_allclose(found, twins.final(expected), rtol=0, atol=SMALL)


# XRAI


def by_library(module: nn.Module, image: np.ndarray, preprocessing, target: int, steps: int) -> np.ndarray:
    """Returns the library's map before the last min-max.

    The library segments the image itself, its Integrated Gradients take the input.
    """

    def gradients(batch, call_model_args=None, expected_keys=None):
        x = torch.from_numpy(np.asarray(batch)).permute(0, 3, 1, 2).to(weight).requires_grad_()
        (found,) = torch.autograd.grad(module(x)[:, target].sum(), x)
        return {INPUT_OUTPUT_GRADIENTS: found.permute(0, 2, 3, 1).numpy()}

    weight = next(module.parameters())
    x = twins.normalised(image, preprocessing.mean, preprocessing.std).permute(1, 2, 0).numpy()
    segments = once.librarys_masks(image / 255)
    options = library.XRAIParameters(steps=steps)
    return library.XRAI().GetMask(x, gradients, segments=segments, batch_size=10, extra_parameters=options)


@pytest.mark.parametrize("target", [0, 5])
@pytest.mark.parametrize("name", ["pooled", "perceptron", "reused"])
def test_small_network_by_saliency(name, target):
    module, image = untied(build(name, 2, torch.float64)), picture(2)
    found = ours(Engine(module, preprocessing=PREPROCESSING), image, Xrai(), target)
    expected = by_library(module, image, PREPROCESSING, target, steps=100)
    np.testing.assert_allclose(found, twins.final(torch.from_numpy(expected)), rtol=0, atol=FLOAT32_SUMS)


def test_lite0_by_saliency(engines, lite0, lite0_float64, photo):
    """Takes few steps: the order of taking masks hangs on all digits of the attribution, and float64 takes long."""
    preprocessing = lite0[1].preprocessing
    found = ours(engines["float64"], photo, Xrai(steps=2), 281)
    expected = by_library(lite0_float64, photo, preprocessing, 281, steps=2)
    np.testing.assert_allclose(found, twins.final(torch.from_numpy(expected)), rtol=0, atol=FLOAT32_SUMS)


def test_segments_are_those_of_saliency(photo):
    theirs = once.librarys_masks(photo / 255)
    found = xrai.find_masks(photo / 255)
    assert len(found) == len(theirs)
    for one, other in zip(found, theirs, strict=True):
        np.testing.assert_array_equal(one, np.flatnonzero(other))


@pytest.mark.parametrize("seed", range(2))
def test_ranking_is_that_of_saliency(photo, seed):
    """Both have the very same numbers: each is the mean of the same pixels."""
    attribution = F.avg_pool2d(torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 226, 226))), 3, 1)[
        0
    ].numpy()
    theirs = once.librarys_masks(photo / 255)
    expected, _ = library.XRAI._xrai(attribution, theirs)
    np.testing.assert_array_equal(xrai.rank(attribution, xrai.find_masks(photo / 255)), expected)


def test_segments_do_not_hang_on_rounding_in_the_normalised_input(engines, lite0, photo):
    """float32 and float64 inputs of the same image have the same segments."""
    engine = engines["float32"]
    found = []
    for dtype in (torch.float32, torch.float64):
        passes = engine.network.passes(engine.network.info.default_layer)
        x = twins.normalised(photo, lite0[1].preprocessing.mean, lite0[1].preprocessing.std).to(dtype)
        features = type("Features", (), {"input": x, "passes": passes})
        found.append(xrai.input_pixels(features))
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(found[0], photo / 255, rtol=0, atol=1e-15)


def test_saliency_makes_nan_of_a_constant_image():
    image = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    with np.errstate(invalid="ignore"):
        assert np.isnan(library._normalize_image(image / 255, [-1, 1])).all()
    (alone,) = {tuple(mask) for mask in xrai.find_masks(image / 255)}
    assert len(alone) == math.prod(image.shape[:2])
