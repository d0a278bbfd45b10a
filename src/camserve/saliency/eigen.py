"""Eigen-CAM (https://arxiv.org/abs/2008.00299): what varies most over the layer's places, whatever the class."""

from __future__ import annotations

import torch
from torch import Tensor

from camserve.methods import EigenCam
from camserve.saliency.features import Features

NOISE = 1e-6
"""Centred activations at most this share of the activations themselves are rounding: some 8 ulp of float32."""


def eigen_cam(features: Features, spec: EigenCam) -> Tensor:
    """The places' scores on the first principal component of the activations, negative ones cut off.

    Returns:
        (K, u, v), the same for every class.
    """
    scores = principal_scores(features.activations).to(features.activations.dtype).relu()
    return scores.expand(len(features.targets), -1, -1)


def principal_scores(activations: Tensor) -> Tensor:
    """X v_1, with X (u v, C) the activations centred over places and v_1 its first right singular vector.

    Comes from the smaller of the two Gram matrices, X X^T over places or X^T X over channels, in float64 because a
    Gram matrix squares the ratio of the singular values. A principal component has no sign of its own: this one
    correlates positively with the mean over channels of the activations.

    Args:
        activations: (C, u, v).

    Returns:
        (u, v), float64; zeros where every channel is constant.
    """
    values = activations.double().flatten(1).T  # (u v, C)
    centred = values - values.mean(dim=0)
    scores = _first_scores(centred)
    against = (scores * values.mean(dim=1)).sum() < 0
    constant = centred.square().sum() <= NOISE**2 * values.square().sum()
    scores = torch.where(against, -scores, scores).masked_fill(constant, 0)
    return scores.reshape(activations.shape[-2:])


def _first_scores(centred: Tensor) -> Tensor:
    """(u v,), of either sign."""
    places, channels = centred.shape
    few = centred.T if channels < places else centred  # (min(C, u v), the other)
    found = torch.linalg.eigh(few @ few.T)
    first: Tensor = found.eigenvectors[:, -1]
    return centred @ first if channels < places else found.eigenvalues[-1].clamp(min=0).sqrt() * first
