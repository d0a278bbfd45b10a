"""The perturbation family against its twins on small networks and the default model, in float64: equal to rounding."""

import functools
import math

import numpy as np
import pytest
import torch
from asked import asked
from reference import twins
from reference import twins_perturbation as twin
from reference.finished import maps_of
from reference.models import CHANNELS, CLASSES, HEIGHT, MODELS, PREPROCESSING, WIDTH, build, picture, silence
from torch import nn

from camserve import Engine
from camserve.finalise.maps import upsample
from camserve.methods import AblationCam, GroupCam, IsCam, MethodSpec, Occlusion, ReciproCam, Rise, ScoreCam, SsCam
from camserve.saliency.counter import normal, uniform
from camserve.saliency.rise import RandomMasks
from camserve.types import Item, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network

pytest_plugins = ["reference.default_model"]

FLOAT32_ULP = 1.2e-7
"""Maps are float32 in [0, 1] at the end, so this is all that may differ when everything before is float64."""
FLOAT64 = {"rtol": 1e-9, "atol": 1e-11}
"""Sums of a few thousand float64 terms in another order, relative to the map's maximum."""
SMALL_DIFFERENCES = {"rtol": 1e-9, "atol": 1e-9}
"""RISE's map is what is left of sums that are 30 times as large; Ablation-CAM's weights are differences of logits."""


def ss_cam(module, image, layer, target, samples=3, std=2.0, seed=5):
    def noise(k: int, s: int) -> torch.Tensor:
        drawn = normal(seed, torch.tensor([k * samples + s]), image[0].numel(), torch.float64)
        return std * drawn.view_as(image[0])

    return twin.ss_cam(module, image, layer, target, samples, noise)


def rise_masks(spec: Rise, size: tuple[int, int]) -> list[torch.Tensor]:
    """From the numbers that belong to (seed, i): first the two offsets, then the cells."""
    masks = []
    for i in range(spec.masks):
        random = uniform(spec.seed, torch.tensor([i]), 2 + spec.grid**2, torch.float64)[0]
        offset = [int(random[axis] * math.ceil(size[axis] / spec.grid)) for axis in range(2)]
        kept = (random[2:] < spec.keep_prob).reshape(spec.grid, spec.grid)
        masks.append(twin.rise_mask(kept, (offset[0], offset[1]), size))
    return masks


def rise(spec: Rise):
    def by_twin(module, image, layer, target):
        return twin.rise(module, image, target, masks(tuple(image.shape[1:])), spec.keep_prob)

    masks = functools.cache(functools.partial(rise_masks, spec))
    return by_twin


def occlusion(spec: Occlusion):
    return lambda module, image, layer, target: twin.occlusion(module, image, target, spec.positions, spec.window)


def grouped(original, spec: GroupCam):
    """A twin of Group-CAM with clusters instead of chunks."""

    def by_twin(module, image, layer, target):
        maps = functools.partial(twin.clustered_maps, grouping=spec.grouping)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(twins, "group_maps", maps)
            return original(module, image, layer, target, spec.groups)

    return by_twin


def _methods(rise_spec: Rise, occlusion_spec: Occlusion) -> dict:
    kmeans = GroupCam(groups=5, grouping="kmeans")
    agglomerative = GroupCam(groups=5, grouping="agglomerative", variant="reference")
    return {
        "score_cam_paper": (ScoreCam(variant="paper"), functools.partial(twin.score_cam, variant="paper")),
        "score_cam_logit": (ScoreCam(variant="logit"), functools.partial(twin.score_cam, variant="logit")),
        "score_cam_before": (ScoreCam(normalise="before"), functools.partial(twin.score_cam, normalise="before")),
        "ss_cam": (SsCam(samples=3, seed=5), ss_cam),
        "is_cam": (IsCam(samples=4), functools.partial(twin.is_cam, samples=4)),
        "group_cam_kmeans": (kmeans, grouped(twins.group_cam_paper, kmeans)),
        "group_cam_agglomerative": (agglomerative, grouped(twins.group_cam_reference, agglomerative)),
        "rise": (rise_spec, rise(rise_spec)),
        "ablation_cam": (AblationCam(), twin.ablation_cam),
        "recipro_cam": (ReciproCam(), twin.recipro_cam),
        "recipro_cam_gaussian": (
            ReciproCam(kernel="gaussian"),
            functools.partial(twin.recipro_cam, kernel="gaussian"),
        ),
        "occlusion": (occlusion_spec, occlusion(occlusion_spec)),
    }


METHODS = _methods(Rise(masks=9, grid=4, keep_prob=0.4, seed=2), Occlusion(positions=6, window=3))


def normalised(image: np.ndarray, preprocessing=PREPROCESSING) -> torch.Tensor:
    return twins.normalised(image, preprocessing.mean, preprocessing.std)


def sums_of(network: Network, layer: str, spec: MethodSpec, target: int, image: np.ndarray) -> np.ndarray:
    """Returns what is upsampled and scaled at the end, in float64."""
    total = spec.queries(network.info.layer(layer), 1)
    item = Item(image, (Target(index=target),), (Task(0, spec, 0, total, layer),))
    (found,) = maps_of(Executor(network), item)
    assert found.dtype == np.float64
    return found[0]


def assert_equal(module, layer, spec, by_twin, target, image, preprocessing=PREPROCESSING):
    """Holds the final map, and before it the sums up to a positive factor, against the twin; returns the final map."""
    raw = by_twin(module, normalised(image, preprocessing), layer, target)
    engine = Engine(module, preprocessing=preprocessing)
    sums = sums_of(engine.network, layer, spec, target, image)
    large = upsample(sums, tuple(raw.shape))
    if raw.abs().max() > 0:
        tolerance = SMALL_DIFFERENCES if isinstance(spec, (Rise, AblationCam)) else FLOAT64
        np.testing.assert_allclose(large / np.abs(large).max(), (raw / raw.abs().max()).numpy(), **tolerance)
    (result,) = engine.explain(image, methods=[spec], targets=[target], layer=layer).maps
    expected = twins.final(raw)
    assert result.degenerate == (not expected.any())
    np.testing.assert_allclose(result.array, expected, rtol=0, atol=FLOAT32_ULP)
    return result


def most_probable(module: nn.Module, image: np.ndarray) -> int:
    with torch.no_grad():
        return int(module(normalised(image)[None])[0].argmax())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_method_equals_its_twin(name, method):
    module, layer = build(name, 2, torch.float64), MODELS[name][1]
    image = picture(2)
    results = [
        assert_equal(module, layer, *METHODS[method], target, image) for target in (most_probable(module, image), 3)
    ]
    assert not all(result.degenerate for result in results)  # there is a map to compare


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [0, 1])
def test_method_equals_its_twin_for_other_weights_and_images(seed, method):
    module = build("perceptron", seed, torch.float64)
    for target in range(0, CLASSES, 2):
        assert_equal(module, "features.8", *METHODS[method], target, picture(seed))


@pytest.mark.parametrize("method", METHODS)
def test_dead_and_constant_channels_count_for_nothing(method):
    module = silence(build("perceptron", 1, torch.float64), "features.7", slice(0, 10), value=0.0)
    if method != "ablation_cam":  # which does count a constant channel: as a constant
        silence(module, "features.7", slice(10, 15), value=0.7)
    results = [assert_equal(module, "features.8", *METHODS[method], target, picture(1)) for target in (0, 3, 5)]
    assert not all(result.degenerate for result in results)


@pytest.mark.parametrize("normalise", ["after", "before"])
@pytest.mark.parametrize("variant", ["reference", "paper", "logit"])
def test_every_variant_of_score_cam_with_either_normalisation(variant, normalise):
    module = build("perceptron", 3, torch.float64)
    by_twin = functools.partial(twin.score_cam, variant=variant, normalise=normalise)
    spec = ScoreCam(variant=variant, normalise=normalise)
    assert not assert_equal(module, "features.8", spec, by_twin, 2, picture(3)).degenerate


@pytest.mark.parametrize("groups", [1, 4, CHANNELS])
@pytest.mark.parametrize("grouping", ["kmeans", "agglomerative"])
@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_clusters_are_scikit_learns(variant, grouping, groups):
    module = build("signed", 3, torch.float64)
    spec = GroupCam(groups=groups, grouping=grouping, variant=variant)
    original = {"paper": twins.group_cam_paper, "reference": twins.group_cam_reference}[variant]
    for target in (1, 4):
        assert_equal(module, "features.7", spec, grouped(original, spec), target, picture(3))


@pytest.mark.parametrize("std", [0.0, 0.5, 10.0])
def test_noise_has_the_deviation_asked_for(std):
    by_twin = functools.partial(ss_cam, samples=2, std=std, seed=1)
    module = build("perceptron", 2, torch.float64)
    assert_equal(module, "features.8", SsCam(samples=2, std=std, seed=1), by_twin, 5, picture(2))


def test_one_integrated_sample_is_score_cam_and_so_is_one_sample_without_noise():
    """c_1 = 1 / 1: the plain mask."""
    engine = Engine(build("perceptron", 2, torch.float64), preprocessing=PREPROCESSING)
    specs = [ScoreCam(variant="logit", normalise="before"), IsCam(samples=1), SsCam(samples=2, std=0)]
    score, *others = engine.explain(picture(2), methods=specs, targets=[5]).maps
    for other in others:
        np.testing.assert_allclose(other.array, score.array, rtol=0, atol=FLOAT32_ULP)


# RISE's masks


def hashed(seed: int, sample: int, place: int) -> int:
    """splitmix64's finaliser three times over, in Python's integers."""
    step, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    stream = mix((seed + step) & mask)
    return mix((mix((stream + sample * step) & mask) + (place + 1) * step) & mask)


@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1])
def test_random_numbers_are_the_hash_of_their_place(seed):
    samples = [0, 1, 999_999]
    found = uniform(seed, torch.tensor(samples), 5, torch.float64)
    drawn = normal(seed, torch.tensor(samples), 5, torch.float64)
    for row, sample in enumerate(samples):
        for place in range(5):
            bits = hashed(seed, sample, place)
            first, second = (bits >> 40) / 2**24, (bits & (2**24 - 1)) / 2**24
            assert found[row, place] == first
            expected = math.sqrt(-2 * math.log(1 - first)) * math.cos(2 * math.pi * second)
            assert drawn[row, place].item() == pytest.approx(expected, rel=1e-9)


def random_masks(spec: Rise, dtype=torch.float64, size=(HEIGHT, WIDTH)) -> torch.Tensor:
    image = torch.zeros(3, *size, dtype=dtype)
    return RandomMasks(image, asked([0]), spec, torch.arange(spec.masks), 8, torch.zeros(1)).masks(0, spec.masks)


@pytest.mark.parametrize("grid", [1, 2, 7, 13, 45, 64])
@pytest.mark.parametrize("size", [(40, 48), (33, 20)])
def test_masks_are_upsampled_grids_cut_out_at_an_offset(grid, size):
    spec = Rise(masks=3, grid=grid, seed=4)
    for found, expected in zip(random_masks(spec, size=size), rise_masks(spec, size), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_cells_are_kept_with_their_probability_and_masks_are_uniform_on_the_whole():
    for keep_prob in (0.1, 0.5, 0.9):
        masks = random_masks(Rise(masks=4000, keep_prob=keep_prob))
        mean = masks.mean(dim=0)
        assert masks.min() >= 0
        assert masks.max() <= 1
        # 4000 masks, each pixel of deviation at most sqrt(p (1 - p)): 5 deviations of their mean
        assert (mean - keep_prob).abs().max() < 5 * math.sqrt(keep_prob * (1 - keep_prob) / 4000)


def test_masks_are_the_same_in_float32():
    spec = Rise(masks=50, seed=9)
    torch.testing.assert_close(random_masks(spec, torch.float32).double(), random_masks(spec), rtol=0, atol=1e-6)


def test_another_seed_is_another_set_of_masks():
    one, other = random_masks(Rise(masks=50, seed=0)), random_masks(Rise(masks=50, seed=1))
    assert (one[:, None] - other[None]).abs().amax(dim=(2, 3)).min() > 0.1
