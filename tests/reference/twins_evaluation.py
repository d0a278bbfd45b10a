"""The metrics written straight from their definitions: one masked image at a time, loops and all, float64."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn


def probability(module: nn.Module, image: Tensor, index: int) -> float:
    with torch.no_grad():
        return float(module(image[None]).softmax(dim=1)[0, index])


def order(saliency: np.ndarray) -> list[tuple[int, int]]:
    """Pixels by falling saliency, equal ones in reading order."""
    height, width = saliency.shape
    places = [(row, column) for row in range(height) for column in range(width)]
    return sorted(places, key=lambda place: -saliency[place])


def curve(module: nn.Module, begin: Tensor, end: Tensor, saliency: np.ndarray, index: int, step_px: int) -> list[float]:
    """Follows `CausalMetric.single_run` of `evaluation.py` in the code of RISE."""
    image, places = begin.clone(), order(saliency)
    scores = [probability(module, image, index)]
    while places:
        now, places = places[:step_px], places[step_px:]
        for row, column in now:
            image[:, row, column] = end[:, row, column]
        scores.append(probability(module, image, index))
    return scores


def area(scores: list[float]) -> float:
    """Trapezoids of equal width that add up to 1."""
    pieces = [(first + second) / 2 for first, second in pairwise(scores)]
    return sum(pieces) / len(pieces)


def rise_blur(image: Tensor) -> Tensor:
    """Blurs as `evaluation.py` of RISE does: conv2d with `gkern(11, 5)`, padding 5."""
    impulse = np.zeros((11, 11))
    impulse[5, 5] = 1
    kernel = gaussian_filter(impulse, 5)
    channels, height, width = image.shape
    blurred = torch.zeros_like(image)
    for channel in range(channels):
        for row in range(height):
            for column in range(width):
                total = 0.0
                for dy in range(-5, 6):
                    for dx in range(-5, 6):
                        if 0 <= row + dy < height and 0 <= column + dx < width:
                            total += kernel[dy + 5, dx + 5] * float(image[channel, row + dy, column + dx])
                blurred[channel, row, column] = total
    return blurred


def group_cam_blur(image: Tensor) -> Tensor:
    """51 x 51 Gaussian of sigma 50 with reflected borders, as a whole two-dimensional kernel."""
    taps = [math.exp(-0.5 * (offset / 50) ** 2) for offset in range(-25, 26)]
    kernel = np.outer(taps, taps) / sum(taps) ** 2
    padded = np.pad(image.numpy(), ((0, 0), (25, 25), (25, 25)), mode="reflect")
    _, height, width = image.shape
    windows = [
        [(padded[:, row : row + 51, left : left + 51] * kernel).sum((1, 2)) for left in range(width)]
        for row in range(height)
    ]
    return torch.from_numpy(np.array(windows).transpose(2, 0, 1))


Region = tuple[int, int, int, int]
"""(left, top, right, bottom), whole pixels, half-open."""


def in_region(row: int, column: int, boxes: list[Region]) -> bool:
    return any(left <= column < right and top <= row < bottom for left, top, right, bottom in boxes)


def pointing(saliency: np.ndarray, boxes: list[Region], tolerance_px: float = 0) -> bool:
    """The first maximum is in a box, or within the tolerance of one of its pixels."""
    height, width = saliency.shape
    row, column = order(saliency)[0]
    return any(
        math.hypot(row - y, column - x) <= tolerance_px
        for y in range(height)
        for x in range(width)
        if in_region(y, x, boxes)
    )


def energy(saliency: np.ndarray, boxes: list[Region]) -> float:
    height, width = saliency.shape
    places = [(row, column) for row in range(height) for column in range(width)]
    inside = sum(saliency[place] for place in places if in_region(*place, boxes))
    return inside / sum(saliency[place] for place in places)


def size_adaptive_share(saliency: np.ndarray, boxes: list[Region]) -> float:
    """Returns the share of the N most salient pixels in the region, for maps without equal values."""
    height, width = saliency.shape
    area = sum(in_region(row, column, boxes) for row in range(height) for column in range(width))
    return sum(in_region(*place, boxes) for place in order(saliency)[:area]) / area


def box_iou(saliency: np.ndarray, boxes: list[Region]) -> float:
    """Threshold at 15 % of the maximum, largest component by flood fill, tight box, best overlap counted by pixels."""
    left, top, right, bottom = largest_component_box(saliency >= 0.15 * saliency.max())
    best = 0.0
    for box in boxes:
        both = either = 0
        for row in range(saliency.shape[0]):
            for column in range(saliency.shape[1]):
                first = in_region(row, column, [(left, top, right, bottom)])
                second = in_region(row, column, [box])
                both += first and second
                either += first or second
        best = max(best, both / either)
    return best


def largest_component_box(on: np.ndarray) -> Region:
    left_over = {(int(row), int(column)) for row, column in zip(*np.nonzero(on), strict=True)}
    largest: set[tuple[int, int]] = set()
    while left_over:
        component, edge = set(), [left_over.pop()]
        while edge:
            row, column = edge.pop()
            component.add((row, column))
            for place in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if place in left_over:
                    left_over.remove(place)
                    edge.append(place)
        largest = max(largest, component, key=len)
    rows, columns = [row for row, _ in largest], [column for _, column in largest]
    return min(columns), min(rows), max(columns) + 1, max(rows) + 1


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of the ranks; the rank of a value is how many are smaller, and half of those equal."""
    first, second = ([mean_rank(value, array.ravel()) for value in array.ravel()] for array in (a, b))
    mean_a, mean_b = sum(first) / len(first), sum(second) / len(second)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(first, second, strict=True))
    spread = math.sqrt(sum((x - mean_a) ** 2 for x in first) * sum((y - mean_b) ** 2 for y in second))
    return covariance / spread


def mean_rank(value: float, values: np.ndarray) -> float:
    return sum(other < value for other in values) + sum(other == value for other in values) / 2
