"""Regions of the sent image on the grid of a network's outputs: as slow sums over small squares have them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from camserve.errors import InvalidImage, InvalidOption
from camserve.finalise.maps import into_original
from camserve.finalise.regions import shares
from camserve.images import mask_file, network_view
from camserve.types import Contrast, Finer, InputView, Preprocessing, Region, Target, Text, as_target
from camserve.types.targets import is_final, split_targets

VIEW = InputView(original_size=(24, 36), crop=(6.0, 1.5, 30.0, 22.5), size=(28, 32))
GRID = (7, 8)
FINE = 12
"""Small squares along each pixel: edges of pixels, places and boxes of these tests all lie between some."""


def slow(inside, view: InputView = VIEW, grid=GRID) -> np.ndarray:
    """By how much each place counts: the mean of `inside(x, y)` over the centres of the small squares in it."""
    left, top, right, bottom = view.crop
    found = np.zeros(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            ys = np.arange(round((bottom - top) * FINE / grid[0])) + 0.5
            xs = np.arange(round((right - left) * FINE / grid[1])) + 0.5
            y0, x0 = top + i * (bottom - top) / grid[0], left + j * (right - left) / grid[1]
            found[i, j] = np.mean([[inside(x0 + x / FINE, y0 + y / FINE) for x in xs] for y in ys])
    return found


BOXES = [
    (6, 1.5, 30, 22.5),
    (9, 4.5, 12, 7.5),
    (10.25, 5.25, 10.5, 5.5),
    (0, 0, 36, 24),
    (-50, 10, 7.5, 500),
    (28.5, 20, 36, 24),
]


@pytest.mark.parametrize("box", BOXES)
def test_a_place_counts_by_the_part_of_it_that_a_box_covers(box):
    x0, y0, x1, y1 = box
    found = shares(Region(box=box), VIEW, GRID)
    expected = slow(lambda x, y: x0 <= x < x1 and y0 <= y < y1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)  # float32
    assert found.any()


@pytest.mark.parametrize("kind", ["bool", "grey", "16 bits", "floats", "picture", "file of 1 bit"])
def test_a_place_counts_by_the_mean_of_a_mask_over_it(kind):
    rng = np.random.default_rng(1)
    on = rng.random((24, 36)) < 0.3
    grey = rng.integers(0, 200, (24, 36)).astype(np.uint8)
    mask, values = {
        "bool": (on, on),
        "grey": (grey, grey / grey.max()),
        "16 bits": (grey.astype(np.uint16) * 257, grey / grey.max()),
        "floats": (on * 0.5, on),
        "picture": (Image.fromarray(grey), grey / grey.max()),
        "file of 1 bit": (png(Image.fromarray(on)), on),
    }[kind]
    found = shares(Region(mask=mask), VIEW, GRID)
    expected = slow(lambda x, y: float(values[int(y), int(x)]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 if kind == "floats" else 1e-6)  # 16 bits; float32


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_a_large_mask_is_summed_in_strips_to_the_same():
    mask = np.zeros((2100, 1300), bool)
    mask[500:1700, 200:900] = True
    view = InputView((2100, 1300), (0.0, 400.0, 1300.0, 1700.0), (64, 64))
    box = Region(box=(200, 500, 900, 1700))
    np.testing.assert_allclose(shares(Region(mask=mask), view, (9, 11)), shares(box, view, (9, 11)), atol=1e-6)


def test_a_region_and_a_map_lie_at_the_same_place_of_the_image():
    """A map of the shares, laid back into the image, is the box that they were made of, but for its soft edges."""
    picture = Image.new("RGB", (200, 120))
    _, view = network_view(picture, Preprocessing(72, (64, 64), (0.5,) * 3, (0.5,) * 3))
    box = (80, 30, 120, 90)
    laid = into_original(shares(Region(box=box), view, (64, 64)), view)
    expected = np.zeros((120, 200))
    expected[30:90, 80:120] = 1
    assert np.abs(laid - expected).sum() <= 2 * (40 + 60)  # a pixel on each side of the edge
    assert abs(laid.sum() - expected.sum()) <= 1


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Region(box=(-9, 3, -1, 5)), r"x 6\.\.30 and y 1\.5\.\.22\.5 of an image of 36 x 24 pixels; got x -9\.\.-1"),
        (Region(box=(36, 3, 40, 5)), r"lies in what the network sees: x 6\.\.30"),
        (Region(box=(31, 3, 34, 5)), "lies in what the network sees"),
        (Region(box=(10, 23, 20, 24)), "lies in what the network sees"),
        (Region(mask=np.ones((24, 35), bool)), "size of the sent image, 36 x 24 pixels; got 35 x 24"),
        (Region(mask=np.zeros((24, 36), bool)), "the mask of a region is empty"),
        (Region(mask=np.arange(36)[None] * np.ones((24, 1)) < 3), "nothing in what the network sees: x 6"),
        (Region(grid=np.ones((8, 7), bool)), "size of the network's outputs, 8 x 7 pixels; got 7 x 8"),
        (Region(grid=np.zeros((7, 8), bool)), "the grid of a region is empty"),
    ],
)
def test_a_region_that_is_nowhere_is_refused_with_what_was_allowed(region, message):
    with pytest.raises(InvalidOption, match=message):
        shares(region, VIEW, GRID)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (png(Image.new("RGB", (36, 24))), "a grey PNG file without alpha, got PNG of mode RGB"),
        (png(Image.new("LA", (36, 24))), "mode LA"),
        (png(Image.new("P", (36, 24))), "mode P"),
        (png(Image.new("L", (36, 24), 9))[:-30], "broken or truncated"),
        (b"no picture", "JPEG, PNG"),
    ],
)
def test_a_mask_that_is_no_grey_png_file_is_refused(file, message):
    with pytest.raises(InvalidImage, match=message):
        shares(Region(mask=file), VIEW, GRID)


def test_a_mask_of_another_size_is_not_decoded():
    file = png(Image.new("L", (36, 25), 9))
    with pytest.raises(InvalidOption, match="got 36 x 25"):
        shares(Region(mask=file[:-30]), VIEW, GRID)


@pytest.mark.parametrize(
    "mask", [np.ones((2, 2, 3)), np.ones((2, 2), np.int64), np.full((2, 2), 2.0), np.full((2, 2), np.nan), 5]
)
def test_what_can_be_no_mask_is_refused_at_once(mask):
    with pytest.raises(InvalidImage):
        Region(mask=mask)


@pytest.mark.parametrize(
    "box", [(1, 2, 3), (1, 2, 1, 4), (1, 4, 3, 2), (1, 2, float("nan"), 4), (1, 2, float("inf"), 4), 7, ("a", 1, 2, 3)]
)
def test_a_box_without_area_is_refused_at_once(box):
    with pytest.raises(InvalidOption, match="a region's box"):
        Region(box=box)


def test_a_region_is_one_thing_and_of_classes():
    with pytest.raises(InvalidOption, match="at most one, got box and mask"):
        Region(box=(1, 2, 3, 4), mask=b"file")
    with pytest.raises(InvalidOption, match="got zero bytes"):
        Region(mask=b"")
    with pytest.raises(InvalidOption, match="a region is of a class"):
        Region(Text("a cat"), box=(1, 2, 3, 4))


CAT, DOG = Target(label="cat"), Target(label="dog")
TEXTS = {
    "region:1,2,3,4:cat": Region(CAT, box=(1, 2, 3, 4)),
    "region:1.5,-2,1e3,4.25:7": Region(Target(index=7), box=(1.5, -2, 1000, 4.25)),
    "region:1,2,3,4": Region(box=(1, 2, 3, 4)),
    "region:1,2,3,4:top3": Region(Target(top_k=3), box=(1, 2, 3, 4)),
    "region:1,2,3,4:contrast:cat>dog": Region(Contrast(CAT, (DOG,)), box=(1, 2, 3, 4)),
    "region:1,2,3,4:finer:cat": Region(Finer(CAT), box=(1, 2, 3, 4)),
}


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_form_of_a_region_is_read_and_written(text):
    found = as_target(text)
    assert found == TEXTS[text]
    assert hash(found) == hash(TEXTS[text])
    assert as_target(found.text()) == found


def test_regions_in_a_list_keep_their_commas():
    assert split_targets("region:1,2,3,4,dog;region:1, 2,3,4:cat,dog,region:1,2,3,4:contrast:a>b,c;7") == [
        "region:1,2,3,4",
        "dog",
        "region:1, 2,3,4:cat",
        "dog",
        "region:1,2,3,4:contrast:a>b,c",
        "7",
    ]


@pytest.mark.parametrize("text", ["region:", "region:1,2,3", "region:1,2,3,x:cat", "region:mask.png:cat", "region:cat"])
def test_a_text_that_only_begins_like_a_region_is_refused_with_an_example(text):
    with pytest.raises(InvalidOption, match="region:10,20,90,80:cat"):
        as_target(text)


def test_regions_are_the_same_by_what_they_say():
    mask = np.eye(5, dtype=bool)
    assert Region(CAT, mask=mask) == Region(CAT, mask=mask_file(mask))
    assert Region(CAT, mask=mask) != Region(CAT, grid=mask)
    assert Region(CAT, mask=mask) != Region(CAT, mask=~mask)
    assert Region(CAT, box=(1, 2, 3, 4)) != Region(DOG, box=(1, 2, 3, 4))
    assert Region(CAT, mask=mask).text() != Region(CAT, mask=~mask).text()
    assert Region(CAT, grid=mask).text() == "cat"


def test_a_region_is_final_where_it_is_placed_and_of_known_classes():
    known = Target(index=3)
    assert is_final(Region(known, box=(1, 2, 3, 4)))
    assert is_final(Region(known, grid=np.eye(2, dtype=bool)))
    assert not is_final(Region(known))
    assert not is_final(Region(box=(1, 2, 3, 4)))
    assert not is_final(Region(Finer(known), box=(1, 2, 3, 4)))
