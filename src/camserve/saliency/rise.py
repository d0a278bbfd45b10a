"""Computes RISE (https://arxiv.org/abs/1806.07421): random masks, weighted by what the masked image keeps of the class.

A mask depends on the seed and on its number alone, and is made where and when it is needed, for one micro-batch at a
time: to ask, and once more to add up. So nothing of N masks is ever kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from camserve.methods import Rise
from camserve.saliency.counter import uniform
from camserve.saliency.features import Features
from camserve.scores import Targets


@dataclass(frozen=True)
class RandomMasks:
    """Holds the random masks of some numbers, as queries 0, 1, ..."""

    input: Tensor
    """The normalised input (3, H, W)."""
    targets: Targets
    """Targets whose scores are asked."""
    spec: Rise
    numbers: Tensor
    """Numbers of the masks, (N,)."""
    micro_batch: int
    """Number of masks made at a time when they are added up."""
    level: Tensor
    """Scores (K,) from which those of masked images are measured."""
    by_value: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.numbers)

    def blend(self, start: int, stop: int) -> Tensor:
        """Returns the input times the masks, (n, 3, H, W): what is hidden becomes zero in normalised space."""
        return self.masks(start, stop)[:, None] * self.input

    def masks(self, start: int, stop: int) -> Tensor:
        """Returns the masks start..stop-1, (n, H, W) in [0, 1].

        Section 3.2 of the paper: s x s cells, each kept (1) with probability p; upsampled to (s + 1) times the cell's
        size, ceil(H / s) x ceil(W / s), bilinearly; cut out H x W, from an offset of 0..cell-1 in either direction. The
        authors' code upsamples with scikit-image, which reflects at the border; here, as everywhere, the border's
        values go on outwards.
        """
        side = self.spec.grid
        random = uniform(self.spec.seed, self.numbers[start:stop], side**2 + 2, self.input.dtype)
        kept = (random[:, 2:] < self.spec.keep_prob).to(random).view(-1, side, side)
        rows = self._interpolation(random[:, 0], self.input.shape[1])
        columns = self._interpolation(random[:, 1], self.input.shape[2])
        return torch.bmm(torch.bmm(rows, kept), columns.transpose(1, 2))

    def _interpolation(self, random: Tensor, pixels: int) -> Tensor:
        """Returns each cell's share in the pixels of an axis, (n, pixels, s); uniform numbers (n,) draw the offsets."""
        cell = -(-pixels // self.spec.grid)
        offset = (random * cell).long()
        pixel = torch.arange(pixels, device=random.device)
        each = _upsampling(self.spec.grid, (self.spec.grid + 1) * cell, random.dtype, random.device)
        return each[offset[:, None] + pixel]


def masks(features: Features, spec: Rise, numbers: Tensor) -> RandomMasks:
    """Returns the queries of these numbers, of `spec.masks`."""
    level = features.targets.level(features.logits[None])[0]
    return RandomMasks(features.input, features.targets, spec, numbers, features.passes.micro_batch, level)


def reduce(scores: Tensor, masks: RandomMasks, spec: Rise) -> Tensor:
    """Returns sum_i (s(x m_i) - level) m_i: eq. 6, without its positive factor 1 / (N p).

    The score s is the probability of the class in the paper, and the level 0. Masks do not lie equally often on every
    pixel: a score that is far from 0 on all of them would make a map of how often that is. So other scores are measured
    from that of the image itself.

    All masks look alike on the whole, so a map is a small difference of large sums: they are added up in float64.

    Args:
        scores: (N, K) scores.
        masks: the N masks.
        spec: the method.

    Returns:
        (K, H, W).
    """
    total = scores.new_zeros(scores.shape[1], *masks.input.shape[1:], dtype=torch.float64)
    for start in range(0, len(masks), masks.micro_batch):
        stop = min(len(masks), start + masks.micro_batch)
        total += torch.einsum("nk,nhw->khw", scores[start:stop] - masks.level, masks.masks(start, stop))
    return total.to(scores.dtype)


@lru_cache(maxsize=64)
def _upsampling(source: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the (target, source) bilinear interpolation matrix of one axis, align_corners=False.

    It is kept on the device: bringing it there for each pass would wait for the passes before.
    """
    eye = torch.eye(source, dtype=torch.float64)
    return F.interpolate(eye[None], size=target, mode="linear", align_corners=False)[0].T.to(device, dtype)
