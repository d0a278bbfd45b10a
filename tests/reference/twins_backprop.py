"""The methods that go back to the pixels once more: slow, obvious, one image at a time, written from their formulas.

As in `twins`: nothing is shared with camserve, images are (3, H, W) float64 tensors, and maps (H, W) are returned
before the last min-max.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from reference import twins
from scipy.special import roots_legendre
from skimage.morphology import dilation, disk
from skimage.segmentation import felzenszwalb
from skimage.transform import resize
from torch import Tensor, nn


def gradient(module: nn.Module, image: Tensor, target: int) -> Tensor:
    """dS_c/dx, (3, H, W), by a backward through everything."""
    image = image.clone().requires_grad_()
    (found,) = torch.autograd.grad(module(image[None])[0, target], image)
    return found


def largest(gradients: Tensor) -> Tensor:
    """Returns the largest absolute value over channels, (H, W)."""
    return torch.stack([channel.abs() for channel in gradients]).max(dim=0).values


class GuidedReLU(nn.Module):
    """The gradient of the output loses its negative values before it reaches the ReLU's own backward."""

    def __init__(self, ceiling: float) -> None:
        super().__init__()
        self.ceiling = ceiling

    def forward(self, z: Tensor) -> Tensor:
        output = self.clipped(z)
        output.register_hook(lambda gradients: gradients * (gradients > 0))
        return output

    def clipped(self, z: Tensor) -> Tensor:
        inside = (z > 0) & (z < self.ceiling)
        return torch.where(inside, z, torch.where(z > 0, self.ceiling, 0.0))


class DeconvolutionReLU(GuidedReLU):
    """The gradient of the output loses its negative values, and the ReLU's own backward is the identity."""

    def clipped(self, z: Tensor) -> Tensor:
        clipped = super().clipped(z).detach()
        return clipped + (z - z.detach())  # the last term is 0, and its gradient 1


def with_relus(module: nn.Module, kind: type[GuidedReLU]) -> nn.Module:
    """A copy in which modules of another kind stand for the ReLUs."""
    changed = copy.deepcopy(module)
    for parent in list(changed.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (nn.ReLU, nn.ReLU6)):
                setattr(parent, name, kind(6.0 if isinstance(child, nn.ReLU6) else math.inf))
    return changed


def guided_backprop(module: nn.Module, image: Tensor, layer: str, target: int) -> Tensor:
    return largest(gradient(with_relus(module, GuidedReLU), image, target))


def deconvolution(module: nn.Module, image: Tensor, layer: str, target: int) -> Tensor:
    return largest(gradient(with_relus(module, DeconvolutionReLU), image, target))


def guided_grad_cam(module: nn.Module, image: Tensor, layer: str, target: int) -> Tensor:
    """up(Grad-CAM) times guided backpropagation, channel by channel, then the largest absolute value."""
    guided = gradient(with_relus(module, GuidedReLU), image, target)
    return largest(guided * twins.grad_cam(module, image, layer, target))


def guided_grad_cam_nearest(module: nn.Module, image: Tensor, layer: str, target: int) -> Tensor:
    """Each place of Grad-CAM is a block of equal pixels."""
    activations, gradients = twins.activations_and_gradients(module, image, layer, target)
    small = sum(g.mean() * a for a, g in zip(activations, gradients, strict=True)).clamp(min=0)
    large = torch.zeros_like(image[0])
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            large[y, x] = small[y * small.shape[0] // image.shape[1], x * small.shape[1] // image.shape[2]]
    return largest(gradient(with_relus(module, GuidedReLU), image, target) * large)


def integrated_gradients(module: nn.Module, image: Tensor, target: int, baseline: Tensor, steps: int) -> Tensor:
    """The sum over channels of (x - b) times the integral of the gradient from b to x, by Gauss-Legendre quadrature."""
    nodes, weights = roots_legendre(steps)
    integral = torch.zeros_like(image)
    for node, weight in zip(nodes, weights, strict=True):
        t = (node + 1) / 2
        integral += weight / 2 * gradient(module, baseline + t * (image - baseline), target)
    return sum(channel for channel in (image - baseline) * integral)


def smooth_grad(module: nn.Module, image: Tensor, target: int, noise: Tensor, sigma: float) -> Tensor:
    """The largest absolute value over channels of the mean gradient; noise (n, 3, H, W), standard normal."""
    total = torch.zeros_like(image)
    for sample in noise:
        total += gradient(module, image + sigma * (image.max() - image.min()) * sample, target)
    return largest(total / len(noise))


def xrai(module: nn.Module, image: Tensor, target: int, pixels: np.ndarray, steps: int) -> Tensor:
    """Takes pixels (H, W, 3), uint8, as the network sees them."""
    return torch.from_numpy(xrai_ranking(xrai_attribution(module, image, target, steps).numpy(), xrai_masks(pixels)))


def xrai_attribution(module: nn.Module, image: Tensor, target: int, steps: int) -> Tensor:
    """(H, W): Integrated Gradients from a constant min(x) and from a constant max(x), averaged; largest channel."""
    total = torch.zeros_like(image)
    for constant in (image.min(), image.max()):
        baseline = torch.full_like(image, constant.item())
        gradients = torch.zeros_like(image)
        for t in np.linspace(0, 1, steps):
            gradients += gradient(module, baseline + t * (image - baseline), target) / steps
        total += (image - baseline) * gradients / 2
    return total.max(dim=0).values


def xrai_masks(pixels: np.ndarray) -> list[np.ndarray]:
    """(H, W) bool each: the segments of six segmentations, dilated by a disk of radius 5."""
    values = pixels.astype(np.float64)
    scaled = (values - values.min()) / (values.max() - values.min()) * 2 - 1
    at_224 = resize(scaled, (224, 224), order=3, mode="constant", preserve_range=True, anti_aliasing=True)
    masks = []
    for scale in (50, 100, 150, 250, 500, 1200):
        labels = felzenszwalb(at_224, scale=scale, sigma=0.8, min_size=150)
        labels = resize(labels, pixels.shape[:2], order=0, mode="constant", preserve_range=True, anti_aliasing=False)
        masks += [dilation(labels == label, disk(5)) for label in range(int(labels.max()) + 1)]
    return masks


def xrai_ranking(attribution: np.ndarray, masks: list[np.ndarray]) -> np.ndarray:
    """Greedy: the mask with the largest mean over its new pixels; masks that add fewer than 50 are dropped."""
    result = np.full(attribution.shape, np.nan)
    left = list(masks)
    while left := [mask for mask in left if (mask & np.isnan(result)).sum() >= 50]:
        best = max(left, key=lambda mask: attribution[mask & np.isnan(result)].mean())
        new = best & np.isnan(result)
        result[new] = attribution[new].mean()
    rest = np.isnan(result)
    if rest.any():
        result[rest] = attribution[rest].mean()
    return result
