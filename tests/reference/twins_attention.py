"""Attention maps once more: torchvision's vision transformer written out by hand, head by head, in float64.

Nothing here is shared with camserve. Images are (3, H, W), already normalised; every map is (H, W) before the last
min-max.
"""

from __future__ import annotations

import math

import torch
from reference.twins import up
from torch import Tensor, nn
from torch.nn import functional as F


def forward(module: nn.Module, image: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
    """Logits (classes,) and attention[layer][head] (N, N), all with graph."""
    patches = module.conv_proj(image[None])[0]
    tokens = [module.class_token[0, 0]]
    tokens += [patches[:, row, column] for row in range(patches.shape[1]) for column in range(patches.shape[2])]
    x = torch.stack(tokens) + module.encoder.pos_embedding[0]
    attention = []
    for block in module.encoder.layers:
        mixed, heads = self_attention(block.self_attention, block.ln_1(x))
        attention.append(heads)
        x = x + mixed
        x = x + block.mlp(block.ln_2(x))
    return module.heads(module.encoder.ln(x)[0]), attention


def self_attention(layer: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    size, width = layer.embed_dim, layer.embed_dim // layer.num_heads
    outputs, attention = [], []
    for head in range(layer.num_heads):
        parts = []
        for which in range(3):  # queries, keys, values
            rows = slice(which * size + head * width, which * size + (head + 1) * width)
            parts.append(x @ layer.in_proj_weight[rows].T + layer.in_proj_bias[rows])
        query, key, value = parts
        weights = F.softmax(query @ key.T / math.sqrt(width), dim=1)
        attention.append(weights)
        outputs.append(weights @ value)
    return layer.out_proj(torch.cat(outputs, dim=1)), attention


def attention_rollout(module: nn.Module, image: Tensor, target: int) -> Tensor:
    """(A_L + I)/2 ... (A_1 + I)/2, A the mean over heads; the class token's row."""
    _, attention = forward(module, image)
    rollout = None
    for heads in attention:
        mean = sum(heads) / len(heads)
        layer = 0.5 * mean + 0.5 * torch.eye(len(mean), dtype=mean.dtype)
        rollout = layer if rollout is None else layer @ rollout
    return to_map(rollout.detach(), image)


def gradient_weighted_attention(module: nn.Module, image: Tensor, target: int) -> Tensor:
    """R = I; R = R + mean over heads of max(0, dS/dA * A) @ R; the class token's row."""
    logits, attention = forward(module, image)
    relevance = torch.eye(len(attention[0][0]), dtype=image.dtype)
    for heads in attention:
        total = torch.zeros_like(relevance)
        for weights in heads:
            (gradient,) = torch.autograd.grad(logits[target], weights, retain_graph=True)
            total += (gradient * weights.detach()).clamp(min=0)
        relevance = relevance + (total / len(heads)) @ relevance
    return to_map(relevance, image)


def to_map(relevance: Tensor, image: Tensor) -> Tensor:
    row = relevance[0, 1:]
    side = math.isqrt(len(row))
    return up(row.reshape(side, side), image)
