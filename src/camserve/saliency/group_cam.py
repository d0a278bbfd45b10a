"""Computes Group-CAM (https://arxiv.org/abs/2103.13859): gradient-weighted channels, masked in groups.

The PAPER variant is the authors' code of June 2021 (commit 1b795e1); REFERENCE is their code since August 2021, which
can also cluster the weighted channels instead of taking them in order. Queries are numbered target by target: query l
of target t is t * groups + l.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from camserve.errors import InvalidOption
from camserve.methods import GroupCam
from camserve.saliency.features import Features
from camserve.saliency.masks import Masks, gaussian_blur, loss, make_masks

BLUR_KERNEL_PX = 51
BLUR_SIGMA_PX = 50.0
PLATEAU = 8
"""Units in the last place, of a map's maximum, by which the values of a plateau may differ: sums of the same channels
in another order. More would drop values that lie just above the percentile by coincidence."""


def masks(features: Features, spec: GroupCam, numbers: Tensor) -> Masks:
    """Returns the queries of these numbers behind one of the blurred image alone, from which the scores are measured.

    Args:
        features: with gradients.
        spec: groups in 1..C.
        numbers: (n,), which queries.
    """
    values = _group_maps(features, spec)
    if spec.variant == "paper":
        values = above_percentile(values, spec.theta)
    owners = torch.arange(len(features.targets), device=values.device).repeat_interleave(spec.groups)
    # Each step of a request needs it: it takes as long as half a query of a small network.
    (blurred,) = features.made_once("blurred", lambda: (gaussian_blur(features.input, BLUR_KERNEL_PX, BLUR_SIGMA_PX),))
    return make_masks(features.input, values[numbers], features.targets, owners[numbers], blurred).with_anchor()


def energies(features: Features, spec: GroupCam) -> Tensor:
    """Returns the energies (K * groups,) of the queries: the sum over space of their group's M_l."""
    return _group_maps(features, spec).sum(dim=(1, 2))


def reduce(scores: Tensor, masks: Masks, spec: GroupCam) -> Tensor:
    """Returns sum_l (p_l - p_blur) M'_l for PAPER, sum_l ReLU(p_l - p_blur) M_l for REFERENCE.

    Args:
        scores: (N, K) probabilities, first those of the blurred image.
        masks: the N masks.
        spec: which variant.

    Returns:
        (K, u, v), to be upsampled.
    """
    gain = -loss(scores[:1], scores[1:], masks.targets.query_size)
    own = F.one_hot(masks.owners[1:], scores.shape[1]).to(gain)  # a query counts for its own target only
    if spec.variant == "paper":
        return torch.einsum("nk,nuv->kuv", gain * own, masks.normalised()[1:])
    return torch.einsum("nk,nuv->kuv", gain.relu() * own, masks.values[1:])


def _group_maps(features: Features, spec: GroupCam) -> Tensor:
    """Returns ReLU of the sum of w_k A_k over each group, (K * groups, u, v)."""
    weighted = _weighted(features)
    if spec.grouping == "chunk":
        return in_order(weighted, spec.groups).relu()
    found = features.labels or labels(features, spec)
    number = len(weighted) * weighted.shape[1]
    if len(found) != number or max(found) >= spec.groups:
        raise InvalidOption(f"{number} labels below {spec.groups} fit, got {len(found)} up to {max(found)}")
    own = torch.tensor(found, device=weighted.device).view(weighted.shape[:2])
    member = F.one_hot(own, spec.groups).to(weighted)  # (K, C, groups)
    return torch.einsum("kcg,kcuv->kguv", member, weighted).flatten(0, 1).relu()


def _weighted(features: Features) -> Tensor:
    """Returns w_k A_k, (K, C, u, v)."""
    return features.weights()[:, :, None, None] * features.activations


def in_order(weighted: Tensor, groups: int) -> Tensor:
    """Returns sums over runs of channels: (K, C, u, v) to (K * groups, u, v).

    The runs are those of torch.chunk: groups of ceil(C / groups) channels, so that the last ones may be short or empty.
    """
    channels, size = weighted.shape[1], math.ceil(weighted.shape[1] / groups)
    padded = F.pad(weighted, (0, 0, 0, 0, 0, size * groups - channels))
    targets, _, height, width = padded.shape
    return padded.reshape(targets * groups, size, height, width).sum(dim=1)


def labels(features: Features, spec: GroupCam) -> tuple[int, ...]:
    """Returns the cluster of every channel, target by target, where channels are grouped by how alike they look.

    The clusters are those of the authors' `utils/cluster.py`: scikit-learn's `KMeans(n_clusters=groups,
    random_state=0)` or `AgglomerativeClustering(n_clusters=groups)` on the flattened w_k A_k, on the CPU. A cluster may
    be empty where fewer channels than groups differ.

    Returns:
        K * C numbers below `groups`; none where channels are taken in order.
    """
    if spec.grouping == "chunk":
        return ()
    rows = _weighted(features).flatten(2).detach().cpu().numpy()
    return tuple(int(label) for of_target in rows for label in clusters(of_target, spec))


def clusters(rows: np.ndarray, spec: GroupCam) -> np.ndarray:
    """Returns the cluster of each row of one target's w_k A_k, (C, H * W): C numbers below `groups`."""
    if spec.groups == 1:
        return np.zeros(len(rows), np.int64)  # one row alone cannot be clustered
    from sklearn.cluster import AgglomerativeClustering, KMeans  # slow to import, and seldom needed

    if spec.grouping == "kmeans":
        # More clusters than distinct rows would stay empty, with a warning each time.
        distinct = len(np.unique(rows, axis=0))
        clustering = KMeans(n_clusters=min(spec.groups, distinct), random_state=0)
    else:
        clustering = AgglomerativeClustering(n_clusters=spec.groups)
    return np.asarray(clustering.fit_predict(rows))


def above_percentile(maps: Tensor, theta: float) -> Tensor:
    """Returns the maps, in which values at or below the map's own theta percentile are 0.

    The percentile is numpy's, linear between ranks. Values that are equal but for rounding are on the same side of it:
    a plateau is kept or left out as a whole.
    """
    flat = maps.flatten(1)
    ranked = flat.sort(dim=1).values
    rank = theta / 100 * (flat.shape[1] - 1)
    below, fraction = math.floor(rank), rank - math.floor(rank)
    above = min(below + 1, flat.shape[1] - 1)
    rounding = PLATEAU * torch.finfo(maps.dtype).eps * ranked[:, -1].abs()
    threshold = torch.lerp(ranked[:, below], ranked[:, above], fraction) + rounding
    return torch.where(maps > threshold[:, None, None], maps, 0)
