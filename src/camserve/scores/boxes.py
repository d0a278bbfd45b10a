"""Scores of networks that detect objects: D-RISE's similarity to a box (https://arxiv.org/abs/2006.03204, eq. 2 to 5).

For each masked image it is the largest, over what is detected there, of IoU(L, L_j) * O_j * cos(P, P_j): the share of
the boxes' intersection in their union, the detection's score, and the cosine between the classes' probabilities. The P
of a detection that is explained is what the network says of it, that of a named box 1 for its class and 0 for the
others. A network that gives one label and score for each detection has the same for P and P_j, so that the cosine is 1
where the labels are equal and 0 elsewhere. It is 1 for a target of no class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from camserve.errors import InvalidOption, Unsupported
from camserve.methods.spec import Asset
from camserve.scores.detections import LABEL, MOST, SCORE, find_detections
from camserve.scores.returned import Found
from camserve.scores.score import Predictions, Score
from camserve.types import AnyTarget, BoxTarget, Detection, Edges, InputView, Prediction, Target

NO_CLASS = -1
"""Index that stands for no class."""

_FEW = 10
"""Number of detections that an error names."""


@dataclass(frozen=True)
class Boxes:
    """Asks how similar detections are to boxes."""

    edges: Tensor
    """Edges (B or 1, K, 4) in pixels of the network's input, float64; those of 1 are asked of every image. A box
    without area is similar to nothing."""
    classes: Tensor
    """Class indices (B or 1, K); `NO_CLASS`: any class will do."""
    told: Tensor | None = None
    """Probabilities (B or 1, K, C) of all classes, each of length 1; None for a network that gives labels."""

    def similarities(self, found: Tensor) -> Tensor:
        """Returns the similarity (n, K) to what is detected, (n, M, width); 0 where nothing is."""
        edges = self.edges.to(found)
        share = intersection_over_union(edges[:, :, None], found[:, None, :, :SCORE])
        return (share * found[:, None, :, SCORE] * self._cosines(found)).amax(dim=2)

    def _cosines(self, found: Tensor) -> Tensor:
        """Returns the cosines (n, K, M) between the targets' classes and those of detections (n, M, width)."""
        classes = self.classes.expand(len(found), -1)
        if self.told is None:
            cosines = (found[:, None, :, LABEL] == classes[:, :, None]).to(found)
        else:
            unit = nn.functional.normalize(found[:, :, LABEL:], dim=2)
            cosines = self.told.to(found) @ unit.transpose(1, 2)
        return cosines.masked_fill((classes == NO_CLASS)[:, :, None], 1)

    def column(self, number: int) -> Boxes:
        """Returns the box of one target."""
        one = slice(number, number + 1)
        return Boxes(self.edges[:, one], self.classes[:, one], None if self.told is None else self.told[:, one])

    @classmethod
    def stacked(cls, asked: Sequence[Boxes]) -> Boxes:
        """Returns the boxes of B images, filled up with boxes that are similar to nothing."""
        pad = torch.nn.utils.rnn.pad_sequence
        edges = pad([one.edges[0] for one in asked], batch_first=True)
        told = [one.told[0] for one in asked if one.told is not None]  # of all, or of none
        classes = pad([one.classes[0] for one in asked], batch_first=True)
        return cls(edges, classes, pad(told, batch_first=True) if told else None)


def intersection_over_union(one: Tensor, other: Tensor) -> Tensor:
    """Returns the share of intersections in unions of boxes (..., 4), x0, y0, x1, y1; 0 where both are empty.

    A box from 2 to 5 is 3 wide. Some libraries count pixels with both ends, and make it 4.
    """
    low, high = torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:])
    both = (high - low).clamp(min=0).prod(dim=-1)
    areas = ((each[..., 2:] - each[..., :2]).clamp(min=0).prod(dim=-1) for each in (one, other))
    union = sum(areas) - both
    return both / union.masked_fill(union <= 0, 1)


@dataclass(frozen=True)
class Detected(Predictions):
    """Holds what was detected in one image, that of the highest score first."""

    boxes: Tensor
    """Edges (M, 4) in pixels of the network's input, or of the sent image once `through` has brought them there."""
    classes: Tensor
    """Class indices (M,)."""
    told: Tensor | None = None
    """Probabilities (M, C) of all classes; None where the network gives labels."""

    def of(self, indices: Sequence[int]) -> tuple[Prediction, ...]:
        """Returns the detections of these numbers, without labels."""
        boxes, classes = self.boxes.tolist(), self.classes.tolist()
        scores = self.numbers["probability"].tolist()
        return tuple(Prediction(classes[index], "", scores[index], box=tuple(boxes[index])) for index in indices)

    def about(self, target: AnyTarget, score: float) -> tuple[Prediction, ...]:
        """Returns a target's class with the similarity to its box; nothing for a target without class."""
        if not isinstance(target, BoxTarget) or target.of is None or target.of.index is None:
            return ()
        return (Prediction(target.of.index, "", score, box=target.box),)

    def through(self, view: InputView) -> Detected:
        """Returns the detections with their boxes in pixels of the sent image, cut off at what the network sees."""
        return replace(self, boxes=torch.tensor([view.sent(box) for box in self.boxes.tolist()]).reshape(-1, 4))


class Detections(Score):
    """Describes detections (n, M, width): edges in pixels of the input, score, and label or probabilities of classes.

    Args:
        shape: (M, width).
    """

    kind = "boxes"
    linear = False
    axes = 2
    lacks: ClassVar[Mapping[Asset, str]] = {
        "layer": "which boxes a detector keeps depends on all of them, so that none of its layers is looked at",
        "gradients": "a detector chooses some boxes among many, and a choice has no gradient",
    }

    @classmethod
    def select(
        cls,
        network: nn.Module,
        images: Tensor,
        output: str | None,
        wanted: int | None,
        tokens: Tensor | None = None,
    ) -> Found:
        """Returns the network as one that returns rows of detections; raises Unsupported where it returns none."""
        if output is not None:
            raise InvalidOption("outputs boxes are made of boxes, labels and scores together, and no output is chosen")
        return find_detections(network, images)

    def check(self, outputs: Tensor) -> None:
        """Raises InvalidOption where scores are none of 0..1."""
        scores = self._found(outputs)[:, :, SCORE]
        if not ((scores >= 0) & (scores <= 1)).all():
            given = f"{scores.min():.3g}..{scores.max():.3g}"
            raise InvalidOption(f"scores of detections are numbers in 0..1, and this network gives {given}")

    def classes(self, numbers: int) -> int | None:
        """Returns the number of classes; None for a network that gives labels, and does not tell how many there are."""
        return self._classes_told or None

    @property
    def _classes_told(self) -> int:
        """Number of classes of which each detection has the probability; 0 where it has a label."""
        return self.shape[1] - LABEL if self.shape[1] > LABEL + 1 else 0

    def _found(self, outputs: Tensor) -> Tensor:
        return outputs.reshape(len(outputs), MOST, -1)

    def predictions(self, outputs: Tensor) -> Detected:
        """Returns the detections of one image, that of the highest score first."""
        found = self._found(outputs[None])[0]
        found = found[found[:, SCORE] > 0]
        told = found[:, LABEL:] if self._classes_told else None
        classes = found[:, LABEL].round().long() if told is None else told.argmax(dim=1)
        # They are in order already, so that the first one ranks highest.
        return Detected(-torch.arange(len(found)), {"probability": found[:, SCORE]}, found[:, :SCORE], classes, told)

    def value(self, outputs: Tensor, asked: Boxes) -> Tensor:
        """Raises Unsupported: a similarity to detections has no gradient."""
        raise Unsupported(f"outputs boxes have no score with a gradient: {self.lacks['gradients']}")

    def query_value(self, outputs: Tensor, asked: Boxes) -> Tensor:
        """Returns the similarities (n, K) to the targets' boxes."""
        return asked.similarities(self._found(outputs))

    def size(self, outputs: Tensor, asked: Boxes) -> Tensor:
        """Returns 0: a similarity is a single number."""
        return outputs.new_zeros(len(outputs), asked.classes.shape[1])

    def query_size(self, asked: Boxes) -> Tensor:
        """Returns 0."""
        return torch.zeros(asked.classes.shape, device=asked.classes.device)

    def is_class(self, asked: Boxes) -> Tensor:
        """Returns that all are: a similarity starts at 0, where nothing of the kind is detected."""
        return torch.ones_like(asked.classes, dtype=torch.bool)

    def ask(self, targets: Sequence[AnyTarget], device: torch.device) -> Boxes:
        """Returns the targets' boxes; of an image without detections one that is similar to nothing."""
        edges, classes, told = [], [], []
        for target in targets:
            if not isinstance(target, BoxTarget | Detection):
                name = type(target).__name__.lower()
                raise Unsupported(f"outputs boxes are explained for a box or a detection, and have no {name}")
            box, of = (target.seen or target.box, target.of) if isinstance(target, BoxTarget) else ((0.0,) * 4, None)
            edges.append(box)
            classes.append(NO_CLASS if of is None or of.index is None else of.index)
            told.append(target.probabilities if isinstance(target, BoxTarget) else ())
        asked = torch.tensor(edges, dtype=torch.float64, device=device).reshape(1, -1, 4)
        indices = torch.tensor(classes, dtype=torch.long, device=device)[None]
        return Boxes(asked, indices, self._unit(classes, told, device))

    def _unit(self, classes: Sequence[int], told: Sequence[Sequence[float]], device: torch.device) -> Tensor | None:
        """Returns all classes' probabilities (1, K, C), each of length 1; None for a network that gives labels."""
        if not self._classes_told:
            if any(told):
                raise Unsupported("this network gives a label of each detection, and no probabilities of all classes")
            return None
        each = torch.zeros(1, len(classes), self._classes_told, dtype=torch.float64, device=device)
        for row, index, given in zip(each[0], classes, told, strict=True):
            if given:
                row += row.new_tensor(given)
            elif index != NO_CLASS:
                row[index] = 1
        return nn.functional.normalize(each, dim=2)

    def placed(self, target: AnyTarget, view: InputView) -> AnyTarget:
        """Returns a target with what the network sees of the image; raises InvalidOption for a box outside of it."""
        if isinstance(target, BoxTarget):
            _check_inside(target.box, view)
            return replace(target, seen=view.seen(target.box))
        if isinstance(target, Target):
            target = Detection(of=target)
        return replace(target, view=view) if isinstance(target, Detection) else target

    def resolved(self, target: AnyTarget, outputs: Tensor) -> tuple[AnyTarget, ...]:
        """Returns the boxes of the detections that a target stands for, each with its class.

        Where nothing is detected, a target of detections stays as it is, and is similar to nothing.

        Raises:
            InvalidOption: there is no such detection; the text names those that there are.
        """
        if isinstance(target, Target):
            target = Detection(of=target)
        if not isinstance(target, Detection):
            return (target,)
        found = self.predictions(outputs)
        if not len(found.classes):
            return (Detection(0),) if target.of is not None and target.of.top_k is not None else (target,)
        return tuple(self._target(found, number, target.view) for number in _meant(target, found))

    def _target(self, found: Detected, number: int, view: InputView | None) -> BoxTarget:
        box: Edges = tuple(found.boxes[number].tolist())
        index = int(found.classes[number])
        told = () if found.told is None else tuple(found.told[number].tolist())
        return BoxTarget(box if view is None else view.sent(box), Target(index=index), seen=box, probabilities=told)


def _check_inside(box: Edges, view: InputView) -> None:
    left, top, right, bottom = view.crop
    x0, y0, x1, y1 = box
    if x1 <= left or x0 >= right or y1 <= top or y0 >= bottom:
        raise InvalidOption(
            f"the box {', '.join(f'{edge:g}' for edge in box)} is outside of what the network sees of the image: "
            f"x {left:g}..{right:g}, y {top:g}..{bottom:g}"
        )


def _meant(target: Detection, found: Detected) -> list[int]:
    """Returns the numbers of the detections that a target names."""
    numbers = list(range(len(found.classes)))
    if target.of is not None and target.of.top_k is not None:
        return numbers[: target.of.top_k]
    if target.of is not None:
        meant = [number for number in numbers if found.classes[number] == target.of.index][:1]
    else:
        meant = [number for number in numbers if number == target.index]
    if meant:
        return meant
    said = ", ".join(
        f"{number}: class {one.index} ({one.probability:.2f})" for number, one in enumerate(found.top(_FEW))
    )
    more = f" and {len(numbers) - _FEW} more" if len(numbers) > _FEW else ""
    what = f"detection {target.index}" if target.of is None else f"detection of class {target.of.index}"
    raise InvalidOption(f"there is no {what} in this image; there are {said}{more}")
