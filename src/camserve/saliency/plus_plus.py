"""Grad-CAM++ and Smooth Grad-CAM++: channels weighted by their positive gradients, each place by its own share.

Both take the score's exponential for the class, whose second and third derivatives at a place are then the square and
the cube of the gradient there, up to a factor that cancels.
"""

from __future__ import annotations

from torch import Tensor

from camserve.methods import GradCamPlusPlus, SmoothGradCamPlusPlus
from camserve.saliency.features import Features
from camserve.saliency.gradient import gradients_of, quotient, weighted
from camserve.saliency.noise import gaussian

PAPER_EPSILON = 1e-6
"""Added to the denominator of eq. 19, as grad-cam 1.5.7 does. Not small beside the squares of gradients below 1e-3."""
PRODUCT_EPSILON = 1e-8
"""As torchcam 0.5.0 does."""


def grad_cam_plus_plus(features: Features, spec: GradCamPlusPlus) -> Tensor:
    """ReLU(sum_k w_k A_k) with w_k = sum_ij alpha_ij ReLU(g_ij): Grad-CAM++ (https://arxiv.org/abs/1710.11063).

    PAPER, eq. 19: alpha_ij = g_ij^2 / (2 g_ij^2 + sum_ab(A_ab) g_ij^3 + 1e-6).
    PRODUCT: sum_ab(A_ab g_ab^3) in place of that product, and 1e-8. Where g does not vary over space both are the same.

    Returns:
        (K, u, v).
    """
    gradients, activations = gradients_of(features), features.activations
    square, cube = gradients**2, gradients**3
    if spec.variant == "product":
        cubic = (activations * cube).sum(dim=(-2, -1), keepdim=True)
        return weighted(_weights(gradients, square, cubic + PRODUCT_EPSILON), activations)
    return weighted(_weights(gradients, square, _paper_term(activations, cube)), activations)


def smooth_grad_cam_plus_plus(features: Features, spec: SmoothGradCamPlusPlus) -> Tensor:
    """Grad-CAM++ (PAPER) with g, g^2 and g^3 averaged over noisy copies of the image, and A of the image itself.

    Smooth Grad-CAM++ (https://arxiv.org/abs/1908.01224), eq. 8 and 9, with one correction: its numerator is the mean of
    g, with which no noise would not give Grad-CAM++ back; here it is the mean of g^2, as in torchcam 0.5.0.

    The noise is normal; its standard deviation is `sigma` times the range of the network's input.

    Returns:
        (K, u, v).
    """
    first, second, third = _mean_powers(features, spec)
    cubic = _paper_term(features.activations, third)
    return weighted(_weights(first, second, cubic), features.activations)


def _weights(first: Tensor, second: Tensor, rest: Tensor) -> Tensor:
    """(K, C): sum over places of second / (2 second + rest) ReLU(first); nothing where the denominator is 0."""
    return quotient(second * first.relu(), 2 * second + rest).sum(dim=(-2, -1))


def _paper_term(activations: Tensor, cube: Tensor) -> Tensor:
    """(K, C, u, v): what eq. 19 adds to 2 g^2 in the denominator."""
    return activations.sum(dim=(-2, -1), keepdim=True) * cube + PAPER_EPSILON


def _mean_powers(features: Features, spec: SmoothGradCamPlusPlus) -> list[Tensor]:
    """Means over the noisy copies of g, g^2 and g^3, each (K, C, u, v)."""
    image, passes = features.input, features.passes
    deviation = spec.sigma * (image.max() - image.min())
    sums = [features.activations.new_zeros(()) for _ in range(3)]
    for start, stop in passes.runs(0, spec.samples):
        noisy = image + deviation * gaussian(spec.seed, start, stop, image)
        gradients = passes.capture(noisy).gradients(features.targets.expand(stop - start, -1))
        sums = [total + (gradients**power).sum(dim=0) for power, total in enumerate(sums, start=1)]
    return [total / spec.samples for total in sums]
