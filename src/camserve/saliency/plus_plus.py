"""Computes Grad-CAM++ and Smooth Grad-CAM++: channels weighted by their positive gradients, each location by its share.

Both take the score's exponential for the class, whose second and third derivatives at a location are then the square
and the cube of the gradient there, up to a factor that cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from camserve.methods import GradCamPlusPlus, SmoothGradCamPlusPlus
from camserve.methods.gradient import PLUS_PLUS_EPSILON
from camserve.saliency.features import Features
from camserve.saliency.gradient import gradients_of, quotient, weighted
from camserve.saliency.noise import noisy_copies

PRODUCT_EPSILON = 1e-8
"""Number added to the denominator of the variant PRODUCT, as torchcam 0.5.0 does."""


def grad_cam_plus_plus(features: Features, spec: GradCamPlusPlus) -> Tensor:
    """Returns ReLU(sum_k w_k A_k) with w_k = sum_ij alpha_ij ReLU(g_ij): Grad-CAM++.

    Source: https://arxiv.org/abs/1710.11063.

    PAPER, eq. 19: alpha_ij = g_ij^2 / (2 g_ij^2 + sum_ab(A_ab) g_ij^3 + 1e-6).
    PRODUCT: sum_ab(A_ab g_ab^3) in place of that product, and 1e-8. Where g does not vary over space both are the same.

    Returns:
        (K, u, v).
    """
    gradients, activations = gradients_of(features), features.activations
    square, cube = gradients**2, gradients**3
    if spec.variant == "product":
        cubic = (activations * cube).sum(dim=(-2, -1), keepdim=True)
        return weighted(_weights(gradients, square, cubic + PRODUCT_EPSILON), activations).relu()
    return weighted(_weights(gradients, square, _paper_term(activations, cube)), activations).relu()


def smooth_grad_cam_plus_plus(features: Features, spec: SmoothGradCamPlusPlus, numbers: Tensor) -> Tensor:
    """Returns the sums of g, g^2 and g^3 over the noisy copies of these numbers; the finish makes the map of them.

    The map is Grad-CAM++ (PAPER) with g, g^2 and g^3 averaged over noisy copies of the image, and A of the image.

    Smooth Grad-CAM++ (https://arxiv.org/abs/1908.01224), eq. 8 and 9, with one correction: its numerator is the mean of
    g, with which no noise would not give Grad-CAM++ back; here it is the mean of g^2, as in torchcam 0.5.0.

    The noise is normal; its standard deviation is `sigma` times the range of the network's input.

    Returns:
        (K, 3, C, u, v).
    """
    passes, sample = features.passes, numbers.tolist()
    total = features.activations.new_zeros(len(features.targets), 3, *features.activations.shape)
    for start, stop in passes.runs(0, len(sample)):
        noisy = noisy_copies(features.input, spec.sigma, spec.seed, sample[start:stop])
        for row, gradients in enumerate(passes.layer_gradients(noisy, features.targets)[1]):
            total[row] += torch.stack([(gradients**power).sum(dim=0) for power in (1, 2, 3)])
    return total


def _weights(first: Tensor, second: Tensor, rest: Tensor) -> Tensor:
    """Returns the sum over space of second / (2 second + rest) ReLU(first), (K, C); 0 where the denominator is 0."""
    return quotient(second * first.relu(), 2 * second + rest).sum(dim=(-2, -1))


def _paper_term(activations: Tensor, cube: Tensor) -> Tensor:
    """Returns what eq. 19 adds to 2 g^2 in the denominator, (K, C, u, v)."""
    return activations.sum(dim=(-2, -1), keepdim=True) * cube + PLUS_PLUS_EPSILON
