"""The gradient family once more: slow, obvious, one image and channel at a time, written from the formulas alone.

Nothing here is shared with camserve. Images are (3, H, W) float64 tensors, already normalised. Every method returns its
map before the last min-max: (H, W), float64; `twins.final` is that last step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from reference.twins import activations_and_gradients, up
from torch import Tensor, nn


def hires_cam(module: nn.Module, image: Tensor, layer: str, target: int) -> Tensor:
    """ReLU(sum_k g_k A_k)."""
    activations, gradients = activations_and_gradients(module, image, layer, target)
    total = torch.zeros_like(activations[0])
    for a, g in zip(activations, gradients, strict=True):
        total += g * a
    return up(total.clamp(min=0), image)


def xgrad_cam(module: nn.Module, image: Tensor, layer: str, target: int) -> Tensor:
    """ReLU(sum_k w_k A_k), w_k = sum(g_k A_k) / (sum A_k + 1e-7)."""
    activations, gradients = activations_and_gradients(module, image, layer, target)
    weights = [(g * a).sum() / (a.sum() + 1e-7) for a, g in zip(activations, gradients, strict=True)]
    return up(_positive_sum(weights, activations), image)


def layer_cam(module: nn.Module, image: Tensor, layer: str, target: int) -> Tensor:
    """ReLU(sum_k ReLU(g_k) A_k)."""
    activations, gradients = activations_and_gradients(module, image, layer, target)
    total = torch.zeros_like(activations[0])
    for a, g in zip(activations, gradients, strict=True):
        total += g.clamp(min=0) * a
    return up(total.clamp(min=0), image)


def grad_cam_plus_plus_paper(module: nn.Module, image: Tensor, layer: str, target: int) -> Tensor:
    """alpha = g^2 / (2 g^2 + sum(A) g^3 + 1e-6), 0 where g = 0; w = sum alpha ReLU(g)."""
    activations, gradients = activations_and_gradients(module, image, layer, target)
    weights = []
    for a, g in zip(activations, gradients, strict=True):
        sum_a = a.sum().item()
        weights.append(
            sum(s**2 / (2 * s**2 + sum_a * s**3 + 1e-6) * max(s, 0.0) for s in g.flatten().tolist() if s != 0)
        )
    return up(_positive_sum(weights, activations), image)


def grad_cam_plus_plus_product(module: nn.Module, image: Tensor, layer: str, target: int) -> Tensor:
    """Differs from `grad_cam_plus_plus_paper` by sum(A g^3) in the denominator, and 1e-8."""
    activations, gradients = activations_and_gradients(module, image, layer, target)
    weights = []
    for a, g in zip(activations, gradients, strict=True):
        cubic = (a * g * g * g).sum().item()
        weights.append(sum(s**2 / (2 * s**2 + cubic + 1e-8) * max(s, 0.0) for s in g.flatten().tolist() if s != 0))
    return up(_positive_sum(weights, activations), image)


def smooth_grad_cam_plus_plus(
    module: nn.Module, image: Tensor, layer: str, target: int, noise: Sequence[Tensor], sigma: float
) -> Tensor:
    """Grad-CAM++ of the paper with mean g, mean g^2 and mean g^3 over image + sigma (max - min) noise_i."""
    activations, _ = activations_and_gradients(module, image, layer, target)
    spread = sigma * (image.max() - image.min())
    found = [activations_and_gradients(module, image + spread * one, layer, target)[1] for one in noise]
    first, second, third = (
        torch.stack([g**power for g in found]).mean(dim=0).flatten(1).tolist() for power in (1, 2, 3)
    )
    weights = []
    for k, a in enumerate(activations):
        sum_a = a.sum().item()
        weights.append(
            sum(
                d2 / (2 * d2 + sum_a * d3 + 1e-6) * max(d1, 0.0)
                for d1, d2, d3 in zip(first[k], second[k], third[k], strict=True)
            )
        )
    return up(_positive_sum(weights, activations), image)


def integrated_grad_cam_paper(
    module: nn.Module, image: Tensor, layer: str, target: int, black: Tensor, steps: int = 20
) -> Tensor:
    """ReLU of the mean over t = 1/m .. 1 of sum_k gap(g_k(gamma(t))) (A_k(gamma(t)) - A_k(black))."""
    activations_of_black, _ = activations_and_gradients(module, black, layer, target)
    total = torch.zeros_like(activations_of_black[0])
    for step in range(1, steps + 1):
        activations, gradients = activations_and_gradients(
            module, black + step / steps * (image - black), layer, target
        )
        for a, b, g in zip(activations, activations_of_black, gradients, strict=True):
            total += g.mean() * (a - b) / steps
    return up(total, image).clamp(min=0)


def integrated_grad_cam_reference(
    module: nn.Module, image: Tensor, layer: str, target: int, black: Tensor, steps: int = 50
) -> Tensor:
    """The plain sum of the Grad-CAMs of black + i/m (image - black), i = 0 .. m-1."""
    total = torch.zeros_like(image[0])
    for step in range(steps):
        activations, gradients = activations_and_gradients(
            module, black + step / steps * (image - black), layer, target
        )
        total += up(_positive_sum([g.mean() for g in gradients], activations), image)
    return total


def eigen_cam(module: nn.Module, image: Tensor, layer: str, target: int) -> Tensor:
    """First principal component of the places, centred, by a full singular value decomposition; positive part."""
    activations, _ = activations_and_gradients(module, image, layer, target)
    _, height, width = activations.shape
    rows = torch.stack([activations[:, y, x] for y in range(height) for x in range(width)])
    component = (first_component(rows) * eigen_cam_sign(rows)).reshape(height, width)
    return up(component.clamp(min=0), image)


def first_component(rows: Tensor) -> Tensor:
    """(places,) scores of (places, channels) on their first principal component, of whatever sign."""
    centred = rows - rows.mean(dim=0)
    _, _, right = torch.linalg.svd(centred)
    return centred @ right[0]


def eigen_cam_sign(rows: Tensor) -> int:
    """Returns the factor of `first_component`'s scores, 1 or -1, by the rule's three cases in their order."""
    scores = [float(score) for score in first_component(rows)]
    brightness = [float(row.mean()) for row in rows]
    size = math.sqrt(sum(float(value) ** 2 for value in rows.flatten()) / rows.numel())
    if statistics.pstdev(brightness) > 1e-4 * size and abs(statistics.correlation(scores, brightness)) >= 0.05:
        return 1 if statistics.correlation(scores, brightness) > 0 else -1
    spread, middle = statistics.pstdev(scores), statistics.fmean(scores)
    skewness = statistics.fmean(((score - middle) / spread) ** 3 for score in scores)
    if abs(skewness) >= 1e-3:
        return 1 if skewness > 0 else -1
    largest = max(abs(score) for score in scores)
    outstanding = next(score for score in scores if score**2 >= 0.999 * largest**2)
    return 1 if outstanding > 0 else -1


def black(mean: Sequence[float], std: Sequence[float], like: Tensor) -> Tensor:
    """(3, H, W): pixel value 0, normalised."""
    channels = [torch.full_like(like[0], -m / s) for m, s in zip(mean, std, strict=True)]
    return torch.stack(channels)


def _positive_sum(weights: Sequence[Tensor | float], activations: Tensor) -> Tensor:
    """ReLU(sum_k w_k A_k)."""
    total = torch.zeros_like(activations[0])
    for weight, a in zip(weights, activations, strict=True):
        total += float(weight) * a
    assert math.isfinite(total.sum().item())
    return total.clamp(min=0)
