"""Says how a layer's raw output holds its maps: as planes, with channels last, or as a sequence of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arrangement:
    """Turns a raw output into maps (B, C, u, v) and back.

    Convolutions return (B, C, u, v): planes. Swin returns (B, u, v, C): channels last. A vision transformer returns
    (B, N, C): a sequence of u v tokens of the grid, row by row, and some tokens of its own (class token, distillation
    token, registers), mostly in front. Its own tokens have no location in the image and no cell in a map.
    """

    channels_last: bool = False
    grid: tuple[int, int] | None = None
    """Height and width (u, v) of the grid in a sequence of tokens; None: the output is 4-D."""
    own: tuple[int, ...] = ()
    """Positions in the sequence of the network's own tokens, ascending."""

    def maps(self, raw: Tensor) -> Tensor:
        """Returns the maps (B, C, u, v) of a raw output or of its gradient; a view where possible."""
        if self.grid is not None:
            raw = self.placed(raw).reshape(len(raw), *self.grid, -1)
        return raw.movedim(-1, 1) if self.channels_last else raw

    def placed(self, raw: Tensor) -> Tensor:
        """Returns the tokens of the grid, (B, u v, ...), of a sequence (B, N, ...); a view where they are together."""
        first, last = self._around(raw.shape[1])
        if last - first + len(self.own) == raw.shape[1]:
            return raw[:, first:last]
        return raw[:, self._places(raw)]

    def _around(self, length: int) -> tuple[int, int]:
        """Returns how many own tokens stand in front, and where the own tokens at the end begin."""
        first = next((index for index, position in enumerate(self.own) if position != index), len(self.own))
        behind = 0
        while behind < len(self.own) - first and self.own[-1 - behind] == length - 1 - behind:
            behind += 1
        return first, length - behind

    def _places(self, raw: Tensor) -> Tensor:
        places = torch.ones(raw.shape[1], dtype=torch.bool)
        places[list(self.own)] = False
        return places.nonzero()[:, 0].to(raw.device)

    def raw(self, maps: Tensor, like: Tensor) -> Tensor:
        """Returns the raw output that holds these maps (B, C, u, v).

        Args:
            maps: the maps to be held.
            like: a raw output (B or 1, ...), from which the network's own tokens are taken.
        """
        held = maps.movedim(1, -1) if self.channels_last else maps
        if self.grid is None:
            return held
        held = held.flatten(1, 2)
        first, last = self._around(like.shape[1])
        if last - first == held.shape[1]:
            own = like.expand(len(maps), -1, -1)
            return torch.cat([own[:, :first], held, own[:, last:]], dim=1)
        sequence = like.expand(len(maps), -1, -1).clone()
        sequence[:, self._places(like)] = held
        return sequence

    def fits(self, raw: Tensor) -> bool:
        """Tells whether a raw output has this shape, with more than one cell on the grid."""
        if raw.dim() != (4 if self.grid is None else 3):
            return False
        if self.grid is not None:
            return raw.shape[1] == len(self.own) + self.grid[0] * self.grid[1]
        height, width = self.maps(raw).shape[-2:]
        return height * width > 1

    def with_own(self, positions: tuple[int, ...]) -> Arrangement:
        """Returns the same sequence with the network's own tokens at these positions."""
        return replace(self, own=positions)


PLANES = Arrangement()
CHANNELS_LAST = Arrangement(channels_last=True)


def token_grid(height: int, width: int, own_tokens: int) -> Arrangement:
    """Returns the arrangement of `own_tokens` tokens in front, and a grid of height x width behind them."""
    return Arrangement(channels_last=True, grid=(height, width), own=tuple(range(own_tokens)))
