"""What a map is delivered as, and what is read back."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from camserve.errors import InvalidOption
from camserve.finalise.encode import ARRAYS, decode, encode
from camserve.finalise.render import overlay
from camserve.methods import GradCam
from camserve.types import ENCODINGS, Prediction, SaliencyMap

SHAPE = (9, 13)
# Half a step of each encoding: float16 has 11 significant bits below 1.
TOLERANCE = {"float32": 0, "float16": 2**-12, "uint8": 0.5 / 255 + 1e-7, "png": 0.5 / 255 + 1e-7}


@pytest.fixture
def saliency() -> SaliencyMap:
    array = np.random.default_rng(0).random(SHAPE, np.float32)
    array.flat[:2] = 0, 1
    return SaliencyMap(GradCam(), Prediction(1, "one", 0.5), ("layer",), array, (0.0, 1.0), False, True)


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (*SHAPE, 3), np.uint8))


@pytest.mark.parametrize("encoding", ARRAYS)
def test_a_map_comes_back(saliency, encoding):
    array = decode(encode(saliency, encoding), encoding, SHAPE)
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, saliency.array, rtol=0, atol=TOLERANCE[encoding])
    assert (array.min(), array.max()) == (0, 1)


@pytest.mark.parametrize(("encoding", "size"), [("float32", 4), ("float16", 2), ("uint8", 1)])
def test_raw_encodings_are_little_endian_rows(saliency, encoding, size):
    data = encode(saliency, encoding)
    assert len(data) == size * SHAPE[0] * SHAPE[1]
    if encoding == "float32":
        np.testing.assert_array_equal(np.frombuffer(data, "<f4").reshape(SHAPE), saliency.array)


def test_uint8_and_png_are_rounded_alike(saliency):
    expected = np.round(255 * saliency.array.astype(np.float64)).astype(np.uint8)
    with Image.open(io.BytesIO(encode(saliency, "png"))) as image:
        assert (image.format, image.mode) == ("PNG", "L")
        np.testing.assert_array_equal(np.asarray(image), expected)
    assert encode(saliency, "uint8") == expected.tobytes()


@pytest.mark.parametrize(("encoding", "kind"), [("overlay_png", "PNG"), ("overlay_jpeg", "JPEG")])
def test_overlays_are_files(saliency, photo, encoding, kind):
    with Image.open(io.BytesIO(encode(replace(saliency, lies_on=lambda: photo), encoding, "magma", 0.25))) as image:
        assert image.format == kind
        drawn = overlay(photo, saliency.array, colormap="magma", opacity=0.25)
        if kind == "PNG":
            assert image.tobytes() == drawn.tobytes()
        assert image.size == drawn.size


@pytest.mark.parametrize("encoding", ["overlay_png", "overlay_jpeg"])
def test_overlay_needs_an_image(saliency, encoding):
    with pytest.raises(InvalidOption, match="input or original"):
        encode(saliency, encoding)


def test_unknown_encoding_names_those_that_exist(saliency):
    with pytest.raises(InvalidOption, match=f"{', '.join(ENCODINGS)}, got 'gif'"):
        encode(saliency, "gif")


def test_overlays_cannot_be_read_back():
    with pytest.raises(InvalidOption, match="not from 'overlay_png'"):
        decode(b"", "overlay_png", SHAPE)


@pytest.mark.parametrize("encoding", ["float32", "float16", "uint8"])
def test_missing_bytes_are_noticed(saliency, encoding):
    with pytest.raises(ValueError, match=f"a {encoding} map of shape"):
        decode(encode(saliency, encoding)[:-1], encoding, SHAPE)


def test_png_of_another_shape_is_noticed(saliency):
    with pytest.raises(ValueError, match="announced"):
        decode(encode(saliency, "png"), "png", (3, 3))


@pytest.mark.parametrize("data", [b"", b"nonsense"])
def test_broken_png_is_noticed(data):
    with pytest.raises(ValueError, match="not a PNG map"):
        decode(data, "png", SHAPE)


def test_truncated_png_is_noticed(saliency):
    with pytest.raises(ValueError, match="not a PNG map"):
        decode(encode(saliency, "png")[:-40], "png", SHAPE)
