"""Brings regions of the sent image to a grid that lies over what the network sees, as maps are laid back. No torch.

A grid of (h, w) places covers the network's input, and so the crop of the sent image: place (i, j) is what lies between
the edges i and i + 1 of h + 1 that divide the crop's height evenly, and j and j + 1 of its width. By how much a place
counts is the mean of the region over it: for a box the share of it that the box covers.
"""

from __future__ import annotations

import numpy as np

from camserve.errors import InvalidOption
from camserve.images import mask_size, read_mask
from camserve.types import InputView, Region
from camserve.types.targets import Edges

_STRIP_PIXELS = 2**20  # of a mask that are summed at once, in float64


def shares(region: Region, view: InputView, grid: tuple[int, int]) -> np.ndarray | None:
    """Returns by how much each place of a grid counts, (h, w) float32 of which some are above 0.

    Args:
        region: the region; one without box, mask and grid has no shares yet: None.
        view: which part of the sent image the grid covers.
        grid: (h, w).

    Raises:
        InvalidOption: the region is outside of the image or of the crop, or a mask is empty or of another size.
        InvalidImage: a mask is no grey PNG file, or broken.
        Unavailable: there is not enough memory for its pixels.
    """
    if region.box is not None:
        return _of_box(region.box, view, grid)
    if region.mask is not None:
        mask = _read("mask", region.mask, view.original_size, "the sent image")
        found = _of_mask(mask, view, grid)
        if not found.any():
            raise InvalidOption(f"the mask of a region has nothing in what the network sees: {_allowed(view)}")
        return found
    if region.grid is not None:
        return _read("grid", region.grid, grid, "the network's outputs").astype(np.float32)
    return None


def _read(what: str, file: bytes, size: tuple[int, int], of: str) -> np.ndarray:
    """Returns the values of a mask that must have a size; it is decoded only if it has."""
    came = mask_size(file)
    if came != size:
        raise InvalidOption(
            f"the {what} of a region has the size of {of}, {size[1]} x {size[0]} pixels; got {came[1]} x {came[0]}"
        )
    values = read_mask(file)
    if not values.any():
        raise InvalidOption(f"the {what} of a region is empty: all of its pixels are 0")
    return values


def _of_box(box: Edges, view: InputView, grid: tuple[int, int]) -> np.ndarray:
    x0, y0, x1, y1 = box
    left, top, right, bottom = view.crop
    rows, columns = _covered(y0, y1, top, bottom, grid[0]), _covered(x0, x1, left, right, grid[1])
    if not (rows.any() and columns.any()):
        came = f"x {x0:g}..{x1:g}, y {y0:g}..{y1:g}"
        raise InvalidOption(f"the box of a region lies in what the network sees: {_allowed(view)}; got {came}")
    return np.outer(rows, columns).astype(np.float32)


def _covered(start: float, stop: float, low: float, high: float, places: int) -> np.ndarray:
    """Returns the share of each of the places of low..high that lies in start..stop, (places,) float64."""
    marks = np.linspace(low, high, places + 1)
    inside = np.minimum(marks[1:], stop) - np.maximum(marks[:-1], start)
    return np.asarray(inside.clip(min=0) / ((high - low) / places))


def _of_mask(mask: np.ndarray, view: InputView, grid: tuple[int, int]) -> np.ndarray:
    """Returns the mean of a mask (H, W) over each place, scaled so that the largest value of the mask is 1."""
    left, top, right, bottom = view.crop
    step = max(1, _STRIP_PIXELS // mask.shape[1])
    strips = (mask[start : start + step] for start in range(0, len(mask), step))
    narrow = np.concatenate([_means(strip, left, right, grid[1]) for strip in strips])
    return np.asarray(_means(narrow.T, top, bottom, grid[0]).T / mask.max(), np.float32)


def _means(values: np.ndarray, low: float, high: float, places: int) -> np.ndarray:
    """Returns the means of rows (n, L) over each of the places of low..high, (n, places); beyond the row are zeros."""
    length = values.shape[1]
    sums = np.zeros((len(values), length + 1))
    values.cumsum(axis=1, dtype=np.float64, out=sums[:, 1:])
    at = np.linspace(low, high, places + 1).clip(0, length)
    before = np.floor(at).astype(np.intp)
    after, part = np.minimum(before + 1, length), at - before
    found: np.ndarray = np.diff(sums[:, before] * (1 - part) + sums[:, after] * part, axis=1) / ((high - low) / places)
    return found


def _allowed(view: InputView) -> str:
    (height, width), (left, top, right, bottom) = view.original_size, view.crop
    return (
        f"x {max(left, 0):g}..{min(right, width):g} and y {max(top, 0):g}..{min(bottom, height):g} "
        f"of an image of {width} x {height} pixels"
    )
