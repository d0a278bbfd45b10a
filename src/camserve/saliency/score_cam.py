"""Computes Score-CAM (https://arxiv.org/abs/1910.01279) and its relatives: every channel is a mask of the image.

A channel's weight is what the masked image keeps of the class. A softmax over channels has one denominator for all of
them. It scales the map by a positive number, and maps are scaled at their end. So the sums leave it out, and what is
left of a channel's weight depends on its own score alone: sums of disjoint ranges of channels add up. A channel that is
constant over space is no mask, and is left out of everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from camserve.methods import AblationCam, IsCam, ScoreCam, SsCam
from camserve.saliency.counter import normal
from camserve.saliency.features import Features
from camserve.saliency.masks import Masks, live_maps, loss
from camserve.scores import Targets


def masks(features: Features, spec: ScoreCam, numbers: Tensor) -> Masks:
    """Returns the queries of these numbers: the input times the upsampled, normalised channels of the same numbers.

    Where scores have no zero of their own, they stand behind a query of the baseline, of which nothing is seen.
    """
    found = _channels(features, numbers, spec.normalise, by_value=spec.variant == "logit")[0]
    return found.with_anchor() if spec.is_anchored(features.targets.score.has_zero) else found


def energies(features: Features, spec: ScoreCam | SsCam | IsCam | AblationCam) -> Tensor:
    """Returns the energies (C,) of the channels: the mean over space of |A_k|.

    What a channel adds to the map is its weight times A_k, and the weights of masked images differ less than the
    energies. benchmarks/tolerance.py holds this order against others, those of gradients included.
    """
    return features.activations.abs().mean(dim=(-2, -1))


def reduce(scores: Tensor, masks: Masks, spec: ScoreCam) -> Tensor:
    """Returns sum_k w_k A_k, with the positive factor of a softmax over channels left out.

    REFERENCE, the authors' code: w_k = p_c(query k). A number or a cosine has no zero of its own: there it is the gain
    over the baseline (definition 3 of the paper), which may be negative, as is a difference of probabilities.
    PAPER, eq. 3 and algorithm 1: softmax over channels of p_c(query k) - p_c(black). The black image's probability is
    the same for all channels and cancels, so w_k = exp(p_c(query k)).
    LOGIT, as torchcam 0.5.0: softmax over channels of S_c(query k) - S_c(x), so w_k = exp(S_c(query k) - S_c(x)).

    Scores of many channels are nearly equal, and a softmax over nearly equal scores is nearly the plain mean: the two
    latter variants hardly differ from the mean activation where masking changes little.

    Args:
        scores: (N, K), for LOGIT values.
        masks: the N masks.
        spec: which variant.

    Returns:
        (K, u, v), to be upsampled and cut at 0.
    """
    values = masks.values
    if spec.is_anchored(masks.targets.score.has_zero):
        values, scores = values[1:], -loss(scores[:1], scores[1:], masks.targets.query_size)
    weights = scores
    if spec.variant == "paper":
        weights = _exponential(scores)
    elif masks.reference is not None:
        weights = _exponential(scores - masks.reference)
    return torch.einsum("nk,nuv->kuv", weights, values)


@dataclass(frozen=True)
class Samples:
    """Holds N queries, each a way of altering one of M masks; the queries of one mask stand together."""

    masks: Masks
    """The M masks, each of which some query alters."""
    mask_index: Tensor
    """Index among the masks of the one that each query alters, (N,), ascending."""
    numbers: Tensor
    """Numbers of the queries, (N,): channel * S + way."""
    each: int
    """Number of ways S in which each mask is altered."""
    all_channels: int
    """Number of channels C of the layer."""
    alter: Callable[[Tensor, Tensor], Tensor]
    """Function (masks (n, H, W), numbers (n,)) -> altered masks (n, H, W)."""
    on_cpu: tuple[int, ...]
    """Copy of `mask_index`, so that blending need not wait for the device."""
    by_value: ClassVar[bool] = True

    @property
    def targets(self) -> Targets:
        """Returns the targets whose values are asked."""
        return self.masks.targets

    @property
    def channels(self) -> Tensor:
        """Returns the channel of each query's mask, (N,)."""
        return self.numbers // self.each

    def __len__(self) -> int:
        return len(self.numbers)

    def blend(self, start: int, stop: int) -> Tensor:
        """Returns the input times the altered masks start..stop-1, (n, 3, H, W).

        A mask is upsampled once for all its ways.
        """
        if start == stop:
            return self.masks.blend(0, 0)
        first, last = self.on_cpu[start], self.on_cpu[stop - 1]
        upsampled = self.masks.upsampled(first, last + 1)[self.mask_index[start:stop] - first]
        return self.alter(upsampled, self.numbers[start:stop])[:, None] * self.masks.input


def noisy_masks(features: Features, spec: SsCam, numbers: Tensor) -> Samples:
    """Returns the queries of SS-CAM: each channel's mask plus normal noise of every pixel, S times.

    The noise of a query depends on (seed, number) alone.
    """

    def add_noise(masks: Tensor, numbers: Tensor) -> Tensor:
        noise = normal(spec.seed, numbers, masks.shape[1] * masks.shape[2], masks.dtype)
        return masks + spec.std * noise.view_as(masks)

    return _samples(features, numbers, spec.samples, add_noise)


def integrated_masks(features: Features, spec: IsCam, numbers: Tensor) -> Samples:
    """Returns the queries of IS-CAM: each channel's mask times sum_{j<=i} j / S = i (i + 1) / (2 S), for i = 1..S.

    The factors are those of torchcam 0.5.0, which takes the paper's formula literally: they end at (S + 1) / 2, not 1.
    """

    def scale(masks: Tensor, numbers: Tensor) -> Tensor:
        way = numbers % spec.samples
        return masks * ((way + 1) * (way + 2) / (2 * spec.samples)).to(masks)[:, None, None]

    return _samples(features, numbers, spec.samples, scale)


def reduce_samples(scores: Tensor, samples: Samples, spec: SsCam | IsCam) -> Tensor:
    """Returns for each target and channel the sum over its queries of S_c(query) - S_c(x), and how many they are.

    The finish makes sum_k w_k A_k of them, with w_k = softmax over channels of the mean gain, its denominator left out:
    SS-CAM (https://arxiv.org/abs/2006.14255) and IS-CAM (https://arxiv.org/abs/2010.03023), as torchcam 0.5.0. A
    channel without queries, such as one that is constant over space, takes no part in the map.

    Args:
        scores: (N, K) logits.
        samples: the N queries.
        spec: which method.

    Returns:
        (K + 1, C), in the last row the number of queries of each channel.
    """
    assert samples.masks.reference is not None, "these methods ask logits"
    gains = scores - samples.masks.reference
    rows = torch.cat([gains.T, torch.ones_like(gains[:, :1]).T])
    return rows.new_zeros(len(rows), samples.all_channels).index_add_(1, samples.channels, rows)


def _channels(features: Features, numbers: Tensor, normalise: str, by_value: bool) -> tuple[Masks, Tensor]:
    """Returns the channels of these numbers that are not constant, as masks, and their numbers."""
    values, (height, width) = features.activations[numbers], features.input.shape[-2:]
    live, low, high = live_maps(values, (height, width), normalise)
    reference = features.targets.value(features.logits[None])[0] if by_value else None
    owners = torch.zeros_like(live)  # one mask serves all targets
    found = Masks(features.input, values[live], low, high, features.targets, owners, reference=reference)
    return found, numbers[live]


def _samples(features: Features, numbers: Tensor, each: int, alter: Callable[[Tensor, Tensor], Tensor]) -> Samples:
    """Returns the queries of these numbers but those of constant channels; masks are normalised at the layer's size."""
    numbers = numbers.sort().values
    own = numbers // each
    found, live = _channels(features, torch.unique(own), "before", by_value=True)
    kept = torch.isin(own, live)
    mask_index = torch.searchsorted(live, own[kept])
    return Samples(found, mask_index, numbers[kept], each, len(features.activations), alter, tuple(mask_index.tolist()))


def _exponential(gain: Tensor) -> Tensor:
    """Returns exp(gain), cut off at the square root of the largest number, so that a sum of products is finite.

    A gain beyond that (44 in float32) would mean that a masked image has e^44 times the class's odds.
    """
    return gain.clamp(max=math.log(torch.finfo(gain.dtype).max) / 2).exp()
