"""What must be equal within the perturbation family, whatever the network: in float64, to rounding."""

import numpy as np
import pytest
import torch
from reference import twins_perturbation as twin
from reference.models import CHANNELS, CLASSES, MODELS, PREPROCESSING, build, picture, silence
from reference.test_perturbation_against_twins import FLOAT64, assert_equal, most_probable, normalised, occlusion
from torch import nn

from camserve.finalise.maps import upsample
from camserve.methods import GroupCam, MethodSpec, Occlusion, Rise, ScoreCam
from camserve.saliency import group_cam
from camserve.types import Item, ItemResult, Partial, Preprocessing, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network


def partial(module: nn.Module, spec: MethodSpec, targets=(3,), layer="", seed=2, span=None) -> Partial:
    network = Network(module, preprocessing=PREPROCESSING)
    start, stop = span or (0, spec.queries(network.info.layer(layer), len(targets)))
    item = Item(picture(seed), tuple(map(Target, targets)), (Task(0, spec, start, stop, layer),))
    (outcome,) = Executor(network).execute([item]).outcomes
    assert isinstance(outcome, ItemResult), outcome
    return outcome.partials[0]


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    scale = np.abs(expected).max()
    assert scale > 0
    np.testing.assert_allclose(found / scale, expected / scale, **FLOAT64)


# RISE


@pytest.mark.parametrize("masks", [64, 65])
def test_two_halves_of_rise_are_rise(masks):
    module, spec, targets = build("perceptron", 2, torch.float64), Rise(masks=masks, seed=3), (3, 0)
    half = masks // 2
    halves = [partial(module, spec, targets, span=span) for span in ((0, half), (half, masks))]
    whole = partial(module, spec, targets)
    assert_same(halves[0].merge(halves[1]).sums, whole.sums)
    assert_same(halves[1].merge(halves[0]).sums, whole.sums)


def test_the_first_half_of_rise_is_rise_of_half_as_many_masks():
    module = build("perceptron", 2, torch.float64)
    half = partial(module, Rise(masks=64, seed=3), span=(0, 32))
    assert_same(half.sums, partial(module, Rise(masks=32, seed=3)).sums)


# Group-CAM with a group for each channel


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_every_grouping_of_single_channels_is_the_same(variant, name):
    """Compared by their sums: of a class that the image shows less than its blur does, the final map is empty."""
    module, layer = build(name, 2, torch.float64), MODELS[name][1]
    channels = Network(module, preprocessing=PREPROCESSING).info.layer(layer).channels
    targets = tuple(range(CLASSES))
    chunk, *others = (
        partial(module, GroupCam(groups=channels, grouping=grouping, variant=variant), targets, layer)
        for grouping in ("chunk", "kmeans", "agglomerative")
    )
    for other in others:
        assert other.queries == chunk.queries
        for found, expected in zip(other.sums, chunk.sums, strict=True):
            if expected.any():
                assert_same(found, expected)
            else:
                assert not found.any()
    assert chunk.sums.any(axis=(1, 2)).sum() >= CLASSES - 2  # REFERENCE: a class may have no group of positive gain


@pytest.mark.filterwarnings("error")
def test_channels_that_are_alike_may_share_a_cluster():
    """Half of the channels are dead: there are fewer clusters than groups, and scikit-learn need not warn of it."""
    module = silence(build("perceptron", 2, torch.float64), "features.7", slice(0, 10), 0.0)
    chunk, kmeans = (partial(module, GroupCam(groups=CHANNELS, grouping=way)) for way in ("chunk", "kmeans"))
    assert_same(kmeans.sums, chunk.sums)


@pytest.fixture
def no_blur(monkeypatch):
    """Black, zero in normalised space, takes the place of the blurred image."""
    monkeypatch.setattr(group_cam, "gaussian_blur", lambda image, *_: torch.zeros_like(image))


@pytest.mark.parametrize("name", ["pooled", "perceptron", "early"])
@pytest.mark.parametrize("seed", [1, 2])
def test_group_cam_of_single_channels_without_blur_and_theta_has_score_cams_structure(no_blur, name, seed):
    """ReLU(w_k A_k), scaled to 0..1, is Score-CAM's mask where w_k > 0 and A_k >= 0; REFERENCE knows no theta."""
    module, layer = build(name, seed, torch.float64), MODELS[name][1]
    channels = Network(module, preprocessing=PREPROCESSING).info.layer(layer).channels
    target = most_probable(module, picture(seed))
    found = partial(module, GroupCam(groups=channels, variant="reference"), (target,), layer, seed).sums[0]
    expected = twin.group_cam_of_channels(module, normalised(picture(seed)), layer, target).numpy()
    assert_same(upsample(found, expected.shape), expected)


def equal_weights(target: int, seed: int) -> nn.Module:
    """All channels speak alike for one class, and nothing does in a black image: its probability there is 1e-14."""
    torch.manual_seed(seed)
    features = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Conv2d(8, CHANNELS, 3, padding=1, bias=False),
        nn.ReLU(),
    )
    head = nn.Linear(CHANNELS, CLASSES)
    module = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double().eval()
    with torch.no_grad():
        seen = features(normalised(picture(seed))[None]).mean(dim=(2, 3)).sum()
        head.weight[target] = 120 / seen
        head.bias[target] = -30
    return module


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_where_channels_weigh_the_same_it_is_score_cam(no_blur, seed):
    """There w_k is one positive factor, and p_c(black) is nothing: what is left of Group-CAM is Score-CAM."""
    module = equal_weights(3, seed)
    group = partial(module, GroupCam(groups=CHANNELS, variant="reference"), layer="0", seed=seed)
    score = partial(module, ScoreCam(), layer="0", seed=seed)
    assert group.queries == score.queries + 1  # black
    weight = 120 / module[0](normalised(picture(seed))[None]).mean(dim=(2, 3)).sum().item() / group.sums[0].size
    assert_same(group.sums / weight, score.sums)


# Occlusion

SMALL = Preprocessing(9, (9, 11), (0.45, 0.5, 0.55), (0.25, 0.3, 0.2), "bilinear")


@pytest.mark.parametrize("window", [1, 2, 3, 4, 30])
@pytest.mark.parametrize("positions", [1, 2, 3, 5, 9, 10, 13])
def test_occlusion_windows_of_any_number_and_size(positions, window):
    """The cases have cells of different sizes, more cells than pixels, and windows larger than the image."""
    torch.manual_seed(positions)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 5)
    )
    module[-1].weight.data *= 10
    spec = Occlusion(positions=positions, window=window)
    image = picture(positions, 9, 11)
    for target in (0, 2):
        assert_equal(module.double().eval(), "0", spec, occlusion(spec), target, image, SMALL)
