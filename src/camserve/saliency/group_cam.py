"""Group-CAM (https://arxiv.org/abs/2103.13859): gradient-weighted channels, masked in groups.

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

from camserve.methods import GroupCam
from camserve.saliency.features import Features
from camserve.saliency.masks import Masks, gaussian_blur, make_masks

BLUR_KERNEL_PX = 51
BLUR_SIGMA_PX = 50.0


def masks(features: Features, spec: GroupCam, numbers: Tensor) -> Masks:
    """Queries of these numbers behind one query of the blurred image alone, from which the scores are measured.

    Args:
        features: with gradients.
        spec: groups in 1..C.
        numbers: (n,), which queries.
    """
    values = _group_maps(features, spec)
    if spec.variant == "paper":
        values = above_percentile(values, spec.theta)
    owners = torch.arange(len(features.targets), device=values.device).repeat_interleave(spec.groups)
    blurred = gaussian_blur(features.input, BLUR_KERNEL_PX, BLUR_SIGMA_PX)
    return make_masks(features.input, values[numbers], features.targets, owners[numbers], blurred).with_anchor()


def order(features: Features, spec: GroupCam) -> Tensor:
    """(K * groups,), the queries by the energy of their group, the sum of M_l over space, the largest first."""
    return _group_maps(features, spec).sum(dim=(1, 2)).argsort(descending=True, stable=True)


def reduce(scores: Tensor, masks: Masks, spec: GroupCam) -> Tensor:
    """PAPER: sum_l (p_l - p_blur) M'_l. REFERENCE: sum_l ReLU(p_l - p_blur) M_l.

    Args:
        scores: (N, K) probabilities, first those of the blurred image.
        masks: the N masks.
        spec: which variant.

    Returns:
        (K, u, v), to be upsampled.
    """
    gain = scores[1:] - scores[:1]
    own = F.one_hot(masks.owners[1:], scores.shape[1]).to(gain)  # a query counts for its own target only
    if spec.variant == "paper":
        return torch.einsum("nk,nuv->kuv", gain * own, masks.normalised()[1:])
    return torch.einsum("nk,nuv->kuv", gain.relu() * own, masks.values[1:])


def _group_maps(features: Features, spec: GroupCam) -> Tensor:
    """(K * groups, u, v): ReLU of the sum of w_k A_k over each group."""
    weighted = features.weights()[:, :, None, None] * features.activations  # (K, C, u, v)
    if spec.grouping == "chunk":
        return in_order(weighted, spec.groups).relu()
    return torch.cat([_clustered(one, spec) for one in weighted]).relu()


def in_order(weighted: Tensor, groups: int) -> Tensor:
    """(K, C, u, v) to (K * groups, u, v): sums over runs of channels.

    As torch.chunk splits: groups of ceil(C / groups) channels, so that the last ones may be short or empty.
    """
    channels, size = weighted.shape[1], math.ceil(weighted.shape[1] / groups)
    padded = F.pad(weighted, (0, 0, 0, 0, 0, size * groups - channels))
    targets, _, height, width = padded.shape
    return padded.reshape(targets * groups, size, height, width).sum(dim=1)


def _clustered(weighted: Tensor, spec: GroupCam) -> Tensor:
    """(C, u, v) to (groups, u, v): sums over clusters of channels that look alike.

    As the authors' `utils/cluster.py`: scikit-learn's `KMeans(n_clusters=groups, random_state=0)` or
    `AgglomerativeClustering(n_clusters=groups)` on the flattened w_k A_k, on the CPU. A cluster may be empty where
    fewer channels than groups differ.
    """
    labels = _labels(weighted.flatten(1).detach().cpu().numpy(), spec)
    member = F.one_hot(torch.from_numpy(labels).long().to(weighted.device), spec.groups).to(weighted)  # (C, groups)
    return torch.einsum("cg,cuv->guv", member, weighted)


def _labels(rows: np.ndarray, spec: GroupCam) -> np.ndarray:
    """(C,), the cluster of each row."""
    if spec.groups == 1:
        return np.zeros(len(rows), np.int64)  # one row alone cannot be clustered
    from sklearn.cluster import AgglomerativeClustering, KMeans  # slow to import, and seldom needed

    if spec.grouping == "kmeans":
        distinct = len(np.unique(rows, axis=0))  # more clusters than these would stay empty, with a warning each time
        clustering = KMeans(n_clusters=min(spec.groups, distinct), random_state=0)
    else:
        clustering = AgglomerativeClustering(n_clusters=spec.groups)
    return np.asarray(clustering.fit_predict(rows))


def above_percentile(maps: Tensor, theta: float) -> Tensor:
    """Values at or below the map's own theta percentile become 0; as numpy.percentile, linear between ranks."""
    flat = maps.flatten(1)
    ranked = flat.sort(dim=1).values
    rank = theta / 100 * (flat.shape[1] - 1)
    below, fraction = math.floor(rank), rank - math.floor(rank)
    above = min(below + 1, flat.shape[1] - 1)
    threshold = torch.lerp(ranked[:, below], ranked[:, above], fraction)
    return torch.where(maps > threshold[:, None, None], maps, 0)
