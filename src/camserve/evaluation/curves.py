"""Measures deletion and insertion of many maps by several protocols, as masked queries in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from camserve.queries.pack import ask
from camserve.saliency.curves import PROTOCOLS, Protocol, deletion_and_insertion
from camserve.scores import Targets
from camserve.types import Faithfulness

__all__ = ["PROTOCOLS", "Faithfulness", "Protocol", "faithfulness"]


def faithfulness(
    network: Callable[[Tensor], Tensor],
    image: Tensor,
    saliency: Tensor,
    targets: Targets,
    protocols: Sequence[Protocol],
    micro_batch: int,
) -> list[tuple[Faithfulness, ...]]:
    """Returns both curves of every map by every protocol, all in one run of masked queries.

    Args:
        network: (n, 3, H, W) to outputs (n, numbers), in eval mode.
        image: (3, H, W), normalised.
        saliency: (T, H, W).
        targets: the T targets that the maps explain.
        protocols: which constants.
        micro_batch: how many queries one forward pass takes at most.

    Returns:
        For each map, one result for each protocol.
    """
    curves = [
        curve
        for one, target in zip(saliency, targets.columns(), strict=True)
        for protocol in protocols
        for curve in deletion_and_insertion(image, one, target, protocol)
    ]
    points = [scores[:, 0].double().cpu().numpy() for scores in ask(network, curves, micro_batch)]
    results = [
        Faithfulness(protocols[number % len(protocols)].name, *points[2 * number : 2 * number + 2])
        for number in range(len(points) // 2)
    ]
    return [tuple(results[first : first + len(protocols)]) for first in range(0, len(results), len(protocols))]
