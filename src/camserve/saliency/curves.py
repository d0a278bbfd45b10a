"""Follows the score of a target while pixels go (deletion) or come (insertion) in order of their saliency.

A point of a curve is a masked query: pixel by pixel the image or what replaces it, by comparing the pixel's rank with
the number of pixels changed so far. The comparison is made for one micro-batch at a time, on the device.

    deletion   starts with the image; its pixels become zero in normalised space, the most salient first.
    insertion  starts with the blurred image; its pixels become those of the image, the most salient first.

The score is that of masked queries: the probability of a class, a difference of some, a number, a cosine. AUCs of
different protocols must not be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from camserve.errors import InvalidOption
from camserve.saliency.features import Features
from camserve.saliency.group_cam import BLUR_KERNEL_PX, BLUR_SIGMA_PX
from camserve.saliency.masks import gaussian_blur
from camserve.scores import Targets
from camserve.types import DEFAULT_CURVE_STEPS, MapCurves


@dataclass(frozen=True)
class Protocol:
    """Holds the constants of deletion and insertion."""

    name: str
    steps: int
    """Number of steps of each curve, which has one point more. A step changes ceil(H W / steps) pixels: of 224 x 224,
    28 steps change 1792 each and 112 steps 448."""
    blur: Callable[[Tensor], Tensor] = field(repr=False)
    """Makes of a normalised image (3, H, W) the one (3, H, W) that insertion starts from."""

    def step_px(self, pixels: int) -> int:
        """Returns how many pixels each step changes; the last one may change fewer."""
        return -(-pixels // self.steps)


@lru_cache(maxsize=1)
def gaussian_kernel() -> Tensor:
    """Returns `gkern(11, 5)` of the RISE code: a unit impulse through SciPy's Gaussian filter.

    The filter's reflection at the borders makes it almost a box: not a truncated Gaussian.
    """
    from scipy.ndimage import gaussian_filter

    impulse = np.zeros((11, 11))
    impulse[5, 5] = 1
    return torch.from_numpy(gaussian_filter(impulse, 5))


def rise_blur(image: Tensor) -> Tensor:
    """Convolves an image (3, H, W) with `gkern(11, 5)`, zeros beyond the border: RISE, `Evaluation.ipynb`."""
    kernel = gaussian_kernel().to(image).expand(len(image), 1, -1, -1)
    return F.conv2d(image[None], kernel, padding=kernel.shape[-1] // 2, groups=len(image))[0]


def group_cam_blur(image: Tensor) -> Tensor:
    """Blurs an image (3, H, W) as Group-CAM's baseline is: 51 x 51, sigma 50, reflected at the border.

    Raises:
        Unsupported: the image is too small for the reflection.
    """
    return gaussian_blur(image, BLUR_KERNEL_PX, BLUR_SIGMA_PX)


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("rise", steps=DEFAULT_CURVE_STEPS, blur=rise_blur),
        Protocol("group_cam", steps=112, blur=group_cam_blur),
        Protocol("group_cam_paper", steps=28, blur=group_cam_blur),
    )
}
"""Protocols by name. rise: https://arxiv.org/abs/1806.07421 and its `Evaluation.ipynb`. group_cam: `ins_del_gc.py` of
Group-CAM's authors since August 2021. group_cam_paper: the same file before."""


@dataclass(frozen=True)
class Curve:
    """Holds the points of one curve as masked queries, for `camserve.queries.pack.ask`."""

    begin: Tensor
    """First point of the curve, (3, H, W)."""
    end: Tensor
    """Last point of the curve, (3, H, W)."""
    rank: Tensor
    """Rank of each pixel in the order of change, (H, W), from 0."""
    step_px: int
    targets: Targets
    """The one target whose score is asked."""
    by_value: ClassVar[bool] = False

    def __len__(self) -> int:
        return -(-self.rank.numel() // self.step_px) + 1

    def blend(self, start: int, stop: int) -> Tensor:
        """Returns the points start..stop-1, (n, 3, H, W)."""
        return torch.lerp(self.begin, self.end, self.changed(torch.arange(start, stop, device=self.rank.device)))

    def changed(self, points: Tensor) -> Tensor:
        """Returns 1 at the pixels that have changed at these points (n,), 0 elsewhere: (n, 1, H, W).

        `torch.lerp` is exact at both of its ends, and takes half as long as `torch.where`.
        """
        return (self.rank < (points * self.step_px)[:, None, None])[:, None].to(self.begin)


def saliency_rank(saliency: Tensor) -> Tensor:
    """Returns each pixel's rank by saliency (H, W), 0 for the most salient; equal ones rank in reading order."""
    order = saliency.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order, dtype=torch.int32)  # half as much to read at each point
    rank[order] = torch.arange(len(order), device=order.device, dtype=torch.int32)
    return rank.reshape(saliency.shape)


def deletion_and_insertion(image: Tensor, saliency: Tensor, target: Targets, protocol: Protocol) -> tuple[Curve, Curve]:
    """Returns both curves of a normalised image (3, H, W), a map (H, W) and one target.

    They change the same pixels in the same order: from the image to zeros, and from the blurred image to the image.
    """
    rank, step_px = saliency_rank(saliency), protocol.step_px(saliency.numel())
    return (
        Curve(image, torch.zeros_like(image), rank, step_px, target),
        Curve(protocol.blur(image), image, rank, step_px, target),
    )


@dataclass(frozen=True)
class BothCurves:
    """Holds points of a map's deletion curve, and behind its last one those of the insertion curve."""

    deletion: Curve
    """The former, whose pixels change in the same order as those of the latter."""
    begins: Tensor
    """First points of both curves, (2, 3, H, W)."""
    ends: Tensor
    """Last points of both, (2, 3, H, W)."""
    numbers: Tensor
    """Numbers of the points, (N,)."""
    by_value: ClassVar[bool] = False

    @property
    def targets(self) -> Targets:
        """Returns the one target whose score is asked."""
        return self.deletion.targets

    def __len__(self) -> int:
        return len(self.numbers)

    def blend(self, start: int, stop: int) -> Tensor:
        """Returns the images (n, 3, H, W) of the points start..stop-1 among the N."""
        number, points = self.numbers[start:stop], len(self.deletion)
        which = set(self._which[start:stop])
        curve = which.pop() if len(which) == 1 else number // points  # of a single curve nothing is copied
        return torch.lerp(self.begins[curve], self.ends[curve], self.deletion.changed(number % points))

    @cached_property
    def _which(self) -> list[int]:
        """Returns for each point 0 for deletion and 1 for insertion, read from the device once."""
        found: list[int] = (self.numbers // len(self.deletion)).tolist()
        return found


def masks(features: Features, spec: MapCurves, numbers: Tensor) -> BothCurves:
    """Returns the queries of these numbers, of a map's deletion and insertion by the RISE protocol.

    Raises:
        InvalidOption: the map has not the input's size, or explains a class that the network has not.
    """
    image = features.input
    if spec.saliency.shape != image.shape[1:]:
        raise InvalidOption(f"a map of {spec.saliency.shape} does not fit an input of {tuple(image.shape[1:])}")
    saliency = torch.from_numpy(np.array(spec.saliency, np.float32)).to(image.device)
    target = features.targets.other(spec.target, features.logits)
    protocol = replace(PROTOCOLS["rise"], steps=spec.steps)
    both = deletion_and_insertion(image, saliency, target, protocol)
    begins, ends = (torch.stack(points) for points in zip(*((curve.begin, curve.end) for curve in both), strict=True))
    return BothCurves(both[0], begins, ends, numbers)


def reduce(scores: Tensor, queries: BothCurves, spec: MapCurves) -> Tensor:
    """Returns (1, 2, points): the scores (N, 1) at the points of their queries, zeros elsewhere."""
    found = scores.new_zeros(2 * spec.points)
    found[queries.numbers] = scores[:, 0]
    return found.reshape(1, 2, spec.points)
