"""Computes gradients of the input: with other rules at ReLUs, along a way from a baseline, or averaged over noise.

S_c is the logit of class c, x the network's input (3, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from camserve.errors import Unsupported
from camserve.methods import Deconvolution, GuidedBackprop, GuidedGradCam, IntegratedGradients, SmoothGrad
from camserve.saliency.features import Features
from camserve.saliency.masks import upsample
from camserve.saliency.noise import noisy_copies
from camserve.saliency.relu_rules import ReluRule, Rule


def guided_backprop(features: Features, spec: GuidedBackprop) -> Tensor:
    """Returns max over channels of |dS_c/dx|, with only positive gradients through active ReLUs.

    Guided backpropagation (https://arxiv.org/abs/1412.6806), section 3.4; its gradient is that of Captum 0.9.0's
    GuidedBackprop.

    Returns:
        (K, H, W).

    Raises:
        Unsupported: the network has no ReLU.
    """
    return _largest(_ruled_gradients(features, "guided"))


def deconvolution(features: Features, spec: Deconvolution) -> Tensor:
    """Returns max over channels of |dS_c/dx|, with only positive gradients through ReLUs, active or not.

    Deconvolution (https://arxiv.org/abs/1311.2901), section 2.1; its gradient is that of Captum 0.9.0's Deconvolution.

    Returns:
        (K, H, W).

    Raises:
        Unsupported: the network has no ReLU.
    """
    return _largest(_ruled_gradients(features, "deconvolution"))


def guided_grad_cam(features: Features, spec: GuidedGradCam) -> Tensor:
    """Returns up(Grad-CAM) times guided backpropagation: Guided Grad-CAM (https://arxiv.org/abs/1610.02391), sec. 3.2.

    Grad-CAM has no channels, so that the product's largest absolute value over channels is the product of the two maps.
    Captum 0.9.0's GuidedGradCam upsamples "nearest".

    Returns:
        (K, H, W).

    Raises:
        Unsupported: the network has no ReLU.
    """
    small = torch.einsum("kc,cuv->kuv", features.weights(), features.activations).relu()
    size = features.input.shape[-2:]
    large = upsample(small, size) if spec.interpolation == "bilinear" else F.interpolate(small[:, None], size)[:, 0]
    return large * _largest(_ruled_gradients(features, "guided"))


def _ruled_gradients(features: Features, rule: Rule) -> Tensor:
    """Returns dS_c/dx by a rule, (K, 3, H, W), from one forward pass for all targets."""
    with ReluRule(rule) as relus:
        gradients = list(features.passes.input_gradients(features.input[None], features.targets))
    if not relus.applied:
        raise Unsupported(f"{rule} gradients are a rule for ReLUs, and this network has none on the way to its logits")
    return torch.cat(gradients)


def _largest(gradients: Tensor) -> Tensor:
    """Returns the largest absolute value over channels: (K, 3, H, W) to (K, H, W)."""
    return gradients.abs().amax(dim=1)


def integrated_gradients(features: Features, spec: IntegratedGradients, numbers: Tensor) -> Tensor:
    """Returns sum over channels of (x - b) sum_i w_i dS_c/dx(b + t_i (x - b)), over the points of these numbers.

    Integrated Gradients (https://arxiv.org/abs/1703.01365), eq. 1. t_i and w_i are the points and weights of the
    Gauss-Legendre quadrature of [0, 1], as in Captum 0.9.0. With all points the sum over space is S_c(x) - S_c(b).

    Returns:
        (K, H, W).
    """
    chosen = numbers.cpu().numpy()
    points, weights = (values[chosen] for values in _gauss_legendre(spec.steps))
    image, passes = features.input, features.passes
    baseline = passes.black if spec.baseline == "black" else torch.zeros_like(passes.black)

    def on_the_way(first: int, last: int) -> Tensor:
        t = image.new_tensor(points[first:last])
        return torch.lerp(baseline, image, t[:, None, None, None])

    total = image.new_zeros(len(features.targets), *image.shape)
    for first, last, row, gradients in gradients_along(features, on_the_way, 0, len(numbers)):
        total[row] += torch.einsum("n,nchw->chw", image.new_tensor(weights[first:last]), gradients)
    return ((image - baseline) * total).sum(dim=1)


def gradients_along(
    features: Features, images: Callable[[int, int], Tensor], start: int, stop: int
) -> Iterator[tuple[int, int, int, Tensor]]:
    """Yields (first, last, index of a target, its gradients (n, 3, H, W)) of the images first..last-1.

    One micro-batch comes after the other, and in each of them one target after the other.

    Where an image is saturated over the whole window of a max pooling, rounding alone decides to which pixel there the
    gradient goes; in float32 a pass of one image may round otherwise than a pass of many.
    """
    for first, last in features.passes.runs(start, stop):
        for row, gradients in enumerate(features.passes.input_gradients(images(first, last), features.targets)):
            yield first, last, row, gradients


@lru_cache(maxsize=16)
def _gauss_legendre(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns points and weights for the integral over [0, 1]; the weights sum to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return (nodes + 1) / 2, weights / 2


def smooth_grad(features: Features, spec: SmoothGrad, numbers: Tensor) -> Tensor:
    """Returns the sum of dS_c/dx over the noisy copies of x of these numbers; the finish makes the map of it.

    The map is max over channels of |mean gradient|: SmoothGrad (https://arxiv.org/abs/1706.03825). The noise is normal;
    its standard deviation is `sigma` times the range of the network's input.

    Returns:
        (K, 3, H, W).
    """
    image, sample = features.input, numbers.tolist()

    def noisy(first: int, last: int) -> Tensor:
        return noisy_copies(image, spec.sigma, spec.seed, sample[first:last])

    total = image.new_zeros(len(features.targets), *image.shape)
    for _, _, row, gradients in gradients_along(features, noisy, 0, len(sample)):
        total[row] += gradients.sum(dim=0)
    return total
