"""What one forward pass tells of one image: the input of every method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from camserve.saliency.passes import Passes


@dataclass(frozen=True)
class Features:
    """One image at one layer, with K targets."""

    input: Tensor
    """(3, H, W), normalised."""
    activations: Tensor
    """(C, u, v)."""
    logits: Tensor
    """(classes,)."""
    targets: Tensor
    """(K,), class indices."""
    gradients: Tensor | None
    """(K, C, u, v), dS_c/dA; None when no method of the request asks for them."""
    classifier: nn.Linear | None
    """The network's last linear layer, if it ends in one."""
    passes: Passes
    """Further passes of the network at this layer."""

    def weights(self) -> Tensor:
        """(K, C), the mean over space of the gradients: Grad-CAM, eq. 1."""
        assert self.gradients is not None, "the registry says which methods need gradients"
        return self.gradients.mean(dim=(-2, -1))
