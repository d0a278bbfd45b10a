"""Computes Integrated Grad-CAM (https://arxiv.org/abs/2102.07805): Grad-CAM added up from a black image to the image.

The way is gamma(t) = black + t (x - black), t in [0, 1]; black is pixel value 0. A query is one image on the way. Sums
are not divided by the number of steps: maps are scaled at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from camserve.methods import IntegratedGradCam
from camserve.saliency.features import Features


def integrated_grad_cam(features: Features, spec: IntegratedGradCam, numbers: Tensor) -> Tensor:
    """Returns the sum over the steps of these numbers, of the m steps there are.

    PAPER: sum_k gap(g_k(gamma(t))) (A_k(gamma(t)) - A_k(black)), t = 1/m, 2/m, ..., 1: the image itself is the last.
    REFERENCE, the authors' notebook: ReLU(sum_k gap(g_k(gamma(t))) A_k(gamma(t))), t = 0, 1/m, ..., (m - 1)/m.

    Returns:
        (K, u, v).
    """
    total = features.activations.new_zeros(len(features.targets), *features.activations.shape[1:])
    if not len(numbers):
        return total
    paper = spec.variant == "paper"
    absent = _black_activations(features) if paper else 0
    for row, activations, weights in _on_the_way(features, (numbers + paper).to(features.input) / spec.images):
        maps = torch.einsum("nc,ncuv->nuv", weights, activations - absent)
        total[row] += (maps if paper else maps.relu()).sum(dim=0)
    # On the way from black to black only rounding differs, and scaling would make a map of it.
    leads_nowhere = paper & (features.input == features.passes.black).all()
    return total.masked_fill(leads_nowhere, 0)


def _black_activations(features: Features) -> Tensor:
    """Returns the layer's maps of the black image, (1, C, u, v)."""
    black = features.passes.black.expand_as(features.input)
    return features.passes.capture(black[None]).activations


def _on_the_way(features: Features, t: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (index of a target, activations (n, C, u, v), spatial means of its gradients (n, C)) at t (N,).

    One micro-batch comes after the other, and in each of them one target after the other.
    """
    image, passes = features.input, features.passes
    for start, stop in passes.runs(0, len(t)):
        on_the_way = torch.lerp(passes.black, image, t[start:stop, None, None, None])
        activations, gradients = passes.layer_gradients(on_the_way, features.targets)
        for row, of_target in enumerate(gradients):
            yield row, activations, of_target.mean(dim=(-2, -1))
