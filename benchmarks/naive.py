"""Runs Group-CAM as its authors' code does: a backward through the whole network, then one masked image at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur


def group_cam(module: nn.Module, x: Tensor, layer: str, target: int, groups: int = 32, theta: float = 70.0) -> Tensor:
    """Returns the map of the PAPER variant (https://arxiv.org/abs/2103.13859).

    Args:
        module: in eval mode.
        x: (1, 3, H, W), normalised.
        layer: name of the module whose output is explained.
        target: class index.
        groups: number of channel groups.
        theta: percentile at or below which a group's values become 0.

    Returns:
        (H, W) in [0, 1], on the device of `x`.
    """
    activations, gradients = _features(module, x, layer, target)
    weighted = gradients.mean(dim=(1, 2), keepdim=True) * activations
    blurred = gaussian_blur(x, [51, 51], [50.0, 50.0])
    with torch.no_grad():
        baseline = module(blurred).softmax(dim=1)[0, target]
        total = torch.zeros_like(x[0, 0])
        for chunk in weighted.chunk(groups):
            small = chunk.sum(dim=0).relu()
            small = torch.where(small > small.quantile(theta / 100), small, 0)
            large = F.interpolate(small[None, None], size=x.shape[-2:], mode="bilinear", align_corners=False)
            if large.max() == large.min():
                continue
            mask = (large - large.min()) / (large.max() - large.min())
            score = module(x * mask + blurred * (1 - mask)).softmax(dim=1)[0, target]
            total += (score - baseline) * mask[0, 0]
    total = total.relu()
    return (total - total.min()) / (total.max() - total.min())


def _features(module: nn.Module, x: Tensor, layer: str, target: int) -> tuple[Tensor, Tensor]:
    kept: list[Tensor] = []
    handle = module.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    with handle:
        logits = module(x.clone().requires_grad_())
    (gradients,) = torch.autograd.grad(logits[0, target], kept[-1])
    return kept[-1].detach()[0], gradients[0]
