"""Measures what remains of a target's score when the image is multiplied with its map.

Average drop and increase in confidence, from Grad-CAM++ (https://arxiv.org/abs/1710.11063), sec. 4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from camserve.queries.pack import ask
from camserve.scores import Targets

ROUNDING = 1e-5
"""Share by which equal probabilities may differ: a softmax of logits of 20 multiplies an error of float32 by 20."""


@dataclass(frozen=True)
class Multiplied:
    """Holds an image times each of T maps, as masked queries for `camserve.queries.pack.ask`."""

    image: Tensor
    """The normalised image (3, H, W)."""
    saliency: Tensor
    """Maps (T, H, W) in [0, 1]."""
    targets: Targets
    """Targets that the maps explain."""
    by_value: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.saliency)

    def blend(self, start: int, stop: int) -> Tensor:
        """Returns the images times the maps start..stop-1, (n, 3, H, W)."""
        return self.image * self.saliency[start:stop, None]


@dataclass(frozen=True)
class Confidence:
    """Holds the target's score for the image, and for the image times its map: for a class its probability."""

    whole: float
    kept: float

    @property
    def drop(self) -> float:
        """Returns ReLU(whole - kept) / |whole|: the share lost, 0 where nothing is.

        Its mean over images is the average drop. Probabilities are positive; a difference or a number may be below 0.
        """
        return max(self.whole - self.kept, 0.0) / abs(self.whole) if self.whole else 0.0

    @property
    def increased(self) -> bool:
        """Tells whether more is kept than there was. Its mean over images is the increase in confidence.

        A network that is sure of itself has a probability of 1 but for rounding both times: that is no increase.
        """
        return self.kept > self.whole + ROUNDING * abs(self.whole)


def confidence(
    network: Callable[[Tensor], Tensor], image: Tensor, saliency: Tensor, targets: Targets, micro_batch: int
) -> list[Confidence]:
    """Returns the scores of all maps of one image, from one run of masked queries.

    Args:
        network: (n, 3, H, W) to outputs (n, numbers), in eval mode.
        image: (3, H, W), normalised.
        saliency: (T, H, W) in [0, 1].
        targets: the T targets that the maps explain.
        micro_batch: how many queries one forward pass takes at most.

    Returns:
        One result for each map.
    """
    whole = torch.ones_like(saliency[:1])  # the image itself is the last query
    (scores,) = ask(network, [Multiplied(image, torch.cat([saliency, whole]), targets)], micro_batch)
    table = scores.double().cpu().numpy()
    kept, before = np.diagonal(table[:-1]), table[-1]
    return [Confidence(float(first), float(then)) for first, then in zip(before, kept, strict=True)]
