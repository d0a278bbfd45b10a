"""One request while its steps come and go: what is known so far, and the items that ask for the rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace

from camserve.errors import CamserveError
from camserve.gateway.request import Request
from camserve.planning import Slice
from camserve.types import Cost, Item, ItemResult, Partial, Target, Task

WORKER_STAGES = ("decode", "forward", "queries")


class Running:
    """A request that a planner has taken on.

    Args:
        request: what was asked.
        now_s: time of its arrival.
    """

    def __init__(self, request: Request, now_s: float) -> None:
        self.request = request
        self.opening: ItemResult | None = None
        self.partials: dict[int, Partial] = {}
        self.changed = asyncio.Event()
        """Set whenever something has come in; whoever waits for it clears it."""
        self.error: CamserveError | None = None
        self.complete = False
        self.answered = 0
        """Query numbers answered; the progress of the request."""
        self._began_s = now_s
        self._ended_s = now_s
        self._stages = dict.fromkeys((*WORKER_STAGES, "merge"), 0.0)
        self._steps = 0
        self._worker = ""

    @property
    def total(self) -> int:
        """Queries asked; once the opening has come back, all of them."""
        if self.opening is None:
            return sum(total or 0 for total in self.request.totals())
        return sum(self.request.final_totals(len(self.opening.targets)))

    def item(self, part: Slice) -> Item:
        """The item that asks for a slice. Once opened, the targets are pinned: all steps explain the same classes."""
        request = self.request
        targets, predictions = request.targets, request.top_predictions
        if self.opening is not None:
            targets, predictions = tuple(Target(index=target.index) for target in self.opening.targets), 1
        return Item(
            image=request.image,
            targets=targets,
            tasks=tuple(
                Task(span.position, request.methods[span.position], span.start, span.stop) for span in part.spans
            ),
            layer=request.layer.name,
            top_predictions=predictions,
            precision=request.precision,
        )

    def add(self, part: Slice, result: ItemResult) -> None:
        """Merges what a worker answered."""
        began_s = time.perf_counter()
        if part.opening:
            self.opening = replace(result, partials=())
        for partial in result.partials:
            known = self.partials.get(partial.position)
            self.partials[partial.position] = known.merge(partial) if known else partial
        self.answered += part.queries
        self._stages["merge"] += time.perf_counter() - began_s

    def spent(self, stage_seconds: Mapping[str, float], worker: str) -> None:
        """Accounts for a step that the request had a part in."""
        self._steps += 1
        self._worker = worker
        for stage in WORKER_STAGES:
            self._stages[stage] += stage_seconds.get(stage, 0.0)

    def finish(self, now_s: float) -> None:
        """Everything has come in."""
        self.complete = True
        self._ended_s = now_s
        self.changed.set()

    def fail(self, error: CamserveError) -> None:
        """The request will not be answered; the first error counts."""
        self.error = self.error or error
        self.changed.set()

    def queries(self) -> dict[str, int]:
        """Masked forward passes made, by method."""
        made: dict[str, int] = {}
        for position, partial in self.partials.items():
            name = self.request.methods[position].name
            made[name] = made.get(name, 0) + partial.queries
        return made

    def cost(self, render_s: float) -> Cost:
        """What it took. "queue" is the time in which no worker was busy with it: waiting for a step, and on the way."""
        busy_s = sum(self._stages.values())
        queue_s = max(0.0, self._ended_s - self._began_s - busy_s)
        return Cost(
            queries=sum(self.queries().values()),
            stage_seconds={"queue": queue_s, **self._stages, "render": render_s},
            steps=self._steps,
            precision=self.request.precision,
            worker=self._worker,
        )
