"""From a worker's result to a finished explanation, where no gateway is in between: the engine and plain clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from camserve import images
from camserve.errors import InvalidOption
from camserve.finalise.maps import faithfulness, final_map
from camserve.finalise.render import background
from camserve.labels import with_label
from camserve.methods import Auto, MethodSpec
from camserve.parts import Parts, check_curve_steps, layer_names, make_parts
from camserve.types import (
    DEFAULT_CURVE_STEPS,
    BoxOptions,
    Cost,
    Explanation,
    Fusion,
    Item,
    ItemResult,
    MapCurves,
    MapSize,
    ModelInfo,
    Precision,
    SaliencyMap,
    StepResult,
    Target,
    Task,
)


@dataclass(frozen=True)
class Whole:
    """A request that is answered at once: every query of every method in one item."""

    info: ModelInfo
    item: Item
    parts: Parts
    size: MapSize
    boxes: BoxOptions | None
    evaluation_steps: int | None
    """Of the curves of every map; None: no curves."""


def whole_request(
    info: ModelInfo,
    image: bytes | np.ndarray,
    methods: Sequence[MethodSpec],
    targets: Sequence[Target],
    *,
    layer: str | Sequence[str] = "",
    fusion: Fusion = "mean",
    precision: Precision = "exact",
    top_predictions: int = 5,
    size: MapSize = "input",
    boxes: BoxOptions | None = None,
    evaluate: bool = False,
    evaluation_steps: int = DEFAULT_CURVE_STEPS,
) -> Whole:
    """A request, checked against the model.

    Raises:
        InvalidOption: unknown layer, parameters that do not fit it, or another bad option.
    """
    if any(isinstance(method, Auto) for method in methods):
        raise InvalidOption("auto: a server chooses, by its load and the deadline; here name a method")
    parts = make_parts(info, methods, layer_names(layer), fusion, size)
    count = sum(target.top_k or 1 for target in targets) or 1
    tasks = tuple(
        Task(position, part.method, 0, part.queries(count), part.layer.name) for position, part in enumerate(parts)
    )
    item = Item(image, tuple(targets), tasks, top_predictions, precision)
    return Whole(info, item, parts, size, boxes, check_curve_steps(evaluation_steps) if evaluate else None)


def explanation(whole: Whole, result: ItemResult, stage_seconds: Mapping[str, float], worker: str) -> Explanation:
    """The final maps, without curves."""
    info, item = whole.info, whole.item
    lies_on = None if whole.size == "layer" else background(images.picture(item.image), result.view, whole.size)
    maps = tuple(replace(saliency, image=lies_on) for saliency in _maps(whole, result, whole.size, whole.boxes))
    cost = Cost(
        queries=sum(partial.queries for partial in result.partials),
        stage_seconds=dict(stage_seconds),
        steps=1,
        precision=item.precision,
        worker=worker,
    )
    predictions = tuple(with_label(prediction, info.labels) for prediction in result.predictions)
    return Explanation(info.name, info.version, predictions, maps, result.view, cost)


def curves_item(whole: Whole, result: ItemResult) -> Item | None:
    """The item that asks the curves of every map; None where none are wanted."""
    if whole.evaluation_steps is None:
        return None
    curves = [
        MapCurves(saliency.array, saliency.target.index, whole.evaluation_steps)
        for saliency in _maps(whole, result, "input", None)
    ]
    tasks = tuple(Task(position, one, 0, one.queries(0, 1)) for position, one in enumerate(curves))
    return replace(whole.item, targets=(), tasks=tasks, top_predictions=0)


def with_curves(answer: Explanation, step: StepResult, result: ItemResult) -> Explanation:
    """The explanation with the deletion and insertion of its maps."""
    maps = tuple(
        replace(saliency, faithfulness=faithfulness(partial.sums))
        for saliency, partial in zip(answer.maps, result.partials, strict=True)
    )
    queries = sum(partial.queries for partial in result.partials)
    seconds = dict(answer.cost.stage_seconds) | {"evaluate": sum(step.stage_seconds.values())}
    cost = replace(
        answer.cost,
        queries=answer.cost.queries + queries,
        evaluation_queries=queries,
        stage_seconds=seconds,
        steps=answer.cost.steps + 1,
    )
    return replace(answer, maps=maps, cost=cost)


def _maps(whole: Whole, result: ItemResult, size: MapSize, boxes: BoxOptions | None) -> list[SaliencyMap]:
    """For each method one for each target."""
    return [
        final_map(
            [result.partials[position].sums[row] for position in positions],
            method=method,
            target=with_label(target, whole.info.labels),
            layers=[layer.name for layer in whole.parts.layers_of(method)],
            view=result.view,
            fusion=whole.parts.fusion,
            size=size,
            boxes=boxes,
        )
        for method, positions in whole.parts.positions()
        for row, target in enumerate(result.targets)
    ]
