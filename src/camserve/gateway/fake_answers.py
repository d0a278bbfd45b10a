"""What the fake upstream answers. Sums are whole numbers that depend on the items alone, and additive per query."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from camserve import images
from camserve.errors import CamserveError
from camserve.methods import GroupCam, ScoreCam
from camserve.parts import Part
from camserve.types import (
    DeviceMemory,
    InputView,
    Item,
    ItemResult,
    MapCurves,
    ModelInfo,
    Partial,
    Prediction,
    Preprocessing,
    StepResult,
    Target,
    Task,
)

DEVICE_MEMORY = DeviceMemory("cpu", used_bytes=2**28, limit_bytes=2**32)


def answer(info: ModelInfo, items: Sequence[Item], errors: Mapping[bytes, CamserveError] | None = None) -> StepResult:
    """The answer to a step; `errors` by encoded image."""
    outcomes = tuple(_outcome(info, item, errors or {}) for item in items)
    stages = {"decode": 0.001, "forward": 0.002, "queries": 0.003}
    return StepResult(outcomes, stages, "fake:0:cpu", memory_hits=1, memory_misses=1, device_memory=DEVICE_MEMORY)


def _outcome(info: ModelInfo, item: Item, errors: Mapping[bytes, CamserveError]) -> ItemResult | CamserveError:
    try:
        if isinstance(item.image, bytes) and item.image in errors:
            raise errors[item.image]
        return _result(info, item)
    except CamserveError as error:
        return error


def _result(info: ModelInfo, item: Item) -> ItemResult:
    view = _view(item.image, info)
    ranking = _ranking(item.image, len(info.labels))
    targets = _resolved(item.targets, ranking)
    mood = random.random()  # orders differ from item to item, as workers may disagree, and never within one
    return ItemResult(
        predictions=tuple(_prediction(index, ranking) for index in ranking[: item.top_predictions]),
        targets=tuple(_prediction(index, ranking) for index in targets),
        view=view,
        partials=tuple(_partial(info, item.image, task, targets, random.Random(mood)) for task in item.tasks),
    )


def _partial(
    info: ModelInfo, image: bytes | np.ndarray, task: Task, targets: Sequence[int], chance: random.Random
) -> Partial:
    order: tuple[int, ...] = ()
    if task.ordered and isinstance(task.method, (ScoreCam, GroupCam)):
        queries = Part(task.method, info.layer(task.layer)).queries(len(targets))
        order = tuple(chance.sample(range(queries), queries))
        task = replace(task, numbers=order[task.start : task.stop])
    return Partial(task.position, task.stop - task.start, _sums(info, image, task, targets), order)


def _sums(info: ModelInfo, image: bytes | np.ndarray, task: Task, targets: Sequence[int]) -> np.ndarray:
    if isinstance(task.method, MapCurves):
        return _points(task.method, task.start, task.stop)
    return sums_of(image, task, info, targets)


def _points(curves: MapCurves, start: int, stop: int) -> np.ndarray:
    """(1, 2, points): the i-th query has the score 1 / (i + 1)."""
    found = np.zeros(curves.queries(0, 1), np.float32)
    found[start:stop] = 1 / (1 + np.arange(start, stop))
    return found.reshape(1, 2, curves.points)


def _view(image: bytes | np.ndarray, info: ModelInfo) -> InputView:
    """Decodes like a worker, so that a broken file is refused like there."""
    height, width = info.input_size
    if isinstance(image, np.ndarray) and image.shape[:2] == info.input_size:
        return images.whole_view(info.input_size)
    decoded = images.decode(image) if isinstance(image, bytes) else images.from_array(image)
    preprocessing = Preprocessing(max(height, width) + 8, (height, width), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return images.network_view(decoded, preprocessing)[1]


def _ranking(image: bytes | np.ndarray, classes: int) -> list[int]:
    """Class indices, the most probable first; depends on the image alone."""
    return [int(index) for index in np.random.default_rng(_seed(image)).permutation(classes)]


def _prediction(index: int, ranking: Sequence[int]) -> Prediction:
    place = ranking.index(index)
    return Prediction(index, "", 0.5 ** (place + 1))


def _resolved(targets: Sequence[Target], ranking: Sequence[int]) -> list[int]:
    """In the order asked, each class once."""
    found: list[int] = []
    for target in targets:
        found += ranking[: target.top_k] if target.top_k else [target.index or 0]
    return list(dict.fromkeys(found))


def sums_of(image: bytes | np.ndarray, task: Task, info: ModelInfo, targets: Sequence[int]) -> np.ndarray:
    """(targets, h, w) float32, whole numbers: one bump for each query, on a base for methods without queries."""
    assert not isinstance(task.method, MapCurves), "curves have no sums"
    part = Part(task.method, info.layer(task.layer))
    sums = np.zeros((len(targets), *part.sums_size(info.input_size)), np.float32)
    each, shared = part.queries(1), part.queries(1) == part.queries(2)
    if each == 0:
        for row, target in enumerate(targets):
            sums[row] = _bump(f"{_seed(image)} {task.method} {target}", sums[row].shape)
    for query in task.numbers or range(task.start, task.stop):
        for row in range(len(targets)) if shared else [query // each]:
            sums[row] += _bump(f"{_seed(image)} {task.method} {targets[row]} {query}", sums[row].shape)
    return sums


def _bump(key: str, size: tuple[int, ...]) -> np.ndarray:
    """(h, w): 16 at a place that depends on the key, falling off around it; whole numbers."""
    height, width = size
    row, column = _number(key) % height, _number(key) // height % width
    rows, columns = np.ogrid[:height, :width]
    return np.asarray(np.maximum(16 - 4 * ((rows - row) ** 2 + (columns - column) ** 2), 0), dtype=np.float32)


def _number(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


def _seed(image: bytes | np.ndarray) -> int:
    data = image if isinstance(image, bytes) else image.tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
