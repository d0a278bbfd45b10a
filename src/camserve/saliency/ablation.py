"""Computes Ablation-CAM (Desai and Ramaswamy, WACV 2020): a channel's weight is the share of the logit lost without it.

A query is one channel set to zero. Only the tail behind the layer is run, on the image's own activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from camserve.errors import Unsupported
from camserve.methods import AblationCam
from camserve.saliency.features import Features
from camserve.saliency.gradient import pooled_linear_rows
from camserve.saliency.masks import loss


def ablation_cam(features: Features, spec: AblationCam, numbers: Tensor) -> Tensor:
    """Returns sum_k w_k A_k over the channels of these numbers, w_k = (S_c - S_c without channel k) / S_c: eq. 1.

    The positive factor 1 / |S_c| is left out, its sign is not: where the logit of a class is negative, so is every
    weight of a channel that speaks for the class. That is the definition. Scores with a sign of their own, such as a
    number that is to go down, are not divided by: the share of the opposite score is the same share.

    Returns:
        (K, u, v), to be upsampled and cut at 0.
    """
    try:
        lost = _lost_in_closed_form(features)[:, numbers]
        features.passes.count("closed_form", len(numbers))
    except Unsupported:
        lost = lost_by_running(features, numbers)
    weights = lost * features.targets.measured_by(features.logits[None])[0, :, None]
    return torch.einsum("kc,cuv->kuv", weights, features.activations[numbers])


def _lost_in_closed_form(features: Features) -> Tensor:
    """Returns W_ck gap(A_k), (K, C): what a head of global average pooling and one linear layer loses.

    Raises:
        Unsupported: the network has another head, or the scores are not linear in its outputs.
    """
    return pooled_linear_rows(features) * features.activations.mean(dim=(-2, -1))


def lost_by_running(features: Features, numbers: Tensor) -> Tensor:
    """Returns S_c - S_c without channel k, (K, n), by one run of the tail for each channel.

    S_c comes from a run of the unaltered activations through the same tail: rounding that all runs share is no loss.
    """
    channel = torch.arange(len(features.activations), device=features.activations.device)
    # No channel has the number -1, so the first run ablates none: the losses are measured from it.
    ablated = torch.cat([channel.new_full((1,), -1), numbers])

    def altered(first: int, last: int) -> Tensor:
        absent = (ablated[first:last, None] == channel)[:, :, None, None]
        return features.activations.masked_fill(absent, 0)

    runs = features.passes.behind(features, len(ablated), altered)
    found = torch.cat([features.targets.value(outputs) for _, _, outputs in runs])
    return loss(found[:1], found[1:], features.targets.size(features.logits[None])).T
