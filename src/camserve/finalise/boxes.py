"""Finds boxes around what a map marks: weakly supervised localisation as in the Grad-CAM paper, sec. 4.1."""

from __future__ import annotations

import numpy as np

from camserve.types import Box, BoxOptions, InputView

ROUNDING = 1e-6
"""Largest difference between equal values, relative to the map's maximum, and between equal scores."""


def find_boxes(array: np.ndarray, view: InputView, options: BoxOptions) -> tuple[Box, ...]:
    """Returns tight boxes around the connected components of the pixels that are above 0 and reach the threshold.

    The threshold is a share of the map's maximum. Pixels are connected by their edges, not by their corners
    (4-connectivity).

    Args:
        array: (height, width) in [0, 1], of the network's input size.
        view: where that lies in the sent image.
        options: threshold, and whether all components are wanted or the largest alone.

    Returns:
        Boxes in pixels of the sent image, the component with the most pixels first, among equals the one with the
        higher score, among those the first in reading order; empty for a map of zeros.
    """
    from scipy import ndimage  # here, so that the client needs no scipy

    labels, count = ndimage.label((array >= (options.threshold - ROUNDING) * array.max()) & (array > 0))
    if not count:
        return ()
    areas = np.bincount(labels.ravel())[1:]
    scores = np.bincount(labels.ravel(), weights=array.ravel())[1:] / areas
    slices = ndimage.find_objects(labels)
    order = np.lexsort((-scores.round(6), -areas))[: None if options.all_components else 1]
    return tuple(_box(slices[number], float(scores[number]), view) for number in order)


def _box(where: tuple[slice, slice], score: float, view: InputView) -> Box:
    left, top, right, bottom = view.crop
    height, width = view.size
    scale_x, scale_y = (right - left) / width, (bottom - top) / height
    rows, columns = where
    return Box(
        left=left + columns.start * scale_x,
        top=top + rows.start * scale_y,
        right=left + columns.stop * scale_x,
        bottom=top + rows.stop * scale_y,
        score=score,
    )
