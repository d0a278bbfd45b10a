"""Makes variants of an image for training: sharp where its map is high, and blurred elsewhere.

Group-CAM (https://arxiv.org/abs/2103.13859) fine-tunes classifiers on such variants. The definition here is that of the
authors' program, `main.py` of https://github.com/wofmanaf/Group-CAM (e8b0ea7 to ffd807b):

    M_l = ReLU(sum of A_k over group l), M'_l = mm(up(M_l))
    a_l = p_c(x M'_l + blur(x) (1 - M'_l)) - p_c(blur(x))
    L   = mm(ReLU(sum_l a_l M'_l))
    B   = 1 where L > theta, else 0
    y   = x B + blur(x) (1 - B)

Where this differs from that program, it is on purpose:

- The channels have no gradient weights, so that no backward pass is needed: its comment suggests that. What follows
  is the variant "paper" of `camserve.methods.GroupCam`.
- Its variants are `images * saliency_maps + blur(images) + (1-saliency_maps)`, which adds 1 outside the mask and the
  blurred image inside it. The second `+` stands where Group-CAM's masked query has a product; here it is a product.
- theta is the mean of the image's own map. There it is the mean over the maps of a batch, so that a variant depends on
  the images it happens to be made with. A percentile of the map can be chosen instead.
- The first version of its Group-CAM de-noises the groups (a percentile over all of them), the last one does not.
  Neither does this, unless asked: then each group by itself.
- An image whose map has no positive evidence has no variant; there it becomes NaN, or stops the program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from camserve.errors import InvalidOption
from camserve.finalise.maps import normalise, upsample
from camserve.methods import GroupCam
from camserve.queries.pack import ask
from camserve.saliency import group_cam
from camserve.saliency.masks import Masks, gaussian_blur, make_masks
from camserve.scores import Score, Targets
from camserve.types import Layer, Target


@dataclass(frozen=True)
class Recipe:
    """Says how variants are made.

    Raises:
        InvalidOption: groups or a percentile outside their range.
    """

    groups: int = 32
    """Number of groups into which channels are put, in order."""
    denoise: float = 0.0
    """Percentile of each group's map at or below which it is set to 0; 0: maps stay unaltered."""
    theta: float | None = None
    """Percentile of the map that is the threshold of the binary mask; None: the map's mean."""

    def __post_init__(self) -> None:
        GroupCam(groups=self.groups)  # raises
        if not 0 <= self.denoise <= 100:
            raise InvalidOption(f"denoise must be a percentile 0..100, got {self.denoise}")
        if self.theta is not None and not 0 <= self.theta < 100:
            raise InvalidOption(
                f"theta must be the mean, or a percentile of at least 0 and below 100, got {self.theta}"
            )


def binary_masks(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    activations: Tensor,
    targets: Sequence[Targets],
    recipe: Recipe,
    micro_batch: int,
) -> list[np.ndarray | None]:
    """Returns where each image stays sharp; the masked queries of all images share micro-batches.

    Args:
        network: (n, 3, H, W) to outputs (n, numbers), in eval mode.
        images: (B, 3, H, W), normalised.
        activations: (B, C, u, v) of the layer.
        targets: one for each image.
        recipe: how variants are made.
        micro_batch: how many queries one forward pass takes at most.

    Returns:
        For each image (H, W) bool; None where its map has no positive evidence.

    Raises:
        InvalidOption: more groups than channels.
        Unsupported: images too small for the blur.
    """
    GroupCam(groups=recipe.groups).queries(Layer("", *activations.shape[1:]), 1)  # raises
    asked = [
        _masks(image, maps, target, recipe) for image, maps, target in zip(images, activations, targets, strict=True)
    ]
    return [_binary(one, scores, recipe) for one, scores in zip(asked, ask(network, asked, micro_batch), strict=True)]


def blurred(pixels: Tensor) -> Tensor:
    """Blurs (3, H, W) as Group-CAM's baseline is. Normalisation commutes with it: these may be pixels or inputs."""
    return gaussian_blur(pixels, group_cam.BLUR_KERNEL_PX, group_cam.BLUR_SIGMA_PX)


def variant(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the pixels where the mask is set, blurred elsewhere.

    Args:
        pixels: (H, W, C), uint8, or float32 in [0, 1].
        mask: (H, W) bool.

    Returns:
        (H, W, C) of the pixels' dtype.
    """
    planes = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float64))
    around = blurred(planes).permute(1, 2, 0).numpy()
    around = around.round() if pixels.dtype == np.uint8 else around
    return np.where(mask[..., None], pixels, around.astype(pixels.dtype))


def _masks(image: Tensor, activations: Tensor, target: Targets, recipe: Recipe) -> Masks:
    """Returns the groups' masks behind one query of the blurred image alone."""
    values = group_cam.in_order(activations[None], recipe.groups).relu()
    if recipe.denoise:
        values = group_cam.above_percentile(values, recipe.denoise)
    return make_masks(image, values, target, baseline=blurred(image)).with_anchor()


def _binary(masks: Masks, scores: Tensor, recipe: Recipe) -> np.ndarray | None:
    sums = group_cam.reduce(scores, masks, GroupCam())[0]
    saliency, degenerate = normalise(upsample(sums.cpu().numpy(), (masks.input.shape[-2], masks.input.shape[-1])))
    if degenerate:
        return None
    threshold = saliency.mean(dtype=np.float64) if recipe.theta is None else np.percentile(saliency, recipe.theta)
    return np.asarray(saliency > threshold)


def wanted_target(score: Score, outputs: Tensor, wanted: int | None) -> Targets:
    """Returns the target of an image: the class that is wanted, and where none is the most probable one.

    Args:
        score: score of the network.
        outputs: outputs (numbers,) of the image.
        wanted: class index.

    Raises:
        InvalidOption: no place of the image is of the class, for a network of places.
    """
    target = Target(top_k=1) if wanted is None else Target(index=wanted)
    return score.targets(score.resolved(target, outputs), outputs.device)
