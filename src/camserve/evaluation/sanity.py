"""Checks the sanity of maps by cascading randomisation: does a map depend on what the network has learnt?

The layers of a copy of the network get new random weights, from the logits down, one stage after the other, and after
each stage the map is made again. The map of a method that explains the network soon differs from the original; one that
stays alike only finds edges. Adebayo et al., Sanity Checks for Saliency Maps, https://arxiv.org/abs/1810.03292.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from camserve.engine import Engine
from camserve.errors import Unsupported
from camserve.evaluation.examples import check_images_alone
from camserve.images import ImageLike, read_image, seen
from camserve.methods import MethodLike, MethodSpec, as_method
from camserve.types import AnyTarget, Target

STAGES = 8


@dataclass(frozen=True)
class Stage:
    """Describes the map after one more share of the network has been randomised."""

    down_to: str
    """Name of the last module that has new weights; all between it and the logits have, too."""
    correlation: float
    """Spearman's rank correlation with the original map; 0 if one of them is constant."""


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Returns Spearman's rank correlation of two maps, equal values having their mean rank.

    It is 0 if one of them is constant.
    """
    from scipy.stats import rankdata

    ranks = [rankdata(array.ravel()) for array in (a, b)]
    centred = [rank - rank.mean() for rank in ranks]
    lengths = [float(np.sqrt(rank @ rank)) for rank in centred]
    return float(centred[0] @ centred[1] / (lengths[0] * lengths[1])) if all(lengths) else 0.0


def cascading_randomisation(
    engine: Engine,
    images: Sequence[ImageLike],
    methods: Sequence[MethodLike],
    *,
    layer: str = "",
    stages: int = STAGES,
    seed: int = 0,
) -> dict[MethodSpec, list[list[Stage]]]:
    """Returns the stages of every image by every method, for the class that the network finds most likely.

    The engine's own network is not touched. A copy is randomised once and explains all images by all methods.

    Args:
        engine: what explains.
        images: to be explained.
        methods: whose maps are compared.
        layer: as for `Engine.explain`.
        stages: how many stages the network is randomised in, of about as many layers each.
        seed: of the random weights.

    Returns:
        For each method and image the stages, from the logits down.

    Raises:
        Unsupported: a method that the network cannot serve, a network that takes a text beside the image, or an image
            in which it detects nothing.
    """
    check_images_alone(engine.info)
    specs = [as_method(method) for method in methods]
    answers = [engine.explain(image, specs, layer=layer, top_predictions=1) for image in images]
    if not all(answer.predictions for answer in answers):
        raise Unsupported("nothing is detected in an image, so that there is no map to be compared")
    targets = [
        _pinned(engine, image, answer.predictions[0].index) for image, answer in zip(images, answers, strict=True)
    ]
    original = [[saliency.array for saliency in answer.maps] for answer in answers]
    copied = _copy(engine)
    found: dict[MethodSpec, list[list[Stage]]] = {spec: [[] for _ in images] for spec in specs}
    for name in randomise(copied.network.module, stages, seed, beside=copied.network.text_encoder):
        for number, (image, target) in enumerate(zip(images, targets, strict=True)):
            maps = copied.explain(image, specs, [target], layer=layer).maps
            for spec, before, after in zip(specs, original[number], maps, strict=True):
                found[spec][number].append(Stage(name, rank_correlation(before, after.array)))
    return found


def _pinned(engine: Engine, image: ImageLike, index: int) -> AnyTarget:
    """Returns the target that a map of a class explains, as the network finds it before it changes.

    That is the class over the places that are of it, or the box of its best detection.
    """
    network = engine.network
    pixels, view = seen(read_image(image), network.preprocessing)
    with network.evaluating():
        outputs = network.scores(network.normalise(torch.from_numpy(pixels[None])), "exact")[0].detach()
    (target,) = network.score.resolved(network.score.placed(Target(index=index), view), outputs)
    return target


def _copy(engine: Engine) -> Engine:
    network = engine.network
    return Engine(
        copy.deepcopy(network.given),
        preprocessing=network.preprocessing,
        labels=() if network.references is not None else network.info.labels,
        outputs=network.info.outputs,
        output=network.output or None,
        references=network.references,
        units=network.info.units,
        layer=network.info.default_layer,
        micro_batch=network.micro_batch,
    )


def randomise(module: nn.Module, stages: int = STAGES, seed: int = 0, beside: object = None) -> Iterator[str]:
    """Gives the layers of a module new weights in place, the last ones first.

    Args:
        module: the network.
        stages: how many stages, of about as many layers each.
        seed: of the random weights.
        beside: a module inside of it that keeps its weights, for no image goes through it: the encoder of texts, which
            says what is explained.

    A layer is a module with parameters of its own, with the norms and other modules without weight matrix that follow
    it. Modules count in the order in which they are registered. Those with `reset_parameters` are initialised as
    PyTorch does it; other parameters are drawn from a normal distribution with the mean and deviation that they had.

    Yields:
        After each stage the name of the lowest module that has new weights.
    """
    kept = set(beside.modules()) if isinstance(beside, nn.Module) else set()
    layers = _layers(module, kept)[::-1]
    for part in np.array_split(np.arange(len(layers)), min(stages, len(layers))):
        # Each stage draws from a seed of its own, and the caller's generator goes on as if nothing had been drawn.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed + int(part[0]))
            for number in part:
                for _, child in layers[number]:
                    _reset(child)
        yield layers[part[-1]][0][0]


def _layers(module: nn.Module, kept: Collection[nn.Module]) -> list[list[tuple[str, nn.Module]]]:
    layers: list[list[tuple[str, nn.Module]]] = []
    for name, child in module.named_modules():
        own = list(child.parameters(recurse=False))
        if not own or child in kept:
            continue
        if layers and all(parameter.ndim < 2 for parameter in own):
            layers[-1].append((name, child))
        else:
            layers.append([(name, child)])
    return layers


def _reset(child: nn.Module) -> None:
    """Gives a module new weights, drawn on the CPU: the same on every device."""
    where = next(child.parameters(recurse=False)).device
    initialise: Callable[[], None] | None = getattr(child, "reset_parameters", None)
    if initialise is not None:
        child.cpu()
        initialise()
        child.to(where)
        return
    for parameter in child.parameters(recurse=False):
        spread = parameter.std() if parameter.numel() > 1 else parameter.abs().mean()
        parameter.copy_(torch.randn(parameter.shape) * spread.cpu() + parameter.mean().cpu())
