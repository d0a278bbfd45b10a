"""One request while its steps come and go: what is known so far, and the items that ask for the rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from camserve.errors import CamserveError
from camserve.finalise.maps import faithfulness
from camserve.gateway.request import Request
from camserve.planning import Slice, Span
from camserve.types import Cost, Faithfulness, Item, ItemResult, MapCurves, Partial, Target, Task

WORKER_STAGES = ("decode", "forward", "queries")
EVALUATION = "evaluation"
"""What the queries of deletion and insertion curves are counted as, beside the methods' names."""


@dataclass(frozen=True)
class Snapshot:
    """What is known of an opened request at one moment; later answers do not change it."""

    request: Request
    opening: ItemResult
    partials: Mapping[int, Partial]
    """By position."""
    answered: Mapping[int, int]
    """Query numbers answered, by position."""
    curves: Sequence[int]
    """Positions of the curves of the maps, in their order; empty where there are none."""

    def sums(self, position: int) -> np.ndarray:
        """(targets, h, w) of a part; zeros where nothing has been answered."""
        if position in self.partials:
            return self.partials[position].sums
        size = self.request.part(position).sums_size(self.opening.view.size)
        return np.zeros((len(self.opening.targets), *size))

    def fraction(self, positions: Sequence[int]) -> float:
        """Share of the queries of these parts that has been answered."""
        totals = self.request.final_totals(len(self.opening.targets))
        total = sum(totals[position] or 0 for position in positions)
        return sum(self.answered.get(position, 0) for position in positions) / total if total else 1.0

    def faithfulness(self, row: int) -> Faithfulness | None:
        """Both curves of the map of this number, if all their points are there."""
        if row >= len(self.curves):
            return None
        position = self.curves[row]
        partial = self.partials.get(position)
        complete = partial is not None and self.answered.get(position) == partial.sums.size
        return faithfulness(partial.sums) if partial is not None and complete else None


@dataclass(frozen=True)
class Origin:
    """The call by which a request came."""

    request_id: str = ""
    span: Any = None
    """As `camserve.gateway.tracing` gives it."""


NOWHERE = Origin()


class Running:
    """A request that a planner has taken on.

    Args:
        request: what was asked.
        now_s: time of its arrival.
        deadline_unix_s: when nobody waits for it any more; 0: never.
        origin: where it came from.
    """

    def __init__(self, request: Request, now_s: float, deadline_unix_s: float = 0.0, origin: Origin = NOWHERE) -> None:
        self.request = request
        self.origin = origin
        self._deadline_unix_s = deadline_unix_s
        self.opening: ItemResult | None = None
        self.partials: dict[int, Partial] = {}
        self.curves: dict[int, MapCurves] = {}
        """By position; empty until the maps are there."""
        self.changed = asyncio.Event()
        """Set whenever something has come in; whoever waits for it clears it."""
        self.error: CamserveError | None = None
        self.complete = False
        self.maps_complete = False
        """Everything has come in but the curves of the maps, which have not been asked yet."""
        self._answered: dict[int, int] = {}
        self._orders: dict[int, tuple[int, ...]] = {}
        """Numbers of a part's queries in the order in which they are asked; where there is none, they are as they are.
        The opening's worker says it, and everybody keeps to it."""
        self._began_s = now_s
        self._ended_s = now_s
        self._sent = False
        self._stages = dict.fromkeys((*WORKER_STAGES, "merge"), 0.0)
        self._steps = 0
        self._worker = ""

    @property
    def answered(self) -> int:
        """Query numbers answered; the progress of the request."""
        return sum(self._answered.values())

    def snapshot(self) -> Snapshot:
        """What is known now; the opening must have come back."""
        assert self.opening is not None, "only an opened request has maps"
        return Snapshot(self.request, self.opening, dict(self.partials), dict(self._answered), tuple(self.curves))

    @property
    def total(self) -> int:
        """Queries asked; once the opening has come back, all of them."""
        if self.opening is None:
            return sum(total or 0 for total in self.request.totals())
        known = sum(total or 0 for total in self.request.final_totals(len(self.opening.targets)))
        return known + sum(curves.queries(0, 1) for curves in self.curves.values())

    def item(self, part: Slice) -> Item:
        """The item that asks for a slice. Once opened, the targets are pinned: all steps explain the same classes."""
        request = self.request
        targets, predictions = request.targets, request.top_predictions
        if self.opening is not None:
            targets, predictions = tuple(Target(index=target.index) for target in self.opening.targets), 1
        return Item(
            image=request.image,
            targets=targets,
            tasks=tuple(self._task(span) for span in part.spans),
            top_predictions=predictions,
            precision=request.precision,
            deadline_unix_s=self._deadline_unix_s,
        )

    def _task(self, span: Span) -> Task:
        if span.position in self.curves:
            return Task(span.position, self.curves[span.position], span.start, span.stop)
        part = self.request.part(span.position)
        numbers = self._orders.get(span.position, ())[span.start : span.stop]
        ordered = self.opening is None
        return Task(span.position, part.method, span.start, span.stop, part.layer.name, numbers, ordered)

    def sent(self, now_s: float) -> float | None:
        """Work of it goes out: the first time, how long it has waited for that."""
        first, self._sent = not self._sent, True
        return now_s - self._began_s if first else None

    def add(self, part: Slice, result: ItemResult) -> None:
        """Merges what a worker answered."""
        began_s = time.perf_counter()
        if part.opening:
            self.opening = replace(result, partials=())
        for partial in result.partials:
            if partial.order:
                self._orders[partial.position] = partial.order
            known = self.partials.get(partial.position)
            self.partials[partial.position] = known.merge(partial) if known else partial
        for span in part.spans:
            self._answered[span.position] = self._answered.get(span.position, 0) + span.queries
        self._stages["merge"] += time.perf_counter() - began_s

    def add_curves(self, curves: Sequence[MapCurves]) -> range:
        """The maps exist: from now on their curves can be asked. Returns their positions."""
        positions = range(len(self.request.parts), len(self.request.parts) + len(curves))
        self.curves = dict(zip(positions, curves, strict=True))
        self.maps_complete = False
        return positions

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
        """Masked forward passes made, by method; those of curves as "evaluation"."""
        made: dict[str, int] = {}
        for position, partial in self.partials.items():
            name = EVALUATION if position in self.curves else self.request.part(position).method.name
            made[name] = made.get(name, 0) + partial.queries
        return made

    def cost(self, render_s: float) -> Cost:
        """What it took. "queue" is the time in which no worker was busy with it: waiting for a step, and on the way."""
        busy_s = sum(self._stages.values())
        queue_s = max(0.0, self._ended_s - self._began_s - busy_s)
        queries = self.queries()
        return Cost(
            queries=sum(queries.values()),
            evaluation_queries=queries.get(EVALUATION, 0),
            stage_seconds={"queue": queue_s, **self._stages, "render": render_s},
            steps=self._steps,
            precision=self.request.precision,
            worker=self._worker,
        )
