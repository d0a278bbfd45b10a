"""Expresses what a preprocessor of Hugging Face does as a `Preprocessing`, and tries whether it does the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from camserve.archive.card import MAX_INPUT_PX
from camserve.archive.untrusted import short
from camserve.errors import InvalidOption
from camserve.images import seen
from camserve.types import Preprocessing

_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the ways to resize that a card can have."""
_SAME = 1e-5
"""Share of the largest number of the input by which two ways of making it may differ: ten times float32's rounding."""


def expressed(processor: Any, whole: bool = False) -> tuple[Preprocessing, str]:
    """Returns the preprocessing that makes of pictures what a preprocessor does, and what is to be said of it.

    Args:
        processor: the preprocessor.
        whole: whether the network is to see all of an image, as one that finds things at their places must. A
            preprocessor that keeps proportions makes inputs of many sizes then; where nothing else fits, that of square
            pictures is taken, to which all others are stretched. The text says so, and is empty otherwise.

    Raises:
        InvalidOption: there is none.
    """
    name = type(processor).__name__.removesuffix("Pil")
    for pictures in (_pictures, _squares) if whole else (_pictures,):
        for preprocessing in _candidates(processor):
            if pictures is _squares and not isinstance(preprocessing.resize_px, tuple):
                continue  # it would cut off what is beside the middle
            if all(_makes_same(processor, preprocessing, picture) for picture in pictures(preprocessing.crop_px)):
                height, width = preprocessing.crop_px
                stretched = f"{name} keeps proportions: here images are stretched to its square, {height} x {width}"
                return preprocessing, stretched if pictures is _squares else ""
    settings = {key: value for key, value in processor.to_dict().items() if key in _SETTINGS}
    raise InvalidOption(
        f"the preprocessing of {name} cannot be expressed: images are resized to a shorter side or to a height and "
        "width, cropped to their centre, scaled and normalised; it says "
        + short(json.dumps(settings, default=str, sort_keys=True))
    )


_SETTINGS = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct", "do_pad")


def _candidates(processor: Any) -> Iterator[Preprocessing]:
    """Yields what a preprocessor may do, as far as its settings tell; whether it does is for others to see."""
    interpolation = _RESAMPLING.get(int(getattr(processor, "resample", None) or 0))
    size, crop_size = getattr(processor, "size", None), getattr(processor, "crop_size", None)
    if interpolation is None or not processor.do_resize:
        return
    crop = _sides(crop_size) if getattr(processor, "do_center_crop", None) else None
    shortest = getattr(size, "shortest_edge", None)
    resized: list[tuple[Any, tuple[Any, Any] | None]] = []
    if shortest is None:
        resized += [(_sides(size), crop or _sides(size))]
    else:
        fraction = getattr(processor, "crop_pct", None) or 1.0
        resized += [(shortest, crop), (int(256 / 224 * shortest), crop)]  # the second one is LeViT's
        resized += [(int(shortest / fraction), (shortest, shortest)), ((shortest, shortest), (shortest, shortest))]
    factor = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    for resize, cropped in resized:
        if resize is None or cropped is None or not _is_small(resize, cropped):
            continue
        try:
            yield Preprocessing(
                resize_px=resize,
                crop_px=cropped,
                mean=tuple((value + offset) / factor for value in _by_channel(mean)),
                std=tuple(value / factor for value in _by_channel(std)),
                interpolation=cast("Any", interpolation),
                crop_start="down",
            )
        except InvalidOption:
            continue


def _sides(size: Any) -> tuple[int, int] | None:
    height, width = getattr(size, "height", None), getattr(size, "width", None)
    return None if height is None or width is None else (height, width)


def _by_channel(values: Any) -> tuple[float, ...]:
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(map(float, values))


def _is_small(resize: Any, crop: tuple[int, int]) -> bool:
    sides = (*(resize if isinstance(resize, tuple) else (resize,)), *crop)
    return all(isinstance(side, int) and 1 <= side <= MAX_INPUT_PX for side in sides)


def _pictures(crop: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yields pictures wide and high, of sizes that leave each number of odd pixels to a crop."""
    height, width = crop
    draw = np.random.default_rng(0)
    for more in range(4):
        size = (height + 2, 2 * width + 3 + more) if more % 2 else (2 * height + 3 + more, width + 2)
        yield draw.integers(0, 256, (*size, 3), dtype=np.uint8)


def _squares(crop: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yields square pictures, smaller and larger than the input."""
    draw = np.random.default_rng(0)
    for side in (crop[0] // 2 + 1, crop[0], crop[0] + crop[0] // 3):
        yield draw.integers(0, 256, (side, side, 3), dtype=np.uint8)


def _makes_same(processor: Any, preprocessing: Preprocessing, picture: np.ndarray) -> bool:
    from PIL import Image

    theirs = np.asarray(processor(Image.fromarray(picture), return_tensors="np")["pixel_values"])[0]
    pixels, _ = seen(Image.fromarray(picture), preprocessing)
    ours = ((pixels / 255 - preprocessing.mean) / preprocessing.std).transpose(2, 0, 1)
    return theirs.shape == ours.shape and bool(np.abs(theirs - ours).max() <= _SAME * np.abs(ours).max())
