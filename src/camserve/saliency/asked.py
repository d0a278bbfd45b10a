"""Makes of a network of an image and tokens one of the image alone, that methods, hooks and tails take as any other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn


class Asked(nn.Module):
    """Asks a network about its images once with each of some sequences of tokens; what it returns lies side by side.

    Its submodules have the names that they have in the network; its modes and hooks are those of the network.

    Args:
        network: maps (n, C, H, W) and tokens (n, T) to (n, numbers).
        asked: tokens of each pass.
        device: device of the network.
    """

    _network: nn.Module

    def __init__(self, network: nn.Module, asked: Sequence[Sequence[int]], device: torch.device) -> None:
        super().__init__()
        self.__dict__["_network"] = network  # no submodule: it would put its name before theirs
        self._modules, self._parameters, self._buffers = network._modules, network._parameters, network._buffers
        self._tokens = [torch.tensor([list(tokens)], dtype=torch.long, device=device) for tokens in asked]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the outputs of all passes, (n, passes * numbers), of images (n, C, H, W)."""
        # The number is asked apart from the image: a tail depends on the image through its layer alone.
        images = x.shape[0]
        passes = [self._network(x, _for_each(tokens, images)) for tokens in self._tokens]
        return passes[0] if len(passes) == 1 else torch.cat(passes, dim=1)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Yields the modules of the network, itself first."""
        return iter(self._network.named_modules(*args, **kwargs))

    def train(self, mode: bool = True) -> Asked:
        """Sets the network's mode."""
        self._network.train(mode)
        return self


@fx.wrap
def _for_each(tokens: Tensor, images: int) -> Tensor:
    """Returns tokens (1, T) for each of some images, (images, T)."""
    return tokens.expand(images, -1)
