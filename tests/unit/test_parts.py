"""What a request asks, part by part."""

import pytest

from camserve.errors import InvalidOption
from camserve.methods import GradCam, GroupCam, Rise, ScoreCam, SmoothGrad, SmoothGradCamPlusPlus, SsCam
from camserve.methods.work import Work
from camserve.types import Layer, ModelInfo
from camserve.types.parts import layer_names, make_parts

EARLY, LATE = Layer("early", 8, 20, 30), Layer("late", 64, 5, 7)
INFO = ModelInfo("m", "1", ("a", "b"), (40, 60), (EARLY, LATE), "late")


def parts(*methods, layers=("early", "late"), size="input"):
    return make_parts(INFO, methods, layers, "mean", size)


def test_every_method_has_a_part_at_every_layer_that_matters_to_it():
    made = parts(GradCam(), Rise(masks=9), ScoreCam())
    found = [(part.method.name, part.layer.name) for part in made]
    assert found == [
        ("grad_cam", "early"),
        ("grad_cam", "late"),
        ("rise", "early"),
        ("score_cam", "early"),
        ("score_cam", "late"),
    ]
    assert [list(positions) for _, positions in made.positions()] == [[0, 1], [2], [3, 4]]
    assert len(made) == 5
    assert [part.queries(3) for part in made] == [0, 0, 9, 8, 64]
    assert [part.sums_size(INFO.input_size) for part in made] == [(20, 30), (5, 7), (40, 60), (20, 30), (5, 7)]


def test_a_part_says_what_a_worker_returns():
    """Sums and context, as float32, for three targets."""
    made = parts(SmoothGrad(), SsCam(samples=2), SmoothGradCamPlusPlus(), GradCam(), layers=("early",))
    assert [part.sums_shape(INFO.input_size, 3) for part in made] == [
        (3, 3, 40, 60),
        (4, 8),
        (3, 3, 8, 20, 30),
        (3, 20, 30),
    ]
    assert [part.context_shape() for part in made] == [None, (8, 20, 30), (8, 20, 30), None]
    sizes = [3 * 3 * 40 * 60, 4 * 8 + 8 * 20 * 30, 3 * 3 * 8 * 20 * 30 + 8 * 20 * 30, 3 * 20 * 30]
    assert [part.result_bytes(INFO.input_size, 3) for part in made] == [4 * size for size in sizes]
    assert [part.sums_size(INFO.input_size) for part in made] == [(40, 60), (20, 30), (20, 30), (20, 30)]
    assert [part.work(3) for part in made] == [
        Work("pixel_gradient", 75),
        Work("masked_forward", 16),
        Work("layer_gradient", 75),
        Work("layer_gradient", 3),
    ]


def test_no_name_is_the_default_layer():
    assert [part.layer for part in parts(GradCam(), layers=())] == [LATE]
    assert layer_names("") == () == layer_names(("",))
    assert layer_names("early") == ("early",)
    assert layer_names(["early", "late"]) == ("early", "late")


@pytest.mark.parametrize(
    ("layers", "size", "method", "text"),
    [
        (("early", "middle"), "input", GradCam(), "unknown layer 'middle'"),
        (("early", "early"), "input", GradCam(), "each may come once, got early, early"),
        (("early", "late"), "layer", GradCam(), "size input or original, not layer"),
        (("early", "late"), "input", GroupCam(groups=9), "1..8 at this layer, got 9"),
    ],
)
def test_what_does_not_fit_is_refused(layers, size, method, text):
    with pytest.raises(InvalidOption, match=text):
        parts(method, layers=layers, size=size)
