"""Encodes a map for delivery, as raw values, a grey PNG or an overlay in a file, and reads it back."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from camserve.errors import InvalidOption
from camserve.finalise.render import drawn, grey_levels
from camserve.types import ENCODINGS, SaliencyMap

_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "uint8": np.dtype("u1"),
}
_OVERLAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "overlay_png": ("PNG", {}),
    "overlay_jpeg": ("JPEG", {"quality": 90}),
}

ARRAYS = (*_DTYPES, "png")
"""The encodings that `decode` reads back."""


def encode(saliency: SaliencyMap, encoding: str, colormap: str = "jet", opacity: float = 0.5) -> bytes:
    """Returns the map as bytes.

    Args:
        saliency: the map; what is encoded is its (height, width) array.
        encoding: "float32", "float16": little-endian, row by row. "uint8": round(255 * map), row by row, of a signed
            map round(127.5 * (map + 1)). "png": an 8-bit grey PNG file of that. "overlay_png", "overlay_jpeg" (quality
            90): the map in colours over the image that it lies on, as a file.
        colormap: colours of an overlay.
        opacity: weight of the colours of an overlay, in 0..1.

    Raises:
        InvalidOption: unknown encoding or colormap, opacity out of range, or an overlay without an image.
    """
    if encoding in _OVERLAYS:
        kind, options = _OVERLAYS[encoding]
        return _file(drawn(saliency, colormap, opacity), kind, **options)
    return _encoder(encoding, saliency.signed)(saliency.array)


def _encoder(encoding: str, signed: bool) -> Callable[[np.ndarray], bytes]:
    if encoding == "png":
        return lambda array: _file(Image.fromarray(grey_levels(array, signed)), "PNG")
    if encoding == "uint8":
        return lambda array: grey_levels(array, signed).tobytes()
    if encoding in _DTYPES:
        return lambda array: array.astype(_DTYPES[encoding]).tobytes()
    raise InvalidOption(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")


def _file(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data: bytes, encoding: str, shape: tuple[int, int], signed: bool = False) -> np.ndarray:
    """Returns an encoded map as float32 (height, width) in [0, 1], a signed one in [-1, 1].

    It is exact for float32, to 2^-12 for float16, to 1/510 for uint8 and png, signed to 1/255.

    Raises:
        InvalidOption: an encoding that is not one of `ARRAYS`.
        ValueError: the data does not fit encoding and shape.
    """
    if encoding not in ARRAYS:
        raise InvalidOption(f"a map can be read from {', '.join(ARRAYS)}, not from {encoding!r}")
    values = _png_values(data) if encoding == "png" else _raw_values(data, encoding, shape)
    if values.shape != shape:
        raise ValueError(f"a map of shape {shape} was announced, {values.shape} came")
    found = values.astype(np.float32)
    if values.dtype != np.uint8:
        return found
    return np.asarray(found / np.float32(127.5) - np.float32(1) if signed else found / np.float32(255))


def _raw_values(data: bytes, encoding: str, shape: tuple[int, int]) -> np.ndarray:
    dtype = _DTYPES[encoding]
    expected = dtype.itemsize * math.prod(shape)
    if len(data) != expected:
        raise ValueError(f"a {encoding} map of shape {shape} has {expected} bytes, got {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape)


def _png_values(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return np.asarray(image.convert("L"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"not a PNG map: {error}") from None
