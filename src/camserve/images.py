"""Reads images: checked before decoding, decoded to RGB, cut to what the network sees. Pillow, no torch.

Rule 1: Pillow gets a file only after `camserve.containers` has left out all that has no pixels and has counted scans.
Rule 2: whatever Pillow, numpy, struct and zlib raise on somebody's bytes leaves `_reading` as an error of camserve.
Rule 3: a decode has at most two pictures of Pillow in memory at once, 4 bytes for each pixel and picture.
"""

from __future__ import annotations

import hashlib
import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from camserve.containers import Container, take_apart
from camserve.errors import CamserveError, InvalidImage, Unavailable
from camserve.types import InputView, Preprocessing

ImageLike = str | Path | bytes | Image.Image | np.ndarray
"""Image as Python callers may pass it."""

ImageContent = bytes | Image.Image | np.ndarray
"""Image as a request holds it: an encoded file, a picture of this process, or pixels: uint8 (H, W, 3), or float32 (H,
W, 3) in [0, 1] of the network's input size."""

MAX_BYTES = 16 * 2**20
MAX_PIXELS = 64 * 10**6

DECODE_S_PER_PIXEL = 2 / 10**7
"""Seconds of processor time that decoding may take for each pixel. Photos take about a tenth of it."""

MIN_DECODE_S = 2.0
"""Seconds of processor time that every decode may take."""

_FEED_BYTES = 2**12  # between two looks at the clock: few enough that a decoder cannot make much of them
_STRIP_PIXELS = 2**18  # that are converted at once, so that steps on the way take little memory

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transpositions that make an image upright, by its EXIF orientation."""

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def probe(data: bytes, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Returns (height, width) from the file's header, before EXIF orientation; nothing is decompressed.

    Raises:
        InvalidImage: empty, not JPEG, PNG or WebP, or over a limit; the text names the limit and what came.
    """
    container = _container(data, max_bytes, max_pixels)
    _open(container)
    return container.size


def decode(data: bytes, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns the image as RGB, EXIF orientation applied; palette, grey and CMYK converted, alpha laid on white.

    Raises:
        InvalidImage: as `probe`; the file is truncated or broken; decoding it takes more processor time than
            `DECODE_S_PER_PIXEL` and `MIN_DECODE_S` allow.
        Unavailable: there is not enough memory for its pixels.
    """
    return _decode(_container(data, max_bytes, max_pixels))


def from_array(array: np.ndarray, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns a uint8 (H, W, 3) array as an image.

    Raises:
        InvalidImage: another dtype or shape, or over the pixel limit.
    """
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InvalidImage(f"an image array must be uint8 (height, width, 3), got {array.dtype} {array.shape}")
    _check_pixels(array.shape[0], array.shape[1], max_pixels)
    return Image.fromarray(np.ascontiguousarray(array))


def _container(data: bytes, max_bytes: int, max_pixels: int) -> Container:
    if not data:
        raise InvalidImage("the image has zero bytes")
    if len(data) > max_bytes:
        raise InvalidImage(f"an image may have at most {max_bytes} bytes, got {len(data)}")
    with _reading("image"):
        container = take_apart(data)
    _check_pixels(*container.size, max_pixels)
    return container


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise InvalidImage(f"an image may have at most {max_pixels} pixels, got {width} x {height} = {width * height}")


def _open(container: Container) -> ImageFile.ImageFile:
    """Returns what `take_apart` left of a file as a picture whose pixels are not loaded yet; that has its time."""
    height, width = container.size
    file = _Metered(container.content, max(MIN_DECODE_S, DECODE_S_PER_PIXEL * height * width))
    with _reading("image"):
        image = Image.open(file, formats=(container.format,))
        if (image.height, image.width) != container.size:
            raise ValueError("its header has two sizes")
    image.decodermaxblock = _FEED_BYTES
    return image


def _decode(container: Container) -> Image.Image:
    with _reading(container.format):
        return _upright(_pixels(container), container.orientation)


def _pixels(container: Container) -> Image.Image:
    """Returns the decoded pixels as RGB; the decoder is gone then, with what it held."""
    image = _open(container)
    image.load()
    rgb = _rgb(image)
    # A WebP picture would keep its decoder, which has two more pictures of the same size.
    return rgb.copy() if rgb is image and container.format == "WEBP" else rgb


class _Metered(io.BytesIO):
    """A file that ends a decode whose thread has used up its processor time; Pillow asks for more every few bytes.

    Pillow cannot be interrupted inside a call. Scans are counted before, so that what it makes of a few bytes is
    bounded; a WebP is decoded in one call, whose time is bounded by the number of pixels.
    """

    def __init__(self, content: bytes, limit_s: float) -> None:
        super().__init__(content)
        self._limit_s, self._end_s = limit_s, time.thread_time() + limit_s

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self._end_s:
            raise InvalidImage(f"decoding an image of this size may take at most {self._limit_s:g} s of processor time")
        return super().read(size)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Makes what is raised on somebody's bytes an InvalidImage, and a lack of memory, which is ours, Unavailable."""
    try:
        yield
    except CamserveError:
        raise
    except MemoryError:
        raise Unavailable("there is not enough memory to decode an image of this size") from None
    except UnidentifiedImageError:  # its text is of Python's objects
        raise InvalidImage(f"the {what} file is broken or truncated: its header cannot be read") from None
    except Exception as error:
        raise InvalidImage(f"the {what} file is broken or truncated: {str(error)[:100]}") from None


def _decoded(picture: Image.Image) -> Image.Image:
    """Returns a picture of this process as RGB, upright; Pillow reads what is behind the header only now.

    Raises:
        InvalidImage: that is broken or truncated.
    """
    with _reading(picture.format or "image"):
        picture.load()
        rgb = _upright(_rgb(picture), _orientation(picture))
        return rgb.copy() if rgb is picture else rgb


def _orientation(picture: Image.Image) -> int:
    """Returns the orientation that EXIF says; 1 where it cannot be read: odd EXIF does not cost the picture."""
    try:
        return int(picture.getexif().get(0x0112, 1))
    except Exception:
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _rgb(image: Image.Image) -> Image.Image:
    """Returns an image as RGB, made strip by strip; it is the same one if it is that already."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    rgb, rows = Image.new("RGB", image.size), max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        rgb.paste(_rgb_strip(image.crop(box)), box)
    return rgb


def _rgb_strip(strip: Image.Image) -> Image.Image:
    if strip.mode.startswith("I") or strip.mode == "F":  # 16-bit grey: Pillow would clip instead of scaling
        scaled = np.asarray(strip, dtype=np.float64) / 257
        return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if strip.has_transparency_data:
        rgba = strip.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return strip.convert("RGB")


def network_view(image: Image.Image, preprocessing: Preprocessing) -> tuple[Image.Image, InputView]:
    """Returns what the network sees of an RGB image, and where that lies in the image.

    The shorter side is resized and the centre cropped, equal to torchvision's Resize and CenterCrop on a PIL image
    (antialiased).

    Raises:
        InvalidImage: the image is so elongated that resizing its shorter side makes it larger than `MAX_PIXELS`.
    """
    height, width = preprocessing.crop_px
    short, goal = min(image.size), _shorter_px(preprocessing)
    check_elongation((image.height, image.width), goal)
    resized = (int(goal * image.width / short), int(goal * image.height / short))
    left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
    grown = image.resize(resized, _RESAMPLING[preprocessing.interpolation])
    scale_x, scale_y = image.width / resized[0], image.height / resized[1]
    crop = (left * scale_x, top * scale_y, (left + width) * scale_x, (top + height) * scale_y)
    view = InputView(original_size=(image.height, image.width), crop=crop, size=(height, width))
    return grown.crop((left, top, left + width, top + height)), view


def sent_view(content: ImageContent, preprocessing: Preprocessing) -> tuple[Image.Image, InputView]:
    """Returns what the network sees of what was sent, as `network_view`; a file is decoded only if it can be resized.

    Raises:
        InvalidImage: the file or the array is broken, or too elongated.
        Unavailable: there is not enough memory for its pixels.
    """
    if not isinstance(content, bytes):
        return network_view(picture(content), preprocessing)
    container = _container(content, sys.maxsize, sys.maxsize)  # limits are those of the door
    check_elongation(container.size, _shorter_px(preprocessing))
    return network_view(_decode(container), preprocessing)


def _shorter_px(preprocessing: Preprocessing) -> int:
    """Returns the length of the resized image's shorter side: at least the crop, so that nothing is padded."""
    return max(preprocessing.resize_px, *preprocessing.crop_px)


def check_elongation(size: tuple[int, int], shorter_px: int) -> None:
    """Checks that an image of (height, width) can be resized to a shorter side.

    Raises:
        InvalidImage: it is so elongated that resizing makes it larger than `MAX_PIXELS`.
    """
    if shorter_px * (shorter_px * max(size) // min(size)) > MAX_PIXELS:
        raise InvalidImage(f"an image of {size[1]} x {size[0]} is too elongated to be resized")


def whole_view(size: tuple[int, int]) -> InputView:
    """Returns the view of an image that is the network's input without resizing or cropping."""
    height, width = size
    return InputView(original_size=size, crop=(0.0, 0.0, float(width), float(height)), size=size)


def seen_part(image: Image.Image, view: InputView) -> Image.Image:
    """Returns the part of the sent image that the network saw, resized (bicubic) to the network's input size."""
    height, width = view.size
    if (image.height, image.width) == view.size == view.original_size:
        return image
    left, top, right, bottom = view.crop
    # Edges that travelled as float32 may lie a hair beyond the image.
    inside = (max(left, 0.0), max(top, 0.0), min(right, float(image.width)), min(bottom, float(image.height)))
    return image.resize((width, height), Image.Resampling.BICUBIC, box=inside)


def checked_size(image: Image.Image | np.ndarray, max_bytes: int, max_pixels: int) -> tuple[int, int]:
    """Returns (height, width) of a picture or of an array of pixels.

    Raises:
        InvalidImage: the array has another dtype or shape, or it is larger than allowed.
    """
    if isinstance(image, np.ndarray):
        if image.dtype not in (np.uint8, np.float32) or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise InvalidImage(
                f"an image array must be uint8 or float32 (height, width, 3), got {image.dtype} {list(image.shape)}"
            )
        if image.nbytes > max_bytes:
            raise InvalidImage(f"an image may have at most {max_bytes} bytes, got {image.nbytes}")
        height, width = image.shape[:2]
    else:
        height, width = image.height, image.width
    _check_pixels(height, width, max_pixels)
    return height, width


def read_image(image: ImageLike) -> ImageContent:
    """Returns the content of what callers have; a path is read.

    Raises:
        InvalidImage: the file cannot be read.
    """
    if isinstance(image, (bytes, np.ndarray, Image.Image)):
        return image
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise InvalidImage(f"cannot read {image}: {error.strerror}") from None


def digest(image: ImageContent) -> bytes:
    """Returns 16 bytes that name an image by its content; a picture is named by what is seen of it.

    Raises:
        InvalidImage: the file behind a picture is broken.
    """
    if isinstance(image, Image.Image):
        # The picture's bytes alone would say nothing of palette, alpha and orientation.
        image = np.asarray(_decoded(image))
    found = hashlib.blake2b(digest_size=16)
    if isinstance(image, np.ndarray):
        found.update(f"{image.dtype.str} {image.shape}".encode())
    found.update(image if isinstance(image, bytes) else np.ascontiguousarray(image).data)
    return found.digest()


def size_bytes(image: ImageContent) -> int:
    """Returns how many bytes an image takes in a message."""
    if isinstance(image, bytes):
        return len(image)
    return image.nbytes if isinstance(image, np.ndarray) else image.width * image.height * len(image.getbands())


def png(image: Image.Image) -> bytes:
    """Returns a picture as a PNG file, upright.

    Raises:
        InvalidImage: the file behind the picture is broken.
    """
    with _reading(image.format or "image"):
        image.load()
        upright = _upright(image, _orientation(image))
        if upright.mode not in _PNG_MODES:
            upright = upright.convert("I;16" if upright.mode.startswith("I") else "RGB")  # 16-bit grey stays that
    file = io.BytesIO()
    upright.save(file, "PNG", compress_level=1)  # three times as fast as the default, a tenth larger
    return file.getvalue()


def picture(content: ImageContent, max_bytes: int = sys.maxsize, max_pixels: int = sys.maxsize) -> Image.Image:
    """Returns what was sent as RGB, upright, for people and networks to look at.

    Raises:
        InvalidImage: the file or the array is broken, or larger than allowed.
    """
    if isinstance(content, bytes):
        return decode(content, max_bytes, max_pixels)
    if isinstance(content, Image.Image):
        return _decoded(content)
    if content.dtype != np.uint8:
        content = (content.clip(0, 1) * 255).round().astype(np.uint8)
    return from_array(content, max_pixels)
