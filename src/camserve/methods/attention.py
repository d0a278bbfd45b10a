"""Methods for vision transformers: what the tokens attend to. Their sums are as large as the token grid."""

from __future__ import annotations

from dataclasses import dataclass

from camserve.methods.spec import MethodSpec


class _Attention(MethodSpec):
    needs = "ViT"
    uses_layer = False

    def passes(self, channels: int, targets: int) -> int:
        """One, which keeps the attention."""
        return 1


@dataclass(frozen=True)
class AttentionRollout(_Attention):
    """Attention multiplied through all layers: the same map for every class."""

    title = "Attention rollout"
    paper = "Abnar and Zuidema, Quantifying Attention Flow in Transformers, 2020, https://arxiv.org/abs/2005.00928"


@dataclass(frozen=True)
class GradientWeightedAttention(_Attention):
    """Attention weighted by its positive gradients, added up through all layers."""

    title = "Gradient-weighted attention"
    paper = "Chefer et al., Generic Attention-model Explainability, 2021, https://arxiv.org/abs/2103.15679"
