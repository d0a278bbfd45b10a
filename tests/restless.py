"""A network part that rounds otherwise in each batch, as the kernels of some processors do."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Restless(nn.Module):
    """Changes what it is given by some units in the last place, others for each batch size and place in a batch."""

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(len(x), dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))
        return x * (1 + 2.0**-22 * (len(x) + places))
