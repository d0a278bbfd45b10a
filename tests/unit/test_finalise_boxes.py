"""Boxes: threshold, components, order, and their place in the sent image."""

import numpy as np
import pytest

from camserve.finalise.boxes import find_boxes
from camserve.types import Box, BoxOptions, InputView

SAME = InputView(original_size=(8, 10), crop=(0.0, 0.0, 10.0, 8.0), size=(8, 10))
ALL = BoxOptions(all_components=True)


@pytest.fixture
def two_blobs() -> np.ndarray:
    """A small strong blob (4 pixels, mean 0.8) and a large weak one (12 pixels, mean 0.5)."""
    array = np.zeros((8, 10), np.float32)
    array[1:3, 1:3] = [[1.0, 0.8], [0.8, 0.6]]
    array[4:7, 5:9] = 0.5
    return array


def test_largest_component_comes_first(two_blobs):
    large, small = find_boxes(two_blobs, SAME, ALL)
    assert (large.left, large.top, large.right, large.bottom) == (5, 4, 9, 7)
    assert (small.left, small.top, small.right, small.bottom) == (1, 1, 3, 3)
    assert (large.score, small.score) == pytest.approx((0.5, 0.8))


def test_only_the_largest_unless_all_are_asked_for(two_blobs):
    assert find_boxes(two_blobs, SAME, BoxOptions()) == find_boxes(two_blobs, SAME, ALL)[:1]


def test_threshold_is_relative_to_the_maximum(two_blobs):
    (box,) = find_boxes(two_blobs / 4, SAME, BoxOptions(threshold=0.55, all_components=True))
    assert (box.left, box.top, box.right, box.bottom) == (1, 1, 3, 3)


@pytest.mark.parametrize(("threshold", "pixels"), [(0, 16), (0.5, 16), (0.51, 4), (0.8, 3), (1, 1)])
def test_pixels_at_the_threshold_count(two_blobs, threshold, pixels):
    boxes = find_boxes(two_blobs, SAME, BoxOptions(threshold=threshold, all_components=True))
    marked = two_blobs[(two_blobs >= np.float32(threshold)) & (two_blobs > 0)]
    assert len(marked) == pixels
    areas = {16: [12, 4], 4: [4], 3: [4], 1: [1]}[pixels]  # three of four pixels still need a box of 2 x 2
    assert [(box.right - box.left) * (box.bottom - box.top) for box in boxes] == areas


def test_corners_do_not_connect():
    array = np.zeros((8, 10), np.float32)
    array[2, 2] = array[3, 3] = 1
    assert len(find_boxes(array, SAME, ALL)) == 2


def test_equal_areas_are_ordered_by_score():
    array = np.zeros((8, 10), np.float32)
    array[1, 1], array[5, 5], array[7, 9] = 0.3, 1.0, 0.6
    assert [box.score for box in find_boxes(array, SAME, ALL)] == pytest.approx([1.0, 0.6, 0.3])


def test_a_map_of_zeros_has_no_box():
    assert find_boxes(np.zeros((8, 10), np.float32), SAME, BoxOptions(threshold=0)) == ()


def test_boxes_are_in_pixels_of_the_sent_image(two_blobs):
    view = InputView(original_size=(300, 451), crop=(100.5, 10.0, 120.5, 34.0), size=(8, 10))
    (box,) = find_boxes(two_blobs, view, BoxOptions())
    assert box == Box(left=110.5, top=22.0, right=118.5, bottom=31.0, score=0.5)


def test_neighbouring_scores_do_not_leak_into_each_other():
    array = np.zeros((8, 10), np.float32)
    array[0:4, 0:4] = 1  # its box overlaps that of the second component
    array[1:4, 0:3] = 0
    array[2:4, 0:2] = 0.2
    first, second = find_boxes(array, SAME, ALL)
    assert (first.score, second.score) == pytest.approx((1.0, 0.2))
    assert (second.left, second.top, second.right, second.bottom) == (0, 2, 2, 4)
