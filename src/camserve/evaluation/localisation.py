"""Measures how well a map lies on the object: pointing game, energy, boxes. numpy only.

Maps are (height, width), rows are y. Boxes are half-open and in pixels of the map; a pixel belongs to a box if its
centre does. A map of zeros points nowhere: it misses, and has no energy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from camserve.evaluation.truth import TrueBox
from camserve.finalise.boxes import find_boxes
from camserve.images import whole_view
from camserve.types import Box, BoxOptions

ROUNDING = 1e-6
"""Values that differ by at most this share of the map's maximum are equal, as they are where a layer is saturated."""
TOLERANCE_PX = 15
"""Tolerance of the pointing game in TorchRay and in the papers that use it."""


def inside(boxes: Iterable[TrueBox], size: tuple[int, int]) -> np.ndarray:
    """Returns the union of the boxes, (height, width) bool."""
    rows, columns = (np.arange(length) + 0.5 for length in size)
    union = np.zeros(size, bool)
    for box in boxes:
        in_rows, in_columns = (rows >= box.top) & (rows < box.bottom), (columns >= box.left) & (columns < box.right)
        union |= in_rows[:, None] & in_columns
    return union


def points_into(saliency: np.ndarray, region: np.ndarray, tolerance_px: float = 0) -> bool:
    """Tells whether the maximum lies in the region: pointing game of Excitation Backprop.

    Source: https://arxiv.org/abs/1608.00507.

    Args:
        saliency: (height, width); of equal maxima the first in reading order counts.
        region: (height, width) bool.
        tolerance_px: largest distance from a pixel of the region that is still a hit, as in TorchRay.
    """
    if saliency.max() <= 0:
        return False
    first = (saliency >= (1 - ROUNDING) * saliency.max()).argmax()
    row, column = np.unravel_index(first, saliency.shape)
    y, x = np.nonzero(region)
    return bool((((y - row) ** 2 + (x - column) ** 2) <= tolerance_px**2).any())


def energy_inside(saliency: np.ndarray, region: np.ndarray) -> float:
    """Returns the share of the map's sum in the region: energy-based pointing game (Score-CAM, sec. 4.3)."""
    total = saliency.sum(dtype=np.float64)
    return float(saliency[region].sum(dtype=np.float64) / total) if total > 0 else 0.0


def size_adaptive_share(saliency: np.ndarray, region: np.ndarray) -> float:
    """Returns the share of the N most salient pixels that lie in the region, N being its area in pixels.

    This is the bbox metric of Integrated Grad-CAM (https://arxiv.org/abs/2102.07805). Equally salient pixels count by
    their share: of the pixels at the last value that is let in, the number missing to N is taken evenly from all of
    them.
    """
    area = int(region.sum())
    if area == 0 or saliency.max() <= 0:
        return 0.0
    values = saliency.ravel()
    last = np.partition(values, -area)[-area]
    margin = ROUNDING * values.max()
    above, level = values > last + margin, np.abs(values - last) <= margin
    flat = region.ravel()
    missing = area - above.sum()
    return float((flat[above].sum() + missing * flat[level].mean()) / area)


def iou(a: Box | TrueBox, b: Box | TrueBox) -> float:
    """Returns the intersection over union of two boxes."""
    width = min(a.right, b.right) - max(a.left, b.left)
    height = min(a.bottom, b.bottom) - max(a.top, b.top)
    both = max(width, 0.0) * max(height, 0.0)
    return both / (_area(a) + _area(b) - both)


def _area(box: Box | TrueBox) -> float:
    return (box.right - box.left) * (box.bottom - box.top)


def box_iou(saliency: np.ndarray, boxes: Sequence[TrueBox], options: BoxOptions | None = None) -> float:
    """Returns the IoU of the box around the largest component above 15 % of the maximum with its best true box: WSOL.

    Args:
        saliency: (height, width).
        boxes: of the class explained.
        options: of `camserve.finalise.boxes`; None: threshold 0.15, largest component.
    """
    found = find_boxes(saliency, whole_view((saliency.shape[0], saliency.shape[1])), options or BoxOptions())
    return max((iou(found[0], box) for box in boxes), default=0.0) if found else 0.0


@dataclass(frozen=True)
class Localisation:
    """Holds all measures of how well one map lies on the object."""

    pointing: bool
    pointing_15px: bool
    energy: float
    iou: float
    bbox: float


def localise(saliency: np.ndarray, boxes: Sequence[TrueBox], mask: np.ndarray | None = None) -> Localisation:
    """Measures how well a map (height, width) lies on its class.

    Args:
        saliency: the map.
        boxes: of the class, in pixels of the map.
        mask: (height, width) bool, the pixels of the class, where they are known; None: those inside the boxes.
    """
    region = inside(boxes, (saliency.shape[0], saliency.shape[1])) if mask is None else mask
    return Localisation(
        pointing=points_into(saliency, region),
        pointing_15px=points_into(saliency, region, TOLERANCE_PX),
        energy=energy_inside(saliency, region),
        iou=box_iou(saliency, boxes),
        bbox=size_adaptive_share(saliency, region),
    )


@dataclass(frozen=True)
class ClassContrast:
    """Holds the localisation of the same boxes under two maps.

    A class-discriminative method finds the object for the first class only.
    """

    most_likely: Localisation
    least_likely: Localisation


def class_contrast(
    most: np.ndarray, least: np.ndarray, boxes: Sequence[TrueBox], mask: np.ndarray | None = None
) -> ClassContrast:
    """Measures the maps of the most and of the least likely class, on the boxes or mask of the most likely one."""
    return ClassContrast(localise(most, boxes, mask), localise(least, boxes, mask))
