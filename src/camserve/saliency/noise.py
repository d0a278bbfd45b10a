"""Gaussian noise that depends on a seed and a sample's number alone.

So a sample is the same in whatever micro-batch, shard, order or step it is made, on any device and in any dtype.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def gaussian(seed: int, start: int, stop: int, like: Tensor) -> Tensor:
    """Samples start..stop-1 of standard normal noise.

    Args:
        seed: of the whole sequence.
        start: number of the first sample.
        stop: one more than the number of the last.
        like: gives one sample's shape, dtype and device.

    Returns:
        (stop - start, *like.shape), each sample drawn in float32 on the CPU and then converted.
    """
    noise = torch.empty(stop - start, *like.shape)
    for sample, index in zip(noise, range(start, stop), strict=True):
        sample.normal_(generator=torch.Generator().manual_seed(_sample_seed(seed, index)))
    return noise.to(like)


def _sample_seed(seed: int, index: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")  # the generator takes 32 bits
