"""Holds the answer of a worker against what was asked, before anything of it is merged."""

from __future__ import annotations

import math
from collections.abc import Sequence

from camserve.errors import CamserveError
from camserve.gateway.pool.torchserve import malformed
from camserve.methods import MethodSpec
from camserve.types import Item, ItemResult, MapCurves, ModelInfo, Partial, Ranking, StepResult, Task
from camserve.types.parts import Part
from camserve.types.request import known_targets, max_targets
from camserve.types.targets import is_final


def check_answer(info: ModelInfo, items: Sequence[Item], result: StepResult) -> None:
    """Checks that each item has an outcome and each task a partial of the right shape, and that times are times.

    Args:
        info: description of the model.
        items: the items that were sent.
        result: the answer that came.

    Raises:
        Unavailable: the answer does not fit; the log says where.
    """
    if len(result.outcomes) != len(items):
        raise malformed(f"{len(items)} items, {len(result.outcomes)} outcomes")
    # The planner learns from these seconds: one that is no number would spoil every prediction after it.
    if not all(math.isfinite(seconds) and seconds >= 0 for seconds in result.stage_seconds.values()):
        raise malformed(f"stages that took {dict(result.stage_seconds)} s")
    for item, outcome in zip(items, result.outcomes, strict=True):
        if not isinstance(outcome, CamserveError):
            _check_item(info, item, outcome)


def _check_item(info: ModelInfo, item: Item, result: ItemResult) -> None:
    """Raises Unavailable where the targets or the partials of an item do not fit it."""
    number, known, most = len(result.targets), known_targets(item.targets), max_targets(item.targets)
    if known not in (None, number) or not min(1, most) <= number <= most:
        raise malformed(f"targets {item.targets} resolved to {result.targets}")
    said = [*result.predictions, *(one for explained in result.targets for one in explained.classes)]
    if not all(is_final(explained.target) for explained in result.targets) or not all(
        one.index < len(info.labels) for one in said
    ):
        raise malformed(f"targets {result.targets} of {len(info.labels)} classes")
    asked = [task.position for task in item.tasks]
    came = [partial.position for partial in result.partials]
    if came != asked:
        raise malformed(f"tasks {asked}, partials {came}")
    for task, partial in zip(item.tasks, result.partials, strict=True):
        shape = _shape(info, task, number)
        if partial.sums.shape != shape:
            raise malformed(f"a partial of shape {partial.sums.shape} instead of {shape}")
        _check_order(info, task, partial, number)
        _check_rest(info, task, partial, number)


def _check_order(info: ModelInfo, task: Task, partial: Partial, targets: int) -> None:
    """Raises Unavailable where an order does not have every query once: one would be lost, or asked twice.

    Nor may it come without the energies that it goes by, each a number.
    """
    if not partial.order and not partial.energies:
        return
    total = task.method.queries(info.layer(task.layer), targets)
    blocks = total // task.method.block if isinstance(task.method, MethodSpec) else total
    if not task.ordered or sorted(partial.order) != list(range(blocks)):
        raise malformed(f"an order of {len(partial.order)} blocks of queries instead of {blocks}")
    energies = partial.energies
    if len(energies) != blocks or not all(math.isfinite(energy) and energy >= 0 for energy in energies):
        raise malformed(f"{len(energies)} energies of {blocks} blocks of queries, from {min(energies, default=0.0)}")


def _check_rest(info: ModelInfo, task: Task, partial: Partial, targets: int) -> None:
    """Raises Unavailable where the context does not come with the first query, or labels where none were sent."""
    if not isinstance(task.method, MethodSpec):
        return
    layer = info.layer(task.layer)
    shape = task.method.context_shape(layer) if task.start == 0 else None
    came = None if partial.context is None else partial.context.shape
    if came != shape:
        raise malformed(f"a context of shape {came} instead of {shape}")
    labels = 0 if task.labels else task.method.labels(layer, targets)
    if len(partial.labels) != labels or not set(partial.labels) <= set(range(task.method.label_values)):
        raise malformed(f"{len(partial.labels)} labels instead of {labels} below {task.method.label_values}")


def _shape(info: ModelInfo, task: Task, targets: int) -> tuple[int, ...]:
    """Returns the shape that the sums of a task must have."""
    if isinstance(task.method, MapCurves):
        return 1, 2, task.method.points
    if isinstance(task.method, Ranking):
        return task.method.attribution.shape
    return Part(task.method, info.layer(task.layer)).sums_shape(info.input_size, targets)
