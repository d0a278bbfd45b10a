"""Holds what one forward pass tells of one image: the input of every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from camserve.saliency.passes import Passes
from camserve.scores import Targets


@dataclass(frozen=True)
class Features:
    """Describes one image at one layer, with K targets."""

    input: Tensor
    """The normalised input (3, H, W)."""
    activations: Tensor
    """The layer's maps A (C, u, v)."""
    logits: Tensor
    """Logits (classes,) of the image."""
    targets: Targets
    """The K targets, which ask their scores of outputs."""
    gradients: Tensor | None
    """Gradients dS/dA (K, C, u, v) of the scores; None when no method of the request asks for them."""
    classifier: nn.Linear | None
    """The network's last linear layer, if it ends in one."""
    passes: Passes
    """Further passes of the network at this layer."""
    labels: tuple[int, ...] = ()
    """Groups of the K * C channels, found by an earlier step; empty: they are to be found, where a method has some."""
    made_once: Callable[[str, Callable[[], tuple[Tensor, ...]]], tuple[Tensor, ...]] = lambda _name, make: make()
    """Function (name, make) that returns the tensors that `make` makes of the image, or made for an earlier step."""

    def weights(self) -> Tensor:
        """Returns the mean over space of the gradients, (K, C): Grad-CAM, eq. 1."""
        assert self.gradients is not None, "the registry says which methods need gradients"
        if self.gradients.stride()[-2:] == (0, 0):  # the same number at every place, as behind a pooled linear head
            return self.gradients[..., 0, 0]
        return self.gradients.mean(dim=(-2, -1))
