"""The finishes written down in torch, with all samples at hand and channel by channel."""

import torch
from torch import Tensor


def smooth_grad(gradients: Tensor) -> Tensor:
    """Turns gradients of the samples (N, K, 3, H, W) into maps (K, H, W)."""
    return gradients.mean(dim=0).abs().amax(dim=1)


def xrai(attributions: Tensor) -> Tensor:
    """Turns attributions of the points (N, K, 3, H, W) into maps (K, H, W)."""
    return attributions.mean(dim=0).amax(dim=1)


def smooth_grad_cam_plus_plus(gradients: Tensor, activations: Tensor) -> Tensor:
    """Turns gradients of the samples (N, K, C, u, v) and activations (C, u, v) into maps (K, u, v)."""
    maps = []
    for of_target in gradients.unbind(1):
        total = torch.zeros_like(activations[0])
        for channel, plane in enumerate(activations):
            g = of_target[:, channel]
            first, second, third = g.mean(dim=0), (g**2).mean(dim=0), (g**3).mean(dim=0)
            denominator = 2 * second + plane.sum() * third + 1e-6
            alpha = torch.where(denominator == 0, 0, second / denominator)
            total = total + (alpha * first.clamp(min=0)).sum() * plane
        maps.append(total.clamp(min=0))
    return torch.stack(maps)


def sampled_channels(gains: Tensor, answered: Tensor, activations: Tensor) -> Tensor:
    """(K, C, S) gains, of which (C, S) were answered, and (C, u, v) to (K, u, v): no softmax denominator."""
    maps = []
    for of_target in gains:
        total = torch.zeros_like(activations[0])
        for channel, plane in enumerate(activations):
            asked = of_target[channel][answered[channel]]
            if len(asked):
                total = total + asked.mean().exp() * plane
        maps.append(total)
    return torch.stack(maps)
