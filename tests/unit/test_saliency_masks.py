"""Masks: upsampling, their extremes, blending, blur."""

import numpy as np
import pytest
import torch
from asked import asked
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur as torchvision_blur

from camserve.errors import Unsupported
from camserve.saliency.masks import gaussian_blur, make_masks, upsample, upsampled_extremes

sides = st.integers(1, 9)
goals = st.integers(1, 40)
reals = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)


def interpolated(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 3), sides, sides), elements=reals), goals, goals)
def test_extremes_are_those_of_the_upsampled_map(values, height, width):
    maps = torch.from_numpy(values).double()
    low, high = upsampled_extremes(maps, (height, width))
    large = interpolated(maps, (height, width)).flatten(1)
    # Two ways to the same weighted mean of four values of up to 1e3.
    torch.testing.assert_close(low, large.amin(1), rtol=0, atol=1e-11)
    torch.testing.assert_close(high, large.amax(1), rtol=0, atol=1e-11)


def test_upsampling_is_bilinear_without_aligned_corners():
    maps = torch.rand(2, 3, 5)
    torch.testing.assert_close(upsample(maps, (17, 9)), interpolated(maps, (17, 9)), rtol=0, atol=0)


def masks_of(values: torch.Tensor, size=(16, 20), baseline=None):
    torch.manual_seed(0)
    image = torch.randn(3, *size, dtype=values.dtype)
    return make_masks(image, values, asked([0]), baseline=baseline)


@pytest.mark.parametrize("with_baseline", [False, True])
def test_a_query_is_the_image_through_its_upsampled_normalised_mask(with_baseline):
    values = torch.randn(4, 5, 6, dtype=torch.float64)
    baseline = torch.randn(3, 16, 20, dtype=torch.float64) if with_baseline else None
    masks = masks_of(values, baseline=baseline)
    queries = masks.blend(1, 3)
    assert queries.shape == (2, 3, 16, 20)
    for query, value in zip(queries, values[1:3], strict=True):
        large = interpolated(value[None], (16, 20))[0]
        mask = (large - large.min()) / (large.max() - large.min())
        rest = 0 if baseline is None else baseline * (1 - mask)
        torch.testing.assert_close(query, masks.input * mask + rest, rtol=0, atol=1e-12)


def test_normalising_commutes_with_upsampling():
    masks = masks_of(torch.randn(4, 5, 6, dtype=torch.float64))
    large = upsample(masks.normalised(), (16, 20)).flatten(1)
    torch.testing.assert_close(large.amin(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(large.amax(1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_making_masks_leaves_the_maps_as_they_were():
    values = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) + 1
    made = make_masks(torch.rand(3, 8, 8), values, asked([0]))  # as large as the image: nothing is upsampled
    before = made.values.clone()
    first, again = made.blend(0, 3), made.blend(0, 3)
    assert torch.equal(made.values, before)
    assert torch.equal(first, again)


def test_constant_maps_are_left_out_and_the_others_keep_their_owners():
    values = torch.zeros(5, 3, 3)
    values[1] = torch.arange(9.0).view(3, 3)
    values[2] = 4.5
    values[4, 1, 1] = -1
    image = torch.randn(3, 8, 8)
    masks = make_masks(image, values, asked([7, 9]), owners=torch.tensor([0, 0, 1, 1, 1]))
    assert len(masks) == 2
    assert masks.owners.tolist() == [0, 1]
    torch.testing.assert_close(masks.values, values[[1, 4]])


def test_no_map_at_all_is_no_query():
    assert len(masks_of(torch.ones(3, 4, 4))) == 0
    assert len(masks_of(torch.ones(0, 4, 4))) == 0


def test_the_anchor_is_the_baseline_itself():
    baseline = torch.randn(3, 16, 20)
    anchored = masks_of(torch.rand(2, 4, 4), baseline=baseline).with_anchor()
    assert len(anchored) == 3
    torch.testing.assert_close(anchored.blend(0, 1)[0], baseline, rtol=0, atol=0)


@settings(max_examples=300)
@given(
    hnp.arrays(np.float32, st.tuples(st.just(2), sides, sides), elements=reals),
    st.integers(1, 40),
    st.integers(1, 40),
)
@example(np.array([[[6, 0, 1.2e-38, 0, 0]]] * 2, np.float32), 2, 1)  # of 6 and 1e-38 only the latter is left
def test_no_query_is_ever_nan(values, height, width):
    """Also where upsampling, or making smaller, flattens a map that was not constant."""
    masks = masks_of(torch.from_numpy(values), size=(height, width))
    assert masks.blend(0, len(masks)).isfinite().all()
    assert masks.normalised().isfinite().all()


@pytest.mark.parametrize("offset", [1.0, 6.0, 1e4])
def test_a_map_that_is_constant_but_for_rounding_gives_no_nan(offset):
    """One unit in the last place, in the middle, is rounded away when it is upsampled."""
    values = torch.full((1, 3, 3), offset)
    values[0, 1, 1] = float(np.nextafter(np.float32(offset), np.float32(np.inf)))
    masks = masks_of(values, size=(224, 224))
    assert masks.blend(0, len(masks)).isfinite().all()
    assert masks.normalised().isfinite().all()


def test_a_layer_larger_than_the_image_gives_no_nan():
    """Bilinear samples of a checkerboard at twice the image's resolution are its mean everywhere."""
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    masks = masks_of(board[None], size=(4, 4))
    assert masks.blend(0, len(masks)).isfinite().all()
    assert masks.normalised().isfinite().all()


# Blur


@pytest.mark.parametrize("size", [(40, 48), (27, 26), (224, 224)])
@pytest.mark.parametrize(("kernel", "sigma"), [(51, 50.0), (11, 5.0), (3, 0.5)])
def test_blur_equals_torchvisions(size, kernel, sigma):
    torch.manual_seed(0)
    image = torch.randn(3, *size)
    expected = torchvision_blur(image, [kernel, kernel], [sigma, sigma])
    torch.testing.assert_close(gaussian_blur(image, kernel, sigma), expected, rtol=0, atol=2e-6)  # sums of 51 float32


def test_blur_of_an_image_too_small_for_it_is_refused_with_both_sizes():
    with pytest.raises(Unsupported, match=r"51 px blur needs an input of at least 26 px, got \(25, 40\)"):
        gaussian_blur(torch.zeros(3, 25, 40), 51, 50.0)
    assert gaussian_blur(torch.ones(3, 26, 26), 51, 50.0).shape == (3, 26, 26)
