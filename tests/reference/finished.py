"""The maps of an item as a server makes them: the queries, the finish, and the ranking where a method has one."""

from dataclasses import replace

import numpy as np

from camserve.finalise.finish import finished, ranking_of
from camserve.types import Item, Task
from camserve.worker.executor import Executor


def maps_of(runner: Executor, item: Item) -> list[np.ndarray]:
    """Returns (K, h, w) for each task, before ReLU, upsampling and scaling."""
    _, result = runner.answer(item)
    maps = []
    for task, partial in zip(item.tasks, result.partials, strict=True):
        ranking = ranking_of(task.method, partial)
        if ranking is None:
            maps.append(finished(task.method, partial))
        else:
            ask = replace(item, tasks=(Task(task.position, ranking, 0, 1, task.layer),))
            maps.append(runner.answer(ask)[1].partials[0].sums)
    return maps
