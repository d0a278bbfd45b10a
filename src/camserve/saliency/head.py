"""Recognises heads of global average pooling and one linear layer, where S_c = sum_k W_ck gap(A_k) + b_c.

With such a head dS_c/dA_k is W_ck / (u v) at every location, and what a channel adds to a logit is W_ck gap(A_k): no
backward pass and no further forward is needed to know either.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from camserve.scores import Targets

ROUNDING = 100
"""Units in the last place, of the largest logit, by which logits may differ from W gap(A) + b: sums of some thousand
products in another order differ by fewer than 10."""
LOGITS = 64
"""Number of logits by which a head is recognised, twice as many at most: all of 1000 would mean to read 5 MB of W."""


def is_pooled_linear(linear: nn.Linear | None, activations: Tensor, logits: Tensor) -> Tensor:
    """Tells whether the logits of each image are W gap(A) + b.

    Every image is asked anew, and only numbers can tell: behind a second ReLU, say, a layer that is positive everywhere
    has such a head, and the same layer for another image has not. Where a second ReLU sees zeros, numbers do not tell:
    there the closed form is the derivative from above, autograd's that from below. Some of the logits are looked at:
    whatever else stands between the layer and them changes sums over all channels, and so all of them.

    Args:
        linear: the network's last linear layer, if it has one.
        activations: (B, C, u, v).
        logits: (B, classes).

    Returns:
        (B,), bool.
    """
    if linear is None or (linear.out_features, linear.in_features) != (logits.shape[1], activations.shape[1]):
        return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    some = slice(None, None, max(1, linear.out_features // LOGITS))  # a view: nothing is copied
    weight, bias = linear.weight.detach()[some], 0 if linear.bias is None else linear.bias.detach()[some]
    # The differences are measured against the logits without b: a large b must not hide them.
    added = F.linear(activations.flatten(2).mean(dim=-1), weight.to(activations.dtype))
    apart = (added + bias - logits[:, some]).abs().amax(dim=1)
    return apart <= min(ROUNDING * torch.finfo(logits.dtype).eps, 1e-3) * added.abs().amax(dim=1)


def constant_gradients(linear: nn.Linear, targets: Targets, images: int, size: torch.Size) -> Tensor:
    """Returns dS/dA of a head of global average pooling and one linear layer: for a class W_ck / (u v) everywhere.

    Args:
        linear: the head's linear layer.
        targets: K targets, the same for all images or K for each.
        images: number B of images.
        size: (u, v).

    Returns:
        (B, K, C, u, v), without graph; a view that takes the memory of (B, K, C).

    Raises:
        Unsupported: the scores are no linear function of the outputs.
    """
    rows = targets.through(linear.weight.detach()).expand(images, -1, -1)
    return (rows.contiguous() / size.numel())[..., None, None].expand(-1, -1, -1, *size)
