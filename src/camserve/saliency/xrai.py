"""XRAI (https://arxiv.org/abs/1906.02825): Integrated Gradients, ranked over overlapping segments of the image.

Constants and the order of work are those of PyPI `saliency` 0.2.1 (its algorithm "full"). The ranking gives the same
map, but never goes through whole masks again: each pixel is taken once, and then leaves the count and the sum of every
mask that it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from camserve.methods import Xrai
from camserve.saliency.backprop import gradients_along
from camserve.saliency.features import Features

SCALES = (50, 100, 150, 250, 500, 1200)
"""Of the segmentations: larger ones give larger segments."""
SIGMA = 0.8
"""Of the blur before a segmentation, in pixels."""
SMALLEST_SEGMENT = 150
"""In pixels."""
SIDE = 224
"""Size at which the image is segmented, in pixels."""
DILATION = 5
"""Radius of the disk by which segments are dilated, in pixels."""
SMALLEST_GAIN = 50
"""A mask that adds fewer pixels is dropped."""
PIXEL_STEPS = 255 * 256
"""Pixel values are rounded to multiples of 1 / this. Those of uint8 images are such, so that no rounding in the
normalised input, which depends on dtype and device, decides how the segmentation breaks a tie."""


def xrai(features: Features, spec: Xrai) -> Tensor:
    """Each place has the mean attribution of the part of the image with which it was taken.

    Returns:
        (K, H, W).
    """
    attribution = mean_attribution(features, spec.steps).double().cpu().numpy()
    masks = find_masks(_pixels(features))
    maps = np.stack([rank(of_target, masks) for of_target in attribution])
    return torch.from_numpy(maps).to(features.input)


def mean_attribution(features: Features, steps: int) -> Tensor:
    """max over channels of the mean of Integrated Gradients with two baselines: everywhere min(x), everywhere max(x).

    The points on the way are 0, 1/(steps - 1), ..., 1, with equal weights.

    Returns:
        (K, H, W).
    """
    image = features.input
    baselines = torch.stack(image.aminmax())[:, None, None, None]  # (2, 1, 1, 1)
    points = torch.linspace(0, 1, steps, dtype=image.dtype, device=image.device).repeat_interleave(2)
    which = torch.arange(2, device=image.device).repeat(steps)

    def on_the_way(first: int, last: int) -> Tensor:
        return torch.lerp(baselines[which[first:last]], image, points[first:last, None, None, None])

    total = image.new_zeros(len(features.targets), *image.shape)
    # Within a constant image rounding alone decides which place a max pooling takes, and rounding depends on the size
    # of a batch. So each baseline has a pass of its own: then the map does not depend on the micro-batch.
    for start, stop in ((0, 1), (1, 2), (2, 2 * steps)):
        for first, last, gradients in gradients_along(features, on_the_way, start, stop):
            total = total + torch.einsum("nchw,nkchw->kchw", image - baselines[which[first:last]], gradients)
    return (total / (2 * steps)).amax(dim=1)


def _pixels(features: Features) -> np.ndarray:
    """(H, W, 3), float64: the network's input as pixel values, in which 0 is black and 1 white."""
    black, white = features.passes.black.double(), features.passes.white.double()
    pixels = (features.input.double() - black) / (white - black)
    return (pixels * PIXEL_STEPS).round().div(PIXEL_STEPS).movedim(0, -1).cpu().numpy()


def find_masks(pixels: np.ndarray) -> list[np.ndarray]:
    """Dilated segments of all scales: of each the flat indices of its places, from (H, W, 3) pixels of any range."""
    scaled = _scaled(pixels)
    labels = [_segment(scaled, scale, pixels.shape[:2]) for scale in SCALES]
    return [_dilated(one == label) for one in labels for label in np.unique(one)]


def _scaled(pixels: np.ndarray) -> np.ndarray:
    """(224, 224, 3), values in [-1, 1]; bicubic."""
    from skimage.transform import resize

    low, high = pixels.min(), pixels.max()
    scaled = 2 * (pixels - low) / ((high - low) or 1) - 1
    options: dict[str, Any] = {"order": 3, "mode": "constant", "preserve_range": True, "anti_aliasing": True}
    return np.asarray(resize(scaled, (SIDE, SIDE), **options))  # type: ignore[no-untyped-call]  # skimage's own


def _segment(scaled: np.ndarray, scale: float, size: tuple[int, ...]) -> np.ndarray:
    """(H, W) labels of the graph-based segmentation by Felzenszwalb and Huttenlocher, 2004."""
    from skimage.segmentation import felzenszwalb
    from skimage.transform import resize

    labels = felzenszwalb(scaled, scale=scale, sigma=SIGMA, min_size=SMALLEST_SEGMENT)
    options: dict[str, Any] = {"order": 0, "mode": "constant", "preserve_range": True, "anti_aliasing": False}
    return np.asarray(resize(labels, size, **options).astype(int))  # type: ignore[no-untyped-call]  # skimage's own


def _dilated(mask: np.ndarray) -> np.ndarray:
    """Flat indices of all within the disk's radius of the mask; only the part around the mask is looked at."""
    from skimage.morphology import isotropic_dilation

    rows, columns = (_around(places) for places in mask.nonzero())
    grown = isotropic_dilation(mask[rows, columns], DILATION)  # type: ignore[no-untyped-call]  # skimage's own
    row, column = grown.nonzero()
    return np.asarray((row + rows.start) * mask.shape[1] + column + columns.start)


def _around(places: np.ndarray) -> slice:
    """From the first place to the last, with the dilation's radius on both sides."""
    return slice(max(0, places.min() - DILATION), places.max() + DILATION + 1)


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
    """(pixels, M), sparse by rows: in which masks each pixel is."""
    from scipy.sparse import csc_matrix

    ends = np.cumsum([0, *map(len, masks)])
    places = np.concatenate(masks)
    return csc_matrix((np.ones(len(places), bool), places, ends), shape=(pixels, len(masks))).tocsr()
