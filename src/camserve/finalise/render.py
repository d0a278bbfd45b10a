"""Draws pictures of maps: overlays and contact sheets. Pillow does the work: memory stays near the picture's own size.

The rows of `colormaps.png` are `camserve.types.COLORMAPS` and `DIVERGING`, 256 colours each, as matplotlib has them;
`python tests/unit/test_finalise_render.py` rebuilds the file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from camserve import images
from camserve.errors import InvalidOption
from camserve.images import ImageContent, seen_part
from camserve.types import COLORMAPS, Edges, InputView, MapSize, SaliencyMap, check_overlay

DIVERGING = "coolwarm"
"""Colours of signed maps: blue for what speaks against the target, red for what speaks for it."""


def overlay(
    image: Image.Image,
    array: np.ndarray,
    *,
    colormap: str = "jet",
    opacity: float = 0.5,
    signed: bool = False,
    frame: Edges | None = None,
) -> Image.Image:
    """Returns the map in colours over the image: (1 - opacity) * image + opacity * colour, RGB of the image's size.

    Args:
        image: image that the map is laid on.
        array: map, (height, width) in [0, 1]; resized (bilinear) if it has another size than the image.
        colormap: one of `COLORMAPS`; a signed map has the colours of `DIVERGING`.
        opacity: weight of the colours against the image, in 0..1.
        signed: whether the map is in [-1, 1].
        frame: edges of what the map is of, in pixels of the image; they are drawn over both.

    Raises:
        InvalidOption: unknown colormap, or opacity out of range.
    """
    check_overlay(colormap, opacity)
    levels = Image.fromarray(grey_levels(array, signed))
    if levels.size != image.size:
        levels = levels.resize(image.size, Image.Resampling.BILINEAR)
    levels.putpalette(_palettes()[DIVERGING if signed else colormap])
    picture = Image.blend(image.convert("RGB"), levels.convert("RGB"), opacity)
    if frame is not None:
        _draw_frame(picture, frame)
    return picture


def _draw_frame(picture: Image.Image, frame: Edges) -> None:
    """Draws a white line between two black ones, which is seen on every colour."""
    x0, y0, x1, y1 = (round(edge) for edge in frame)
    draw, line_px = ImageDraw.Draw(picture), max(1, min(picture.size) // 150)
    for width_px, inset_px, colour in ((3 * line_px, line_px, "black"), (line_px, 0, "white")):
        low_x, low_y, high_x, high_y = x0 - inset_px, y0 - inset_px, x1 - 1 + inset_px, y1 - 1 + inset_px
        if low_x < high_x and low_y < high_y:
            draw.rectangle((low_x, low_y, high_x, high_y), outline=colour, width=width_px)


def drawn(saliency: SaliencyMap, colormap: str, opacity: float) -> Image.Image:
    """Returns a map in colours over the image that it lies on, with a frame around the detection or box explained.

    Raises:
        InvalidOption: unknown colormap, opacity out of range, or a map that lies on no image.
    """
    if saliency.image is None:
        raise InvalidOption("this map has no image to lie on: ask for size input or original")
    beneath, box = saliency.lies_on, saliency.target.box
    frame = beneath.placed(box) if isinstance(beneath, Background) and box is not None else None
    options: dict[str, Any] = {"colormap": colormap, "opacity": opacity, "signed": saliency.signed}
    return overlay(saliency.image, saliency.array, **options, frame=frame)


def grey_levels(array: np.ndarray, signed: bool = False) -> np.ndarray:
    """Returns round(255 * map) as uint8; round(127.5 * (map + 1)) of a signed map, whose 0 is 128."""
    array = (array + np.float32(1)) / 2 if signed else array
    return np.asarray((array.astype(np.float32, copy=False) * np.float32(255)).round().astype(np.uint8))


def background(image: Image.Image, view: InputView, size: MapSize) -> Image.Image | None:
    """Returns the image that a map of a size is laid on.

    Args:
        image: the sent image as RGB, EXIF orientation applied.
        view: the part that the network saw.
        size: size of the map.

    Returns:
        For "original" the image itself, for "input" the view resized (bicubic) to the network's input size, for "layer"
        None.
    """
    if size == "layer":
        return None
    if size == "original":
        return image
    return seen_part(image, view)


@dataclass(frozen=True)
class Background:
    """Makes the image that the maps of one answer lie on, once it is asked for.

    Args:
        content: what was sent, and was decoded before: its bounds were checked there.
        view: the part that the network saw.
        size: size of the maps, "input" or "original".
    """

    content: ImageContent
    view: InputView
    size: MapSize

    def __call__(self) -> Image.Image:
        """Returns the image; raises InvalidImage where what was sent is broken."""
        return self._made

    def placed(self, box: Edges) -> Edges:
        """Returns edges in pixels of the sent image in those of the image that maps lie on."""
        return box if self.size == "original" else self.view.seen(box)

    @cached_property
    def _made(self) -> Image.Image:
        found = background(images.picture(self.content), self.view, self.size)
        assert found is not None, "a map of size layer lies on no image"
        return found


def lies_on(content: ImageContent, view: InputView, size: MapSize) -> Background | None:
    """Returns what makes the image that maps of a size lie on; None for the size "layer", which lie on none.

    What the caller may write into is kept as it is now: pixels are copied, and a picture is looked at; a file can wait.
    """
    if size == "layer":
        return None
    found = Background(content.copy() if isinstance(content, np.ndarray) else content, view, size)
    if isinstance(content, Image.Image):
        found()
    return found


@lru_cache(maxsize=1)
def _palettes() -> dict[str, bytes]:
    data = resources.files("camserve.finalise").joinpath("colormaps.png").read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        rows = np.asarray(image.convert("RGB"))
    return {name: row.tobytes() for name, row in zip((*COLORMAPS, DIVERGING), rows, strict=True)}


_NAME_CHARACTERS = 100
"""Number of characters of what a picture is named by; file systems have a bound."""


def file_stem(photo: str, saliency: SaliencyMap) -> str:
    """Returns the name of a map's picture, `chelsea-grad_cam-tiger-cat`; without a label the class index stands in.

    The map of another target than a class is named by its text: `chelsea-grad_cam-against-tiger-cat`.
    """
    label, text = saliency.target.label, saliency.target_text
    named = label if text in ("", label, str(saliency.target.index)) else text
    label = re.sub(r"[^a-z0-9]+", "-", named.lower())[:_NAME_CHARACTERS].strip("-")
    return f"{photo}-{saliency.method.name}-{label or saliency.target.index}"


@dataclass(frozen=True)
class Row:
    """Holds one row of a contact sheet."""

    caption: str
    """Text above the row."""
    images: tuple[Image.Image, ...]
    """One image for each column; the first is usually the photo itself."""


def sheet(titles: Sequence[str], rows: Sequence[Row], *, cell_px: int = 280, gap_px: int = 12) -> Image.Image:
    """Returns images side by side on white, the columns' titles on top and a caption above each row.

    Args:
        titles: titles of the columns.
        rows: rows, each with one image for each title.
        cell_px: width and height of a cell; images are fitted into it, proportions kept.
        gap_px: width of the gap between cells and around everything.

    Raises:
        ValueError: a row has more or fewer images than there are titles.
    """
    large, small = ImageFont.load_default(size=cell_px / 13), ImageFont.load_default(size=cell_px / 16)
    title_px, caption_px = _line_px(large), _line_px(small)
    row_px = caption_px + cell_px + gap_px
    picture = Image.new(
        "RGB", (gap_px + len(titles) * (cell_px + gap_px), gap_px + title_px + len(rows) * row_px), "white"
    )
    draw = ImageDraw.Draw(picture)
    lefts = [gap_px + column * (cell_px + gap_px) for column in range(len(titles))]
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left + cell_px / 2, gap_px), title, fill="black", font=large, anchor="ma")
    for number, row in enumerate(rows):
        top = gap_px + title_px + number * row_px
        draw.text((gap_px, top), row.caption, fill=(70, 70, 70), font=small)
        for left, image in zip(lefts, row.images, strict=True):
            _paste(picture, image, left, top + caption_px, cell_px)
    return picture


def _line_px(font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> int:
    """Returns the height of a line of text with some air below."""
    return round(1.4 * font.getbbox("Hg")[3])


def _paste(picture: Image.Image, image: Image.Image, left: int, top: int, cell_px: int) -> None:
    """Pastes an image into a cell of the picture, fitted and centred."""
    scale = cell_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    fitted = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    picture.paste(fitted, (left + (cell_px - size[0]) // 2, top + (cell_px - size[1]) // 2))
