"""What explanations show of themselves in notebooks."""

from __future__ import annotations

import base64
import builtins
import io
import re
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from camserve.errors import Internal, Unsupported
from camserve.finalise.render import overlay
from camserve.methods import GradCam, GroupCam
from camserve.notebook import MOST_MAPS, live, live_async, picture
from camserve.types import Cost, Explanation, Faithfulness, InputView, Prediction, Progress, SaliencyMap

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
RAMP = np.linspace(0, 1, 40 * 60, dtype=np.float32).reshape(40, 60)
TABBY = Prediction(281, "tabby <b> & co", probability=0.5)


def saliency(**changes) -> SaliencyMap:
    values = {
        "method": GradCam(),
        "target": TABBY,
        "layers": ("a",),
        "array": RAMP,
        "value_range": (0.0, 1.0),
        "degenerate": False,
        "complete": True,
        "lies_on": lambda: PHOTO,
        "target_text": "tabby <b> & co",
    }
    return SaliencyMap(**(values | changes))


def explanation(*maps: SaliencyMap) -> Explanation:
    view = InputView((40, 60), (0, 0, 60, 40), (40, 60))
    cost = Cost(34, {"forward": 0.25, "queries": 1.0}, 2, "exact", "worker")
    return Explanation("lite0", "1.0", (TABBY,), maps, view, cost)


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


def test_a_map_shows_its_overlay():
    assert np.array_equal(np.asarray(opened(saliency()._repr_png_())), np.asarray(overlay(PHOTO, RAMP)))


def test_a_map_that_lies_on_no_image_shows_its_cells_enlarged():
    cells = np.array([[0, 0.5], [1, 0.25]], np.float32)
    found = np.asarray(picture(saliency(array=cells, lies_on=None)))
    black = Image.new("RGB", (2, 2))
    colours = np.asarray(overlay(black, cells, opacity=1.0))
    assert found.shape == (224, 224, 3)
    assert np.array_equal(found[::112, ::112], colours)
    assert np.array_equal(found[111::112, 111::112], colours), "no cell runs into the next"
    signed = np.asarray(picture(saliency(array=2 * cells - 1, lies_on=None, signed=True)))
    assert np.array_equal(signed[::112, ::112], np.asarray(overlay(black, 2 * cells - 1, opacity=1.0, signed=True)))


def test_a_large_picture_is_made_smaller():
    large = Image.new("RGB", (3000, 1500))
    assert opened(saliency(lies_on=lambda: large)._repr_png_()).size == (640, 320)


def test_the_html_of_a_map_says_what_it_is_and_what_is_missing():
    text = saliency(degenerate=True, complete=False, fraction=0.25)._repr_html_()
    assert "<b>Grad-CAM</b><br>tabby &lt;b&gt; &amp; co 50.0%" in text, "no label becomes markup"
    assert "no evidence" in text
    assert "25% of the masked queries" in text
    assert "<b> &" not in text
    (data,) = re.findall("base64,([A-Za-z0-9+/=]+)", text)
    assert opened(base64.b64decode(data)).size == PHOTO.size
    curves = Faithfulness("rise", np.array([1, 0.5]), np.array([0, 1.0]))
    assert "insertion 0.500, deletion 0.750" in saliency(faithfulness=curves)._repr_html_()


def test_the_target_is_said_where_it_is_no_class():
    text = saliency(target_text="contrast:tabby>lynx", score=0.125)._repr_html_()
    assert "contrast:tabby&gt;lynx (0.125)" in text


def test_an_explanation_shows_predictions_maps_and_what_they_took():
    text = explanation(saliency(), saliency(method=GroupCam()))._repr_html_()
    assert "lite0 1.0" in text
    assert "34 masked queries, 1.25 s, exact" in text
    assert text.count("<figure") == 2
    many = explanation(*[saliency()] * (MOST_MAPS + 3))._repr_html_()
    assert many.count("<figure") == MOST_MAPS
    assert "and 3 more maps" in many


def test_a_sheet_has_a_row_for_each_target_and_a_column_for_each_method():
    other = replace(TABBY, index=282, label="tiger")
    two = [
        saliency(method=method, target=target, target_text=target.label)
        for method in (GradCam(), GroupCam())
        for target in (TABBY, other)
    ]
    one, four = (opened(explanation(*maps)._repr_png_()).size for maps in (two[:1], two))
    assert four[0] - one[0] == 320 + 12
    assert four[1] - one[1] > 320
    assert explanation()._repr_png_() is None, "predictions alone are no picture"


def test_progress_shows_how_far_it_is():
    text = Progress(3, 8, (TABBY,), (saliency(),))._repr_html_()
    assert '<progress max="8" value="3">' in text
    assert "3 of 8 masked queries" in text
    assert text.count("<figure") == 1
    assert '<progress max="1" value="0">' in Progress(0, 0, ())._repr_html_(), "0 of 0 is a bar as well"


def test_plot_draws_rows_of_targets_and_columns_of_methods():
    import matplotlib

    matplotlib.use("Agg")
    axes = explanation(saliency(), saliency(method=GroupCam())).plot()
    assert axes.shape == (1, 3)
    shown = [cell.get_images()[0].get_array() for cell in axes[0]]
    assert np.array_equal(shown[0], np.asarray(PHOTO))
    assert np.array_equal(shown[1], np.asarray(overlay(PHOTO, RAMP)))
    assert [cell.get_title() for cell in axes[0]] == ["tabby <b> & co 50.0%", "Grad-CAM", "Group-CAM"]
    (alone,) = explanation(saliency(lies_on=None)).plot()
    assert not alone[0].get_images(), "there is no image to draw"
    with pytest.raises(Unsupported, match="no map"):
        explanation().plot()


def without(monkeypatch, package: str) -> None:
    """Has Python find no such package."""
    real = builtins.__import__

    def found(name, *arguments, **keywords):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", found)


@pytest.mark.parametrize("package", ["matplotlib", "IPython"])
def test_a_package_that_is_missing_is_named(monkeypatch, package):
    without(monkeypatch, package)
    with pytest.raises(Unsupported, match=package):
        explanation(saliency()).plot() if package == "matplotlib" else live([explanation()])


class Cell:
    """A stand-in for `IPython.display` that notes what is shown."""

    def __init__(self, monkeypatch) -> None:
        self.shown = []
        module = ModuleType("IPython.display")
        module.display = self.display
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=module))
        monkeypatch.setitem(sys.modules, "IPython.display", module)

    def display(self, value, display_id):
        assert display_id is True
        self.shown.append(("new", value))
        return SimpleNamespace(update=lambda later: self.shown.append(("in its place", later)))


async def test_live_shows_news_in_place_of_older_news_and_returns_the_explanation(monkeypatch):
    cell, first, last = Cell(monkeypatch), Progress(0, 8, ()), explanation()
    assert live(iter([first, last])) is last
    assert cell.shown == [("new", first), ("in its place", last)]

    async def news():
        yield first
        yield last

    cell.shown.clear()
    assert await live_async(news()) is last
    assert cell.shown == [("new", first), ("in its place", last)]
    with pytest.raises(Internal):
        live([first])
