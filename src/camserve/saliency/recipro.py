"""Computes Recipro-CAM (Byun and Lee 2022): what the network says of each place of a layer alone, without gradients.

A query is one place: the activations there, and zeros elsewhere. Only the tail behind the layer is run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from camserve.methods import ReciproCam
from camserve.saliency.features import Features


def recipro_cam(features: Features, spec: ReciproCam, numbers: Tensor) -> Tensor:
    """Returns the score of each place of these numbers alone, 0 at the others.

    Recipro-CAM (https://arxiv.org/abs/2209.14074), eq. 3 to 5; ViT-Recipro-CAM (https://arxiv.org/abs/2310.02588), in
    which the network's own tokens, such as the class token, are kept. The finish scales from the least score.

    Args:
        features: of one image.
        spec: the method.
        numbers: (n,), row * v + column of the places.

    Returns:
        (K, u, v).
    """
    height, width = features.activations.shape[-2:]
    scores = features.activations.new_zeros(len(features.targets), height * width)

    def altered(first: int, last: int) -> Tensor:
        shown = _shown(numbers[first:last], (height, width), spec.kernel).to(features.activations)
        return shown[:, None] * features.activations

    for first, last, outputs in features.passes.behind(features, len(numbers), altered):
        scores[:, numbers[first:last]] = features.targets.query_value(outputs).T.to(scores)
    return scores.view(-1, height, width)


def _shown(places: Tensor, size: tuple[int, int], kernel: str) -> Tensor:
    """Returns the share of the activations that each query shows, (n, u, v).

    POINT: the place alone. GAUSSIAN: (1 2 1) / 4 in both directions around it, cut off at the border: 1/4 of the place
    itself, 1/8 and 1/16 of its neighbours, as OpenVINO-XAI 1.1 and the authors' code.
    """
    rows, columns = places // size[1], places % size[1]
    return _along(rows, size[0], kernel)[:, :, None] * _along(columns, size[1], kernel)[:, None, :]


def _along(centres: Tensor, length: int, kernel: str) -> Tensor:
    """Returns the shares along one axis, (n, length)."""
    distance = (torch.arange(length, device=centres.device) - centres[:, None]).abs()
    if kernel == "point":
        return distance == 0
    return (2 - distance).clamp(min=0) / 4
