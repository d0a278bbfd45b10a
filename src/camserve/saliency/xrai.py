"""Computes XRAI (https://arxiv.org/abs/1906.02825): Integrated Gradients, ranked over overlapping image segments.

Constants and the order of work are those of PyPI `saliency` 0.2.1 (its algorithm "full"). The gradients on the way are
queries like any others; once they are all there, a worker ranks what the finish made of them. The ranking gives the
same map, but never goes through whole masks again: each pixel is taken once, and then leaves the count and the sum of
every mask that it is in.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from camserve.errors import InvalidOption, Unsupported
from camserve.methods import Xrai
from camserve.saliency.backprop import gradients_along
from camserve.saliency.features import Features
from camserve.types import Ranking

SCALES = (50, 100, 150, 250, 500, 1200)
"""Scales of the segmentations; larger ones give larger segments."""
SIGMA = 0.8
"""Standard deviation of the blur before a segmentation, in pixels."""
SMALLEST_SEGMENT = 150
"""Size of the smallest segment, in pixels."""
SIDE = 224
"""Size at which the image is segmented, in pixels."""
DILATION = 5
"""Radius of the disk by which segments are dilated, in pixels."""
SMALLEST_GAIN = 50
"""Least number of pixels that a mask must add; one that adds fewer is dropped."""
PIXEL_STEPS = 255 * 256
"""Pixel values are rounded to multiples of 1 / PIXEL_STEPS. Those of uint8 images are such multiples, so that no
rounding in the normalised input, which depends on dtype and device, decides how the segmentation breaks a tie."""


def attributions(features: Features, spec: Xrai, numbers: Tensor) -> Tensor:
    """Returns the sum of (x - baseline) dS_c/dx over the points of these numbers; the finish makes the attribution.

    Query 2 i + b is point i of the way from baseline b: b = 0 is everywhere min(x), b = 1 everywhere max(x). The points
    are 0, 1/(steps - 1), ..., 1, with equal weights. The attribution is the largest value over channels of the mean.

    Returns:
        (K, 3, H, W).
    """
    image = features.input
    numbers = numbers.sort().values
    baseline = torch.stack(image.aminmax())[numbers % 2][:, None, None, None]
    points = torch.linspace(0, 1, spec.steps, dtype=image.dtype, device=image.device)
    point = points[numbers // 2][:, None, None, None]

    def on_the_way(first: int, last: int) -> Tensor:
        return torch.lerp(baseline[first:last], image, point[first:last])

    total = image.new_zeros(len(features.targets), *image.shape)
    # Within a constant image rounding alone decides which pixel a max pooling takes, and rounding depends on the size
    # of a batch. So each baseline has a pass of its own: then the map depends on neither micro-batch nor sharding.
    constant = int((numbers < 2).sum())
    for start, stop in (*((query, query + 1) for query in range(constant)), (constant, len(numbers))):
        for first, last, row, gradients in gradients_along(features, on_the_way, start, stop):
            total[row] += ((image - baseline[first:last]) * gradients).sum(dim=0)
    return total


def ranked(features: Features, spec: Ranking, numbers: Tensor) -> Tensor:
    """Returns maps in which each pixel has the mean attribution of the pixels with which it was taken.

    Returns:
        (K, H, W); zeros where the one query, the ranking, is not asked.

    Raises:
        InvalidOption: the attribution has not the input's size.
    """
    targets, *size = spec.attribution.shape
    if tuple(size) != features.input.shape[1:]:
        raise InvalidOption(f"maps of {tuple(size)} do not fit an input of {tuple(features.input.shape[1:])}")
    if not np.isfinite(spec.attribution).all():
        raise Unsupported("the network's gradients are not finite")
    maps = np.zeros(spec.attribution.shape)
    if len(numbers):
        masks = find_masks(input_pixels(features))
        # On its way to a worker an attribution is rounded to float32: an engine's is rounded as well, to the same map.
        dtype = np.float64 if features.input.dtype == torch.float64 else np.float32
        maps = np.stack([rank(one.astype(dtype).astype(np.float64), masks) for one in spec.attribution])
        features.passes.count("ranking", targets)
    return torch.from_numpy(maps).to(features.input)


def input_pixels(features: Features) -> np.ndarray:
    """Returns the network's input as pixel values, in which 0 is black and 1 white, (H, W, C), float64."""
    black, white = features.passes.black.double(), features.passes.white.double()
    pixels = (features.input.double() - black) / (white - black)
    return (pixels * PIXEL_STEPS).round().div(PIXEL_STEPS).movedim(0, -1).cpu().numpy()


def find_masks(pixels: np.ndarray) -> list[np.ndarray]:
    """Returns the dilated segments of all scales, as flat indices of pixels, from (H, W, C) pixels of any range.

    The scales are for distances of colours, so grey counts as the colour that it is.
    """
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    scaled = _scaled(pixels)
    labels = [_segment(scaled, scale, pixels.shape[:2]) for scale in SCALES]
    return [_dilated(one == label) for one in labels for label in np.unique(one)]


def _scaled(pixels: np.ndarray) -> np.ndarray:
    """Returns the image at (224, 224, C), bicubic, with values in [-1, 1]."""
    from skimage.transform import resize

    low, high = pixels.min(), pixels.max()
    scaled = 2 * (pixels - low) / ((high - low) or 1) - 1
    options: dict[str, Any] = {"order": 3, "mode": "constant", "preserve_range": True, "anti_aliasing": True}
    return np.asarray(resize(scaled, (SIDE, SIDE), **options))  # type: ignore[no-untyped-call]  # skimage's own


def _segment(scaled: np.ndarray, scale: float, size: tuple[int, ...]) -> np.ndarray:
    """Returns the labels (H, W) of the graph-based segmentation by Felzenszwalb and Huttenlocher, 2004."""
    from skimage.segmentation import felzenszwalb
    from skimage.transform import resize

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Got image with third dimension")  # any number of channels may come
        labels = felzenszwalb(scaled, scale=scale, sigma=SIGMA, min_size=SMALLEST_SEGMENT)
    options: dict[str, Any] = {"order": 0, "mode": "constant", "preserve_range": True, "anti_aliasing": False}
    return np.asarray(resize(labels, size, **options).astype(int))  # type: ignore[no-untyped-call]  # skimage's own


def _dilated(mask: np.ndarray) -> np.ndarray:
    """Returns the flat indices of all pixels within the disk's radius of a mask.

    Only what is around the mask is looked at.
    """
    from skimage.morphology import isotropic_dilation

    rows, columns = (_around(pixels) for pixels in mask.nonzero())
    grown = isotropic_dilation(mask[rows, columns], DILATION)  # type: ignore[no-untyped-call]  # skimage's own
    row, column = grown.nonzero()
    return np.asarray((row + rows.start) * mask.shape[1] + column + columns.start)


def _around(pixels: np.ndarray) -> slice:
    """Returns the slice from the first pixel to the last, with the dilation's radius on both sides."""
    return slice(max(0, pixels.min() - DILATION), pixels.max() + DILATION + 1)


def rank(attribution: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Takes masks one by one, always the one whose new pixels have the largest mean attribution.

    Args:
        attribution: (H, W), float64.
        masks: flat indices of each.

    Returns:
        (H, W): for each pixel, that mean of the mask with which it was taken; pixels of no mask have their own mean.
    """
    flat, inside = attribution.ravel(), _membership(masks, attribution.size)
    counts, sums = np.array([len(mask) for mask in masks]), np.array([flat[mask].sum() for mask in masks])
    found, free = np.empty_like(flat), np.ones(len(flat), bool)
    while counts.max() >= SMALLEST_GAIN:
        density = np.where(counts >= SMALLEST_GAIN, sums / np.maximum(counts, 1), -np.inf)
        best = masks[int(density.argmax())]
        new = best[free[best]]
        found[new], free[new] = flat[new].mean(), False
        gone = inside[new]
        weights = np.repeat(flat[new], np.diff(gone.indptr))
        counts = counts - np.bincount(gone.indices, minlength=len(masks))
        sums = sums - np.bincount(gone.indices, weights, minlength=len(masks))
    if free.any():
        found[free] = flat[free].mean()
    return found.reshape(attribution.shape)


def _membership(masks: Sequence[np.ndarray], pixels: int) -> Any:
    """Returns in which masks each pixel is, (pixels, M), sparse by rows."""
    from scipy.sparse import csc_matrix

    ends = np.cumsum([0, *map(len, masks)])
    members = np.concatenate(masks)
    return csc_matrix((np.ones(len(members), bool), members, ends), shape=(pixels, len(masks))).tocsr()
