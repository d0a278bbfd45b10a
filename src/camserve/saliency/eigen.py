"""Computes Eigen-CAM (https://arxiv.org/abs/2008.00299): what varies most over a layer's cells, whatever the class."""

from __future__ import annotations

import torch
from torch import Tensor

from camserve.methods import EigenCam
from camserve.saliency.features import Features

NOISE = 1e-5
"""Centred activations at most this share of the activations themselves are rounding: some 80 ulp of float32."""
SAME_MEAN = 1e-4
"""A mean over channels that varies over cells by at most this share of the activations' size is the same everywhere.

A LayerNorm makes it so, up to rounding; a residual stream with a large mean of its own multiplies that rounding."""
CLEAR_CORRELATION = 0.05
"""The least absolute correlation with the mean activation that says which sign is meant."""
CLEAR_SKEWNESS = 1e-3
"""The least absolute skewness of the scores that says which sign is meant; symmetric scores have 0, up to rounding."""
EQUAL = 1e-3
"""Variances, or squared scores, that differ by at most this share count as equal: rounding must not choose there."""


def eigen_cam(features: Features, spec: EigenCam) -> Tensor:
    """Returns the cells' scores on the first principal component of the activations, negative ones cut off.

    Returns:
        (K, u, v), the same for every class.
    """
    scores = principal_scores(features.activations).to(features.activations.dtype).relu()
    return scores.expand(len(features.targets), -1, -1)


def principal_scores(activations: Tensor) -> Tensor:
    """Returns X v_1, with X (u v, C) the activations centred over cells and v_1 its first right singular vector.

    It comes from the smaller of the two Gram matrices, X X^T over cells or X^T X over channels, in float64 because a
    Gram matrix squares the ratio of the singular values. A principal component has no sign of its own. The first of
    these that means something chooses it, each by a margin that rounding cannot cross:

    1. the scores correlate positively with the mean over channels of the activations;
    2. the third moment of the scores is positive: few cells stand out from many;
    3. the score of largest absolute value is positive; among equal ones, that of the first cell in reading order.

    Args:
        activations: (C, u, v).

    Returns:
        (u, v), float64; zeros where every channel is constant.
    """
    values = activations.double().flatten(1).T  # (u v, C)
    centred = values - values.mean(dim=0)
    scores = _first_scores(centred)
    constant = centred.square().sum() <= NOISE**2 * values.square().sum()
    scores = (scores * _sign(scores, values)).masked_fill(constant, 0)
    return scores.reshape(activations.shape[-2:])


def _first_scores(centred: Tensor) -> Tensor:
    """Returns the scores on the first component, (u v,), positive at the cell that stands out most.

    Components of equal variance can be turned into each other, and rounding would choose one. The one that is taken
    gives the cell that stands out most all that they have there. Of equal cells the first in reading order counts.
    """
    cells, channels = centred.shape
    few = centred.T if channels < cells else centred  # (min(C, u v), the other)
    variances, vectors = torch.linalg.eigh(few @ few.T)
    first = variances >= (1 - EQUAL) * variances[-1]
    scores = (
        centred @ vectors[:, first] if channels < cells else variances[first].clamp(min=0).sqrt() * vectors[:, first]
    )
    outstanding = scores.square().sum(dim=1)  # (u v,)
    cell = (outstanding >= (1 - EQUAL) * outstanding.max()).int().argmax()
    component: Tensor = scores @ (scores[cell] / outstanding[cell].sqrt())
    return component


def _sign(scores: Tensor, values: Tensor) -> Tensor:
    """Returns 1 to keep the sign of the scores (u v,) of activations (u v, C), -1 to turn it."""
    brightness = values.mean(dim=1)
    brightness = brightness - brightness.mean()
    # The correlation of what is left of a constant may be anything: its size is looked at before its direction.
    varies = brightness.square().mean() > SAME_MEAN**2 * values.square().mean()
    deviations = scores - scores.mean()
    length = deviations.square().sum().sqrt()
    correlation = (deviations @ brightness) / (length * brightness.square().sum().sqrt())
    skewness = deviations.pow(3).mean() / deviations.square().mean().pow(1.5)
    by_skewness = torch.where(skewness.abs() >= CLEAR_SKEWNESS, skewness.sign(), 1)
    return torch.where(varies & (correlation.abs() >= CLEAR_CORRELATION), correlation.sign(), by_skewness)
