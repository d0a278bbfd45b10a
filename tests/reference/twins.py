"""The methods once more: slow, obvious, one masked image at a time, written from their formulas alone.

Nothing here is shared with camserve, and nothing is clever. Images are (3, H, W) float64 tensors, already normalised.
Every method returns its map before the last min-max: (H, W), float64; `final` is that last step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def normalised(image: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(H, W, 3) uint8 to (3, H, W): pixels in [0, 1], minus mean, over std."""
    channels = [(image[..., c] / 255.0 - mean[c]) / std[c] for c in range(3)]
    return torch.from_numpy(np.stack(channels))


def min_max(z: Tensor) -> Tensor:
    """(z - min) / (max - min); 0 / 0 where z is constant."""
    return (z - z.min()) / (z.max() - z.min())


def final(z: Tensor) -> np.ndarray:
    """mm(ReLU(z)); zeros where that is constant."""
    positive = z.clamp(min=0)
    if positive.max() == positive.min():
        return np.zeros(tuple(z.shape))
    return min_max(positive).numpy()


def up(z: Tensor, like: Tensor) -> Tensor:
    """(u, v) to the height and width of an image; bilinear, corners not aligned."""
    return F.interpolate(z[None, None], size=like.shape[-2:], mode="bilinear", align_corners=False)[0, 0]


def constant(z: Tensor) -> bool:
    """Whether up(z) is constant: asked before it is upsampled, because 0.7 w + 0.7 (1 - w) may round beside 0.7."""
    return z.max().item() == z.min().item()


def activations_and_gradients(module: nn.Module, image: Tensor, layer: str, target: int) -> tuple[Tensor, Tensor]:
    """A and dS_c/dA, both (C, u, v), by a forward hook and a backward through everything."""
    kept = []

    def keep(_module, _inputs, output):
        kept.append(output)
        return output.clone()  # what comes after may work in place

    handle = module.get_submodule(layer).register_forward_hook(keep)
    logits = module(image[None].clone().requires_grad_())
    handle.remove()
    last = kept[-1]  # a module that runs several times counts at its last call
    (gradients,) = torch.autograd.grad(logits[0, target], last)
    return last.detach()[0], gradients[0]


def probability(module: nn.Module, image: Tensor, target: int) -> float:
    with torch.no_grad():
        return module(image[None])[0].softmax(dim=0)[target].item()


def grad_cam(module: nn.Module, image: Tensor, layer: str, target: int) -> Tensor:
    """ReLU(sum_k gap(g_k) A_k)."""
    activations, gradients = activations_and_gradients(module, image, layer, target)
    total = torch.zeros_like(activations[0])
    for a, g in zip(activations, gradients, strict=True):
        total += g.mean() * a
    return up(total.clamp(min=0), image)


def cam(module: nn.Module, image: Tensor, layer: str, target: int, head: nn.Linear) -> Tensor:
    """sum_k W_ck A_k, its positive part."""
    activations, _ = activations_and_gradients(module, image, layer, target)
    total = torch.zeros_like(activations[0])
    for k, a in enumerate(activations):
        total += head.weight[target, k].item() * a
    return up(total.clamp(min=0), image)


def score_cam(module: nn.Module, image: Tensor, layer: str, target: int) -> Tensor:
    """REFERENCE: sum_k p_c(x * mm(up(A_k))) up(A_k), over channels that are not constant."""
    activations, _ = activations_and_gradients(module, image, layer, target)
    total = torch.zeros_like(image[0])
    for a in activations:
        map_k = up(a, image)
        if constant(a):
            continue
        total += probability(module, image * min_max(map_k), target) * map_k
    return total


def group_maps(module: nn.Module, image: Tensor, layer: str, target: int, groups: int) -> list[Tensor]:
    """M_l = ReLU(sum of w_k A_k over group l), (u, v) each; channels in order, as torch.chunk splits them."""
    activations, gradients = activations_and_gradients(module, image, layer, target)
    weighted = torch.stack([g.mean() * a for a, g in zip(activations, gradients, strict=True)])
    return [chunk.sum(dim=0).clamp(min=0) for chunk in torch.chunk(weighted, groups)]


def group_cam_paper(
    module: nn.Module, image: Tensor, layer: str, target: int, groups: int, theta: float = 70.0
) -> Tensor:
    """sum_l (p_c(x M'_l + blur(x) (1 - M'_l)) - p_c(blur(x))) M'_l with de-noised, normalised masks."""
    blurred = blur(image)
    p_blurred = probability(module, blurred, target)
    total = torch.zeros_like(image[0])
    for group_map in group_maps(module, image, layer, target, groups):
        threshold = float(np.percentile(group_map.numpy(), theta))
        kept = torch.where(group_map > threshold, group_map, 0.0)
        large = up(kept, image)
        if constant(kept):
            continue
        mask = min_max(large)
        gain = probability(module, image * mask + blurred * (1 - mask), target) - p_blurred
        total += gain * mask
    return total


def group_cam_reference(
    module: nn.Module, image: Tensor, layer: str, target: int, groups: int, skip_constant: bool = True
) -> Tensor:
    """sum_l ReLU(p_c(x M'_l + blur(x) (1 - M'_l)) - p_c(blur(x))) up(M_l), no de-noising.

    `skip_constant=False` is the authors' code as it stands: a group that is nowhere positive gives 0 / 0.
    """
    blurred = blur(image)
    p_blurred = probability(module, blurred, target)
    total = torch.zeros_like(image[0])
    for group_map in group_maps(module, image, layer, target, groups):
        large = up(group_map, image)
        if skip_constant and constant(group_map):
            continue
        mask = min_max(large)
        gain = probability(module, image * mask + blurred * (1 - mask), target) - p_blurred
        total += (gain if gain > 0 else 0.0 * gain) * large  # ReLU that keeps NaN
    return total


def blur(image: Tensor, kernel: int = 51, sigma: float = 50.0) -> Tensor:
    """Gaussian blur of each channel, reflect padding, tap by tap."""
    radius = kernel // 2
    taps = [float(np.exp(-(offset**2) / (2 * sigma**2))) for offset in range(-radius, radius + 1)]
    taps = [tap / sum(taps) for tap in taps]
    _, height, width = image.shape
    padded = np.pad(image.numpy(), ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
    down = sum(tap * padded[:, offset : offset + height] for offset, tap in enumerate(taps))
    across = sum(tap * down[:, :, offset : offset + width] for offset, tap in enumerate(taps))
    return torch.from_numpy(across)
