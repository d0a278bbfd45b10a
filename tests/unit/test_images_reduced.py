"""Large JPEGs are decoded at a reduced size where that makes hardly a difference; the view stays that of the image."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from reference.models import build
from skimage.data import coffee

from camserve import images
from camserve.images import KEPT_REDUCTION, LARGE_PIXELS, digest, sent_view
from camserve.methods import GradCam
from camserve.types import Item, Preprocessing, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network

PHOTO = Image.fromarray(coffee())  # 600 x 400
PHOTO_LEVELS = 3  # of 255: two JPEG decoders differ by 1 or 2 before anything is resized
ANY_LEVELS = 8  # as `KEPT_REDUCTION` says of noise, stripes and text


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Has small files count as large ones, which would take a tenth of a second each."""
    monkeypatch.setattr(images, "LARGE_PIXELS", 0)


def preprocessing(resize=20, crop=(18, 16), channels=3, interpolation="bicubic") -> Preprocessing:
    half = (0.5,) * channels
    return Preprocessing(resize, crop, half, half, interpolation)


def jpeg(image: Image.Image, orientation: int = 1, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, **{"quality": 90, **options})
    return file.getvalue()


def both(data: bytes, wanted: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """Returns what is seen of the whole file, and of the one decoded at a reduced size; their views are the same."""
    (whole, view), (reduced, same) = sent_view(data, wanted), sent_view(data, wanted, whole=False)
    assert same == view
    assert reduced.mode == whole.mode
    return np.asarray(whole).astype(int), np.asarray(reduced).astype(int)


def is_near(data: bytes, wanted: Preprocessing, levels: int) -> None:
    """Checks that a file is decoded at a reduced size, which changes pixels by at most some levels."""
    whole, reduced = both(data, wanted)
    assert 0 < np.abs(reduced - whole).max() <= levels
    assert abs((reduced - whole).mean()) < 0.5


@pytest.mark.parametrize("resize", [20, 12, 10, 7])  # 1/4 and 1/8 as well
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 60}])
def test_a_photo_is_seen_nearly_as_of_the_whole_file(resize, interpolation, options):
    wanted = preprocessing(resize, (resize - 1, resize - 2), interpolation=interpolation)
    is_near(jpeg(PHOTO, **options), wanted, PHOTO_LEVELS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(599, 400), (600, 393), (593, 397)])
def test_what_is_seen_is_the_same_part_though_no_side_is_a_multiple_of_the_scale(size, orientation):
    # A slope from side to side: a shift by one reduced pixel, of 4 of some 400, would show as 3 levels and more.
    y, x = np.mgrid[: size[1], : size[0]]
    slopes = np.stack([255 * x / size[0], 255 * y / size[1], 255 - 255 * x / size[0]], axis=-1)
    data = jpeg(Image.fromarray(slopes.round().astype(np.uint8)), orientation, quality=100, subsampling=0)
    whole, reduced = both(data, preprocessing(24, (24, 24)))
    np.testing.assert_allclose(reduced, whole, atol=1)
    is_near(jpeg(PHOTO.resize(size), orientation), preprocessing(), PHOTO_LEVELS)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_grey_and_cmyk_files_as_well(mode, channels):
    is_near(jpeg(PHOTO.convert(mode), 6), preprocessing(channels=channels), PHOTO_LEVELS)


@pytest.mark.parametrize("period", [1, 2, 3, 5, 8])
def test_stripes_and_noise_are_seen_alike(period):
    y, x = np.mgrid[:401, :603]
    for pixels in (x // period % 2, (x // period + y // period) % 2, np.random.default_rng(0).integers(0, 2, x.shape)):
        data = jpeg(Image.fromarray((255 * pixels).astype(np.uint8)), quality=95)
        whole, reduced = both(data, preprocessing(20, channels=1, interpolation="bilinear"))
        assert np.abs(reduced - whole).max() <= ANY_LEVELS


def test_a_stretched_image_is_reduced_by_what_its_less_shrunk_side_allows():
    is_near(jpeg(PHOTO), preprocessing((20, 75)), PHOTO_LEVELS)  # 600 of 75: just enough
    whole, reduced = both(jpeg(PHOTO), preprocessing((20, 76)))
    np.testing.assert_array_equal(reduced, whole)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (jpeg(PHOTO), preprocessing(400 // KEPT_REDUCTION // 2 + 1)),
        (jpeg(PHOTO), preprocessing(interpolation="nearest")),
        (PHOTO, preprocessing()),
        (coffee(), preprocessing()),
    ],
    ids=["not large enough", "single pixels are taken", "a picture", "an array"],
)
def test_everything_else_is_decoded_in_full(data, wanted):
    np.testing.assert_array_equal(*both(data, wanted))


@pytest.mark.parametrize(("height", "is_reduced"), [(2048, True), (2047, False)])
def test_a_file_with_fewer_pixels_is_decoded_in_full(monkeypatch, height, is_reduced):
    monkeypatch.setattr(images, "LARGE_PIXELS", LARGE_PIXELS)
    assert 2048 * 2047 < LARGE_PIXELS == 2048 * 2048
    whole, reduced = both(jpeg(PHOTO.resize((2048, height)), quality=60), preprocessing(256, (224, 224)))
    assert (not np.array_equal(reduced, whole)) == is_reduced


def test_other_files_are_decoded_in_full():
    file = io.BytesIO()
    PHOTO.save(file, "WEBP")
    np.testing.assert_array_equal(*both(file.getvalue(), preprocessing()))


# In a worker


DATA = jpeg(PHOTO)
SMALL = Preprocessing(20, (16, 16), (0.5,) * 3, (0.5,) * 3)


def executor() -> Executor:
    return Executor(Network(build("perceptron", 2, torch.float64), preprocessing=SMALL), 2**24)


def sums(worker: Executor, precision, image: bytes | None = DATA) -> np.ndarray:
    item = Item(image, (Target(index=1),), (Task(0, GradCam(), 0, 0),), precision=precision, digest=digest(DATA))
    (outcome,) = worker.execute([item]).outcomes
    return outcome.partials[0].sums


def test_exact_is_made_of_the_whole_file_and_auto_of_the_reduced_one_whatever_was_asked_before():
    whole, _ = sent_view(DATA, SMALL)
    exact, auto = sums(executor(), "exact"), sums(executor(), "auto")
    assert not np.array_equal(exact, auto)
    np.testing.assert_allclose(auto, exact, atol=0.02 * np.abs(exact).max())
    np.testing.assert_array_equal(sums(executor(), "exact", np.asarray(whole)), exact)
    worker = executor()
    for precision, expected in (("auto", auto), ("exact", exact), ("auto", auto), ("exact", exact)):
        np.testing.assert_array_equal(sums(worker, precision), expected)
    for precision, expected in (("auto", auto), ("exact", exact)):  # of the memory alone
        np.testing.assert_array_equal(sums(worker, precision, None), expected)
