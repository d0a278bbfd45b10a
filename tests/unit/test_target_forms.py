"""Which targets a model takes, by its outputs, and what a request becomes that asks for them."""

from dataclasses import replace

import numpy as np
import pytest
from test_request import MODEL, PHOTO

from camserve.errors import InvalidImage, InvalidOption, Unsupported
from camserve.types import Against, Contrast, Finer, ModelInfo, Region, Target, Text, Value, Vector
from camserve.types.request import ExplainRequest, RequestLimits, known_targets, make_request
from camserve.types.target_forms import target_forms
from camserve.types.targets import parse_target

VALUES = replace(MODEL, name="ages", outputs="value", labels=("age", "height, cm"), units=("years", "cm"))
FACES = replace(MODEL, name="faces", outputs="embedding", labels=(), dimension=3)
KNOWN_FACES = replace(FACES, labels=("ann", "ben"))
PROMPTS = replace(FACES, outputs="text-image", labels=("a cat", "a dog"))
BINARY = replace(MODEL, name="seven", outputs="binary", labels=("no seven", "seven"))
PLACES = replace(MODEL, name="places", outputs="segmentation")
BOXES = replace(MODEL, name="boxes", outputs="boxes")
ANSWERS = replace(MODEL, name="answers", outputs="answers")
CAPTIONS = replace(MODEL, name="captions", outputs="tokens")
ALONE = replace(MODEL, name="alone", outputs="sigmoid", labels=("cat",))


def fitted(model: ModelInfo, *targets, limits: RequestLimits = RequestLimits()):  # noqa: B008  # frozen
    return make_request(PHOTO, targets=targets).fit(model, limits).targets


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (MODEL, ["class", "contrast", "finer", "against"]),
        (replace(MODEL, outputs="sigmoid"), ["class", "contrast", "finer", "against"]),
        (replace(MODEL, outputs="probabilities"), ["class", "contrast", "finer", "against"]),
        (BINARY, ["class", "contrast", "finer", "against"]),
        (ALONE, ["class", "against"]),
        (VALUES, ["value"]),
        (FACES, ["vector", "reference"]),
        (KNOWN_FACES, ["vector", "reference", "class", "contrast", "finer", "against"]),
        (PROMPTS, ["text", "vector", "reference", "class", "contrast", "finer", "against"]),
        (replace(PROMPTS, labels=("a cat",)), ["text", "vector", "reference", "class", "against"]),
        (replace(PROMPTS, labels=()), ["text", "vector", "reference"]),
        (PLACES, ["class", "contrast", "finer", "against", "region"]),
    ],
)
def test_a_model_takes_what_fits_its_outputs_and_its_examples_are_taken(model, names):
    forms = target_forms(model)
    assert [form.name for form in forms] == names
    for form in forms:
        if form.name not in ("vector", "reference"):
            assert fitted(model, form.example)
    assert len({form.description for form in forms}) == len(forms)


TAKEN = {
    "contrast:cup>lynx": Contrast(Target(index=2), (Target(index=5),)),
    "finer:cup": Finer(Target(index=2)),
    "against:top2": Against(Target(top_k=2)),
    "2": Target(index=2),
}


@pytest.mark.parametrize("text", TAKEN)
@pytest.mark.parametrize("outputs", ["softmax", "sigmoid", "probabilities"])
def test_models_of_classes_take_targets_of_classes(outputs, text):
    assert fitted(replace(MODEL, outputs=outputs), text) == (TAKEN[text],)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("up:age", Value(Target(index=0))),
        ("down:1", Value(Target(index=1), "down")),
        ("age", Value(Target(index=0))),
        ("1", Value(Target(index=1))),
    ],
)
def test_a_number_goes_up_or_down_and_its_name_alone_means_up(text, target):
    assert fitted(VALUES, text) == (target,)


@pytest.mark.parametrize(
    ("model", "default"),
    [
        (MODEL, Target(top_k=1)),
        (BINARY, Target(top_k=1)),
        (VALUES, Value(Target(index=0))),
        (KNOWN_FACES, Target(top_k=1)),
        (PLACES, Region(Target(top_k=1))),
    ],
)
def test_without_targets_the_most_probable_class_or_the_first_number_is_explained(model, default):
    assert fitted(model) == (default,)


@pytest.mark.parametrize("text", TAKEN)
def test_a_class_of_places_is_the_region_that_is_of_it(text):
    assert fitted(PLACES, text) == (Region(TAKEN[text]),)
    (found,) = fitted(PLACES, f"region:1,2,30,40:{text}")
    assert found == Region(TAKEN[text], box=(1, 2, 30, 40))


def test_how_many_maps_there_are_is_known_unless_fewer_classes_may_have_a_place():
    box = (1.0, 2.0, 30.0, 40.0)
    known = [known_targets([Region(Target(top_k=k), box=at)]) for k, at in [(1, None), (3, None), (3, box)]]
    assert known == [1, None, 3]
    assert known_targets([Region(Target(index=1)), Region(Target(index=2))]) is None
    assert known_targets([Region(Target(index=1), box=box), Region(Target(index=2), box=box)]) == 2


def test_a_mask_is_bounded_before_a_worker_is_asked():
    mask = Region(Target(index=1), mask=np.eye(70, dtype=bool))
    assert fitted(PLACES, mask) == (mask,)
    limits = RequestLimits(image_pixels=64 * 64)
    small = np.zeros((60, 60, 3), np.uint8)
    with pytest.raises(InvalidImage, match="at most 4096 pixels, got 70 x 70"):
        make_request(small, targets=mask).fit(PLACES, limits)
    with pytest.raises(InvalidImage, match="a grey PNG file"):
        make_request(small, targets=Region(mask=PHOTO)).fit(PLACES, limits)


REFUSED = [
    (MODEL, Region(box=(1, 2, 3, 4)), "against ('against:tabby cat'); got 'region:1,2,3,4'"),
    (PLACES, Text("a cup"), "this model gives classes of places, and its targets are class ('tabby cat'), contrast ("),
    (PLACES, Vector([1.0]), "region ('region:10,20,90,80:tabby cat'); got 'vector:"),
    (PLACES, parse_target("up:cup"), "got 'up:cup'"),
    (MODEL, parse_target("up:cup"), "this model gives classes, and its targets are class ('tabby cat'), contrast ("),
    (MODEL, parse_target("box:1,2,3,4"), "got 'box:1,2,3,4'"),
    (MODEL, parse_target("detection:0"), "got 'detection:0'"),
    (MODEL, parse_target("word:1:cup"), "got 'word:1:cup'"),
    (MODEL, Vector([1.0]), "against ('against:tabby cat'); got 'vector:"),
    (MODEL, Vector(image=PHOTO), "; got 'reference:"),
    (VALUES, parse_target("contrast:0>1"), "this model gives numbers, and its targets are value ('up:age'); got 'con"),
    (VALUES, parse_target("finer:age"), "got 'finer:age'"),
    (VALUES, parse_target("against:age"), "got 'against:age'"),
    (VALUES, Target(top_k=1), "got 'top1'"),
    (VALUES, Vector([1.0]), "got 'vector:"),
    (MODEL, Text("a cup"), "against ('against:tabby cat'); got 'text:a cup'"),
    (FACES, Text("ann"), "got 'text:ann'"),
    (FACES, Target(index=0), "this model gives vectors, and its targets are vector ('vector:face.npy'), reference"),
    (FACES, parse_target("up:0"), "reference ('reference:face.jpg'); got 'up:0'"),
    (KNOWN_FACES, parse_target("up:ann"), "against ('against:ann'); got 'up:ann'"),
    (PROMPTS, parse_target("up:a cat"), "this model gives vectors, and its targets are text ('text:a cat'), vector ("),
    (ALONE, parse_target("finer:cat"), "got 'finer:cat'"),
    (ALONE, parse_target("contrast:cat>0"), "are class ('cat'), against ('against:cat'); got 'contrast:cat>0'"),
    (BOXES, parse_target("contrast:cup>boat"), "('box:10,20,90,80:tabby cat'); got 'contrast:cup>boat'"),
    (BOXES, Region(box=(1, 2, 3, 4)), "this model gives boxes, and its targets are class ('tabby cat'), detection"),
    (
        ANSWERS,
        parse_target("word:1:cup"),
        "this model gives answers, and its targets are class ('tabby cat'), contrast",
    ),
    (ANSWERS, parse_target("up:cup"), "text ('text:tabby cat'); got 'up:cup'"),
    (
        CAPTIONS,
        parse_target("detection:0"),
        "this model gives words, and its targets are class ('tabby cat'), contrast",
    ),
    (CAPTIONS, Vector([1.0]), "word ('word:1'); got 'vector:"),
]
"""Targets that the outputs of a model cannot have."""

WRONG = [
    (
        PROMPTS,
        parse_target("a cow"),
        "unknown label 'a cow'; close to it: 'a dog', 'a cat'; any other text is 'text:a cow'",
    ),
    (
        replace(PROMPTS, labels=()),
        None,
        "this model gives vectors, and no prompts are packed with it: say what to be similar to, by text "
        "('text:a seven left of a two'), vector",
    ),
    (KNOWN_FACES, Target(index=2), "class index must be 0..1, got 2"),
    (BINARY, parse_target("contrast:seven>1"), "contrast names each class once, got seven twice"),
    (FACES, Vector([1.0, 2.0]), "a vector of this model has 3 numbers, got 2"),
    (
        FACES,
        None,
        "this model gives vectors, and no references are packed with it: say what to be similar to, by vector "
        "('vector:face.npy'), reference",
    ),
    (
        MODEL,
        parse_target("txet:a cup"),
        "unknown label 'txet:a cup'; the targets of this model are class ('tabby cat')",
    ),
    (MODEL, parse_target("against:bx:1"), "unknown label 'bx:1'; the targets of this model are class ('tabby cat')"),
    (
        PROMPTS,
        parse_target("vektor:a"),
        "the targets of this model are text ('text:a cat'), vector ('vector:face.npy')",
    ),
    (
        BOXES,
        parse_target("detektion:0"),
        "the targets of this model are class ('tabby cat'), detection ('detection:0')",
    ),
    (BOXES, parse_target("box:1,2,3,4:wolf"), "unknown label 'wolf'"),
    (ANSWERS, parse_target("text:a cow"), "unknown label 'a cow'"),
    (CAPTIONS, Target(index=6), "class index must be 0..5, got 6"),
]
"""Targets of a kind that a model takes, which say what cannot be, and what is of no kind at all."""


@pytest.mark.parametrize(("model", "target", "text"), REFUSED)
def test_what_a_model_does_not_take_is_refused_with_what_it_takes(model, target, text):
    with pytest.raises(Unsupported) as raised:
        fitted(model, target)
    assert text in str(raised.value)


@pytest.mark.parametrize(("model", "target", "text"), WRONG)
def test_what_cannot_be_is_an_error_of_its_own_with_what_was_allowed(model, target, text):
    with pytest.raises(InvalidOption) as raised:
        fitted(model, *([] if target is None else [target]))
    assert text in str(raised.value)


def test_a_vector_and_a_reference_are_taken_as_they_are():
    vector, reference = Vector([1.0, 0.0, -1.0]), Vector(image=PHOTO)
    assert fitted(FACES, vector, reference, Vector(image=PHOTO)) == (vector, reference)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (b"no image", "reference: "),
        (np.full((32, 48, 3), 2, np.float32), "reference: a float32 image must have finite pixels"),
        (np.zeros((1, 1, 3), np.float32), "reference: a float32 image must have the network's input size"),
    ],
)
def test_a_reference_is_an_image_like_every_other(image, text):
    with pytest.raises(InvalidImage, match=text):
        fitted(FACES, Vector(image=image))
    with pytest.raises(InvalidImage, match="reference: an image may have at most 10 bytes"):
        ExplainRequest(b"", targets=(Vector(image=PHOTO),)).fit(FACES, RequestLimits(image_bytes=10))


def test_the_classes_of_all_targets_are_counted_before_one_is_looked_up():
    targets = [Contrast(Target(label="no such"), (Target(index=1), Target(index=2))), Target(index=0)]
    with pytest.raises(InvalidOption, match="the targets of a request name at most 3 classes, got 4"):
        fitted(MODEL, *targets, limits=RequestLimits(targets=3))


def test_the_names_inside_of_targets_are_measured_before_one_is_looked_up():
    for target in (Finer(Target(label="x" * 65)), Contrast(Target(index=1), (Target(label="x" * 65),))):
        with pytest.raises(InvalidOption, match="a name has at most 64 characters, got 65"):
            fitted(MODEL, target, limits=RequestLimits(name_characters=64))


def test_a_text_is_measured_before_it_is_looked_at():
    with pytest.raises(InvalidOption, match="a text has at most 64 characters, got 65"):
        fitted(MODEL, Text("x" * 65), limits=RequestLimits(text_characters=64, name_characters=1))


def test_maps_are_counted_for_every_kind_of_target():
    asked = make_request(PHOTO, targets=["finer:top3", "against:cup", "contrast:1>2,5", 0]).fit(MODEL)
    assert (asked.max_targets, asked.known_targets, asked.max_maps) == (6, None, 6)
    final = make_request(PHOTO, targets=["against:cup", "contrast:1>2,5", 0]).fit(MODEL)
    assert (final.max_targets, final.known_targets) == (3, 3)
    assert make_request(PHOTO, targets=["finer:top3"]).fit(MODEL).known_targets == 3
    assert make_request(PHOTO, targets=[Target(index=0), Target(top_k=1)]).fit(MODEL).known_targets is None
    with pytest.raises(InvalidOption, match="a request explains at most 4 classes, got 6"):
        make_request(PHOTO, targets=["finer:top6"]).fit(MODEL, RequestLimits(targets=4))


def test_a_step_counts_vectors_and_references():
    plain = make_request(PHOTO, targets=["ann"]).fit(KNOWN_FACES)
    more = make_request(PHOTO, targets=[Vector(image=PHOTO)]).fit(KNOWN_FACES)
    assert more.step_bytes == plain.step_bytes + len(PHOTO)
    assert make_request(PHOTO, targets=[Vector([1, 2, 3])]).fit(KNOWN_FACES).step_bytes == plain.step_bytes + 12
