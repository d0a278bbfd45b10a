"""Weights activations by plain gradients: one forward, and at most one backward of the tail for each target."""

from __future__ import annotations

import torch
from torch import Tensor

from camserve.errors import Unsupported
from camserve.methods import Cam, GradCam, HiresCam, LayerCam, XgradCam
from camserve.saliency.features import Features
from camserve.saliency.head import is_pooled_linear

CANCELLED = 1e-6
"""A channel's sum counts as 0 if it is at most this share of the sum of absolute values. Behind an instance norm every
sum is 0 but for rounding, and divided by that a channel would have a weight of any size and sign."""
XGRAD_EPSILON = 1e-7
"""Number added to the sum of a channel's activations, as grad-cam 1.5.7 does; torchcam 0.5.0 adds 1e-8."""


def grad_cam(features: Features, spec: GradCam) -> Tensor:
    """Returns sum_k gap(g_k) A_k: Grad-CAM (https://arxiv.org/abs/1610.02391), eq. 1 and 2; the finish takes ReLU.

    Returns:
        (K, u, v).
    """
    return weighted(features.weights(), features.activations)


def hires_cam(features: Features, spec: HiresCam) -> Tensor:
    """Returns sum_k g_k A_k, each location by itself; the finish takes ReLU.

    Source: HiResCAM, https://arxiv.org/abs/2011.08891.

    Returns:
        (K, u, v).
    """
    return torch.einsum("kcuv,cuv->kuv", gradients_of(features), features.activations)


def xgrad_cam(features: Features, spec: XgradCam) -> Tensor:
    """Returns sum_k w_k A_k with w_k = sum(g_k A_k) / (sum(A_k) + 1e-7): XGrad-CAM; the finish takes ReLU.

    Source: https://arxiv.org/abs/2008.02312. Where a layer has negative values, a channel's sum may be nearly 0 and its
    weight enormous: that is the definition.

    Returns:
        (K, u, v).
    """
    gained = torch.einsum("kcuv,cuv->kc", gradients_of(features), features.activations)
    return weighted(quotient(gained, _sums(features.activations) + XGRAD_EPSILON), features.activations)


def _sums(activations: Tensor) -> Tensor:
    """Returns the channels' sums over space, (C,); exactly 0 where only rounding is left of one."""
    total = activations.sum(dim=(-2, -1))
    return total.masked_fill(total.abs() <= CANCELLED * activations.abs().sum(dim=(-2, -1)), 0)


def layer_cam(features: Features, spec: LayerCam) -> Tensor:
    """Returns ReLU(sum_k ReLU(g_k) A_k), each location by itself: LayerCAM (https://doi.org/10.1109/TIP.2021.3089943).

    Returns:
        (K, u, v).
    """
    return torch.einsum("kcuv,cuv->kuv", gradients_of(features).relu(), features.activations).relu()


def gradients_of(features: Features) -> Tensor:
    """Returns the gradients (K, C, u, v), there for every method whose line in the registry asks for them."""
    assert features.gradients is not None, "the registry says which methods need gradients"
    return features.gradients


def weighted(weights: Tensor, activations: Tensor) -> Tensor:
    """Returns sum_k w_k A_k: (K, C) and (C, u, v) to (K, u, v)."""
    return torch.einsum("kc,cuv->kuv", weights, activations)


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Returns numerator / denominator, and 0 where the denominator is 0: a weight is never infinite or NaN."""
    return (numerator / denominator).masked_fill(denominator == 0, 0)


def cam(features: Features, spec: Cam) -> Tensor:
    """Returns sum_k W_ck A_k: class activation mapping; the finish takes ReLU.

    Source: https://arxiv.org/abs/1512.04150, eq. 2. A target that weighs several classes weighs their rows of W.

    Returns:
        (K, u, v).

    Raises:
        Unsupported: the scores are not linear in the layer's spatial means.
    """
    return weighted(pooled_linear_rows(features), features.activations)


def pooled_linear_rows(features: Features) -> Tensor:
    """Returns how the scores depend on the layer's spatial means, (K, C): for a class its row of the head's weight.

    Raises:
        Unsupported: the outputs have not been seen to be W gap(A) + b, or the scores are not linear in them.
    """
    linear, activations = features.classifier, features.activations[None]
    if linear is None or not is_pooled_linear(linear, activations, features.logits[None]).all():
        raise Unsupported("CAM needs a head of global average pooling and one linear layer; here is another")
    return features.targets.through(linear.weight.detach())[0]
