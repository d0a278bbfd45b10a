"""Makes the final map, mm(ReLU(up(sums))), in the size asked for; a signed one is up(sums) / max |up(sums)|.

mm(z) = (z - min) / (max - min); up = bilinear, align_corners=False, to the network's input size. The final maps of
several layers are fused by their mean or maximum (signed ones: the value that is further from 0), and scaled again.
Everything is computed in float64 and delivered as float32. A map without positive evidence, or constant, is all zeros
and `degenerate`, never NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from camserve.errors import InvalidOption, Unsupported
from camserve.finalise.boxes import find_boxes
from camserve.methods import MethodSpec
from camserve.types import BoxOptions, Faithfulness, Fusion, InputView, MapSize, Prediction, SaliencyMap

SIZES: tuple[MapSize, ...] = ("input", "layer", "original")

NOISE = 1e-5
"""A map whose range is at most this share of its maximum is constant: some 80 ulp of the float32 sums it is made of.

Sums over fifty steps of what is the same everywhere were seen to differ by 3e-6 between locations."""


def final_map(
    sums: Sequence[np.ndarray],
    *,
    method: MethodSpec,
    target: Prediction,
    layers: Sequence[str],
    view: InputView,
    fusion: Fusion = "mean",
    size: MapSize = "input",
    boxes: BoxOptions | None = None,
    complete: bool = True,
    signed: bool = False,
) -> SaliencyMap:
    """Returns the map of one method and target from its merged sums.

    Args:
        sums: for each layer (h, w) at its resolution, signed: masks (or activations) weighted by their scores.
        method: the method that made the sums, with its parameters.
        target: the class explained.
        layers: names of the layers.
        view: where the network's input lies in the sent image.
        fusion: how the maps of several layers become one.
        size: "input": the network's input size. "layer": (h, w) of the only layer; ReLU and mm are taken there.
            "original": the map of size "input" laid into the crop of the sent image, zeros elsewhere.
        boxes: boxes to find on the map of size "input", whatever `size` is; None for no boxes.
        complete: whether every query of the method is in the sums.
        signed: whether the map has negative evidence as well, in [-1, 1].

    Returns:
        A map whose `value_range` is the range of the (upsampled) sums, or of the fused maps, before ReLU and mm;
        `image` is None.

    Raises:
        InvalidOption: unknown size.
        Unsupported: the sums are not finite, which comes from the network.
    """
    if size not in SIZES:
        raise InvalidOption(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    if not all(np.isfinite(one).all() for one in sums):
        where = " + ".join(layers)
        raise Unsupported(f"{method.title} at layer {where!r}: the network's activations or scores are not finite")
    scaled = normalise_signed if signed else normalise
    raw = np.asarray(sums[0], np.float64) if size == "layer" else fused(sums, view.size, fusion, signed)
    array, degenerate = scaled(raw)
    seen = scaled(fused(sums, view.size, fusion, signed))[0] if size == "layer" and boxes else array
    return SaliencyMap(
        method=method,
        target=target,
        layers=tuple(layers),
        array=into_original(array, view) if size == "original" else array,
        value_range=(float(raw.min()), float(raw.max())),
        degenerate=degenerate,
        complete=complete,
        boxes=find_boxes(seen, view, boxes) if boxes else (),
        signed=signed,
    )


def fused(sums: Sequence[np.ndarray], size: tuple[int, int], fusion: Fusion, signed: bool = False) -> np.ndarray:
    """Returns the upsampled sums of one layer, or the mean or maximum of the final maps of several: (H, W) float64."""
    if len(sums) == 1:
        return upsample(sums[0], size)
    scaled = normalise_signed if signed else normalise
    maps = np.stack([scaled(upsample(one, size))[0].astype(np.float64) for one in sums])
    if fusion == "mean":
        return np.asarray(maps.mean(axis=0))
    return np.asarray(np.take_along_axis(maps, np.abs(maps).argmax(axis=0)[None], axis=0)[0])


def faithfulness(sums: np.ndarray) -> Faithfulness:
    """Returns both curves from the merged sums of `MapCurves`, (1, 2, points)."""
    deletion, insertion = sums[0].astype(np.float64)
    return Faithfulness("rise", deletion, insertion)


def normalise(raw: np.ndarray) -> tuple[np.ndarray, bool]:
    """Returns mm(ReLU(raw)) as float32 in [0, 1], and whether it is degenerate: then it is all zeros."""
    low, high = max(raw.min(), 0.0), max(raw.max(), 0.0)
    if high - low <= NOISE * high:
        return np.zeros(raw.shape, np.float32), True
    above = raw - low if low > 0 else np.maximum(raw, 0.0)  # ReLU changes nothing above 0, nor does a difference to 0
    # Cast on the way: new arrays of this size are fetched from the system, page by page.
    return np.divide(above, high - low, out=np.empty(raw.shape, np.float32), casting="same_kind"), False


def normalise_signed(raw: np.ndarray) -> tuple[np.ndarray, bool]:
    """Returns raw / max |raw| as float32 in [-1, 1], and whether it is degenerate: then it is all zeros."""
    most = np.abs(raw).max()
    if raw.max() - raw.min() <= NOISE * most:
        return np.zeros(raw.shape, np.float32), True
    return np.divide(raw, most, out=np.empty(raw.shape, np.float32), casting="same_kind"), False


def upsample(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns (h, w) upsampled to `size`, float64, as torch's `F.interpolate` does (bilinear, align_corners=False)."""
    return _resampled(array.astype(np.float64), _taps(array.shape[0], size[0]), _taps(array.shape[1], size[1]))


def into_original(array: np.ndarray, view: InputView) -> np.ndarray:
    """Returns a map of the network's input size laid into the sent image's, float32; zero outside of the crop.

    A pixel of the sent image belongs to the crop if its centre does; the crop's edges may be fractional.
    """
    height, width = view.original_size
    left, top, right, bottom = view.crop
    rows = _crop_taps(height, top, bottom, array.shape[0])
    columns = _crop_taps(width, left, right, array.shape[1])
    laid = _resampled(array.astype(np.float32), rows, columns)
    return np.asarray(laid.clip(-1, 1, out=laid))  # a convex combination may round to just above 1


@dataclass(frozen=True)
class _Taps:
    """Holds for each place of a goal the two samples of a source that it lies between, and their weights."""

    low: np.ndarray
    high: np.ndarray
    low_weights: np.ndarray
    high_weights: np.ndarray


BLOCK = 2**14
"""Values that are made at a time at most, so that their samples stay in the processor's cache."""


def _resampled(array: np.ndarray, rows: _Taps, columns: _Taps) -> np.ndarray:
    """Returns (h, w) at the places of some rows and columns, in its own dtype.

    No matrix product: NumPy's would be made by threads of OpenBLAS, which spin for some 25 ms afterwards, and so keep
    PyTorch's threads from the cores, of this process and of workers beside a gateway.
    """
    return _along(np.ascontiguousarray(_along(array.T, columns).T), rows)


def _along(array: np.ndarray, taps: _Taps) -> np.ndarray:
    """Returns (h, w) at the places of some rows."""
    found = np.empty((len(taps.low), array.shape[1]), array.dtype)
    step = max(1, BLOCK // max(1, array.shape[1]))
    scratch = np.empty((min(step, len(found)), array.shape[1]), array.dtype)
    for start in range(0, len(found), step):
        some = slice(start, start + step)
        made = found[some]
        samples = scratch[: len(made)]
        np.take(array, taps.low[some], axis=0, out=samples, mode="clip")  # all are there; "raise" would copy first
        np.multiply(samples, taps.low_weights[some, None], out=made, casting="same_kind")
        np.take(array, taps.high[some], axis=0, out=samples, mode="clip")
        np.multiply(samples, taps.high_weights[some, None], out=samples, casting="same_kind")
        made += samples
    return found


@lru_cache(maxsize=128)
def _taps(source: int, goal: int) -> _Taps:
    """Returns taps whose weights sum to 1; every caller shares them."""
    return _between((np.arange(goal) + 0.5) * (source / goal) - 0.5, source)


def _crop_taps(pixels: int, start: float, stop: float, source: int) -> _Taps:
    """Returns taps of pixel centres within start..stop; the others have no weight."""
    centres = np.arange(pixels) + 0.5
    outside = (centres < start) | (centres >= stop)
    return _between((centres - start) * (source / (stop - start)) - 0.5, source, outside)


def _between(positions: np.ndarray, source: int, outside: np.ndarray | bool = False) -> _Taps:
    """Returns the taps of fractional positions among `source` samples, clamped at both ends; none for those outside."""
    at = positions.clip(0, source - 1)
    low = np.floor(at).astype(np.intp)
    high, fraction = np.minimum(low + 1, source - 1), at - low
    return _Taps(low, high, np.where(outside, 0, 1 - fraction), np.where(outside, 0, fraction))
