"""Masks at the layer's resolution, and the queries that they become.

A mask is shipped and merged at the layer's resolution (7 x 7, 14 x 14); only `blend` makes it as large as the input,
for as many queries at a time as go into one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from camserve.errors import Unsupported


class Queries(Protocol):
    """Altered versions of one image, numbered from 0, and what is asked about each."""

    @property
    def columns(self) -> Tensor:
        """(K,), the classes whose scores are asked."""

    @property
    def logits(self) -> bool:
        """Whether a score is the logit of a class, or its softmax probability."""

    def __len__(self) -> int:
        """How many they are."""

    def blend(self, start: int, stop: int) -> Tensor:
        """The altered images start..stop-1, (n, 3, H, W); none of them is kept."""


@dataclass(frozen=True)
class Masks:
    """N masked queries about one image."""

    input: Tensor
    """(3, H, W), the normalised input."""
    values: Tensor
    """(N, u, v), before upsampling."""
    low: Tensor
    """(N,), minimum of each mask after upsampling; it becomes 0."""
    high: Tensor
    """(N,), maximum of each mask after upsampling; it becomes 1."""
    columns: Tensor
    """(K,), the classes whose scores are asked."""
    owners: Tensor
    """(N,), which of the K targets a mask belongs to; 0 where one mask serves all."""
    baseline: Tensor | None = None
    """(3, H, W), what shows where the mask is 0; None is zeros."""
    reference: Tensor | None = None
    """(K,), logits of the unmasked image, where logits are asked; None: probabilities are asked."""

    @property
    def logits(self) -> bool:
        """Whether a score is a logit, or a probability."""
        return self.reference is not None

    def __len__(self) -> int:
        return len(self.values)

    def blend(self, start: int, stop: int) -> Tensor:
        """The masked images start..stop-1, (n, 3, H, W)."""
        masks = self.upsampled(start, stop)[:, None]
        return masks * self.input if self.baseline is None else torch.lerp(self.baseline, self.input, masks)

    def upsampled(self, start: int, stop: int) -> Tensor:
        """The masks start..stop-1 in [0, 1], (n, H, W)."""
        part = slice(start, stop)
        masks = upsample(self.values[part], self.input.shape[-2:])
        low, high = self.low[part, None, None], self.high[part, None, None]
        return (masks - low) / (high - low)

    def normalised(self) -> Tensor:
        """(N, u, v), each mask scaled as `blend` scales it; upsampling commutes with this."""
        low, high = self.low[:, None, None], self.high[:, None, None]
        return (self.values - low) / (high - low)

    def with_anchor(self) -> Masks:
        """These masks behind one all-zero mask, whose query is the baseline itself."""
        zero, one = self.low.new_zeros(1), self.low.new_ones(1)
        return replace(
            self,
            values=torch.cat([torch.zeros_like(self.values[:1]), self.values]),
            low=torch.cat([zero, self.low]),
            high=torch.cat([one, self.high]),
            owners=torch.cat([self.owners.new_zeros(1), self.owners]),
        )


def make_masks(
    image: Tensor,
    values: Tensor,
    columns: Tensor,
    owners: Tensor | None = None,
    baseline: Tensor | None = None,
) -> Masks:
    """Masks of an image from maps at the layer's resolution; constant maps are left out, exactly.

    Args:
        image: (3, H, W), normalised.
        values: (N, u, v).
        columns: (K,) classes asked.
        owners: (N,) which target each map belongs to.
        baseline: (3, H, W) or None.
    """
    live, low, high = live_maps(values, (image.shape[-2], image.shape[-1]))
    owners = torch.zeros_like(live) if owners is None else owners[live]
    return Masks(image, values[live], low, high, columns, owners, baseline)


def live_maps(values: Tensor, size: tuple[int, int], normalise: str = "after") -> tuple[Tensor, Tensor, Tensor]:
    """Which maps are not constant, and the values that become 0 and 1 of each of those.

    Args:
        values: (N, u, v).
        size: (H, W) of the upsampled masks.
        normalise: "after": these values are the extremes of the upsampled map. "before": of the map itself.

    Returns:
        Three tensors (n,): places among the N maps, low, high.
    """
    smallest, largest = values.flatten(1).aminmax(dim=1)
    low, high = upsampled_extremes(values, size)
    # Before upsampling, because 0.7 w + 0.7 (1 - w) may round beside 0.7; after it, because it may flatten a map, or,
    # making it smaller, pass over nearly all that it has: then its values would be scaled beyond every float.
    flat = torch.finfo(values.dtype).eps * (largest - smallest)
    live = ((largest > smallest) & (high - low > flat)).nonzero()[:, 0]
    if normalise == "before":
        low, high = smallest, largest
    return live, low[live], high[live]


def upsample(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """(N, u, v) to (N, H, W), bilinear, align_corners=False."""
    return F.interpolate(maps[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def upsampled_extremes(maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Minimum and maximum over space of `upsample(maps, size)`, without upsampling.

    Between two neighbouring source rows the upsampled map is linear, so its extremes lie on the first and last output
    rows of that interval; likewise for columns. That leaves about 2u x 2v of H x W values to look at.

    Returns:
        Two tensors (N,).
    """
    rows = _edge_rows(maps.shape[-2], size[0]).to(maps)
    columns = _edge_rows(maps.shape[-1], size[1]).to(maps)
    low, high = (rows @ maps @ columns.T).flatten(1).aminmax(dim=1)
    return low, high


@lru_cache(maxsize=64)
def _edge_rows(source: int, target: int) -> Tensor:
    """The rows of the (target, source) bilinear interpolation matrix next to a change of source interval."""
    eye = torch.eye(source, dtype=torch.float64)
    matrix = F.interpolate(eye[None], size=target, mode="linear", align_corners=False)[0].T
    position = (torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5
    interval = position.clamp(0, source - 1).floor()
    changes = interval[1:] != interval[:-1]
    first, last = F.pad(changes, (1, 0), value=True), F.pad(changes, (0, 1), value=True)
    return matrix[first | last]


def loss(before: Tensor, after: Tensor) -> Tensor:
    """before - after; 0 where they differ by no more than equal scores do whose passes were of different sizes.

    So a network that answers all queries alike has no map of rounding errors, which would be scaled up to 1.
    """
    difference = before - after
    rounding = 64 * torch.finfo(after.dtype).eps * before.abs()  # a softmax of logits of 20 multiplies 1 ulp by 20
    return difference.masked_fill(difference.abs() <= rounding, 0)


def gaussian_blur(image: Tensor, kernel_px: int, sigma_px: float) -> Tensor:
    """(3, H, W) blurred with a separable Gaussian, reflect padding; equals torchvision's `gaussian_blur`.

    Raises:
        Unsupported: the image is too small for reflect padding.
    """
    pad = kernel_px // 2
    if min(image.shape[-2:]) <= pad:
        raise Unsupported(
            f"a {kernel_px} px blur needs an input of at least {pad + 1} px, got {tuple(image.shape[-2:])}"
        )
    taps = torch.arange(-pad, pad + 1, device=image.device, dtype=image.dtype)
    weights = torch.exp(-0.5 * (taps / sigma_px) ** 2)
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    padded = F.pad(image[None], (pad, pad, pad, pad), mode="reflect")
    across = F.conv2d(padded, weights, groups=3)
    return F.conv2d(across, weights.transpose(2, 3), groups=3)[0]
