"""Makes maps of merged sums where a map is not linear in its sums. It needs only numpy: a gateway has no torch.

The sums of disjoint ranges of queries add up; what a method makes of all of them together (the largest absolute value
of a mean, a ratio of power sums, an exponential of a mean) does not, and is done here, once, behind the last merge. The
answers of some queries make a map as well: where a mean is meant, it is that of the queries answered so far.

A query of the methods that take a mean of all queries is one pass, so that a partial's `queries` is their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from camserve.finalise.maps import NOISE
from camserve.methods import (
    Cam,
    DRise,
    GradCam,
    HiresCam,
    IsCam,
    MethodSpec,
    ReciproCam,
    Rise,
    SmoothGrad,
    SmoothGradCamPlusPlus,
    SsCam,
    XgradCam,
    Xrai,
)
from camserve.methods.gradient import PLUS_PLUS_EPSILON
from camserve.types import Partial, Ranking


def finished(method: MethodSpec, partial: Partial, signed: bool = False) -> np.ndarray:
    """Returns the maps before upsampling and scaling; for most methods they are the sums themselves.

    Args:
        method: the method that made the sums.
        partial: partial merged from any of the method's tasks, whether all queries have been answered or not.
        signed: whether negative evidence is wanted as well, of a method that has some (`MethodSpec.unsigned`).

    Returns:
        (targets, h, w); zeros where the finish needs a context and none has come yet.
    """
    finish = (SIGNED_FINISHES if signed else FINISHES).get(type(method))
    if finish is None:
        return partial.sums
    with np.errstate(all="ignore"):  # what is not finite is refused when the final map is made
        return finish(partial)


def ranking_of(method: MethodSpec, partial: Partial) -> Ranking | None:
    """Returns the ranking that a worker is asked for when all queries are answered; None for a method without one."""
    return Ranking(finished(method, partial)) if method.ranked else None


def smooth_grad(partial: Partial) -> np.ndarray:
    """Returns max over channels of |mean gradient|, (K, H, W), from sums (K, 3, H, W)."""
    return np.asarray(np.abs(_mean(partial)).max(axis=1))


def xrai(partial: Partial) -> np.ndarray:
    """Returns max over channels of the mean attribution: what is ranked, and until then the map.

    It makes (K, H, W) of sums (K, 3, H, W).
    """
    return np.asarray(_mean(partial).max(axis=1))


def smooth_grad_cam_plus_plus(partial: Partial) -> np.ndarray:
    """Returns ReLU(sum_k w_k A_k) with w_k = sum_ij m2 ReLU(m1) / (2 m2 + sum_ab(A_ab) m3 + 1e-6).

    It makes (K, u, v) of sums (K, 3, C, u, v). m1, m2 and m3 are the means of g, g^2 and g^3: see
    `camserve.saliency.plus_plus`.
    """
    if partial.context is None:
        return np.zeros(partial.sums.shape[:1] + partial.sums.shape[-2:])
    activations = partial.context.astype(np.float64)
    first, second, third = np.moveaxis(_mean(partial), 1, 0)
    rest = activations.sum(axis=(-2, -1), keepdims=True) * third + PLUS_PLUS_EPSILON
    denominator = 2 * second + rest
    share = second * np.maximum(first, 0) / denominator
    weights = np.where(denominator == 0, 0, share).sum(axis=(-2, -1))
    return np.asarray(np.maximum(np.einsum("kc,cuv->kuv", weights, activations), 0))


def sampled_channels(partial: Partial) -> np.ndarray:
    """Returns sum_k exp(mean gain of channel k) A_k over the channels that have a gain: see `SsCam`.

    It makes (K, u, v) of sums (K + 1, C). The exponential is cut off at the square root of the largest number of the
    context's type, so that a sum of products is finite. A gain beyond that (44 in float32) would mean that a masked
    image has e^44 times the class's odds.
    """
    gains, counts = partial.sums[:-1].astype(np.float64), partial.sums[-1]
    if partial.context is None:
        return np.zeros((len(gains), 1, 1))
    most = math.log(np.finfo(partial.context.dtype).max) / 2
    asked = counts > 0
    weights = np.exp(np.minimum(gains[:, asked] / counts[asked], most))
    return np.asarray(np.einsum("kc,cuv->kuv", weights, partial.context[asked].astype(np.float64)))


def positive(partial: Partial) -> np.ndarray:
    """Returns ReLU of the sums: these methods cut negative evidence off at the layer's size, before upsampling."""
    return np.asarray(np.maximum(partial.sums, 0))


def from_least(partial: Partial) -> np.ndarray:
    """Returns the sums, (K, h, w), from their least value on where that is negative; 0 where all are the same.

    The maps of RISE and Recipro-CAM are scaled from their minimum to their maximum. The sums of probabilities are
    positive; those of a difference, or of a number, say as much where they are negative.
    """
    least = partial.sums.min(axis=(1, 2), keepdims=True)
    found = partial.sums - np.minimum(least, 0)
    # Measured from the least of them, the rounding of negative scores would be a map of its own.
    same = np.ptp(partial.sums, axis=(1, 2), keepdims=True) <= NOISE * np.abs(least)
    return np.where(same & (least < 0), 0, found)


def from_mean(partial: Partial) -> np.ndarray:
    """Returns the sums, (K, H, W), measured from their mean over space."""
    sums = partial.sums.astype(np.float64)
    return np.asarray(sums - sums.mean(axis=(1, 2), keepdims=True))


def _mean(partial: Partial) -> np.ndarray:
    return partial.sums.astype(np.float64) / max(1, partial.queries)


FINISHES: Mapping[type[MethodSpec], Callable[[Partial], np.ndarray]] = {
    Cam: positive,
    GradCam: positive,
    HiresCam: positive,
    XgradCam: positive,
    Rise: from_least,
    DRise: from_least,
    ReciproCam: from_least,
    SmoothGrad: smooth_grad,
    SmoothGradCamPlusPlus: smooth_grad_cam_plus_plus,
    SsCam: sampled_channels,
    IsCam: sampled_channels,
    Xrai: xrai,
}
"""Finishes of the methods whose maps are not their sums."""

SIGNED_FINISHES: Mapping[type[MethodSpec], Callable[[Partial], np.ndarray]] = {Rise: from_mean, DRise: from_mean}
"""Finishes of the methods whose signed maps are not their sums."""
