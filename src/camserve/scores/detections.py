"""Finds the detections in what a detector returns, and makes of it a network that returns them in rows of one length.

What is understood, for n images: a list of n dicts, or a dict of lists or tensors, or a tuple of them, with boxes
(M, 4), labels (M,) and scores (M,), as torchvision's detectors return, tensors of all images also by other names and in
another order; or with boxes (M, 4), scores (M,) and
probabilities (M, K) of each class in place of labels; or a tensor (n, M, 6) of x0, y0, x1, y1, score, label. Boxes are
in pixels of the network's input, x right, y down. M may be another for each image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from camserve.errors import Unsupported
from camserve.scores.returned import Found, Wrapped

MOST = 300
"""Number of detections of an image that are kept, those of the highest scores; torchvision's networks give no more."""

SCORE, LABEL = 4, 5
"""Columns behind the four edges; with probabilities of classes they begin at LABEL."""

WANTED = (
    "a detector must return for each image boxes (M, 4), labels (M,) and scores (M,), as torchvision's do: a list of "
    "dicts, or a tensor (images, M, 6) of x0, y0, x1, y1, score, label"
)


class Detector(Wrapped):
    """Makes of a detector a network that returns its detections as numbers, (n, M * width), from images (n, C, H, W).

    Each detection has `width` numbers: its four edges, its score, and its label or the probability of every class.
    Those of the highest scores come first; zeros fill up the rest.

    Args:
        network: the detector.
        width: numbers of a detection.
        listed: whether it takes a list of images instead of one tensor.
    """

    def __init__(self, network: nn.Module, width: int, listed: bool) -> None:
        super().__init__(network)
        self.width, self.listed = width, listed

    def forward(self, x: Tensor) -> Tensor:
        """Returns the detections of images (n, C, H, W)."""
        returned = self._network(list(x) if self.listed else x)
        found = [_row(*one, width=self.width) for one in _each(returned, len(x))]
        return torch.stack(found) if found else x.new_zeros(0, MOST * self.width)


def find_detections(network: nn.Module, images: Tensor) -> Found:
    """Returns the network as one that returns rows of detections.

    Args:
        network: in eval mode.
        images: two that differ, (2, channels, H, W).

    Raises:
        Unsupported: it returns something else.
    """
    with torch.no_grad():
        listed, returned = _run(network, images)
    widths = {LABEL + (1 if labels.dim() == 1 else labels.shape[1]) for _, _, labels in _each(returned, len(images))}
    if len(widths) != 1:
        raise Unsupported(f"{WANTED}; it returned detections of {sorted(widths)} numbers")
    (width,) = widths
    detector = Detector(network, width, listed)
    with torch.no_grad():
        outputs = detector(images)
    return Found(detector, outputs, (MOST, width), "", ())


def _run(network: nn.Module, images: Tensor) -> tuple[bool, Any]:
    """Returns whether the network takes a list of images, and what it returns."""
    try:
        return False, network(images)
    except Exception as first:
        try:
            return True, network(list(images))
        except Exception:
            raise first from None


def _each(returned: Any, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields boxes (M, 4), scores (M,) and labels (M,), or probabilities (M, K), of each image."""
    if isinstance(returned, Tensor) and returned.dim() == 3 and returned.shape[2] == LABEL + 1:
        yield from ((one[:, :SCORE], one[:, SCORE], one[:, LABEL]) for one in returned)
        return
    images = list(_images(returned, batch))
    if len(images) != batch:
        raise Unsupported(f"{WANTED}; for {batch} images it returned {_described(returned)}{_hint(returned)}")
    for values in images:
        yield _checked(values, returned)


def _images(returned: Any, batch: int) -> Iterator[Any]:
    """Yields what was returned for each image."""
    if isinstance(returned, Sequence) and all(isinstance(one, Mapping) for one in returned):
        yield from returned
    elif tensors := _by_shape(returned):
        yield from ({name: values[index] for name, values in tensors.items()} for index in range(batch))
    elif isinstance(returned, Mapping):
        yield from (
            {name: values[index] for name, values in returned.items() if hasattr(values, "__getitem__")}
            for index in range(batch)
        )
    elif isinstance(returned, tuple) and len(returned) in (3, 4):
        for index in range(batch):
            yield dict(
                zip(("boxes", "labels", "scores", "probabilities"), (one[index] for one in returned), strict=False)
            )


def _by_shape(returned: Any) -> dict[str, Tensor]:
    """Returns boxes (n, M, 4), labels (n, M), whole numbers, and scores (n, M), whatever their names and their order.

    Nothing is returned where there is not exactly one of each, or where they have their own names.
    """
    if not isinstance(returned, Mapping | tuple) or (isinstance(returned, Mapping) and "boxes" in returned):
        return {}
    values = list(returned.values()) if isinstance(returned, Mapping) else list(returned)
    tensors = [value for value in values if isinstance(value, Tensor)]
    boxes = [tensor for tensor in tensors if tensor.dim() == 3 and tensor.shape[2] == SCORE]
    told = [tensor for tensor in tensors if boxes and tensor.shape == boxes[0].shape[:2]]
    scores = [tensor for tensor in told if tensor.is_floating_point()]
    labels = [tensor for tensor in told if not tensor.is_floating_point() and tensor.dtype != torch.bool]
    if not len(boxes) == len(scores) == len(labels) == 1:
        return {}
    return {"boxes": boxes[0], "labels": labels[0], "scores": scores[0]}


def _hint(returned: Any) -> str:
    """Returns what to say where a network seems to leave its last steps to others."""
    parts = list(returned.values()) if isinstance(returned, Mapping) else returned
    tensors = [part for part in ([returned] if isinstance(returned, Tensor) else parts) if isinstance(part, Tensor)]
    shapes = [tensor.shape for tensor in tensors if tensor.dim() == 3]
    said = ""
    if any(shape[2] == SCORE and other[:2] == shape[:2] and other[2] != SCORE for shape in shapes for other in shapes):
        said = "detr (with a class for no object) or detr-sigmoid"
    elif len(shapes) == 1:
        said = "yolo" if SCORE < shapes[0][1] < shapes[0][2] else "yolo5" if shapes[0][2] > LABEL else ""
    return f"; where these are what detections are still to be made of, say --detections {said}" if said else ""


def _checked(values: Mapping[str, Any], returned: Any) -> tuple[Tensor, Tensor, Tensor]:
    boxes, scores = values.get("boxes"), values.get("scores")
    labels = values.get("probabilities", values.get("labels"))
    fits = (
        isinstance(boxes, Tensor)
        and isinstance(scores, Tensor)
        and isinstance(labels, Tensor)
        and boxes.shape == (len(boxes), 4)
        and scores.shape == (len(boxes),)
        and labels.shape[:1] == (len(boxes),)
        and labels.dim() in (1, 2)
    )
    if not fits:
        raise Unsupported(f"{WANTED}; it returned {_described(returned)}{_hint(returned)}")
    if labels.shape[1:] == (1,):  # of a single class, which is the class of all
        labels = torch.zeros_like(labels[:, 0])
    return cast("tuple[Tensor, Tensor, Tensor]", (boxes, scores, labels))


def _row(boxes: Tensor, scores: Tensor, labels: Tensor, width: int) -> Tensor:
    """Returns the detections of an image as one row, (MOST * width,)."""
    labels = labels[:, None] if labels.dim() == 1 else labels
    kind = torch.promote_types(boxes.dtype, torch.float32)  # a half has no room for labels
    found = torch.cat([each.to(kind) for each in (boxes, scores[:, None], labels)], dim=1)
    # A stable sort: of equal scores the one that came first stays first.
    found = found[scores.argsort(descending=True, stable=True)[:MOST]]
    return torch.cat([found, found.new_zeros(MOST - len(found), width)]).flatten()


def _described(returned: Any) -> str:
    """Returns what people read of it: `list of dict of 'boxes' (7, 4), 'labels' (7,)`."""
    if isinstance(returned, Tensor):
        return f"a tensor {tuple(returned.shape)}"
    if isinstance(returned, Mapping):
        parts = [f"{key!r} {_described(value)}" for key, value in list(returned.items())[:8]]
        return f"{type(returned).__name__} of {', '.join(parts)}"
    if isinstance(returned, Sequence) and not isinstance(returned, str) and len(returned):
        return f"{type(returned).__name__} of {len(returned)}: {_described(returned[0])}"
    return type(returned).__name__
