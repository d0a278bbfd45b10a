"""The final map against torch, the three sizes, and what counts as degenerate."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camserve.errors import InvalidOption, Unsupported
from camserve.finalise.maps import final_map, into_original, normalise, upsample
from camserve.methods import GradCam
from camserve.types import BoxOptions, InputView, Prediction

CAT = Prediction(282, "tiger cat", 0.5)
VIEW = InputView(original_size=(300, 451), crop=(94.25, 18.75, 356.75, 281.25), size=(224, 224))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(height, width))


def finished(sums, view=VIEW, **options):
    return final_map([np.asarray(sums)], method=GradCam(), target=CAT, layers=["features"], view=view, **options)


def torch_upsample(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    tensor = torch.from_numpy(array)[None, None]
    return torch.nn.functional.interpolate(tensor, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()


sides = st.integers(1, 40)


@settings(max_examples=100, deadline=None)
@given(source=st.tuples(sides, sides), goal=st.tuples(sides, sides), seed=st.integers(0, 2**16))
def test_upsampling_equals_torch(source, goal, seed):
    array = noise(*source, seed)
    np.testing.assert_allclose(upsample(array, goal), torch_upsample(array, goal), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(7, 7), (14, 14), (5, 9)])
def test_map_is_rectified_after_upsampling(shape):
    sums = noise(*shape)
    rectified = np.maximum(torch_upsample(sums, VIEW.size), 0)
    expected = (rectified - rectified.min()) / (rectified.max() - rectified.min())
    saliency = finished(sums)
    assert saliency.array.dtype == np.float32
    assert (saliency.array.min(), saliency.array.max()) == (0, 1)
    np.testing.assert_allclose(saliency.array, expected, rtol=0, atol=1e-6)  # float32 of numbers up to 1


def test_lowest_positive_value_becomes_zero():
    array, degenerate = normalise(np.array([[3.0, 4.0], [5.0, 7.0]]))
    np.testing.assert_array_equal(array, np.array([[0, 0.25], [0.5, 1]], np.float32))
    assert not degenerate


def test_value_range_is_that_before_relu():
    saliency = finished([[-2.0, 1.0], [0.0, 3.0]])
    assert saliency.value_range == (-2.0, 3.0)


def test_layer_size_is_normalised_at_the_layer():
    saliency = finished([[-2.0, 1.0], [0.0, 4.0]], size="layer")
    np.testing.assert_array_equal(saliency.array, np.array([[0, 0.25], [0, 1]], np.float32))


@pytest.mark.parametrize("size", ["input", "layer", "original"])
@pytest.mark.parametrize(
    "sums",
    [
        np.zeros((7, 7)),
        -np.ones((7, 7)),
        np.full((7, 7), 1 / 3),
        np.full((7, 7), 1 / 3) + 2e-8 * noise(7, 7),
        1e20 * (1 + 5e-8 * noise(7, 7)),
        np.array([[0.7]]),
        np.full((7, 7), -0.0),
    ],
    ids=["zeros", "negative", "constant", "rounding noise", "large rounding noise", "one pixel", "minus zero"],
)
def test_constant_or_negative_sums_are_degenerate(sums, size):
    saliency = finished(sums.astype(np.float32), size=size)
    assert saliency.degenerate
    assert not saliency.array.any()
    assert saliency.array.dtype == np.float32


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-9, 1.0, 1e30])
def test_a_small_map_is_not_degenerate(scale):
    sums = np.abs(noise(7, 7))
    saliency = finished((scale * sums).astype(np.float32))
    assert not saliency.degenerate
    np.testing.assert_allclose(saliency.array, finished(sums).array, atol=1e-5)  # the float32 of the scaled sums


def test_little_positive_evidence_among_much_negative_is_a_map():
    sums = np.full((7, 7), -1.0)
    sums[3, 3] = 1e-3
    assert not finished(sums, size="layer").degenerate


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_sums_that_are_not_finite_are_an_error(value):
    sums = noise(7, 7)
    sums[2, 5] = value
    with pytest.raises(Unsupported, match=r"Grad-CAM at layer 'features'.*not finite"):
        finished(sums)


def test_unknown_size():
    with pytest.raises(InvalidOption, match="size must be one of input, layer, original, got 'big'"):
        finished(noise(7, 7), size="big")


def test_the_rest_is_passed_on():
    saliency = finished(noise(7, 7), complete=False)
    assert (saliency.method, saliency.target, saliency.layer, saliency.complete) == (GradCam(), CAT, "features", False)
    assert saliency.image is None
    assert saliency.boxes == ()


def slow_into_original(array: np.ndarray, view: InputView) -> np.ndarray:
    """Pixel by pixel."""
    left, top, right, bottom = view.crop
    (rows, columns), laid = array.shape, np.zeros(view.original_size)
    for y in range(view.original_size[0]):
        for x in range(view.original_size[1]):
            if left <= x + 0.5 < right and top <= y + 0.5 < bottom:
                v = min(max((y + 0.5 - top) / (bottom - top) * rows - 0.5, 0), rows - 1)
                u = min(max((x + 0.5 - left) / (right - left) * columns - 0.5, 0), columns - 1)
                j, i = min(int(v), rows - 2), min(int(u), columns - 2)
                b, a = v - j, u - i
                upper = (1 - a) * array[j, i] + a * array[j, i + 1]
                lower = (1 - a) * array[j + 1, i] + a * array[j + 1, i + 1]
                laid[y, x] = (1 - b) * upper + b * lower
    return laid


@pytest.mark.parametrize(
    "view",
    [
        VIEW,
        InputView(original_size=(20, 31), crop=(5.5, 0.0, 25.5, 20.0), size=(24, 24)),
        InputView(original_size=(50, 40), crop=(0.0, 4.2, 40.0, 44.3), size=(16, 30)),
    ],
    ids=["fractional", "half a pixel", "one side"],
)
def test_original_size_lays_the_input_map_into_the_crop(view):
    sums = noise(7, 7)
    saliency = finished(sums, view=view, size="original")
    expected = slow_into_original(finished(sums, view=view).array, view)
    assert saliency.array.shape == view.original_size
    assert saliency.array.dtype == np.float32
    assert 0 <= saliency.array.min() <= saliency.array.max() <= 1
    np.testing.assert_allclose(saliency.array, expected, rtol=0, atol=1e-5)  # float32 products, two in a row


def test_original_size_is_the_input_map_when_all_of_the_image_was_seen():
    view = InputView(original_size=(12, 16), crop=(0.0, 0.0, 16.0, 12.0), size=(12, 16))
    array = np.abs(noise(12, 16)).astype(np.float32) / 10
    np.testing.assert_array_equal(into_original(array, view), array)


@pytest.mark.parametrize("size", ["layer", "original"])
def test_boxes_do_not_depend_on_the_size(size):
    sums, options = noise(7, 7, seed=3), BoxOptions(all_components=True)
    boxes = finished(sums, boxes=options).boxes
    assert boxes
    assert finished(sums, boxes=options, size=size).boxes == boxes
