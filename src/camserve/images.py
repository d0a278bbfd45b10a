"""Reads images: checked before decoding, decoded to RGB or grey, cut to what the network sees. Pillow, no torch.

Rule 1: Pillow gets a file only after `camserve.containers` has left out all that has no pixels and has counted scans.
Rule 2: whatever Pillow, numpy, struct and zlib raise on somebody's bytes leaves `_reading` as an error of camserve.
Rule 3: a decode has at most two pictures of Pillow in memory at once, 4 bytes for each pixel and picture.

A picture of this process may have any of Pillow's modes. What they mean is said once, by `_plain`: `1`, `L`, `LA`, `P`,
`RGB` and `RGBA` mean what they say, `I;16` is grey of 0..65535; so is `I`, and `F` is grey of 0..255, both refused
where a pixel lies beyond, and `F` also where no pixel is above 1, unless all are 0. All other modes are colours.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from camserve.containers import Container, take_apart
from camserve.errors import CamserveError, InvalidImage, Unavailable
from camserve.types import InputView, Preprocessing

ImageLike = str | Path | bytes | Image.Image | np.ndarray
"""Image as Python callers may pass it."""

ImageContent = bytes | Image.Image | np.ndarray
"""Image as a request holds it: an encoded file, a picture of this process, or pixels: uint8 (H, W, 3) or, grey,
(H, W, 1) or (H, W); or float32 in [0, 1] of the network's input size: (H, W, C) of C channels or, grey, as those."""

MAX_BYTES = 16 * 2**20
MAX_PIXELS = 64 * 10**6

DECODE_S_PER_PIXEL = 2 / 10**7
"""Seconds of processor time that decoding may take for each pixel. Photos take about a tenth of it."""

MIN_DECODE_S = 2.0
"""Seconds of processor time that every decode may take."""

LARGE_PIXELS = 4 * 2**20
"""Pixels from which on a JPEG may be decoded at a reduced size; smaller ones take a few milliseconds anyway."""

KEPT_REDUCTION = 4
"""Least size of a JPEG decoded at a reduced size, in multiples of the image that it is resized to.

Then pixels of photos differ by at most 2 of 255 levels from those of the whole file, and of noise, stripes and text by
at most 8; where twice as large were enough, by 5 and by 22. Two JPEG decoders differ by 1 or 2."""

_FEED_BYTES = 2**12  # between two looks at the clock: few enough that a decoder cannot make much of them
_STRIP_PIXELS = 2**18  # that are converted at once, so that steps on the way take little memory

_PLAIN = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}
"""Modes with alpha, and those that they are converted to."""
_MASK_MODES = ("1", "L", "I;16")
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

_MAX_WEBP_PX = 2**14 - 1  # of a side, as the format has it
_MOST_16 = 65535

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
_FIRST_TURNED = 5  # orientations from here on have height and width changed over
_RIGHT_TO_LEFT, _BOTTOM_TO_TOP = {2, 3, 6, 7}, {3, 4, 7, 8}  # those whose stored first pixel is at the right, below
_SCALES = (1, 2, 4, 8)

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

_STARTS: Mapping[str, Callable[[float], int]] = {"even": round, "down": int}
"""Function that rounds the start of a centre crop, which is not below 0."""


def silence_libtiff() -> None:
    """Has libtiff, Pillow's decoder of compressed TIFF, write nothing to stderr; what it says is raised all the same.

    By default it writes a line for each broken file, past the log and its queue. The switch is libtiff's own
    (`TIFFSetErrorHandler` of NULL) and holds for the whole process, so servers set it and a library does not. Nothing
    happens where Pillow has no libtiff, or one whose functions cannot be found.
    """
    pillow = find_spec("PIL._imaging")
    if pillow is None or pillow.origin is None:
        return
    # Functions are looked for in what it is linked with, too.
    switch = getattr(ctypes.CDLL(pillow.origin), "TIFFSetErrorHandler", None)
    if switch is not None:
        switch.argtypes, switch.restype = [ctypes.c_void_p], ctypes.c_void_p
        switch(None)


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
    return _decode(_container(data, max_bytes, max_pixels), _rgb)


def mask_size(data: bytes, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Returns (height, width) of a mask, after EXIF orientation, from its file's header.

    Raises:
        InvalidImage: it is no grey PNG file, or over a limit; the text says what came.
    """
    container = _container(data, max_bytes, max_pixels)
    mode = _open(container).mode
    if container.format != "PNG" or mode not in _MASK_MODES:
        raise InvalidImage(f"a mask is a grey PNG file without alpha, got {container.format} of mode {mode}")
    return container.size if container.orientation < _FIRST_TURNED else container.size[::-1]


def read_mask(data: bytes) -> np.ndarray:
    """Returns the values of a mask, (H, W) uint8 or uint16; 0 is outside. The caller has looked at its `mask_size`.

    Raises:
        InvalidImage: the file is broken, or takes too long to decode.
        Unavailable: there is not enough memory for its pixels.
    """
    container = _container(data, sys.maxsize, sys.maxsize)
    return np.array(_decode(container, lambda image: image.convert("L") if image.mode == "1" else image))


def mask_file(mask: ImageLike) -> bytes:
    """Returns a mask of a Python caller as a grey PNG file; a file is not looked into.

    Args:
        mask: a path, a picture that is converted to grey, or an array (H, W), bool, uint8, uint16 or floats in [0, 1].

    Raises:
        InvalidImage: the file cannot be read, or it is nothing that can be a mask.
    """
    if isinstance(mask, np.ndarray):
        floats = mask.dtype.kind == "f"
        if mask.ndim != 2 or not mask.size or not (floats or mask.dtype in (np.bool_, np.uint8, np.uint16)):
            raise InvalidImage(f"a mask is (height, width), bool, uint8 or floats, got {mask.dtype} {list(mask.shape)}")
        if floats and not (mask.min() >= 0 and mask.max() <= 1):  # in this way NaN is refused, too
            raise InvalidImage(f"a mask of floats is in [0, 1], got {mask.min():g}..{mask.max():g}")
        if floats or mask.dtype == np.bool_:
            mask = (mask * np.float64(_MOST_16 if floats else 255)).round().astype(np.uint16 if floats else np.uint8)
        return png(Image.fromarray(np.ascontiguousarray(mask)))
    content = read_image(mask)
    return content if isinstance(content, bytes) else png(_decoded(content, _grey))  # type: ignore[arg-type]


def from_array(array: np.ndarray, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns a uint8 (H, W, 3) array as an image, RGB; one of (H, W, 1) as a grey one, L.

    Raises:
        InvalidImage: another dtype or shape, or over the pixel limit.
    """
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise InvalidImage(f"an image array must be uint8 (height, width, 3), got {array.dtype} {array.shape}")
    _check_pixels(array.shape[0], array.shape[1], max_pixels)
    return Image.fromarray(np.ascontiguousarray(array if array.shape[2] == 3 else array[..., 0]))


def _container(data: bytes, max_bytes: int, max_pixels: int) -> Container:
    if not data:
        raise InvalidImage("the image has zero bytes")
    if len(data) > max_bytes:
        raise InvalidImage(f"an image may have at most {max_bytes} bytes, got {len(data)}")
    with _reading("image"):
        container = take_apart(data)
    if 0 in container.size:
        raise InvalidImage(f"an image has pixels, this file's size is {container.size[1]} x {container.size[0]}")
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


def _decode(container: Container, converted: Callable[[Image.Image], Image.Image], scale: int = 1) -> Image.Image:
    """Returns the upright picture; of a JPEG file with 1/`scale` of its pixels in each direction, rounded up."""
    with _reading(container.format):
        return _upright(_loaded(container, converted, scale), container.orientation)


def _loaded(container: Container, converted: Callable[[Image.Image], Image.Image], scale: int) -> Image.Image:
    """Returns the decoded and converted pixels; the decoder is gone then, with what it held."""
    image: Image.Image = _open(container)
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    image.load()
    if container.inverted:
        image = _plain(image)
        for box in _strips(image):  # in place: a second picture would be one too many
            image.paste(Image.fromarray(~np.asarray(image.crop(box))), box)
    if container.halved:
        image = _strip_by_strip(image, "I;16", _joined_strip)
    made = converted(image)
    # A WebP picture would keep its decoder, which has two more pictures of the same size.
    return made.copy() if made is image and container.format == "WEBP" else made


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


def _decoded(picture: Image.Image, converted: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Returns a picture of this process, converted and upright; Pillow reads what is behind the header only now.

    Raises:
        InvalidImage: that is broken or truncated, or a pixel lies beyond the range of its mode.
    """
    with _reading(picture.format or "image"):
        picture.load()
        made = _upright(converted(picture), _orientation(picture))
        return made.copy() if made is picture else made


def _orientation(picture: Image.Image) -> int:
    """Returns the orientation that EXIF says; 1 where it cannot be read: odd EXIF does not cost the picture."""
    try:
        return int(picture.getexif().get(0x0112, 1))
    except Exception:
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _plain(image: Image.Image) -> Image.Image:
    """Returns an image in a mode that a PNG file can have; it is the same one if it is that already.

    Raises:
        InvalidImage: a pixel of mode I or F lies beyond its range.
    """
    if image.mode in _PNG_MODES:
        return image
    if _is_16_bit(image):
        if image.mode == "F" and _is_perhaps_dark(np.asarray(image)):
            raise _beyond("F", np.asarray(image), 255)
        return _strip_by_strip(image, "I;16", _grey_16_strip)
    return image.convert(_PLAIN.get(image.mode, "RGB"))


def _grey_16_strip(strip: Image.Image) -> Image.Image:
    """Returns grey of any dtype as I;16. For F the scale is Pillow's own, in which 255 is white."""
    values, most = np.asarray(strip), 255 if strip.mode == "F" else _MOST_16
    if not (values.min() >= 0 and values.max() <= most):  # in this way NaN is refused, too
        raise _beyond(strip.mode, values, most)
    levels = (values * np.float64(_MOST_16 / most)).round() if strip.mode == "F" else values
    return Image.fromarray(levels.astype(np.uint16))  # Pillow's own way from I;16B swaps bytes


def _joined_strip(strip: Image.Image) -> Image.Image:
    """Returns grey with alpha, 16 bits each, laid on white as I;16, of RGBA that has the bytes of both."""
    grey, alpha = np.moveaxis(np.asarray(strip).copy().view(">u2").astype(np.float64), -1, 0)
    on_white = grey * (alpha / _MOST_16) + (_MOST_16 - alpha)
    return Image.fromarray(on_white.round().astype(np.uint16))


def _is_perhaps_dark(values: np.ndarray) -> bool:
    """Tells whether pixels are nearly black if white is 255, and then were perhaps meant to be in [0, 1]."""
    return bool(0 < values.max() <= 1)


def _beyond(mode: str, values: np.ndarray, most: int) -> InvalidImage:
    return InvalidImage(f"pixels of mode {mode} must be 0..{most}, got {values.min():g}..{values.max():g}: scale them")


def _is_16_bit(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _grey(image: Image.Image) -> Image.Image:
    """Returns an image as grey, of 16 bits (I;16) where it has them, else of 8 (L); the same one if it is that already.

    Colours become ITU-R 601 luma, as Pillow has it; alpha is laid on white.
    """
    if _is_16_bit(image):
        return _grey_16(image)
    if image.mode == "L" and not image.has_transparency_data:
        return image
    return _strip_by_strip(image, "L", lambda strip: _rgb_strip(strip).convert("L"))


def _grey_16(image: Image.Image) -> Image.Image:
    """Returns grey of 16 bits as I;16; the level that a PNG file says to be transparent becomes white."""
    clear = image.info.get("transparency")
    if image.mode != "I;16" or not isinstance(clear, int):
        return _plain(image)

    def on_white(strip: Image.Image) -> Image.Image:
        levels = np.array(strip)
        levels[levels == clear] = _MOST_16
        return Image.fromarray(levels)

    return _strip_by_strip(image, "I;16", on_white)


def _rgb(image: Image.Image) -> Image.Image:
    """Returns an image as RGB, made strip by strip; it is the same one if it is that already."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    return _strip_by_strip(image, "RGB", _rgb_strip)


def _strip_by_strip(image: Image.Image, mode: str, converted: Callable[[Image.Image], Image.Image]) -> Image.Image:
    made = Image.new(mode, image.size)
    for box in _strips(image):
        made.paste(converted(image.crop(box)), box)
    return made


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


def _rgb_strip(strip: Image.Image) -> Image.Image:
    if _is_16_bit(strip):  # Pillow would clip instead of scaling
        scaled = np.asarray(_grey_16(strip), dtype=np.float64) / 257
        return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
    strip = _plain(strip)
    if strip.has_transparency_data:
        rgba = strip.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return strip.convert("RGB")


def network_view(image: Image.Image, preprocessing: Preprocessing) -> tuple[Image.Image, InputView]:
    """Returns what the network sees of an upright image of mode RGB, L or I;16, and where that lies in the image.

    The shorter side is resized and the centre cropped, equal to torchvision's Resize and CenterCrop on a PIL image
    (antialiased). Where that leaves less than the crop, which torchvision pads, the image is resized to just cover it.
    Where the preprocessing has a size for both sides, the image is stretched to it, as torchvision's Resize does.

    Raises:
        InvalidImage: the image is so elongated that resizing its shorter side makes it larger than `MAX_PIXELS`.
    """
    return _view_of(image, (image.height, image.width), None, preprocessing)


def _view_of(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None,
    preprocessing: Preprocessing,
) -> tuple[Image.Image, InputView]:
    """Returns `network_view` of an image of (height, width), which a box of a reduced picture of it holds; None: all.

    The view is that of the image itself, and so is the place of the crop.
    """
    height, width = preprocessing.crop_px
    tall, wide = _resized(size, preprocessing)
    start = _STARTS[preprocessing.crop_start]
    left, top = start((wide - width) / 2), start((tall - height) / 2)
    grown = image.resize((wide, tall), _RESAMPLING[preprocessing.interpolation], box)
    scale_x, scale_y = size[1] / wide, size[0] / tall
    crop = (left * scale_x, top * scale_y, (left + width) * scale_x, (top + height) * scale_y)
    view = InputView(original_size=size, crop=crop, size=(height, width))
    return grown.crop((left, top, left + width, top + height)), view


def _reduction(container: Container, preprocessing: Preprocessing) -> int:
    """Returns the scale, 1, 2, 4 or 8, at which a file can be decoded with hardly a difference for the network.

    A JPEG decoder can make a picture of 1/2, 1/4 or 1/8 of the size from the low frequencies of each block alone. Where
    that is still at least `KEPT_REDUCTION` times as large as the resized image, what was left out would have been
    averaged away.

    Raises:
        InvalidImage: as `network_view`.
    """
    (height, width), (tall, wide) = _upright_size(container), _resized(_upright_size(container), preprocessing)
    large = container.format == "JPEG" and height * width >= LARGE_PIXELS
    if not large or preprocessing.interpolation == "nearest":  # which takes single pixels
        return 1
    shrinks = min(height / tall, width / wide)
    return max(scale for scale in _SCALES if scale == 1 or shrinks >= KEPT_REDUCTION * scale)


def _reduced_view(
    container: Container, converted: Callable[[Image.Image], Image.Image], scale: int, preprocessing: Preprocessing
) -> tuple[Image.Image, InputView]:
    """Returns `network_view` of a file that is decoded with 1/`scale` of its pixels in each direction."""
    image = _decode(container, converted, scale)
    size = _upright_size(container)
    wide, tall = size[1] / scale, size[0] / scale
    # The last row and column of the stored picture lie partly beyond the image; turning may have made them the first.
    left = image.width - wide if container.orientation in _RIGHT_TO_LEFT else 0.0
    top = image.height - tall if container.orientation in _BOTTOM_TO_TOP else 0.0
    return _view_of(image, size, (left, top, left + wide, top + tall), preprocessing)


def _upright_size(container: Container) -> tuple[int, int]:
    return container.size if container.orientation < _FIRST_TURNED else container.size[::-1]


def sent_view(content: ImageContent, preprocessing: Preprocessing, whole: bool = True) -> tuple[Image.Image, InputView]:
    """Returns what the network sees of what was sent, as `network_view`; a file is decoded only if it can be resized.

    Args:
        content: what was sent.
        preprocessing: how it becomes the network's input.
        whole: whether every file is decoded in full; else a large JPEG is decoded at a reduced size: see
            `KEPT_REDUCTION`.

    Returns:
        For a network of 3 channels an RGB picture, for one of 1 channel a grey one: I;16 where a 16-bit one was sent,
        else L.

    Raises:
        InvalidImage: the file or the array is broken, or too elongated; the network has another number of channels.
        Unavailable: there is not enough memory for its pixels.
    """
    check_takes_files(preprocessing.crop_px, preprocessing.channels)
    converted = _rgb if preprocessing.channels == 3 else _grey
    if isinstance(content, bytes):
        container = _container(content, sys.maxsize, sys.maxsize)  # limits are those of the door
        scale = _reduction(container, preprocessing)  # before any pixel is decoded: it may be too elongated
        if scale > 1 and not whole:
            return _reduced_view(container, converted, scale, preprocessing)
        image = _decode(container, converted)
    else:
        image = _decoded(content, converted) if isinstance(content, Image.Image) else converted(from_array(content))
    return network_view(image, preprocessing)


def seen(content: ImageContent, preprocessing: Preprocessing, whole: bool = True) -> tuple[np.ndarray, InputView]:
    """Returns the pixels that the network sees, and where they lie in what was sent.

    An array of the network's own input size and channels is taken as it is; everything else is resized and cropped, as
    `sent_view` says.

    Returns:
        (H, W, C), uint8, or float32 in [0, 1] of a float32 array or of 16-bit grey; and the view.

    Raises:
        InvalidImage, Unavailable: as `sent_view`; an array has another dtype, size or number of channels.
    """
    if isinstance(content, np.ndarray):
        check_array(content, preprocessing.crop_px, preprocessing.channels)
        content = content if content.ndim == 3 else content[..., None]
        size, channels = preprocessing.crop_px, preprocessing.channels
        if content.shape in ((*size, channels), (*size, 1)):  # grey is all channels of RGB, as that of a file is
            # A copy: torch wants writable memory.
            return np.array(np.broadcast_to(content, (*size, channels))), whole_view(size)
    picture, view = sent_view(content, preprocessing, whole)
    return pixels(picture), view


def pixels(picture: Image.Image) -> np.ndarray:
    """Returns the pixels of an RGB, L or I;16 picture: (H, W, C), uint8, or of I;16 float32 in [0, 1]."""
    found = np.array(picture)
    if found.dtype == np.uint16:
        found = found.astype(np.float32) / np.float32(_MOST_16)
    return found if found.ndim == 3 else found[..., None]


def as_picture(pixels: np.ndarray) -> Image.Image:
    """Returns the picture whose `pixels` these are, (H, W, C), uint8, or float32 in [0, 1]."""
    if pixels.dtype == np.float32:
        return Image.fromarray((pixels[..., 0] * np.float32(_MOST_16)).round().astype(np.uint16))
    return from_array(pixels)


def check_array(array: np.ndarray, size: tuple[int, int], channels: int) -> None:
    """Checks that an array can be the image of a network with an input (height, width) of some channels.

    Raises:
        InvalidImage: its dtype or shape is another one, or its pixels are not finite or not in [0, 1].
    """
    if array.dtype == np.float32 and array.ndim >= 2:
        if array.shape[:2] != size:
            raise InvalidImage(
                f"a float32 image must have the network's input size {list(size)}, got {list(array.shape[:2])}; "
                f"files and uint8 arrays are resized to {size[0]} x {size[1]}, it is not"
            )
        if array.shape[2:] not in _channel_axes(channels):
            also = f" or, grey, {list(size)}" if channels == 3 else ""
            raise InvalidImage(f"a float32 image must have shape {[*size, channels]}{also}, got {list(array.shape)}")
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise InvalidImage("a float32 image must have finite pixels in [0, 1]")
        return
    check_takes_files(size, channels)
    if array.dtype != np.uint8 or array.ndim < 2 or 0 in array.shape or array.shape[2:] not in _channel_axes(3):
        raise _not_an_array(array)


def _channel_axes(channels: int) -> set[tuple[int, ...]]:
    """Returns what may stand behind height and width in the shape of an array: the network's own channels, or grey."""
    return {(channels,), (1,), ()} if channels in (1, 3) else {(channels,)}


def check_takes_files(size: tuple[int, int], channels: int) -> None:
    """Raises InvalidImage where a network with an input (height, width) has channels that no file or picture has."""
    if channels not in (1, 3):
        raise InvalidImage(
            f"this network has {channels} channels, which no image file has: "
            f"send a float32 array of {[*size, channels]}"
        )


def _not_an_array(array: np.ndarray) -> InvalidImage:
    return InvalidImage(
        "an image array must be uint8 or float32 (height, width, 3) or, grey, (height, width), "
        f"got {array.dtype} {list(array.shape)}"
    )


def _resized(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Returns the (height, width) that an image of (height, width) is resized to.

    Raises:
        InvalidImage: it is so elongated that it would have more than `MAX_PIXELS`.
    """
    if isinstance(preprocessing.resize_px, tuple):
        return preprocessing.resize_px
    height, width = size
    goal, shorter = max(preprocessing.resize_px, _covering_px(size, preprocessing.crop_px)), min(size)
    _check_elongation(size, goal)
    return int(goal * height / shorter), int(goal * width / shorter)


def _covering_px(size: Sequence[int], crop: tuple[int, int]) -> int:
    """Returns the least length of the shorter side with which an image of (height, width) covers a crop."""
    return max(-(-px * min(size) // side) for px, side in zip(crop, size, strict=True))


def check_elongation(size: tuple[int, int], input_size: tuple[int, int]) -> None:
    """Checks that an image of (height, width), either way round, can be resized to cover an input of (height, width).

    Raises:
        InvalidImage: it is so elongated that resizing makes it larger than `MAX_PIXELS`.
    """
    _check_elongation(size, min(_covering_px(size, input_size), _covering_px(size[::-1], input_size)))


def _check_elongation(size: Sequence[int], shorter_px: int) -> None:
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
        InvalidImage: the array has no height and width, or it is larger than allowed.
    """
    if isinstance(image, np.ndarray):
        if image.ndim < 2:  # of its dtype and shape `check_array` knows more
            raise _not_an_array(image)
        if image.nbytes > max_bytes:
            raise InvalidImage(f"an image may have at most {max_bytes} bytes, got {image.nbytes}")
        height, width = image.shape[:2]
    else:
        height, width = image.height, image.width
    _check_pixels(height, width, max_pixels)
    return height, width


def read_image(image: ImageLike) -> ImageContent:
    """Returns the content of what callers have: a path is read, and 16-bit grey, uint16 (H, W), becomes a picture.

    Raises:
        InvalidImage: the file cannot be read, or it is nothing that can be an image.
    """
    if isinstance(image, np.ndarray):
        grey = image.dtype == np.uint16 and (image.ndim == 2 or image.shape[2:] == (1,)) and image.size
        return Image.fromarray(np.ascontiguousarray(image.reshape(image.shape[:2]))) if grey else image
    if isinstance(image, (bytes, Image.Image)):
        return image
    if isinstance(image, (bytearray, memoryview)):
        return bytes(image)
    if not isinstance(image, (str, os.PathLike)):
        hint = "; of a tensor give .cpu().numpy(), channels last" if hasattr(image, "cpu") else ""
        raise InvalidImage(
            f"an image is a path, the bytes of a file, a PIL image or an array, got {type(image).__name__}{hint}"
        )
    try:
        return Path(image).read_bytes()
    except (OSError, ValueError) as error:  # a ValueError: a name that no file can have
        raise InvalidImage(f"cannot read {image}: {getattr(error, 'strerror', None) or error}") from None


def digest(image: ImageContent) -> bytes:
    """Returns 16 bytes that name an image by its content; a picture is named by what is seen of it.

    Raises:
        InvalidImage: the file behind a picture is broken.
    """
    if isinstance(image, Image.Image):
        # The picture's bytes alone would say nothing of palette, alpha and orientation.
        image = np.asarray(_decoded(image, _grey if _is_16_bit(image) else _rgb))
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
        InvalidImage: the file behind the picture is broken, or a pixel lies beyond the range of its mode.
    """
    return _saved(_sendable(image), "PNG", compress_level=1)  # three times as fast as the default, a tenth larger


def _sendable(image: Image.Image) -> Image.Image:
    """Returns a picture in a mode of PNG files, upright; raises as `png`."""
    with _reading(image.format or "image"):
        image.load()
        return _upright(_plain(image), _orientation(image))


def as_file(image: Image.Image) -> bytes:
    """Returns a picture as a file to be sent: its own, where nobody can have changed it, else as PNG.

    A picture of 8 bits whose PNG has more than `MAX_BYTES` becomes WebP without loss. Where that has more, too, it is
    JPEG of quality 95, colours at full resolution: what a camera would have sent. A server's limits are for files, and
    a photo of 12 megapixels may be too large for them in every form without loss.

    Raises:
        InvalidImage: the file behind the picture is broken, or a pixel lies beyond the range of its mode.
    """
    own = _own_file(image)
    if own is not None:
        return own
    data = png(image)
    if len(data) <= MAX_BYTES or _is_16_bit(image):
        return data
    picture = _rgb(_sendable(image))
    if max(picture.size) <= _MAX_WEBP_PX:
        data = _saved(picture, "WEBP", lossless=True, quality=0, method=0)  # the fastest
        if len(data) <= MAX_BYTES:
            return data
    return _saved(picture, "JPEG", quality=95, subsampling=0)


def _saved(image: Image.Image, file_format: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def _own_file(image: Image.Image) -> bytes | None:
    """Returns the file that a picture was opened from, None where it may differ from the picture, or cannot be sent.

    As long as no pixel was loaded, none can have been changed. What else callers may change shows in the mode, the size
    and the orientation.
    """
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or image.tell():
        return None
    try:
        file = image.fp
        assert file is not None, "a picture whose pixels were not loaded yet has its file"
        place = file.tell()
        file.seek(0)
        data = bytes(file.read())
        file.seek(place)
        container = take_apart(data)
        same = Image.open(io.BytesIO(data))
    except Exception:  # whatever is wrong with it shows when its pixels are loaded
        return None
    described = (same.size, same.mode, container.orientation, image.info.get("transparency"))
    return data if described == (image.size, image.mode, _orientation(image), same.info.get("transparency")) else None


def picture(content: ImageContent, max_bytes: int = sys.maxsize, max_pixels: int = sys.maxsize) -> Image.Image:
    """Returns what was sent as RGB, upright, for people to look at; of other than 1 or 3 channels the mean, as grey.

    Raises:
        InvalidImage: the file or the array is broken, or larger than allowed.
    """
    if isinstance(content, bytes):
        return decode(content, max_bytes, max_pixels)
    if isinstance(content, Image.Image):
        return _decoded(content, _rgb)
    array = content if content.ndim == 3 else content[..., None]
    if array.dtype != np.uint8:
        grey = array if array.shape[2] in (1, 3) else array.mean(axis=2, keepdims=True)
        array = (grey.clip(0, 1) * 255).round().astype(np.uint8)
    return from_array(array, max_pixels).convert("RGB")
