"""What a map can be a map of: targets as values, their text forms, and what a worker resolves them to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camserve.errors import InvalidOption
from camserve.types import (
    Against,
    BoxTarget,
    Contrast,
    Detection,
    Finer,
    Prediction,
    Region,
    Target,
    Text,
    Value,
    Vector,
    Word,
    as_target,
    final_targets,
    is_final,
)
from camserve.types.model import ModelInfo
from camserve.types.targets import MAX_GAMMA, MAX_NEAREST, MAX_WORD, parse_target, split_targets

BOX = (1, 2.5, 30, 40)
LABELS = ("tench", "tabby", "tiger cat", "crane", "Egyptian_cat", "crane", "T-shirt", "7", "lynx, catamount", "up:age")


def named(label: str) -> Target:
    return Target(label=label)


def at(index: int) -> Target:
    return Target(index=index)


@pytest.mark.parametrize("index", [0, 9])
def test_index_in_range_is_kept(index):
    assert at(index).resolved(LABELS) == at(index)


@pytest.mark.parametrize("index", [-1, 10, 10**9])
def test_index_out_of_range_is_refused_with_range_and_value(index):
    with pytest.raises(InvalidOption, match=rf"class index must be 0\.\.9, got {index}"):
        at(index).resolved(LABELS)


def test_a_label_is_resolved_to_its_index():
    assert named("TIGER-cat").resolved(LABELS) == at(2)


@pytest.mark.parametrize("top_k", [1, 10])
def test_top_k_in_range_is_kept(top_k):
    assert Target(top_k=top_k).resolved(LABELS) == Target(top_k=top_k)


def test_top_k_beyond_the_classes_is_refused_with_range_and_value():
    with pytest.raises(InvalidOption, match=r"top_k must be 1\.\.10, got 11"):
        Target(top_k=11).resolved(LABELS)


@pytest.mark.parametrize("top_k", [0, -3])
def test_top_k_below_one_is_refused_with_the_value(top_k):
    with pytest.raises(InvalidOption, match=rf"at least 1, got {top_k}"):
        Target(top_k=top_k)


@pytest.mark.parametrize("given_fields", [{}, {"index": 1, "label": "tabby"}, {"index": 0, "top_k": 1}])
def test_a_target_is_exactly_one_thing(given_fields):
    with pytest.raises(InvalidOption, match=f"exactly one, got {len(given_fields)}"):
        Target(**given_fields)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("tabby", named("tabby")),
        (" 281 ", at(281)),
        ("top3", Target(top_k=3)),
        ("topcoat", named("topcoat")),
        ("-1", named("-1")),
        ("x:y", named("x:y")),
        ("contrast", named("contrast")),
        ("contrast:tabby>lynx", Contrast(named("tabby"), (named("lynx"),))),
        ("contrast: top2 > lynx , tiger cat", Contrast(Target(top_k=2), (named("lynx"), named("tiger cat")))),
        ("contrast:1>0.6*2,3", Contrast(at(1), (at(2), at(3)), gamma=0.6)),
        ("contrast:1>a*b", Contrast(at(1), (named("a*b"),))),
        ("finer:tabby", Finer(named("tabby"))),
        ("finer:top3", Finer(Target(top_k=3))),
        ("against:tabby", Against(named("tabby"))),
        ("up:age", Value(named("age"))),
        ("down:0", Value(at(0), "down")),
        ("text: a seven, left of a two; not: 3>2 ", Text("a seven, left of a two; not: 3>2")),
        ("text:top3", Text("top3")),
        ("text", named("text")),
    ],
)
def test_a_text_form_is_read(text, target):
    assert parse_target(text) == target
    assert as_target(text) == target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "contrast:tabby",
            "contrast holds a class against others, such as 'contrast:tabby>lynx', got 'contrast:tabby'",
        ),
        ("contrast:>lynx", "such as 'contrast:tabby>lynx', got 'contrast:>lynx'"),
        ("contrast:tabby> ", "such as 'contrast:tabby>lynx', got 'contrast:tabby> '"),
        ("contrast:", "contrast: what of"),
        ("contrast:1>top2", "contrast holds a class against named ones, got top2"),
        ("contrast:1>11*2", r"gamma must be 0\.\.10, got 11"),
        ("contrast:1>nan*2", r"gamma must be 0\.\.10, got nan"),
        ("contrast:1>-1*2", r"gamma must be 0\.\.10, got -1"),
        ("finer: ", "finer: what of"),
        ("up:top2", "a value goes up by name or index, got top2"),
        ("vector:1,2", "a vector has no text form: give its numbers"),
        ("reference:cat.jpg", "a reference has no text form: give its image"),
        ("top0", "at least 1, got 0"),
        ("text: ", "text: what of"),
    ],
)
def test_a_text_that_begins_like_a_form_goes_on_like_it(text, message):
    with pytest.raises(InvalidOption, match=message):
        parse_target(text)


def test_a_label_that_looks_like_a_form_is_named_as_such():
    assert as_target(named("up:age")).resolved(LABELS) == at(9)
    assert as_target(named("7")).resolved(LABELS) == at(7)


def test_what_callers_pass_becomes_a_target():
    assert as_target(3) == at(3)
    assert as_target(np.int64(3)) == at(3)
    assert as_target(Finer(at(1))) == Finer(at(1))


@pytest.mark.parametrize("value", [None, 1.5, True, ["tabby"], object(), b"tabby"])
def test_what_is_no_target_is_refused_with_what_is(value):
    with pytest.raises(InvalidOption, match="a target is a class index, a text such as 'tabby', 'contrast:tabby>lynx'"):
        as_target(value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Target(index="tabby"),
        lambda: Target(index=1.0),
        lambda: Target(label=7),
        lambda: Target(top_k=True),
        lambda: Contrast("tabby", (at(1),)),
        lambda: Contrast(at(1), ()),
        lambda: Contrast(at(1), 2),
        lambda: Contrast(at(1), ("lynx",)),
        lambda: Contrast(at(1), (at(2),), gamma=float("inf")),
        lambda: Contrast(at(1), (at(2),), gamma="much"),
        lambda: Contrast(at(1), (at(2),), gamma=True),
        lambda: Contrast(at(1), (at(2),), gamma=10**400),
        lambda: Finer("tabby"),
        lambda: Finer(at(1), nearest=None),
        lambda: Finer(at(1), nearest=0),
        lambda: Finer(at(1), nearest=101),
        lambda: Finer(at(1), nearest=2.5),
        lambda: Finer(at(1), gamma=-0.1),
        lambda: Against(1),
        lambda: Value("age"),
        lambda: Value(at(1), "sideways"),
        lambda: Vector(),
        lambda: Vector([1.0], b"file"),
        lambda: Vector([]),
        lambda: Vector([[1.0]]),
        lambda: Vector(["a"]),
        lambda: Vector([1.0, float("nan")]),
        lambda: Vector([1e300]),
        lambda: Vector([10**400]),
        lambda: Vector([0.0, 0.0]),
        lambda: Text(None),
        lambda: Text(b"a three"),
        lambda: Text(""),
        lambda: Text(" \n"),
        lambda: Text("half a \ud83d"),
        lambda: Word(None),
        lambda: Word(0),
        lambda: Word(MAX_WORD + 1),
        lambda: Word(1.5),
        lambda: Word(1, b"two"),
        lambda: Word(1, "half a \ud83d"),
        lambda: Detection(),
        lambda: Detection(0, at(1)),
        lambda: Detection(-1),
        lambda: Detection(True),
        lambda: Detection(of="cat"),
        lambda: BoxTarget(3),
        lambda: BoxTarget((1, 2, 3)),
        lambda: BoxTarget((1, 2, 3, "wide")),
        lambda: BoxTarget((1, 2, 3, True)),
        lambda: BoxTarget((1, 2, 3, float("inf"))),
        lambda: BoxTarget((1, 2, float("nan"), 4)),
        lambda: BoxTarget((3, 2, 3, 4)),
        lambda: BoxTarget((1, 4, 3, 4)),
        lambda: BoxTarget(BOX, "cat"),
        lambda: BoxTarget(BOX, Target(top_k=1)),
        lambda: BoxTarget(BOX, probabilities=3),
        lambda: BoxTarget(BOX, probabilities=(0.5, None)),
        lambda: BoxTarget(BOX, probabilities=(0.5, -0.1)),
        lambda: BoxTarget(BOX, probabilities=(0.5, float("nan"))),
        lambda: BoxTarget(BOX, probabilities=(0.5, float("inf"))),
        lambda: BoxTarget(BOX, probabilities=(0, 0)),
        lambda: Region("cat"),
        lambda: Region(box=(1, 2, 1, 4)),
        lambda: Region(box=BOX, grid=b"file"),
        lambda: Region(mask=b"file", grid=b"file"),
        lambda: Region(grid=b""),
    ],
)
def test_what_no_target_may_be_is_refused_when_it_is_made(make):
    with pytest.raises(InvalidOption):
        make()


@pytest.mark.parametrize(
    "target",
    [
        Contrast(at(1), (at(2),), gamma=0),
        Contrast(at(1), (at(2),), gamma=MAX_GAMMA),
        Finer(at(1), gamma=MAX_GAMMA, nearest=1),
        Finer(at(1), gamma=0, nearest=MAX_NEAREST),
        Word(1),
        Word(MAX_WORD, "two"),
        Detection(0),
        BoxTarget((-1, -2.5, 0, 0), at(1), probabilities=(0, 1e-9)),
    ],
)
def test_what_is_at_a_bound_is_taken(target):
    assert target.resolved(LABELS) == target


@pytest.mark.parametrize("given", [(), ([1.0], b"file")])
def test_a_vector_is_of_numbers_or_of_an_image(given):
    with pytest.raises(InvalidOption, match=f"has values or an image: exactly one, got {len(given)}"):
        Vector(*given)


def test_a_vector_is_not_the_image_whose_bytes_it_has():
    values = np.array([1.0, 2.0], np.float32)
    image = Vector(image=values.astype("<f4").tobytes())
    assert image.key == Vector(values).key, "else this says nothing"
    assert image != Vector(values)
    assert Vector(values) != values.tolist()


def test_equal_targets_are_one_key():
    one = {Vector([1, 2]), Vector(np.array([1.0, 2.0])), Vector(image=b"a"), Vector(image=b"a"), Vector(image=b"b")}
    assert len(one) == 3
    assert Vector([1, 2]) != Vector([2, 1])
    assert {Contrast(at(1), (at(2),)), Contrast(at(1), [at(2)]), Contrast(at(1), at(2))} == {Contrast(at(1), (at(2),))}
    assert {Text("a three"), Text(" a three ")} == {Text("a three")}
    assert Region(at(1), box=BOX) != at(1)
    assert len({Text("1"), Text("one"), at(1), named("one")}) == 4
    assert len({Finer(at(1)), Against(at(1)), at(1), Value(at(1)), Value(at(1), "down"), Finer(at(1), 0.5)}) == 6


def test_the_values_of_a_vector_are_its_own():
    values = np.array([1.0, 2.0], np.float32)
    vector = Vector(values)
    values[0] = 9
    assert vector.values.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        vector.values[0] = 9


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (at(1), "tabby"),
        (at(3), "3"),  # two classes are called crane
        (at(4), "Egyptian_cat"),
        (at(7), "7"),  # which is the index as well
        (at(8), "lynx, catamount"),
        (at(9), "9"),  # up:age would be read as a value
        (Target(top_k=2), "top2"),
        (Contrast(at(1), (at(8), at(2))), "contrast:tabby>8,tiger cat"),
        (Contrast(at(8), (at(1),), 0.6), "contrast:8>0.6*tabby"),
        (Finer(at(1)), "finer:tabby"),
        (Against(Target(top_k=3)), "against:top3"),
        (Value(at(0), "down"), "down:tench"),
        (Word(2), "word:2"),
        (Word(2, " seven two "), "word:2:seven two"),
        (Detection(3), "detection:3"),
        (BoxTarget(BOX), "box:1,2.5,30,40"),
        (BoxTarget(BOX, at(1)), "box:1,2.5,30,40:tabby"),
        (Region(at(1), box=BOX), "region:1,2.5,30,40:tabby"),
        (Region(box=BOX), "region:1,2.5,30,40"),
        (Text("tench, or tabby; 3"), "text:tench, or tabby; 3"),
    ],
)
def test_a_target_says_what_can_be_read_back(target, text):
    assert target.text(LABELS) == text
    assert parse_target(text).resolved(LABELS) == target.resolved(LABELS)


def test_an_index_without_a_label_is_said_as_it_is():
    assert [at(index).text(("a", "b")) for index in (1, 2, 3)] == ["b", "2", "3"]


def test_an_index_is_said_where_the_label_is_another_classes_index():
    assert at(1).text(("1", "0")) == "1"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=8), st.data())
def test_whatever_the_labels_are_a_text_reads_back(labels, data):
    index = data.draw(st.integers(0, len(labels) - 1))
    if labels[0].strip():
        assert parse_target(Text(labels[0]).text(labels)).resolved(labels) == Text(labels[0])
    for target in (at(index), Finer(at(index)), Against(at(index)), Value(at(index))):
        assert parse_target(target.text(labels)).resolved(labels) == target
    others = [at(other) for other in range(len(labels)) if other != index]
    if others:
        contrast = Contrast(at(index), tuple(others), 0.5)
        assert parse_target(contrast.text(labels)).resolved(labels) == contrast


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("281, tabby,top3", ["281", "tabby", "top3"]),
        ("contrast:tabby>lynx,tiger cat", ["contrast:tabby>lynx,tiger cat"]),
        ("281,contrast:1>2,3;top3, 5", ["281", "contrast:1>2,3", "top3", "5"]),
        ("contrast:1>2;contrast:1>3", ["contrast:1>2", "contrast:1>3"]),
        ("against:1,up:2", ["against:1", "up:2"]),
        ("a contrast:1,2", ["a contrast:1", "2"]),
        (" ; ,", []),
        ("281, text:a cat, asleep;top3", ["281", "text:a cat, asleep", "top3"]),
        ("text:a,contrast:1>2;text:b", ["text:a,contrast:1>2", "text:b"]),
        ("contrast:1>text:2,text:3;4", ["contrast:1>text:2,text:3", "4"]),
        ("a text:1,2", ["a text:1", "2"]),
        ("a contrast:1,contrast:2>3,4", ["a contrast:1", "contrast:2>3,4"]),
    ],
)
def test_several_targets_stand_in_one_text(text, entries):
    assert split_targets(text) == entries


def test_a_contrast_is_resolved_with_each_class_once():
    contrast = Contrast(named("tabby"), (named("tiger cat"), at(0)))
    assert contrast.resolved(LABELS) == Contrast(at(1), (at(0), at(2)))
    for than in ((named("Tabby"),), (at(2), named("tiger cat"))):
        with pytest.raises(InvalidOption, match=r"names each class once, got (tabby|tiger cat) twice"):
            Contrast(named("tabby"), than).resolved(LABELS)


@pytest.mark.parametrize(
    "kind", [Finer, Against, Value, lambda of: Contrast(of, (at(0),)), lambda of: Contrast(at(0), (of,))]
)
def test_the_classes_inside_are_resolved(kind):
    with pytest.raises(InvalidOption, match="unknown label 'tabbi'; close to it: 'tabby'"):
        kind(named("tabbi")).resolved(LABELS)
    assert [one.index for one in kind(named("tabby")).resolved(LABELS).classes].count(1) == 1


def test_a_worker_explains_one_class_at_a_time_each_target_once():
    ranked, scores = [3, 1, 0, 2], np.array([0.5, 1.0, -2.0, 4.0])
    asked = [Target(top_k=2), at(1), Against(Target(top_k=2)), Value(at(0)), Contrast(Target(top_k=2), (at(0),))]
    assert sum(target.maps for target in asked) == 8
    assert final_targets(asked, ranked, scores) == (
        at(3),
        at(1),
        Against(at(3)),
        Against(at(1)),
        Value(at(0)),
        Contrast(at(3), (at(0),)),
        Contrast(at(1), (at(0),)),
    )
    asked = [Region(Target(top_k=2), box=BOX), Region(Finer(at(0), nearest=2), box=BOX)]
    assert final_targets(asked, ranked, scores) == (
        Region(at(3), box=BOX),
        Region(at(1), box=BOX),
        Region(Contrast(at(0), (at(1), at(2)), 0.6), box=BOX),
    )
    assert final_targets([Finer(at(0), nearest=2), Contrast(at(0), (at(1), at(2)), 0.6)], ranked, scores) == (
        Contrast(at(0), (at(1), at(2)), 0.6),
    )


def test_no_class_is_held_against_itself():
    with pytest.raises(InvalidOption, match="class 1 is among the 2 most probable ones"):
        final_targets([Contrast(Target(top_k=2), (at(1),))], [3, 1, 0, 2], np.zeros(4))


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=9), st.integers(1, 5), st.data())
def test_finer_takes_the_classes_whose_scores_are_nearest(scores, nearest, data):
    index = data.draw(st.integers(0, len(scores) - 1))
    found = Finer(at(index), nearest=nearest).contrast(np.array(scores))
    taken = [other.index for other in found.than]
    left = [other for other in range(len(scores)) if other not in (index, *taken)]
    assert len(taken) == min(nearest, len(scores) - 1)
    assert index not in taken
    assert not left or max(abs(scores[one] - scores[index]) for one in taken) <= min(
        abs(scores[one] - scores[index]) for one in left
    )
    assert found.gamma == 0.6


def test_of_equally_near_classes_those_of_lower_index_are_taken():
    scores = np.tile([0.0, 1.0, -1.0], 100)  # sorting leaves equal ones in place where they are few
    found = Finer(at(99), nearest=100).contrast(scores)
    assert [other.index for other in found.than] == sorted([*range(0, 99, 3), *range(102, 300, 3), 1])


@pytest.mark.parametrize(
    ("target", "final"),
    [
        (at(1), True),
        (named("tabby"), False),
        (Target(top_k=1), False),
        (Contrast(at(1), (at(2),)), True),
        (Contrast(Target(top_k=1), (at(2),)), False),
        (Finer(at(1)), False),
        (Against(at(1)), True),
        (Value(at(1)), True),
        (Vector([1.0]), True),
        (Vector(image=b"file"), False),
        (Text("a three"), True),
    ],
)
def test_only_what_a_worker_answers_with_is_final(target, final):
    assert is_final(target) is final


def test_a_prediction_gets_its_name_and_its_unit():
    model = ModelInfo("m", "1", LABELS, (8, 8), (), "", outputs="value", units=("years", "px"))
    assert Prediction(1, "", value=3.0).named(model) == Prediction(1, "tabby", value=3.0, unit="px")
    assert Prediction(4, "", 0.25).named(model) == Prediction(4, "Egyptian_cat", 0.25)


@pytest.mark.parametrize(
    ("prediction", "figure"),
    [
        (Prediction(0, "a", 0.8808), "88.1%"),
        (Prediction(0, "a", value=37.256, unit="px"), "37.26 px"),
        (Prediction(0, "a", value=-2.0), "-2"),
        (Prediction(0, "a", similarity=0.714), "similarity 0.71"),
    ],
)
def test_a_prediction_says_what_its_kind_has(prediction, figure):
    assert prediction.figure == figure
