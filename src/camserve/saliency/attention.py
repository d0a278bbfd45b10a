"""Maps what the class token attends to, through all layers of torchvision's vision transformers.

Attention weights are no module's output and are not kept by the fast kernels; they are made for one call, inside a
`with` that answers only the thread that entered it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from camserve.errors import Unsupported
from camserve.methods import AttentionRollout, GradientWeightedAttention
from camserve.saliency.features import Features


def attention_rollout(features: Features, spec: AttentionRollout) -> Tensor:
    """Returns the class token's row in the product of (mean over heads of A_l + I) / 2: attention rollout.

    Abnar and Zuidema (https://arxiv.org/abs/2005.00928), sec. 3: half of what a layer passes on is its residual. The
    rows of each factor add up to 1, as those of A_l do.

    Returns:
        (K, u, v), the same for each target.

    Raises:
        Unsupported: the network is no vision transformer of torchvision.
    """
    transformer = _transformer(features)
    with torch.no_grad():
        _, weights = _run(features, transformer)
    features.passes.count("masked_forward", 1, images=1)
    identity = torch.eye(weights[0].shape[-1]).to(weights[0])
    rollout = identity
    for layer in weights:
        rollout = (layer[0].mean(dim=0) + identity) / 2 @ rollout
    return _map(rollout, transformer).expand(len(features.targets), -1, -1)


def gradient_weighted_attention(features: Features, spec: GradientWeightedAttention) -> Tensor:
    """Returns the class token's row in R, which is relevance propagated through all layers.

    R = I, then R += mean over heads of ReLU(dS_c/dA_l * A_l) @ R, layer by layer: Chefer et al.
    (https://arxiv.org/abs/2103.15679), eq. 5 and 6, for self-attention alone, without the normalisation of eq. 8
    and 9, as in the authors' notebook for ViT (`Transformer_MM_explainability_ViT.ipynb`).

    Returns:
        (K, u, v).

    Raises:
        Unsupported: the network is no vision transformer of torchvision.
    """
    transformer = _transformer(features)
    logits, weights = _run(features, transformer)
    features.passes.count("pixel_gradient", len(features.targets), images=1)
    return torch.stack([_map(_relevance(score, weights), transformer) for score in features.targets.value(logits)[0]])


def _relevance(score: Tensor, weights: list[Tensor]) -> Tensor:
    """Returns R after all layers, (N, N), for the attention weights (1, heads, N, N) of each."""
    gradients = torch.autograd.grad(score, weights, retain_graph=True)
    relevance = torch.eye(weights[0].shape[-1]).to(weights[0])
    for layer, gradient in zip(weights, gradients, strict=True):
        positive = (gradient[0] * layer.detach()[0]).relu().mean(dim=0)
        relevance = relevance + positive @ relevance
    return relevance


def _run(features: Features, transformer: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Returns the logits (1, classes) and the attention weights (1, heads, N, N) of each layer."""
    layers = [child for child in transformer.modules() if isinstance(child, nn.MultiheadAttention)]
    with _attention(layers) as weights:
        logits = features.passes.differentiable(features.input[None])
    if len(weights) != len(layers) or len(weights[0]) != 1:
        raise Unsupported("attention maps need each image to run through the vision transformer exactly once")
    return logits, weights


def _transformer(features: Features) -> nn.Module:
    from torchvision.models import VisionTransformer  # not needed, and slow to import, for any other method

    found = [child for child in features.passes.module.modules() if isinstance(child, VisionTransformer)]
    if len(found) != 1:
        raise Unsupported("attention maps need a VisionTransformer of torchvision; this network is or holds none")
    transformer: nn.Module = found[0]
    return transformer


def _map(relevance: Tensor, transformer: Any) -> Tensor:
    """Returns what the class token, the first, takes from each patch: (N, N) to (u, v), its own share left out."""
    side = transformer.image_size // transformer.patch_size
    return relevance[0, 1:].reshape(side, side)


@contextmanager
def _attention(layers: Sequence[nn.MultiheadAttention]) -> Iterator[list[Tensor]]:
    """Yields the layers' attention weights (B, heads, N, N), a list in forward order that a forward pass inside fills.

    The weights that PyTorch returns are a copy beside the path to the logits. So each layer's output is made once more
    from them, which changes nothing but rounding and gives them gradients.
    """
    owner, weights = threading.get_ident(), list[Tensor]()

    def before(_module: nn.Module, inputs: Any, options: dict[str, Any]) -> Any:
        if threading.get_ident() != owner:
            return None
        return inputs, {**options, "need_weights": True, "average_attn_weights": False}

    def after(module: nn.MultiheadAttention, inputs: Any, output: Any) -> Any:
        if threading.get_ident() != owner:
            return None
        made = output[1]
        # A network without trainable parameters gives weights that need no gradient: then they are the leaves.
        weights.append(made if made.requires_grad or not torch.is_grad_enabled() else made.requires_grad_())
        return _attended(module, inputs[2], made), made

    undo: list[Callable[[], None]] = []
    try:
        for layer in layers:
            undo.append(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.append(layer.register_forward_hook(after).remove)
        yield weights
    finally:
        for remove in undo:
            remove()


def _attended(module: nn.MultiheadAttention, tokens: Tensor, weights: Tensor) -> Tensor:
    """Returns what the attention makes of these weights: tokens (B, N, C) and weights (B, heads, N, N) to (B, N, C)."""
    weight, bias = module.in_proj_weight.chunk(3)[2], None
    if module.in_proj_bias is not None:
        bias = module.in_proj_bias.chunk(3)[2]
    values = F.linear(tokens, weight, bias).unflatten(2, (module.num_heads, -1))  # type: ignore[no-untyped-call]
    heads = torch.einsum("bhnm,bmhd->bnhd", weights, values)
    attended: Tensor = module.out_proj(heads.flatten(2))
    return attended
