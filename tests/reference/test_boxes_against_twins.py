"""D-RISE against its definition, and against xaitk-saliency on the same masks and detections."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectors import BIRD, CAT, DOG, LABELS, PREPROCESSING, Doubtful, Windows, picture
from reference import twins_boxes as twin
from torch import Tensor

from camserve.methods import DRise, Occlusion
from camserve.saliency.rise import RandomMasks
from camserve.scores.boxes import intersection_over_union
from camserve.types import BoxTarget, Detection, Item, Target, Task
from camserve.worker.executor import Executor
from camserve.worker.network import Network

SPEC = DRise(masks=60, grid=5)
TARGETS = (BoxTarget(CAT, Target(index=1)), BoxTarget((17, 14, 30, 29), Target(index=2)), BoxTarget((2, 2, 30, 28)))
IMAGE = picture(CAT, DOG, BIRD)


def network(kind: type[Windows] = Windows) -> Network:
    """In float64, so that what differs from the twins is no rounding of float32."""
    return Network(kind(torch.float64).eval(), preprocessing=PREPROCESSING, labels=LABELS, outputs="boxes")


def masks(spec: DRise = SPEC) -> Tensor:
    """The masks of D-RISE are those of RISE, which have a twin of their own."""
    x = torch.from_numpy(IMAGE).permute(2, 0, 1).double()
    numbers = torch.arange(spec.masks)
    return RandomMasks(x, None, spec, numbers, 8, torch.zeros(1)).masks(0, spec.masks)


def detected(kind: type[Windows], image: Tensor) -> list[twin.Found]:
    (found,) = kind(torch.float64).eval()(image[None])
    probabilities = found.get("probabilities")
    if probabilities is None:
        probabilities = torch.nn.functional.one_hot(found["labels"], len(LABELS))
    rows = zip(found["boxes"].tolist(), found["scores"].tolist(), probabilities.tolist(), strict=True)
    return [(box, score, told) for box, score, told in rows]


def asked(target: BoxTarget) -> list[float] | None:
    return None if target.of is None else [float(index == target.of.index) for index in range(len(LABELS))]


@pytest.mark.parametrize("kind", [Windows, Doubtful])
def test_d_rise_is_its_definition(kind):
    on = network(kind)
    _, result = Executor(on).answer(Item(IMAGE, TARGETS, (Task(0, SPEC, 0, SPEC.masks),)))
    image, some = torch.from_numpy(IMAGE).permute(2, 0, 1).double(), masks()
    with torch.no_grad():
        found = [detected(kind, image * mask) for mask in some]
    for target, sums in zip(TARGETS, result.partials[0].sums, strict=True):
        scores = [twin.similarity(target.box, asked(target), one) for one in found]
        assert max(scores) > 0.1  # the masks leave something of each
        np.testing.assert_allclose(sums, twin.d_rise(scores, list(some)), rtol=1e-6)  # sums travel as float32


def test_a_detection_is_explained_with_the_probabilities_that_it_tells():
    """P of the paper is the whole vector of the detection, not its best class alone."""
    on, targets = network(Doubtful), (Detection(0), Detection(1))
    _, result = Executor(on).answer(Item(IMAGE, targets, (Task(0, SPEC, 0, SPEC.masks),)))
    image, some = torch.from_numpy(IMAGE).permute(2, 0, 1).double(), masks()
    wanted = sorted(detected(Doubtful, image), key=lambda each: -each[1])[:2]
    with torch.no_grad():
        found = [detected(Doubtful, image * mask) for mask in some]
    for (box, _, told), sums in zip(wanted, result.partials[0].sums, strict=True):
        scores = [twin.similarity(box, told, one) for one in found]
        np.testing.assert_allclose(sums, twin.d_rise(scores, list(some)), rtol=1e-6)  # sums travel as float32
        of_best = [twin.similarity(box, [float(each == max(told)) for each in told], one) for one in found]
        assert max(scores) > 1.01 * max(of_best)


def test_occlusion_measures_the_same_similarity():
    on, spec = network(), Occlusion(positions=4)
    _, result = Executor(on).answer(Item(IMAGE, TARGETS[:1], (Task(0, spec, 0, 16),)))
    image = torch.from_numpy(IMAGE).permute(2, 0, 1).double()
    whole = twin.similarity(CAT, asked(TARGETS[0]), detected(Windows, image))
    lost = torch.zeros(32, 32).double()
    counts = torch.zeros(32, 32).double()
    for row in range(4):
        for column in range(4):
            hidden = torch.zeros(32, 32, dtype=torch.bool)
            hidden[8 * row : 8 * min(row + 2, 4), 8 * column : 8 * min(column + 2, 4)] = True
            with torch.no_grad():
                found = detected(Windows, image * ~hidden)
            lost += (whole - twin.similarity(CAT, asked(TARGETS[0]), found)) * hidden
            counts += hidden
    np.testing.assert_allclose(result.partials[0].sums[0], lost / counts, rtol=1e-6, atol=1e-9)


def test_intersection_over_union_is_its_definition():
    boxes = torch.rand(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 20
    boxes[:, 2:] += boxes[:, :2]
    expected = [[twin.iou(one.tolist(), other.tolist()) for other in boxes] for one in boxes]
    found = intersection_over_union(boxes[:, None], boxes[None])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert (found > 0.3).sum() > 40  # not only that of each with itself
    empty = torch.tensor([3.0, 3, 3, 3])
    assert intersection_over_union(empty, empty) == 0


@pytest.mark.parametrize("kind", [Windows, Doubtful])
def test_d_rise_is_that_of_xaitk_saliency(kind):
    """It takes the edges of a box as pixels that belong to it: a box from 2 to 5 is 4 wide there, and 3 here.

    So it is given boxes that end a pixel earlier. Then its IoU is the same number. Its map is divided by how often
    masks keep a pixel, which the paper does not do, and by the largest value.
    """
    from xaitk_saliency.impls.gen_detector_prop_sal.drise_scoring import DRISEScoring

    on = network(kind)
    image, some = torch.from_numpy(IMAGE).permute(2, 0, 1).double(), masks()
    with torch.no_grad():
        found = [detected(kind, image * mask) for mask in some]
    told = sorted(detected(kind, image), key=lambda each: -each[1])[:2]
    named = [(target.box, 1.0, asked(target)) for target in TARGETS[:2]]  # it knows no target without a class
    targets = (Detection(0), Detection(1), *TARGETS[:2])
    _, result = Executor(on).answer(Item(IMAGE, targets, (Task(0, SPEC, 0, SPEC.masks),)))

    def row(box, score, probabilities) -> list[float]:
        return [box[0], box[1], box[2] - 1, box[3] - 1, score, *probabilities]

    nothing = row((0, 0, 1, 1), 0.0, [1.0, 0, 0, 0])
    detections = [[*(row(*each) for each in one), *[nothing] * (3 - len(one))] for one in found]
    wanted = np.array([row(*each) for each in (*told, *named)])
    theirs = DRISEScoring().generate(wanted, np.array(detections), some.numpy())
    for sums, expected in zip(result.partials[0].sums, theirs, strict=True):
        kept = sums / some.sum(dim=0).numpy()
        np.testing.assert_allclose(kept / kept.max(), expected, rtol=0, atol=1e-6)
