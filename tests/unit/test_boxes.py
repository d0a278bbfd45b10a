"""Tests of networks that detect objects: what they return, their predictions, targets, maps and refusals."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import detectors
import numpy as np
import pytest
import torch
from detectors import BIRD, CAT, DOG, LABELS, PREPROCESSING, SIDE, Windows, picture
from tiny import png
from torch import Tensor, nn

from camserve.codecs import target_json, v1
from camserve.engine import Engine
from camserve.errors import InvalidOption, Unsupported
from camserve.evaluation.curves import PROTOCOLS
from camserve.evaluation.digits.shipped import load_engine
from camserve.evaluation.examples import Example, digits_examples
from camserve.evaluation.report import make_report
from camserve.evaluation.run import Plan, evaluate, measured, subject_of
from camserve.evaluation.sanity import cascading_randomisation
from camserve.evaluation.truth import TrueBox
from camserve.methods import DRise, Occlusion
from camserve.scores import Targets
from camserve.scores.detections import MOST
from camserve.types import BoxTarget, Detection, InputView, Item, ModelInfo, Target, Task, as_target
from camserve.types.request import known_targets, make_request
from camserve.types.target_forms import fitted_target, target_forms
from camserve.types.targets import class_texts, split_targets
from camserve.worker.executor import Executor
from camserve.worker.network import Network

FEW = ("d_rise", {"masks": 30, "grid": 4})


def made(kind: type[nn.Module] = Windows, **options) -> Engine:
    return Engine(kind().eval(), preprocessing=PREPROCESSING, labels=LABELS, outputs="boxes", **options)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return made()


# What a network returns


@pytest.mark.parametrize("kind", ["Listed", "AsDict", "AsTuple", "AsTensor"])
def test_every_form_of_detections_says_the_same(kind, engine):
    ours, theirs = (one.explain(picture(CAT, DOG), [FEW], ["top2"]) for one in (made(getattr(detectors, kind)), engine))
    assert ours.predictions == theirs.predictions
    for mine, other in zip(ours.maps, theirs.maps, strict=True):
        np.testing.assert_array_equal(mine.array, other.array)


def test_probabilities_of_every_class_tell_class_and_count_by_their_cosine():
    found = made(detectors.Doubtful).explain(picture(CAT), [FEW], [BoxTarget(CAT, Target(index=1)), BoxTarget(CAT)])
    assert [one.label for one in found.predictions] == ["cat"]
    of_cat, of_any = found.maps
    told = np.array([0.1, 0.8, 0.04, 0.06])
    assert of_cat.score / of_any.score == pytest.approx(told[1] / np.linalg.norm(told), rel=1e-5)


def test_a_detection_that_tells_all_probabilities_is_explained_with_them():
    """It is like itself: its cosine is 1, and the similarity its score. A class alone is not that detection."""
    engine = made(detectors.Doubtful)
    found = engine.explain(picture(CAT, DOG), [FEW], ["detection:0", "cat", "top1"])
    for one, detection in zip(found.maps, (0, 1), strict=True):
        assert one.score == pytest.approx(found.predictions[detection].probability, rel=1e-5)
    (cat,) = (one for one in found.predictions if one.label == "cat")
    named = engine.explain(picture(CAT, DOG), [FEW], [BoxTarget(cat.box, Target(label="cat"))]).maps[0]
    told = np.array([0.1, 0.8, 0.04, 0.06])
    assert named.score == pytest.approx(cat.probability * told[1] / np.linalg.norm(told), rel=1e-5)
    given = engine.explain(picture(CAT, DOG), [FEW], [BoxTarget(cat.box, Target(1), probabilities=told)]).maps[0]
    assert given.score == pytest.approx(cat.probability, rel=1e-5)


def test_curves_of_several_detections_are_each_of_its_own_probabilities():
    found = made(detectors.Doubtful).explain(picture(CAT, DOG), [FEW], ["top2"], evaluate=True, evaluation_steps=4)
    assert len(found.maps) == 2
    for one in found.maps:
        assert one.faithfulness.deletion[0] == pytest.approx(one.score, rel=1e-5)


def test_what_several_images_ask_is_each_of_its_own_probabilities():
    """Methods ask those of a step in one pass; what is filled up is similar to nothing."""
    network = made(detectors.Doubtful).network
    x = network.normalise(torch.from_numpy(np.stack([picture(CAT, DOG), picture(BIRD)])))
    outputs = network.scores(x, "exact").detach()
    each = [network.score.targets(network.score.resolved(Detection(of=Target(top_k=3)), one)) for one in outputs]
    assert [len(one) for one in each] == [2, 1]
    found = Targets.stacked(each).query_value(outputs)
    for row, (one, targets) in enumerate(zip(outputs, each, strict=True)):
        alone = targets.query_value(one[None])[0]
        np.testing.assert_allclose(found[row, : len(alone)], alone, rtol=1e-6)
        assert not found[row, len(alone) :].any()


def test_a_detection_with_probabilities_comes_back_from_the_wire_for_the_next_shard():
    image, spec = picture(CAT, DOG), DRise(masks=40, grid=5)
    whole, first = (
        Executor(made(detectors.Doubtful).network).answer(Item(image, (Target(top_k=2),), (Task(0, spec, 0, stop),)))[1]
        for stop in (40, 24)
    )
    pinned = tuple(v1.target_from_proto(v1.target_to_proto(one.target)) for one in first.targets)
    assert all(len(target.probabilities) == 4 for target in pinned)
    _, second = Executor(made(detectors.Doubtful, micro_batch=3).network).answer(
        Item(image, pinned, (Task(0, spec, 24, 40),))
    )
    merged = sum(shard.partials[0].sums.astype(np.float64) for shard in (first, second))
    np.testing.assert_allclose(merged, whole.partials[0].sums, rtol=1e-6)


def test_images_of_a_step_have_probabilities_of_their_own():
    network, spec = made(detectors.Doubtful).network, DRise(masks=6, grid=4)
    items = [Item(picture(*some), (Target(top_k=3),), (Task(0, spec, 0, 6),)) for some in ((CAT, DOG), (BIRD,), ())]
    together = Executor(network).execute(items).outcomes
    for item, outcome in zip(items, together, strict=True):
        _, alone = Executor(network).answer(item)
        np.testing.assert_allclose(outcome.partials[0].sums, alone.partials[0].sums, rtol=1e-6)
        assert [one.target for one in outcome.targets] == [one.target for one in alone.targets]


@pytest.mark.parametrize("given", [(0.5, -0.1), (0.5, float("nan")), (0.0, 0.0), (float("inf"), 0.0), ("many",)])
def test_probabilities_that_can_be_none_are_refused_at_once(given):
    with pytest.raises(InvalidOption, match="a box has probabilities of at least 0, not all 0; got"):
        BoxTarget(CAT, probabilities=given)


def test_probabilities_of_other_classes_than_the_models_are_refused(engine):
    some = BoxTarget(CAT, Target(index=1), probabilities=(0.5, 0.5))
    with pytest.raises(InvalidOption, match="a box has the probabilities of all 4 classes, got 2"):
        made(detectors.Doubtful).explain(picture(CAT), [FEW], [some])
    with pytest.raises(Unsupported, match="gives a label of each detection, and no probabilities of all classes"):
        engine.explain(picture(CAT), [FEW], [replace(some, probabilities=(0.25,) * 4)])


class Single(Windows):
    """Tells the probability of its only class."""

    def found(self, image: Tensor) -> dict[str, Tensor]:
        found = super().found(image)
        labels = found.pop("labels")
        return found | {"probabilities": torch.full((len(labels), 1), 0.9)}


def test_a_single_class_is_the_class_of_all():
    engine = Engine(Single().eval(), preprocessing=PREPROCESSING, labels=("thing",), outputs="boxes")
    found = engine.explain(picture(CAT), [FEW], ["thing"])
    assert [one.label for one in found.predictions] == ["thing"]
    assert found.maps[0].score == pytest.approx(found.predictions[0].probability, rel=1e-5)


class Numbers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class Ragged(Windows):
    def found(self, image: Tensor) -> dict[str, Tensor]:
        return super().found(image) | {"scores": torch.ones(7)}


class Loud(Windows):
    def found(self, image: Tensor) -> dict[str, Tensor]:
        found = super().found(image)
        return found | {"scores": 9 + found["scores"]}


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        (Numbers, Unsupported, r"a detector must return for each image boxes .*it returned a tensor \(2, 3\)"),
        (Ragged, Unsupported, r"it returned list of 2: dict of 'boxes' a tensor"),
        (Loud, InvalidOption, "scores of detections are numbers in 0..1"),
    ],
)
def test_what_is_no_detector_is_refused_with_what_it_returned(kind, error, said):
    with pytest.raises(error, match=said):
        made(kind)


class Varying(Windows):
    """Tells the probabilities of another number of classes for each image of a batch."""

    def forward(self, x: Tensor) -> Any:
        each = [self.found(image) for image in x]
        return [
            {"boxes": one["boxes"], "scores": one["scores"], "probabilities": torch.ones(len(one["scores"]), 2 + at)}
            for at, one in enumerate(each)
        ]


def test_probabilities_of_another_number_of_classes_for_each_image_are_refused():
    with pytest.raises(Unsupported, match=r"it returned detections of \[7, 8\] numbers"):
        made(Varying)


def test_no_output_of_a_detector_is_chosen():
    with pytest.raises(InvalidOption, match="made of boxes, labels and scores together, and no output is chosen"):
        made(output="scores")


def test_a_network_that_gives_labels_needs_their_names():
    with pytest.raises(InvalidOption, match="do not tell how many classes there are: give the names of all"):
        Engine(Windows().eval(), preprocessing=PREPROCESSING, outputs="boxes")


def test_a_class_without_a_name_fails_its_item_alone():
    network = Network(Windows().eval(), preprocessing=PREPROCESSING, labels=LABELS[:2], outputs="boxes")
    items = [Item(picture(some), (Target(top_k=1),), (Task(0, DRise(masks=4), 0, 4),)) for some in (DOG, CAT)]
    refused, answered = Executor(network).execute(items).outcomes
    assert str(refused) == "the network names a class 2, and its labels are 0..1"
    assert answered.predictions[0].index == 1


class NoNumber(Windows):
    """Has an edge that is no number where there is a bird."""

    def found(self, image: Tensor) -> dict[str, Tensor]:
        found = super().found(image)
        found["boxes"][found["labels"] == 3] = torch.nan
        return found


def test_an_edge_that_is_no_number_fails_its_item_alone():
    network = Network(NoNumber().eval(), preprocessing=PREPROCESSING, labels=LABELS, outputs="boxes")
    items = [Item(picture(some), (Target(top_k=1),), (Task(0, DRise(masks=4), 0, 4),)) for some in (BIRD, CAT)]
    refused, answered = Executor(network).execute(items).outcomes
    assert isinstance(refused, Unsupported)
    assert "not finite" in str(refused)
    assert answered.predictions[0].index == 1


class Many(nn.Module):
    """Detects more than are kept, in ascending order of their scores, some of which are equal."""

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        scores = torch.linspace(0, 1, 2 * MOST).mul(100).floor().div(100)
        edges = torch.arange(2 * MOST)[:, None] / 100 + torch.tensor([0, 0, 5, 5])
        return [{"boxes": edges, "labels": torch.ones(2 * MOST, dtype=torch.long), "scores": scores} for _ in x]


def test_the_best_detections_are_kept_and_equal_ones_stay_in_order():
    found = made(Many).explain(picture(), [], top_predictions=1000).predictions
    scores = [one.probability for one in found]
    assert len(found) == MOST
    assert scores == sorted(scores, reverse=True)
    assert min(scores) == pytest.approx(0.5, abs=0.02)
    for one, other in itertools.pairwise(found):
        assert one.probability > other.probability or one.box[0] < other.box[0]


# Predictions


def test_predictions_are_detections_in_pixels_of_the_sent_image_the_best_first(engine):
    image = picture(CAT, DOG)
    found = engine.explain(image, [], top_predictions=5).predictions
    assert [one.label for one in found] == ["dog", "cat"]
    (direct,) = Windows().eval()(torch.from_numpy(image).permute(2, 0, 1)[None])
    for one, number in zip(found, (1, 0), strict=True):
        assert one.box == pytest.approx(direct["boxes"][number].tolist())
        assert one.probability == pytest.approx(direct["scores"][number].item())


VIEW = InputView(original_size=(100, 200), crop=(50.0, 0.0, 150.0, 100.0), size=(32, 64))


def test_boxes_go_from_the_input_to_the_sent_image_and_back():
    assert VIEW.sent((16, 8, 32, 16)) == (75.0, 25.0, 100.0, 50.0)
    assert VIEW.seen((75.0, 25.0, 100.0, 50.0)) == (16.0, 8.0, 32.0, 16.0)
    assert VIEW.sent((-5, -5, 900, 900)) == (50.0, 0.0, 150.0, 100.0)  # cut off at what the network sees


def test_a_photo_that_is_resized_and_cropped_has_boxes_in_its_own_pixels(engine):
    large = (np.kron(picture(DOG), np.ones((4, 4, 1))) * 255).astype(np.uint8)
    wide = np.pad(large, ((0, 0), (32, 32), (0, 0)))  # the network sees the middle
    (found,) = engine.explain(wide, []).predictions
    x0, y0, x1, y1 = DOG
    assert found.box[1:] == pytest.approx((4 * y0, 32 + 4 * x1, 4 * y1), abs=1e-3)
    assert 32 + 4 * (x0 - 2) <= found.box[0] < 32 + 4 * x0


# Targets


def test_a_detection_is_the_box_that_it_is_and_says_so(engine):
    found = engine.explain(picture(CAT, DOG), [FEW], ["detection:1"])
    (one,) = found.maps
    assert one.classes == (one.target,)
    assert one.target.label == "cat"
    assert one.target.box == found.predictions[1].box
    assert one.score == pytest.approx(found.predictions[1].probability)  # the IoU with itself is 1
    assert re.fullmatch(r"box:[\d.]+,4,11,14:cat", one.target_text)


@pytest.mark.parametrize("text", ["cat", "1", "detection:1", "top2"])
def test_all_ways_to_a_detection_give_the_same_map(text, engine):
    image, spec = picture(CAT, DOG), [FEW]
    pinned = engine.explain(image, spec, ["detection:1"]).maps[0]
    found = {one.target_text: one.array for one in engine.explain(image, spec, [text]).maps}
    np.testing.assert_allclose(
        found[pinned.target_text], pinned.array, atol=1e-5
    )  # sums of other shapes round otherwise
    again = engine.explain(image, spec, [pinned.target_text]).maps[0]  # with the ten digits that a text has
    np.testing.assert_allclose(again.array, pinned.array, atol=1e-5)


def test_the_same_detection_is_explained_once_and_there_are_no_more_than_there_are(engine):
    answer = engine.explain(picture(CAT, DOG), [FEW], ["top9", "detection:0", "dog"])
    assert [one.target.label for one in answer.maps] == ["dog", "cat"]


def test_all_detections_take_the_queries_of_one(engine):
    image = picture(CAT, DOG, BIRD)
    one, all_of_them = (engine.explain(image, [FEW], [text]) for text in ("detection:0", "top3"))
    assert len(all_of_them.maps) == 3
    assert one.cost.queries == all_of_them.cost.queries == 30


def test_a_box_without_a_class_takes_whatever_is_there(engine):
    image = picture(CAT, DOG)
    targets = [BoxTarget(DOG, of) for of in (None, Target(1), Target(2))]
    of_any, of_cat, of_dog = engine.explain(image, [FEW], targets).maps
    np.testing.assert_allclose(of_any.array, of_dog.array, atol=1e-5)
    assert of_cat.degenerate
    assert of_cat.score == 0
    assert of_any.classes == ()
    assert of_any.target.similarity == pytest.approx(of_dog.score)


def test_an_image_without_detections_has_no_predictions_and_an_empty_map(engine):
    for targets in ([], ["top3"], ["detection:0"], ["cat"]):
        found = engine.explain(picture(), [FEW, "occlusion"], targets, evaluate=True, evaluation_steps=4)
        assert not found.predictions
        assert len(found.maps) == 2
        for one in found.maps:
            assert one.degenerate
            assert not one.array.any()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("detection:2", r"there is no detection 2 in this image; there are 0: class 2 \(0.8\d\), 1: class 1 \(0.8\d\)"),
        ("bird", "there is no detection of class 3 in this image; there are 0: class 2"),
        ("box:40,2,50,9", r"the box 40, 2, 50, 9 is outside of what the network sees of the image: x 0..32, y 0..32"),
        ("box:3,3,3,9", "a box has x0 < x1 and y0 < y1, got 3,3,3,9"),
        ("box:1,2,nan,4", "a box is four numbers"),
        ("box:1,2,3", "box is x0,y0,x1,y1 in pixels of the sent image and perhaps a class, such as"),
        ("detection:one", "detection is a number among the predictions, such as 'detection:0'"),
        ("box:1,2,3,4:wolf", "unknown label 'wolf'"),
    ],
)
def test_a_target_that_cannot_be_is_refused_with_what_was_allowed(target, said, engine):
    with pytest.raises(InvalidOption, match=said):
        engine.explain(picture(CAT, DOG), [FEW], [target])


def test_a_box_outside_of_the_image_leaves_its_neighbour_alone(engine):
    executor = Executor(engine.network)
    task = Task(0, DRise(masks=4), 0, 4)
    bad, good = (Item(picture(CAT), (BoxTarget(box),), (task,)) for box in ((90, 90, 99, 99), CAT))
    refused, answered = executor.execute([bad, good]).outcomes
    assert isinstance(refused, InvalidOption)
    assert answered.partials[0].queries == 4


INFO = ModelInfo("m", "1", LABELS, (32, 32), (), "", outputs="boxes")


def test_the_forms_of_a_model_of_boxes_are_listed_with_examples_that_it_takes():
    forms = {form.name: form.example for form in target_forms(INFO)}
    assert list(forms) == ["class", "detection", "box"]
    assert forms["box"] == "box:10,20,90,80:background"
    for example in forms.values():
        fitted_target(as_target(example), INFO)


@pytest.mark.parametrize(
    "target",
    [BoxTarget((1, 2.5, 30, 40), Target(index=2)), BoxTarget((1, 2, 3, 4)), Detection(4)],
)
def test_targets_of_boxes_come_back_from_the_wire_and_from_their_text(target):
    assert v1.target_from_proto(v1.target_to_proto(target)) == target
    assert as_target(target.text()) == target
    assert as_target(target.text(LABELS)).resolved(LABELS) == target


def test_the_json_forms_of_boxes():
    read = lambda value: target_json.read_target("targets", value)  # noqa: E731  # it is used three times below
    assert read({"box": {"edges": [1, 2, 3, 4], "of": "cat"}}) == BoxTarget((1, 2, 3, 4), Target(label="cat"))
    assert read({"box": {"edges": [1, 2, 3, 4]}}) == BoxTarget((1, 2, 3, 4))
    assert read({"detection": 3}) == Detection(3)
    for wrong in ({"box": [1, 2, 3, 4]}, {"box": {"edges": [1, 2, 3]}}, {"detection": -1}, {"detection": "x"}):
        with pytest.raises(InvalidOption):
            read(wrong)


def test_lists_of_text_forms_keep_the_commas_of_boxes():
    assert split_targets("box:1,2,3,4:cat,dog,detection:0") == ["box:1,2,3,4:cat", "dog", "detection:0"]
    assert split_targets("dog, box:1,2,3,4,cat") == ["dog", "box:1,2,3,4", "cat"]
    assert class_texts("box:1,2,3,4:cat") == ["cat"]
    assert class_texts("box:1,2,3,4") == class_texts("detection:7") == []


def test_what_is_known_of_the_number_of_maps():
    assert known_targets([Detection(0)]) == 1
    assert known_targets([Detection(of=Target(top_k=3))]) is None  # there may be fewer
    assert known_targets([Detection(0), Detection(1)]) is None  # they may be the same
    assert known_targets([BoxTarget((1, 2, 3, 4)), BoxTarget((1, 2, 3, 5))]) == 2


def test_more_predictions_than_classes_may_be_asked_for():
    fitted = make_request(picture(), [], top_predictions=50).fit(INFO)
    assert fitted.request.top_predictions == 50


# Maps


def test_d_rise_lies_on_the_detection(engine):
    for box, label in ((CAT, "cat"), (DOG, "dog")):
        (one,) = engine.explain(picture(CAT, DOG), [("d_rise", {"grid": 6, "masks": 3000})], [label]).maps
        row, column = np.unravel_index(one.array.argmax(), one.array.shape)
        assert box[0] <= column < box[2]
        assert box[1] <= row < box[3]


@pytest.mark.parametrize("micro_batch", [1, 3, 50])
def test_a_map_does_not_depend_on_the_micro_batch_its_shards_and_their_order(micro_batch, engine):
    image, spec, targets = picture(CAT, DOG), DRise(masks=40, grid=5), (Target(top_k=2),)
    _, whole = Executor(engine.network).answer(Item(image, targets, (Task(0, spec, 0, 40),)))
    other = Executor(made(micro_batch=micro_batch).network)
    shards = [other.answer(Item(image, targets, (Task(0, spec, start, start + 8),)))[1] for start in (32, 0, 16, 8, 24)]
    merged = sum(shard.partials[0].sums.astype(np.float64) for shard in shards)
    np.testing.assert_allclose(merged, whole.partials[0].sums, rtol=1e-6)


def test_curves_measure_the_similarity(engine):
    found = engine.explain(picture(CAT, DOG), [("d_rise", {"grid": 6, "masks": 1000})], ["cat"], evaluate=True)
    (one,) = found.maps
    assert one.faithfulness.deletion[0] == pytest.approx(one.score, rel=1e-5)
    assert one.faithfulness.deletion[-1] == 0
    assert one.faithfulness.insertion[-1] == pytest.approx(one.score, rel=1e-5)
    assert one.faithfulness.overall > 0


def test_methods_of_gradients_and_of_layers_are_refused_with_the_reason(engine):
    for method in ("grad_cam", "score_cam", "integrated_gradients"):
        with pytest.raises(Unsupported, match="the methods that work: rise, d_rise, occlusion"):
            engine.explain(picture(CAT), [method], ["cat"])


def test_a_preprocessing_that_stretches_shows_all_of_the_image():
    stretched = replace(PREPROCESSING, resize_px=(32, 32))
    on = Engine(Windows().eval(), preprocessing=stretched, labels=LABELS, outputs="boxes")
    wide = (np.kron(picture(DOG), np.ones((2, 6, 1))) * 255).astype(np.uint8)
    (found,) = on.explain(wide, []).predictions
    _, y0, x1, y1 = DOG
    assert found.box[1:] == pytest.approx((2 * y0, 6 * x1, 2 * y1), abs=1e-3)


@pytest.mark.parametrize("size", ["input", "original"])
def test_an_overlay_has_a_frame_around_the_detection(size, engine):
    large = (np.kron(picture(DOG), np.ones((8, 8, 1))) * 255).astype(np.uint8)
    (one,) = engine.explain(large, [FEW], ["dog"], size=size).maps
    framed = np.asarray(one.overlay(opacity=0.0)).astype(int)
    without = np.asarray(one.image.convert("RGB")).astype(int)
    scale = framed.shape[0] // SIDE
    x0, y0, x1, y1 = (round(edge / 8 * scale) for edge in one.target.box)
    white = (framed == 255).all(axis=2)
    assert white[y0, x0:x1].all()
    assert white[y1 - 1, x0:x1].all()
    assert white[y0:y1, x1 - 1].all()
    changed = (framed != without).any(axis=2)
    changed[max(0, y0 - 2) : y1 + 2, max(0, x0 - 2) : x1 + 2] = False
    assert not changed.any()


def test_an_overlay_of_a_class_has_no_frame():
    from tiny import pixels, tiny_network

    network = tiny_network()
    answer = Engine(network.module, preprocessing=network.preprocessing, labels=network.info.labels).explain(pixels(1))
    (one,) = answer.maps
    np.testing.assert_array_equal(np.asarray(one.overlay(opacity=0.0)), np.asarray(one.image.convert("RGB")))


# Evaluation


@pytest.fixture(scope="module")
def digits() -> Engine:
    return load_engine("digits-boxes")


@pytest.mark.parametrize("method", [DRise(masks=600, grid=12), Occlusion(positions=12)])
def test_a_detector_is_evaluated_by_pointing_energy_and_overlap_with_true_boxes(method, digits):
    (example,) = digits_examples(1)
    subject = subject_of(digits, example, example.read(), Plan(methods=(method,)), None)
    found = measured(subject, method)
    assert {one["label"] for one in found["maps"]} == {box.label for box in example.boxes}
    for one in found["maps"]:
        assert one["localisation"]["pointing"]
        assert one["localisation"]["energy"] > 0
        assert one["curves"]["rise"]["insertion_auc"] > one["curves"]["rise"]["deletion_auc"]
    assert found["contrast"] is None


def test_a_class_that_is_not_detected_is_left_out_and_an_image_without_detections_has_nothing(digits):
    (example,) = digits_examples(1)
    said = {one.label for one in digits.explain(example.read(), [], top_predictions=99).predictions}
    absent = next(str(digit) for digit in range(10) if str(digit) not in said)
    with_absent = replace(example, boxes=(*example.boxes, TrueBox(absent, 10, 10, 40, 40)))
    subject = subject_of(digits, with_absent, example.read(), Plan(methods=(DRise(),)), None)
    assert int(absent) not in subject.classes
    dark = png(np.full((96, 96, 3), 40, np.uint8))
    nothing = subject_of(digits, with_absent, dark, Plan(methods=(DRise(),)), None)
    assert measured(nothing, DRise(masks=4)) == {"unsupported": "nothing is detected"}


def test_images_without_detections_are_left_out_of_the_report(engine, tmp_path):
    bright, dark = ((picture(*some) * 255).astype(np.uint8) for some in ((CAT, DOG), ()))
    examples = [Example("dark.png", png(dark)), Example("bright.png", png(bright))]
    plan = Plan((DRise(masks=20, grid=4),), protocols=(PROTOCOLS["rise"],), sanity_images=2, dataset="two")
    records = evaluate(engine, examples, plan, tmp_path)
    report = make_report(plan.settings(engine), records, plan.methods)
    (row,) = report.rows
    assert (row["images"], row["unsupported"], row["left_out"]) == (1, None, {"nothing is detected": 1})
    text = report.as_markdown()
    assert "D-RISE (masks=20, grid=4): 1 of 2 images left out. nothing is detected." in text
    assert "not served" not in text
    assert "model model 1.0, input 32 x 32 px" in text
    (check,) = (one for one in records if one["kind"] == "sanity")
    assert check["unsupported"] == "nothing is detected in an image, so that there is no map to be compared"


class Scaled(Windows):
    """Looks through a layer whose weights are other ones once they are random."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.eye_(self.look.weight.data[:, :, 0, 0])

    def forward(self, x: Tensor) -> Any:
        return super().forward(self.look(x))


@pytest.mark.parametrize("times", [1, 3])
def test_the_sanity_check_of_a_detector_keeps_the_box_that_was_detected(times, monkeypatch):
    """In pixels of the sent image, whatever its size."""
    engine = made(Scaled)
    image = np.kron((picture(DOG) * 255).astype(np.uint8), np.ones((times, times, 1), np.uint8))
    (dog,) = engine.explain(image, []).predictions
    asked, explain = [], Engine.explain

    def listen(self, content, methods=(), targets=(), **options):
        asked.extend(targets)
        return explain(self, content, methods, targets, **options)

    monkeypatch.setattr(Engine, "explain", listen)
    found = cascading_randomisation(engine, [image], [DRise(masks=40, grid=4)], stages=2)
    assert [(target.of.index, target.box) for target in asked] == [(2, pytest.approx(dog.box))] * 2
    (stages,) = found[DRise(masks=40, grid=4)]
    assert [stage.down_to for stage in stages] == ["look", ""]


def test_a_box_is_named_in_pixels_of_the_sent_image_whatever_its_size(engine):
    large = np.pad((np.kron(picture(DOG), np.ones((4, 4, 1))) * 255).astype(np.uint8), ((0, 0), (32, 32), (0, 0)))
    answer = engine.explain(large, [FEW], ["detection:0"])
    (found,) = answer.predictions
    (named,) = engine.explain(large, [FEW], [BoxTarget(found.box, Target(index=found.index))]).maps
    assert named.score == pytest.approx(found.probability, rel=1e-5)  # the IoU with itself is 1
    np.testing.assert_allclose(named.array, answer.maps[0].array, atol=1e-5)
