"""Reads images: checked before decoding, decoded to RGB, cut to what the network sees. Pillow, no torch."""

from __future__ import annotations

import hashlib
import io
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from camserve.errors import InvalidImage
from camserve.types import InputView, Preprocessing

ImageLike = str | Path | bytes | Image.Image | np.ndarray
"""Image as Python callers may pass it."""

ImageContent = bytes | Image.Image | np.ndarray
"""Image as a request holds it: an encoded file, a picture of this process, or pixels: uint8 (H, W, 3), or float32 (H,
W, 3) in [0, 1] of the network's input size."""

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 16 * 2**20
MAX_PIXELS = 64 * 10**6

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

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
    with _opened(data, max_bytes, max_pixels) as image:
        return image.height, image.width


def decode(data: bytes, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns the image as RGB, EXIF orientation applied; palette, grey and CMYK converted, alpha laid on white.

    Raises:
        InvalidImage: as `probe`, and when the file is truncated or broken.
    """
    with _opened(data, max_bytes, max_pixels) as image:
        return _decoded(image)


def from_array(array: np.ndarray, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns a uint8 (H, W, 3) array as an image.

    Raises:
        InvalidImage: another dtype or shape, or over the pixel limit.
    """
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InvalidImage(f"an image array must be uint8 (height, width, 3), got {array.dtype} {array.shape}")
    _check_pixels(array.shape[0], array.shape[1], max_pixels)
    return Image.fromarray(np.ascontiguousarray(array))


def _opened(data: bytes, max_bytes: int, max_pixels: int) -> Image.Image:
    if not data:
        raise InvalidImage("the image has zero bytes")
    if len(data) > max_bytes:
        raise InvalidImage(f"an image may have at most {max_bytes} bytes, got {len(data)}")
    try:
        with warnings.catch_warnings():
            # The limit on pixels below takes the place of Pillow's warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise InvalidImage(f"not a {', '.join(FORMATS)} image ({len(data)} bytes)") from None
    except Image.DecompressionBombError:
        most = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))  # Pillow itself takes no more than this
        raise InvalidImage(f"an image may have at most {most} pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InvalidImage(f"the image file is broken or truncated: {error}") from None
    _check_pixels(image.height, image.width, max_pixels)
    return image


def _check_pixels(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise InvalidImage(f"an image may have at most {max_pixels} pixels, got {width} x {height} = {width * height}")


def _decoded(image: Image.Image) -> Image.Image:
    """Returns the image as RGB, upright; Pillow reads what is behind the header only now.

    Raises:
        InvalidImage: that is broken or truncated.
    """
    try:
        return _rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, IndexError, EOFError, MemoryError) as error:
        raise InvalidImage(f"the {image.format or 'image'} file is broken or truncated: {error}") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        image.load()
        return image.copy()  # of the plain Image class, independent of the file
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: Pillow would clip instead of scaling
        scaled = np.asarray(image, dtype=np.float64) / 257
        return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def network_view(image: Image.Image, preprocessing: Preprocessing) -> tuple[Image.Image, InputView]:
    """Returns what the network sees of an RGB image, and where that lies in the image.

    The shorter side is resized and the centre cropped, equal to torchvision's Resize and CenterCrop on a PIL image
    (antialiased).

    Raises:
        InvalidImage: the image is so elongated that resizing its shorter side makes it larger than `MAX_PIXELS`.
    """
    height, width = preprocessing.crop_px
    short, long = min(image.size), max(image.size)
    # Never smaller than the crop, so that nothing is padded.
    goal = max(preprocessing.resize_px, height, width)
    if goal * (goal * long // short) > MAX_PIXELS:
        raise InvalidImage(f"an image of {image.width} x {image.height} is too elongated to be resized")
    resized = (int(goal * image.width / short), int(goal * image.height / short))
    left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
    grown = image.resize(resized, _RESAMPLING[preprocessing.interpolation])
    scale_x, scale_y = image.width / resized[0], image.height / resized[1]
    crop = (left * scale_x, top * scale_y, (left + width) * scale_x, (top + height) * scale_y)
    view = InputView(original_size=(image.height, image.width), crop=crop, size=(height, width))
    return grown.crop((left, top, left + width, top + height)), view


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
    try:
        upright = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, IndexError, EOFError) as error:
        raise InvalidImage(f"the {image.format or 'image'} file is broken or truncated: {error}") from None
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
