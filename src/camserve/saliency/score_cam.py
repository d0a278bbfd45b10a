"""Score-CAM (https://arxiv.org/abs/1910.01279) and its relatives: every channel is a mask of the image, its weight what
the masked image keeps of the class.

A softmax over channels has one denominator for all of them. It scales the map by a positive number, and maps are scaled
at their end. So the sums leave it out, and what is left of a channel's weight depends on its own score alone: sums of
disjoint ranges of channels add up. A channel that is constant over space is no mask, and is left out of everything.
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
from camserve.saliency.masks import Masks, live_maps


def masks(features: Features, spec: ScoreCam, numbers: Tensor) -> Masks:
    """Queries of these numbers: the input times the upsampled, normalised channels of the same numbers."""
    return _channels(features, numbers, spec.normalise, asks_logits=spec.variant == "logit")[0]


def order(features: Features, spec: ScoreCam | SsCam | IsCam | AblationCam) -> Tensor:
    """(C,), the channels by how much Grad-CAM makes of them, |w_k| times the norm of A_k, the largest first."""
    weighted = features.weights().abs() * features.activations.flatten(1).norm(dim=1)
    found: Tensor = weighted.amax(dim=0).argsort(descending=True, stable=True)
    return found


def reduce(scores: Tensor, masks: Masks, spec: ScoreCam) -> Tensor:
    """sum_k w_k A_k, with the positive factor of a softmax over channels left out.

    REFERENCE, the authors' code: w_k = p_c(query k).
    PAPER, eq. 3 and algorithm 1: softmax over channels of p_c(query k) - p_c(black). The black image's probability is
    the same for all channels and cancels, so w_k = exp(p_c(query k)).
    LOGIT, as torchcam 0.5.0: softmax over channels of S_c(query k) - S_c(x), so w_k = exp(S_c(query k) - S_c(x)).

    Scores of many channels are nearly equal, and a softmax over nearly equal scores is nearly the plain mean: the two
    latter variants hardly differ from the mean activation where masking changes little.

    Args:
        scores: (N, K) probabilities, or logits for LOGIT.
        masks: the N masks.
        spec: which variant.

    Returns:
        (K, u, v), to be upsampled and cut at 0.
    """
    weights = scores
    if spec.variant == "paper":
        weights = scores.exp()
    elif masks.reference is not None:
        weights = _exponential(scores - masks.reference)
    return torch.einsum("nk,nuv->kuv", weights, masks.values)


@dataclass(frozen=True)
class Samples:
    """Each of N masks, altered in S ways: query n S + s is way s of mask n."""

    masks: Masks
    channels: Tensor
    """(N,), the number of each mask's channel."""
    each: int
    """S."""
    alter: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(masks (n, H, W), channels (n,), ways (n,)) -> (n, H, W)."""
    logits: ClassVar[bool] = True

    @property
    def columns(self) -> Tensor:
        """(K,), the classes whose logits are asked."""
        return self.masks.columns

    def __len__(self) -> int:
        return len(self.masks) * self.each

    def blend(self, start: int, stop: int) -> Tensor:
        """The input times the altered masks start..stop-1, (n, 3, H, W)."""
        first, last = start // self.each, -(-stop // self.each)
        upsampled = self.masks.upsampled(first, last)
        query = torch.arange(start, stop, device=upsampled.device)
        mask, way = query // self.each, query % self.each
        return self.alter(upsampled[mask - first], self.channels[mask], way)[:, None] * self.masks.input


def noisy_masks(features: Features, spec: SsCam, numbers: Tensor) -> Samples:
    """SS-CAM: each channel's mask plus normal noise of every pixel, S times.

    The noise of a channel's way depends on (seed, channel, way) alone.
    """

    def add_noise(masks: Tensor, channels: Tensor, ways: Tensor) -> Tensor:
        noise = normal(spec.seed, channels * spec.samples + ways, masks.shape[1] * masks.shape[2], masks.dtype)
        return masks + spec.std * noise.view_as(masks)

    return _samples(features, numbers, spec.samples, add_noise)


def integrated_masks(features: Features, spec: IsCam, numbers: Tensor) -> Samples:
    """IS-CAM: each channel's mask times sum_{j<=i} j / S = i (i + 1) / (2 S), for i = 1..S.

    The factors are those of torchcam 0.5.0, which takes the paper's formula literally: they end at (S + 1) / 2, not 1.
    """

    def scale(masks: Tensor, channels: Tensor, ways: Tensor) -> Tensor:
        return masks * ((ways + 1) * (ways + 2) / (2 * spec.samples)).to(masks)[:, None, None]

    return _samples(features, numbers, spec.samples, scale)


def reduce_samples(scores: Tensor, samples: Samples, spec: SsCam | IsCam) -> Tensor:
    """sum_k w_k A_k with w_k = softmax over channels of mean_s S_c(query k, s) - S_c(x); its denominator left out.

    SS-CAM (https://arxiv.org/abs/2006.14255) and IS-CAM (https://arxiv.org/abs/2010.03023), as torchcam 0.5.0.

    Args:
        scores: (N S, K) logits.
        samples: the N S queries.
        spec: which method.

    Returns:
        (K, u, v), to be upsampled and cut at 0.
    """
    assert samples.masks.reference is not None, "these methods ask logits"
    means = scores.view(len(samples.masks), samples.each, scores.shape[1]).mean(dim=1)
    return torch.einsum("nk,nuv->kuv", _exponential(means - samples.masks.reference), samples.masks.values)


def _channels(features: Features, numbers: Tensor, normalise: str, asks_logits: bool) -> tuple[Masks, Tensor]:
    """The channels of these numbers that are not constant, as masks, and their numbers."""
    values, (height, width) = features.activations[numbers], features.input.shape[-2:]
    live, low, high = live_maps(values, (height, width), normalise)
    reference = features.logits[features.targets] if asks_logits else None
    owners = torch.zeros_like(live)  # one mask serves all targets
    found = Masks(features.input, values[live], low, high, features.targets, owners, reference=reference)
    return found, numbers[live]


def _samples(
    features: Features, numbers: Tensor, each: int, alter: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Samples:
    """Masks normalised before they are upsampled, as torchcam's."""
    found, channels = _channels(features, numbers, "before", asks_logits=True)
    return Samples(found, channels, each, alter)


def _exponential(gain: Tensor) -> Tensor:
    """exp(gain), cut off at the square root of the largest number, so that a sum of products is finite.

    A gain beyond that (44 in float32) would mean that a masked image has e^44 times the class's odds.
    """
    return gain.clamp(max=math.log(torch.finfo(gain.dtype).max) / 2).exp()
