"""Occlusion (https://arxiv.org/abs/1311.2901): what the class loses while a window hides a part of the image.

The image is cut into positions x positions cells, the i-th from row floor(i H / positions) to that of i + 1; columns
alike. Place (i, j) of the window is cell (i, j) with its neighbours: window x window cells, of which (window - 1) // 2
lie above and to the left of it, and the others below and to the right; those outside the image are cut off. The window
is zero in normalised space. Query number i * positions + j hides place (i, j).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from camserve.methods import Occlusion
from camserve.saliency.features import Features
from camserve.saliency.masks import loss


@dataclass(frozen=True)
class Windows:
    """Some places of the window, behind one query of the image itself, from which the loss is measured."""

    input: Tensor
    """(3, H, W), the normalised input."""
    columns: Tensor
    """(K,), the classes whose probabilities are asked."""
    spec: Occlusion
    places: Tensor
    """(N,)."""
    micro_batch: int
    """Places added up at a time."""
    logits: ClassVar[bool] = False

    def __len__(self) -> int:
        return 1 + len(self.places)

    def blend(self, start: int, stop: int) -> Tensor:
        """The image with each query's window set to zero, (n, 3, H, W)."""
        rows, columns = self.hidden(start, stop)
        return self.input * ~(rows[:, None, :, None] & columns[:, None, None, :])

    def hidden(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Which rows (n, H) and columns (n, W) the window of each query lies on; none for the first query."""
        query = torch.arange(start, stop, device=self.input.device)
        place = torch.cat([self.places.new_zeros(1), self.places])[start:stop]
        rows = self._lies_on(place // self.spec.positions, self.input.shape[1])
        columns = self._lies_on(place % self.spec.positions, self.input.shape[2])
        return rows & (query > 0)[:, None], columns

    def coverage(self) -> Tensor:
        """(H, W), how many of all places, whichever are asked here, lie on each pixel; at least 1."""
        place = torch.arange(self.spec.positions, device=self.input.device)
        rows, columns = (self._lies_on(place, pixels).sum(dim=0) for pixels in self.input.shape[1:])
        return rows[:, None] * columns

    def _lies_on(self, place: Tensor, pixels: int) -> Tensor:
        """(n, pixels), whether the window at each place (n,) of one axis lies on a pixel."""
        pixel = torch.arange(pixels, device=place.device)
        before = (self.spec.window - 1) // 2
        start = (place - before).clamp(min=0)[:, None]
        stop = (place - before + self.spec.window).clamp(max=self.spec.positions)[:, None]
        return (pixel >= start * pixels // self.spec.positions) & (pixel < stop * pixels // self.spec.positions)


def masks(features: Features, spec: Occlusion, numbers: Tensor) -> Windows:
    """Places of these numbers, of positions^2."""
    return Windows(features.input, features.targets, spec, numbers, features.passes.micro_batch)


def reduce(scores: Tensor, windows: Windows, spec: Occlusion) -> Tensor:
    """The mean over the places that lie on a pixel of p_c(x) - p_c(x without the window).

    A pixel's sum is divided by its `coverage`, which is known beforehand and the same for every range of places: so the
    sums of disjoint ranges add up.

    Args:
        scores: (1 + N, K) probabilities, first those of the image itself.
        windows: the N places.
        spec: the method.

    Returns:
        (K, H, W).
    """
    lost = loss(scores[:1], scores)  # (1 + N, K)
    total = scores.new_zeros(scores.shape[1], *windows.input.shape[1:])
    for start in range(0, len(windows), windows.micro_batch):
        stop = min(len(windows), start + windows.micro_batch)
        rows, columns = (lies_on.to(scores) for lies_on in windows.hidden(start, stop))
        total += torch.einsum("nk,nh,nw->khw", lost[start:stop], rows, columns)
    return total / windows.coverage()
