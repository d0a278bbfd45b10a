"""The gradient family of grad-cam 1.5.7 and torchcam 0.5.0 beside ours; where a library is wrong, a test shows it."""

import numpy as np
import pytest
import torch
from pytorch_grad_cam import EigenCAM, GradCAMPlusPlus, HiResCAM, XGradCAM
from pytorch_grad_cam import LayerCAM as GradCamsLayerCAM
from pytorch_grad_cam.utils.image import scale_cam_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from reference import twins
from reference.models import CLASSES, PREPROCESSING, build, picture
from torch import nn
from torchcam.methods import GradCAMpp, SmoothGradCAMpp
from torchcam.methods import LayerCAM as TorchcamsLayerCAM
from torchcam.methods import XGradCAM as TorchcamsXGradCAM

from camserve import Engine
from camserve.methods import EigenCam, GradCamPlusPlus, HiresCam, LayerCam, MethodSpec, SmoothGradCamPlusPlus, XgradCam

pytest_plugins = ["reference.default_model"]

SMALL, DEEP = 2e-6, 1e-5
"""What float32 rounding leaves of maps in [0, 1] (1 ulp of 1 is 1.2e-7), behind 3 layers and behind 60."""
CANCELLING = 1e-4
"""Where a channel's weight is divided by a sum of positive and negative terms, which may be small beside its terms."""
GRAD_CAM_EPSILON = 1e-7
"""Added to the denominator of its min-max. That is made twice, and the second, of [0, 1], undoes the first."""
TORCHCAM_EPSILON = 1e-8
"""Added to the denominator of its only min-max, which has the map's own scale; also to XGrad-CAM's sums of activations,
where grad-cam and we add 1e-7: sums that are not 0 are at least 0.1 in these networks."""

BY_GRAD_CAM: dict[str, tuple[MethodSpec, type]] = {
    "hires_cam": (HiresCam(), HiResCAM),
    "grad_cam_plus_plus": (GradCamPlusPlus(), GradCAMPlusPlus),
    "xgrad_cam": (XgradCam(), XGradCAM),
    "layer_cam": (LayerCam(), GradCamsLayerCAM),
}
BY_TORCHCAM: dict[str, tuple[MethodSpec, type]] = {
    "xgrad_cam": (XgradCam(), TorchcamsXGradCAM),
    "layer_cam": (LayerCam(), TorchcamsLayerCAM),
}
LITE0_LAYERS = ["_bn1", "_blocks.10"]
"""Before the last ReLU6, where gradients differ from place to place; a linear bottleneck. Both have negative values."""
FLOAT64 = 1e-6
"""What is left where everything before the last float32 map is float64. On the default model a channel's sum can be a
300th of its terms, and XGrad-CAM divides by it: what float32 makes of that differs by over 1e-4 between processors."""


def inputs(image: np.ndarray, preprocessing, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = twins.normalised(image, preprocessing.mean, preprocessing.std)[None].to(dtype)
    return x.requires_grad_()  # served parameters are frozen, and both libraries go backward through everything


def by_grad_cam(method: type, module: nn.Module, layer: str, x: torch.Tensor, target: int) -> np.ndarray:
    with method(module, [module.get_submodule(layer)]) as extractor:
        return extractor(x, [ClassifierOutputTarget(target)])[0]


def by_torchcam(method: type, module: nn.Module, layer: str, x: torch.Tensor, target: int, **options) -> np.ndarray:
    with method(module, layer, **options) as extractor:
        scores = module(x)
        return extractor(target, scores)[0][0].detach().numpy()


def ours(engine: Engine, image: np.ndarray, spec: MethodSpec, target: int, layer: str, size="input"):
    (result,) = engine.explain(image, methods=[spec], targets=[target], layer=layer, size=size).maps
    return result


def same_as_grad_cam(engine, module, layer, image, target, preprocessing, method, tolerance):
    spec, theirs = BY_GRAD_CAM[method]
    x = inputs(image, preprocessing, next(module.parameters()).dtype)
    expected = by_grad_cam(theirs, module, layer, x, target)
    found = ours(engine, image, spec, target, layer)
    epsilon = GRAD_CAM_EPSILON / min(1.0, found.value_range[1])  # the first min-max has the map's own scale
    np.testing.assert_allclose(found.array, expected, rtol=0, atol=tolerance + epsilon)
    return found


def same_as_torchcam(engine, module, layer, image, target, preprocessing, method, tolerance):
    spec, theirs = BY_TORCHCAM[method]
    x = inputs(image, preprocessing, next(module.parameters()).dtype)
    expected = by_torchcam(theirs, module, layer, x, target)
    found = ours(engine, image, spec, target, layer, "layer")
    scale = found.value_range[1] if found.value_range[1] > 0 else 1.0
    np.testing.assert_allclose(found.array, expected, rtol=0, atol=tolerance + TORCHCAM_EPSILON / scale)


@pytest.mark.parametrize("method", BY_GRAD_CAM)
@pytest.mark.parametrize(("name", "target"), [("pooled", 1), ("pooled", 6), ("perceptron", 5), ("perceptron", 0)])
def test_small_network_by_grad_cam(name, target, method):
    module = build(name, 2)
    engine = Engine(module, preprocessing=PREPROCESSING)
    given = (engine, module, "features.8", picture(2), target, PREPROCESSING)
    assert not same_as_grad_cam(*given, method, SMALL).degenerate


@pytest.mark.parametrize("method", BY_TORCHCAM)
@pytest.mark.parametrize(("name", "target"), [("pooled", 1), ("pooled", 6), ("perceptron", 5), ("perceptron", 0)])
def test_small_network_by_torchcam(name, target, method):
    module = build(name, 2)
    engine = Engine(module, preprocessing=PREPROCESSING)
    same_as_torchcam(engine, module, "features.8", picture(2), target, PREPROCESSING, method, SMALL)


@pytest.mark.parametrize("layer", LITE0_LAYERS)
@pytest.mark.parametrize("method", BY_GRAD_CAM)
def test_lite0_by_grad_cam(small_engines, lite0_float64, small_photo, method, layer):
    (photo, preprocessing), engine = small_photo, small_engines["float64"]
    target = engine.explain(photo, []).predictions[0].index
    same_as_grad_cam(engine, lite0_float64, layer, photo, target, preprocessing, method, FLOAT64)


@pytest.mark.parametrize("layer", LITE0_LAYERS)
@pytest.mark.parametrize("method", BY_TORCHCAM)
def test_lite0_by_torchcam(small_engines, lite0_float64, small_photo, method, layer):
    (photo, preprocessing), engine = small_photo, small_engines["float64"]
    target = engine.explain(photo, []).predictions[0].index
    same_as_torchcam(engine, lite0_float64, layer, photo, target, preprocessing, method, FLOAT64)


# Grad-CAM++ as torchcam writes it


@pytest.mark.parametrize("target", [0, 3, 5])
def test_the_product_variant_is_what_torchcam_documents_and_forgets_to_divide(target):
    """torchcam's `alpha[mask].div_()` divides a copy: its weights sum ReLU(g)^3. Its SmoothGradCAMpp does divide."""
    module, image, layer = build("perceptron", 2), picture(2), "features.8"
    engine, x = Engine(module, preprocessing=PREPROCESSING), inputs(image, PREPROCESSING)
    found = ours(engine, image, GradCamPlusPlus(variant="product"), target, layer, "layer")
    documented = by_torchcam(SmoothGradCAMpp, module, layer, x, target, num_samples=1, std=1e-30)
    tolerance = CANCELLING + TORCHCAM_EPSILON / found.value_range[1]
    np.testing.assert_allclose(found.array, documented, rtol=0, atol=tolerance)
    activations, gradients = twins.activations_and_gradients(module, x[0].detach(), layer, target)
    undivided = torch.einsum("c,cuv->uv", gradients.relu().pow(3).sum(dim=(1, 2)), activations)
    computed = by_torchcam(GradCAMpp, module, layer, x, target)
    scale = undivided.max().item()
    np.testing.assert_allclose(twins.final(undivided), computed, rtol=0, atol=SMALL + TORCHCAM_EPSILON / scale)
    assert np.abs(found.array - computed).max() > 0.05


# Smooth Grad-CAM++


def test_the_noise_of_smooth_grad_cam_plus_plus_averages_out_and_torchcams_does_not():
    """torchcam combines the means with the gradients and activations of its last sample alone, unseeded."""
    module, image, layer = build("perceptron", 2), picture(2), "features.3"  # two ReLUs and a max pool behind it
    engine, x = Engine(module, preprocessing=PREPROCESSING), inputs(image, PREPROCESSING)
    spread = (x.max() - x.min()).item()

    def of_ours(samples: int) -> float:
        specs = [SmoothGradCamPlusPlus(samples=samples, sigma=0.1, seed=seed) for seed in range(6)]
        return _scatter([ours(engine, image, spec, 5, layer, "layer").array for spec in specs])

    def of_torchcam(samples: int) -> float:
        options = {"num_samples": samples, "std": 0.1 * spread}
        return _scatter([by_torchcam(SmoothGradCAMpp, module, layer, x, 5, **options) for _ in range(6)])

    torch.manual_seed(0)
    assert of_ours(256) < 0.3 * of_ours(4)  # sqrt(4 / 256) = 0.125 in the long run
    assert of_torchcam(256) > 0.5 * of_torchcam(4)
    assert of_torchcam(256) > 5 * of_ours(256)


def _scatter(maps: list[np.ndarray]) -> float:
    """Standard deviation over the maps, averaged over places."""
    return float(np.std(maps, axis=0).mean())


# Eigen-CAM


def _same_eigen_cam(engine, module, layer, image, preprocessing, tolerance) -> bool:
    """Ours beside grad-cam's component with our sign; returns whether that was its own sign."""
    x = inputs(image, preprocessing)
    activations = twins.activations_and_gradients(module, x[0].detach(), layer, 0)[0].numpy()
    component = get_2d_projection(activations[None])[0]
    against = bool((component * activations.mean(axis=0)).sum() < 0)
    signed = np.maximum(-component if against else component, 0)
    expected = scale_cam_image(scale_cam_image(signed[None], x.shape[:1:-1]))[0]
    found = ours(engine, image, EigenCam(), 0, layer)
    np.testing.assert_allclose(found.array, expected, rtol=0, atol=tolerance + GRAD_CAM_EPSILON)
    theirs = by_grad_cam(EigenCAM, module, layer, x, 0)
    assert (np.abs(found.array - theirs).max() < tolerance + GRAD_CAM_EPSILON) == (not against)
    return not against


@pytest.mark.parametrize("layer", ["_bn1", "_blocks.2"])
def test_eigen_cam_of_lite0_by_grad_cam(engines, lite0, photo, layer):
    module, card = lite0
    _same_eigen_cam(engines["float32"], module, layer, photo, card.preprocessing, DEEP)


def test_eigen_cam_of_small_networks_is_grad_cams_up_to_its_arbitrary_sign():
    signs = set()
    for seed in range(6):
        module = build("perceptron", seed)
        engine = Engine(module, preprocessing=PREPROCESSING)
        signs.add(_same_eigen_cam(engine, module, "features.8", picture(seed), PREPROCESSING, SMALL))
    assert signs == {True, False}  # grad-cam shows the background in some of them


def test_eigen_cam_is_the_same_for_every_class():
    engine = Engine(build("perceptron", 2), preprocessing=PREPROCESSING)
    maps = engine.explain(picture(2), methods=[EigenCam()], targets=[*range(CLASSES)]).maps
    assert len(maps) == CLASSES
    for other in maps[1:]:
        np.testing.assert_array_equal(other.array, maps[0].array)
