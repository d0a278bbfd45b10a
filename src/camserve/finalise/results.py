"""Gathers what has come in of a request, and makes the items that ask for the rest.

The gateway, the engine and the handler share it.

A *position* is the index of a part of the request. Behind the parts come the *follow-ups*, which can be asked only when
the sums before them are complete: first the rankings (of XRAI's attributions, one for each part that has one), then the
deletion and insertion curves of every map.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from camserve.finalise.convergence import Convergence, looks
from camserve.finalise.finish import finished, ranking_of
from camserve.finalise.maps import faithfulness, final_map
from camserve.images import read_image, size_bytes
from camserve.types import (
    BoxOptions,
    Cost,
    Explained,
    Faithfulness,
    Item,
    ItemResult,
    MapCurves,
    MapSize,
    ModelInfo,
    Partial,
    Precision,
    Prediction,
    Ranking,
    SaliencyMap,
    StepResult,
    Task,
    Vector,
)
from camserve.types.request import STEP_QUERIES, FittedRequest

WORKER_STAGES = ("decode", "forward", "queries")
EVALUATION = "evaluation"
"""Name under which queries of deletion and insertion curves are counted, beside the methods' names."""

FollowUp = Ranking | MapCurves
Range = tuple[int, int, int]
"""Position of a part or follow-up, and the start and stop of a range of its queries."""


@dataclass(frozen=True)
class Snapshot:
    """Holds what is known of an opened request at one moment; later answers do not change it."""

    fitted: FittedRequest
    opening: ItemResult
    partials: Mapping[int, Partial]
    """Merged partials by position."""
    answered: Mapping[int, int]
    """Number of queries answered, by position."""
    curves: Sequence[int]
    """Positions of the curves of the maps, in the maps' order; empty where there are none."""
    enough: frozenset[int]
    """Positions of parts whose maps are within their tolerance."""
    environments: tuple[str, ...]
    """Environments of the workers that answered, each as JSON, in order."""
    estimates: Mapping[int, Sequence[float]]
    """Estimated largest differences of each target's map to that of all queries, by position, where there are any."""

    def fraction(self, positions: Iterable[int]) -> float:
        """Returns the share of the queries of these parts that has been answered."""
        targets = len(self.opening.targets)
        total = done = 0
        for position in positions:
            total += self.fitted.part(position).queries(targets)
            done += self.answered.get(position, 0)
            if self.fitted.part(position).method.ranked:
                total += 1
                done += self.answered.get(ranking_position(self.fitted, position), 0)
        return done / total if total else 1.0

    def is_complete(self, position: int) -> bool:
        """Tells whether all that a part needs has been answered."""
        return position in self.enough or self.fraction([position]) == 1

    def estimated(self, positions: Iterable[int], row: int) -> float | None:
        """Returns the largest of the estimated differences of a target's maps; None where one is not known."""
        found = [self.estimates.get(position) for position in positions]
        return None if None in found else max(one[row] for one in found if one is not None)

    def map_sums(self, position: int) -> np.ndarray:
        """Returns the sums that the map of a part is made of, (targets, h, w); zeros where nothing was answered."""
        part, targets = self.fitted.part(position), len(self.opening.targets)
        if (ranked := self.partials.get(ranking_position(self.fitted, position))) is not None:
            return ranked.sums
        if (partial := self.partials.get(position)) is None:
            return np.zeros((targets, *part.sums_size(self.opening.view.size)))
        return finished(part.method, partial, self.fitted.request.output.signed)

    def faithfulness(self, number: int) -> Faithfulness | None:
        """Returns both curves of the map of this number, if all their points are there."""
        if number >= len(self.curves):
            return None
        partial = self.partials.get(self.curves[number])
        complete = partial is not None and self.answered.get(self.curves[number]) == partial.sums.size
        return faithfulness(partial.sums) if partial is not None and complete else None


def ranking_position(fitted: FittedRequest, position: int) -> int:
    """Returns the position of the ranking of a part; -1 for a part that has none."""
    ranked = [at for at, part in enumerate(fitted.parts) if part.method.ranked]
    return len(fitted.parts) + ranked.index(position) if position in ranked else -1


def rankings(fitted: FittedRequest) -> int:
    """Returns how many parts are ranked once their sums are complete."""
    return sum(part.method.ranked for part in fitted.parts)


def maps_of(known: Snapshot, size: MapSize | None = None, boxes: BoxOptions | None = None) -> Iterator[SaliencyMap]:
    """Yields for each method one final map for each target: the one place where merged sums become maps.

    Args:
        known: what was asked, and what has come in; a map is complete if all of it has.
        size: size of the maps; None means what the request asks, boxes included.
        boxes: boxes to find; counts only where a size is given.

    Raises:
        Unsupported: the network's activations or scores are not finite.
    """
    fitted, output, number = known.fitted, known.fitted.request.output, 0
    if size is None:
        size, boxes = output.size, output.boxes
    for index, (method, positions) in enumerate(fitted.parts.positions()):
        fraction = known.fraction(positions)
        sums = [known.map_sums(position) for position in positions]
        for row, explained in enumerate(known.opening.targets):
            said = _said(explained, fitted.model)
            saliency = final_map(
                [one[row] for one in sums],
                method=method,
                target=said["target"],
                layers=[layer.name for layer in fitted.parts.layers_of(method) if layer.name],
                view=known.opening.view,
                fusion=fitted.request.fusion,
                size=size,
                boxes=boxes,
                complete=all(map(known.is_complete, positions)),
                signed=output.signed,
            )
            choice = fitted.choices.get(index, "")
            yield replace(
                saliency,
                fraction=fraction,
                choice=choice,
                faithfulness=known.faithfulness(number),
                estimated_difference=known.estimated(positions, row),
                **said,
            )
            number += 1


def _said(explained: Explained, model: ModelInfo) -> dict[str, Any]:
    """Returns what a map says of its target."""
    classes = tuple(prediction.named(model) for prediction in explained.classes)
    text = explained.target.text(model.labels)
    target = classes[0] if classes else Prediction(0, text, similarity=explained.score)
    return {"target": target, "target_text": text, "classes": classes, "score": explained.score}


def follow_ups(known: Snapshot) -> dict[int, FollowUp]:
    """Returns what can be asked now that everything before it is complete, by position; empty where nothing is left.

    The maps whose curves are asked are made here, which takes time: a server calls it in a thread.
    """
    fitted = known.fitted
    first = len(fitted.parts)
    behind = first + rankings(fitted)
    if behind > first and first not in known.partials:
        found = [
            ranking_of(part.method, known.partials[at]) for at, part in enumerate(fitted.parts) if part.method.ranked
        ]
        return {first + number: ranking for number, ranking in enumerate(found) if ranking is not None}
    if fitted.request.evaluate and not known.curves:
        steps, targets = fitted.request.evaluation_steps, [explained.target for explained in known.opening.targets]
        return {
            behind + number: MapCurves(saliency.array, targets[number % len(targets)], steps)
            for number, saliency in enumerate(maps_of(known, "input"))
        }
    return {}


class Results:
    """Gathers what has come in of one request.

    `take` and `item` must be called in order from one thread; `merge` may be called from any.
    """

    def __init__(self, fitted: FittedRequest) -> None:
        self.fitted = fitted
        self.opening: ItemResult | None = None
        self.follow_ups: dict[int, FollowUp] = {}
        """Follow-ups that have been asked, by position."""
        self._lock = threading.Lock()
        self._partials: dict[int, Partial] = {}
        self._answered: dict[int, int] = {}
        self._made: Counter[int] = Counter()
        self._orders: dict[int, tuple[int, ...]] = {}
        self._labels: dict[int, tuple[int, ...]] = {}
        self._early: dict[tuple[int, int], tuple[Task, Partial]] = {}
        """Pieces that were answered before an earlier one of their position, by position and start."""
        self._environments: dict[str, None] = {}
        self._convergences: dict[int, Convergence] = {}
        """Convergences of the parts that accept a difference, by position."""
        self._stages = dict.fromkeys((*WORKER_STAGES, "merge"), 0.0)
        self._steps = 0
        self._image_bytes = 0
        self._last: StepResult | None = None
        self._precision: Precision = "exact"
        self._runtime = ""

    @property
    def answered(self) -> int:
        """Number of queries answered: the progress of the request."""
        with self._lock:
            return sum(self._answered.values())

    @property
    def total(self) -> int:
        """Number of queries asked, as far as it is known; without the curves until they are asked."""
        fitted = self.fitted
        targets = fitted.max_targets if self.opening is None else len(self.opening.targets)
        follow_ups = sum(one.queries(None, targets) for one in self.follow_ups.values())
        with self._lock:
            enough = {at: self._answered[at] for at, one in self._convergences.items() if one.enough}
        return sum(enough.get(at, part.queries(targets)) for at, part in enumerate(fitted.parts)) + follow_ups

    @property
    def enough(self) -> frozenset[int]:
        """Positions of parts of which no further query need be asked: their maps are within their tolerance."""
        with self._lock:
            return frozenset(at for at, convergence in self._convergences.items() if convergence.enough)

    def snapshot(self) -> Snapshot:
        """Returns what is known now; the opening must have come back."""
        assert self.opening is not None, "only an opened request has maps"
        with self._lock:
            behind = len(self.fitted.parts) + rankings(self.fitted)
            curves = [position for position in self.follow_ups if position >= behind]
            followed = self._convergences.items()
            return Snapshot(
                self.fitted,
                self.opening,
                dict(self._partials),
                dict(self._answered),
                curves,
                enough=frozenset(at for at, one in followed if one.enough),
                environments=tuple(self._environments),
                estimates={at: one.estimates for at, one in followed if one.estimates is not None},
            )

    def item(self, ranges: Iterable[Range], ordered: bool = True) -> Item:
        """Returns the item that asks for some ranges of queries; the opening asks for their order, if that is wanted.

        Pieces are asked in the order of their numbers, which no worker finds otherwise than another.

        The targets of an opened request are pinned: all steps explain the same, in the order and with the
        clusters that the opening's worker found, though another worker may round otherwise.
        """
        request = self.fitted.request
        targets, predictions = self.fitted.targets, request.top_predictions
        ordered = ordered and self.opening is None and not self.fitted.piece
        if self.opening is not None:
            targets, predictions = tuple(explained.target for explained in self.opening.targets), 1
        return Item(
            image=request.image,
            digest=self.fitted.digest,
            targets=targets,
            tasks=tuple(self._task(*one, ordered=ordered) for one in self._pieces(ranges)),
            text=request.text,
            reproducible=self.fitted.piece > 0,
            top_predictions=predictions,
            precision=request.precision,
        )

    def next_item(self) -> Item | None:
        """Returns the item that asks at once for all that can be asked now; None where nothing is left.

        Of a part that may stop early, that is all until the next look at its maps; of one that is asked in
        pieces, a step's worth of them, as soon as their number is known.
        """
        if self.opening is None:
            targets, sure = self.fitted.max_targets, not self.fitted.piece or self.fitted.known_targets is not None
            stops = {at: self._next_stop(at, 0, targets) for at in range(len(self.fitted.parts))}
            some = any(part.stops_early for part in self.fitted.parts)
            # Where none does, all is asked at once, in whichever order.
            return self.item(((at, 0, stop) for at, stop in stops.items() if sure or not stop), ordered=some)
        if ranges := self._ranges_left(len(self.opening.targets)):
            return self.item(ranges)
        found = follow_ups(self.snapshot())
        self.follow_ups |= found
        targets = len(self.opening.targets)
        return self.item((at, 0, one.queries(None, targets)) for at, one in found.items()) if found else None

    def take(self, result: ItemResult) -> None:
        """Counts the passes of an answer, and keeps from the first answer what every later item needs."""
        for partial in result.partials:
            self._made[partial.position] += partial.queries
        if result.precision != "exact":
            self._precision = result.precision
        self._runtime = result.runtime
        if self.opening is None:
            self.opening = replace(result, partials=())
            self._orders = {partial.position: partial.order for partial in result.partials if partial.order}
            self._labels = {partial.position: partial.labels for partial in result.partials if partial.labels}
            energies = {partial.position: partial.energies for partial in result.partials}
            for at, part in enumerate(self.fitted.parts):
                if part.method.accepted_difference:
                    queries, signed = part.queries(len(result.targets)), self.fitted.request.output.signed
                    self._convergences[at] = Convergence(part.method, queries, energies.get(at, ()), signed)

    def merge(self, item: Item, result: ItemResult) -> None:
        """Adds up what a worker answered to an item; pieces are added in their order, whenever they come."""
        began_s = time.perf_counter()
        with self._lock:
            for task, partial in zip(item.tasks, result.partials, strict=True):
                if not self.fitted.piece:
                    self._add(task, partial)
                    continue
                self._early[task.position, task.start] = task, partial
                self._add_pieces(task.position)
            self._stages["merge"] += time.perf_counter() - began_s

    def _add_pieces(self, position: int) -> None:
        """Adds the pieces of a position whose turn it is; none behind those with which its map is within its tolerance,
        for how many have been asked by then is a matter of time."""
        convergence = self._convergences.get(position)
        while convergence is None or not convergence.enough:
            piece = self._early.pop((position, self._answered.get(position, 0)), None)
            if piece is None:
                return
            self._add(*piece)

    def _add(self, task: Task, partial: Partial) -> None:
        known = self._partials.get(task.position)
        self._partials[task.position] = known.merge(partial) if known else partial
        total = self._queries_of(task)
        asked = min(task.stop, total) - min(task.start, total)
        self._answered[task.position] = self._answered.get(task.position, 0) + asked
        if asked and (convergence := self._convergences.get(task.position)) is not None:
            convergence.note(self._partials[task.position], self._answered[task.position])

    def sent(self, item: Item) -> None:
        """Counts the image bytes of an item on its way to a worker; an item may travel without its image."""
        references = [target.image for target in item.targets if isinstance(target, Vector)]
        sent = [image for image in (item.image, *references) if image is not None]
        self._image_bytes += sum(size_bytes(read_image(image)) for image in sent)

    def spent(self, step: StepResult) -> None:
        """Counts a step that had a slice of the request, and adds up its stages."""
        self._steps += 1
        self._last = step
        self._environments[step.environment] = None
        for stage in WORKER_STAGES:
            self._stages[stage] += step.stage_seconds.get(stage, 0.0)

    def queries(self) -> dict[str, int]:
        """Returns the number of passes by method; those of curves are under "evaluation"."""
        made: dict[str, int] = {}
        for position, queries in self._made.items():
            if position < len(self.fitted.parts):
                name = self.fitted.part(position).method.name
            elif isinstance(self.follow_ups[position], MapCurves):
                name = EVALUATION
            else:
                continue  # a ranking makes no pass
            made[name] = made.get(name, 0) + queries
        return made

    def cost(self, elapsed_s: float, render_s: float) -> Cost:
        """Returns what the request took.

        Args:
            elapsed_s: seconds from its arrival to its last answer. What no stage accounts for is counted as "queue".
            render_s: seconds in which the maps were made.
        """
        queries = self.queries()
        queue_s = max(0.0, elapsed_s - sum(self._stages.values()))
        return Cost(
            queries=sum(queries.values()),
            evaluation_queries=queries.get(EVALUATION, 0),
            stage_seconds={"queue": queue_s, **self._stages, "render": render_s},
            steps=self._steps,
            precision=self._precision,
            worker=self._last.worker if self._last else "",
            runtime=self._runtime,
            micro_batch=self._last.micro_batch if self._last else 0,
            image_bytes=self._image_bytes,
        )

    def _ranges_left(self, targets: int) -> list[Range]:
        """Returns what is asked next of the parts of which all was not asked at once."""
        left = []
        for at, part in enumerate(self.fitted.parts):
            done = self._answered.get(at, 0)
            if at not in self.enough and done < part.queries(targets):
                left.append((at, done, self._next_stop(at, done, targets)))
        return left

    def _next_stop(self, position: int, done: int, targets: int) -> int:
        """Returns up to which query a part is asked next, where nobody else asks it as well."""
        part = self.fitted.part(position)
        queries, block, piece = part.queries(targets), part.method.block, self.fitted.piece
        stop = queries
        if part.stops_early:
            stop = next((block * blocks for blocks in looks(queries // block) if block * blocks > done), queries)
        if piece:
            stop = min(-(-stop // piece) * piece, done + max(piece, STEP_QUERIES // piece * piece))
        return min(queries, stop)

    def _pieces(self, ranges: Iterable[Range]) -> Iterator[Range]:
        """Cuts ranges into the pieces that are asked and added up together, where the request has some."""
        piece = self.fitted.piece
        for position, start, stop in ranges:
            if not piece or stop - start <= piece:
                yield position, start, stop
                continue
            for first in range(start, stop, piece):
                yield position, first, min(stop, first + piece)

    def _queries_of(self, task: Task) -> int:
        assert self.opening is not None, "an answer is merged after the opening"
        targets = len(self.opening.targets)
        if task.position in self.follow_ups:
            return self.follow_ups[task.position].queries(None, targets)
        return self.fitted.part(task.position).queries(targets)

    def _task(self, position: int, start: int, stop: int, ordered: bool) -> Task:
        if position in self.follow_ups:
            # A layer of the request: the worker has its forward pass already.
            return Task(position, self.follow_ups[position], start, stop, self.fitted.parts.layers[0].name)
        part = self.fitted.part(position)
        return Task(
            position,
            part.method,
            start,
            stop,
            layer=part.layer.name,
            numbers=self._numbers(position, start, stop),
            ordered=ordered,
            labels=self._labels.get(position, ()),
        )

    def _numbers(self, position: int, start: int, stop: int) -> tuple[int, ...]:
        """Returns the numbers of the queries start..stop-1 in the order that the opening's worker found."""
        order = self._orders.get(position)
        return () if order is None else self.fitted.part(position).method.numbers(order, start, stop)
