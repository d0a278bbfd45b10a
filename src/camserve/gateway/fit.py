"""Holds a worker's answer against what was asked, before anything of it is merged."""

from __future__ import annotations

from collections.abc import Sequence

from camserve.errors import CamserveError
from camserve.gateway.request import known_targets
from camserve.gateway.upstream import malformed
from camserve.parts import Part
from camserve.types import Item, ItemResult, MapCurves, ModelInfo, Partial, StepResult, Task


def check_fit(info: ModelInfo, items: Sequence[Item], result: StepResult) -> None:
    """Checks that each item has an outcome and each task a partial of the right shape.

    Args:
        info: the model.
        items: what was asked.
        result: what came.

    Raises:
        Unavailable: it does not fit; the log says where.
    """
    if len(result.outcomes) != len(items):
        raise malformed(f"{len(items)} items, {len(result.outcomes)} outcomes")
    for item, outcome in zip(items, result.outcomes, strict=True):
        if not isinstance(outcome, CamserveError):
            _check_item(info, item, outcome)


def _check_item(info: ModelInfo, item: Item, result: ItemResult) -> None:
    number = len(result.targets)
    if number != (known_targets(item.targets) or number) or number == 0:
        raise malformed(f"targets {item.targets} resolved to {result.targets}")
    asked = [task.position for task in item.tasks]
    came = [partial.position for partial in result.partials]
    if came != asked:
        raise malformed(f"tasks {asked}, partials {came}")
    for task, partial in zip(item.tasks, result.partials, strict=True):
        shape = _shape(info, task, number)
        if partial.sums.shape != shape:
            raise malformed(f"a partial of shape {partial.sums.shape} instead of {shape}")
        _check_order(info, task, partial, number)


def _check_order(info: ModelInfo, task: Task, partial: Partial, targets: int) -> None:
    """Every query has one place in an order, so that none is lost and none is asked twice."""
    if not partial.order:
        return
    total = task.method.queries(info.layer(task.layer).channels, targets)
    if not task.ordered or sorted(partial.order) != list(range(total)):
        raise malformed(f"an order of {len(partial.order)} queries instead of {total}")


def _shape(info: ModelInfo, task: Task, targets: int) -> tuple[int, int, int]:
    if isinstance(task.method, MapCurves):
        return 1, 2, task.method.points
    return targets, *Part(task.method, info.layer(task.layer)).sums_size(info.input_size)
