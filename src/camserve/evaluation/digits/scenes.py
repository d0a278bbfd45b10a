"""Composes scenes of handwritten digits over brick, grass and gravel, each the same whenever and wherever it is made.

The digits are scikit-learn's (8 x 8, real handwriting, UCI Optical Recognition of Handwritten Digits), the textures
scikit-image's photos. Every fifth digit is held out: what is trained on never appears in a test scene. Needs
scikit-learn and scikit-image (`camserve[evaluation]`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from camserve.evaluation.truth import TrueBox

SIZE_PX = 96
"""Size of a scene in both directions."""
DIGIT_PX = (28, 40)
"""Smallest and largest side of the square that a digit is enlarged to."""
INK = 0.25
"""A pixel belongs to the digit if its ink covers at least this share of it."""
BACKGROUND = 10
"""Owner of the pixels that are of no digit."""
TEXTURES = ("brick", "grass", "gravel")

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Scene:
    """Holds a picture of digits with a box around each."""

    pixels: np.ndarray
    """Pixels of the scene, uint8 (SIZE_PX, SIZE_PX, 3)."""
    boxes: tuple[TrueBox, ...]
    """Boxes of the digits; the label is the digit. Each is of a different class, but for copies."""
    owners: np.ndarray
    """Owner of each pixel, uint8 (SIZE_PX, SIZE_PX): the digit, or `BACKGROUND`."""


@dataclass(frozen=True)
class Content:
    """Says what is in a scene beside how many digits there are."""

    sides_px: tuple[int, int] = DIGIT_PX
    """Smallest and largest side of the square that a digit, or a blot, is enlarged to."""
    apart_px: int = 0
    """Least difference between the sides of any two squares of one scene."""
    blots: int = 0
    """Number of blots: spots of ink that are no digits and have no box."""
    present: int | None = None
    """A digit that is one of those in the scene; None: whichever are drawn."""
    copies: int = 1
    """Number of times that the digit `present` is in the scene."""
    absent: int | None = None
    """A digit that is not in the scene; None: whichever are drawn."""


PLAIN = Content()


def make_scene(seed: int, index: int, digits: int, split: Split, content: Content = PLAIN) -> Scene:
    """Returns scene `index` of a series.

    Args:
        seed: of the series.
        index: of the scene; the same scene whichever others are made.
        digits: how many digits, of different classes, at locations that do not overlap; 1..3.
        split: which handwriting: that for training, or that held out.
        content: what else there is to say.
    """
    rng = np.random.default_rng([seed, index, digits, split == "test"])
    images, classes = handwriting(split)
    picture, owners = _background(rng), np.full((SIZE_PX, SIZE_PX), BACKGROUND, np.uint8)
    boxes = []
    chosen = _chosen(rng, digits, content)
    squares = _squares(rng, digits + content.blots, content)
    for digit, (left, top, side) in zip(chosen, squares, strict=False):  # the squares left over are the blots'
        ink = _ink(images[rng.choice(np.flatnonzero(classes == digit))], side)
        _write(picture, ink, left, top, rng)
        boxes.append(_box(str(digit), ink, left, top))
        owners[top : top + side, left : left + side][ink >= INK] = digit
    for left, top, side in squares[digits:]:
        _write(picture, _blot(rng, side), left, top, rng)
    return Scene(picture.round().astype(np.uint8), tuple(boxes), owners)


def benchmark_scenes(count: int, seed: int = 2) -> Sequence[Scene]:
    """Returns the benchmark: held-out digits, two in most scenes and three in every third."""
    return [make_scene(seed, index, 3 if index % 3 == 2 else 2, "test") for index in range(count)]


@lru_cache(maxsize=2)
def handwriting(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (n, 8, 8) uint8 images of one split and their (n,) classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    held_out = np.arange(len(bunch.target)) % 5 == 0
    part = held_out if split == "test" else ~held_out
    return (bunch.images[part] * (255 / 16)).round().astype(np.uint8), bunch.target[part]


@lru_cache(maxsize=1)
def _textures() -> tuple[np.ndarray, ...]:
    from skimage import data

    return tuple(np.asarray(getattr(data, name)()) for name in TEXTURES)


def _background(rng: np.random.Generator) -> np.ndarray:
    """Returns a tinted, darkened cut-out of a texture, float64 (SIZE_PX, SIZE_PX, 3)."""
    texture = _textures()[rng.integers(len(TEXTURES))]
    top, left = rng.integers(0, np.array(texture.shape) - SIZE_PX)
    cut = texture[top : top + SIZE_PX, left : left + SIZE_PX, None].astype(np.float64)
    tinted: np.ndarray = cut * rng.uniform(0.7, 1, 3) * rng.uniform(0.4, 0.8)
    return tinted


def _chosen(rng: np.random.Generator, count: int, content: Content) -> np.ndarray:
    """Returns the classes of the digits, (count,)."""
    if content.present is None and content.absent is None:
        return rng.choice(10, count, replace=False)
    others = [digit for digit in range(10) if digit not in (content.present, content.absent)]
    given = [] if content.present is None else [content.present] * content.copies
    return np.array([*given, *rng.choice(others, count - len(given), replace=False)])


def _squares(rng: np.random.Generator, count: int, content: Content) -> list[tuple[int, int, int]]:
    """Returns (left, top, side) of squares in the scene that do not overlap; they are drawn together until they fit."""
    while True:
        sides = rng.integers(content.sides_px[0], content.sides_px[1] + 1, count)
        if content.apart_px and (np.diff(np.sort(sides)) < content.apart_px).any():
            continue
        corners = rng.integers(0, SIZE_PX - sides[:, None] + 1, (count, 2))
        squares = [(int(left), int(top), int(side)) for (left, top), side in zip(corners, sides, strict=True)]
        if not any(_overlap(a, b) for number, a in enumerate(squares) for b in squares[:number]):
            return squares


def _overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    return all(a[axis] < b[axis] + b[2] and b[axis] < a[axis] + a[2] for axis in (0, 1))


def _write(picture: np.ndarray, ink: np.ndarray, left: int, top: int, rng: np.random.Generator) -> None:
    """Draws ink (side, side) over a part of the picture, in a bright colour."""
    part = picture[top : top + len(ink), left : left + len(ink)]
    part += ink[..., None] * (rng.uniform(180, 255, 3) - part)


def _blot(rng: np.random.Generator, side: int) -> np.ndarray:
    """Returns a spot of ink without strokes, (side, side), in [0, 1]."""
    coarse = np.zeros((6, 6), np.uint8)
    coarse[1:-1, 1:-1] = rng.integers(0, 256, (4, 4))
    return _ink(coarse, side)


def _ink(image: np.ndarray, side: int) -> np.ndarray:
    """Returns a digit enlarged to (side, side), in [0, 1]."""
    enlarged = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(enlarged, np.float64) / 255


def _box(label: str, ink: np.ndarray, left: int, top: int) -> TrueBox:
    """Returns the box that lies tightly around the ink."""
    rows, columns = np.nonzero(ink >= INK)
    return TrueBox(
        label,
        left=float(left + columns.min()),
        top=float(top + rows.min()),
        right=float(left + columns.max() + 1),
        bottom=float(top + rows.max() + 1),
    )
