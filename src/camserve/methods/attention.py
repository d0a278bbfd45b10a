"""Describes the methods for vision transformers: what tokens attend to. Sums are as large as the token grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from camserve.methods.spec import MethodSpec

if TYPE_CHECKING:
    from camserve.types import Layer


class _Attention(MethodSpec):
    needs = "ViT"
    uses_layer = False
    requires = frozenset({"layer", "modules"})  # a map is as large as the default layer's

    def passes(self, layer: Layer, targets: int, has_zero: bool = True) -> int:
        """Returns 1: the pass that keeps the attention."""
        return 1


@dataclass(frozen=True)
class AttentionRollout(_Attention):
    """Multiplies attention through all layers; the map is the same for every class."""

    title = "Attention rollout"
    positive = "attention is never negative"
    paper = "Abnar and Zuidema, Quantifying Attention Flow in Transformers, 2020, https://arxiv.org/abs/2005.00928"


@dataclass(frozen=True)
class GradientWeightedAttention(_Attention):
    """Weights attention by its positive gradients and adds it up through all layers."""

    title = "Gradient-weighted attention"
    positive = "it takes positive parts alone"
    kind = "pixel_gradient"
    requires = frozenset({"layer", "gradients", "modules"})
    paper = "Chefer et al., Generic Attention-model Explainability, 2021, https://arxiv.org/abs/2103.15679"


@dataclass(frozen=True)
class LeGrad(_Attention):
    """Averages the positive gradients of attention, block by block, each of the score that its own tokens get."""

    title = "LeGrad"
    positive = "it takes positive gradients alone"
    kind = "pixel_gradient"
    requires = frozenset({"layer", "gradients", "modules"})
    paper = "Bousselham et al., LeGrad, 2024, https://arxiv.org/abs/2404.03214"
