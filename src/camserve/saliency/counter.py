"""Makes random numbers that are a function of a seed and of their indices, on any device, in any order.

The index of a sample and the index of a number in it are hashed; nothing is drawn from a generator with a state. So a
sample is the same in whatever micro-batch, shard, order or step it is made. The hash is splitmix64's finaliser (Steele
et al., Fast Splittable Pseudorandom Number Generators, 2014), in integers that wrap around.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_BITS = 24
"""Random bits of a uniform number; float32 holds them all, so that it is the same number in every dtype."""


def uniform(seed: int, samples: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Returns uniform numbers in [0, 1).

    Args:
        seed: of the whole sequence.
        samples: (n,) int64, numbers of the samples.
        length: how many numbers make a sample.
        dtype: of the result.

    Returns:
        (n, length), on the device of `samples`.
    """
    return _fraction(_logical_shift(_hash(seed, samples, length), 64 - _BITS), dtype)


def normal(seed: int, samples: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Returns standard normal numbers, by Box and Muller's formula from the two ends of one hash.

    Their absolute value is at most 5.8: the first uniform number is never larger than 1 - 2^-24.

    Returns:
        (n, length), as `uniform`; between devices and dtypes a number differs by the rounding of log and cos alone.
    """
    bits = _hash(seed, samples, length)
    radius = torch.sqrt(-2 * torch.log1p(-_fraction(_logical_shift(bits, 64 - _BITS), dtype)))
    return radius * torch.cos(2 * math.pi * _fraction(bits & (2**_BITS - 1), dtype))


def _hash(seed: int, samples: Tensor, length: int) -> Tensor:
    """Returns hashes (n, length), int64, of which all 64 bits look random."""
    stream = _mix(torch.full_like(samples[:1], seed) + _signed(_STEP))
    sample = _mix(stream + samples * _signed(_STEP))
    index = torch.arange(1, length + 1, device=samples.device)
    return _mix(sample[:, None] + index * _signed(_STEP))


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _logical_shift(z, 30)) * _signed(_MULTIPLIERS[0])
    z = (z ^ _logical_shift(z, 27)) * _signed(_MULTIPLIERS[1])
    return z ^ _logical_shift(z, 31)


def _logical_shift(z: Tensor, by: int) -> Tensor:
    """Returns z >> by with zeros coming in from the left; torch's own shift of int64 brings in the sign."""
    return torch.bitwise_and(z >> by, 2 ** (64 - by) - 1)


def _fraction(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(bits.to(dtype), 2.0**-_BITS)


def _signed(value: int) -> int:
    """Returns the int64 of the same bits."""
    return value - 2**64 if value >= 2**63 else value
