"""Holds a worker's answer against what was asked, before anything of it is merged."""

from __future__ import annotations

from collections.abc import Sequence

from camserve.errors import CamserveError
from camserve.gateway.request import known_targets, sums_size
from camserve.gateway.upstream import malformed
from camserve.types import Item, ItemResult, Layer, StepResult


def check_fit(items: Sequence[Item], layers: Sequence[Layer], result: StepResult) -> None:
    """Checks that each item has an outcome and each task a partial of the right shape.

    Args:
        items: what was asked.
        layers: the layer of each item.
        result: what came.

    Raises:
        Unavailable: it does not fit; the log says where.
    """
    if len(result.outcomes) != len(items):
        raise malformed(f"{len(items)} items, {len(result.outcomes)} outcomes")
    for item, layer, outcome in zip(items, layers, result.outcomes, strict=True):
        if not isinstance(outcome, CamserveError):
            _check_item(item, layer, outcome)


def _check_item(item: Item, layer: Layer, result: ItemResult) -> None:
    number = len(result.targets)
    if number != (known_targets(item.targets) or number) or number == 0:
        raise malformed(f"targets {item.targets} resolved to {result.targets}")
    asked = [task.position for task in item.tasks]
    came = [partial.position for partial in result.partials]
    if came != asked:
        raise malformed(f"tasks of methods {asked}, partials of methods {came}")
    for task, partial in zip(item.tasks, result.partials, strict=True):
        height, width = sums_size(task.method, layer, result.view.size)
        if partial.sums.shape != (number, height, width):
            raise malformed(f"a partial of shape {partial.sums.shape} instead of {(number, height, width)}")
