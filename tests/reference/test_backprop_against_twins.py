"""The methods that go back to the pixels against their twins on small networks and the default model, in float64."""

import numpy as np
import pytest
import torch
from reference import twins
from reference import twins_backprop as twin
from reference.finished import maps_of
from reference.models import HEIGHT, MODELS, PREPROCESSING, WIDTH, build, picture, silence
from torch import nn

from camserve import Engine
from camserve.methods import (
    Deconvolution,
    GuidedBackprop,
    GuidedGradCam,
    IntegratedGradients,
    MethodSpec,
    SmoothGrad,
    Xrai,
)
from camserve.saliency.noise import gaussian
from camserve.types import Item, Layer, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network

pytest_plugins = ["reference.default_model", "reference.once"]
pytestmark = pytest.mark.usefixtures("segmented_once")

FLOAT32_ULP = 1.2e-7
"""Maps are float32 in [0, 1] at the end, so this is all that may differ when everything before is float64."""
FLOAT64 = {"rtol": 1e-9, "atol": 1e-11}
"""Sums of a few thousand float64 terms in another order, relative to the map's maximum."""
FLOAT32 = {"guided_backprop": 1e-5, "deconvolution": 1e-4, "guided_grad_cam": 1e-4, "guided_grad_cam_nearest": 1e-4}
"""Positive parts alone: few terms cancel, behind 50 layers."""
FLOAT32_SIGNED = 2e-2
"""A ReLU whose input is 0 to rounding has another gradient in float32, and gradients of the input cancel."""


def smooth(module, image, layer, target, pixels, samples=4, sigma=0.15, seed=3):
    return twin.smooth_grad(module, image, target, gaussian(seed, range(samples), image), sigma)


def integrated(module, image, layer, target, pixels, steps=7):
    return twin.integrated_gradients(module, image, target, torch.zeros_like(image), steps)


def integrated_from_black(module, image, layer, target, pixels, steps=7):
    black = twins.normalised(np.zeros_like(pixels), *_statistics(pixels))
    return twin.integrated_gradients(module, image, target, black, steps)


def _statistics(pixels):
    """Returns mean and deviation of the default model or of the small ones, told by the size of their images."""
    return (PREPROCESSING.mean, PREPROCESSING.std) if pixels.shape[0] == HEIGHT else ((0.498,) * 3, (0.502,) * 3)


METHODS = {
    "guided_backprop": (GuidedBackprop(), lambda *given: twin.guided_backprop(*given[:4])),
    "deconvolution": (Deconvolution(), lambda *given: twin.deconvolution(*given[:4])),
    "guided_grad_cam": (GuidedGradCam(), lambda *given: twin.guided_grad_cam(*given[:4])),
    "guided_grad_cam_nearest": (
        GuidedGradCam(interpolation="nearest"),
        lambda *given: twin.guided_grad_cam_nearest(*given[:4]),
    ),
    "integrated_gradients": (IntegratedGradients(steps=7), integrated),
    "integrated_gradients_black": (IntegratedGradients(steps=7, baseline="black"), integrated_from_black),
    "smooth_grad": (SmoothGrad(samples=4, seed=3), smooth),
    "xrai": (Xrai(steps=5), lambda module, image, layer, target, pixels: twin.xrai(module, image, target, pixels, 5)),
}


def rough(seed: int) -> np.ndarray:
    """A picture without saturated areas: within those, rounding decides which place a max pooling takes."""
    noise = np.random.default_rng(seed + 100).integers(0, 80, (HEIGHT, WIDTH, 3))
    return (picture(seed) * 0.6 + noise).astype(np.uint8)


def sums_of(network: Network, layer: str, spec: MethodSpec, target: int, image: np.ndarray) -> np.ndarray:
    """Returns what is upsampled and scaled at the end, (H, W)."""
    item = Item(image, (Target(index=target),), (Task(0, spec, 0, spec.queries(Layer("layer", 0, 7, 7), 1), layer),))
    (found,) = maps_of(Executor(network), item)
    return found[0]


def assert_equal(module, layer, spec, twin_of_it, target, seed=0):
    """Holds the engine's final map, and before it the sums, against the twin; returns the final map."""
    pixels = rough(seed)
    image = twins.normalised(pixels, PREPROCESSING.mean, PREPROCESSING.std)
    raw = twin_of_it(module, image, layer, target, pixels)
    engine = Engine(module, preprocessing=PREPROCESSING)
    sums = sums_of(engine.network, layer, spec, target, pixels)
    assert sums.dtype == np.float64
    scale = raw.abs().max().item() or 1.0
    np.testing.assert_allclose(sums / scale, raw.numpy() / scale, **FLOAT64)
    (result,) = engine.explain(pixels, methods=[spec], targets=[target], layer=layer).maps
    expected = twins.final(raw)
    assert result.degenerate == (not expected.any())
    np.testing.assert_allclose(result.array, expected, rtol=0, atol=FLOAT32_ULP)
    return result


def untied(module: nn.Module) -> nn.Module:
    """Returns the module with mean poolings: XRAI begins with constant images, in which all cells of a window tie."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(child.kernel_size))
    return module


def built(name: str, seed: int, method: str) -> nn.Module:
    module = build(name, seed, torch.float64)
    return untied(module) if method == "xrai" else module


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_method_equals_its_twin(name, method):
    module, layer = built(name, 2, method), MODELS[name][1]
    found = [assert_equal(module, layer, *METHODS[method], target, seed=2) for target in (0, 5)]
    assert not all(result.degenerate for result in found)  # there is a map to compare


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_method_equals_its_twin_for_other_weights_and_images(seed, method):
    module = built("perceptron", seed, method)
    for target in (0, 4):
        assert_equal(module, "features.8", *METHODS[method], target, seed=seed)


@pytest.mark.parametrize(("steps", "target"), [(1, 0), (2, 3), (20, 6)])
@pytest.mark.parametrize("baseline", ["zero", "black"])
def test_integrated_gradients_with_other_steps(baseline, steps, target):
    of_it = {"zero": integrated, "black": integrated_from_black}[baseline]
    spec = IntegratedGradients(steps=steps, baseline=baseline)
    module = build("perceptron", 2, torch.float64)
    assert_equal(module, "features.8", spec, lambda *given: of_it(*given, steps=steps), target, seed=2)


@pytest.mark.parametrize(("samples", "sigma", "seed"), [(1, 0.15, 0), (9, 0.4, 0), (9, 0.4, 1), (2, 0.0, 0)])
def test_smooth_grad_with_other_noise(samples, sigma, seed):
    spec = SmoothGrad(samples=samples, sigma=sigma, seed=seed)
    module = build("perceptron", 2, torch.float64)
    assert not assert_equal(
        module, "features.8", spec, lambda *given: smooth(*given, samples=samples, sigma=sigma, seed=seed), 5, seed=2
    ).degenerate


def test_smooth_grad_without_noise_is_the_gradient():
    module, pixels = build("perceptron", 2, torch.float64), rough(2)
    image = twins.normalised(pixels, PREPROCESSING.mean, PREPROCESSING.std)
    network = Network(module, preprocessing=PREPROCESSING)
    found = sums_of(network, "", SmoothGrad(samples=3, sigma=0), 5, pixels)
    np.testing.assert_allclose(found, twin.largest(twin.gradient(module, image, 5)), **FLOAT64)


@pytest.mark.parametrize("steps", [1, 2, 40])
def test_xrai_with_other_steps(steps):
    module = built("pooled", 2, "xrai")
    of_it = lambda module, image, _, target, pixels: twin.xrai(module, image, target, pixels, steps)  # noqa: E731
    assert not assert_equal(module, "features.8", Xrai(steps=steps), of_it, 1, seed=2).degenerate


@pytest.mark.parametrize("baseline", ["zero", "black"])
@pytest.mark.parametrize("name", MODELS)
def test_integrated_gradients_are_complete(name, baseline):
    """All attributions together are the difference of the logits, here with 200 points to within 1 %."""
    module, pixels = build(name, 2, torch.float64), rough(2)
    image = twins.normalised(pixels, PREPROCESSING.mean, PREPROCESSING.std)
    begin = {"zero": torch.zeros_like(image), "black": twins.normalised(np.zeros_like(pixels), *_statistics(pixels))}
    with torch.no_grad():
        difference = module(image[None])[0] - module(begin[baseline][None])[0]
    target = int(difference.abs().argmax())
    network = Network(module, preprocessing=PREPROCESSING)
    sums = sums_of(network, "", IntegratedGradients(steps=200, baseline=baseline), target, pixels)
    assert sums.sum() == pytest.approx(difference[target].item(), rel=0.01)


# EfficientNet-Lite0 and two photographs, small ones for the twins: ReLU6 modules that run twice in a block


LITE0 = {
    **METHODS,
    "integrated_gradients": (IntegratedGradients(steps=3), lambda *given: integrated(*given, steps=3)),
    "integrated_gradients_black": (
        IntegratedGradients(steps=3, baseline="black"),
        lambda *given: integrated_from_black(*given, steps=3),
    ),
    "smooth_grad": (SmoothGrad(samples=2, seed=3), lambda *given: smooth(*given, samples=2)),
    "xrai": (Xrai(steps=2), lambda module, image, _, target, pixels: twin.xrai(module, image, target, pixels, 2)),
}


@pytest.mark.parametrize("method", LITE0)
def test_method_equals_its_twin_on_the_default_model(small_engines, lite0_float64, small_photo, method):
    photo, preprocessing = small_photo
    assert (preprocessing.mean, preprocessing.std) == _statistics(photo)
    image = twins.normalised(photo, preprocessing.mean, preprocessing.std)
    spec, of_it = LITE0[method]
    single, double = (small_engines[dtype].explain(photo, methods=[spec]).maps[0] for dtype in ("float32", "float64"))
    expected = twins.final(of_it(lite0_float64, image, double.layer, double.target.index, photo))
    assert expected.max() == 1
    np.testing.assert_allclose(double.array, expected, rtol=0, atol=FLOAT32_ULP)
    np.testing.assert_allclose(single.array, expected, rtol=0, atol=FLOAT32.get(method, FLOAT32_SIGNED))


@pytest.mark.parametrize("baseline", ["zero", "black"])
def test_integrated_gradients_are_nearly_complete_on_the_default_model(engines, lite0, photo, baseline):
    """50 points of a gradient that jumps at thousands of ReLU6 are a few percent off; 500 points are within 0.5 %."""
    preprocessing = lite0[1].preprocessing
    image = twins.normalised(photo, preprocessing.mean, preprocessing.std).float()
    begin = twins.normalised(np.zeros_like(photo), preprocessing.mean, preprocessing.std).float()
    begin = begin if baseline == "black" else torch.zeros_like(image)
    with torch.no_grad():
        difference = lite0[0](image[None])[0] - lite0[0](begin[None])[0]
    target = int(difference.argmax())
    sums = sums_of(engines["float32"].network, "", IntegratedGradients(baseline=baseline), target, photo)
    assert sums.sum() == pytest.approx(difference[target].item(), rel=0.06)


# Degenerate input


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_layer_gives_zeros_and_the_flag(method):
    module = silence(build("pooled", 2), "features.7", slice(None), value=-1.0)
    (result,) = Engine(module, preprocessing=PREPROCESSING).explain(picture(2), methods=[METHODS[method][0]]).maps
    if method == "deconvolution":  # goes back through dead ReLUs as well, but the weights behind them are 0
        assert not module.features[7].weight.any()
    assert result.degenerate
    assert not result.array.any()


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("method", METHODS)
def test_a_constant_image_gives_no_nan(method, value):
    image = np.full((HEIGHT, WIDTH, 3), value, np.uint8)
    (result,) = (
        Engine(build("perceptron", 2), preprocessing=PREPROCESSING)
        .explain(image, methods=[METHODS[method][0]], layer="features.8")
        .maps
    )
    assert np.isfinite(result.array).all()
    assert result.degenerate == (not result.array.any())
    if method == "xrai" or (method == "integrated_gradients_black" and value == 0):
        assert result.degenerate  # one segment; no way from black to black
