"""Overlays, colours and contact sheets. Run as a program, this rebuilds the colour tables."""

from importlib import resources

import matplotlib
import numpy as np
import pytest
from PIL import Image

from camserve.errors import InvalidOption
from camserve.finalise.render import DIVERGING, Row, background, grey_levels, overlay, sheet
from camserve.types import COLORMAPS, InputView

TABLES = resources.files("camserve.finalise").joinpath("colormaps.png")


def tables() -> np.ndarray:
    """(maps, 256, 3) uint8, from matplotlib."""
    return np.stack([matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3] for name in (*COLORMAPS, DIVERGING)])


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_colour_tables_are_those_of_matplotlib():
    with TABLES.open("rb") as file, Image.open(file) as image:
        np.testing.assert_array_equal(np.asarray(image), tables())


@pytest.mark.parametrize("colormap", COLORMAPS)
def test_opaque_overlay_is_the_colormap(colormap):
    array = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    drawn = overlay(photo(16, 16), array, colormap=colormap, opacity=1)
    np.testing.assert_array_equal(np.asarray(drawn).reshape(256, 3), tables()[COLORMAPS.index(colormap)])


@pytest.mark.parametrize("opacity", [0, 0.2, 0.5, 1])
def test_opacity_weighs_the_colours(opacity):
    image, array = photo(8, 12), np.random.default_rng(1).random((8, 12), np.float32)
    colours = tables()[0][grey_levels(array)]
    expected = (1 - opacity) * np.asarray(image) + opacity * colours
    drawn = np.asarray(overlay(image, array, opacity=opacity))
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=1)  # Pillow cuts the fraction off


def test_map_is_resized_to_the_image():
    array = np.zeros((4, 4), np.float32)
    array[:, 2:] = 1
    drawn = np.asarray(overlay(photo(64, 96), array, opacity=1))
    assert drawn.shape == (64, 96, 3)
    np.testing.assert_array_equal(drawn[:, :24], np.broadcast_to(tables()[0][0], (64, 24, 3)))
    np.testing.assert_array_equal(drawn[:, -24:], np.broadcast_to(tables()[0][255], (64, 24, 3)))


def test_image_of_another_mode_is_drawn_on():
    assert overlay(photo(8, 8).convert("L"), np.zeros((8, 8), np.float32)).mode == "RGB"


def test_drawing_leaves_image_and_map_alone():
    image, array = photo(8, 8), np.random.default_rng(1).random((8, 8), np.float32)
    pixels, values = image.tobytes(), array.copy()
    overlay(image, array)
    assert image.tobytes() == pixels
    np.testing.assert_array_equal(array, values)


@pytest.mark.parametrize("opacity", [-0.01, 1.01, float("nan")])
def test_opacity_out_of_range(opacity):
    with pytest.raises(InvalidOption, match=r"opacity must be 0\.\.1, got"):
        overlay(photo(4, 4), np.zeros((4, 4), np.float32), opacity=opacity)


def test_unknown_colormap_names_those_that_exist():
    with pytest.raises(InvalidOption, match=f"one of {', '.join(COLORMAPS)}, got 'pink'"):
        overlay(photo(4, 4), np.zeros((4, 4), np.float32), colormap="pink")


def test_background_is_what_the_map_lies_on():
    image = photo(40, 60)
    view = InputView(original_size=(40, 60), crop=(10.0, 0.0, 50.0, 40.0), size=(40, 40))
    assert background(image, view, "layer") is None
    assert background(image, view, "original") is image
    seen = background(image, view, "input")
    assert seen is not None
    assert seen.tobytes() == image.crop((10, 0, 50, 40)).tobytes()


def test_background_of_a_smaller_view_is_resized():
    view = InputView(original_size=(40, 60), crop=(10.5, 0.0, 50.5, 40.0), size=(20, 20))
    seen = background(photo(40, 60), view, "input")
    assert seen is not None
    assert seen.size == (20, 20)


def test_edges_a_hair_beyond_the_image_are_forgiven():
    view = InputView(original_size=(40, 60), crop=(-1e-6, -1e-6, 60.00001, 40.00001), size=(20, 30))
    seen = background(photo(40, 60), view, "input")
    assert seen is not None
    assert seen.size == (30, 20)


def test_background_of_an_unresized_image_is_that_image():
    image = photo(20, 30)
    view = InputView(original_size=(20, 30), crop=(0.0, 0.0, 30.0, 20.0), size=(20, 30))
    assert background(image, view, "input") is image


def cell(picture: Image.Image, column: int) -> np.ndarray:
    """The middle of a cell, 100 pixels wide, of a sheet with one row."""
    left, bottom = 12 + column * 112, picture.height - 12
    return np.asarray(picture)[bottom - 60 : bottom - 40, left + 40 : left + 60]


def test_sheet_puts_images_side_by_side():
    red, blue = Image.new("RGB", (50, 50), "red"), Image.new("RGB", (200, 100), "blue")
    picture = sheet(["Photo", "Grad-CAM"], [Row("a cat", (red, blue))], cell_px=100)
    assert picture.width == 12 + 2 * 112
    np.testing.assert_array_equal(cell(picture, 0), np.full((20, 20, 3), (255, 0, 0)))
    np.testing.assert_array_equal(cell(picture, 1), np.full((20, 20, 3), (0, 0, 255)))


def test_sheet_keeps_proportions():
    wide = Image.new("RGB", (200, 50), "blue")
    picture = np.asarray(sheet([""], [Row("", (wide,))], cell_px=100))
    blue = (picture == (0, 0, 255)).all(axis=2)
    assert (blue.any(axis=0).sum(), blue.any(axis=1).sum()) == (100, 25)


def test_sheet_writes_titles_and_captions():
    def ink(title: str, caption: str) -> int:
        white = Image.new("RGB", (10, 10), "white")
        return int((np.asarray(sheet([title], [Row(caption, (white,))])) < 128).sum())

    assert ink("", "") == 0
    assert ink("Grad-CAM", "") > 100
    assert ink("", "tiger cat") > 100


def test_sheet_needs_an_image_for_each_column():
    with pytest.raises(ValueError, match="zip"):
        sheet(["Photo", "Grad-CAM"], [Row("a cat", (photo(8, 8),))])


if __name__ == "__main__":
    Image.fromarray(tables()).save(str(TABLES), optimize=True)
