"""Makes detections of what a detector returns where their last steps are not part of it: DETR's and YOLO's kinds.

"detr": logits (n, Q, K + 1), the last class being "no object", and boxes (n, Q, 4): centre x and y, width and height as
shares of the input. Each of Q queries is one detection, of its most probable class by a softmax
(https://arxiv.org/abs/2005.12872).

"detr-sigmoid": logits (n, Q, K) and boxes as before; each query is a detection of each class, by a sigmoid
(Deformable DETR, https://arxiv.org/abs/2010.04159; RT-DETR, https://arxiv.org/abs/2304.08069).

"yolo": a tensor (n, 4 + K, A) of A candidates: centre x and y, width and height in pixels of the input, and K scores in
0..1, as Ultralytics exports YOLOv8 and newer. "yolo5": a tensor (n, A, 5 + K) of the same with the score of there being
an object behind the box, which those of the classes are multiplied with (YOLOv5, YOLOv7). Of those of one class that
overlap by more than `OVERLAP`, the best one is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from camserve.errors import InvalidOption, Unsupported
from camserve.scores.returned import Wrapped, described
from camserve.types.model import DECODINGS, Decoding
from camserve.wording import shown

LEAST = 0.05
"""Score above which there is a detection, as torchvision's detectors have it."""
OVERLAP = 0.7
"""Intersection over union above which two candidates of a class are one detection, as Ultralytics' predictor has it."""

_MOST = 300
"""Number of candidates that are kept before the others are looked at; it is that of `detections.MOST`."""


class Decoded(Wrapped):
    """Makes of a network one that returns a dict of boxes, labels and scores for each image (n, C, H, W).

    Args:
        network: the network.
        decoding: what it returns.

    Raises:
        InvalidOption: there is no such decoding.
    """

    def __init__(self, network: nn.Module, decoding: Decoding) -> None:
        super().__init__(network)
        if decoding not in _WAYS:
            raise InvalidOption(f"detections are made of {', '.join(DECODINGS)}, got {shown(decoding)}")
        self._decoding: Decoding = decoding

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        """Returns the detections of each image; raises Unsupported where the network returns something else."""
        return decode(self._decoding, self._network(x), (x.shape[2], x.shape[3]))


def decode(decoding: Decoding, returned: Any, size: tuple[int, int]) -> list[dict[str, Tensor]]:
    """Returns boxes (M, 4), labels (M,) and scores (M,) of each image, those above `LEAST` alone.

    A score that is no number is kept, so that somebody sees it.

    Args:
        decoding: what was returned.
        returned: tensors, as the module's text describes them; by name, in a tuple, or one alone.
        size: (height, width) of the input.

    Raises:
        Unsupported: something else was returned.
    """
    return [_above(*one) for one in _WAYS[decoding](returned, size)]


def _above(boxes: Tensor, labels: Tensor, scores: Tensor) -> dict[str, Tensor]:
    kept = ~(scores <= LEAST)
    return {"boxes": boxes[kept], "labels": labels[kept], "scores": scores[kept]}


_Each = Iterator[tuple[Tensor, Tensor, Tensor]]


def _detr(returned: Any, size: tuple[int, int]) -> _Each:
    logits, boxes = _answers(returned, size)
    scores, labels = logits.softmax(dim=-1)[..., :-1].max(dim=-1)
    yield from zip(boxes, labels, scores, strict=True)


def _detr_sigmoid(returned: Any, size: tuple[int, int]) -> _Each:
    logits, boxes = _answers(returned, size)
    number = min(_MOST, logits[0].numel())
    for one, edges in zip(logits.sigmoid(), boxes, strict=True):
        scores, places = one.flatten().topk(number)
        yield edges[places // one.shape[1]], places % one.shape[1], scores


def _answers(returned: Any, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns logits (n, Q, K) and edges (n, Q, 4) in pixels of what a network of DETR's kind returned."""
    if isinstance(returned, Mapping) and {"logits", "pred_boxes"} <= set(returned):
        logits, shares = returned["logits"], returned["pred_boxes"]
    else:
        found = _tensors(returned)
        pairs = [(one, other) for one in found for other in found if one is not other and _are_answers(one, other)]
        if len(pairs) != 1:
            raise _refused(returned, "logits (images, queries, classes) and boxes (images, queries, 4)")
        ((logits, shares),) = pairs
    height, width = size
    scale = shares.new_tensor([width, height, width, height])
    return logits.float(), _edges(shares * scale).float()


def _are_answers(logits: Tensor, boxes: Tensor) -> bool:
    return boxes.shape[2] == 4 and boxes.shape[:2] == logits.shape[:2]


def _yolo(returned: Any, size: tuple[int, int]) -> _Each:
    for one in _candidates(returned, "(images, 4 + classes, candidates)", lambda shape: 4 < shape[1] < shape[2]):
        yield _apart(one[:4].T, one[4:].T)


def _yolo5(returned: Any, size: tuple[int, int]) -> _Each:
    for one in _candidates(returned, "(images, candidates, 5 + classes)", lambda shape: 5 < shape[2] < shape[1]):
        yield _apart(one[:, :4], one[:, 5:] * one[:, 4:5])


def _candidates(returned: Any, wanted: str, fits: Callable[[torch.Size], bool]) -> Tensor:
    found = [tensor for tensor in _tensors(returned) if fits(tensor.shape)]
    if len(found) != 1:
        raise _refused(returned, f"a tensor {wanted}")
    return found[0].float()


def _apart(boxes: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the best ones (M,) of candidates (A, 4) that overlap, of each class."""
    from torchvision.ops import batched_nms

    scores, labels = classes.max(dim=1)
    kept = (~(scores <= LEAST)).nonzero()[:, 0]
    edges, scores, labels = _edges(boxes[kept]), scores[kept], labels[kept]
    best = batched_nms(edges, scores, labels, OVERLAP)[:_MOST]
    return edges[best], labels[best], scores[best]


def _edges(boxes: Tensor) -> Tensor:
    """Returns x0, y0, x1, y1 of centre x and y, width and height."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def _tensors(returned: Any) -> list[Tensor]:
    """Returns the tensors (n, ., .) among what was returned."""
    if isinstance(returned, Tensor):
        return [returned] if returned.dim() == 3 and returned.is_floating_point() else []
    values = returned.values() if isinstance(returned, Mapping) else returned
    if not isinstance(returned, Mapping | tuple | list):
        return []
    return [tensor for value in values if isinstance(value, Tensor) for tensor in _tensors(value)]


def _refused(returned: Any, wanted: str) -> Unsupported:
    return Unsupported(f"the detections are to be made of {wanted}; the network returned {described(returned)}")


_WAYS: Mapping[Decoding, Callable[[Any, tuple[int, int]], _Each]] = {
    "detr": _detr,
    "detr-sigmoid": _detr_sigmoid,
    "yolo": _yolo,
    "yolo5": _yolo5,
}
