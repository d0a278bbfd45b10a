"""Images for networks of one and of any number of channels, of any shape: what the network gets of what was sent."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from camserve import images
from camserve.errors import InvalidImage, InvalidOption
from camserve.types import InputView, Preprocessing

LEVELS = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
"""A picture that has every level of 16-bit grey once."""


def preprocessing(crop=(256, 256), channels=1, resize=None, interpolation="bilinear") -> Preprocessing:
    return Preprocessing(resize or min(crop), crop, (0.5,) * channels, (0.25,) * channels, interpolation)


def noise(*shape: int, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype)


def encoded(picture: Image.Image | np.ndarray, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(file, file_format, **options)
    return file.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **{"photometric": "minisblack"} | options)
    return file.getvalue()


def grey_of(content) -> np.ndarray:
    """The input of a network of one channel, (H, W), as large as the picture itself."""
    pixels, _ = images.seen(content, preprocessing())
    assert pixels.shape == (256, 256, 1)
    return pixels[..., 0]


# 16-bit grey

SIXTEEN_BITS = {
    "PNG": lambda: encoded(LEVELS, "PNG"),
    **{
        f"TIFF, {how}": lambda how=how: encoded(LEVELS, "TIFF", compression=how)
        for how in (None, "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits")
    },
    "TIFF, big-endian": lambda: tiff(LEVELS, byteorder=">"),
    "TIFF, tiles": lambda: tiff(LEVELS, tile=(64, 48)),
    "TIFF, strips": lambda: tiff(LEVELS, rowsperstrip=7, compression="zlib", predictor=True),
    "TIFF, 0 is white": lambda: tiff(~LEVELS, photometric="miniswhite"),
    "TIFF, 0 is white, big-endian": lambda: tiff(~LEVELS, photometric="miniswhite", byteorder=">"),
    "TIFF, two pages": lambda: tiff(np.stack([LEVELS, LEVELS.T])),
    "picture": lambda: Image.fromarray(LEVELS),
    "big-endian picture": lambda: Image.fromarray(LEVELS.astype(">u2")),
    "32-bit picture": lambda: Image.fromarray(LEVELS.astype(np.int32)),
    "picture as it is sent": lambda: images.as_file(Image.fromarray(LEVELS)),
    "array": lambda: images.read_image(LEVELS),
    "array with a channel": lambda: images.read_image(LEVELS[..., None]),
}


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_16_bits_reach_the_network(name):
    got = grey_of(SIXTEEN_BITS[name]())
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, LEVELS.astype(np.float32) / np.float32(65535))


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_16_bits_become_8_for_people_and_for_rgb(name):
    content = SIXTEEN_BITS[name]()
    expected = np.repeat((LEVELS / 257).round().astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(images.picture(content)), expected)
    np.testing.assert_array_equal(images.seen(content, preprocessing(channels=3))[0], expected)


@pytest.mark.parametrize("depth", [bool, np.uint8])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("inverted", [False, True])
def test_a_tiff_of_fewer_bits_is_read(depth, compression, inverted):
    levels = noise(256, 256) if depth is np.uint8 else noise(256, 256) > 90
    data = encoded(levels, "TIFF", compression=compression)
    if inverted:  # the tag that says which grey is 0 (short number 262) has a value of 2 bytes
        place = data.index(struct.pack("<HHII", 262, 3, 1, 1)) + 8
        data = data[:place] + b"\0" + data[place + 1 :]
    expected = np.asarray(levels, np.uint8) * np.uint8(255 if depth is bool else 1)
    np.testing.assert_array_equal(grey_of(data), ~expected if inverted else expected)


def test_a_turned_tiff_is_put_upright():
    image = Image.fromarray(LEVELS)
    data = encoded(image, "TIFF", tiffinfo={0x0112: 6})  # stored turned left
    np.testing.assert_array_equal(grey_of(data) * 65535, np.rot90(LEVELS, -1))


COLOURS = noise(256, 256, 3)


@pytest.mark.parametrize(
    ("array", "options", "text"),
    [
        (COLOURS, {"photometric": "rgb"}, "grey pixels, got PhotometricInterpretation 2"),
        (noise(256, 256, 3, dtype=np.uint16), {"photometric": "rgb", "tile": (64, 64)}, "grey pixels, got Photo"),
        (noise(256, 256, 4), {"photometric": "separated"}, "grey pixels, got PhotometricInterpretation 5"),
        (noise(256, 256, 2), {"planarconfig": "contig"}, "one value for each pixel, got SamplesPerPixel 2"),
        (LEVELS.astype(np.float32), {}, "unsigned whole numbers, got SampleFormat 3"),
        (LEVELS.astype(np.float32), {"tile": (64, 64)}, "unsigned whole numbers, got SampleFormat 3"),
        (LEVELS.astype(np.int16), {}, "unsigned whole numbers, got SampleFormat 2"),
        (LEVELS.astype(np.uint32), {}, "1, 8 or 16 bits for each pixel, got BitsPerSample 32"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_tiff_of_anything_else_is_refused_with_what_is_read(array, options, text, channels):
    for read in (images.probe, lambda data: images.seen(data, preprocessing(channels=channels))):
        with pytest.raises(InvalidImage, match=f"a TIFF must have {text}.*; send anything else as JPEG, PNG, WEBP"):
            read(tiff(array, **options))


def hand_written_png(values: np.ndarray, colour_type: int, interlaced: bool = False, clear: int | None = None) -> bytes:
    """A PNG file of 16-bit values, (H, W, samples), which Pillow cannot write, with a filter of every kind."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, samples = values.shape
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    rows = b""
    for top, left, down, right in passes:
        part = values[top::down, left::right].astype(">u2")
        lines = part.view(np.uint8).reshape(len(part), -1)
        for number, line in enumerate(lines if lines.size else ()):
            before = lines[number - 1] if number else np.zeros_like(line)
            shifted = np.concatenate([np.zeros(2 * samples, np.uint8), line])[: len(line)]
            kind = number % 4
            taken = (0, shifted, before, ((shifted.astype(int) + before) // 2).astype(np.uint8))[kind]
            rows += bytes([kind]) + (line - taken).astype(np.uint8).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, interlaced)
    clear_level = b"" if clear is None else chunk(b"tRNS", struct.pack(">H", clear))
    body = chunk(b"IHDR", header) + clear_level + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row and column of each pass of an interlaced PNG, and the steps from row to row and from column to column."""


@pytest.mark.parametrize("interlaced", [False, True])
def test_16_bit_grey_with_alpha_keeps_its_16_bits(interlaced):
    alpha = noise(256, 256, dtype=np.uint16)
    alpha[::3] = 65535
    alpha[1, 1] = 0
    data = hand_written_png(np.stack([LEVELS, alpha], axis=-1), 4, interlaced)
    got = grey_of(data) * np.float64(65535)
    share = alpha / 65535
    expected = LEVELS * share + 65535 * (1 - share)
    np.testing.assert_allclose(got, expected, atol=0.51)  # rounded to a level
    np.testing.assert_array_equal(got.round()[::3], LEVELS[::3])
    assert got[1, 1] == 65535
    for colours in (np.asarray(images.decode(data)), images.seen(data, preprocessing(channels=3))[0]):
        np.testing.assert_allclose(colours, np.repeat(expected[..., None] / 257, 3, axis=2), atol=0.51)


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_transparent_level_of_16_bit_grey_becomes_white(interlaced):
    data = hand_written_png(LEVELS[..., None], 0, interlaced, clear=4660)
    expected = np.where(LEVELS == 4660, 65535, LEVELS)
    sent = images.png(Image.open(io.BytesIO(data)))
    for content in (data, sent, Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal((grey_of(content) * np.float64(65535)).round(), expected)
        colours, _ = images.seen(content, preprocessing(channels=3))
        np.testing.assert_array_equal(colours[..., 1], (expected / 257).round())


@pytest.mark.parametrize(("colour_type", "samples"), [(2, 3), (6, 4)])
def test_16_bit_colours_are_taken_as_8(colour_type, samples):
    values = noise(256, 256, samples, dtype=np.uint16)
    values[..., 3:] = 65535
    got, _ = images.seen(hand_written_png(values, colour_type), preprocessing(channels=3))
    assert got.dtype == np.uint8
    np.testing.assert_allclose(got, values[..., :3] / 257, atol=1)  # Pillow takes the high bytes


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_is_resized_as_torchvision_does(interpolation, dtype):
    image = Image.fromarray(noise(91, 133, dtype=dtype))
    resized = v2.Resize(40, v2.InterpolationMode(interpolation))(image)
    expected = np.asarray(v2.CenterCrop((36, 44))(resized))
    got, view = images.seen(encoded(image, "PNG"), preprocessing((36, 44), 1, 40, interpolation))
    scale = 1 if dtype == np.uint8 else 65535
    np.testing.assert_array_equal((got[..., 0] * scale).round(), expected)
    assert (view.size, view.original_size) == ((36, 44), (91, 133))


def test_two_pictures_of_16_bits_are_told_apart():
    other = LEVELS.copy()
    other[0, 0] = 1  # both are the same in 8 bits
    assert images.digest(Image.fromarray(LEVELS)) != images.digest(Image.fromarray(other))
    assert images.digest(Image.fromarray(LEVELS)) == images.digest(Image.fromarray(LEVELS.astype(np.int32)))


@pytest.mark.parametrize(
    "picture", [Image.fromarray(LEVELS), Image.fromarray(noise(6, 8)), Image.new("RGB", (8, 6), "red")]
)
def test_a_picture_is_that_of_its_pixels(picture):
    again = images.as_picture(images.pixels(picture))
    assert again.mode == picture.mode
    np.testing.assert_array_equal(np.asarray(again), np.asarray(picture))


# Pictures of all modes

BY_MODE = {
    "1": (Image.new("1", (2, 1), 1), 255),
    "L": (Image.new("L", (2, 1), 77), 77),
    "LA": (Image.new("LA", (2, 1), (100, 51)), 224),  # a fifth of 100, four fifths of white
    "La": (Image.new("La", (2, 1), (20, 51)), 224),
    "P": (Image.new("RGB", (2, 1), (10, 200, 30)).quantize(2), 124),
    "PA": (Image.new("RGBA", (2, 1), (255, 0, 0, 0)).convert("PA"), 255),
    "RGB": (Image.new("RGB", (2, 1), (10, 200, 30)), 124),
    "RGBA": (Image.new("RGBA", (2, 1), (10, 200, 30, 0)), 255),
    "RGBa": (Image.new("RGBa", (2, 1), (0, 0, 0, 0)), 255),
    "RGBX": (Image.new("RGBX", (2, 1), (10, 200, 30, 0)), 124),
    "CMYK": (Image.new("CMYK", (2, 1), (0, 0, 0, 200)), 55),
    "YCbCr": (Image.new("YCbCr", (2, 1), (90, 128, 128)), 90),
    "HSV": (Image.new("HSV", (2, 1), (0, 0, 64)), 64),
    "I;16": (Image.new("I;16", (2, 1), 20000), 20000 / 65535),
    "I": (Image.new("I", (2, 1), 20000), 20000 / 65535),
    "F": (Image.new("F", (2, 1), 127.5), 0.5),
}


@pytest.mark.parametrize("mode", BY_MODE)
def test_a_picture_of_any_mode_becomes_grey(mode):
    picture, expected = BY_MODE[mode]
    for content in (picture, images.as_file(picture)):
        got, _ = images.seen(content, preprocessing((1, 2)))
        # 1: luma and alpha are rounded; 16 bits are exact to half a level.
        np.testing.assert_allclose(got[..., 0], expected, atol=1 if got.dtype == np.uint8 else 0.5 / 65535)
        assert got.shape == (1, 2, 1)


@pytest.mark.parametrize("mode", [mode for mode in BY_MODE if mode not in ("P", "RGB", "RGBX")])
def test_all_channels_of_a_grey_picture_are_that_grey(mode):
    picture, _ = BY_MODE[mode]
    colours, _ = images.seen(picture, preprocessing((1, 2), 3))
    grey, _ = images.seen(picture, preprocessing((1, 2), 1))
    scaled = grey if grey.dtype == np.uint8 else (grey * 255).round()
    np.testing.assert_array_equal(colours, np.repeat(scaled, 3, axis=2))


@pytest.mark.parametrize(
    ("mode", "values", "text"),
    [
        ("I", [[-1, 5]], r"mode I must be 0\.\.65535, got -1\.\.5"),
        ("I", [[0, 65536]], r"mode I must be 0\.\.65535, got 0\.\.65536"),
        ("F", [[0, 255.5]], r"mode F must be 0\.\.255, got 0\.\.255\.5"),
        ("F", [[-0.5, 200]], r"mode F must be 0\.\.255, got -0\.5\.\.200"),
        # It may be meant to be in [0, 1], and would be black.
        ("F", [[0.25, 1]], r"mode F must be 0\.\.255, got 0\.25\.\.1: scale"),
        ("F", [[np.nan, 9]], r"mode F must be 0\.\.255, got nan"),
        ("F", [[np.inf, 9]], r"mode F must be 0\.\.255, got 9\.\.inf"),
    ],
)
@pytest.mark.parametrize("read", [images.picture, images.png, images.as_file, images.digest])
def test_numbers_beyond_a_modes_range_are_refused(mode, values, text, read):
    picture = Image.fromarray(np.array(values, np.int32 if mode == "I" else np.float32))
    assert picture.mode == mode
    with pytest.raises(InvalidImage, match=text):
        read(picture)
    with pytest.raises(InvalidImage, match=text):
        images.seen(picture, preprocessing((1, 2)))


def test_a_black_picture_of_floats_is_black():
    got, _ = images.seen(Image.new("F", (2, 1), 0.0), preprocessing((1, 2)))
    assert not got.any()


# Arrays


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_grey_pixels_of_the_own_size_are_taken_as_they_are(shape, dtype):
    pixels = noise(*shape) if dtype == np.uint8 else noise(*shape).astype(np.float32) / 255
    got, view = images.seen(pixels, preprocessing((6, 8), resize=16))
    np.testing.assert_array_equal(got, pixels.reshape(6, 8, 1))
    assert view == images.whole_view((6, 8))
    got[:] = 0
    assert pixels.any(), "it is a copy"


@pytest.mark.parametrize("shape", [(30, 40), (30, 40, 1), (30, 40, 3), (6, 8, 3)])
def test_other_pixels_of_grey_or_colours_are_resized(shape):
    pixels = noise(*shape)
    plane = pixels if len(shape) == 2 else pixels[..., 0] if shape[2] == 1 else pixels
    expected, _ = images.network_view(Image.fromarray(plane).convert("L"), preprocessing((6, 8)))
    got, view = images.seen(pixels, preprocessing((6, 8)))
    np.testing.assert_array_equal(got[..., 0], np.asarray(expected))
    assert view.original_size == shape[:2]


@pytest.mark.parametrize("size", [(6, 8), (30, 40)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channel", [(), (1,)])
def test_grey_pixels_are_a_grey_picture_for_a_network_of_colours(size, dtype, channel):
    pixels = noise(*size, dtype=dtype)
    shown = pixels if dtype == np.uint8 else (pixels / 257).round().astype(np.uint8)
    expected, view = images.seen(Image.fromarray(shown), preprocessing((6, 8), 3))
    got, same = images.seen(images.read_image(pixels.reshape(*size, *channel)), preprocessing((6, 8), 3))
    np.testing.assert_array_equal(got, expected)
    assert (view.size, view.original_size) == (same.size, same.original_size)
    assert images.picture(images.read_image(pixels)).mode == "RGB"


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1)])
def test_grey_floats_are_each_channel_of_a_network_of_colours(shape):
    pixels = noise(*shape).astype(np.float32) / 255
    got, view = images.seen(pixels, preprocessing((6, 8), 3, resize=16))
    np.testing.assert_array_equal(got, pixels.reshape(6, 8, 1).repeat(3, axis=2))
    assert view == images.whole_view((6, 8))
    got[:] = 0
    assert pixels.any(), "it is a copy"


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_pixels_of_many_channels_are_taken_as_they_are(channels):
    pixels = noise(6, 8, channels).astype(np.float32) / 255
    got, view = images.seen(pixels, preprocessing((6, 8), channels))
    np.testing.assert_array_equal(got, pixels)
    assert view == images.whole_view((6, 8))


FOUR = preprocessing((6, 8), 4)
GREY = preprocessing((6, 8), 1)
RGB = preprocessing((6, 8), 3)


@pytest.mark.parametrize(
    ("content", "network", "text"),
    [
        (
            encoded(noise(6, 8, 3), "PNG"),
            FOUR,
            r"4 channels, which no image file has: send a float32 array of \[6, 8, 4\]",
        ),
        (Image.new("RGBA", (8, 6)), FOUR, r"4 channels, which no image file has"),
        (noise(6, 8, 4), FOUR, r"4 channels, which no image file has"),
        (np.zeros((6, 8, 3), np.float32), FOUR, r"must have shape \[6, 8, 4\], got \[6, 8, 3\]"),
        (np.zeros((6, 8), np.float32), FOUR, r"must have shape \[6, 8, 4\], got \[6, 8\]"),
        (np.zeros((5, 8, 4), np.float32), FOUR, r"input size \[6, 8\], got \[5, 8\]"),
        (np.full((6, 8, 4), 2, np.float32), FOUR, r"finite pixels in \[0, 1\]"),
        (np.full((6, 8, 4), np.nan, np.float32), FOUR, r"finite pixels in \[0, 1\]"),
        (np.zeros((6, 8, 3), np.float32), GREY, r"must have shape \[6, 8, 1\], got \[6, 8, 3\]"),
        (
            noise(6, 8, 4),
            GREY,
            r"uint8 or float32 \(height, width, 3\) or, grey, \(height, width\), got uint8 \[6, 8, 4\]",
        ),
        (noise(6, 8, 2), RGB, r"or, grey, \(height, width\), got uint8 \[6, 8, 2\]"),
        (noise(6), RGB, r"or, grey, \(height, width\), got uint8 \[6\]"),
        (np.zeros((6, 8, 4), np.float32), RGB, r"must have shape \[6, 8, 3\] or, grey, \[6, 8\], got \[6, 8, 4\]"),
        (np.zeros((6, 7), np.float32), RGB, r"input size \[6, 8\], got \[6, 7\]"),
        (np.zeros((6, 8, 3)), RGB, r"got float64 \[6, 8, 3\]"),
        (np.zeros((6,), np.float32), RGB, r"got float32 \[6\]"),
        (np.zeros((1, 6, 8, 3), np.uint8), RGB, r"got uint8 \[1, 6, 8, 3\]"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_pixels_that_do_not_fit_the_network_are_refused(content, network, text):
    with pytest.raises(InvalidImage, match=text):
        images.seen(content, network)


@pytest.mark.parametrize("nothing", [None, 7, [[0]], {"a": 1}, object()])
def test_what_is_no_image_is_refused_by_name(nothing):
    with pytest.raises(InvalidImage, match=f"PIL image or an array, got {type(nothing).__name__}$"):
        images.read_image(nothing)


def test_a_tensor_is_refused_with_the_way_out():
    import torch

    with pytest.raises(InvalidImage, match=r"got Tensor; of a tensor give \.cpu\(\)\.numpy\(\), channels last"):
        images.read_image(torch.zeros(3, 4, 4))


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_bytes_of_any_kind_are_a_file(kind):
    data = encoded(noise(6, 8, 3), "PNG")
    assert images.read_image(kind(data)) == data


def test_a_name_that_no_file_can_have_is_an_invalid_image():
    with pytest.raises(InvalidImage, match=r"cannot read .*null"):
        images.read_image("a\0b")


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_people_see_grey_of_the_mean_of_other_channels(channels):
    pixels = noise(6, 8, channels).astype(np.float32) / 255
    picture = images.picture(pixels)
    plane = pixels if channels == 3 else pixels.mean(axis=2, dtype=np.float64, keepdims=True).repeat(3, axis=2)
    assert (picture.mode, picture.size) == ("RGB", (8, 6))
    # 0.501: rounding to a level of uint8, and that of a mean in float32 that lies half-way.
    np.testing.assert_allclose(np.asarray(picture), plane * 255, atol=0.501)


# Mean and deviation


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_there_are_as_many_channels_as_means(channels):
    assert Preprocessing(8, (8, 8), (0.5,) * channels, (1.0,) * channels).channels == channels


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"mean": (0.5,), "std": (1, 1, 1)}, "std must have a finite number for each of 1 channels"),
        ({"mean": (0.5,) * 3, "std": (1,) * 3, "channels": 1}, "mean must have a finite number for each of 1 channels"),
        ({"mean": (), "std": ()}, "for each of 0 channels"),
        ({"mean": (float("nan"),), "std": (1,)}, "mean must have a finite number"),
        ({"mean": (0.5,), "std": (0,)}, "std must be above 0"),
    ],
)
def test_mean_and_deviation_have_one_number_for_each_channel(values, text):
    with pytest.raises(InvalidOption, match=text):
        Preprocessing(8, (8, 8), **values)


# Rectangular inputs


@pytest.mark.parametrize("size", [(128, 64), (64, 128), (100, 70)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_of_just_the_inputs_size_is_seen_whole(size, channels):
    pixels = noise(*size, *([3] if channels == 3 else []))
    for content in (pixels, Image.fromarray(pixels), encoded(pixels, "PNG")):
        got, view = images.seen(content, preprocessing(size, channels))
        np.testing.assert_array_equal(got.reshape(pixels.shape), pixels)
        assert view == images.whole_view(size)


@settings(max_examples=200, deadline=None)  # sizes differ
@given(
    size=st.tuples(st.integers(8, 150), st.integers(8, 150)),
    resize=st.integers(8, 60),
    crop=st.tuples(st.integers(8, 60), st.integers(8, 60)),
)
def test_a_rectangular_view_is_torchvisions_where_that_pads_nothing(size, resize, crop):
    image = Image.fromarray(noise(*size, 3))
    resized = v2.Resize(resize, v2.InterpolationMode.BILINEAR)(image)
    assume(resized.height >= crop[0] and resized.width >= crop[1])
    got, view = images.sent_view(image, preprocessing(crop, 3, resize))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(v2.CenterCrop(crop)(resized)))
    assert view.size == crop


@settings(max_examples=100, deadline=None)  # sizes differ
@given(
    size=st.tuples(st.integers(8, 150), st.integers(8, 150)),
    resize=st.integers(4, 60),
    crop=st.tuples(st.integers(8, 60), st.integers(8, 60)),
)
def test_a_rectangular_view_is_never_padded_and_no_larger_than_needed(size, resize, crop):
    got, view = images.sent_view(Image.new("RGB", size[::-1], "white"), preprocessing(crop, 3, resize))
    assert np.asarray(got).min() == 255
    left, top, right, bottom = view.crop
    assert -1e-9 <= left < right <= size[1] + 1e-9
    assert -1e-9 <= top < bottom <= size[0] + 1e-9
    scale = crop[1] / (right - left)
    needed = max(resize / min(size), crop[0] / size[0], crop[1] / size[1])
    assert scale <= needed + 2 / min(size) + 2 / (right - left)  # two roundings to a whole pixel


def test_the_shape_of_a_turned_photo_is_that_of_what_is_seen():
    """A photo stored 64 x 128 and shown 128 x 64 covers an input of 128 x 64 without being enlarged."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = noise(64, 128, 3)
    got, view = images.seen(encoded(pixels, "PNG", exif=exif), preprocessing((128, 64), 3))
    np.testing.assert_array_equal(got, np.rot90(pixels, -1))
    assert view == InputView((128, 64), (0.0, 0.0, 64.0, 128.0), (128, 64))


def test_an_elongated_picture_is_accepted_where_the_input_is_elongated_too():
    image = Image.new("L", (20_000, 10))
    got, _ = images.sent_view(image, preprocessing((10, 20_000)))
    assert got.size == image.size
    images.check_elongation((10, 20_000), (10, 20_000))
    images.check_elongation((20_000, 10), (10, 20_000))  # it may be turned
    for size in ((10, 20_000), (20_000, 10)):
        with pytest.raises(InvalidImage, match="too elongated"):
            images.check_elongation(size, (224, 224))


# What is sent of a picture


def photo(height: int = 60, width: int = 80) -> Image.Image:
    return Image.fromarray(noise(height, width, 3))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "MPO"])  # Pillow does not keep the file of a WebP
def test_a_picture_from_a_file_is_sent_as_that_file(file_format):
    data = encoded(photo(), file_format, **({"save_all": True} if file_format == "MPO" else {}))
    picture = Image.open(io.BytesIO(data))
    assert images.as_file(picture) == data
    # It can still be read.
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(data))))


def changed_pixel(picture: Image.Image) -> None:
    picture.putpixel((0, 0), (1, 2, 3))


def turned(picture: Image.Image) -> None:
    picture.getexif()[0x0112] = 6


def smaller(picture: Image.Image) -> None:
    picture.draft("L", (20, 20))


CHANGES = {"a pixel": changed_pixel, "orientation": turned, "size": smaller}


@pytest.mark.parametrize("what", CHANGES)
def test_a_picture_that_was_changed_is_not_sent_as_its_file(what):
    data = encoded(photo(), "JPEG")
    picture, same = (Image.open(io.BytesIO(data)) for _ in range(2))
    CHANGES[what](picture)
    CHANGES[what](same)
    sent = images.decode(images.as_file(picture))
    np.testing.assert_array_equal(np.asarray(sent), np.asarray(images.picture(same)))
    assert images.digest(sent) != images.digest(images.decode(data))


def test_a_frame_that_was_chosen_is_sent_and_not_the_first():
    frames = [Image.fromarray(noise(6, 8, 3)), Image.new("RGB", (8, 6), "red")]
    picture = Image.open(io.BytesIO(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)))
    picture.seek(1)
    assert images.decode(images.as_file(picture)).getpixel((0, 0)) == (255, 0, 0)


def test_a_format_that_is_not_read_is_sent_as_another():
    data = encoded(photo(), "BMP")
    np.testing.assert_array_equal(images.decode(images.as_file(Image.open(io.BytesIO(data)))), np.asarray(photo()))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_picture_that_is_too_large_as_png_is_sent_without_loss_where_a_webp_fits(mode, monkeypatch):
    y, x = np.mgrid[:300, :400]
    shades = np.stack([x // 2 + y // 3, x * y // 700, (x - y) % 200, 255 * (x > 99)], axis=-1).astype(np.uint8)
    picture = Image.fromarray(shades).convert(mode)
    monkeypatch.setattr(images, "MAX_BYTES", len(images.png(picture)) - 1)
    sent = images.as_file(picture)
    assert sent[8:12] == b"WEBP"
    assert len(sent) <= images.MAX_BYTES
    np.testing.assert_array_equal(images.decode(sent), images.picture(picture))


def test_a_picture_that_is_too_long_for_webp_is_sent_as_jpeg(monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    assert images.as_file(Image.new("RGB", (2**14 - 1, 1), "red"))[8:12] == b"WEBP"
    assert images.as_file(Image.fromarray(noise(2**14, 1, 3)))[:2] == b"\xff\xd8"


def test_a_picture_of_which_no_form_without_loss_fits_is_sent_as_a_fine_jpeg(monkeypatch):
    y, x = np.mgrid[:1200, :1600]
    shades = np.stack([100 + 60 * np.sin(x / 100), 100 + 60 * np.cos(y / 70), (x + y) / 14], axis=-1)
    picture = Image.fromarray(shades.astype(np.uint8) + (noise(1200, 1600, 3) & 15))
    without_loss = min(len(images.png(picture)), len(encoded(picture, "WEBP", lossless=True, quality=0, method=0)))
    monkeypatch.setattr(images, "MAX_BYTES", without_loss - 1)
    sent = images.as_file(picture)
    assert sent[:2] == b"\xff\xd8"
    assert len(sent) < images.MAX_BYTES
    got, view = images.seen(sent, preprocessing((128, 64), 3))
    expected, same = images.seen(picture, preprocessing((128, 64), 3))
    assert view == same
    # What JPEG loses is about a level where a hundred pixels become one.
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_16_bits_are_never_made_8_to_be_sent(monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    np.testing.assert_array_equal(grey_of(images.as_file(Image.fromarray(LEVELS))) * 65535, LEVELS)
    sent = images.as_file(photo())
    assert sent[:2] == b"\xff\xd8", "8 bits become a JPEG"
