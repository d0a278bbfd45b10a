"""Every method against its twin on small networks, in float64, where both must agree to rounding."""

import numpy as np
import pytest
import torch
from reference import twins
from reference.models import CHANNELS, CLASSES, HEIGHT, MODELS, PREPROCESSING, WIDTH, build, picture, silence
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from camserve import Engine
from camserve.errors import Unsupported
from camserve.finalise.finish import finished
from camserve.methods import Cam, GradCam, GroupCam, ScoreCam
from camserve.types import Item, Layer, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network

FLOAT32_ULP = 1.2e-7
"""Maps are float32 in [0, 1] at the end, so this is all that may differ when everything before is float64."""
FLOAT64 = {"rtol": 1e-9, "atol": 1e-12}
"""Sums of a few hundred float64 terms, in another order."""

METHODS = {
    "grad_cam": (GradCam(), twins.grad_cam),
    "score_cam": (ScoreCam(), twins.score_cam),
    "group_cam": (GroupCam(groups=5), lambda *given: twins.group_cam_paper(*given, groups=5)),
    "group_cam_reference": (
        GroupCam(groups=5, variant="reference"),
        lambda *given: twins.group_cam_reference(*given, groups=5),
    ),
}


def engine_of(module: nn.Module) -> Engine:
    return Engine(module, preprocessing=PREPROCESSING)


def normalised(image: np.ndarray) -> torch.Tensor:
    return twins.normalised(image, PREPROCESSING.mean, PREPROCESSING.std)


def most_probable(module: nn.Module, image: np.ndarray) -> int:
    with torch.no_grad():
        return int(module(normalised(image)[None])[0].argmax())


def assert_equal(module, layer, spec, twin, target, seed=0):
    """Holds the engine's final map, and before it the sums, against the twin; returns the final map."""
    image = picture(seed)
    raw = twin(module, normalised(image), layer, target)
    engine = engine_of(module)
    sums = sums_of(engine.network, layer, spec, target, image)
    large = F.interpolate(torch.from_numpy(sums)[None, None], size=raw.shape, mode="bilinear", align_corners=False)
    scale = raw.abs().max().item() or 1.0
    np.testing.assert_allclose(large[0, 0].numpy() / scale, raw.numpy() / scale, **FLOAT64)
    (result,) = engine.explain(image, methods=[spec], targets=[target], layer=layer).maps
    assert result.array.dtype == np.float32
    expected = twins.final(raw)
    assert result.degenerate == (not expected.any())
    np.testing.assert_allclose(result.array, expected, rtol=0, atol=FLOAT32_ULP)
    return result


def sums_of(network: Network, layer, spec, target, image) -> np.ndarray:
    """Returns what a worker adds up, at the layer's resolution, in float64."""
    channels = network.info.layer(layer).channels
    item = Item(
        image, (Target(index=target),), (Task(0, spec, 0, spec.queries(Layer("layer", channels, 7, 7), 1), layer),)
    )
    (outcome,) = Executor(network).execute([item]).outcomes
    (partial,) = outcome.partials
    assert partial.sums.dtype == np.float64
    return finished(spec, partial)[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_method_equals_its_twin(name, method):
    module, layer = build(name, 2, torch.float64), MODELS[name][1]
    likely = assert_equal(module, layer, *METHODS[method], most_probable(module, picture(2)), seed=2)
    assert not likely.degenerate  # there is a map to compare
    for target in (0, 3):
        assert_equal(module, layer, *METHODS[method], target, seed=2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_method_equals_its_twin_for_other_weights_and_images(seed, method):
    module = build("perceptron", seed, torch.float64)
    for target in range(CLASSES):
        assert_equal(module, "features.8", *METHODS[method], target, seed=seed)


@pytest.mark.parametrize("groups", [1, 2, 3, 6, 7, 19, CHANNELS])
@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_groups_are_split_as_torch_chunk_splits(groups, variant):
    """20 channels: 3 and 7 leave a short last group, 6 leaves none for the sixth, 19 leaves nine empty."""
    twin = {"paper": twins.group_cam_paper, "reference": twins.group_cam_reference}[variant]
    spec = GroupCam(groups=groups, variant=variant)
    module = build("perceptron", 3, torch.float64)
    assert not assert_equal(module, "features.8", spec, lambda *a: twin(*a, groups=groups), 2, seed=3).degenerate


@pytest.mark.parametrize("theta", [0, 12.5, 50, 69.9, 70, 99])
def test_theta_is_the_percentile_of_each_group_at_layer_resolution(theta):
    spec = GroupCam(groups=4, theta=theta)
    twin = lambda *given: twins.group_cam_paper(*given, groups=4, theta=theta)  # noqa: E731  (one line says it all)
    for name in ("pooled", "signed"):
        assert_equal(build(name, 2, torch.float64), MODELS[name][1], spec, twin, 6, seed=2)


def test_a_value_equal_to_the_percentile_is_cut():
    """The 70th percentile of 11 x 11 values is the value of rank 84; that of 10 x 12 would lie between two."""
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(11), nn.Conv2d(6, 4, 1), nn.Flatten(2)
    )
    torch.manual_seed(0)
    network = nn.Sequential(module, _Mean()).to(torch.float64).eval()
    spec = GroupCam(groups=2, theta=70)
    twin = lambda *given: twins.group_cam_paper(*given, groups=2)  # noqa: E731  (one line says it all)
    results = [assert_equal(network, "0.2", spec, twin, target) for target in range(4)]
    assert not all(result.degenerate for result in results)


class _Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 5 * x.mean(dim=2)


def test_nothing_lies_above_the_hundredth_percentile():
    module = build("pooled", dtype=torch.float64)
    methods = [GroupCam(groups=4, theta=100)]
    (result,) = engine_of(module).explain(picture(), methods=methods, targets=[1], layer="features.8").maps
    assert result.degenerate
    assert result.array.shape == (HEIGHT, WIDTH)
    assert not result.array.any()


@pytest.mark.parametrize("method", METHODS)
def test_constant_channels_count_for_nothing(method):
    """Half of the layer is dead, and a quarter constant: no 0 / 0, no query."""
    module = build("pooled", dtype=torch.float64)
    silence(module, "features.7", slice(0, 10), value=0.0)
    silence(module, "features.7", slice(10, 15), value=0.7)
    assert not assert_equal(module, "features.8", *METHODS[method], most_probable(module, picture())).degenerate


def test_the_blur_of_the_twin_is_torchvisions():
    image = normalised(picture())
    expected = gaussian_blur(image, [51, 51], [50.0, 50.0])
    torch.testing.assert_close(twins.blur(image), expected, rtol=0, atol=1e-6)  # torchvision's kernel is float32


# CAM


@pytest.mark.parametrize("name", ["pooled", "reused"])
@pytest.mark.parametrize("target", range(CLASSES))
def test_cam_equals_its_twin_and_grad_cam(name, target):
    module, layer = build(name, 2, torch.float64), MODELS[name][1]
    image = picture(2)
    raw = twins.cam(module, normalised(image), layer, target, module.head)
    cam, grad_cam = engine_of(module).explain(image, methods=["cam", "grad_cam"], targets=[target], layer=layer).maps
    np.testing.assert_allclose(cam.array, twins.final(raw), rtol=0, atol=FLOAT32_ULP)
    np.testing.assert_allclose(cam.array, grad_cam.array, rtol=0, atol=FLOAT32_ULP)
    assert cam.degenerate == grad_cam.degenerate == (not raw.any())


@pytest.mark.parametrize(("name", "layer"), [("perceptron", "features.8"), ("signed", "features.8"), ("early", "")])
def test_cam_is_refused_where_the_head_is_no_pooled_linear_layer(name, layer):
    with pytest.raises(Unsupported, match="CAM needs"):
        engine_of(build(name)).explain(picture(), methods=[Cam()], layer=layer)


# The NaN of the authors' later code


def test_unguarded_reference_code_divides_zero_by_zero_and_ours_does_not():
    module, image, layer = build("pooled", 0, torch.float64), picture(1), "features.8"
    silence(module, "features.7", slice(0, 5), value=-1.0)  # the first of four groups is nowhere positive
    authors = twins.group_cam_reference(module, normalised(image), layer, 2, groups=4, skip_constant=False)
    assert authors.isnan().all()
    methods = [GroupCam(groups=4, variant="reference")]
    (ours,) = engine_of(module).explain(image, methods=methods, targets=[2], layer=layer).maps
    assert np.isfinite(ours.array).all()
    assert ours.array.max() == 1
