"""The gradient family against its twins on small networks and the default model, in float64: equal to rounding."""

import numpy as np
import pytest
import torch
from reference import twins
from reference import twins_gradient as twin
from reference.finished import maps_of
from reference.models import CHANNELS, CLASSES, MODELS, PREPROCESSING, build, picture, silence
from torch.nn import functional as F

from camserve import Engine
from camserve.methods import (
    EigenCam,
    GradCamPlusPlus,
    HiresCam,
    IntegratedGradCam,
    LayerCam,
    MethodSpec,
    SmoothGradCamPlusPlus,
    XgradCam,
)
from camserve.saliency.noise import gaussian
from camserve.types import Item, Layer, SaliencyMap, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network

pytest_plugins = ["reference.default_model", "reference.once"]

FLOAT32_ULP = 1.2e-7
"""Maps are float32 in [0, 1] at the end, so this is all that may differ when everything before is float64."""
FLOAT64 = {"rtol": 1e-9, "atol": 1e-11}
"""Sums of a few thousand float64 terms in another order, relative to the map's maximum."""


def _black(image, preprocessing=PREPROCESSING):
    return twin.black(preprocessing.mean, preprocessing.std, image)


def smooth(module, image, layer, target, samples=4, sigma=0.15, seed=3):
    return twin.smooth_grad_cam_plus_plus(module, image, layer, target, gaussian(seed, range(samples), image), sigma)


METHODS = {
    "hires_cam": (HiresCam(), twin.hires_cam),
    "xgrad_cam": (XgradCam(), twin.xgrad_cam),
    "layer_cam": (LayerCam(), twin.layer_cam),
    "grad_cam_plus_plus": (GradCamPlusPlus(), twin.grad_cam_plus_plus_paper),
    "grad_cam_plus_plus_product": (GradCamPlusPlus(variant="product"), twin.grad_cam_plus_plus_product),
    "smooth_grad_cam_plus_plus": (SmoothGradCamPlusPlus(samples=4, seed=3), smooth),
    "integrated_grad_cam": (
        IntegratedGradCam(),
        lambda module, image, *rest: twin.integrated_grad_cam_paper(module, image, *rest, _black(image)),
    ),
    "integrated_grad_cam_reference": (
        IntegratedGradCam(variant="reference"),
        lambda module, image, *rest: twin.integrated_grad_cam_reference(module, image, *rest, _black(image)),
    ),
    "eigen_cam": (EigenCam(), twin.eigen_cam),
}


def sums_of(network: Network, layer: str, spec: MethodSpec, target: int, image: np.ndarray) -> np.ndarray:
    """Returns what is upsampled and scaled at the end, at the layer's resolution, in float64."""
    item = Item(
        image, (Target(index=target),), (Task(0, spec, 0, spec.queries(Layer("layer", CHANNELS, 7, 7), 1), layer),)
    )
    (found,) = maps_of(Executor(network), item)
    assert found.dtype == np.float64
    return found[0]


def assert_equal(module, layer, spec, twin_of_it, target, seed=0):
    """Holds the engine's final map, and before it the sums, against the twin; returns the final map."""
    pixels = picture(seed)
    image = twins.normalised(pixels, PREPROCESSING.mean, PREPROCESSING.std)
    raw = twin_of_it(module, image, layer, target)
    engine = Engine(module, preprocessing=PREPROCESSING)
    sums = torch.from_numpy(sums_of(engine.network, layer, spec, target, pixels))
    large = F.interpolate(sums[None, None], size=raw.shape, mode="bilinear", align_corners=False)[0, 0].clamp(min=0)
    mean = spec.images if spec == IntegratedGradCam() else 1  # ours are sums, the paper's a mean
    scale = raw.abs().max().item() or 1.0
    np.testing.assert_allclose(large.numpy() / mean / scale, raw.numpy() / scale, **FLOAT64)
    (result,) = engine.explain(pixels, methods=[spec], targets=[target], layer=layer).maps
    expected = twins.final(raw)
    assert result.degenerate == (not expected.any())
    np.testing.assert_allclose(result.array, expected, rtol=0, atol=FLOAT32_ULP)
    return result


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_method_equals_its_twin(name, method):
    module, layer = build(name, 2, torch.float64), MODELS[name][1]
    found = [assert_equal(module, layer, *METHODS[method], target, seed=2) for target in (0, 3, 6)]
    assert not all(result.degenerate for result in found)  # there is a map to compare


@pytest.mark.parametrize("method", METHODS)
def test_method_equals_its_twin_where_negative_activations_count(method):
    """No ReLU follows this layer, so that its negative values have gradients."""
    module = build("signed", 2, torch.float64)
    found = [assert_equal(module, "body", *METHODS[method], target, seed=2) for target in (0, 3, 6)]
    assert not all(result.degenerate for result in found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_method_equals_its_twin_for_other_weights_and_images(seed, method):
    module = build("perceptron", seed, torch.float64)
    for target in range(0, CLASSES, 2):
        assert_equal(module, "features.8", *METHODS[method], target, seed=seed)


@pytest.mark.parametrize("method", METHODS)
def test_constant_channels_do_no_harm(method):
    """Half of the layer is dead, and a quarter constant."""
    module = build("pooled", 2, torch.float64)
    silence(module, "features.7", slice(0, 10), value=0.0)
    silence(module, "features.7", slice(10, 15), value=0.7)
    found = [assert_equal(module, "features.8", *METHODS[method], target, seed=2) for target in range(CLASSES)]
    assert not all(result.degenerate for result in found)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_integrated_grad_cam_with_other_steps(variant, steps):
    twin_of_it = {"paper": twin.integrated_grad_cam_paper, "reference": twin.integrated_grad_cam_reference}[variant]
    module, image = build("perceptron", 2, torch.float64), picture(2)
    spec = IntegratedGradCam(variant=variant, steps=steps)
    x = twins.normalised(image, PREPROCESSING.mean, PREPROCESSING.std)
    expected = twins.final(twin_of_it(module, x, "features.8", 5, _black(x), steps))
    (result,) = (
        Engine(module, preprocessing=PREPROCESSING).explain(image, methods=[spec], targets=[5], layer="features.8").maps
    )
    np.testing.assert_allclose(result.array, expected, rtol=0, atol=FLOAT32_ULP)


@pytest.mark.parametrize(("samples", "sigma", "seed"), [(1, 0.15, 0), (9, 0.4, 0), (9, 0.4, 1)])
def test_smooth_grad_cam_plus_plus_with_other_noise(samples, sigma, seed):
    spec = SmoothGradCamPlusPlus(samples=samples, sigma=sigma, seed=seed)
    module = build("perceptron", 2, torch.float64)
    of_it = lambda *given: smooth(*given, samples=samples, sigma=sigma, seed=seed)  # noqa: E731  (one line says it all)
    assert not assert_equal(module, "features.3", spec, of_it, 5, seed=2).degenerate


# EfficientNet-Lite0 and two photographs: real sizes, depthwise layers, a Gram matrix of either kind


RELU6 = "_blocks.10._swish"
"""Nothing negative, and gradients that differ from place to place."""
FLOAT32 = {"rtol": 0, "atol": 1e-4}
"""Float32 rounds the activations at each of 60 layers; found: 5e-6 at most."""
FLOAT32_ON_THE_WAY = {"rtol": 0, "atol": 3e-3}
"""Near black many activations lie at a bend of ReLU6, and rounding decides on which side: whole gradients come or go.
Found: 5e-4, depending on the processor's convolutions."""


def integrated(twin_of_it):
    """Returns a twin that goes a way of five steps: one of twenty or fifty takes long."""
    return lambda module, image, *rest: twin_of_it(module, image, *rest, black_of_lite0(image), 5)


def black_of_lite0(image):
    return twin.black((0.498,) * 3, (0.502,) * 3, image)


LITE0 = METHODS | {
    "integrated_grad_cam": (IntegratedGradCam(steps=5), integrated(twin.integrated_grad_cam_paper)),
    "integrated_grad_cam_reference": (
        IntegratedGradCam(steps=5, variant="reference"),
        integrated(twin.integrated_grad_cam_reference),
    ),
}


@pytest.fixture(scope="module", params=["", RELU6])
def maps(request, engines, photo) -> tuple[str, dict[str, dict[str, SaliencyMap]]]:
    """Returns the layer, and for each precision every method's map: one request, whose methods share their passes."""
    specs = [spec for spec, _ in LITE0.values()]
    made = {dtype: engine.explain(photo, methods=specs, layer=request.param).maps for dtype, engine in engines.items()}
    return request.param, {dtype: dict(zip(LITE0, found, strict=True)) for dtype, found in made.items()}


@pytest.mark.usefixtures("passed_once")
@pytest.mark.parametrize("method", LITE0)
def test_method_equals_its_twin_on_the_default_model(maps, lite0, lite0_float64, photo, method):
    preprocessing = lite0[1].preprocessing
    image = twins.normalised(photo, preprocessing.mean, preprocessing.std)
    assert (preprocessing.mean, preprocessing.std) == ((0.498,) * 3, (0.502,) * 3)
    (_, of_it), (layer, found) = LITE0[method], maps
    single, double = (found[dtype][method] for dtype in ("float32", "float64"))
    expected = twins.final(of_it(lite0_float64, image, double.layer, double.target.index))
    assert expected.max() == 1
    np.testing.assert_allclose(double.array, expected, rtol=0, atol=FLOAT32_ULP)
    # Product: one place's share hangs on the signs of all others, and its denominator may nearly vanish anywhere.
    if method != "grad_cam_plus_plus_product" or not layer:
        tolerance = FLOAT32_ON_THE_WAY if method.startswith("integrated") else FLOAT32
        np.testing.assert_allclose(single.array, expected, **tolerance)


def test_eigen_cam_of_a_layer_with_more_places_than_channels(engines, lite0, lite0_float64, photo):
    """24 channels of 56 x 56: the Gram matrix over channels is the smaller one."""
    preprocessing = lite0[1].preprocessing
    image = twins.normalised(photo, preprocessing.mean, preprocessing.std)
    raw = twin.eigen_cam(lite0_float64, image, "_blocks.2", 0)
    (result,) = engines["float64"].explain(photo, methods=["eigen_cam"], targets=[0], layer="_blocks.2").maps
    np.testing.assert_allclose(result.array, twins.final(raw), rtol=0, atol=FLOAT32_ULP)
