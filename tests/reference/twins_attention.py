"""Attention maps once more, of vision transformers written out by hand, head by head, in float64.

Nothing here is shared with camserve. Images are (3, H, W), already normalised; every map is (H, W) before the last
min-max.
"""

from __future__ import annotations

import math

import torch
from reference.attention_networks import ByHand, attended, forward
from reference.twins import up
from torch import Tensor


def attention_rollout(net: ByHand, image: Tensor, target: int) -> Tensor:
    """(A_L + I)/2 ... (A_1 + I)/2, A the mean over heads; the mean of the rows that the head looks at."""
    _, attention, _ = forward(net, image)
    rollout = None
    for heads in attention:
        mean = sum(heads) / len(heads)
        layer = 0.5 * mean + 0.5 * torch.eye(len(mean), dtype=mean.dtype)
        rollout = layer if rollout is None else layer @ rollout
    return to_map(net, sum(rollout[row] for row in net.read).detach() / len(net.read), image)


def gradient_weighted_attention(net: ByHand, image: Tensor, target: int) -> Tensor:
    """R = I; R = R + mean over heads of max(0, dS/dA * A) @ R; R - I; the mean of the rows that the head looks at."""
    logits, attention, _ = forward(net, image)
    identity = torch.eye(len(attention[0][0]), dtype=image.dtype)
    relevance = identity
    for heads in attention:
        total = torch.zeros_like(relevance)
        for weights in heads:
            (gradient,) = torch.autograd.grad(logits[target], weights, retain_graph=True)
            total += (gradient * weights.detach()).clamp(min=0)
        relevance = relevance + (total / len(heads)) @ relevance
    return to_map(net, sum((relevance - identity)[row] for row in net.read) / len(net.read), image)


def le_grad(net: ByHand, image: Tensor, target: int) -> Tensor:
    """Mean over blocks of the mean over heads and queries of max(0, ds^l/dA^l), s^l = head(tokens behind block l)."""
    _, attention, stages = forward(net, image)
    total = 0
    for heads, tokens in zip(attention, stages, strict=True):
        score = net.head(tokens)[target]
        for weights in heads:
            (gradient,) = torch.autograd.grad(score, weights, retain_graph=True)
            for row in gradient.clamp(min=0):
                total = total + row / (len(heads) * len(gradient) * len(attention))
    return to_map(net, total, image)


def recipro_cam(net: ByHand, image: Tensor, target: int, kernel: str) -> Tensor:
    """The probability where one patch's tokens alone reach the last attention, besides the network's own tokens.

    The layer is the norm before the last attention; the stream past it is not touched.
    """
    with torch.no_grad():
        _, _, stages = forward(net, image)
        stream, last = stages[-2], net.blocks[-1]
        scores = []
        for place in range(len(stream) - net.own):
            shown = mosaic(last.before(stream), place, net.own, kernel)
            block = type(last)(lambda _, shown=shown: shown, last.weights, last.out, last.after)
            x = stream + attended(block, stream, net.heads)[0]
            scores.append(net.head(x + last.after(x)).softmax(dim=0)[target])
    return up(square(torch.stack(scores)), image)


def mosaic(tokens: Tensor, place: int, own: int, kernel: str) -> Tensor:
    """(N, C): the own tokens, and of the others one, or 1/4 of one with 1/8 and 1/16 of its neighbours."""
    gaussian = [[1 / 16, 1 / 8, 1 / 16], [1 / 8, 1 / 4, 1 / 8], [1 / 16, 1 / 8, 1 / 16]]
    side = math.isqrt(len(tokens) - own)
    shown = torch.zeros_like(tokens)
    shown[:own] = tokens[:own]
    for row in range(side):
        for column in range(side):
            down, right = row - place // side, column - place % side
            if kernel == "point" and (down, right) == (0, 0):
                shown[own + row * side + column] = tokens[own + row * side + column]
            if kernel == "gaussian" and abs(down) <= 1 and abs(right) <= 1:
                shown[own + row * side + column] = gaussian[down + 1][right + 1] * tokens[own + row * side + column]
    return shown


def to_map(net: ByHand, tokens: Tensor, image: Tensor) -> Tensor:
    return up(square(tokens[net.own :]), image)


def square(places: Tensor) -> Tensor:
    side = math.isqrt(len(places))
    return places.reshape(side, side)
