"""Finds out whether the places of a layer are places of the picture, by changing patches of one.

Shapes do not tell: the windows of a transformer, the tokens of Hiera, what an attention pays to whom, and a picture
that the network has flipped before it looks at it all have the shape of maps. So a pseudo-random picture is changed in
one patch after another, and the layer must change there: where it changes most must be at the patch, to within a cell
and a half, and from patch to patch the centre of the change must move as the patch does. The patches lie such that
flipping, turning or transposing a picture brings none of them to where it, or another one, was.

What an attention makes of its tokens is at each place a mean over many. It must change at the patch twice as much as
elsewhere. A grid that is coarser than the patches says nothing, nor do changes that may be rounding, as in deep
networks with random weights: the layers before it do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from camserve.saliency.arrangement import Arrangement

PATCHES = ((1, 4), (5, 1), (4, 5))
"""Row and column of each patch on a grid of 7 x 7 over the picture."""
GRID = 7
REACH = 1.5
"""Cells by which the place that changes most may miss the patch: half a cell is the rounding to cells, the other one
what a network without padding, or with even kernels, is off."""
CONTRAST = 2.0
"""Times as much that a mean over many places must change at a patch as elsewhere. Such means change 1.0 to 1.2 times as
much in networks with random weights, those of windows and of channels 2 to 7 times."""


def pictures(example: Tensor) -> Tensor:
    """Returns a picture, the same one changed in one patch after another, and another picture: (2 + patches, 3, H, W).

    Args:
        example: (1, channels, H, W), for size, precision and device.
    """
    _, channels, height, width = example.shape
    generator = torch.Generator().manual_seed(0)
    first, other = torch.randn(2, channels, height, width, generator=generator)
    # Besides what differs from pixel to pixel there must be what differs from one coarse place to the next.
    coarse = torch.randn(2, channels, GRID, GRID, generator=generator)
    first, other = torch.nn.functional.interpolate(coarse, (height, width)) + torch.stack([first, other]) / 2
    changed = []
    for patch in PATCHES:
        (top, bottom), (left, right) = _sides(patch, (height, width))
        changed.append(first.clone())
        changed[-1][:, top:bottom, left:right] = 3 - first[:, top:bottom, left:right]
    return torch.stack([first, *changed, other]).to(example)


def _sides(patch: tuple[int, int], size: tuple[int, int]) -> list[tuple[int, int]]:
    """Returns first and last row, and first and last column of a patch, in pixels, the last ones excluded."""
    starts = [index * length // GRID for index, length in zip(patch, size, strict=True)]
    stops = [-(-(index + 1) * length // GRID) for index, length in zip(patch, size, strict=True)]
    return list(zip(starts, stops, strict=True))


ROUNDING = 8
"""Times the precision of a layer's numbers, as a share of their size, up to which its changes may be rounding. In the
last stage of torchvision's EfficientNet-B0 with random weights rounding is up to 1.7 times it, and the picture changes
the numbers by 1e-5 times it."""


@dataclass(frozen=True)
class Response:
    """Holds by how much a layer's output changes with the picture at each place, summed over channels."""

    patches: Tensor
    """(patches, u, v), or (patches, N) for a sequence of N tokens: of each picture with a changed patch."""
    other: Tensor
    """(u, v), or (N,): of the other picture."""
    rounding: float = 0.0
    """Largest change that may be rounding."""

    def own_tokens(self) -> tuple[int, ...]:
        """Returns the positions of the tokens in a sequence that do not change with the picture."""
        return tuple((self.other == 0).nonzero()[:, 0].tolist())

    def placed(self, arrangement: Arrangement) -> Tensor:
        """Returns the changes of the patches as maps, (patches, u, v)."""
        if arrangement.grid is None:
            return self.patches
        return arrangement.placed(self.patches).reshape(len(self.patches), *arrangement.grid)


def is_told(changes: Tensor, rounding: float = 0.0) -> bool:
    """Tells whether maps (patches, u, v) are finite, more than rounding, and along an axis fine enough for patches."""
    alive = changes.isfinite().all() and (changes > rounding).flatten(1).any(dim=1).all()
    return max(changes.shape[1:]) >= GRID and bool(alive)


def is_local(changes: Tensor, size: tuple[int, int], contrast: float = 1.0) -> bool:
    """Tells whether maps change where the picture does.

    Args:
        changes: (patches, u, v), by how much each place changes with each patch.
        size: (height, width) of the picture.
        contrast: times as much that they must change on the mean at a patch as elsewhere.
    """
    at_patches = [_is_at(map_, patch, size, contrast) for map_, patch in zip(changes, PATCHES, strict=True)]
    return all(at_patches) and _moves(changes)


def _is_at(changes: Tensor, patch: tuple[int, int], size: tuple[int, int], contrast: float) -> bool:
    row, column = divmod(int(changes.argmax()), changes.shape[1])
    inside = _near(changes, patch, size, 0.5)
    more = changes[inside].mean() >= contrast * changes[~inside].mean()
    return bool(_near(changes, patch, size, REACH)[row, column] and more)


def _near(changes: Tensor, patch: tuple[int, int], size: tuple[int, int], cells: float) -> Tensor:
    """Tells which places have their centre within some cells of a patch, (u, v)."""
    rows, columns = (
        (start / length - cells / count <= positions) & (positions <= stop / length + cells / count)
        for count, (start, stop), length in zip(changes.shape, _sides(patch, size), size, strict=True)
        for positions in [_positions(count, changes)]
    )
    return rows[:, None] & columns


def _moves(changes: Tensor) -> bool:
    """Tells whether the centre of the change moves from patch to patch as the patch does, rather than elsewhere."""
    shares = changes / changes.sum(dim=(1, 2), keepdim=True)
    centres = torch.stack(
        [shares.sum(dim=3 - axis) @ _positions(changes.shape[axis], shares) for axis in (1, 2)], dim=1
    )
    for first in range(len(PATCHES)):
        for second in range(first):
            way = torch.tensor(PATCHES[first]) - torch.tensor(PATCHES[second])
            if not (centres[first] - centres[second]) @ way.to(centres) > 0:
                return False
    return True


def _positions(cells: int, like: Tensor) -> Tensor:
    return (torch.arange(cells, device=like.device, dtype=like.dtype) + 0.5) / cells
