"""The perturbation family once more: slow, obvious, one altered image at a time, written from the formulas alone.

As in `twins`: images are (3, H, W) float64 tensors, already normalised; every method returns its map before the last
min-max, (H, W), float64. Only what is random is not made anew: noise and masks are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from reference.twins import activations_and_gradients, blur, constant, group_maps, min_max, probability, up
from sklearn.cluster import AgglomerativeClustering, KMeans
from torch import Tensor, nn


def logit(module: nn.Module, image: Tensor, target: int) -> float:
    with torch.no_grad():
        return module(image[None])[0, target].item()


def softmax(values: Sequence[float]) -> list[float]:
    """exp(v) / sum exp(v), every v less the largest so that nothing overflows."""
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


# Score-CAM


def channels(module: nn.Module, image: Tensor, layer: str, target: int) -> list[tuple[int, Tensor]]:
    """Number and activation of the channels that are not constant."""
    activations, _ = activations_and_gradients(module, image, layer, target)
    return [(k, a) for k, a in enumerate(activations) if not constant(a)]


def mask_of(a: Tensor, image: Tensor, normalise: str = "after") -> Tensor:
    return min_max(up(a, image)) if normalise == "after" else up(min_max(a), image)


def weighted_sum(weights: Sequence[float], maps: Sequence[Tensor], image: Tensor) -> Tensor:
    total = torch.zeros_like(image[0])
    for weight, a in zip(weights, maps, strict=True):
        total += weight * up(a, image)
    return total


def score_cam(
    module: nn.Module, image: Tensor, layer: str, target: int, variant: str = "reference", normalise: str = "after"
) -> Tensor:
    """sum_k w_k up(A_k). REFERENCE: w_k = p_c(x M_k). PAPER: w = softmax_k(p_c(x M_k) - p_c(black)), black being zero
    in normalised space. LOGIT: w = softmax_k(S_c(x M_k) - S_c(x))."""
    live = channels(module, image, layer, target)
    if not live:
        return torch.zeros_like(image[0])
    queries = [image * mask_of(a, image, normalise) for _, a in live]
    if variant == "logit":
        whole = logit(module, image, target)
        weights = softmax([logit(module, query, target) - whole for query in queries])
    else:
        weights = [probability(module, query, target) for query in queries]
    if variant == "paper":
        black = probability(module, torch.zeros_like(image), target)
        weights = softmax([weight - black for weight in weights])
    return weighted_sum(weights, [a for _, a in live], image)


def ss_cam(
    module: nn.Module, image: Tensor, layer: str, target: int, samples: int, noise: Callable[[int, int], Tensor]
) -> Tensor:
    """w = softmax_k(mean_s S_c(x (up(mm(A_k)) + noise)) - S_c(x)). `noise(k, s)`: (H, W), its deviation included."""
    live, whole = channels(module, image, layer, target), logit(module, image, target)
    gains = []
    for k, a in live:
        mask = mask_of(a, image, "before")
        scores = [logit(module, image * (mask + noise(k, sample)), target) for sample in range(samples)]
        gains.append(sum(scores) / samples - whole)
    return weighted_sum(softmax(gains), [a for _, a in live], image)


def is_cam(module: nn.Module, image: Tensor, layer: str, target: int, samples: int) -> Tensor:
    """w = softmax_k(mean_i S_c(x c_i up(mm(A_k))) - S_c(x)) with c_i = 1/N + 2/N + ... + i/N, i = 1..N."""
    live, whole = channels(module, image, layer, target), logit(module, image, target)
    gains = []
    for _, a in live:
        coefficient, scores = 0.0, []
        for i in range(1, samples + 1):
            coefficient += i / samples
            scores.append(logit(module, coefficient * mask_of(a, image, "before") * image, target))
        gains.append(sum(scores) / samples - whole)
    return weighted_sum(softmax(gains), [a for _, a in live], image)


# Group-CAM


def group_cam_head(module: nn.Module, image: Tensor, layer: str, target: int, groups: int) -> Tensor:
    """The authors' code at HEAD as it stands: all masks are one batch, and nothing looks whether a mask is constant."""
    maps = torch.stack([up(one, image) for one in group_maps(module, image, layer, target, groups)])[:, None]
    low, high = (extreme(maps, dim=(1, 2, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
    masks = (maps - low) / (high - low)
    blurred = blur(image)
    with torch.no_grad():
        probabilities = module(image * masks + blurred * (1 - masks)).softmax(dim=1)[:, target]
    gains = (probabilities - probability(module, blurred, target)).relu()
    return (gains[:, None, None, None] * maps).sum(dim=0)[0]


def group_cam_of_channels(module: nn.Module, image: Tensor, layer: str, target: int) -> Tensor:
    """Score-CAM's structure: sum_k ReLU(p_c(x M_k) - p_c(black)) w_k up(A_k), of channels that speak for the class."""
    activations, gradients = activations_and_gradients(module, image, layer, target)
    black = probability(module, torch.zeros_like(image), target)
    total = torch.zeros_like(image[0])
    for a, g in zip(activations, gradients, strict=True):
        if g.mean() > 0 and not constant(a):
            gain = probability(module, image * mask_of(a, image), target) - black
            total += max(gain, 0) * g.mean() * up(a, image)
    return total


def clustered_maps(
    module: nn.Module, image: Tensor, layer: str, target: int, groups: int, grouping: str
) -> list[Tensor]:
    """M_l = ReLU(sum of w_k A_k over cluster l), (u, v) each."""
    activations, gradients = activations_and_gradients(module, image, layer, target)
    weighted = [g.mean() * a for a, g in zip(activations, gradients, strict=True)]
    rows = np.stack([one.flatten().numpy() for one in weighted])
    if grouping == "kmeans":
        labels = KMeans(n_clusters=groups, random_state=0).fit(rows).labels_
    else:
        labels = AgglomerativeClustering(n_clusters=groups).fit(rows).labels_
    maps = []
    for group in range(groups):
        total = torch.zeros_like(weighted[0])
        for label, one in zip(labels, weighted, strict=True):
            if label == group:
                total += one
        maps.append(total.clamp(min=0))
    return maps


# RISE


def rise_mask(kept: Tensor, offset: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A grid (s, s) of 0 and 1, upsampled bilinearly to (s + 1) cells and cut out: (H, W)."""
    s = len(kept)
    weights = []
    for axis in range(2):
        cell = math.ceil(size[axis] / s)
        goal = (s + 1) * cell
        matrix = torch.zeros(goal, s, dtype=torch.float64)
        for pixel in range(goal):
            position = min(max((pixel + 0.5) * s / goal - 0.5, 0), s - 1)
            low = math.floor(position)
            matrix[pixel, low] += 1 - (position - low)
            matrix[pixel, min(low + 1, s - 1)] += position - low
        weights.append(matrix[offset[axis] : offset[axis] + size[axis]])
    return weights[0] @ kept.double() @ weights[1].T


def rise(module: nn.Module, image: Tensor, target: int, masks: Sequence[Tensor], keep_prob: float) -> Tensor:
    """sum_i p_c(x m_i) m_i / (N p)."""
    total = torch.zeros_like(image[0])
    for mask in masks:
        total += probability(module, image * mask, target) * mask
    return total / (len(masks) * keep_prob)


# Ablation-CAM


def ablation_cam(module: nn.Module, image: Tensor, layer: str, target: int) -> Tensor:
    """sum_k w_k up(A_k), w_k = (S_c - S_c without k) / S_c, by a hook that sets channel k of the last call to zero."""
    activations, _ = activations_and_gradients(module, image, layer, target)
    calls = count_calls(module, image, layer)
    whole = logit(module, image, target)
    weights = [(whole - logit_without(module, image, layer, target, k, calls)) / whole for k in range(len(activations))]
    return weighted_sum(weights, list(activations), image)


def recipro_cam(module: nn.Module, image: Tensor, layer: str, target: int, kernel: str = "point") -> Tensor:
    """p_c of the network that sees one place of the layer's last call alone, at that place, from the least on."""
    activations, _ = activations_and_gradients(module, image, layer, target)
    calls = count_calls(module, image, layer)
    scores = torch.zeros_like(activations[0])
    for row in range(scores.shape[0]):
        for column in range(scores.shape[1]):
            shown = alone(activations, row, column, kernel)
            scores[row, column] = probability_with(module, image, layer, target, shown, calls)
    return up(scores - min(0.0, scores.min().item()), image)


def alone(activations: Tensor, row: int, column: int, kernel: str) -> Tensor:
    """The activations at one place; with the kernel "gaussian" a quarter of them, and less of the eight around it."""
    shown = torch.zeros_like(activations)
    weights = {(0, 0): 1.0}
    if kernel == "gaussian":
        weights = {(i, j): 1 / 4 / 2 ** (abs(i) + abs(j)) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    for (i, j), weight in weights.items():
        if 0 <= row + i < shown.shape[1] and 0 <= column + j < shown.shape[2]:
            shown[:, row + i, column + j] = weight * activations[:, row + i, column + j]
    return shown


def probability_with(module: nn.Module, image: Tensor, layer: str, target: int, shown: Tensor, calls: int) -> float:
    seen = []

    def replace(_module, _inputs, output):
        seen.append(1)
        return shown[None] if len(seen) == calls else output

    handle = module.get_submodule(layer).register_forward_hook(replace)
    found = probability(module, image, target)
    handle.remove()
    return found


def count_calls(module: nn.Module, image: Tensor, layer: str) -> int:
    calls = []
    handle = module.get_submodule(layer).register_forward_hook(lambda _module, _inputs, _output: calls.append(1))
    logit(module, image, 0)
    handle.remove()
    return len(calls)


def logit_without(module: nn.Module, image: Tensor, layer: str, target: int, k: int, calls: int) -> float:
    seen = []

    def ablate(_module, _inputs, output):
        seen.append(1)
        if len(seen) < calls:
            return output
        output = output.clone()
        output[:, k] = 0
        return output

    handle = module.get_submodule(layer).register_forward_hook(ablate)
    score = logit(module, image, target)
    handle.remove()
    return score


# Occlusion


def occlusion(module: nn.Module, image: Tensor, target: int, positions: int, window: int) -> Tensor:
    """The mean over the windows that lie on a pixel of p_c(x) - p_c(x without the window)."""
    _, height, width = image.shape
    rows = [i * height // positions for i in range(positions + 1)]
    columns = [j * width // positions for j in range(positions + 1)]
    before, after = (window - 1) // 2, window // 2
    whole = probability(module, image, target)
    total, coverage = torch.zeros_like(image[0]), torch.zeros_like(image[0])
    for i in range(positions):
        for j in range(positions):
            top, bottom = rows[max(i - before, 0)], rows[min(i + after + 1, positions)]
            left, right = columns[max(j - before, 0)], columns[min(j + after + 1, positions)]
            hidden = image.clone()
            hidden[:, top:bottom, left:right] = 0
            total[top:bottom, left:right] += whole - probability(module, hidden, target)
            coverage[top:bottom, left:right] += 1
    return total / coverage
