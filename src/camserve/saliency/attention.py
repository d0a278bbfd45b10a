"""Maps what tokens of a vision transformer attend to: rollout, gradient-weighted attention, LeGrad."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from camserve.errors import Unsupported
from camserve.methods import AttentionRollout, GradientWeightedAttention, LeGrad
from camserve.saliency.features import Features
from camserve.saliency.seen_attention import NO_BLOCKS, Attentions, SeenAttention, Stages

CUT_ATTENTION = (
    "no gradient of the scores reaches some of the network's attentions, because its forward cuts it, with `detach` "
    "for instance; attention_rollout needs none"
)


def attention_rollout(features: Features, spec: AttentionRollout) -> Tensor:
    """Returns the row in the product of (mean over heads of A_l + I) / 2 that the scores are read off.

    Attention rollout, Abnar and Zuidema (https://arxiv.org/abs/2005.00928), sec. 3: half of what a layer passes on is
    its residual. The rows of each factor add up to 1, as those of A_l do. The row is the class token's, or the mean of
    those of all tokens that the scores are made of: class and distillation token, or the patches that are averaged.

    Returns:
        (K, u, v), the same for each target.

    Raises:
        Unsupported: the network is no vision transformer, or an attention pools its tokens.
    """
    attentions = _following(features)
    seen = SeenAttention()
    with torch.no_grad(), seen:
        features.passes.differentiable(features.input[None])
    features.passes.count("masked_forward", 1, images=1)
    rollout = torch.eye(attentions.length).to(features.activations)
    for layer in attentions.over(seen):
        mean = _heads(features, layer).mean(dim=0)
        rollout = (mean + torch.eye(len(mean)).to(mean)) / 2 @ rollout
    return _row(rollout, attentions).expand(len(features.targets), -1, -1)


def gradient_weighted_attention(features: Features, spec: GradientWeightedAttention) -> Tensor:
    """Returns the row in R that the scores are read off, as above; R is relevance propagated through all layers.

    R = I, then R += mean over heads of ReLU(dS_c/dA_l * A_l) @ R, layer by layer, and at the end R - I: Chefer et al.
    (https://arxiv.org/abs/2103.15679), eq. 5 and 6, for self-attention alone, without the normalisation of eq. 8
    and 9, as in the authors' notebook for ViT (`Transformer_MM_explainability_ViT.ipynb`).

    Returns:
        (K, u, v).

    Raises:
        Unsupported: the network is no vision transformer, an attention pools its tokens, or no gradient reaches some
            attention.
    """
    attentions = _following(features)
    with SeenAttention() as seen:
        logits = features.passes.differentiable(features.input[None])
    features.passes.count("pixel_gradient", len(features.targets), images=1)
    layers = attentions.over(seen)
    maps = []
    for score in features.targets.value(logits)[0]:
        # R - I, because what a patch has of itself is the same for all, and would hide small differences between them.
        gained = features.activations.new_zeros(attentions.length, attentions.length)
        for layer, gradient in zip(layers, _gradients(score, layers), strict=True):
            positive = (_heads(features, gradient) * _heads(features, layer)).relu().mean(dim=0)
            gained = gained + positive @ gained + positive
        maps.append(_row(gained, attentions))
    return torch.stack(maps)


def le_grad(features: Features, spec: LeGrad) -> Tensor:
    """Returns the mean over blocks, heads and query tokens of ReLU(ds^l/dA^l), for each key token of the picture.

    LeGrad, Bousselham et al. (https://arxiv.org/abs/2404.03214), eq. 5 to 8. s^l is the score that the network's own
    head (its norm, then the class token or what it pools, then its linear layer) gives to the tokens behind block l,
    and A^l are that block's attention probabilities.

    Returns:
        (K, u, v).

    Raises:
        Unsupported: the network is no vision transformer made of blocks, or no gradient reaches some attention.
    """
    attentions = _at_layer(features)
    if not attentions.blocks:
        raise Unsupported(NO_BLOCKS)
    with Stages(attentions.blocks).installed(features.passes.module), SeenAttention() as seen:
        logits = features.passes.differentiable(features.input[None])
    features.passes.count("pixel_gradient", len(features.targets), images=1)
    layers = attentions.over(seen)
    maps = []
    for score in features.targets.value(logits).sum(dim=0):  # each s^l has a graph of its own block alone
        gradients = _gradients(score, layers)
        shares = torch.stack([_heads(features, gradient).relu().mean(dim=(0, 1)) for gradient in gradients])
        maps.append(attentions.placed(shares.mean(dim=0)))
    return torch.stack(maps)


def _at_layer(features: Features) -> Attentions:
    """Returns the network's attentions.

    Raises:
        Unsupported: it has none that follow one another, or the layer's maps are of another grid.
    """
    attentions = features.passes.attentions(features.input)
    size = tuple(features.activations.shape[-2:])
    if attentions.tokens.grid != size:
        raise Unsupported(
            f"attention maps are as large as the grid of tokens, {attentions.tokens.grid}; the layer "
            f"{features.passes.layer!r} has another one, {size}: ask for a layer of tokens, or for the default layer"
        )
    return attentions


def _following(features: Features) -> Attentions:
    """Returns the network's attentions, as above; raises Unsupported where another attention pools the tokens."""
    attentions = _at_layer(features)
    if attentions.pooled:
        raise Unsupported(
            "a product of attentions is one of attentions among all tokens, and in this network there are others as "
            "well, such as one that pools the tokens"
        )
    return attentions


def _gradients(score: Tensor, layers: Sequence[Tensor]) -> Sequence[Tensor]:
    found = torch.autograd.grad(score, layers, retain_graph=True, allow_unused=True)
    if any(gradient is None for gradient in found):
        raise Unsupported(CUT_ATTENTION)
    return found


def _heads(features: Features, attention: Tensor) -> Tensor:
    """Returns what is of one image, (1, heads, N, N) or (heads, N, N), as (heads, N, N), in the maps' precision."""
    return attention.detach().flatten(0, -3).to(features.activations)


def _row(relevance: Tensor, attentions: Attentions) -> Tensor:
    """Returns what the tokens that the scores are made of take from each place on the mean: (N, N) to (u, v)."""
    return attentions.placed(relevance[attentions.read].mean(dim=0))
