"""Slow, obvious twins of the scores of detectors, in Python floats: written straight from D-RISE, eq. 2 to 5."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

Box = Sequence[float]
Found = tuple[Box, float, Sequence[float]]
"""Box, objectness and class probabilities of one detection: L, O and P in the paper."""


def iou(one: Box, other: Box) -> float:
    """The area of the intersection over that of the union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (areas[0] + areas[1] - width * height)


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in other))


def similarity(box: Box, probabilities: Sequence[float] | None, found: Sequence[Found]) -> float:
    """max_j s_L * s_O * s_P; s_P is 1 where no class is asked."""
    values = [
        iou(box, other) * objectness * (1.0 if probabilities is None else cosine(probabilities, theirs))
        for other, objectness, theirs in found
    ]
    return max(values, default=0.0)


def d_rise(scores: Sequence[float], masks: Sequence[Tensor]) -> Tensor:
    """sum_i S(d_t, f(x m_i)) m_i."""
    total = masks[0].double() * 0
    for score, mask in zip(scores, masks, strict=True):
        total += score * mask.double()
    return total
