"""Deletion and insertion: what the class's probability does while pixels go, or come, in order of their saliency.

A point of a curve is a masked query: pixel by pixel the image or what replaces it, by comparing the pixel's rank with
the number of pixels changed so far. The comparison is made for one micro-batch at a time, on the device.

    deletion   starts with the image; its pixels become zero in normalised space, the most salient first.
    insertion  starts with the blurred image; its pixels become those of the image, the most salient first.

The score is the softmax probability of the class explained. AUCs of different protocols must not be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from camserve.queries.pack import ask
from camserve.saliency.group_cam import BLUR_KERNEL_PX, BLUR_SIGMA_PX
from camserve.saliency.masks import gaussian_blur


@dataclass(frozen=True)
class Protocol:
    """Constants of deletion and insertion."""

    name: str
    steps: int
    """Of each curve, which has one point more. A step changes ceil(H W / steps) pixels: of 224 x 224, 28 steps change
    1792 each and 112 steps 448."""
    blur: Callable[[Tensor], Tensor] = field(repr=False)
    """(3, H, W) to (3, H, W), normalised: what insertion starts from."""

    def step_px(self, pixels: int) -> int:
        """Pixels changed in each step; the last one may change fewer."""
        return -(-pixels // self.steps)


@lru_cache(maxsize=1)
def _gkern() -> Tensor:
    """`gkern(11, 5)` of the RISE code: a unit impulse through SciPy's Gaussian filter, whose reflection at the borders
    makes it almost a box: not a truncated Gaussian."""
    from scipy.ndimage import gaussian_filter

    impulse = np.zeros((11, 11))
    impulse[5, 5] = 1
    return torch.from_numpy(gaussian_filter(impulse, 5))


def rise_blur(image: Tensor) -> Tensor:
    """(3, H, W) convolved with `gkern(11, 5)`, zeros beyond the border: RISE, `Evaluation.ipynb`."""
    kernel = _gkern().to(image).expand(3, 1, -1, -1)
    return F.conv2d(image[None], kernel, padding=kernel.shape[-1] // 2, groups=3)[0]


def group_cam_blur(image: Tensor) -> Tensor:
    """(3, H, W) blurred as Group-CAM's baseline is: 51 x 51, sigma 50, reflected at the border.

    Raises:
        Unsupported: the image is too small for the reflection.
    """
    return gaussian_blur(image, BLUR_KERNEL_PX, BLUR_SIGMA_PX)


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("rise", steps=28, blur=rise_blur),
        Protocol("group_cam", steps=112, blur=group_cam_blur),
        Protocol("group_cam_paper", steps=28, blur=group_cam_blur),
    )
}
"""rise: https://arxiv.org/abs/1806.07421 and its `Evaluation.ipynb`. group_cam: `ins_del_gc.py` of Group-CAM's authors
since August 2021; group_cam_paper: the same before."""


@dataclass(frozen=True)
class Curve:
    """The points of one curve as masked queries, for `camserve.queries.pack.ask`."""

    begin: Tensor
    """(3, H, W), the first point."""
    end: Tensor
    """(3, H, W), the last point."""
    rank: Tensor
    """(H, W), place of each pixel in the order of change."""
    step_px: int
    columns: Tensor
    """(1,), the class."""
    logits: ClassVar[bool] = False
    """Probabilities are asked."""

    def __len__(self) -> int:
        return -(-self.rank.numel() // self.step_px) + 1

    def blend(self, start: int, stop: int) -> Tensor:
        """Points start..stop-1, (n, 3, H, W)."""
        changed_px = torch.arange(start, stop, device=self.rank.device) * self.step_px
        changed = self.rank < changed_px[:, None, None]
        return torch.where(changed[:, None], self.end, self.begin)


def saliency_rank(saliency: Tensor) -> Tensor:
    """(H, W) saliency to the place of each pixel, 0 the most salient; equal ones in reading order."""
    order = saliency.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return rank.reshape(saliency.shape)


def deletion(image: Tensor, saliency: Tensor, column: Tensor, protocol: Protocol) -> Curve:
    """The deletion curve of a normalised image (3, H, W), a map (H, W) and a class (1,)."""
    step_px = protocol.step_px(saliency.numel())
    return Curve(image, torch.zeros_like(image), saliency_rank(saliency), step_px, column)


def insertion(image: Tensor, saliency: Tensor, column: Tensor, protocol: Protocol) -> Curve:
    """The insertion curve of a normalised image (3, H, W), a map (H, W) and a class (1,)."""
    step_px = protocol.step_px(saliency.numel())
    return Curve(protocol.blur(image), image, saliency_rank(saliency), step_px, column)


def auc(scores: np.ndarray) -> float:
    """Area under a curve by the trapezoid rule, its width being 1: RISE, `evaluation.py`.

    Args:
        scores: (points,), at least two.
    """
    return float((scores.sum() - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1))


@dataclass(frozen=True)
class Faithfulness:
    """Deletion and insertion of one map by one protocol."""

    protocol: str
    deletion: np.ndarray = field(repr=False)
    """(points,), float64."""
    insertion: np.ndarray = field(repr=False)

    @property
    def deletion_auc(self) -> float:
        """Small is good."""
        return auc(self.deletion)

    @property
    def insertion_auc(self) -> float:
        """Large is good."""
        return auc(self.insertion)

    @property
    def overall(self) -> float:
        """Insertion - deletion."""
        return self.insertion_auc - self.deletion_auc


def faithfulness(
    network: Callable[[Tensor], Tensor],
    image: Tensor,
    saliency: Tensor,
    classes: Tensor,
    protocols: Sequence[Protocol],
    micro_batch: int,
) -> list[tuple[Faithfulness, ...]]:
    """Both curves of every map by every protocol, all in one run of masked queries.

    Args:
        network: (n, 3, H, W) to logits (n, classes), in eval mode.
        image: (3, H, W), normalised.
        saliency: (T, H, W).
        classes: (T,), the class that each map explains.
        protocols: which constants.
        micro_batch: how many queries one forward pass takes at most.

    Returns:
        For each map, one result for each protocol.
    """
    curves = [
        make(image, one, column[None], protocol)
        for one, column in zip(saliency, classes, strict=True)
        for protocol in protocols
        for make in (deletion, insertion)
    ]
    points = [scores[:, 0].double().cpu().numpy() for scores in ask(network, curves, micro_batch)]
    results = [
        Faithfulness(protocols[number % len(protocols)].name, *points[2 * number : 2 * number + 2])
        for number in range(len(points) // 2)
    ]
    return [tuple(results[first : first + len(protocols)]) for first in range(0, len(results), len(protocols))]
