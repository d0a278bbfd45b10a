"""From a worker's result to a finished explanation, where no gateway is in between: the engine and plain clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from camserve import images
from camserve.finalise.maps import final_map
from camserve.finalise.render import background
from camserve.labels import with_label
from camserve.methods import MethodSpec
from camserve.types import (
    BoxOptions,
    Cost,
    Explanation,
    Item,
    ItemResult,
    MapSize,
    ModelInfo,
    SaliencyMap,
    Target,
    Task,
)


def whole_item(
    info: ModelInfo,
    image: bytes | np.ndarray,
    methods: Sequence[MethodSpec],
    targets: Sequence[Target],
    **options: object,
) -> Item:
    """An item that asks every query of every method.

    Raises:
        InvalidOption: unknown layer, or parameters that do not fit it.
    """
    layer = info.layer(str(options.get("layer", "")))
    count = sum(target.top_k or 1 for target in targets) or 1
    tasks = tuple(
        Task(position, method, 0, method.queries(layer.channels, count)) for position, method in enumerate(methods)
    )
    return Item(image, tuple(targets), tasks, **options)  # type: ignore[arg-type]  # checked by Item's callers


def explanation(
    info: ModelInfo,
    item: Item,
    result: ItemResult,
    *,
    stage_seconds: Mapping[str, float],
    worker: str,
    size: MapSize = "input",
    boxes: BoxOptions | None = None,
) -> Explanation:
    """The final maps of a whole item."""
    lies_on = None if size == "layer" else background(images.picture(item.image), result.view, size)
    maps = tuple(
        replace(_map(info, task, result, row, size, boxes), image=lies_on)
        for task, row in ((task, row) for task in item.tasks for row in range(len(result.targets)))
    )
    cost = Cost(
        queries=sum(partial.queries for partial in result.partials),
        stage_seconds=dict(stage_seconds),
        steps=1,
        precision=item.precision,
        worker=worker,
    )
    predictions = tuple(with_label(prediction, info.labels) for prediction in result.predictions)
    return Explanation(info.name, info.version, predictions, maps, result.view, cost)


def _map(
    info: ModelInfo, task: Task, result: ItemResult, row: int, size: MapSize, boxes: BoxOptions | None
) -> SaliencyMap:
    return final_map(
        result.partials[task.position].sums[row],
        method=task.method,
        target=with_label(result.targets[row], info.labels),
        layer=result.layer,
        view=result.view,
        size=size,
        boxes=boxes,
    )
