"""Eigen-CAM's component and its sign: rounding may choose neither, whatever the layer holds."""

import pytest
import torch
from reference.twins_gradient import eigen_cam_sign, first_component
from torch import Tensor
from torch.nn import functional as F

from camserve.saliency.eigen import principal_scores

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
ROUNDING = 8
"""Units in the last place by which activations of another processor, or of another batch size, may differ."""
SAME = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Of the largest score: what such rounding makes of a component whose variance stands clear of the next one's."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def behind_a_layer_norm(seed: int, channels: int = 24, size: tuple[int, int] = (5, 6)) -> Tensor:
    """(C, u, v): a blob that some channels see and others miss; mean and norm are the same at every place."""
    y, x = torch.meshgrid(*(torch.arange(length, dtype=torch.float64) for length in size), indexing="ij")
    blob = torch.exp(-((y - 1.5) ** 2 + (x - 2 - seed % 3) ** 2) / 2)
    background, there = normal(2, channels, seed=seed)
    tokens = background + 3 * there * blob[..., None] + normal(*size, channels, seed=seed + 100) * 0.2
    return F.layer_norm(tokens, (channels,)).permute(2, 0, 1)


def rounded(activations: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """The same, as another order of additions would leave it."""
    noise = ROUNDING * torch.finfo(dtype).eps * normal(*activations.shape, seed=seed)
    return (activations * (1 + noise)).to(dtype)


def assert_same(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=SAME[dtype])


def skewness(scores: Tensor) -> float:
    return float(scores.pow(3).mean() / scores.square().mean().pow(1.5))


@DTYPES
@pytest.mark.parametrize("channels", [24, 60], ids=["over channels", "over places"])
@pytest.mark.parametrize("seed", range(6))
def test_behind_a_layer_norm_rounding_does_not_choose_the_sign(seed, channels, dtype):
    """Nor does the order of channels or of places, in which everything is added up."""
    activations = behind_a_layer_norm(seed, channels)
    expected = principal_scores(activations)
    assert skewness(expected) > 0
    for again in range(8):
        altered = rounded(activations, dtype, seed=1000 + again)
        order = torch.randperm(channels, generator=torch.Generator().manual_seed(again))
        assert_same(principal_scores(altered[order]), expected, dtype)
        places = torch.randperm(expected.numel(), generator=torch.Generator().manual_seed(again))
        moved = principal_scores(altered.flatten(1)[:, places].reshape(altered.shape))
        assert_same(moved.flatten(), expected.flatten()[places], dtype)


@pytest.mark.parametrize("seed", range(6))
def test_behind_a_layer_norm_the_few_places_that_stand_out_are_positive(seed):
    """Also where the activations are turned over, as a network with the opposite weights would have them."""
    activations = behind_a_layer_norm(seed)
    scores = principal_scores(activations)
    assert 0 < (scores > 0).sum() < scores.numel() / 2
    assert_same(principal_scores(-activations), scores, torch.float64)


@pytest.mark.parametrize("tilt", [-0.2, 0.2])
def test_a_clear_mean_activation_goes_before_the_third_moment(tilt):
    """All channels are raised a little by the component itself: their mean says which side of it is bright."""
    activations = behind_a_layer_norm(0)
    scores = principal_scores(activations)
    tilted = principal_scores(activations + tilt * scores / scores.abs().max())
    assert (skewness(tilted) > 0) == (tilt > 0)


@pytest.mark.parametrize("correlation", [-0.03, 0.03])
def test_a_mean_activation_that_hardly_correlates_does_not_choose(correlation):
    activations = behind_a_layer_norm(0)
    scores = principal_scores(activations)
    aside = normal(*scores.shape, seed=7)
    aside = aside - aside.mean()
    aside = aside - (aside * scores).sum() / scores.square().sum() * scores
    brightness = correlation * scores / scores.norm() + aside / aside.norm()
    found = principal_scores(activations + 0.02 * brightness)
    assert skewness(found) > 0


@pytest.mark.parametrize("turned", [1, -1])
@pytest.mark.parametrize("channels", [2, 12], ids=["over channels", "over places"])
def test_of_symmetric_scores_the_first_place_that_stands_out_is_positive(channels, turned):
    """Mean and third moment are 0 up to rounding, and the largest score is as large as the smallest is small."""
    ramp = torch.linspace(-1, 1, 6, dtype=torch.float64).expand(1, 6)
    sides = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(channels // 2)
    activations = turned * sides[:, None, None] * ramp
    for seed in range(8):
        scores = principal_scores(rounded(activations, torch.float32, seed))
        assert scores[0, 0] > 0 > scores[0, -1]


@pytest.mark.parametrize("turned", [1, -1])
def test_of_scores_whose_third_moment_is_0_the_largest_is_positive(turned):
    row = torch.tensor([2.0] * 4 + [-1.0] * 5 + [-3.0], dtype=torch.float64)
    assert row.sum() == row.pow(3).sum() == 0
    activations = turned * torch.stack([row, -row])[:, None]
    for seed in range(8):
        found = principal_scores(rounded(activations, torch.float32, seed)).flatten()
        assert found[-1] == found.abs().max()


@pytest.mark.parametrize("turned", [1, -1])
def test_the_third_moment_goes_before_the_largest_score(turned):
    """One place has -3, and yet the sum of cubes is positive."""
    row = torch.tensor([2.0] * 5 + [-1.0] * 7 + [-3.0], dtype=torch.float64)
    assert row.sum() == 0 < row.pow(3).sum()
    found = principal_scores(turned * torch.stack([row, -row])[:, None]).flatten()
    assert found[-1] == -found.abs().max()


@DTYPES
def test_of_components_of_equal_variance_rounding_chooses_none(dtype):
    """Each channel sees one place: all directions have the same variance. And two ramps, across and down."""
    alone = torch.eye(4, dtype=torch.float64).reshape(4, 2, 2)
    across = torch.linspace(-1, 1, 5, dtype=torch.float64).expand(5, 5)
    ramps = torch.stack([across, -across, across.T, -across.T])
    for activations in (alone, ramps):
        found = [principal_scores(rounded(activations, dtype, seed)) for seed in range(8)]
        assert found[0][0, 0] == found[0].max() > 0
        for other in found[1:]:
            assert_same(other, found[0], dtype)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("brightness", [0, 0.001, 1], ids=["layer norm", "faint", "clear"])
def test_component_and_sign_are_those_of_the_twin(brightness, seed):
    activations = behind_a_layer_norm(seed) + brightness * normal(1, 5, 6, seed=seed)
    rows = activations.flatten(1).T
    expected = (first_component(rows) * eigen_cam_sign(rows)).reshape(5, 6)
    assert_same(principal_scores(activations), expected, torch.float64)
