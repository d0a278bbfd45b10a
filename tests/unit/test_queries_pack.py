"""Packing: every query once, in order, in runs of the micro-batch; masks and extremes as upsampling makes them."""

from __future__ import annotations

import pytest
import torch
from asked import asked
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from camserve.queries.pack import ask, micro_batches
from camserve.saliency.masks import gaussian_blur, make_masks, upsample, upsampled_extremes


@given(sizes=st.lists(st.integers(0, 20), max_size=8), limit=st.integers(1, 9))
def test_every_query_is_in_exactly_one_micro_batch_and_only_the_last_is_short(sizes, limit):
    batches = list(micro_batches(sizes, limit))
    asked = [(which, number) for batch in batches for which, start, stop in batch for number in range(start, stop)]
    assert asked == [(which, number) for which, size in enumerate(sizes) for number in range(size)]
    lengths = [sum(stop - start for _, start, stop in batch) for batch in batches]
    assert all(length == limit for length in lengths[:-1])
    assert all(0 < length <= limit for length in lengths)


@pytest.mark.parametrize("size", [(7, 7), (14, 9), (1, 5), (13, 13), (56, 56)])
@pytest.mark.parametrize("target", [(224, 224), (48, 64), (29, 31), (7, 7), (5, 3)])
def test_extremes_are_those_of_the_upsampled_map(size, target):
    """Also for targets smaller than the map. float64, so that only the order of additions differs."""
    maps = torch.randn(6, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    low, high = upsampled_extremes(maps, target)
    upsampled = upsample(maps, target).flatten(1)
    torch.testing.assert_close(low, upsampled.amin(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(high, upsampled.amax(1), rtol=0, atol=1e-12)


def test_constant_maps_are_left_out_and_the_rest_keep_their_owners():
    maps = torch.rand(5, 3, 3)
    maps[1], maps[3] = 0.1, 7.7
    masks = make_masks(torch.rand(3, 32, 32), maps, asked([4]), owners=torch.arange(5))
    assert masks.owners.tolist() == [0, 2, 4]
    torch.testing.assert_close(masks.values, maps[[0, 2, 4]])


def test_a_blended_query_shows_the_image_where_the_mask_is_one_and_the_baseline_where_it_is_zero():
    image, baseline = torch.rand(3, 32, 32), torch.rand(3, 32, 32)
    values = torch.tensor([[[0.0, 5.0]]]).expand(1, 2, 2)
    query = make_masks(image, values, asked([0]), baseline=baseline).with_anchor().blend(0, 2)
    torch.testing.assert_close(query[0], baseline)
    torch.testing.assert_close(query[1][:, :, -8:], image[:, :, -8:])
    torch.testing.assert_close(query[1][:, :, :8], baseline[:, :, :8])


def test_queries_of_several_sets_are_scored_as_if_alone():
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(7, 3 * 16 * 16, generator=generator, dtype=torch.float64)
    sets = [
        make_masks(torch.rand(3, 16, 16, generator=generator, dtype=torch.float64), maps, asked(columns))
        for maps, columns in ((torch.rand(5, 4, 4).double(), [6, 0]), (torch.rand(9, 2, 8).double(), [3]))
    ]
    largest = 0

    def network(x: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(x))
        return x.flatten(1) @ weight.T

    together = ask(network, sets, micro_batch=4)
    assert largest == 4
    for masks, columns, scores in zip(sets, ([6, 0], [3]), together, strict=True):
        expected = network(masks.blend(0, len(masks))).softmax(1)[:, columns]
        torch.testing.assert_close(scores, expected, rtol=1e-12, atol=0)


def test_the_blur_is_torchvisions():
    from torchvision.transforms.v2.functional import gaussian_blur as torchvisions

    image = torch.randn(3, 60, 52, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(gaussian_blur(image, 51, 50.0), torchvisions(image, [51, 51], [50.0, 50.0]))


def test_upsampling_is_bilinear_with_centres_aligned():
    maps = torch.rand(2, 3, 4)
    torch.testing.assert_close(
        upsample(maps, (12, 8)), F.interpolate(maps[None], (12, 8), mode="bilinear", align_corners=False)[0]
    )
