"""The JSON form of targets, as the doors without typed messages read it."""

import base64
import json

import numpy as np
import pytest

from camserve.codecs import texts
from camserve.errors import InvalidInput, InvalidOption
from camserve.types import Against, Contrast, Finer, Region, Target, Text, Value, Vector
from camserve.types.request import UNBOUNDED, RequestLimits

PNG = b"the bytes of a file"


def read(value, limits=UNBOUNDED):
    return texts.request(b"image", {"targets": "targets"}, {"targets": value}, limits).targets


def at(index):
    return Target(index=index)


def named(label):
    return Target(label=label)


FORMS = [
    (281, at(281)),
    ("tabby", named("tabby")),
    ("contrast:tabby>lynx", Contrast(named("tabby"), (named("lynx"),))),
    ({"index": 3}, at(3)),
    ({"label": "up:age"}, named("up:age")),
    ({"top_k": 2}, Target(top_k=2)),
    (
        {"contrast": {"of": "top2", "than": ["lynx, catamount", 287, {"label": "7"}], "gamma": 0.5}},
        Contrast(Target(top_k=2), (named("lynx, catamount"), at(287), named("7")), 0.5),
    ),
    ({"contrast": {"of": 1, "than": 2}}, Contrast(at(1), (at(2),))),
    ({"finer": {"of": "tabby"}}, Finer(named("tabby"))),
    ({"finer": {"of": 1, "gamma": 1, "nearest": 5}}, Finer(at(1), 1.0, 5)),
    ({"against": {"of": {"label": "top3"}}}, Against(named("top3"))),
    ({"value": {"of": "age"}}, Value(named("age"))),
    ({"value": {"of": 0, "direction": "down"}}, Value(at(0), "down")),
    ({"vector": [0.25, -1.5, 2]}, Vector(np.array([0.25, -1.5, 2]))),
    ("text:a cat; asleep, perhaps", Text("a cat; asleep, perhaps")),
    ({"text": "a cat; asleep, perhaps"}, Text("a cat; asleep, perhaps")),
    ({"reference": base64.b64encode(PNG).decode()}, Vector(image=PNG)),
    ("region:1,2,3,4:cat", Region(named("cat"), box=(1, 2, 3, 4))),
    ({"region": {"of": "cat", "box": [1, 2.5, 3, 4]}}, Region(named("cat"), box=(1, 2.5, 3, 4))),
    ({"region": {"box": [1, 2, 3, 4]}}, Region(box=(1, 2, 3, 4))),
    ({"region": {"of": 3, "mask": base64.b64encode(PNG).decode()}}, Region(at(3), mask=PNG)),
    ({"region": {"of": 3, "grid": base64.b64encode(PNG).decode()}}, Region(at(3), grid=PNG)),
    (
        {"region": {"of": {"contrast": {"of": "cat", "than": ["dog, wolf"]}}, "box": [1, 2, 3, 4]}},
        Region(Contrast(named("cat"), (named("dog, wolf"),)), box=(1, 2, 3, 4)),
    ),
]


@pytest.mark.parametrize(("value", "target"), FORMS)
def test_a_form_is_read_alone_in_a_list_and_from_a_text(value, target):
    assert read([value]) == (target,)
    if not isinstance(value, str):
        assert read(value) == (target,)
    assert read(json.dumps([value, 7])) == (target, at(7))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([None], "a target is a class index, a text, or an object with one of index, label, .*; got nothing"),
        ([True], "got True"),
        ([1.5], r"got 1\.5"),
        ([{}], "got {}"),
        ([{"index": 1, "label": "a"}], "or an object with one of index"),
        ([{"colour": 1}], "or an object with one of index"),
        ([{"index": "a"}], "index must be a whole number, got 'a'"),
        ([{"index": None}], "exactly one, got 0"),
        ([{"label": 3}], "a label is a text, got 3"),
        ([{"contrast": "tabby>lynx"}], "contrast is an object with of, and may have of, than, gamma; got 'tabby>lynx'"),
        ([{"contrast": None}], "contrast is an object with of, .*; got nothing"),
        ([{"contrast": {"than": [1]}}], "contrast is an object with of"),
        ([{"contrast": {"of": 1, "than": [2], "k": 3}}], "contrast is an object with of"),
        ([{"contrast": {"of": 1}}], "at least one other, got none"),
        ([{"contrast": {"of": 1, "than": [[2]]}}], r"a class is an index, a text, or an object .*; got \[2\]"),
        ([{"contrast": {"of": 1, "than": [2], "gamma": "x"}}], r"gamma must be 0\.\.10, got 'x'"),
        ([{"contrast": {"of": 1, "than": [2], "gamma": None}}], r"gamma must be 0\.\.10, got None"),
        ([{"finer": {"of": 1, "nearest": []}}], r"nearest must be a whole number, got \[\]"),
        ([{"value": {"of": 1, "direction": []}}], r"direction must be one of up, down, got \[\]"),
        ([{"against": {"of": 1.5}}], r"a class is an index, .*; got 1\.5"),
        ([{"vector": None}], r"a vector has the shape \[dimension\]"),
        ([{"vector": "0.5"}], "a vector"),
        ([{"vector": {"a": 1}}], "a vector has numbers"),
        ([{"vector": [10**400]}], "a vector has"),
        ([{"vector": [[1], [2, 3]]}], "a vector has numbers"),
        ([{"reference": "cat.jpg"}], "a reference is the base64 of an image file, got 'cat.jpg'"),
        ([{"reference": 7}], "a reference is the base64 of an image file, got 7"),
        ([{"region": [1, 2, 3, 4]}], r"region is an object that may have of, box, mask, grid; got \[1, 2, 3, 4\]"),
        ([{"region": {"of": "cat", "at": 3}}], "region is an object that may have of, box, mask, grid"),
        ([{"region": {"of": "cat", "box": [1, 2, 3]}}], r"a region's box is four numbers x0, y0, x1, y1 .*, got \[1"),
        ([{"region": {"of": "cat", "box": {"x0": 1}}}], "a region's box is four numbers"),
        ([{"region": {"of": "cat", "box": [1, 2, 3, 10**400]}}], "a region's box is four numbers"),
        ([{"region": {"of": "cat", "mask": "mask.png"}}], "a mask is the base64 of a grey PNG file, got 'mask.png'"),
        ([{"region": {"of": "cat", "mask": "", "box": [1, 2, 3, 4]}}], "at most one, got box and mask"),
        ([{"region": {"of": "up:age", "box": [1, 2, 3, 4]}}], "a region is of a class"),
        ([{"region": {"of": {"region": {}}}}], "a region is of a class"),
        (["region:1,2,3,4:text:a cat"], "a region is of a class"),
        ([{"word": 2}], "word is an object with at, and may have words; got 2"),
        ([{"word": {"words": "a"}}], "word is an object with at, and may have words; got"),
        ([{"word": {"at": 1, "of": "a"}}], "word is an object with at, and may have words; got"),
        ([{"word": {"at": []}}], r"must be a whole number, got \[\]"),
        ([{"word": {"at": 1, "words": 7}}], "a text, got 7"),
        ([{"detection": {"index": 0}}], "a detection's number must be a whole number"),
        ([{"detection": -1}], "detections are numbered from 0, got -1"),
        (
            [{"box": [1, 2, 3, 4]}],
            r"box is an object with edges \[x0, y0, x1, y1\], and may have of; got \[1, 2, 3, 4\]",
        ),
        ([{"box": {"edges": None}}], "a box is four numbers"),
        ([{"box": {"edges": [1, 2, 3, "x"]}}], "a box is four numbers"),
        ([{"box": {"edges": [1, 2, 3, 4], "of": None}}], "a class is an index, a text, or an object"),
        ([{"text": None}], "a text target is a text, got None"),
        ([{"text": ["a"]}], r"a text target is a text, got \['a'\]"),
        ([{"text": " "}], "a text target has words, such as 'text:a seven left of a two'; got an empty text"),
        ('[{"text": "\\ud83d"}]', "a text is written in UTF-8, which has nothing for"),
        ("[1, 2", r"a text that begins with \[ must be JSON"),
        ("{}", "got {}"),
        ("[" * 100_000, "must be JSON"),
    ],
)
def test_another_form_is_refused_with_what_there_is(value, text):
    with pytest.raises(InvalidInput, match=text):
        read(value)


@pytest.mark.parametrize(
    "value",
    [
        "contrast:a>b,c,d",
        ["contrast:a>b", "contrast:c>d"],
        [{"contrast": {"of": "a", "than": ["b", "c", "d"]}}],
        [{"contrast": {"of": [], "than": [None] * 3}}],
        ["a", "b", {"finer": {"of": "c"}}, {"label": "d"}],
    ],
)
def test_the_classes_are_counted_before_one_is_read(value):
    with pytest.raises(InvalidOption, match=r"at most 3 (classes|targets), got 4"):
        read(value, RequestLimits(targets=3))


@pytest.mark.parametrize(
    "value", ["contrast:a>b,{}", "finer:{}", ["{}"], [{"label": "{}"}], [{"contrast": {"of": 1, "than": ["{}"]}}]]
)
def test_the_names_are_measured_before_one_is_read(value):
    long = json.loads(json.dumps(value).replace("{}", "x" * 65))
    with pytest.raises(InvalidOption, match="a name has at most 64 characters, got 65"):
        read(long, RequestLimits(name_characters=64))
    many = ",".join("x" * 30 + str(number) for number in range(9))
    assert read(f"contrast:1>{many}", RequestLimits(name_characters=64)), "a text of several names may be longer"


@pytest.mark.parametrize("value", ["text:{}", "0;text:{}", ["text:{}"], [{"text": "{}"}], ["0", {"text": "{}"}]])
def test_texts_are_measured_before_one_is_read_and_name_no_class(value):
    limits = RequestLimits(name_characters=64, text_characters=65, targets=2)
    text = json.dumps(value)
    assert Text("x" * 65) in read(json.loads(text.replace("{}", "x" * 65)), limits)
    with pytest.raises(InvalidOption, match="a text has at most 65 characters, got 66: 'xxx"):
        read(json.loads(text.replace("{}", "x" * 66)), limits)
    with pytest.raises(InvalidOption, match="a text has at most 65 characters, got 66"):
        read([{"text": "\ud83d" * 66}], limits)  # which is none, as whoever reads it finds
