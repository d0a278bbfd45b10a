"""Images as they come in: formats, orientation, colours, broken files, limits, and the part that the network sees."""

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torchvision.transforms import v2

from camserve import containers, images
from camserve.errors import InvalidImage, InvalidOption, Unavailable
from camserve.types import InputView, Preprocessing

LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}}
INTERPOLATIONS = ["nearest", "bilinear", "bicubic"]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Slow waves, which JPEG keeps almost exactly."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)]
    return np.stack([127 + 100 * wave for wave in waves], axis=-1).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG file, written by hand: Pillow cannot write 16-bit colour, nor lie about the size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def decoded(data: bytes) -> np.ndarray:
    image = images.decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


# What does not depend on the file


def test_a_lack_of_memory_is_not_the_files_fault(monkeypatch):
    def fails(data):
        raise MemoryError

    monkeypatch.setattr(images, "take_apart", fails)
    for read in (images.probe, images.decode):
        with pytest.raises(Unavailable, match="not enough memory"):
            read(encoded(noise(6, 8), "PNG"))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_a_decoder_that_sees_another_size_than_was_checked_decodes_nothing(monkeypatch, file_format):
    """The bounds are held against the size that the container says."""
    take_apart = images.take_apart
    monkeypatch.setattr(images, "take_apart", lambda data: replace(take_apart(data), size=(6, 9)))
    with pytest.raises(InvalidImage, match="its header has two sizes"):
        images.decode(encoded(noise(6, 8), file_format))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_a_header_that_cannot_be_read_is_told_without_pythons_objects(file_format):
    data = bytearray(encoded(noise(6, 8), file_format, **LOSSLESS[file_format]))
    if file_format == "PNG":
        data[24:26] = b"\x07\x09"  # depth and colour type that there are none of
    else:
        data[16:20] = b"\xff" * 4
    with pytest.raises(InvalidImage, match=r"broken or truncated") as caught:
        images.decode(bytes(data))
    assert "0x" not in str(caught.value)


# Formats and colour modes


@pytest.mark.parametrize("file_format", LOSSLESS)
def test_lossless_formats_give_back_the_very_pixels(file_format):
    pixels = noise(37, 23)
    np.testing.assert_array_equal(decoded(encoded(pixels, file_format, **LOSSLESS[file_format])), pixels)


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_lossy_formats_give_back_nearly_the_pixels(file_format):
    pixels = smooth(48, 64)
    error = np.abs(decoded(encoded(pixels, file_format, quality=95)).astype(int) - pixels)
    assert error.mean() < 3  # what quality 95 loses on slow waves


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 2}, {"optimize": True}])
def test_jpeg_flavours_are_read(options):
    pixels = smooth(48, 64)
    assert np.abs(decoded(encoded(pixels, "JPEG", quality=95, **options)).astype(int) - pixels).mean() < 3


@pytest.mark.parametrize("file_format", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused_by_name(file_format):
    with pytest.raises(InvalidImage, match="JPEG, PNG, WEBP"):
        images.decode(encoded(noise(8, 8), file_format))


def test_grey_becomes_three_equal_channels():
    grey = noise(9, 5)[..., 0]
    np.testing.assert_array_equal(decoded(encoded(grey, "PNG")), np.repeat(grey[..., None], 3, axis=2))


def test_black_and_white_is_read():
    bits = Image.fromarray(noise(9, 5)[..., 0]).convert("1")
    np.testing.assert_array_equal(decoded(encoded(bits, "PNG"))[..., 1], np.asarray(bits) * np.uint8(255))


def test_palette_is_looked_up():
    palette = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3), mode="P")
    colours = noise(1, 6)[0]
    palette.putpalette(colours.tobytes())
    np.testing.assert_array_equal(decoded(encoded(palette, "PNG")), colours.reshape(2, 3, 3))


def test_transparent_palette_entry_is_white():
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    result = decoded(encoded(palette, "PNG", transparency=1))
    np.testing.assert_array_equal(result, [[[10, 20, 30], [255, 255, 255]]])


@pytest.mark.parametrize(("mode", "file_format"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP")])
def test_alpha_is_laid_on_white(mode, file_format):
    pixels = noise(11, 7, channels=len(mode))
    result = decoded(encoded(Image.fromarray(pixels, mode), file_format, **LOSSLESS[file_format], exact=True))
    colour = pixels[..., :3] if mode == "RGBA" else np.repeat(pixels[..., :1], 3, axis=2)
    alpha = pixels[..., -1:] / 255
    np.testing.assert_allclose(result, colour * alpha + 255 * (1 - alpha), atol=1)  # integer rounding


def test_transparent_colour_key_is_white():
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)
    result = decoded(encoded(pixels, "PNG", transparency=(1, 2, 3)))
    np.testing.assert_array_equal(result, [[[255, 255, 255], [4, 5, 6]]])


def test_cmyk_jpeg_becomes_rgb():
    ink = np.zeros((16, 16, 4), dtype=np.uint8)
    ink[..., 0] = 255  # cyan
    result = decoded(encoded(Image.fromarray(ink, "CMYK"), "JPEG", quality=95))
    np.testing.assert_allclose(result.reshape(-1, 3).mean(axis=0), [0, 255, 255], atol=3)


def test_16_bit_grey_keeps_its_brightness():
    levels = np.array([[0, 257, 16448, 49151, 65535]], dtype=np.uint16)
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(levels), "PNG"))[0, :, 0], [0, 1, 64, 191, 255])


def test_16_bit_colour_keeps_its_brightness():
    levels = struct.pack(">6H", 0, 32896, 65535, 65535, 0, 257)
    result = decoded(png(2, 1, depth=16, colour_type=2, rows=b"\0" + levels))
    np.testing.assert_allclose(result, [[[0, 128, 255], [255, 0, 1]]], atol=1)


def test_first_frame_of_an_animation_is_read():
    first, second = noise(8, 8, seed=1), noise(8, 8, seed=2)
    data = encoded(first, "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(second)])
    np.testing.assert_array_equal(decoded(data), first)


# Orientation

ORIENTED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),  # stored turned left: shown turned right
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", ORIENTED)
def test_exif_orientation_is_applied(file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = LOSSLESS.get(file_format, {})
    plain = np.asarray(Image.open(io.BytesIO(encoded(smooth(24, 40), file_format, **options))))
    result = decoded(encoded(smooth(24, 40), file_format, exif=exif, **options))
    np.testing.assert_array_equal(result, ORIENTED[orientation](plain))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = noise(6, 4)
    np.testing.assert_array_equal(decoded(encoded(pixels, "PNG", exif=exif)), pixels)


def test_broken_exif_does_not_escape_as_another_error():
    data = encoded(smooth(24, 40), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff" + b"\x7f" * 40)
    readable_or_typed(data)


# Broken files


def readable_or_typed(data: bytes) -> None:
    """The image, or InvalidImage: nothing else may come out."""
    for function in (images.probe, images.decode):
        try:
            function(data)
        except InvalidImage as error:
            assert str(error)  # noqa: PT017  (both outcomes are allowed)


def test_zero_bytes():
    for function in (images.probe, images.decode):
        with pytest.raises(InvalidImage, match="zero bytes"):
            function(b"")


@pytest.mark.parametrize(
    "data", [b"\0", b"hello world" * 20, b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP"]
)
def test_what_is_not_an_image_is_refused(data):
    with pytest.raises(InvalidImage):
        images.decode(data)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("part", [i / 20 for i in range(1, 19)])
def test_truncated_file_is_refused(file_format, part):
    data = encoded(noise(64, 48), file_format)
    with pytest.raises(InvalidImage):
        images.decode(data[: int(len(data) * part)])


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_cut_anywhere_a_file_is_read_or_refused(file_format):
    data = encoded(noise(12, 9), file_format)
    for length in range(len(data)):
        readable_or_typed(data[:length])


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@settings(max_examples=150, deadline=None)  # decoding time depends on what was hit
@given(hits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8))
def test_overwritten_bytes_never_raise_anything_else(file_format, hits):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encoded(noise(20, 15), file_format, exif=exif))
    for place, value in hits:
        data[int(place * len(data))] = value
    readable_or_typed(bytes(data))


# Limits


def test_too_many_bytes_are_refused_before_the_file_is_opened(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    for function in (images.probe, images.decode):
        with pytest.raises(InvalidImage, match=r"at most 99 bytes, got 100"):
            function(b"x" * 100, max_bytes=99)


def test_too_many_pixels_are_refused_before_anything_is_decompressed(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decompressed"))
    data = png(9000, 8000, depth=8, colour_type=2, rows=b"")
    for function in (images.probe, images.decode):
        with pytest.raises(InvalidImage, match=r"at most 64000000 pixels, got 9000 x 8000 = 72000000"):
            function(data)


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_with_the_limit(size):
    with pytest.raises(InvalidImage, match="at most 64000000 pixels"):
        images.decode(png(*size, depth=8, colour_type=2, rows=b""))


def test_limits_are_inclusive():
    data = encoded(noise(10, 10), "PNG")
    assert images.probe(data, max_bytes=len(data), max_pixels=100) == (10, 10)
    with pytest.raises(InvalidImage):
        images.decode(data, max_pixels=99)


def test_probe_reads_the_header_alone(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decompressed"))
    for file_format in containers.FORMATS:
        assert images.probe(encoded(noise(30, 20), file_format)) == (30, 20)


# Arrays


def test_an_array_is_an_image():
    pixels = noise(7, 5)
    np.testing.assert_array_equal(np.asarray(images.from_array(pixels)), pixels)
    np.testing.assert_array_equal(np.asarray(images.from_array(pixels[:, ::-1])), pixels[:, ::-1])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((3, 4, 4), dtype=np.uint8),
        np.zeros((4, 4, 4), dtype=np.uint8),
        np.zeros((0, 4, 3), dtype=np.uint8),
        np.zeros((1, 4, 4, 3), dtype=np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_an_array_of_another_kind_is_refused_with_what_came(array):
    with pytest.raises(InvalidImage, match=r"uint8 \(height, width, 3\), got .*" + str(array.dtype)):
        images.from_array(array)


def test_an_array_over_the_pixel_limit_is_refused():
    with pytest.raises(InvalidImage, match="at most 99 pixels, got 10 x 10 = 100"):
        images.from_array(noise(10, 10), max_pixels=99)


# What the network sees


def preprocessing(resize: int = 40, crop: tuple[int, int] = (32, 32), interpolation: str = "bicubic") -> Preprocessing:
    return Preprocessing(resize, crop, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), interpolation)


def by_torchvision(
    image: Image.Image, resize: int | tuple[int, int], crop: tuple[int, int], interpolation: str
) -> np.ndarray:
    transform = v2.Compose([v2.Resize(resize, v2.InterpolationMode(interpolation)), v2.CenterCrop(crop)])
    return np.asarray(transform(image))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@settings(max_examples=60, deadline=None)  # sizes differ
@given(
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)).filter(lambda hw: max(hw) <= 20 * min(hw)),
    resize=st.integers(16, 60),
    margin=st.tuples(st.integers(0, 15), st.integers(0, 15)),
)
def test_view_equals_torchvisions_resize_and_centre_crop(interpolation, size, resize, margin):
    crop = (resize - margin[0], resize - margin[1])
    image = Image.fromarray(noise(*size))
    seen, view = images.network_view(image, preprocessing(resize, crop, interpolation))
    np.testing.assert_array_equal(np.asarray(seen), by_torchvision(image, resize, crop, interpolation))
    assert view.size == crop
    assert view.original_size == size


def test_view_of_imagenet_preprocessing_equals_torchvisions():
    image = Image.fromarray(noise(300, 451))
    seen, _ = images.network_view(image, preprocessing(256, (224, 224)))
    np.testing.assert_array_equal(np.asarray(seen), by_torchvision(image, 256, (224, 224), "bicubic"))


def test_crop_says_where_the_view_lies_in_the_image():
    _, view = images.network_view(Image.new("RGB", (400, 200)), preprocessing(100, (80, 80)))
    assert view == InputView(original_size=(200, 400), crop=(120.0, 20.0, 280.0, 180.0), size=(80, 80))


@settings(max_examples=60, deadline=None)  # sizes differ
@given(
    size=st.tuples(st.integers(20, 300), st.integers(20, 300)),
    resize=st.integers(32, 64),
    margin=st.tuples(st.integers(0, 16), st.integers(0, 16)),
)
def test_what_lies_in_the_crop_is_what_is_seen(size, resize, margin):
    """A horizontal and a vertical ramp: the colour of a pixel of the view tells where in the image it came from."""
    height, width = size
    ramp = np.zeros((height, width, 3), dtype=np.float64)
    ramp[..., 0] = (np.arange(width) + 0.5) / width * 255
    ramp[..., 1] = ((np.arange(height) + 0.5) / height * 255)[:, None]
    image = Image.fromarray(ramp.round().astype(np.uint8))
    seen, view = images.network_view(image, preprocessing(resize, (resize - margin[0], resize - margin[1]), "bilinear"))
    left, top, right, bottom = view.crop
    assert -1e-9 <= left < right <= width + 1e-9
    assert -1e-9 <= top < bottom <= height + 1e-9
    x = left + (np.arange(view.size[1]) + 0.5) / view.size[1] * (right - left)
    y = top + (np.arange(view.size[0]) + 0.5) / view.size[0] * (bottom - top)
    pixels = np.asarray(seen).astype(np.float64)
    # 1.5: two roundings to a whole grey level. At the image's border the ramp cannot go on: flat for half a pixel.
    np.testing.assert_allclose(pixels[..., 0].mean(axis=0), x / width * 255, atol=1.5 + 128 / width)
    np.testing.assert_allclose(pixels[..., 1].mean(axis=1), y / height * 255, atol=1.5 + 128 / height)


def test_a_crop_larger_than_the_resized_image_is_never_padded():
    seen, view = images.network_view(Image.new("RGB", (50, 30), "white"), preprocessing(24, (32, 28)))
    assert np.asarray(seen).min() == 255
    assert seen.size == (28, 32)
    assert view.size == (32, 28)


@pytest.mark.parametrize("size", [(61, 90), (90, 61), (40, 400)])
def test_a_stretched_view_equals_torchvisions_resize_to_both_sides(size):
    image = Image.fromarray(noise(*size))
    stretched = replace(preprocessing(1, (30, 50), "bilinear"), resize_px=(34, 55))
    seen, view = images.network_view(image, stretched)
    np.testing.assert_array_equal(np.asarray(seen), by_torchvision(image, (34, 55), (30, 50), "bilinear"))
    left, top, right, bottom = view.crop
    assert view.original_size == size
    assert (bottom - top) * 34 == pytest.approx(30 * size[0])
    assert (right - left) * 55 == pytest.approx(50 * size[1])


def test_a_stretched_image_may_be_as_elongated_as_it_likes():
    stretched = replace(preprocessing(1, (30, 50)), resize_px=(30, 50))
    seen, view = images.network_view(Image.new("RGB", (1, 1_000_000)), stretched)
    assert (seen.size, view.crop) == ((50, 30), (0, 0, 1, pytest.approx(1_000_000)))


def test_stretched_images_must_cover_the_crop():
    with pytest.raises(InvalidOption, match="do not cover"):
        replace(preprocessing(1, (30, 50)), resize_px=(30, 49))


@pytest.mark.parametrize(("crop_start", "left"), [("even", 2), ("down", 1)])
def test_a_crop_starts_where_the_preprocessing_rounds_it_to(crop_start, left):
    image = Image.new("RGB", (33, 30))  # 3 columns are cut off
    _, view = images.network_view(image, replace(preprocessing(30, (30, 30)), crop_start=crop_start))
    assert view.crop == (left, 0, left + 30, 30)


def test_a_very_elongated_image_is_refused_before_it_is_blown_up():
    with pytest.raises(InvalidImage, match="1 x 1000000 is too elongated"):
        images.network_view(Image.new("RGB", (1, 1_000_000)), preprocessing(256, (224, 224)))


def test_whole_view_is_the_image():
    assert images.whole_view((12, 34)) == InputView(original_size=(12, 34), crop=(0.0, 0.0, 34.0, 12.0), size=(12, 34))


# Pictures of this process


def broken() -> Image.Image:
    """A picture whose file ends too early, which Pillow notices only when it needs the pixels."""
    return Image.open(io.BytesIO(encoded(noise(40, 50), "PNG")[:-2000]))


@pytest.mark.parametrize("read", [images.picture, images.png, images.digest], ids=lambda read: read.__name__)
def test_a_picture_whose_file_is_broken_is_an_invalid_image(read):
    with pytest.raises(InvalidImage, match="the PNG file is broken or truncated"):
        read(broken())


def test_a_picture_is_named_by_what_is_seen_of_it():
    grey = Image.fromarray(noise(4, 6, 1)[..., 0])
    named = {"grey": grey, "colours": grey.convert("RGB")}
    assert len({images.digest(picture) for picture in named.values()}) == 1, "they look the same"
    red, blue = Image.new("P", (4, 6)), Image.new("P", (4, 6))
    red.putpalette([255, 0, 0] * 256)
    blue.putpalette([0, 0, 255] * 256)
    turned = grey.copy()
    turned.getexif()[0x0112] = 3
    faint = Image.new("RGBA", (4, 6), (255, 0, 0, 10))
    different = [grey, red, blue, turned, faint, grey.rotate(90, expand=True)]
    assert len({images.digest(picture) for picture in different}) == len(different)
    assert red.tobytes() == blue.tobytes(), "the bytes alone would not tell them apart"


def test_the_digest_of_an_array_does_not_depend_on_how_it_lies_in_memory():
    array = noise(4, 6)
    assert images.digest(np.asfortranarray(array)) == images.digest(array)
    assert images.digest(array[:, ::-1]) != images.digest(array)
    assert images.digest(array[:, ::-1]) == images.digest(array[:, ::-1].copy())


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (b"12345", 5),
        (noise(4, 6), 4 * 6 * 3),
        (noise(4, 6).astype(np.float32), 4 * 4 * 6 * 3),
        (Image.new("RGB", (4, 6)), 4 * 6 * 3),
        (Image.new("L", (4, 6)), 4 * 6),
    ],
    ids=["file", "uint8", "float32", "picture", "grey picture"],
)
def test_what_an_image_takes_in_a_message(image, size):
    assert images.size_bytes(image) == size
