"""Computes occlusion (https://arxiv.org/abs/1311.2901): what the class loses while a window hides a part of the image.

The image is cut into positions x positions cells, the i-th from row floor(i H / positions) to that of i + 1; columns
alike. Window (i, j) is cell (i, j) with its neighbours: window x window cells, of which (window - 1) // 2 lie above and
to the left of it, and the others below and to the right; those outside the image are cut off. A window is zero in
normalised space. Query number i * positions + j hides window (i, j).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from camserve.methods import Occlusion
from camserve.saliency.features import Features
from camserve.saliency.masks import loss
from camserve.scores import Targets


@dataclass(frozen=True)
class Windows:
    """Holds queries that hide one window each, behind one of the image itself, from which the loss is measured."""

    input: Tensor
    """The normalised input (3, H, W)."""
    targets: Targets
    """Targets whose scores are asked."""
    spec: Occlusion
    numbers: Tensor
    """Numbers of the windows that are hidden, (N,)."""
    micro_batch: int
    """Number of windows whose losses are added up at a time."""
    by_value: ClassVar[bool] = False

    def __len__(self) -> int:
        return 1 + len(self.numbers)

    def blend(self, start: int, stop: int) -> Tensor:
        """Returns the image with each query's window set to zero, (n, 3, H, W)."""
        rows, columns = self.hidden(start, stop)
        return self.input * ~(rows[:, None, :, None] & columns[:, None, None, :])

    def hidden(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Returns on which rows (n, H) and columns (n, W) each query's window lies; the first query has none."""
        query = torch.arange(start, stop, device=self.input.device)
        number = torch.cat([self.numbers.new_zeros(1), self.numbers])[start:stop]
        rows = self._lies_on(number // self.spec.positions, self.input.shape[1])
        columns = self._lies_on(number % self.spec.positions, self.input.shape[2])
        return rows & (query > 0)[:, None], columns

    def coverage(self) -> Tensor:
        """Returns how many of all windows, whichever are asked here, lie on each pixel, (H, W); at least 1."""
        cell = torch.arange(self.spec.positions, device=self.input.device)
        rows, columns = (self._lies_on(cell, pixels).sum(dim=0) for pixels in self.input.shape[1:])
        return rows[:, None] * columns

    def _lies_on(self, cell: Tensor, pixels: int) -> Tensor:
        """Tells whether the window around each cell (n,) of one axis lies on a pixel, (n, pixels)."""
        pixel = torch.arange(pixels, device=cell.device)
        before = (self.spec.window - 1) // 2
        start = (cell - before).clamp(min=0)[:, None]
        stop = (cell - before + self.spec.window).clamp(max=self.spec.positions)[:, None]
        return (pixel >= start * pixels // self.spec.positions) & (pixel < stop * pixels // self.spec.positions)


def masks(features: Features, spec: Occlusion, numbers: Tensor) -> Windows:
    """Returns the windows of these numbers, of positions^2, as queries."""
    return Windows(features.input, features.targets, spec, numbers, features.passes.micro_batch)


def reduce(scores: Tensor, windows: Windows, spec: Occlusion) -> Tensor:
    """Returns the mean over the windows that lie on a pixel of s(x) - s(x without the window).

    A pixel's sum is divided by its `coverage`, which is known beforehand and the same for every range of windows: so
    the sums of disjoint ranges add up.

    Args:
        scores: (1 + N, K), first those of the image itself.
        windows: the N windows.
        spec: the method.

    Returns:
        (K, H, W).
    """
    lost = loss(scores[:1], scores, windows.targets.query_size)  # (1 + N, K)
    total = scores.new_zeros(scores.shape[1], *windows.input.shape[1:])
    for start in range(0, len(windows), windows.micro_batch):
        stop = min(len(windows), start + windows.micro_batch)
        rows, columns = (lies_on.to(scores) for lies_on in windows.hidden(start, stop))
        total += torch.einsum("nk,nh,nw->khw", lost[start:stop], rows, columns)
    return total / windows.coverage()
