"""Says how a layer's raw output holds its maps: as planes, with channels last, or as a sequence of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arrangement:
    """Turns a raw output into maps (B, C, u, v) and back.

    Convolutions return (B, C, u, v): planes. Swin returns (B, u, v, C): channels last. A vision transformer returns
    (B, N, C): a sequence of some tokens of its own (class token, registers), then the u v tokens of the grid, row by
    row. Its own tokens have no location in the image and no cell in a map.
    """

    channels_last: bool = False
    grid: tuple[int, int] | None = None
    """Height and width (u, v) of the grid in a sequence of tokens; None: the output is 4-D."""
    own_tokens: int = 0
    """Number of tokens that stand before those of the grid."""

    def maps(self, raw: Tensor) -> Tensor:
        """Returns the maps (B, C, u, v) of a raw output or of its gradient; a view where possible."""
        if self.grid is not None:
            raw = raw[:, self.own_tokens :].reshape(len(raw), *self.grid, -1)
        return raw.movedim(-1, 1) if self.channels_last else raw

    def raw(self, maps: Tensor, like: Tensor) -> Tensor:
        """Returns the raw output that holds these maps (B, C, u, v).

        Args:
            maps: the maps to be held.
            like: a raw output (B or 1, ...), from which the network's own tokens are taken.
        """
        held = maps.movedim(1, -1) if self.channels_last else maps
        if self.grid is None:
            return held
        own = like[:, : self.own_tokens].expand(len(maps), -1, -1)
        return torch.cat([own, held.flatten(1, 2)], dim=1)

    def fits(self, raw: Tensor) -> bool:
        """Tells whether a raw output has this shape, with more than one cell on the grid."""
        if raw.dim() != (4 if self.grid is None else 3):
            return False
        if self.grid is not None:
            return raw.shape[1] == self.own_tokens + self.grid[0] * self.grid[1]
        height, width = self.maps(raw).shape[-2:]
        return height * width > 1


PLANES = Arrangement()
CHANNELS_LAST = Arrangement(channels_last=True)


def token_grid(height: int, width: int, own_tokens: int) -> Arrangement:
    """Returns the arrangement of `own_tokens` tokens and a grid of height x width behind them."""
    return Arrangement(channels_last=True, grid=(height, width), own_tokens=own_tokens)
