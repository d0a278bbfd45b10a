"""Says which functions make up each method, in one line a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from camserve.methods import (
    AblationCam,
    AttentionRollout,
    Cam,
    Deconvolution,
    DRise,
    EigenCam,
    GradCam,
    GradCamPlusPlus,
    GradientWeightedAttention,
    GroupCam,
    GuidedBackprop,
    GuidedGradCam,
    HiresCam,
    IntegratedGradCam,
    IntegratedGradients,
    IsCam,
    LayerCam,
    LeGrad,
    MethodSpec,
    Occlusion,
    ReciproCam,
    Rise,
    ScoreCam,
    SmoothGrad,
    SmoothGradCamPlusPlus,
    SsCam,
    XgradCam,
    Xrai,
)
from camserve.saliency import (
    ablation,
    attention,
    backprop,
    curves,
    eigen,
    gradient,
    group_cam,
    integrated,
    occlusion,
    plus_plus,
    recipro,
    rise,
    score_cam,
    xrai,
)
from camserve.saliency.features import Features
from camserve.saliency.masks import Queries
from camserve.types import MapCurves, Ranking


@dataclass(frozen=True)
class Direct:
    """Names the function of a method that is made in one go."""

    sums: Callable[[Features, Any], Tensor]
    """Function (features, spec) -> (K, u, v), or (K, H, W) for a spec of input resolution."""
    needs_gradients: bool


@dataclass(frozen=True)
class Sampled:
    """Names the functions of a method whose queries are passes of its own.

    Such passes are gradients of altered images, or tails on altered activations.
    """

    sums: Callable[[Features, Any, Tensor], Tensor]
    """Function (features, spec, numbers (n,)) -> sums over the queries of these numbers, of the shape that the spec
    says; those of disjoint sets add up."""
    needs_gradients: bool
    energies: Callable[[Features, Any], Tensor] | None = None
    """Function (features, spec) -> energies (blocks,) of the blocks of queries, at least 0: how much each may add to
    the map. The blocks of most energy are asked first; None: all may add the same. A block is one query, unless the
    spec says otherwise."""


@dataclass(frozen=True)
class Perturbation:
    """Names the functions of a method of masked queries: which to ask, and what their scores add up to."""

    masks: Callable[[Features, Any, Tensor], Queries]
    """Function (features, spec, numbers (n,)) -> the queries of these numbers."""
    reduce: Callable[[Tensor, Any, Any], Tensor]
    """Function (scores (N, K), the same queries, spec) -> sums of the spec's shape; those of disjoint sets add up."""
    needs_gradients: bool
    energies: Callable[[Features, Any], Tensor] | None = None
    """Function that returns energies, the same as that of `Sampled`."""
    labels: Callable[[Features, Any], tuple[int, ...]] | None = None
    """Function (features, spec) -> what must be found once for all queries, because another worker might find something
    else; it comes back to the other functions as `Features.labels`."""


REGISTRY: dict[type[MethodSpec | MapCurves | Ranking], Direct | Sampled | Perturbation] = {
    Cam: Direct(gradient.cam, needs_gradients=False),
    GradCam: Direct(gradient.grad_cam, needs_gradients=True),
    HiresCam: Direct(gradient.hires_cam, needs_gradients=True),
    GradCamPlusPlus: Direct(plus_plus.grad_cam_plus_plus, needs_gradients=True),
    SmoothGradCamPlusPlus: Sampled(plus_plus.smooth_grad_cam_plus_plus, needs_gradients=False),
    XgradCam: Direct(gradient.xgrad_cam, needs_gradients=True),
    LayerCam: Direct(gradient.layer_cam, needs_gradients=True),
    IntegratedGradCam: Sampled(integrated.integrated_grad_cam, needs_gradients=False),
    EigenCam: Direct(eigen.eigen_cam, needs_gradients=False),
    GuidedBackprop: Direct(backprop.guided_backprop, needs_gradients=False),
    Deconvolution: Direct(backprop.deconvolution, needs_gradients=False),
    GuidedGradCam: Direct(backprop.guided_grad_cam, needs_gradients=True),
    IntegratedGradients: Sampled(backprop.integrated_gradients, needs_gradients=False),
    SmoothGrad: Sampled(backprop.smooth_grad, needs_gradients=False),
    Xrai: Sampled(xrai.attributions, needs_gradients=False),
    GroupCam: Perturbation(
        group_cam.masks, group_cam.reduce, needs_gradients=True, energies=group_cam.energies, labels=group_cam.labels
    ),
    ScoreCam: Perturbation(score_cam.masks, score_cam.reduce, needs_gradients=False, energies=score_cam.energies),
    SsCam: Perturbation(
        score_cam.noisy_masks, score_cam.reduce_samples, needs_gradients=False, energies=score_cam.energies
    ),
    IsCam: Perturbation(
        score_cam.integrated_masks, score_cam.reduce_samples, needs_gradients=False, energies=score_cam.energies
    ),
    Rise: Perturbation(rise.masks, rise.reduce, needs_gradients=False),
    DRise: Perturbation(rise.masks, rise.reduce, needs_gradients=False),
    AblationCam: Sampled(ablation.ablation_cam, needs_gradients=False, energies=score_cam.energies),
    ReciproCam: Sampled(recipro.recipro_cam, needs_gradients=False),
    Occlusion: Perturbation(occlusion.masks, occlusion.reduce, needs_gradients=False),
    AttentionRollout: Direct(attention.attention_rollout, needs_gradients=False),
    GradientWeightedAttention: Direct(attention.gradient_weighted_attention, needs_gradients=False),
    LeGrad: Direct(attention.le_grad, needs_gradients=False),
    Ranking: Sampled(xrai.ranked, needs_gradients=False),
    MapCurves: Perturbation(curves.masks, curves.reduce, needs_gradients=False),
}
