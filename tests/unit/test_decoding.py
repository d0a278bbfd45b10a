"""Detections made of what DETR's and YOLO's networks return: by obvious loops, and as transformers makes them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from detectors import LABELS, PREPROCESSING, SIDE, picture
from torch import Tensor, nn

from camserve.engine import Engine
from camserve.errors import InvalidOption, Unsupported
from camserve.methods import DRise
from camserve.scores.decoding import LEAST, OVERLAP, decode
from camserve.types import Item, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network

SIZE = (48, 64)


def answers(queries: int = 20, classes: int = 5, images: int = 2, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "logits": 2 * torch.randn((images, queries, classes), generator=draw),
        "pred_boxes": 0.1 + 0.8 * torch.rand((images, queries, 4), generator=draw),
    }


def rows(found: dict[str, Tensor]) -> list[tuple[float, int, list[float]]]:
    return sorted(zip(*(found[key].tolist() for key in ("scores", "labels", "boxes")), strict=True), reverse=True)


def same(ours, theirs) -> None:
    assert len(ours) == len(theirs) > 3
    for one, other in zip(ours, theirs, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-6)
        assert one[1] == other[1]
        assert one[2] == pytest.approx(other[2], abs=1e-4)  # pixels: float32 has 7 digits


PROCESSORS = {
    "detr": transformers.DetrImageProcessorPil,
    "detr-sigmoid": transformers.RTDetrImageProcessorPil,
}


@pytest.mark.parametrize("decoding", PROCESSORS)
@pytest.mark.parametrize("named", [True, False])
def test_detections_are_those_of_transformers_own_processors(decoding, named):
    returned = answers(queries=400)
    theirs = PROCESSORS[decoding]().post_process_object_detection(
        SimpleNamespace(**returned), threshold=LEAST, target_sizes=torch.tensor([SIZE] * 2)
    )
    ours = decode(decoding, returned if named else tuple(returned.values()), SIZE)
    for one, other in zip(ours, theirs, strict=True):
        # RT-DETR's keeps as many as there are queries, here 300.
        same(rows(one)[:300], rows(other)[:300])


def test_an_object_that_is_none_is_no_detection():
    returned = answers(queries=1, classes=3, images=1)
    returned["logits"][:] = torch.tensor([0.0, 1.0, 9.0])
    assert not len(decode("detr", returned, SIZE)[0]["scores"])
    (found,) = decode("detr-sigmoid", returned, SIZE)
    assert found["labels"].tolist() == [2, 1, 0]


def overlap(one: list[float], other: list[float]) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    both = max(wide, 0) * max(high, 0)
    return (
        both / sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) * 1.0
        if not both
        else both / (sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - both)
    )


def by_hand(candidates: np.ndarray) -> list[tuple[float, int, list[float]]]:
    """Candidates (A, 4 + K) of one image, the best first: a better one of its class that overlaps is in the way."""
    told = []
    for x, y, wide, high, *scores in candidates.tolist():
        label = int(np.argmax(scores))
        if scores[label] > LEAST:
            told.append((scores[label], label, [x - wide / 2, y - high / 2, x + wide / 2, y + high / 2]))
    kept: list[tuple[float, int, list[float]]] = []
    for one in sorted(told, reverse=True):
        if all(one[1] != other[1] or overlap(one[2], other[2]) <= OVERLAP for other in kept):
            kept.append(one)
    return kept


def candidates(number: int = 60, classes: int = 3) -> np.ndarray:
    draw = np.random.default_rng(3)
    centres = np.repeat(draw.uniform(10, 40, (number // 4, 2)), 4, axis=0) + draw.normal(0, 0.7, (number, 2))
    sizes = np.repeat(draw.uniform(6, 20, (number // 4, 2)), 4, axis=0)
    return np.concatenate([centres, sizes, draw.uniform(0, 1, (number, classes)) ** 3], axis=1).astype(np.float32)


@pytest.mark.parametrize("decoding", ["yolo", "yolo5"])
def test_candidates_that_overlap_are_one_detection(decoding):
    given = candidates()
    expected = by_hand(given)
    assert 3 < len(expected) < len([one for one in given if one[4:].max() > LEAST])
    if decoding == "yolo":
        returned = torch.from_numpy(given.T.copy())[None]
    else:  # the score of an object is halved here, and those of the classes doubled
        returned = torch.from_numpy(np.insert(given * ([1] * 4 + [2] * 3), 4, 0.5, axis=1).astype(np.float32))[None]
    same(rows(decode(decoding, returned, SIZE)[0]), sorted(expected, reverse=True))
    same(rows(decode(decoding, (returned, [torch.ones(1)]), SIZE)[0]), sorted(expected, reverse=True))


def test_a_score_that_is_no_number_stays_for_somebody_to_see():
    given = torch.from_numpy(candidates().T.copy())[None]
    given[0, 4:, 7] = math.nan
    assert decode("yolo", given, SIZE)[0]["scores"].isnan().sum() == 1
    returned = answers()
    returned["logits"][0, 3] = math.nan
    for decoding in PROCESSORS:
        first, second = decode(decoding, returned, SIZE)
        assert first["scores"].isnan().any()
        assert not second["scores"].isnan().any()
    many = torch.full((1, 5, 500), 4.0)  # more than are kept, side by side, the last one without a number
    many[0, 0], many[0, 4] = 10 * torch.arange(500), torch.rand(500) + 0.1
    many[0, 4, 499] = math.nan
    logits = torch.randn(1, 500, 2)
    logits[0, 499] = math.nan
    beside = {"logits": logits, "pred_boxes": torch.rand(1, 500, 4)}
    for decoding, given in (
        ("yolo", many),
        ("yolo5", many.mT.repeat_interleave(torch.tensor([1, 1, 1, 1, 2]), 2)),
        ("detr-sigmoid", beside),
    ):
        assert decode(decoding, given, SIZE)[0]["scores"].isnan().any(), decoding


class Yolo(nn.Module):
    """Detects as YOLO's networks do: 40 candidates of 3 classes, the scores by the red of three places."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.broken = broken
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        found = x.new_full((len(x), 7, 40), 0.01)
        for index, place in enumerate(((6, 8), (21, 23), (6, 24))):
            found[:, 0, index], found[:, 1, index], found[:, 2:4, index] = place[1], place[0], 8
            found[:, 4 + index, index] = self.gain * x[
                :, 0, place[0] - 2 : place[0] + 2, place[1] - 2 : place[1] + 2
            ].mean(dim=(1, 2)).clamp(0, 1)
        if self.broken:
            found[:, 4:, 5] = torch.where(x[:, :1, 1, 1] > 0.5, math.nan, found[:, 4:, 5])
        return found


def test_a_network_of_yolos_kind_is_explained():
    engine = Engine(Yolo(), preprocessing=PREPROCESSING, labels=LABELS[1:], outputs="boxes", detections="yolo")
    image = picture((4, 2, 12, 10), (20, 18, 27, 25))
    found = engine.explain(image, [("d_rise", {"masks": 60, "grid": 8})], ["top2"])
    assert {one.label for one in found.predictions} == {"cat", "dog"}
    by_label = {one.target.label: one.array for one in found.maps}
    for label, (y, x) in (("cat", (6, 8)), ("dog", (21, 23))):
        inside = by_label[label][y - 3 : y + 3, x - 3 : x + 3].mean()
        assert inside > 1.2 * by_label[label].mean(), label


def test_an_output_that_is_no_number_fails_its_item_alone():
    options = {"preprocessing": PREPROCESSING, "labels": LABELS[1:], "outputs": "boxes", "detections": "yolo"}
    network = Network(Yolo(broken=True), **options)
    bad, good = picture((4, 2, 12, 10)), picture((4, 2, 12, 10))
    bad[1, 1] = 1.0
    items = [Item(image, (Target(top_k=1),), (Task(0, DRise(masks=4), 0, 4),)) for image in (bad, good)]
    refused, answered = Executor(network).execute(items).outcomes
    assert isinstance(refused, Unsupported)
    assert "not finite" in str(refused)
    assert answered.predictions[0].index == 0


class Raw(nn.Module):
    def __init__(self, returned) -> None:
        super().__init__()
        self.returned = returned

    def forward(self, x: Tensor):
        return self.returned


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (torch.rand(2, 7, 40), "say --detections yolo$"),
        (torch.rand(2, 40, 8), "say --detections yolo5$"),
        (answers(), r"say --detections detr \(with a class for no object\) or detr-sigmoid$"),
        (torch.rand(2, 3), r"it returned a tensor \(2, 3\)$"),
    ],
)
def test_what_leaves_its_last_steps_to_others_is_told_what_to_say(returned, said):
    with pytest.raises(Unsupported, match=said):
        Engine(Raw(returned), preprocessing=PREPROCESSING, labels=LABELS, outputs="boxes")


@pytest.mark.parametrize(
    ("decoding", "returned", "said"),
    [
        ("yolo", torch.rand(2, 40, 8), r"a tensor \(images, 4 \+ classes, candidates\); .*a tensor \(2, 40, 8\)"),
        ("yolo5", torch.rand(2, 7, 40), r"a tensor \(images, candidates, 5 \+ classes\); .*a tensor \(2, 7, 40\)"),
        ("detr", torch.rand(2, 7, 40), r"logits \(images, queries, classes\) and boxes"),
        ("detr", (torch.rand(2, 7, 4), torch.rand(2, 7, 4)), "logits"),
        ("detr-sigmoid", {"logits": torch.rand(2, 7, 4)}, "logits"),
    ],
)
def test_what_is_of_another_form_is_refused_with_what_came(decoding, returned, said):
    with pytest.raises(Unsupported, match=said):
        Engine(Raw(returned), preprocessing=PREPROCESSING, labels=LABELS, outputs="boxes", detections=decoding)


def test_detections_are_made_for_boxes_alone_and_of_what_is_known():
    with pytest.raises(InvalidOption, match="detections are made for outputs boxes, and the outputs are softmax"):
        Engine(Yolo(), preprocessing=PREPROCESSING, outputs="softmax", detections="yolo")
    with pytest.raises(InvalidOption, match="detr, detr-sigmoid, yolo, yolo5, got 'ssd'"):
        Engine(Yolo(), preprocessing=PREPROCESSING, labels=LABELS, outputs="boxes", detections="ssd")


class Renamed(nn.Module):
    """Gives detections under names of its own, in another order, as exporters do."""

    def forward(self, x: Tensor):
        scores = x[:, 0, :2, 5].clamp(0, 1)
        boxes = torch.tensor([[3.0, 4, 11, 14], [18, 15, 29, 27]]).expand(len(x), 2, 4)
        return {
            "num": torch.full((len(x), 1), 2),
            "s": scores,
            "c": torch.tensor([[1, 2]]).expand(len(x), 2),
            "b": boxes,
        }


def test_tensors_are_told_apart_by_shape_and_kind():
    engine = Engine(Renamed(), preprocessing=PREPROCESSING, labels=LABELS, outputs="boxes")
    image = np.full((SIDE, SIDE, 3), 0.25, np.float32)
    image[0, 5] = 0.75
    first, second = engine.explain(image, []).predictions
    assert (first.label, first.probability, first.box) == ("cat", 0.75, (3.0, 4.0, 11.0, 14.0))
    assert (second.label, second.probability) == ("dog", 0.25)
