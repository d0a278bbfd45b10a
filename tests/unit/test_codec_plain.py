"""What plain TorchServe clients send becomes our request, and an explanation the JSON that they get; no model."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_codec_oip import ANSWER

from camserve.codecs import plain, texts
from camserve.codecs.plain import FORMATS, OPTIONS, decode, encode, encode_error
from camserve.errors import CamserveError, InvalidImage, InvalidInput, InvalidOption, Unsupported
from camserve.finalise.encode import decode as read_map
from camserve.methods import METHODS, Auto, Cam, GradCam, GroupCam, ScoreCam, parse_method
from camserve.types import AnyTarget, BoxOptions, Target, Text
from camserve.types.request import ExplainRequest, OutputOptions, RequestLimits

PHOTO = b"\x89PNG and so on"


def asked(**fields: Any) -> ExplainRequest:
    return decode({"data": PHOTO, **fields}).request


def as_json(**options: Any) -> ExplainRequest:
    return asked(options=json.dumps(options).encode())


def fields_of(request: ExplainRequest) -> dict[str, Any]:
    return {name: value for name, value in vars(request).items() if name != "image"}


@pytest.mark.parametrize("key", ["data", "body"])
def test_a_photo_alone_is_grad_cam_as_png(key: str):
    found = decode({key: bytearray(PHOTO)})
    assert (found.request.image, found.format) == (PHOTO, "png")
    assert type(found.request.image) is bytes
    assert fields_of(found.request) == fields_of(ExplainRequest(PHOTO, output=OutputOptions(encoding="png")))


FORM = {
    "method": b"group_cam",
    "groups": b"8",
    "theta": bytearray(b"62.5"),
    "variant": "paper",
    "target": b"281, tiger cat,top3",
    "text": b"which is left?",
    "layer": b"stem, features",
    "fusion": b"max",
    "size": b"original",
    "signed": b"true",
    "boxes": b"0.25",
    "precision": b"bfloat16",
    "top_predictions": b"7",
    "evaluate": b"true",
    "evaluation_steps": b"9",
    "version": b"1.0",
    "format": b"overlay",
}
OBJECT = {
    "methods": [{"name": "group_cam", "groups": 8, "theta": 62.5, "variant": "paper"}],
    "targets": [281, "tiger cat", "top3"],
    "text": "which is left?",
    "layers": ["stem", "features"],
    "fusion": "max",
    "size": "original",
    "signed": True,
    "boxes": 0.25,
    "precision": "bfloat16",
    "top_predictions": 7,
    "evaluate": True,
    "evaluation_steps": 9,
    "version": "1.0",
    "format": "overlay",
}


@pytest.mark.parametrize("entry", [FORM, {"options": json.dumps(OBJECT).encode()}, {"options": OBJECT}])
def test_every_option_reaches_the_request(entry: dict[str, Any]):
    default = ExplainRequest(b"")
    assert fields_of(asked(**entry)) == {
        "methods": (GroupCam(groups=8, theta=62.5, variant="paper"),),
        "targets": (Target(index=281), Target(label="tiger cat"), Target(top_k=3)),
        "model": "",
        "version": "1.0",
        "evidence": False,  # a record is the gateway's
        "text": "which is left?",
        "layers": ("stem", "features"),
        "fusion": "max",
        "output": OutputOptions(size="original", encoding="overlay_png", boxes=BoxOptions(0.25), signed=True),
        "top_predictions": 7,
        "precision": "bfloat16",
        "evaluate": True,
        "evaluation_steps": 9,
        "priority": default.priority,
        "allow_partial": default.allow_partial,
        "stream": default.stream,
    }


def test_the_tests_above_say_every_option():
    assert {*FORM, *OBJECT} - {"groups", "theta", "variant", "format"} == set(OPTIONS)
    assert set(OPTIONS.values()) == {*texts.FIELDS, *texts.LISTS} - {"priority", "allow_partial"}


def test_the_table_of_the_module_has_every_option_and_every_format():
    table = str(plain.__doc__).split("`options`:")[1]
    for name in [*OPTIONS, "format", *FORMATS]:
        assert re.search(rf"\b{name}\b", table), name


def test_no_parameter_of_a_method_is_named_like_an_option():
    parameters = {parameter.name for spec in METHODS.values() for parameter in spec.parameters()}
    assert not parameters & {*OPTIONS, "format", "options", "data", "body", "name", "camserve"}


@pytest.mark.parametrize(
    ("options", "methods"),
    [
        ({"method": "group-cam"}, (GroupCam(),)),
        ({"method": "group-cam", "groups": "4"}, (GroupCam(groups=4),)),
        ({"method": "group_cam:groups=4,theta=50"}, (GroupCam(groups=4, theta=50),)),
        ({"method": "cam; score_cam auto"}, (Cam(), ScoreCam(), Auto())),
        ({"methods": "cam score_cam"}, (Cam(), ScoreCam())),
        ({"methods": ["cam", "group_cam:groups=4", {"name": "score_cam"}]}, (Cam(), GroupCam(groups=4), ScoreCam())),
        ({"methods": [{"name": "group_cam", "groups": "4"}]}, (GroupCam(groups=4),)),
        ({"methods": []}, (GradCam(),)),
        ({"method": ""}, (GradCam(),)),
    ],
)
def test_methods_are_a_text_or_a_list(options: dict[str, Any], methods: tuple[Any, ...]):
    assert as_json(**options).methods == methods
    if all(isinstance(value, str) for value in options.values()):
        assert asked(**{key: value.encode() for key, value in options.items()}).methods == methods


@pytest.mark.parametrize(
    ("value", "targets"),
    [
        (281, (Target(index=281),)),
        ("281", (Target(index=281),)),
        ("²", (Target(label="²"),)),
        ("top²", (Target(label="top²"),)),
        ("٣", (Target(label="٣"),)),
        ("top3, ,lynx", (Target(top_k=3), Target(label="lynx"))),
        (["tabby, tabby cat", " 7 "], (Target(label="tabby, tabby cat"), Target(index=7))),
        ("7;text:a cat, asleep; lynx", (Target(index=7), Text("a cat, asleep"), Target(label="lynx"))),
        (-1, (Target(index=-1),)),
        ("", ()),
        ([], ()),
    ],
)
def test_targets_are_a_number_a_text_or_a_list(value: Any, targets: tuple[AnyTarget, ...]):
    assert as_json(target=value).targets == as_json(targets=value).targets == targets
    if isinstance(value, str):
        assert asked(target=value.encode()).targets == targets


def test_options_of_the_json_object_win_over_form_fields():
    assert asked(size=b"layer", options=b'{"size": "original"}').output.size == "original"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"data": "text"}, "send an image file as the request's body, or under the key 'data'"),
        ({"data": {"a": 1}}, "send an image file"),
        ({"options": b"[1"}, "options must be a JSON object: "),
        ({"options": b"[1]"}, r"options must be a JSON object, got \[1\]"),
        ({"options": 3}, "options must be a JSON object, got 3"),
        ({"options": b"[" * 200_000}, "options must be a JSON object: "),
        ({"size": b"\xff"}, "options must be UTF-8 text"),
        ({"format": b"gif"}, "format must be one of png, overlay, float, none, got 'gif'"),
        ({"options": {"format": ["png"]}}, r"format must be one of png, overlay, float, none, got \['png'\]"),
        (
            {"colour": b"red"},
            "unknown option 'colour'; there are method, methods, target, targets, text, layer, layers, fusion, size, "
            "signed, boxes, precision, top_predictions, evaluate, evaluation_steps, version, format, and the "
            "parameters of the method",
        ),
        ({"priority": b"batch"}, "unknown option 'priority'"),
        ({"method": b"cam score_cam", "groups": b"4"}, "groups stands beside a single method; here write NAME:KEY"),
        ({"method": b"group_cam:theta=3", "groups": b"4"}, "groups stands beside a single method"),
        ({"methods": b"group_cam", "groups": b"4"}, "groups stands beside a single method"),
        ({"method": b"", "groups": b"4"}, "groups stands beside a single method"),
        ({"method": b"cam", "methods": b"cam"}, "say method or methods, not both"),
        ({"target": b"1", "targets": b"1"}, "say target or targets, not both"),
        ({"layer": b"a", "layers": b"b"}, "say layer or layers, not both"),
        ({"options": {"method": 3}}, "method must be a text, got 3"),
        ({"options": {"method": 3, "groups": 4}}, "method must be a text, got 3"),
        (
            {"options": {"methods": [3]}},
            "methods: a method is a text, or an object with its name and parameters, got 3",
        ),
        ({"options": {"methods": [{"groups": 3}]}}, "methods: a method is a text, or an object with its name"),
        ({"options": {"methods": [{"name": ["cam"]}]}}, "methods: a method is a text, or an object with its name"),
        ({"options": {"targets": [1.5]}}, r"targets: a target is a class index, a text, or an object .*; got 1\.5"),
        ({"options": {"target": True}}, "target: a target is a class index, a text, or an object .*; got True"),
        ({"options": {"target": None}}, "target: a target is a class index, a text, or an object .*; got nothing"),
        ({"options": {"targets": {"index": 3, "label": "cup"}}}, "targets: a target is a class index"),
        ({"options": {"layer": 4}}, "layer must be a text, got 4"),
        ({"options": {"layers": ["a", None]}}, "layers must be a text, got nothing"),
        ({"boxes": b"large"}, "boxes must be true, false or a threshold, perhaps followed by all, got 'large'"),
        ({"options": {"boxes": [0.5]}}, r"boxes must be true, false or a threshold, perhaps followed by all, got \["),
        ({"top_predictions": "²".encode()}, "top_predictions must be a whole number, got '²'"),
        ({"top_predictions": b"many"}, "top_predictions must be a whole number, got 'many'"),
        ({"options": {"top_predictions": 2.0}}, r"top_predictions must be a whole number, got 2\.0"),
        ({"evaluate": b"yes"}, "evaluate must be true or false, got 'yes'"),
        ({"evaluation_steps": b"1" * 19}, "evaluation_steps must be a whole number"),
        ({"options": {"version": 1}}, "version must be a text, got 1"),
    ],
)
def test_an_option_of_another_form_is_refused_with_what_is_allowed(entry: dict[str, Any], message: str):
    with pytest.raises(InvalidInput, match=message) as caught:
        asked(**entry)
    assert isinstance(caught.value, (InvalidOption, InvalidImage))


def test_an_entry_without_image_is_refused():
    with pytest.raises(InvalidImage, match="send an image file"):
        decode({"method": b"cam"})


@pytest.mark.parametrize(
    ("options", "made"),
    [
        ({"method": "grad_cam_9"}, lambda: parse_method("grad_cam_9")),
        ({"method": "grad_cam_9", "groups": 3}, lambda: parse_method("grad_cam_9")),
        ({"groups": 4}, lambda: parse_method("grad_cam", {"groups": 4})),
        ({"method": "group_cam", "theta": "101"}, lambda: GroupCam(theta=101)),
        ({"method": "group_cam", "groups": "²"}, lambda: GroupCam(groups="²")),
        ({"method": "group_cam", "groups": [1]}, lambda: GroupCam(groups=[1])),
        ({"method": "group_cam", "groups": True}, lambda: GroupCam(groups=True)),
        ({"method": "group_cam", "variant": {"a": 1}}, lambda: GroupCam(variant={"a": 1})),
        ({"methods": [{"name": "group_cam", "groups": 0}]}, lambda: GroupCam(groups=0)),
        ({"methods": [{"name": "cam", "size": 1}]}, lambda: parse_method("cam", {"size": 1})),
        ({"target": "top0"}, lambda: Target(top_k=0)),
        ({"fusion": "sum"}, lambda: ExplainRequest(b"", fusion="sum")),
        ({"fusion": ["max"]}, lambda: ExplainRequest(b"", fusion=["max"])),
        ({"size": "huge"}, lambda: OutputOptions(size="huge")),
        ({"size": {"a": 1}}, lambda: OutputOptions(size={"a": 1})),
        ({"size": None}, lambda: OutputOptions(size=None)),
        ({"size": "layer", "format": "overlay"}, lambda: OutputOptions(size="layer", encoding="overlay_png")),
        ({"boxes": "1.5"}, lambda: BoxOptions(1.5)),
        ({"boxes": float("nan")}, lambda: BoxOptions(float("nan"))),
        ({"precision": "int8"}, lambda: ExplainRequest(b"", precision="int8")),
        ({"top_predictions": "-1"}, lambda: ExplainRequest(b"", top_predictions=-1)),
        ({"evaluation_steps": 0}, lambda: ExplainRequest(b"", evaluation_steps=0)),
        ({"evaluation_steps": "5000"}, lambda: ExplainRequest(b"", evaluation_steps=5000)),
    ],
)
def test_a_value_is_refused_in_the_words_of_the_type_that_it_belongs_to(options: dict[str, Any], made):
    with pytest.raises(InvalidOption) as expected:
        made()
    with pytest.raises(InvalidOption) as found:
        as_json(**options)
    assert str(found.value) == str(expected.value)


RED = Image.new("RGB", (3, 2), "red")
MAPS = tuple(
    replace(saliency, array=np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3), lies_on=lambda: RED)
    for saliency in ANSWER.maps
)
EXPLANATION = replace(ANSWER, maps=MAPS)


@pytest.mark.parametrize("form", FORMATS)
def test_a_reply_says_what_was_found_and_what_it_took(form: str):
    reply = json.loads(encode(EXPLANATION, form))
    assert (reply["model"], reply["version"]) == ("fake", "1.0")
    assert reply["predictions"] == [
        {"index": 7, "label": "boat", "probability": 0.5},
        {"index": 2, "label": "cup ☕", "probability": 0.0},
    ]
    assert reply["cost"] == texts.cost_json(ANSWER.cost)
    pixels = {"png": {"png"}, "overlay": {"png"}, "float": {"values"}, "none": set()}[form]
    described = [
        {name: value for name, value in each.items() if name not in pixels | {"shape"}} for each in reply["maps"]
    ]
    assert described == ([] if form == "none" else [texts.map_json(saliency) for saliency in MAPS])
    assert all(pixels <= set(each) and each["shape"] == [2, 3] for each in reply["maps"])


def test_the_map_can_be_read_back_from_its_png_and_its_numbers():
    as_png, as_float = (json.loads(encode(EXPLANATION, form))["maps"][0] for form in ("png", "float"))
    grey = read_map(base64.b64decode(as_png["png"]), "png", (2, 3))
    np.testing.assert_allclose(grey, MAPS[0].array, atol=1 / 510)
    np.testing.assert_array_equal(np.array(as_float["values"], np.float32), MAPS[0].array)


def test_an_overlay_lies_on_the_image():
    found = json.loads(encode(EXPLANATION, "overlay"))["maps"][0]["png"]
    picture = Image.open(io.BytesIO(base64.b64decode(found)))
    assert picture.tobytes() == MAPS[0].overlay().tobytes()


@pytest.mark.parametrize("error", [InvalidOption("groups must be 1..12"), Unsupported("no GAP head")])
def test_an_error_is_its_class_and_its_text(error: CamserveError):
    assert json.loads(encode_error(error)) == {"error": {"kind": type(error).__name__, "message": str(error)}}


def test_a_text_is_bounded_before_it_is_read():
    with pytest.raises(InvalidOption, match="a text has at most 64 characters, got 65"):
        decode({"data": PHOTO, "text": b"x" * 65}, RequestLimits(text_characters=64))
