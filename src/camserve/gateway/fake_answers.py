"""What the fake upstream answers: pure functions of the items. Sums are whole numbers and additive per query."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from camserve import images
from camserve.errors import CamserveError
from camserve.types import (
    InputView,
    Item,
    ItemResult,
    Layer,
    ModelInfo,
    Partial,
    Prediction,
    Preprocessing,
    StepResult,
    Target,
    Task,
)


def answer(info: ModelInfo, items: Sequence[Item], errors: Mapping[bytes, CamserveError] | None = None) -> StepResult:
    """The answer to a step; `errors` by encoded image."""
    outcomes = tuple(_outcome(info, item, errors or {}) for item in items)
    return StepResult(outcomes, {"decode": 0.001, "forward": 0.002, "queries": 0.003}, "fake:0:cpu")


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
    layer = info.layer(item.layer)
    return ItemResult(
        predictions=tuple(_prediction(index, ranking) for index in ranking[: item.top_predictions]),
        targets=tuple(_prediction(index, ranking) for index in targets),
        view=view,
        layer=layer.name,
        partials=tuple(
            Partial(task.position, task.stop - task.start, sums_of(item.image, task, layer, targets))
            for task in item.tasks
        ),
    )


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


def sums_of(image: bytes | np.ndarray, task: Task, layer: Layer, targets: Sequence[int]) -> np.ndarray:
    """(targets, h, w) float32, whole numbers: one bump for each query, on a base for methods without queries."""
    sums = np.zeros((len(targets), layer.height, layer.width), np.float32)
    if task.method.queries(layer.channels, 1) == 0:
        for row, target in enumerate(targets):
            sums[row] = _bump(f"{_seed(image)} {task.method} {target}", layer)
    shared = task.method.queries(layer.channels, 1) == task.method.queries(layer.channels, 2)
    for query in range(task.start, task.stop):
        per_target = task.method.queries(layer.channels, 1)
        rows = range(len(targets)) if shared else [query // per_target]
        for row in rows:
            sums[row] += _bump(f"{_seed(image)} {task.method} {targets[row]} {query}", layer)
    return sums


def _bump(key: str, layer: Layer) -> np.ndarray:
    """(h, w): 16 at a place that depends on the key, falling off around it; whole numbers."""
    place = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
    row, column = place % layer.height, place // layer.height % layer.width
    rows, columns = np.mgrid[: layer.height, : layer.width]
    return np.asarray(np.maximum(16 - 4 * ((rows - row) ** 2 + (columns - column) ** 2), 0), dtype=np.float32)


def _seed(image: bytes | np.ndarray) -> int:
    data = image if isinstance(image, bytes) else image.tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
