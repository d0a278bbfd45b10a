"""The catalogue of methods: defaults, ranges, cost, and what callers may write."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from camserve.errors import InvalidOption
from camserve.methods import (
    METHODS,
    Cam,
    GradCam,
    GradCamPlusPlus,
    GroupCam,
    HiresCam,
    Parameter,
    ScoreCam,
    as_method,
    parse_method,
)
from camserve.methods.__main__ import with_tables
from camserve.types import Layer

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_names():
    assert METHODS["cam"] is Cam
    assert METHODS["grad_cam_plus_plus"] is GradCamPlusPlus
    assert METHODS["hires_cam"] is HiresCam
    assert METHODS["group_cam"] is GroupCam
    assert len(set(METHODS.values())) == len(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_title_paper_and_sound_defaults(name):
    spec = parse_method(name)
    assert spec.name == name
    assert spec.title
    assert re.search(r"https://(arxiv\.org/abs/\d{4}\.\d{4,5}|doi\.org/10\.)", spec.paper)
    for parameter in spec.parameters():
        assert parameter.description.endswith(".")
        assert getattr(spec, parameter.name) == parameter.default
        assert parameter.default in parameter.choices or parameter.default >= parameter.minimum


def test_defaults_are_those_of_the_papers():
    assert GroupCam() == GroupCam(groups=32, theta=70.0, variant="paper")
    assert ScoreCam() == ScoreCam(variant="reference")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"groups": 0}, "group_cam: groups must be at least 1, got 0"),
        ({"groups": -5}, "group_cam: groups must be at least 1, got -5"),
        ({"groups": 2.5}, "group_cam: groups must be an integer, got 2.5"),
        ({"groups": "16"}, "group_cam: groups must be an integer, got '16'"),
        ({"groups": True}, "group_cam: groups must be an integer, got True"),
        ({"groups": None}, "group_cam: groups must be an integer, got None"),
        ({"theta": -0.1}, "group_cam: theta must be 0..100, got -0.1"),
        ({"theta": 100.5}, "group_cam: theta must be 0..100, got 100.5"),
        ({"theta": "high"}, "group_cam: theta must be a number, got 'high'"),
        ({"theta": [70]}, "group_cam: theta must be a number, got [70]"),
        ({"variant": "PAPER"}, "group_cam: variant must be one of paper, reference, got 'PAPER'"),
        ({"variant": ""}, "group_cam: variant must be one of paper, reference, got ''"),
        ({"variant": 1}, "group_cam: variant must be one of paper, reference, got 1"),
        ({"variant": ["paper"]}, "group_cam: variant must be one of paper, reference, got ['paper']"),
    ],
    ids=str,
)
def test_a_value_outside_its_range_is_refused_with_range_and_value(value, message):
    with pytest.raises(InvalidOption, match=f"^{re.escape(message)}$"):
        parse_method("group_cam", value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400], ids=["nan", "inf", "-inf", "10**400"])
@pytest.mark.parametrize("parameter", ["theta", "groups"])
def test_a_number_that_is_none_is_refused(parameter, value):
    if parameter == "groups" and value == 10**400:
        with pytest.raises(InvalidOption, match=r"1\.\.8 at this layer"):
            GroupCam(groups=value).queries(Layer("layer", 8, 7, 7), targets=1)
        return
    with pytest.raises(InvalidOption, match=parameter):
        parse_method("group_cam", {parameter: value})


@pytest.mark.parametrize("theta", [0, 100, 70, 33.3])
def test_theta_in_range_becomes_a_float(theta):
    assert GroupCam(theta=theta).theta == theta
    assert isinstance(GroupCam(theta=theta).theta, float)


def test_a_whole_float_is_an_integer():
    assert GroupCam(groups=16.0) == GroupCam(groups=16)
    assert isinstance(GroupCam(groups=16.0).groups, int)


def test_specs_are_frozen_and_hashable():
    assert len({GroupCam(), GroupCam(groups=32), GroupCam(groups=16)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        GroupCam().groups = 3


@pytest.mark.parametrize(
    ("spec", "targets", "queries"),
    [
        (Cam(), 3, 0),
        (GradCam(), 3, 0),
        (ScoreCam(), 1, 40),
        (ScoreCam(), 3, 40),  # its masks do not depend on the target
        (GroupCam(groups=8), 1, 8),
        (GroupCam(groups=8), 3, 24),  # its masks do
        (GroupCam(groups=40), 1, 40),
    ],
    ids=str,
)
def test_cost_in_queries_at_40_channels(spec, targets, queries):
    assert spec.queries(Layer("layer", 40, 7, 7), targets=targets) == queries


def test_more_groups_than_channels_are_refused_with_range_and_value():
    with pytest.raises(InvalidOption, match=r"group_cam: groups must be 1\.\.31 at this layer, got 32"):
        GroupCam().queries(Layer("layer", 31, 7, 7), targets=1)


def test_unknown_method_is_refused_with_the_names_that_exist():
    with pytest.raises(InvalidOption, match=r"unknown method 'gradcam'; there are cam, grad_cam, hires_cam, "):
        parse_method("gradcam")


def test_unknown_parameter_is_refused_with_the_names_that_exist():
    with pytest.raises(InvalidOption, match=r"group_cam: unknown parameter 'group'; it has groups, theta, variant"):
        parse_method("group_cam", {"group": 3})
    with pytest.raises(InvalidOption, match=r"grad_cam: unknown parameter 'groups'; it has no parameters"):
        parse_method("grad_cam", {"groups": 3})


def test_what_callers_may_pass():
    assert as_method("group_cam") == GroupCam()
    assert as_method(("group_cam", {"groups": 4})) == GroupCam(groups=4)
    assert as_method(GradCam()) == GradCam()


@given(groups=st.integers(1, 10**9), theta=st.floats(0, 100), variant=st.sampled_from(["paper", "reference"]))
def test_every_value_in_range_is_taken(groups, theta, variant):
    spec = parse_method("group_cam", {"groups": groups, "theta": theta, "variant": variant})
    assert (spec.groups, spec.theta, spec.variant) == (groups, theta, variant)


# Every parameter of every method

PARAMETERS = {
    f"{name}.{parameter.name}": (name, parameter) for name, spec in METHODS.items() for parameter in spec.parameters()
}


def refused(name: str, parameter: str, value: object, allowed: str) -> None:
    said = re.escape(f"{name}: {parameter} must be {allowed}, got {value!r}")
    with pytest.raises(InvalidOption, match=f"^{said}$"):
        parse_method(name, {parameter: value})


def beyond(parameter: Parameter) -> list[float]:
    """Just outside the range, at either end that it has."""
    step = 1 if parameter.type == "integer" else 0.25
    ends = (parameter.minimum - step, None if parameter.maximum is None else parameter.maximum + step)
    return [end for end in ends if end is not None]


@pytest.mark.parametrize("key", PARAMETERS)
def test_every_value_outside_is_refused_with_range_and_value(key):
    name, parameter = PARAMETERS[key]
    if parameter.choices:
        for value in (parameter.choices[0].upper(), "", 1, None, [parameter.choices[0]]):
            refused(name, parameter.name, value, f"one of {', '.join(parameter.choices)}")
        return
    low, high = parameter.minimum, parameter.maximum
    for value in beyond(parameter):
        refused(name, parameter.name, value, f"at least {low:g}" if high is None else f"{low:g}..{high:g}")
    kind = "an integer" if parameter.type == "integer" else "a number"
    for value in ("3", None, True, [3], math.nan if parameter.type == "integer" else "nan"):
        refused(name, parameter.name, value, kind)


@pytest.mark.parametrize("key", PARAMETERS)
def test_the_ends_of_every_range_are_taken(key):
    name, parameter = PARAMETERS[key]
    ends = parameter.choices or [end for end in (parameter.minimum, parameter.maximum) if end is not None]
    for value in ends:
        assert getattr(parse_method(name, {parameter.name: value}), parameter.name) == value


@pytest.mark.parametrize("key", [key for key, (_, parameter) in PARAMETERS.items() if parameter.type == "number"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_no_parameter_is_infinite_or_nan(key, value):
    name, parameter = PARAMETERS[key]
    with pytest.raises(InvalidOption, match=f"^{name}: {parameter.name} must be "):
        parse_method(name, {parameter.name: value})


# The page


def test_the_page_has_every_method_as_the_catalogue_has_it():
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^### (\w+)$", page, re.MULTILINE) == re.findall(r"<!-- (\w+): begin -->", page)[1:]
    assert set(re.findall(r"^### (\w+)$", page, re.MULTILINE)) == set(METHODS)
    assert with_tables(page) == page, f"run `python -m camserve.methods {PAGE}`"


def test_a_page_is_filled_from_the_catalogue():
    filled = with_tables("before\n<!-- score_cam: begin -->\nold\n<!-- score_cam: end -->\nafter\n")
    assert filled.startswith(
        "before\n<!-- score_cam: begin -->\n*Wang et al., Score-CAM, 2020*, <https://arxiv.org/abs/"
    )
    assert "| `variant` | reference | reference, paper, logit |" in filled
    assert "old" not in filled
    assert filled.endswith("|\n<!-- score_cam: end -->\nafter\n")
    assert with_tables(filled) == filled
