"""Makes Gaussian noise that depends on a seed and a sample's number alone.

So a sample is the same in whatever micro-batch, shard, order or step it is made, on any device and in any dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def gaussian(seed: int, numbers: Sequence[int], like: Tensor) -> Tensor:
    """Returns the samples of these numbers of standard normal noise.

    Args:
        seed: of the whole sequence.
        numbers: of the samples.
        like: gives one sample's shape, dtype and device.

    Returns:
        (len(numbers), *like.shape), each sample drawn in float32 on the CPU and then converted.
    """
    noise = torch.empty(len(numbers), *like.shape)
    for sample, index in zip(noise, numbers, strict=True):
        sample.normal_(generator=torch.Generator().manual_seed(_sample_seed(seed, index)))
    return noise.to(like)


def noisy_copies(image: Tensor, sigma: float, seed: int, numbers: Sequence[int]) -> Tensor:
    """Returns an image plus noise of these numbers, (n, 3, H, W), of `sigma` times the image's range."""
    return image + sigma * (image.max() - image.min()) * gaussian(seed, numbers, image)


def _sample_seed(seed: int, index: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")  # the generator takes 32 bits
