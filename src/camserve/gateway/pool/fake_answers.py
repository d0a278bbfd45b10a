"""Makes the answers of the fake backend.

Sums are whole numbers that depend on the items alone, and additive per query.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from camserve import images
from camserve.errors import INTERNAL_MESSAGE, CamserveError, ImageMissing, Internal, InvalidOption
from camserve.finalise.regions import shares
from camserve.images import ImageContent
from camserve.methods import GroupCam, IsCam, MethodSpec, ScoreCam, SsCam
from camserve.methods.work import Kind, decoded_units
from camserve.types import (
    Against,
    AnyTarget,
    BoxTarget,
    Contrast,
    Detection,
    DeviceMemory,
    Edges,
    Explained,
    InputView,
    Item,
    ItemResult,
    MapCurves,
    ModelInfo,
    Outputs,
    Partial,
    Prediction,
    Preprocessing,
    Ranking,
    Region,
    StepResult,
    Target,
    Task,
    Text,
    Value,
    Vector,
    Word,
    final_targets,
)
from camserve.types.model import OF_VECTORS
from camserve.types.parts import Part

log = logging.getLogger(__name__)

SECONDS: Mapping[Kind, float] = {
    "decode": 0.0005,
    "opening": 0.0003,
    "masked_forward": 0.0001,
    "layer_gradient": 0.0002,
    "pixel_gradient": 0.0009,
    "tail": 0.00004,
    "closed_form": 0.0,
    "ranking": 0.002,
}
"""Seconds that a unit is said to take, in a table that the planner does not share."""

DEVICE_MEMORY = DeviceMemory("cpu", used_bytes=2**28, limit_bytes=2**32)
"""Memory of the device that every answer tells of."""

ENVIRONMENT = '{"camserve": "fake", "preprocessing": {"resize_px": 8}}'
"""Environment that every answer tells of."""


def answer(
    info: ModelInfo,
    items: Sequence[Item],
    errors: Mapping[bytes, CamserveError] | None = None,
    sent: Sequence[Item] | None = None,
) -> StepResult:
    """Returns the answer to a step, which has taken what `SECONDS` says.

    Args:
        info: the model.
        items: the items, with their images.
        errors: errors of items, by encoded image.
        sent: the items as they were sent: those without an image have been decoded before. None: `items`.
    """
    outcomes = tuple(_outcome(info, item, errors or {}) for item in items)
    made = Counter[Kind]()
    for item, outcome in zip(sent or items, outcomes, strict=True):
        if item.image is not None and isinstance(outcome, ItemResult):
            made["decode"] += decoded_units(outcome.view.original_size)
    for item, outcome in zip(items, outcomes, strict=True):
        if isinstance(outcome, ItemResult):
            made.update(_made(info, item, len(outcome.targets)))
    seconds = {kind: units * SECONDS[kind] for kind, units in made.items()}
    forward_s, decode_s = seconds.pop("opening", 0.0), seconds.pop("decode", 0.0)
    return StepResult(
        outcomes,
        {"decode": 0.001 + decode_s, "forward": 0.002 + forward_s, "queries": 0.001 + sum(seconds.values())},
        worker="fake:0:cpu",
        memory_hits=1,
        memory_misses=1,
        device_memory=DEVICE_MEMORY,
        made=dict(+made),
        version=info.version,
        weights=info.weights,
        environment=ENVIRONMENT,
    )


def _made(info: ModelInfo, item: Item, targets: int) -> Mapping[Kind, int]:
    """Returns the units that an item takes: what its tasks ask, and a unit of opening for each ordered one."""
    made = Counter[Kind]()
    for task in item.tasks:
        queries = task.stop - task.start
        if isinstance(task.method, MapCurves):
            made["masked_forward"] += queries
        elif isinstance(task.method, Ranking):
            made["ranking"] += queries * targets
        else:
            layer = info.layer(task.layer)
            work, total = task.method.work(layer, targets), task.method.queries(layer, targets)
            made[work.kind] += queries * task.method.weight(targets) if total else work.units
            made["opening"] += task.ordered
    return made


def _outcome(info: ModelInfo, item: Item, errors: Mapping[bytes, CamserveError]) -> ItemResult | CamserveError:
    """Returns the answer to an item, or what it failed with: as in a worker, nothing of it reaches its neighbours."""
    try:
        if item.image is None:
            raise ImageMissing("the image of this digest is not here")
        if isinstance(item.image, bytes) and item.image in errors:
            raise errors[item.image]
        return _result(info, item, item.image)
    except CamserveError as error:
        return error
    except Exception as error:
        log.error("an item failed", exc_info=error)
        return Internal(INTERNAL_MESSAGE)


def _result(info: ModelInfo, item: Item, image: ImageContent) -> ItemResult:
    view = _view(image, info)
    ranking = _ranking(image, len(info.labels))
    explained = _explained(item.targets, ranking, info, view)
    targets = [key(one.target) for one in explained]
    mood = random.random()  # orders differ from item to item, as workers may disagree, and never within one
    return ItemResult(
        predictions=tuple(_prediction(index, ranking, info.outputs) for index in ranking[: item.top_predictions]),
        targets=explained,
        view=view,
        partials=tuple(_partial(info, image, task, targets, random.Random(mood)) for task in item.tasks),
    )


def _partial(
    info: ModelInfo, image: ImageContent, task: Task, targets: Sequence[Key], chance: random.Random
) -> Partial:
    order: tuple[int, ...] = ()
    energies: tuple[float, ...] = ()
    method, layer = task.method, info.layer(task.layer)
    if not isinstance(method, MethodSpec):
        return Partial(task.position, task.stop - task.start, _second_stage(method, task.start, task.stop))
    total = method.queries(layer, len(targets))
    if not task.numbers:  # a range is cut off at the end, as a worker does
        task = replace(task, start=min(task.start, total), stop=min(task.stop, total))
    if task.ordered and isinstance(method, (ScoreCam, GroupCam, SsCam, IsCam)):
        blocks = total // method.block
        order = tuple(chance.sample(range(blocks), blocks))
        energies = tuple(float(blocks - place) for place in range(blocks))
        task = replace(task, numbers=method.numbers(order, task.start, task.stop))
    labels: tuple[int, ...] = ()
    if not task.labels:  # workers may cluster differently: a test sees it if sums of two clusterings are merged
        number = method.labels(layer, len(targets))
        labels = tuple(chance.choices(range(method.label_values), k=number)) if number else ()
    return Partial(
        position=task.position,
        queries=task.stop - task.start,
        sums=sums_of(image, replace(task, labels=task.labels or labels), info, targets),
        order=order,
        energies=energies,
        context=context_of(image, task, info),
        labels=labels,
    )


def context_of(image: ImageContent, task: Task, info: ModelInfo) -> np.ndarray | None:
    """Returns whole numbers, the same for every task of an image that starts at query 0; None for other tasks."""
    assert isinstance(task.method, MethodSpec), "curves and rankings have no context"
    shape = task.method.context_shape(info.layer(task.layer)) if task.start == 0 else None
    return None if shape is None else _whole_numbers(f"{_seed(image)} context", shape)


def _second_stage(method: MapCurves | Ranking, start: int, stop: int) -> np.ndarray:
    """Returns the points of curves, or the maps of a ranking upside down."""
    if isinstance(method, MapCurves):
        return _points(method, start, stop)
    return ranked(method.attribution) if stop > start else np.zeros_like(method.attribution)


def ranked(attribution: np.ndarray) -> np.ndarray:
    """Returns what the fake makes of a ranking: the maps upside down."""
    return attribution[:, ::-1]


def _points(curves: MapCurves, start: int, stop: int) -> np.ndarray:
    """Returns the points of curves, (1, 2, points): the i-th query has the score 1 / (i + 1)."""
    found = np.zeros(curves.queries(None, 1), np.float32)
    found[start:stop] = 1 / (1 + np.arange(start, stop))
    return found.reshape(1, 2, curves.points)


def _view(image: ImageContent, info: ModelInfo) -> InputView:
    """Returns the view of an image, decoded like in a worker, so that a broken file is refused like there."""
    if isinstance(image, np.ndarray) and image.shape[:2] == info.input_size:
        return images.whole_view(info.input_size)
    values = (0.5,) * info.channels
    preprocessing = Preprocessing(max(info.input_size) + 8, info.input_size, values, values)
    if isinstance(image, np.ndarray):
        return images.network_view(images.picture(image), preprocessing)[1]
    return images.sent_view(image, preprocessing)[1]


def _ranking(image: ImageContent, classes: int) -> list[int]:
    """Returns the class indices, the most probable first; they depend on the image alone."""
    return [int(index) for index in np.random.default_rng(_seed(image)).permutation(classes)]


def _prediction(index: int, ranking: Sequence[int], outputs: Outputs) -> Prediction:
    """Returns a half for the first class of the ranking, a quarter for the second one and so on, or such numbers."""
    said = 0.5 ** (ranking.index(index) + 1)
    if outputs == "boxes":
        return Prediction(index, "", said, box=_box(ranking.index(index)))
    if outputs == "value":
        return Prediction(index, "", value=100 * said)
    if outputs == "segmentation":
        return Prediction(index, "", share=said)
    return Prediction(
        index,
        "",
        probability=None if outputs == "embedding" else said,
        similarity=said if outputs in OF_VECTORS else None,
    )


def _box(number: int) -> Edges:
    """Returns the box of a detection by its number; there is one of each class."""
    return number, number, number + 8.0, number + 6.0


def _detected(target: AnyTarget, ranking: Sequence[int], info: ModelInfo) -> tuple[AnyTarget, ...]:
    """Returns the boxes of the detections that a target of a model of boxes names; other targets as they are."""
    if info.outputs == "boxes" and isinstance(target, Target):
        target = Detection(of=target)
    if not isinstance(target, Detection):
        return (target,)
    found = [one.index or 0 for one in target.of.each(ranking)] if target.of else ranking[target.index :][:1]
    if not found:
        raise InvalidOption(f"there is no detection {target.index}; there are {len(ranking)}")
    return tuple(BoxTarget(_box(ranking.index(index)), Target(index=index)) for index in found)


def _explained(
    targets: Sequence[AnyTarget], ranking: Sequence[int], info: ModelInfo, view: InputView
) -> tuple[Explained, ...]:
    """Returns the targets as a worker resolves them, each once in the order asked."""
    known = [_placed(_embedded(one, info), view) for target in targets for one in _detected(target, ranking, info)]
    scores = np.array([0.5 ** (ranking.index(index) + 1) for index in range(len(ranking))])
    return tuple(_scored(target, ranking, info) for target in final_targets(known, ranking, scores))


def _placed(target: AnyTarget, view: InputView) -> AnyTarget:
    """Returns the target; a region without a place has the same one for every class and image."""
    if not isinstance(target, Region):
        return target
    shares(target, view, PLACES)  # what lies outside is refused
    return target if target.is_placed else replace(target, grid=images.mask_file(np.eye(*PLACES, dtype=bool)))


def _embedded(target: AnyTarget, info: ModelInfo) -> AnyTarget:
    """Returns the target; a vector whose values come of the image's content for a reference image."""
    if not isinstance(target, Vector) or target.image is None:
        return target
    _view(images.read_image(target.image), info)  # a broken file is refused
    return Vector(np.random.default_rng(list(target.key)).standard_normal(info.dimension))


PLACES = (12, 16)
"""Places (h, w) of the outputs of a network that tells the class of every place."""


def _scored(target: AnyTarget, ranking: Sequence[int], info: ModelInfo) -> Explained:
    classes = tuple(_prediction(one.index or 0, ranking, info.outputs) for one in target.classes)
    said = [one.value or one.similarity or one.share or one.probability or 0.0 for one in classes]
    match target:
        case Contrast():
            score = said[0] - target.gamma * sum(said[1:]) / len(said[1:])
        case Region():
            score = _scored(target.of, ranking, info).score
        case Vector() | Text() | Word() | BoxTarget(of=None):
            score = 0.25
        case Against():
            score = 1 - said[0]
        case _:
            score = -said[0] if isinstance(target, Value) and target.direction == "down" else said[0]
    return Explained(target, score, classes)


Key = int | str
"""Type of what a target's numbers depend on: the class's index, or the text of another target."""


def key(target: AnyTarget) -> Key:
    """Returns the key of a resolved target."""
    return target.index if isinstance(target, Target) and target.index is not None else target.text()


def sums_of(image: ImageContent, task: Task, info: ModelInfo, targets: Sequence[Key]) -> np.ndarray:
    """Returns whole numbers, (targets, h, w) float32: a bump for each query, or one for a method without queries.

    The sums of a method with a finish have the shape that its spec says.
    """
    assert isinstance(task.method, MethodSpec), "curves and rankings have no such sums"
    part, seed = Part(task.method, info.layer(task.layer)), _seed(image)
    shape = part.sums_shape(info.input_size, len(targets))
    if isinstance(task.method, (SsCam, IsCam)):
        return _gains(seed, task, task.method.samples, shape)
    if len(shape) != 3:
        return _colourful(seed, task, shape)
    sums = np.zeros((len(targets), *part.sums_size(info.input_size)), np.float32)
    each, shared = part.queries(1), part.queries(1) == part.queries(2)
    if each == 0:
        for row, target in enumerate(targets):
            sums[row] = _bump(f"{seed} {task.method} {target}", sums[row].shape)
    for query in task.numbers or range(task.start, task.stop):
        for row in range(len(targets)) if shared else [query // each]:
            sums[row] += _bump(f"{seed} {task.method} {targets[row]} {query} {task.labels}", sums[row].shape)
    return sums


def _gains(seed: int, task: Task, samples: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns (targets + 1, channels): a gain of 0 to 3 for each query, and the number of queries in the last row."""
    sums = np.zeros(shape, np.float32)
    for query in task.numbers or range(task.start, task.stop):
        sums[:-1, query // samples] += _whole_numbers(f"{seed} {task.method} {query}", (shape[0] - 1,))
        sums[-1, query // samples] += 1
    return sums


def _colourful(seed: int, task: Task, shape: tuple[int, ...]) -> np.ndarray:
    """Returns whole numbers for each query, added up; they are the same for all targets."""
    sums = np.zeros(shape, np.float32)
    for query in task.numbers or range(task.start, task.stop):
        sums += _whole_numbers(f"{seed} {task.method} {query}", shape[1:])
    return sums


def _whole_numbers(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns whole numbers from 0 to 3 that depend on the key."""
    return np.random.default_rng(_number(key)).integers(0, 4, shape).astype(np.float32)


def _bump(key: str, size: tuple[int, ...]) -> np.ndarray:
    """Returns whole numbers, (h, w): 16 at a cell that depends on the key, and less around it."""
    height, width = size
    row, column = _number(key) % height, _number(key) // height % width
    rows, columns = np.ogrid[:height, :width]
    return np.asarray(np.maximum(16 - 4 * ((rows - row) ** 2 + (columns - column) ** 2), 0), dtype=np.float32)


def _number(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


def _seed(image: ImageContent) -> int:
    return int.from_bytes(images.digest(image))
