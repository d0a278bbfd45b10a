"""Integrated Grad-CAM (https://arxiv.org/abs/2102.07805): Grad-CAM added up on the way from a black image to the image.

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
    """The sum over the steps of these numbers, of m.

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
    for activations, weights in _on_the_way(features, (numbers + paper).to(features.input) / spec.images):
        maps = torch.einsum("nkc,ncuv->nkuv", weights, activations - absent)
        total = total + (maps if paper else maps.relu()).sum(dim=0)
    leads_nowhere = paper & (features.input == features.passes.black).all()  # only rounding differs on the way
    return total.masked_fill(leads_nowhere, 0)


def _black_activations(features: Features) -> Tensor:
    """(1, C, u, v)."""
    black = features.passes.black.expand_as(features.input)
    return features.passes.capture(black[None]).activations


def _on_the_way(features: Features, t: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Activations (n, C, u, v) and spatial means of the gradients (n, K, C) at t (N,), a micro-batch at a time."""
    image, passes = features.input, features.passes
    for start, stop in passes.runs(0, len(t)):
        part = t[start:stop, None, None, None]
        captured = passes.capture(torch.lerp(passes.black, image, part))
        gradients = captured.gradients(features.targets.expand(stop - start, -1))
        yield captured.activations, gradients.mean(dim=(-2, -1))
