"""Makes masks at the layer's resolution, and the queries that they become.

A mask is shipped and merged at the layer's resolution (7 x 7, 14 x 14); only `blend` makes it as large as the input,
for the queries of one micro-batch at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from camserve.errors import Unsupported
from camserve.scores import Targets

ROUNDING = 16
"""Units in the last place by which the values of a constant map may differ."""


class Queries(Protocol):
    """Describes altered versions of one image, numbered from 0, and what is asked about each."""

    @property
    def targets(self) -> Targets:
        """Returns the K targets whose scores are asked."""

    @property
    def by_value(self) -> bool:
        """Tells whether `Targets.value` is asked (a logit, say), or `Targets.query_value` (a probability)."""

    def __len__(self) -> int:
        """Returns the number of queries."""

    def blend(self, start: int, stop: int) -> Tensor:
        """Returns the altered images start..stop-1, (n, 3, H, W); none of them is kept."""


@dataclass(frozen=True)
class Masks:
    """Holds N masked queries about one image."""

    input: Tensor
    """The normalised input (3, H, W)."""
    values: Tensor
    """Masks (N, u, v) before upsampling and scaling."""
    low: Tensor
    """Value of each mask (N,) that becomes 0: its minimum after upsampling, or before it (see `live_maps`)."""
    high: Tensor
    """Value of each mask (N,) that becomes 1: its maximum after upsampling, or before it (see `live_maps`)."""
    targets: Targets
    """Targets whose scores are asked."""
    owners: Tensor
    """Index (N,) among the K targets of the one that a mask belongs to; 0 where one mask serves all."""
    baseline: Tensor | None = None
    """Image (3, H, W) that shows where the mask is 0; None is zeros."""
    reference: Tensor | None = None
    """Values (K,) of the unmasked image, where `Targets.value` is asked; None: `Targets.query_value` is asked."""

    @property
    def by_value(self) -> bool:
        """Tells whether `Targets.value` is asked."""
        return self.reference is not None

    def __len__(self) -> int:
        return len(self.values)

    def blend(self, start: int, stop: int) -> Tensor:
        """Returns the masked images start..stop-1, (n, 3, H, W)."""
        masks = self.upsampled(start, stop)[:, None]
        return masks * self.input if self.baseline is None else torch.lerp(self.baseline, self.input, masks)

    def upsampled(self, start: int, stop: int) -> Tensor:
        """Returns the masks start..stop-1, scaled to [0, 1], (n, H, W)."""
        masks = upsample(self.values[start:stop], self.input.shape[-2:])
        low, high = self.low[start:stop, None, None], self.high[start:stop, None, None]
        return masks.sub_(low).div_(high - low)  # in place: a new tensor's memory is fetched page by page

    def normalised(self) -> Tensor:
        """Returns the masks (N, u, v), each scaled as `blend` scales it; upsampling commutes with this."""
        low, high = self.low[:, None, None], self.high[:, None, None]
        return (self.values - low) / (high - low)

    def with_anchor(self) -> Masks:
        """Returns these masks behind one all-zero mask, whose query is the baseline itself."""
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
    targets: Targets,
    owners: Tensor | None = None,
    baseline: Tensor | None = None,
) -> Masks:
    """Makes masks of an image from maps at the layer's resolution; maps that are constant up to rounding are left out.

    Args:
        image: (3, H, W), normalised.
        values: (N, u, v).
        targets: whose scores are asked.
        owners: (N,) which target each map belongs to.
        baseline: (3, H, W) or None.
    """
    live, low, high = live_maps(values, (image.shape[-2], image.shape[-1]))
    owners = torch.zeros_like(live) if owners is None else owners[live]
    return Masks(image, values[live], low, high, targets, owners, baseline)


def live_maps(values: Tensor, size: tuple[int, int], normalise: str = "after") -> tuple[Tensor, Tensor, Tensor]:
    """Returns which maps are not constant, up to rounding, and the values that become 0 and 1 of each of those.

    Args:
        values: (N, u, v).
        size: (H, W) of the upsampled masks.
        normalise: "after": these values are the extremes of the upsampled map. "before": of the map itself.

    Returns:
        Three tensors (n,): indices among the N maps, low, high.
    """
    smallest, largest = values.flatten(1).aminmax(dim=1)
    low, high = upsampled_extremes(values, size)
    # Before upsampling, because 0.7 w + 0.7 (1 - w) may round beside 0.7; after it, because it may flatten a map, or,
    # making it smaller, pass over nearly all that it has: then its values would be scaled beyond every float.
    flat = torch.finfo(values.dtype).eps * (largest - smallest)
    # A mask would scale the rounding of a constant map, which is another one on each processor, to 0..1.
    same = ROUNDING * torch.finfo(values.dtype).eps * torch.maximum(largest.abs(), smallest.abs())
    live = ((largest - smallest > same) & (high - low > flat)).nonzero()[:, 0]
    if normalise == "before":
        low, high = smallest, largest
    return live, low[live], high[live]


def upsample(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Upsamples maps (N, u, v) to (N, H, W), bilinear, align_corners=False."""
    return F.interpolate(maps[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def upsampled_extremes(maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns minimum and maximum over space of `upsample(maps, size)`, without upsampling.

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
    """Returns the rows of the (target, source) bilinear interpolation matrix next to a change of source interval."""
    eye = torch.eye(source, dtype=torch.float64)
    matrix = F.interpolate(eye[None], size=target, mode="linear", align_corners=False)[0].T
    coordinate = (torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5
    interval = coordinate.clamp(0, source - 1).floor()
    changes = interval[1:] != interval[:-1]
    first, last = F.pad(changes, (1, 0), value=True), F.pad(changes, (0, 1), value=True)
    return matrix[first | last]


def loss(before: Tensor, after: Tensor, size: Tensor) -> Tensor:
    """Returns before - after; 0 where they differ by no more than rounding between passes of different sizes.

    So a network that answers all queries alike has no map of rounding errors, which would be scaled up to 1.

    Args:
        before: (1, K) scores.
        after: (n, K) scores.
        size: (1 or B, K), least size of the numbers that a score is a sum of: their rounding is also that of a small
            difference.
    """
    difference = before - after
    # A softmax of logits of 20 multiplies 1 ulp by 20.
    rounding = 64 * torch.finfo(after.dtype).eps * torch.maximum(before.abs(), size.to(before))
    return difference.masked_fill(difference.abs() <= rounding, 0)


def gaussian_blur(image: Tensor, kernel_px: int, sigma_px: float) -> Tensor:
    """Blurs an image (3, H, W) with a separable Gaussian, reflect padding; equals torchvision's `gaussian_blur`.

    Raises:
        Unsupported: the image is too small for reflect padding.
    """
    pad = kernel_px // 2
    if min(image.shape[-2:]) <= pad:
        raise Unsupported(
            f"a {kernel_px} px blur needs an input of at least {pad + 1} px, got {tuple(image.shape[-2:])}"
        )
    down, across = (_blurring(pixels, kernel_px, sigma_px).to(image) for pixels in image.shape[-2:])
    return down @ image @ across.T


@lru_cache(maxsize=16)
def _blurring(pixels: int, kernel_px: int, sigma_px: float) -> Tensor:
    """Returns the matrix (pixels, pixels) that blurs along one axis, reflection included, float64.

    As a product the blur of 224 x 224 pixels takes 0.8 ms of one thread, as a convolution 4.
    """
    pad = kernel_px // 2
    taps = torch.arange(-pad, pad + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (taps / sigma_px) ** 2)
    impulses = F.pad(torch.eye(pixels, dtype=torch.float64)[:, None], (pad, pad), mode="reflect")
    return F.conv1d(impulses, (weights / weights.sum())[None, None])[:, 0].T
