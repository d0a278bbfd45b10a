"""What a request asks, part by part."""

import pytest

from camserve.errors import InvalidOption
from camserve.methods import GradCam, GroupCam, Rise, ScoreCam
from camserve.parts import check_curve_steps, layer_names, make_parts
from camserve.types import Layer, ModelInfo

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
        (("early", "late"), "layer", GradCam(), "size INPUT or ORIGINAL, not LAYER"),
        (("early", "late"), "input", GroupCam(groups=9), "1..8 at this layer, got 9"),
    ],
)
def test_what_does_not_fit_is_refused(layers, size, method, text):
    with pytest.raises(InvalidOption, match=text):
        parts(method, layers=layers, size=size)


@pytest.mark.parametrize("steps", [0, -1, 4097])
def test_curves_have_a_bounded_number_of_steps(steps):
    with pytest.raises(InvalidOption, match=rf"evaluation_steps must be 1..4096, got {steps}"):
        check_curve_steps(steps)
