"""Answers a whole request on one worker, where no gateway is in between: for the engine and for plain clients."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from camserve.finalise.render import lies_on
from camserve.finalise.results import Results, maps_of
from camserve.types import Explanation, Item, ItemResult, StepResult

Execute = Callable[[Item], tuple[StepResult, ItemResult]]
"""A function that executes one item alone and raises what it fails with."""


def explanation(results: Results, item: Item, step: StepResult, outcome: ItemResult, execute: Execute) -> Explanation:
    """Returns the explanation that begins with the answer to a request's first item.

    Args:
        results: results of the request; nothing has come in yet.
        item: the first item, as `results.next_item` made it.
        step: the step in which the item was executed, perhaps with other requests' items.
        outcome: the answer to the item.
        execute: function that executes the items that follow: rankings, curves.

    Raises:
        CamserveError: a later item fails, or the maps cannot be made.
    """
    following: Item | None = item
    while following is not None:
        results.take(outcome)
        results.spent(step)
        results.merge(following, outcome)
        following = results.next_item()
        if following is not None:
            step, outcome = execute(following)
    return _finished(results)


def _finished(results: Results) -> Explanation:
    began_s, known = time.perf_counter(), results.snapshot()
    model, size = known.fitted.model, known.fitted.request.output.size
    beneath = lies_on(known.fitted.request.image, known.opening.view, size)
    maps = tuple(replace(saliency, lies_on=beneath) for saliency in maps_of(known))
    predictions = tuple(prediction.named(model) for prediction in known.opening.predictions)
    cost = results.cost(0.0, time.perf_counter() - began_s)
    view, environments = known.opening.view, known.environments
    return Explanation(model.name, model.version, predictions, maps, view, cost, environments=environments)
