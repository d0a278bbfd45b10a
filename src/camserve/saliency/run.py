"""Runs a network: its input in the precision that it has, its scores in float32 at least.

A module in bfloat16 or float16 computes in that precision; what is made of its outputs (sums over thousands of queries,
coordinates, probabilities) is not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from camserve.errors import Unsupported


def run(module: nn.Module, x: Tensor) -> Tensor:
    """Returns the logits (B, classes) of images (B, 3, H, W).

    Raises:
        Unsupported: the network returns something else.
    """
    output = module(x.to(dtype_of(module)))
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise Unsupported("the network must return logits of shape (batch, classes)")
    return single(output)


def failed(x: Tensor, error: Exception) -> Unsupported:
    """Returns what is raised where a network fails on pictures of this shape: what was wanted, and what came."""
    shape, precision = " x ".join(map(str, x.shape)), str(x.dtype).removeprefix("torch.")
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return Unsupported(f"the network must take a batch of images alone, {shape} ({precision}); it fails with {reason}")


def dtype_of(module: nn.Module) -> torch.dtype:
    """Returns the precision of a network, which is that of its first parameter; float32 where it has none."""
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), torch.float32)


def single(values: Tensor) -> Tensor:
    """Returns values in float32 at least; those of a network in float32 or float64 as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
