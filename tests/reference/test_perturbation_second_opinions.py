"""torchcam 0.5.0, grad-cam 1.5.7 and Captum 0.9.0 beside our perturbation family; where one is wrong, a test shows it.

Small networks are in float64: whatever differs then is no rounding of the network.
"""

import functools

import numpy as np
import pytest
import torch
from captum.attr import Occlusion as CaptumsOcclusion
from pytorch_grad_cam import AblationCAM, ScoreCAM
from pytorch_grad_cam.ablation_layer import AblationLayer
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from reference import twins
from reference import twins_perturbation as twin
from reference.models import CLASSES, MODELS, PREPROCESSING, build, picture
from torch import nn
from torch.nn import functional as F
from torchcam.methods import ISCAM, SSCAM
from torchcam.methods import ScoreCAM as TorchcamsScoreCAM

from camserve import Engine
from camserve.methods import AblationCam, GroupCam, IsCam, MethodSpec, Occlusion, ScoreCam, SsCam
from camserve.saliency.counter import normal

pytest_plugins = ["reference.default_model"]

TORCHCAM = 2e-6
"""It adds 1e-8 to the denominator of a mask's min-max. Channels range over 0.1 to 10 here, so a mask is too small by a
share of 1e-7 at most, and a logit, of up to 20, by 2e-6: as are the exponentials that weigh the channels."""
GRAD_CAM = 2e-6
"""The same 1e-8; besides, it rounds logits to float32 and adds 1e-7 to the denominator of the map's min-max."""
FLOAT32_ULPS = 2e-7
"""The final map is float32, and nothing else differs."""
LITE0 = 1e-3
"""In float32, whose rounding differs by processor, and bends of ReLU6 may make more of it; 3e-6 where this was written.
Maps of other definitions are further off by far: 0.1 for masks normalised after upsampling and for aligned corners,
0.05 for one sample more in IS-CAM, 0.2 for another occlusion window, 0.5 without SS-CAM's noise."""


def inputs(image: np.ndarray, preprocessing) -> torch.Tensor:
    """Returns the normalised image, (1, 3, H, W), float64."""
    return twins.normalised(image, preprocessing.mean, preprocessing.std)[None]


def ours(module, spec: MethodSpec, image, target: int, layer: str, preprocessing=PREPROCESSING, size="layer"):
    return map_of(Engine(module, preprocessing=preprocessing), spec, image, target, layer, size)


def map_of(engine: Engine, spec: MethodSpec, image, target: int, layer: str, size="layer"):
    (result,) = engine.explain(image, methods=[spec], targets=[target], layer=layer, size=size).maps
    assert not result.degenerate
    return result.array


def by_torchcam(method: type, module: nn.Module, layer: str, x: torch.Tensor, target: int, **options) -> np.ndarray:
    """Returns torchcam's map, (u, v)."""
    with method(module, layer, input_shape=tuple(x.shape[1:]), **options) as extractor:
        if method is SSCAM:
            extractor._distrib = OurNoise(options["num_samples"], options["std"], x.dtype)
        scores = module(x)
        return extractor(target, scores)[0][0].detach().numpy()


class OurNoise:
    """Gives SS-CAM of torchcam the noise that ours has for seed 0: sample s of channel k is number k S + s."""

    def __init__(self, samples: int, std: float, dtype: torch.dtype) -> None:
        self._samples, self._std, self._dtype, self._drawn = samples, std, dtype, 0

    def sample(self, size: torch.Size) -> torch.Tensor:
        numbers = torch.arange(size[1]) * self._samples + self._drawn
        self._drawn += 1
        return self._std * normal(0, numbers, size[2] * size[3], self._dtype).view(size)


BY_TORCHCAM: dict[str, tuple[MethodSpec, type, dict]] = {
    "score_cam": (ScoreCam(variant="logit", normalise="before"), TorchcamsScoreCAM, {}),
    "ss_cam": (SsCam(samples=2, std=0.5), SSCAM, {"num_samples": 2, "std": 0.5}),
    "is_cam": (IsCam(samples=3), ISCAM, {"num_samples": 3}),
}


@pytest.mark.parametrize("method", BY_TORCHCAM)
@pytest.mark.parametrize(("name", "target"), [("pooled", 1), ("perceptron", 5), ("early", 0)])
def test_small_network_by_torchcam(name, target, method):
    module, layer, (spec, theirs, options) = build(name, 2, torch.float64), MODELS[name][1], BY_TORCHCAM[method]
    expected = by_torchcam(theirs, module, layer, inputs(picture(2), PREPROCESSING), target, **options)
    found = ours(module, spec, picture(2), target, layer)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TORCHCAM)


def test_torchcam_sees_what_an_in_place_relu_made_of_a_layer():
    """torchcam keeps the layer's output without copying it: layer 7 is a convolution, 8 an in-place ReLU behind it."""
    module, x = build("signed", 2, torch.float64), inputs(picture(2), PREPROCESSING)
    seventh, eighth = (by_torchcam(TorchcamsScoreCAM, module, layer, x, 6) for layer in ("features.7", "features.8"))
    np.testing.assert_array_equal(seventh, eighth)
    spec = ScoreCam(variant="logit", normalise="before")
    maps = [ours(module, spec, picture(2), 6, layer) for layer in ("features.7", "features.8")]
    np.testing.assert_allclose(maps[1], eighth, rtol=0, atol=TORCHCAM)
    assert np.abs(maps[0] - eighth).max() > 0.1


def test_torchcam_normalises_masks_before_it_upsamples_them():
    """The largest value of torchcam's mask is below 1, and its map another than that of the definition."""
    module, x = build("perceptron", 2, torch.float64), inputs(picture(2), PREPROCESSING)
    theirs = by_torchcam(TorchcamsScoreCAM, module, "features.8", x, 5)
    for normalise, agrees in (("before", True), ("after", False)):
        found = ours(module, ScoreCam(variant="logit", normalise=normalise), picture(2), 5, "features.8")
        assert (np.abs(found - theirs).max() < TORCHCAM) == agrees
    a, _ = twins.activations_and_gradients(module, x[0], "features.8", 5)
    upsampled = [twin.mask_of(one, x[0], "before") for one in a if not twins.constant(one)]
    assert min(mask.max() for mask in upsampled) < 0.95


# grad-cam


def by_grad_cam(method: type, module: nn.Module, layer: str, x: torch.Tensor, target: int, **options) -> np.ndarray:
    """Returns grad-cam's final map at the layer's resolution, upsampled and scaled once more, (H, W)."""
    options |= {"ablation_layer": AblationLayer()} if method is AblationCAM else {}  # else one serves all networks
    with method(module, [module.get_submodule(layer)], **options) as extractor:
        return extractor(x, [ClassifierOutputTarget(target)])[0]


def as_grad_cam(small: np.ndarray, x: torch.Tensor) -> np.ndarray:
    """Makes of a map (u, v) what grad-cam makes of it: ReLU and min-max come before upsampling."""
    return twins.final(twins.up(torch.from_numpy(small).double(), x))


class CornersNotAligned(nn.Upsample):
    """Takes the place of UpsamplingBilinear2d, which aligns corners."""

    def __init__(self, size) -> None:
        super().__init__(size, mode="bilinear", align_corners=False)


LOGIT = ScoreCam(variant="logit")


@pytest.mark.parametrize(("name", "target"), [("pooled", 1), ("perceptron", 5), ("early", 0)])
def test_score_cam_of_a_small_network_by_grad_cam_but_for_its_aligned_corners(monkeypatch, name, target):
    module, layer, x = build(name, 2, torch.float64), MODELS[name][1], inputs(picture(2), PREPROCESSING)
    found = as_grad_cam(ours(module, LOGIT, picture(2), target, layer), x)
    assert np.abs(found - by_grad_cam(ScoreCAM, module, layer, x, target)).max() > 10 * GRAD_CAM
    monkeypatch.setattr(nn, "UpsamplingBilinear2d", CornersNotAligned)
    np.testing.assert_allclose(found, by_grad_cam(ScoreCAM, module, layer, x, target), rtol=0, atol=GRAD_CAM)


@pytest.mark.parametrize(("name", "target"), [("pooled", 1), ("pooled", 6), ("perceptron", 5), ("perceptron", 0)])
def test_ablation_cam_of_a_small_network_by_grad_cam(name, target):
    """The layer is behind a ReLU, where grad-cam sets channels to zero as the paper does."""
    module, x = build(name, 2, torch.float64), inputs(picture(2), PREPROCESSING)
    expected = by_grad_cam(AblationCAM, module, "features.8", x, target)
    found = ours(module, AblationCam(), picture(2), target, "features.8")
    np.testing.assert_allclose(as_grad_cam(found, x), expected, rtol=0, atol=GRAD_CAM)


def test_grad_cams_ablation_depends_on_its_batch_where_activations_are_negative_and_ours_does_not():
    """grad-cam sets the n-th channel of a batch to the smallest activation so far - 1e7: to -1e7, -2e7, -3e7, ..."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.Tanh())
    module = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double().eval()
    x = inputs(picture(2), PREPROCESSING)
    theirs = [by_grad_cam(AblationCAM, module, "0", x, 1, batch_size=size) for size in (1, 8)]
    assert np.abs(theirs[0] - theirs[1]).max() > 0.05
    engines = [Engine(module, preprocessing=PREPROCESSING, micro_batch=size) for size in (1, 8)]
    one, other = (engine.explain(picture(2), ["ablation_cam"], [1], layer="0").maps[0].array for engine in engines)
    np.testing.assert_array_equal(one, other)


# Captum


def by_captum(module: nn.Module, x: torch.Tensor, target: int, spec: Occlusion) -> np.ndarray:
    """Returns Captum's map, (H, W).

    Captum cuts no window off: so the image is given a border of zeros, which the network does not see.
    """
    height, width = x.shape[-2:]
    stride = (height // spec.positions, width // spec.positions)
    before, after = (spec.window - 1) // 2, spec.window // 2
    border = (before * stride[1], after * stride[1], before * stride[0], after * stride[0])

    def probabilities(bordered: torch.Tensor) -> torch.Tensor:
        return module(F.pad(bordered, [-pixels for pixels in border])).softmax(dim=1)

    found = CaptumsOcclusion(probabilities).attribute(
        F.pad(x, border),
        (3, spec.window * stride[0], spec.window * stride[1]),
        strides=(3, *stride),
        target=target,
        perturbations_per_eval=8,
    )
    return F.pad(found, [-pixels for pixels in border])[0, 0].numpy()  # the same in each of three channels


@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize(("name", "target"), [("pooled", 6), ("perceptron", 5), ("signed", 6)])
def test_occlusion_of_a_small_network_by_captum(name, target, window):
    module, spec = build(name, 2, torch.float64), Occlusion(positions=8, window=window)
    expected = by_captum(module, inputs(picture(2), PREPROCESSING), target, spec)
    found = ours(module, spec, picture(2), target, MODELS[name][1], size="input")
    np.testing.assert_allclose(found, twins.final(torch.from_numpy(expected)), rtol=0, atol=FLOAT32_ULPS)


# Group-CAM's authors


@pytest.mark.parametrize("groups", [2, 6])
def test_the_authors_group_cam_is_ours_where_it_is_a_number_at_all(groups):
    """The code at HEAD divides 0 by 0 as soon as one group is nowhere positive, and the whole map is NaN."""
    spec, numbers = GroupCam(groups=groups, variant="reference"), 0
    for seed in range(4):
        module, x = build("perceptron", seed, torch.float64), inputs(picture(seed), PREPROCESSING)[0]
        engine = Engine(module, preprocessing=PREPROCESSING, layer="features.8")
        maps = engine.explain(picture(seed), methods=[spec], targets=[*range(CLASSES)]).maps
        for target, found in enumerate(maps):
            assert np.isfinite(found.array).all()
            authors = twin.group_cam_head(module, x, "features.8", target, groups)
            if authors.isfinite().all():
                numbers += 1
                np.testing.assert_allclose(found.array, twins.final(authors), rtol=0, atol=FLOAT32_ULPS)
    assert 5 <= numbers <= 25  # of 28


# The default model

EARLY = "_blocks.0"
"""16 channels of 112 x 112, some of their values negative."""
BEHIND_RELU6 = "_blocks.0._swish"
"""32 channels of 112 x 112, and the module runs once."""


@pytest.fixture
def asked(engines, lite0, photo):
    """Returns module, its input in float32, its most probable class, and our maps of it, (u, v)."""
    module, preprocessing = lite0[0], lite0[1].preprocessing
    x = inputs(photo, preprocessing).float()
    with torch.no_grad():
        target = int(module(x)[0].argmax())
    run = functools.partial(map_of, engines["float32"], image=photo, target=target)
    return module, x, target, run


LITE0_BY_TORCHCAM: dict[str, tuple[MethodSpec, type, dict]] = {
    "score_cam": BY_TORCHCAM["score_cam"],
    "ss_cam": (SsCam(samples=1, std=0.5), SSCAM, {"num_samples": 1, "std": 0.5}),
    "is_cam": (IsCam(samples=2), ISCAM, {"num_samples": 2}),
}


@pytest.mark.parametrize("method", LITE0_BY_TORCHCAM)
def test_lite0_by_torchcam(asked, method):
    (module, x, target, run), (spec, theirs, options) = asked, LITE0_BY_TORCHCAM[method]
    expected = by_torchcam(theirs, module, EARLY, x, target, batch_size=4, **options)
    np.testing.assert_allclose(run(spec, layer=EARLY), expected, rtol=0, atol=LITE0)


def test_score_cam_of_lite0_by_grad_cam_but_for_its_aligned_corners(asked, monkeypatch):
    module, x, target, run = asked
    monkeypatch.setattr(nn, "UpsamplingBilinear2d", CornersNotAligned)
    expected = by_grad_cam(ScoreCAM, module, EARLY, x, target)
    np.testing.assert_allclose(as_grad_cam(run(LOGIT, layer=EARLY), x), expected, rtol=0, atol=LITE0)


def test_ablation_cam_of_lite0_by_grad_cam(asked):
    module, x, target, run = asked
    expected = by_grad_cam(AblationCAM, module, BEHIND_RELU6, x, target, batch_size=4)
    found = run(AblationCam(), layer=BEHIND_RELU6)
    np.testing.assert_allclose(as_grad_cam(found, x), expected, rtol=0, atol=LITE0)


def test_occlusion_of_lite0_by_captum(asked):
    module, x, target, run = asked
    spec = Occlusion(positions=4, window=2)
    expected = twins.final(torch.from_numpy(by_captum(module, x, target, spec)))
    np.testing.assert_allclose(run(spec, layer=EARLY, size="input"), expected, rtol=0, atol=LITE0)
